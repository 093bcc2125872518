//! Files a process has open or mapped: what they are at the source, whether
//! the target has the same, and how they get there where it has not.
//!
//! The room has four parts: [`Sources`] describes the files at the source,
//! [`compare`] looks at them at the target, [`Shipment`] and [`Receiver`] carry
//! them over, and the [`Ledger`] remembers what was left behind.

mod compare;
mod identity;
mod leftovers;
mod receive;
mod ship;
mod sources;
mod still;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_shipping;

use std::time::{Duration, SystemTime};

use nix::sys::stat::FileStat;
use serde::{Deserialize, Serialize};

pub use compare::{compare, Plan};
pub use identity::Identity;
pub use leftovers::{Ledger, Leftover};
pub use receive::{Pending, Receiver};
pub use ship::{Pass, Shipment, BLOCK};
pub use sources::{Link, Sources, Use};

use crate::error::{Error, Result};
use crate::state::paths::FilePath;

/// The most files that are carried or compared for one process.
pub const MAX_FILES: usize = 1 << 16;

/// How far a file's time stamps may lag behind what happened to it: they come
/// from the kernel's coarse clock, which moves once a jiffy.
const LAG: Duration = Duration::from_millis(20);

/// The same where the file system keeps whole seconds, or pairs of them.
const LAG_OF_SECONDS: Duration = Duration::from_millis(2100);

/// Which state of which file: as long as it stays the same, so does the
/// content, within the limits of the file system's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    pub dev: u64,
    pub ino: u64,
    /// In bytes.
    pub size: u64,
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (i64, u32),
    /// Seconds and nanoseconds since the epoch.
    pub ctime: (i64, u32),
}

impl Stamp {
    pub fn of(stat: &FileStat) -> Stamp {
        Stamp {
            dev: stat.st_dev,
            ino: stat.st_ino,
            size: stat.st_size.max(0) as u64,
            mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
            ctime: (stat.st_ctime, stat.st_ctime_nsec as u32),
        }
    }

    /// How long after `now` a change to the file is sure to show in its time
    /// stamps; none where it is already.
    fn unsettled(&self, now: SystemTime) -> Option<Duration> {
        let newest = self.mtime.max(self.ctime);
        let coarse = self.mtime.1 == 0 && self.ctime.1 == 0;
        let lag = if coarse { LAG_OF_SECONDS } else { LAG };
        let since = u64::try_from(newest.0).unwrap_or(0);
        let settled = SystemTime::UNIX_EPOCH + Duration::new(since, newest.1) + lag;
        let wait = settled.duration_since(now).ok()?;
        // Of a time in the future nothing can be said but that it is not now.
        (!wait.is_zero() && wait <= lag).then_some(wait)
    }
}

/// What a process does with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Uses {
    /// It is its executable.
    pub exe: bool,
    /// It is mapped.
    pub mapped: bool,
    /// It is open for reading.
    pub read: bool,
    /// It is open for writing.
    pub written: bool,
}

/// A regular file at the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRef {
    pub path: FilePath,
    pub uses: Uses,
    pub stamp: Stamp,
    /// Bytes it takes on the disk: less than its size where it has holes.
    pub allocated: u64,
    /// Permission bits; nothing above 0o7777.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub identity: Identity,
}

/// The files of a process and the machine they are on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSet {
    /// `/proc/sys/kernel/random/boot_id`: device and inode numbers mean the
    /// same only under one kernel.
    pub boot: String,
    pub files: Vec<FileRef>,
}

impl FileSet {
    /// Checks what came from a peer.
    ///
    /// # Errors
    /// [`Error::Bad`] saying what is wrong.
    pub fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::bad("list of files", what));
        if self.files.len() > MAX_FILES {
            return bad("is too long");
        }
        if self.boot.len() > 64 {
            return bad("has an impossible boot id");
        }
        let mut paths: Vec<&FilePath> = self.files.iter().map(|f| &f.path).collect();
        paths.sort_unstable();
        if paths.windows(2).any(|w| w[0] == w[1]) {
            return bad("names a file twice");
        }
        for f in &self.files {
            if f.stamp.size > i64::MAX as u64 || f.mode & !0o7777 != 0 {
                return bad("a file has an impossible size or mode");
            }
            f.identity.check()?;
            if f.uses.written != (f.identity == Identity::Written) {
                return bad("a file's identity does not fit its use");
            }
        }
        Ok(())
    }
}

/// The identity of the running kernel.
///
/// # Errors
/// Where procfs does not say.
pub fn boot_id() -> Result<String> {
    use crate::error::Context;
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).context("read", path)?;
    Ok(text.trim().to_owned())
}
