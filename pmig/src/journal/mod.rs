//! What both sides write down, so that whoever comes after a crash knows who
//! may let the program run.
//!
//! Every migration has a directory at the source and one at the target,
//! `/var/lib/pmig/{source,target}/ID/`, with these files, each of them made
//! whole and never changed:
//!
//! | file | | made |
//! |---|---|---|
//! | `record` | ARMED: who, where, when, on which boot | synced, before the freeze |
//! | `fate` | what was decided, see below | when all is done that follows |
//! | `verdict` | source, after COMMITTING: MOVED or RUNS_HERE | exclusively |
//! | `settled` | all was done that follows; nothing is held any more | last |
//! | `ended` | target: how the program ended | by its holder |
//! | `files` | target: what is to be renamed at the commit | before Ready |
//! | `input` | source: what was typed for the program and taken away | in the freeze |
//! | `serves` | source: memory is to be sent after the commit | before the freeze |
//! | `fill` | target: memory may be missing | before Ready |
//! | `lock` | held shared by all who work on it | |
//!
//! And one where things are quicker made and need not outlive the boot,
//! `/run/pmig/fates/{source,target}/ID/`:
//!
//! | file | | made |
//! |---|---|---|
//! | `fate` | source: COMMITTING or ABORTED; target: COMMITTED or ABORTED | exclusively: the first wins |
//! | `aborted` | what ABORTED says where there is no room to write why | before `record` |
//!
//! From the freeze on nothing is synced: a record need only outlive the death of
//! pmig. If the machine dies, so does the program on it, and the boot id tells.
//! A record that is missing, or of another boot, never reads as "never ran", and
//! a decision that is missing where it was to be made never as "undecided".

mod source;
mod store;
mod target;

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{printable, Context, Error, Result};
use crate::hold::Place;
use crate::id::{Id, Secret};
use crate::transport::Addr;

pub use source::{
    left, open as open_source, see as see_source, Armed, Committing, Lost, Order, Stage, Verdict,
};
pub use store::Folder;
use store::Prepared;
pub use target::{
    look, open as open_target, see as see_target, Aborted, Committed, Fate, Husk, Looked, NeverRan,
};

/// Settled records are kept this long, to be asked and looked at.
const KEEP_FOR: Duration = Duration::from_secs(30 * 24 * 3600);

/// And at most this many of them.
const KEEP: usize = 1000;

/// Which end of a migration a record belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Source,
    Target,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Role::Source => "source",
            Role::Target => "target",
        }
    }
}

/// ARMED: all that is needed to finish or undo a migration without the pmig
/// that began it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub version: u32,
    pub role: Role,
    pub id: Id,
    pub secret: Secret,
    pub boot_id: String,
    pub pid: i32,
    /// The process's start time in clock ticks since boot (proc_pid_stat(5)).
    pub start: u64,
    /// Unescaped, as the program set it.
    pub comm: String,
    /// The other machine, as a person would name it.
    pub peer: String,
    /// Where to ask the target; in the target's own record the file that it comes
    /// from, if it does.
    pub addr: Option<Addr>,
    pub place: Place,
    /// Seconds since 1970.
    pub time: u64,
}

impl Record {
    /// Where the program is if it is no more at the source: `runs on b`, or `is
    /// in FILE`. Control characters are escaped.
    pub fn there(&self) -> String {
        let peer = printable(&self.peer);
        match self.addr {
            Some(Addr::File(_)) => format!("is in {peer}"),
            _ => format!("runs on {peer}"),
        }
    }
}

const VERSION: u32 = 2;

/// Why something was aborted where there was no room to write why.
const UNSAID: &str = "why could not be written down";

/// What the caller of `arm` knows.
#[derive(Debug, Clone)]
pub struct New {
    pub id: Id,
    pub secret: Secret,
    pub pid: i32,
    pub comm: String,
    pub peer: String,
    pub addr: Option<Addr>,
    pub place: Place,
}

/// A directory of a migration, opened.
#[derive(Debug)]
struct Entry {
    folder: Folder,
    /// Where its fate is decided, if that is of this boot.
    fates: Option<Folder>,
    record: Record,
    /// The decision for the program's move, written ahead of time by who may
    /// have to take it while the program stands still.
    prepared: Option<Prepared>,
    /// None where the fate is only looked up or decided beside a live owner.
    _lock: Option<Flock<std::os::fd::OwnedFd>>,
}

/// Where pmig keeps what must outlive it: `PMIG_STATE_DIR`, or `/var/lib/pmig`.
pub fn state_dir() -> PathBuf {
    dir("PMIG_STATE_DIR", "/var/lib/pmig")
}

/// Where pmig keeps what need not outlive a boot: `PMIG_RUN_DIR`, or
/// `/run/pmig`.
pub fn run_dir() -> PathBuf {
    dir("PMIG_RUN_DIR", "/run/pmig")
}

fn dir(variable: &str, default: &str) -> PathBuf {
    std::env::var_os(variable)
        .filter(|v| !v.is_empty())
        .map_or_else(|| default.into(), PathBuf::from)
}

/// This boot of the machine (proc_sys_kernel(5), `random/boot_id`).
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(path).context("read", path)?;
    Ok(id.trim().to_owned())
}

/// When a process started, in clock ticks since boot. With the PID it names a
/// process for as long as the machine is up.
pub fn start_of(pid: i32) -> Result<u64> {
    procfs::process::Process::new(pid)
        .and_then(|p| p.stat())
        .map(|s| s.starttime)
        .map_err(|e| match e {
            procfs::ProcError::NotFound(_) => Error::Gone(pid),
            e => Error::bad(format!("/proc/{pid}/stat"), e),
        })
}

/// The state directory of one role.
pub(crate) fn folder(role: Role) -> Result<Folder> {
    Folder::at(&state_dir())?.sub(role.name())
}

/// Where the fates of one role are decided.
fn fates(role: Role) -> Result<Folder> {
    Folder::at(&run_dir())?.sub("fates")?.sub(role.name())
}

impl Entry {
    /// Records ARMED, with what [`Entry::decide_as_prepared`] decides made ready.
    /// `otherwise` is decided if the other way is taken and there is no room left to
    /// say why.
    fn create<T: Serialize>(role: Role, new: New, wish: &T, otherwise: &T) -> Result<Entry> {
        let all = folder(role)?;
        let name = new.id.to_string();
        let known = || {
            Error::bad(
                format!("migration {}", new.id),
                format!(
                    "this machine has a record of it as its {} already",
                    role.name()
                ),
            )
        };
        let folder = all.make(&name)?.ok_or_else(known)?;
        // Without a record they are nobody's, and go with age.
        let fates = fates(role)?.make(&name)?.ok_or_else(known)?;
        fates.replace("aborted", &json(otherwise)?, false)?;
        let prepared = fates.prepare(&json(wish)?)?;
        let lock = folder.lock(FlockArg::LockSharedNonblock)?;
        let record = Record {
            version: VERSION,
            role,
            id: new.id,
            secret: new.secret,
            boot_id: boot_id()?,
            start: start_of(new.pid)?,
            pid: new.pid,
            comm: new.comm,
            peer: new.peer,
            addr: new.addr,
            place: new.place,
            time: now(),
        };
        folder.replace("record", &json(&record)?, true)?;
        all.sync()?;
        Ok(Entry {
            folder,
            fates: Some(fates),
            record,
            prepared: Some(prepared),
            _lock: lock,
        })
    }

    /// What was decided, if anything was.
    fn fate<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        // As long as this boot lasts it stays where it was decided.
        let here = self.fates.as_ref().map(|fates| read(fates, "fate"));
        if let Some(fate) = here.transpose()?.flatten() {
            return Ok(Some(fate));
        }
        let settled = read(&self.folder, "fate")?;
        if settled.is_none() && !self.settled()? {
            self.deciding()?;
        }
        Ok(settled)
    }

    /// Where it is decided. Nothing that stands still is of another boot.
    fn deciding(&self) -> Result<&Folder> {
        match &self.fates {
            Some(fates) => Ok(fates),
            None if self.this_boot()? => Err(Error::bad(
                run_dir().join("fates").display(),
                format!(
                    "the decision on migration {} is gone from it, so nobody can tell who may \
                     let the program run",
                    self.record.id
                ),
            )),
            None => Ok(&self.folder),
        }
    }

    /// Puts a decision there by `put`, unless one was taken; whether it won.
    fn decide_by(&self, put: impl FnOnce(&Folder) -> Result<bool>) -> Result<bool> {
        if self.folder.has("fate")? {
            return Ok(false);
        }
        put(self.deciding()?)
    }

    /// Decides the fate, unless it is decided; whether it won.
    fn decide(&self, wish: &impl Serialize) -> Result<bool> {
        let wish = json(wish)?;
        self.decide_by(|fates| fates.decide("fate", &wish))
    }

    /// Decides against the move: that must be possible on a full disk too.
    fn decide_against(&self, wish: &impl Serialize) -> Result<bool> {
        self.decide(wish).or_else(|e| {
            let written = self.decide_by(|fates| fates.put_as("aborted", "fate"));
            written.map_err(|_| e)
        })
    }

    /// The same, by what was written ahead of time if there is such.
    fn decide_as_prepared(&self, wish: &impl Serialize) -> Result<bool> {
        match &self.prepared {
            Some(prepared) => self.decide_by(|fates| fates.put(prepared, "fate")),
            None => self.decide(wish),
        }
    }

    fn open(folder: Folder, role: Role, id: Id, lock: Option<FlockArg>) -> Result<Option<Entry>> {
        let lock = match lock {
            Some(how) => match folder.lock(how)? {
                Some(lock) => Some(lock),
                None => return Ok(None),
            },
            None => None,
        };
        let record: Record = read(&folder, "record")?
            .ok_or_else(|| Error::bad(folder.path().display(), "has no record"))?;
        if record.version != VERSION || record.id != id || record.role != role {
            return Err(Error::bad(
                folder.path().join("record").display(),
                "is not the record of this migration, or of another version",
            ));
        }
        // Where those of another boot are still there, they may be half written.
        let fates = match record.boot_id == boot_id()? {
            true => fates(role)?.find(&id.to_string())?,
            false => None,
        };
        Ok(Some(Entry {
            folder,
            fates,
            record,
            prepared: None,
            _lock: lock,
        }))
    }

    fn this_boot(&self) -> Result<bool> {
        Ok(self.record.boot_id == boot_id()?)
    }

    fn settle(&self) -> Result<()> {
        if let Some(fates) = &self.fates {
            // What was decided is asked for after a boot too. Here it stays as well:
            // somebody may be about to decide.
            match fates.read("fate")? {
                Some(fate) if !self.folder.has("fate")? => {
                    self.folder.replace("fate", &fate, false)?;
                }
                _ => {}
            }
            if let Some(prepared) = &self.prepared {
                fates.discard(prepared)?;
            }
            fates.forget("aborted")?;
        }
        self.folder.forget("input")?;
        self.folder.decide("settled", b"{}\n").map(drop)
    }

    fn settled(&self) -> Result<bool> {
        self.folder.has("settled")
    }
}

/// What was found of a migration under its id.
#[derive(Debug)]
pub enum Found<T> {
    /// Nobody works on it; now the caller does.
    Mine(T),
    /// A pmig or a keeper is at work on it.
    Busy,
    /// There is no such record.
    Missing,
}

fn claim(role: Role, id: Id) -> Result<Found<Entry>> {
    let Some(folder) = folder(role)?.find(&id.to_string())? else {
        return Ok(Found::Missing);
    };
    Ok(
        match Entry::open(folder, role, id, Some(FlockArg::LockExclusiveNonblock))? {
            Some(entry) => Found::Mine(entry),
            None => Found::Busy,
        },
    )
}

/// The migrations of a role that are not settled, oldest names first.
pub fn unsettled(role: Role) -> Result<Vec<Id>> {
    let all = folder(role)?;
    let mut ids = Vec::new();
    for name in all.names()? {
        let Ok(id) = name.parse::<Id>() else { continue };
        let Some(one) = all.find(&name)? else {
            continue;
        };
        if one.has("record")? && !one.has("settled")? {
            ids.push(id);
        }
    }
    ids.sort();
    Ok(ids)
}

/// The migrations of a role that are settled, in no order.
pub fn settled(role: Role) -> Result<Vec<Id>> {
    let all = folder(role)?;
    let mut ids = Vec::new();
    for name in all.names()? {
        let Ok(id) = name.parse::<Id>() else { continue };
        if all
            .find(&name)?
            .is_some_and(|one| one.has("settled").unwrap_or(false))
        {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// Opens a record only to look at it, whoever works on it.
fn see(role: Role, id: Id) -> Result<Option<Entry>> {
    match folder(role)?.find(&id.to_string())? {
        Some(folder) => Entry::open(folder, role, id, None),
        None => Ok(None),
    }
}

/// Deletes settled records that are old, or too many.
pub fn prune(role: Role) -> Result<()> {
    let (all, fates) = (folder(role)?, fates(role)?);
    let oldest = now().saturating_sub(KEEP_FOR.as_secs()) as i64;
    let mut settled = Vec::new();
    for name in all.names()? {
        if name.parse::<Id>().is_err() {
            continue;
        }
        let Some(one) = all.find(&name)? else {
            continue;
        };
        if let Some(time) = one.changed("settled")? {
            settled.push((time, name));
        } else if !one.has("record")? && all.changed(&name)?.is_some_and(|t| t < oldest) {
            // Whoever made it died before it said anything.
            settled.push((0, name));
        }
    }
    settled.sort();
    let surplus = settled.len().saturating_sub(KEEP);
    for (n, (time, name)) in settled.into_iter().enumerate() {
        if n >= surplus && time >= oldest {
            break;
        }
        let Some(one) = all.find(&name)? else {
            continue;
        };
        if let Some(_lock) = one.lock(FlockArg::LockExclusiveNonblock)? {
            fates.remove(&name)?;
            all.remove(&name)?;
        }
    }
    Ok(())
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(value).map_err(|e| Error::bad("record to write", e))?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn read<T: DeserializeOwned>(folder: &Folder, name: &str) -> Result<Option<T>> {
    folder
        .read(name)?
        .map(|bytes| {
            serde_json::from_slice(&bytes)
                .map_err(|e| Error::bad(folder.path().join(name).display(), e))
        })
        .transpose()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Once;

    use super::*;

    /// Records of these tests go to a directory of their own, not the machine's.
    pub(crate) fn private_state() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            let dir = std::env::temp_dir().join(format!("pmig-test-{}", std::process::id()));
            std::env::set_var("PMIG_STATE_DIR", dir.join("state"));
            std::env::set_var("PMIG_RUN_DIR", dir.join("run"));
        });
    }

    pub(crate) fn new(pid: i32, place: Place) -> New {
        New {
            id: Id::random().unwrap(),
            secret: Secret::random().unwrap(),
            pid,
            comm: "test".into(),
            peer: "b".into(),
            addr: None,
            place,
        }
    }

    fn nowhere() -> New {
        let place = Place {
            cgroup: "/nonexistent/pmig".into(),
            home: None,
        };
        new(std::process::id() as i32, place)
    }

    #[test]
    fn commit_and_abort_race_and_one_wins() {
        private_state();
        for _ in 0..20 {
            let armed = Armed::arm(nowhere()).unwrap();
            let (commit, abort) = std::thread::scope(|s| {
                let commit = s.spawn(|| armed.commit());
                let abort = s.spawn(|| armed.abort("too slow"));
                (commit.join().unwrap(), abort.join().unwrap().unwrap())
            });
            match (commit, abort) {
                (Ok(c), Stage::Committing(_)) => assert_eq!(c.order().id(), armed.record().id),
                (Err(Lost::Aborted { why }), Stage::Aborted(..)) => assert_eq!(why, "too slow"),
                other => panic!("both or neither: {other:?}"),
            }
        }
    }

    #[test]
    fn the_same_id_arms_once_only() {
        private_state();
        let new = nowhere();
        let _one = Armed::arm(new.clone()).unwrap();
        assert!(Armed::arm(new.clone()).is_err());
        let husk = Husk::arm(new.clone()).unwrap();
        assert!(Husk::arm(new).is_err());
        assert!(husk.this_boot().unwrap());
    }

    #[test]
    fn an_owner_keeps_others_away_until_it_is_gone() {
        private_state();
        let new = nowhere();
        let id = new.id;
        assert!(matches!(open_source(id).unwrap(), Found::Missing));
        let armed = Armed::arm(new).unwrap();
        assert!(matches!(open_source(id).unwrap(), Found::Busy));
        let keeper = Armed::join(id).unwrap();
        drop(armed);
        assert!(matches!(open_source(id).unwrap(), Found::Busy));
        drop(keeper);
        let Found::Mine(mine) = open_source(id).unwrap() else {
            panic!("free now")
        };
        assert!(Armed::join(id).is_err(), "a resolver keeps keepers away");
        assert!(unsettled(Role::Source).unwrap().contains(&id));
        mine.settle().unwrap();
        assert!(!unsettled(Role::Source).unwrap().contains(&id));
    }

    #[test]
    fn what_is_not_known_never_reads_as_never_ran() {
        private_state();
        let new = nowhere();
        assert!(matches!(
            look(new.id, &new.secret).unwrap(),
            Looked::Unknown(_)
        ));
        let husk = Husk::arm(new.clone()).unwrap();
        assert!(matches!(
            look(new.id, &Secret::random().unwrap()).unwrap(),
            Looked::Unknown(_)
        ));
        assert!(matches!(
            look(new.id, &new.secret).unwrap(),
            Looked::Undecided(_)
        ));
        // Another boot: whatever was recorded unsynced may be lost.
        let folder = folder(Role::Target).unwrap();
        let one = folder.find(&new.id.to_string()).unwrap().unwrap();
        let mut record = husk.record().clone();
        record.boot_id = "another".into();
        one.replace("record", &json(&record).unwrap(), false)
            .unwrap();
        assert!(matches!(
            look(new.id, &new.secret).unwrap(),
            Looked::Unknown(_)
        ));
        one.replace("record", b"{\"garbage\":", false).unwrap();
        assert!(look(new.id, &new.secret).is_err());
    }

    fn lose_fates(role: Role, id: Id) {
        fates(role).unwrap().remove(&id.to_string()).unwrap();
    }

    #[test]
    fn a_decision_that_is_gone_never_reads_as_undecided() {
        private_state();
        let new = nowhere();
        let armed = Armed::arm(new.clone()).unwrap();
        let husk = Husk::arm(new.clone()).unwrap();
        let order = armed.commit().unwrap().order();
        lose_fates(Role::Source, new.id);
        lose_fates(Role::Target, new.id);
        for armed in [armed, see_source(new.id).unwrap().unwrap()] {
            assert!(armed.abort("nobody knows better").is_err());
        }
        assert!(see_source(new.id).unwrap().unwrap().stage().is_err());
        for husk in [husk, see_target(new.id).unwrap().unwrap()] {
            assert!(husk.commit(&order).is_err());
        }
        assert!(look(new.id, &new.secret).is_err());
    }

    #[test]
    fn what_was_settled_is_known_after_a_boot() {
        private_state();
        let new = nowhere();
        let husk = Husk::arm(new.clone()).unwrap();
        let Fate::Aborted(aborted) = husk.abort("the source asked").unwrap() else {
            panic!("nothing else was recorded")
        };
        aborted.settle().unwrap();
        lose_fates(Role::Target, new.id);
        let all = folder(Role::Target).unwrap();
        let one = all.find(&new.id.to_string()).unwrap().unwrap();
        let mut record = husk.record().clone();
        record.boot_id = "another".into();
        one.replace("record", &json(&record).unwrap(), false)
            .unwrap();
        let order = Armed::arm(new.clone()).unwrap().commit().unwrap().order();
        let husk = see_target(new.id).unwrap().unwrap();
        assert!(matches!(husk.commit(&order).unwrap(), Fate::Aborted(_)));
        assert!(matches!(
            look(new.id, &new.secret).unwrap(),
            Looked::Decided(Fate::Aborted(_))
        ));
    }

    #[test]
    fn a_late_commit_is_refused() {
        private_state();
        let new = nowhere();
        let source = Armed::arm(new.clone()).unwrap();
        let husk = Husk::arm(new.clone()).unwrap();
        let Fate::Aborted(aborted) = husk.abort("the source asked").unwrap() else {
            panic!("nothing else was recorded")
        };
        aborted.bury().unwrap();
        let order = source.commit().unwrap().order();
        assert!(matches!(husk.commit(&order).unwrap(), Fate::Aborted(_)));

        let other = Husk::arm(nowhere()).unwrap();
        assert!(other.commit(&order).is_err(), "an order for another one");
        assert!(other.fate().unwrap().is_none());
    }

    #[test]
    fn a_verdict_is_given_once() {
        private_state();
        let armed = Armed::arm(nowhere()).unwrap();
        let committing = armed.commit().unwrap();
        let here = committing.by_hand(true).unwrap();
        assert!(matches!(here, Verdict::RunsHere { .. }));
        assert_eq!(committing.runs_there().unwrap(), here);
        assert!(matches!(armed.stage().unwrap(), Stage::Decided(_, v) if v == here));
    }

    #[test]
    fn old_records_go_and_fresh_ones_stay() {
        private_state();
        let fresh = Armed::arm(nowhere()).unwrap();
        fresh.settle().unwrap();
        let old = Armed::arm(nowhere()).unwrap();
        old.settle().unwrap();
        let (fresh_id, old_id) = (fresh.record().id, old.record().id);
        let settled = old.0.folder.path().join("settled");
        drop((fresh, old));
        let past = SystemTime::now() - KEEP_FOR - Duration::from_secs(60);
        std::fs::File::options()
            .append(true)
            .open(settled)
            .unwrap()
            .set_modified(past)
            .unwrap();
        prune(Role::Source).unwrap();
        assert!(matches!(open_source(old_id).unwrap(), Found::Missing));
        assert!(matches!(open_source(fresh_id).unwrap(), Found::Mine(_)));
        let left = fates(Role::Source).unwrap().names().unwrap();
        assert!(!left.contains(&old_id.to_string()));
    }
}
