//! Whose leftovers are whose: processes told apart by PID and start time.

use anyhow::{Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::fs;
use std::path::{Path, PathBuf};

/// A process, not mistaken for a later one with the same PID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Owner {
    pub pid: u32,
    /// Start time in clock ticks since boot, field 22 of proc_pid_stat(5).
    pub start: u64,
}

impl Owner {
    /// The process that has this PID now, if any.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
        let state = fields.next()?;
        let start = fields.nth(18)?.parse().ok()?;
        (state != "Z").then_some(Self { pid, start })
    }

    /// This process.
    pub fn me() -> Self {
        let pid = std::process::id();
        Self::of(pid).unwrap_or(Self { pid, start: 0 })
    }

    /// True while it runs.
    pub fn alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Writes down in a directory that this process belongs to it.
    ///
    /// # Errors
    /// Those of the file.
    pub fn record(self, directory: &Path, name: &str) -> Result<()> {
        let path = directory.join(format!("{name}.owner"));
        fs::write(&path, self.to_string()).with_context(|| format!("write {}", path.display()))
    }

    fn parse(text: &str) -> Option<Self> {
        let (pid, start) = text.split_once('-')?;
        Some(Self {
            pid: pid.parse().ok()?,
            start: start.parse().ok()?,
        })
    }
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.pid, self.start)
    }
}

/// What the names of the lab's passing things begin with.
pub const PREFIX: &str = "pmig-lab.";

/// Those entries of a directory that labs of ended processes left behind; they
/// are named [`PREFIX`], owner, dot, anything.
pub fn leftovers(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let owner = name
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX))
                .and_then(|rest| rest.split('.').next())
                .and_then(Owner::parse);
            owner.is_some_and(|owner| !owner.alive())
        })
        .map(|entry| entry.path())
        .collect()
}

/// Ends the processes that a directory's records name, and removes it.
pub fn clear(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let recorded = entry.path().extension().is_some_and(|e| e == "owner");
        let owner = fs::read_to_string(entry.path());
        let owner = owner.ok().and_then(|text| Owner::parse(&text));
        if let (true, Some(owner)) = (recorded, owner) {
            if let (true, Ok(pid)) = (owner.alive(), i32::try_from(owner.pid)) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
    let _ = fs::remove_dir_all(directory);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ended_processes_left_behind_is_a_leftover() {
        let directory = tempfile::tempdir().unwrap();
        let me = Owner::me();
        assert!(me.alive());
        let gone = Owner {
            start: me.start + 1,
            ..me
        };
        for owner in [me, gone] {
            fs::create_dir(directory.path().join(format!("{PREFIX}{owner}.x"))).unwrap();
        }
        fs::create_dir(directory.path().join("other")).unwrap();
        let expected = directory.path().join(format!("{PREFIX}{gone}.x"));
        assert_eq!(leftovers(directory.path()), [expected]);
    }
}
