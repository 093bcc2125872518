//! Directories that are open. The position in a listing is a cookie of the
//! file system: it is carried as it is, and means the same only on a file
//! system that numbers its entries the same way; at the beginning (and on most
//! file systems at the end) it always does.

use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use super::look::Subject;
use super::{named, only_flags, set_flags, Claim, Description, Kind, LARGEFILE, SETTABLE};
use crate::error::{Context, Error, Result};
use crate::state::objects::Opener;
use crate::state::paths::FilePath;

/// A directory that is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    pub path: FilePath,
    /// Where getdents(2) goes on.
    pub position: u64,
}

const KNOWN: i32 = SETTABLE | libc::O_SYNC | libc::O_DIRECTORY | libc::O_NOFOLLOW | LARGEFILE;

pub(super) fn claim(s: &Subject<'_>) -> Claim {
    if s.nature.file_type() != libc::S_IFDIR {
        return Claim::NotMine;
    }
    match only_flags(s, KNOWN).and_then(|()| named(s)) {
        Ok(path) => Claim::Mine(Kind::Directory(Directory {
            path,
            position: s.position,
        })),
        Err(obstacle) => Claim::Refused(obstacle),
    }
}

pub(super) fn open(d: &Description, dir: &Directory, opener: &Opener) -> Result<OwnedFd> {
    if d.flags & !KNOWN != 0 {
        return Err(Error::bad(
            &dir.path,
            "is to be opened with impossible flags",
        ));
    }
    let fd = opener
        .directory(&dir.path)?
        .open(OFlag::from_bits_retain(d.flags))
        .context("open", &dir.path)?;
    adjust(&fd, d, dir)?;
    Ok(fd)
}

pub(super) fn adjust(fd: &OwnedFd, d: &Description, dir: &Directory) -> Result<()> {
    set_flags(fd, d.flags, &dir.path)?;
    super::regular::seek(fd, dir.position, &dir.path)
}
