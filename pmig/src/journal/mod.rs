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
//! | `fate` | what was decided below | when nobody waits for it any more |
//! | `verdict` | source, after COMMITTING: MOVED or RUNS_HERE | exclusively |
//! | `settled` | all was done that follows; nothing is held any more | last |
//! | `ended` | target: how the program ended | by its holder |
//! | `files` | target: what is to be renamed at the commit | before Ready |
//! | `input` | source: what was typed for the program and taken away | in the freeze |
//! | `serves` | source: memory is to be sent after the commit | before the freeze |
//! | `fill` | target: memory may be missing | before Ready |
//! | `lock` | held shared by all who work on it | |
//!
//! And one where names are quicker changed and need not outlive the boot,
//! `/run/pmig/fates/{source,target}/ID/`:
//!
//! | file | | |
//! |---|---|---|
//! | `undecided` | renamed by the first who decides | before `record` |
//! | `committing`, `committed` | what it became at the source, at the target | |
//! | `aborted` | or what it became at either | |
//! | `why` | why it was aborted, where there was room to write | before that |
//!
//! From the freeze on nothing is synced: a record need only outlive the death of
//! pmig. If the machine dies, so does the program on it, and the boot id tells.
//! A record that is missing, or of another boot, never reads as "never ran".
//!
//! Where `/run/pmig/fates` is lost while the machine is up, what was decided there is
//! not known, and never reads as "undecided". Then it is decided in the records
//! themselves: by the one process that alone could have given the order, as long as it
//! lives; at the source, after its death, as if the order was given; at the target by
//! a person.

mod entry;
mod source;
mod store;
mod target;

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::FlockArg;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{printable, Context, Error, Result};
use crate::hold::Place;
use crate::id::{Id, Secret};
use crate::transport::Addr;

use entry::Entry;
pub use source::{
    left, open as open_source, see as see_source, Armed, Committing, Lost, Order, Stage, Verdict,
};
pub use store::Folder;
pub use target::{
    look, open as open_target, see as see_target, Aborted, Committed, Fate, Husk, Looked, NeverRan,
    Strayed,
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
    /// Whether the process that it names is there, and has not ended.
    pub fn lives(&self) -> bool {
        let stat = procfs::process::Process::new(self.pid).and_then(|p| p.stat());
        stat.is_ok_and(|s| s.starttime == self.start && !matches!(s.state, 'Z' | 'X'))
    }

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

const VERSION: u32 = 3;

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
pub(crate) mod tests;
