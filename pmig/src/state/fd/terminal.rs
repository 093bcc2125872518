//! Terminals, as programs see them: modes, size, and the input that was typed
//! and not read yet. At the target each is a new one, whose other end somebody
//! there holds.
//!
//! A descriptor opened as `/dev/tty` is of the terminal that controls the
//! process, and of that name at the target too.

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::sys::stat::{fchmod, fstat, major, makedev, Mode};
use nix::unistd::{fchown, Gid, Uid};
use serde::{Deserialize, Serialize};

use super::look::{Name, Subject};
use super::typed::Input;
use super::{only_flags, Claim, Description, Kind, LARGEFILE, SETTABLE};
use crate::error::{Context, Error, Obstacle, Result};
use crate::proc::stat::Stat;
use crate::sys::tty::{self, Modes, Size};

/// The place of `tty_nr` in proc_pid_stat(5); the foreground group follows.
const TTY_NR: usize = 7;

/// `/dev/tty`, and the end of a terminal that shows it.
const BY_NAME: (u64, u64) = (5, 0);
const PTMX: (u64, u64) = (5, 2);
/// Majors of the ends for programs: Unix98 pseudo-terminals.
const PTS: std::ops::RangeInclusive<u64> = 136..=143;

const KNOWN: i32 = libc::O_ACCMODE | SETTABLE | libc::O_SYNC | libc::O_NOFOLLOW | LARGEFILE;

/// A terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// It controls the process: credentials(7), "Sessions".
    pub controls: bool,
    /// Its other end is gone: it can be read and written no more.
    pub hung_up: bool,
    /// Looked at only when the process stands still; none for a terminal that
    /// was hung up.
    pub now: Option<Now>,
}

/// How a terminal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Now {
    /// None for a process in its background: they are whoever's is in front.
    pub modes: Option<Modes>,
    pub size: Size,
    /// `TIOCEXCL`.
    pub exclusive: bool,
    /// Who may open it.
    pub owner: Owner,
    /// What was typed for the process goes with it, as [`Input`].
    pub typed: bool,
}

/// Owner and permissions of a terminal's node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
}

/// A terminal that is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalEnd {
    /// Index into [`super::FdTable::terminals`].
    pub terminal: u32,
    /// Opened as `/dev/tty`.
    pub by_name: bool,
}

/// What controls a process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Control {
    /// The terminal's device number; none for a process without one.
    pub device: Option<u64>,
    /// The process is in its foreground: what is typed is for it.
    pub foreground: bool,
}

impl Control {
    /// Of a process that has no terminal open.
    pub const NONE: Control = Control {
        device: None,
        foreground: false,
    };

    pub fn of(pid: i32) -> Result<Control> {
        // pgrp, session, tty_nr, tpgid.
        let [group, _, device, foreground] = Stat::read(pid)?.fields(TTY_NR - 2)?;
        Ok(Control {
            device: (device != 0).then(|| tty::decode(device as u32)),
            foreground: group == foreground,
        })
    }
}

impl Control {
    /// Whether nobody else is in the process's group, if a terminal controls it.
    pub fn is_alone(pid: i32) -> Result<bool> {
        let group = |pid: i32| Stat::read(pid)?.fields::<3>(TTY_NR - 2);
        let [own, _, device] = group(pid)?;
        if device == 0 {
            return Ok(false);
        }
        for entry in std::fs::read_dir("/proc")
            .context("list", "/proc")?
            .flatten()
        {
            let other = entry.file_name().to_str().and_then(|n| n.parse().ok());
            // Those that end meanwhile are in no group.
            if let Some(Ok([theirs, ..])) = other.filter(|n| *n != pid).map(group) {
                if theirs == own {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

/// Whether a device number may be that of a terminal.
pub(super) fn may_be(rdev: u64) -> bool {
    let (major, minor) = numbers(rdev);
    (major, minor) != PTMX && ([4, 5, 204, 229].contains(&major) || PTS.contains(&major))
}

fn numbers(rdev: u64) -> (u64, u64) {
    (major(rdev), nix::sys::stat::minor(rdev))
}

pub(super) fn claim(s: &Subject<'_>) -> Claim {
    let rdev = s.nature.rdev;
    if s.nature.file_type() != libc::S_IFCHR || !may_be(rdev) {
        return Claim::NotMine;
    }
    let by_name = rdev == makedev(BY_NAME.0, BY_NAME.1);
    let controls = s.control.device;
    let ours = by_name && controls.is_some() || controls == Some(rdev);
    if !ours && !PTS.contains(&major(rdev)) {
        // A line to some device, for all that is known.
        return Claim::Refused(s.obstacle(
            "is a terminal of this machine that does not control the program",
            "let the program close it first",
        ));
    }
    match only_flags(s, KNOWN) {
        Ok(()) => Claim::Mine(Kind::Terminal(TerminalEnd {
            terminal: 0,
            by_name,
        })),
        Err(obstacle) => Claim::Refused(obstacle),
    }
}

/// The terminal a claimed descriptor is of.
pub(super) fn device(s: &Subject<'_>) -> u64 {
    match s.nature.rdev == makedev(BY_NAME.0, BY_NAME.1) {
        true => s.control.device.unwrap_or(s.nature.rdev),
        false => s.nature.rdev,
    }
}

/// What is known of it while the process runs.
pub(super) fn glance(s: &Subject<'_>) -> Terminal {
    let device = device(s);
    Terminal {
        controls: s.control.device == Some(device),
        hung_up: PTS.contains(&major(device)) && s.nature.name == Name::Deleted,
        now: None,
    }
}

/// Looks at a terminal through a copy of a descriptor of it; `typed`: whether what
/// is typed there is for the process alone.
pub(super) fn look(
    fd: &OwnedFd,
    terminal: &mut Terminal,
    control: Control,
    typed: bool,
    object: &str,
) -> Result<()> {
    let refuse =
        |why: &str, remedy: &str| Err(Error::Refused(vec![Obstacle::new(object, why, remedy)]));
    let modes = match tty::modes(fd.as_fd()) {
        Err(e) if e.raw_os_error() == Some(libc::EIO) => {
            terminal.hung_up = true;
            return Ok(());
        }
        other => other.context("read the modes of", object)?,
    };
    terminal.hung_up = false;
    if modes.line != 0 {
        return refuse(
            "is a terminal with a line discipline of its own",
            "let the program set it back first",
        );
    }
    if tty::has_locked_modes(fd.as_fd()).context("read the locked modes of", object)? {
        return refuse(
            "is a terminal whose modes are locked (TIOCSLCKTRMIOS)",
            "unlock them first",
        );
    }
    let node = fstat(fd).context("look at", object)?;
    let behind = terminal.controls && !control.foreground;
    terminal.now = Some(Now {
        modes: (!behind).then_some(modes),
        size: tty::size(fd.as_fd()).context("read the size of", object)?,
        exclusive: tty::is_exclusive(fd.as_fd()).context("look at", object)?,
        owner: Owner {
            uid: node.st_uid,
            gid: node.st_gid,
            mode: node.st_mode & 0o777,
        },
        typed: typed && terminal.controls && !behind,
    });
    Ok(())
}

impl Terminal {
    /// Checks what came from a peer.
    pub(super) fn check(&self) -> Result<()> {
        match &self.now {
            Some(now) if now.modes.is_some_and(|m| m.line != 0) => {
                Err(Error::bad("terminal", "has a line discipline of its own"))
            }
            Some(now) if now.typed && !self.controls || now.owner.mode > 0o777 => {
                Err(Error::bad("terminal", "is as none can be"))
            }
            _ => Ok(()),
        }
    }
}

/// A terminal at the target.
#[derive(Debug)]
pub struct Made {
    /// The end that shows it; none for one that was hung up.
    pub master: Option<OwnedFd>,
    /// An end for programs, which keeps it alive.
    slave: OwnedFd,
}

impl Made {
    pub(super) fn new(terminal: &Terminal) -> Result<Made> {
        let (master, slave) = tty::pair().context("make", "a terminal")?;
        let made = Made {
            master: Some(master),
            slave,
        };
        made.set(terminal)?;
        Ok(made)
    }

    /// An open description of it.
    pub(super) fn open(&self, d: &Description) -> Result<OwnedFd> {
        if d.flags & !KNOWN != 0 {
            return Err(Error::bad(
                "terminal",
                "is to be opened with impossible flags",
            ));
        }
        let master = self.master.as_ref();
        let master = master.ok_or_else(|| Error::bad("terminal", "was hung up before"))?;
        let fd = tty::peer(master.as_fd(), d.flags).context("open", "a terminal")?;
        set_flags(&fd, d)?;
        Ok(fd)
    }

    /// Makes it what it was, but for what was typed.
    pub(super) fn set(&self, terminal: &Terminal) -> Result<()> {
        let Some(now) = &terminal.now else {
            return Ok(());
        };
        let fd = self.slave.as_fd();
        tty::set_size(fd, now.size).context("set the size of", "a terminal")?;
        if let Some(modes) = &now.modes {
            tty::set_modes(fd, modes).context("set the modes of", "a terminal")?;
        }
        let owner = now.owner;
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        fchown(fd, Some(uid), Some(gid)).context("give away", "a terminal")?;
        fchmod(fd, Mode::from_bits_truncate(owner.mode)).context("give away", "a terminal")?;
        if now.exclusive {
            tty::set_exclusive(fd).context("set up", "a terminal")?;
        }
        Ok(())
    }

    /// Types in what was typed, into an empty one.
    pub(super) fn type_in(&self, input: &Input) -> Result<()> {
        input.check()?;
        let modes = tty::modes(self.slave.as_fd()).context("read the modes of", "a terminal")?;
        input
            .fill(&self.slave, &modes)
            .context("type into", "a terminal")
    }

    /// It is complete, and every description is open.
    pub(super) fn finish(&mut self, terminal: &Terminal) {
        if terminal.hung_up {
            self.master = None;
        }
    }

    pub(super) fn slave(&self) -> &OwnedFd {
        &self.slave
    }
}

pub(super) fn set_flags(fd: &OwnedFd, d: &Description) -> Result<()> {
    let flags = OFlag::from_bits_retain(d.flags & SETTABLE);
    fcntl(fd, FcntlArg::F_SETFL(flags)).context("set the flags of", "a terminal")?;
    let now = fcntl(fd, FcntlArg::F_GETFL).context("read the flags of", "a terminal")?;
    let kept = libc::O_CLOEXEC | LARGEFILE | libc::O_NOFOLLOW;
    if (now ^ d.flags) & !kept != 0 {
        return Err(Error::bad(
            "terminal",
            format!("has flags {now:#o} here instead of {:#o}", d.flags),
        ));
    }
    Ok(())
}
