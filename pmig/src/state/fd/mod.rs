//! Descriptors: what a process has open, as open file descriptions and the
//! numbers that hold them.
//!
//! Every descriptor is claimed by exactly one of the rooms in this folder, or
//! it is refused by name (`unknown`).

mod device;
mod directory;
mod install;
mod look;
mod opened;
mod pipe;
mod regular;
mod terminal;
mod typed;
mod unknown;
mod watch;

#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{fcntl, FcntlArg, OFlag};
use serde::{Deserialize, Serialize};

pub use device::{Device, Which};
pub use directory::Directory;
pub use install::{Installation, Whose};
pub use opened::{Opened, Shape};
pub use pipe::{Pipe, PipeEnd};
pub use regular::Regular;
pub use terminal::{Terminal, TerminalEnd};
pub use typed::{Input, Passage, Taken};
pub use watch::{give_back, Beat, Watch};

use crate::error::{Context, Error, Obstacle, Result};
use crate::state::objects::OpenFile;
use crate::state::paths::FilePath;
use look::{Name, Subject};

/// The most descriptors that are carried.
pub const MAX_FDS: usize = 1 << 16;

/// The most bytes all pipes together may hold.
const MAX_PIPES: u64 = 4 << 30;

/// The most terminals that are carried.
const MAX_TERMINALS: usize = 16;

/// Status flags fcntl(2) `F_SETFL` can change on an open description.
pub(crate) const SETTABLE: i32 =
    libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME;

/// `O_LARGEFILE` as the kernel knows it; glibc says 0 on this architecture.
pub(crate) const LARGEFILE: i32 = 0o100000;

/// `__O_TMPFILE`, without the `O_DIRECTORY` that is part of `O_TMPFILE`.
pub(crate) const TMPFILE: i32 = 0o20000000;

/// What a process has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdTable {
    /// Open file descriptions, in the order of their lowest holders.
    pub descriptions: Vec<Description>,
    /// Descriptors, ascending.
    pub holders: Vec<Holder>,
    /// Pipes whose ends are among the descriptions.
    pub pipes: Vec<Pipe>,
    /// Terminals that are among them.
    pub terminals: Vec<Terminal>,
    /// The working directory.
    pub cwd: FilePath,
    /// The root directory; its path and all others are as pmig sees them.
    pub root: FilePath,
}

/// An open file description: open(2), "Open file descriptions".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Access mode and status flags as fcntl(2) `F_GETFL` gives them, without
    /// `O_CLOEXEC`.
    pub flags: i32,
    pub kind: Kind,
}

/// One descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub fd: i32,
    /// Index into [`FdTable::descriptions`].
    pub description: u32,
    pub cloexec: bool,
}

/// What a description is of: one room each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Regular(Regular),
    Directory(Directory),
    Device(Device),
    Pipe(PipeEnd),
    Terminal(TerminalEnd),
}

/// What a room says of a descriptor.
pub(crate) enum Claim {
    NotMine,
    Mine(Kind),
    Refused(Obstacle),
}

/// The rooms. A new kind of descriptor gets its line here.
const ROOMS: [fn(&Subject<'_>) -> Claim; 5] = [
    regular::claim,
    directory::claim,
    device::claim,
    pipe::claim,
    terminal::claim,
];

/// Finds the one room a descriptor belongs to.
fn claim(subject: &Subject<'_>) -> std::result::Result<Kind, Obstacle> {
    if let Some(obstacle) = unknown::common(subject) {
        return Err(obstacle);
    }
    let mut found = None;
    for room in ROOMS {
        match room(subject) {
            Claim::NotMine => {}
            Claim::Refused(obstacle) => return Err(obstacle),
            Claim::Mine(_) if found.is_some() => {
                return Err(subject.obstacle("is claimed twice", "report this as a bug of pmig"))
            }
            Claim::Mine(kind) => found = Some(kind),
        }
    }
    found.ok_or_else(|| unknown::refuse(subject))
}

/// The path of a file that must have one.
fn named(subject: &Subject<'_>) -> std::result::Result<FilePath, Obstacle> {
    match &subject.nature.name {
        Name::Leads(path) => Ok(path.clone()),
        Name::Deleted => Err(subject.obstacle(
            "is a deleted file, which no name leads to",
            "let the program close it first",
        )),
        Name::Elsewhere => Err(subject.obstacle(
            "its name leads to another file now",
            "put the file back under its name, or let the program open it again",
        )),
        Name::None => Err(subject.obstacle("has no path", "let the program close it first")),
    }
}

/// Refuses flags a room does not know how to give back.
fn only_flags(subject: &Subject<'_>, known: i32) -> std::result::Result<(), Obstacle> {
    let strange = subject.flags & !known;
    if strange & TMPFILE != 0 {
        return Err(subject.obstacle(
            "was opened with O_TMPFILE",
            "let the program close it and open it by its name",
        ));
    }
    if strange != 0 {
        return Err(subject.obstacle(
            format!("has flags that cannot be carried ({strange:#o})"),
            "let the program close it first",
        ));
    }
    Ok(())
}

/// Gives a description the status flags it had, and makes sure of it.
fn set_flags(fd: &OwnedFd, flags: i32, object: &FilePath) -> Result<()> {
    let now = fcntl(fd.as_fd(), FcntlArg::F_GETFL).context("read the flags of", object)?;
    let wanted = flags & !libc::O_CLOEXEC;
    if (now ^ wanted) & SETTABLE != 0 {
        let settable = OFlag::from_bits_retain(wanted & SETTABLE);
        fcntl(fd.as_fd(), FcntlArg::F_SETFL(settable)).context("set the flags of", object)?;
    }
    let now = fcntl(fd.as_fd(), FcntlArg::F_GETFL).context("read the flags of", object)?;
    if now & !libc::O_CLOEXEC != wanted {
        return Err(Error::bad(
            object,
            format!("opens with flags {now:#o} here instead of {wanted:#o}"),
        ));
    }
    Ok(())
}

impl FdTable {
    /// Checks what came from a peer: every index leads somewhere, every number
    /// is possible, nothing is held twice or by nobody.
    ///
    /// # Errors
    /// [`Error::Bad`] saying what is wrong.
    pub fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::bad("descriptor table", what));
        if self.holders.len() > MAX_FDS || self.descriptions.len() > self.holders.len() {
            return bad("is too long");
        }
        if self.pipes.len() > self.descriptions.len() {
            return bad("has more pipes than ends");
        }
        let mut last = -1;
        let mut next = 0;
        for h in &self.holders {
            if h.fd <= last || h.fd >= 1 << 30 {
                return bad("numbers are not ascending");
            }
            last = h.fd;
            // Each description appears first where its lowest holder stands.
            match h.description.cmp(&next) {
                std::cmp::Ordering::Greater => return bad("descriptions are out of order"),
                std::cmp::Ordering::Equal => next += 1,
                std::cmp::Ordering::Less => {}
            }
        }
        if next as usize != self.descriptions.len() {
            return bad("a description is held by nobody");
        }
        if self.terminals.len() > MAX_TERMINALS {
            return bad("has more terminals than are carried");
        }
        if self.terminals.iter().filter(|t| t.controls).count() > 1 {
            return bad("has more than one terminal that controls the process");
        }
        let mut ends = vec![false; self.pipes.len()];
        let mut shown = vec![false; self.terminals.len()];
        for d in &self.descriptions {
            if d.flags & (libc::O_CLOEXEC | libc::O_PATH | libc::O_ASYNC) != 0 || d.flags < 0 {
                return bad("has impossible flags");
            }
            if let Kind::Pipe(end) = &d.kind {
                match ends.get_mut(end.pipe as usize) {
                    Some(has_end) => *has_end = true,
                    None => return bad("an end belongs to no pipe"),
                }
            }
            if let Kind::Terminal(end) = &d.kind {
                let n = end.terminal as usize;
                match self.terminals.get(n) {
                    Some(t) if end.by_name && !t.controls => {
                        return bad("has /dev/tty open, and no terminal that controls it")
                    }
                    Some(_) => shown[n] = true,
                    None => return bad("is of a terminal that there is not"),
                }
            }
        }
        if ends.contains(&false) {
            return bad("a pipe has no end");
        }
        if shown.contains(&false) {
            return bad("has a terminal that is not open");
        }
        self.terminals.iter().try_for_each(Terminal::check)?;
        self.pipes.iter().try_for_each(Pipe::check)?;
        // A pipe's size costs the kernel memory even while it is empty.
        let total: u64 = self.pipes.iter().map(Pipe::size).sum();
        if total > MAX_PIPES {
            return bad("has more room in pipes than is taken");
        }
        Ok(())
    }

    /// Whether the other table differs by nothing but what can be changed on
    /// open descriptions: offsets, settable flags, pipe contents and sizes.
    pub fn is_same_shape(&self, other: &FdTable) -> bool {
        self.holders == other.holders
            && self.cwd == other.cwd
            && self.root == other.root
            && self.pipes.len() == other.pipes.len()
            && self.terminals.len() == other.terminals.len()
            && std::iter::zip(&self.terminals, &other.terminals)
                .all(|(a, b)| (a.controls, a.hung_up) == (b.controls, b.hung_up))
            && self.descriptions.len() == other.descriptions.len()
            && self
                .descriptions
                .iter()
                .zip(&other.descriptions)
                .all(|(a, b)| {
                    (a.flags ^ b.flags) & !SETTABLE == 0
                        && match (&a.kind, &b.kind) {
                            (Kind::Regular(a), Kind::Regular(b)) => {
                                (&a.path, a.ino) == (&b.path, b.ino)
                            }
                            (Kind::Directory(a), Kind::Directory(b)) => a.path == b.path,
                            (a, b) => a == b,
                        }
                })
    }

    /// Whether what was typed for the process follows, as [`Input`].
    pub fn awaits_input(&self) -> bool {
        self.terminals
            .iter()
            .any(|t| t.now.is_some_and(|now| now.typed))
    }

    /// Whether devices write into the process's memory for it: open(2), O_DIRECT,
    /// of what can be read.
    pub fn reads_past_the_cache(&self) -> bool {
        let direct = |d: &Description| {
            d.flags & libc::O_DIRECT != 0 && d.flags & libc::O_ACCMODE != libc::O_WRONLY
        };
        self.descriptions.iter().any(direct)
    }

    /// The highest descriptor in use, -1 where there is none: the process's
    /// `RLIMIT_NOFILE` must lie above it while it is installed.
    pub fn highest(&self) -> i32 {
        self.holders.last().map_or(-1, |h| h.fd)
    }

    /// The regular files among the descriptions.
    pub fn files(&self) -> Vec<OpenFile> {
        let mut first = vec![None; self.descriptions.len()];
        for h in self.holders.iter().rev() {
            if let Some(first) = first.get_mut(h.description as usize) {
                *first = Some(h.fd);
            }
        }
        let held = self.descriptions.iter().zip(first);
        held.filter_map(|(d, fd)| match (&d.kind, fd) {
            (Kind::Regular(r), Some(fd)) => Some(OpenFile {
                fd,
                path: r.path.clone(),
                ino: r.ino,
                writable: d.flags & libc::O_ACCMODE != libc::O_RDONLY,
            }),
            _ => None,
        })
        .collect()
    }
}
