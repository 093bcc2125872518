//! `/dev/null` and its kin: devices that are the same on every machine and
//! remember nothing.

use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use nix::sys::stat::makedev;
use serde::{Deserialize, Serialize};

use super::look::{Name, Subject};
use super::{named, only_flags, set_flags, Claim, Description, Kind, LARGEFILE, SETTABLE};
use crate::error::{Context, Error, Result};
use crate::state::objects::Opener;
use crate::state::paths::FilePath;

/// A stateless character device that is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub path: FilePath,
    pub which: Which,
}

/// Devices of major number 1: mem(4), null(4), random(4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Which {
    Null,
    Zero,
    Full,
    Random,
    Urandom,
}

impl Which {
    const ALL: [Which; 5] = [
        Which::Null,
        Which::Zero,
        Which::Full,
        Which::Random,
        Which::Urandom,
    ];

    fn rdev(self) -> libc::dev_t {
        let minor = match self {
            Which::Null => 3,
            Which::Zero => 5,
            Which::Full => 7,
            Which::Random => 8,
            Which::Urandom => 9,
        };
        makedev(1, minor)
    }
}

const KNOWN: i32 = libc::O_ACCMODE | SETTABLE | libc::O_SYNC | libc::O_NOFOLLOW | LARGEFILE;

pub(super) fn claim(s: &Subject<'_>) -> Claim {
    if s.nature.file_type() != libc::S_IFCHR {
        return Claim::NotMine;
    }
    let Some(which) = Which::ALL.into_iter().find(|w| w.rdev() == s.nature.rdev) else {
        return Claim::NotMine;
    };
    match only_flags(s, KNOWN).and_then(|()| named(s)) {
        Ok(path) => Claim::Mine(Kind::Device(Device { path, which })),
        // A device node that went away says nothing of the device.
        Err(_) if matches!(s.nature.name, Name::Deleted) => Claim::Refused(s.obstacle(
            "its device node was removed",
            "let the program close it first",
        )),
        Err(obstacle) => Claim::Refused(obstacle),
    }
}

pub(super) fn open(d: &Description, dev: &Device, opener: &Opener) -> Result<OwnedFd> {
    if d.flags & !KNOWN != 0 {
        return Err(Error::bad(
            &dev.path,
            "is to be opened with impossible flags",
        ));
    }
    let pinned = opener.anything(&dev.path)?;
    if pinned.file_type() != libc::S_IFCHR || pinned.stat().st_rdev != dev.which.rdev() {
        return Err(Error::bad(&dev.path, "is another device here"));
    }
    let fd = pinned
        .open(OFlag::from_bits_retain(d.flags))
        .context("open", &dev.path)?;
    set_flags(&fd, d.flags, &dev.path)?;
    Ok(fd)
}

pub(super) fn adjust(fd: &OwnedFd, d: &Description, dev: &Device) -> Result<()> {
    set_flags(fd, d.flags, &dev.path)
}
