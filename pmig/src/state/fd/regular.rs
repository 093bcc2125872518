//! Regular files: path, flags, offset. Whether the target has the same file
//! is the business of the files room.

use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use nix::unistd::{lseek, Whence};
use serde::{Deserialize, Serialize};

use super::look::Subject;
use super::{named, only_flags, set_flags, Claim, Description, Kind, LARGEFILE, SETTABLE};
use crate::error::{Context, Error, Result};
use crate::state::objects::Opener;
use crate::state::paths::FilePath;

/// A regular file that is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Regular {
    pub path: FilePath,
    /// The inode number at the source: another one under the same path is
    /// another file.
    pub ino: u64,
    /// In bytes.
    pub offset: u64,
}

const KNOWN: i32 = libc::O_ACCMODE | SETTABLE | libc::O_SYNC | libc::O_NOFOLLOW | LARGEFILE;

pub(super) fn claim(s: &Subject<'_>) -> Claim {
    if s.nature.file_type() != libc::S_IFREG || !s.has_path() {
        return Claim::NotMine;
    }
    match only_flags(s, KNOWN).and_then(|()| named(s)) {
        Ok(path) => Claim::Mine(Kind::Regular(Regular {
            path,
            ino: s.nature.ino,
            offset: s.position,
        })),
        Err(obstacle) => Claim::Refused(obstacle),
    }
}

pub(super) fn open(d: &Description, r: &Regular, opener: &Opener) -> Result<OwnedFd> {
    if d.flags & !KNOWN != 0 {
        return Err(Error::bad(&r.path, "is to be opened with impossible flags"));
    }
    let pinned = opener.regular(&r.path)?;
    let fd = pinned
        .open(OFlag::from_bits_retain(d.flags))
        .context("open", &r.path)?;
    adjust(&fd, d, r)?;
    Ok(fd)
}

pub(super) fn adjust(fd: &OwnedFd, d: &Description, r: &Regular) -> Result<()> {
    set_flags(fd, d.flags, &r.path)?;
    seek(fd, r.offset, &r.path)
}

/// Moves the offset to where it was; every file system has an end of its own.
pub(super) fn seek(fd: &OwnedFd, to: u64, path: &FilePath) -> Result<()> {
    let to = i64::try_from(to).map_err(|_| Error::bad(path, "its offset is impossible"))?;
    let at = lseek(fd, to, Whence::SeekSet).context("seek in", path)?;
    if at != to {
        return Err(Error::bad(path, format!("seeks to {at} instead of {to}")));
    }
    Ok(())
}
