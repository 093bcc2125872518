use std::time::{SystemTime, UNIX_EPOCH};

use pmig::error::printable;
use pmig::journal::Role;
use pmig::resolve::{self, Known, Past, Whereabouts};

use super::output::{json, line};
use super::{files, say, Exit, Ps};

pub fn run(args: &Ps) -> Exit {
    resolve::sweep(&files::Shipped);
    let mut known = match resolve::known() {
        Ok(known) => known,
        Err(e) => {
            say(&e);
            return Exit::Other;
        }
    };
    if !args.all {
        known
            .past
            .retain(|one| one.whereabouts != Whereabouts::Stayed);
    }
    if args.json {
        json(&known);
    } else {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        show(&known, now).iter().for_each(|l| line(l));
    }
    Exit::Done
}

fn show(known: &Known, now: u64) -> Vec<String> {
    if known.open.is_empty() && known.past.is_empty() {
        return vec!["nothing came here or left".into()];
    }
    let row = |pid: &str, comm: &str, when: &str, what: &str| {
        format!("{pid:>8}  {comm:<15}  {when:>8}  {what}")
    };
    let mut text = vec![row("PID", "NAME", "AGO", "WHERE")];
    text.extend(known.past.iter().map(|one| {
        let (pid, comm) = (one.pid.to_string(), printable(&one.comm));
        row(&pid, &comm, &ago(now.saturating_sub(one.time)), &place(one))
    }));
    text.extend(known.open.iter().map(|one| {
        let (pid, comm) = (one.pid.to_string(), printable(&one.comm));
        let more = match one.busy {
            true => String::new(),
            false => format!("; pmig resolve {}", one.id),
        };
        row(&pid, &comm, &ago(one.age), &format!("{}{more}", one.what))
    }));
    text
}

fn place(one: &Past) -> String {
    let peer = printable(&one.peer);
    match (one.whereabouts, one.role) {
        (Whereabouts::Here, _) => format!("runs here, from {peer}"),
        (Whereabouts::Ended, _) => format!("has ended here, from {peer}"),
        (Whereabouts::Left, _) => format!("left for {peer}"),
        (Whereabouts::InFile, _) => format!("was written to {peer}"),
        (Whereabouts::Unknown, Role::Source) => format!("was to go to {peer}; unknown since"),
        (Whereabouts::Unknown, Role::Target) => format!("was to come from {peer}; unknown since"),
        (Whereabouts::Stayed, Role::Source) => format!("stayed here, was to go to {peer}"),
        (Whereabouts::Stayed, Role::Target) => format!("did not come from {peer}"),
    }
}

fn ago(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pmig::id::Id;

    #[test]
    fn a_screen_tells_who_is_where_since_when() {
        let past = |role, pid, peer: &str, time, whereabouts| Past {
            id: Id::random().unwrap(),
            role,
            pid,
            comm: "si\nm".into(),
            peer: peer.into(),
            time,
            whereabouts,
        };
        let known = Known {
            open: Vec::new(),
            past: vec![
                past(Role::Source, 7, "b", 0, Whereabouts::Left),
                past(Role::Target, 4242, "b", 9_000, Whereabouts::Here),
                past(Role::Source, 9, "/srv/x", 9_990, Whereabouts::InFile),
            ],
        };
        assert_eq!(
            show(&known, 10_000),
            [
                "     PID  NAME                  AGO  WHERE",
                "       7  si\\nm                 2 h  left for b",
                "    4242  si\\nm              16 min  runs here, from b",
                "       9  si\\nm                10 s  was written to /srv/x",
            ]
        );
    }
}
