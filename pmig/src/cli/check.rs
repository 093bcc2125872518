use std::fs;

use pmig::error::{printable, Error, Obstacle, Result};
use pmig::resolve;
use pmig::source;
use pmig::transport::Addr;
use serde::Serialize;

use super::machine::{capabilities, hostname, release, Capability};
use super::output::{json, line};
use super::{files, say, Check, Exit};

/// What `check --json` prints.
#[derive(Serialize)]
struct Machine {
    host: String,
    kernel: String,
    /// Whether everything needed is there.
    able: bool,
    capabilities: Vec<Capability>,
}

/// What `check PID --json` prints.
#[derive(Serialize)]
struct Process {
    pid: i32,
    comm: String,
    to: Option<Addr>,
    can_move: bool,
    obstacles: Vec<Obstacle>,
    /// What will not be as it was.
    notes: Vec<String>,
}

/// What a program can notice of a move.
const CHANGES: &str = "what will change: its parent, session, process group and cgroup; \
                       its start time and the CPU time used so far";

pub fn run(args: &Check) -> Exit {
    resolve::sweep(&files::Shipped);
    match (args.pid, &args.addr) {
        (None, _) => machine(args.json),
        (Some(pid), addr) => {
            if let Some(Err(exit)) = addr.as_ref().map(|a| args.insecure.allows(a)) {
                return exit;
            }
            match obstacles(pid, addr.as_ref(), args) {
                Ok(obstacles) => process(pid, addr.as_ref(), obstacles, args.json),
                Err(Error::Gone(pid)) => {
                    say(&Error::bad(pid, "there is no such process"));
                    Exit::Other
                }
                Err(e) => {
                    say(&e);
                    Exit::Other
                }
            }
        }
    }
}

fn machine(as_json: bool) -> Exit {
    let all = capabilities();
    let able = all.iter().all(|c| c.have || !c.needed);
    let machine = Machine {
        host: hostname(),
        kernel: release(),
        able,
        capabilities: all,
    };
    if as_json {
        json(&machine);
    } else {
        let verdict = if able { "can" } else { "cannot" };
        line(&format!(
            "{}, linux {}, {verdict} move processes",
            printable(&machine.host),
            printable(&machine.kernel)
        ));
        for c in &machine.capabilities {
            let mark = match (c.have, c.needed) {
                (true, _) => "ok",
                (false, true) => "MISSING",
                (false, false) => "absent",
            };
            let mut text = format!("  {mark:<8} {:<20} {}", c.name, printable(&c.detail));
            if !c.have {
                text += &format!("; {}", c.remedy);
            }
            line(&text);
        }
    }
    if able {
        Exit::Done
    } else {
        Exit::Refused
    }
}

fn obstacles(pid: i32, addr: Option<&Addr>, args: &Check) -> Result<Vec<Obstacle>> {
    let mut all = Vec::new();
    for missing in capabilities().into_iter().filter(|c| c.needed && !c.have) {
        all.push(Obstacle::new(
            format!("this machine's {}", missing.name),
            missing.detail,
            missing.remedy,
        ));
    }
    if !all.is_empty() {
        return Ok(all);
    }
    match addr {
        // Looks at what is here too.
        Some(addr) => source::ask(pid, addr, &args.how.options()),
        None => source::preflight(pid),
    }
}

fn process(pid: i32, addr: Option<&Addr>, obstacles: Vec<Obstacle>, as_json: bool) -> Exit {
    let comm = comm(pid);
    let can_move = obstacles.is_empty();
    // What it had open may be gone by now.
    let notes = match can_move {
        true => source::notes(pid).unwrap_or_default(),
        false => Vec::new(),
    };
    if as_json {
        json(&Process {
            pid,
            comm,
            to: addr.cloned(),
            can_move,
            obstacles,
            notes,
        });
    } else {
        refusal(pid, &comm, addr, &obstacles)
            .iter()
            .for_each(|l| line(l));
        if can_move {
            line(&format!("  {CHANGES}"));
            notes
                .iter()
                .for_each(|n| line(&format!("  {}", printable(n))));
        }
    }
    if can_move {
        Exit::Done
    } else {
        Exit::Refused
    }
}

/// A program's name, unescaped; nothing where it is gone.
pub fn comm(pid: i32) -> String {
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    comm.trim_end_matches('\n').to_owned()
}

/// The obstacles as a person reads them, one a line.
pub fn refusal(pid: i32, comm: &str, addr: Option<&Addr>, obstacles: &[Obstacle]) -> Vec<String> {
    let to = addr.map_or(String::new(), |a| format!(" to {}", a.host()));
    let (verdict, count) = match obstacles.len() {
        0 => ("can", String::new()),
        1 => ("cannot", ": 1 obstacle".into()),
        n => ("cannot", format!(": {n} obstacles")),
    };
    let mut lines = vec![printable(&format!(
        "{pid} {comm} {verdict} move{to}{count}"
    ))];
    let width = obstacles
        .iter()
        .map(|o| printable(&o.object).chars().count())
        .max()
        .unwrap_or(0)
        .min(40);
    for o in obstacles {
        let (object, why, remedy) = (
            printable(&o.object),
            printable(&o.why),
            printable(&o.remedy),
        );
        let mut text = format!("  {object:<width$}   {why}");
        if !remedy.is_empty() {
            text += &format!("; {remedy}");
        }
        lines.push(text);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_obstacle_is_one_line_whatever_it_is_called() {
        let obstacles = [
            Obstacle::new("fd 7 /dev/nvidia0", "exists only here", "close it first"),
            Obstacle::new("mapping /x\n\x1b[31m", "is another file there", ""),
        ];
        let addr = "tcp://b".parse().ok();
        let lines = refusal(4242, "simulate", addr.as_ref(), &obstacles);
        assert_eq!(lines[0], "4242 simulate cannot move to b: 2 obstacles");
        let columns: Vec<&str> = lines[1].split("   ").map(str::trim).collect();
        assert_eq!(columns[0], "fd 7 /dev/nvidia0");
        assert_eq!(columns.last(), Some(&"exists only here; close it first"));
        assert!(lines.iter().all(|l| !l.chars().any(char::is_control)));
        assert_eq!(refusal(1, "x", None, &[]), ["1 x can move"]);
    }
}
