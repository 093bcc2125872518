//! Capturing the descriptor table of a process, twice: while it runs, and
//! again when it stands still.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};

use super::look::{object, still_there, Glance, Nature, ProcDir, Subject};
use super::{claim, pipe, Description, FdTable, Holder, Kind};
use crate::error::{Context, Error, Obstacle, Result};
use crate::state::objects::{others_with_pipes, share};
use crate::state::paths::FilePath;
use crate::sys::fds::{kcmp_file, tells_by_signal};
use crate::sys::pidfd;

/// In which state the process is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beat {
    /// It runs: nothing is copied, for a copy of a pipe's end would keep it
    /// open. Pipes come without size and content.
    Running,
    /// It stands still: everything is captured.
    Stopped,
}

/// How often a descriptor that changes while it is looked at is looked at
/// again.
const PATIENCE: usize = 8;

/// Looks at one process's descriptors, and remembers what it saw, so that the
/// look at the freeze repeats nothing that can be seen to be unchanged.
pub struct Watch {
    pid: i32,
    proc: ProcDir,
    pidfd: OwnedFd,
    seen: BTreeMap<i32, (Glance, Nature)>,
    /// Pipes nobody else had open.
    private: BTreeSet<u64>,
}

/// What stands in the way of moving a process as far as its descriptors go,
/// looked at from outside while it runs.
///
/// # Errors
/// Where it cannot be looked at, [`Error::Gone`] where it is not there.
pub fn preflight(pid: i32) -> Result<Vec<Obstacle>> {
    match Watch::new(pid)?.look(Beat::Running) {
        Ok(_) => Ok(Vec::new()),
        Err(Error::Refused(obstacles)) => Ok(obstacles),
        Err(e) => Err(e),
    }
}

struct Found {
    fd: i32,
    glance: Glance,
    kind: Kind,
    ino: u64,
}

impl Watch {
    /// # Errors
    /// [`Error::Gone`] where there is no such process.
    pub fn new(pid: i32) -> Result<Watch> {
        let proc = ProcDir::open(pid)?;
        let pidfd = match pidfd::open(pid) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(Error::Gone(pid)),
            other => other.context("open a handle on", format!("process {pid}"))?,
        };
        // The number was not given to another process between the two.
        if !still_there(&proc).context("look at", format!("process {pid}"))? {
            return Err(Error::Gone(pid));
        }
        Ok(Watch {
            pid,
            proc,
            pidfd,
            seen: BTreeMap::new(),
            private: BTreeSet::new(),
        })
    }

    /// Captures the table.
    ///
    /// # Errors
    /// [`Error::Refused`] with every descriptor that cannot be carried.
    pub fn look(&mut self, beat: Beat) -> Result<FdTable> {
        let mut obstacles = Vec::new();
        let mut found = self.claims(&mut obstacles)?;
        let (cwd, root) = self.places(&mut obstacles)?;
        let pipes = self.pipes(&mut found, &mut obstacles)?;
        if !obstacles.is_empty() {
            return Err(Error::Refused(obstacles));
        }
        let groups = self.groups(&found)?;
        let mut table = FdTable {
            descriptions: Vec::with_capacity(groups.len()),
            holders: Vec::with_capacity(found.len()),
            pipes: vec![pipe::Pipe::default(); pipes],
            cwd,
            root,
        };
        let of: BTreeMap<i32, u32> = groups
            .iter()
            .zip(0u32..)
            .flat_map(|(g, n)| g.iter().map(move |&fd| (fd, n)))
            .collect();
        for f in found {
            let n = of[&f.fd];
            if n as usize == table.descriptions.len() {
                table.descriptions.push(Description {
                    flags: f.glance.flags & !libc::O_CLOEXEC,
                    kind: f.kind,
                });
            }
            table.holders.push(Holder {
                fd: f.fd,
                description: n,
                cloexec: f.glance.flags & libc::O_CLOEXEC != 0,
            });
        }
        self.look_for_the_other_ends(&table)?;
        if beat == Beat::Stopped {
            self.look_inside(&mut table)?;
        }
        Ok(table)
    }

    /// Where the process has only one kind of a pipe's ends, the other kind
    /// must be gone for good, and not in the hands of somebody who cannot be
    /// seen from here: a process of another PID namespace. (Of a pipe with both
    /// kinds of ends in the process that cannot be told.)
    ///
    /// The copy made for it lives for an instant, and keeps open an end whose
    /// closing nobody would notice if all is well.
    fn look_for_the_other_ends(&self, table: &FdTable) -> Result<()> {
        let mut kinds = vec![(false, false); table.pipes.len()];
        let mut ends = Vec::new();
        for h in &table.holders {
            let d = &table.descriptions[h.description as usize];
            if let Kind::Pipe(end) = &d.kind {
                let access = d.flags & libc::O_ACCMODE;
                let (read, write) = &mut kinds[end.pipe as usize];
                *read |= access != libc::O_WRONLY;
                *write |= access != libc::O_RDONLY;
                ends.push((h.fd, end.pipe as usize));
            }
        }
        let mut obstacles = Vec::new();
        for (fd, pipe) in ends {
            if kinds[pipe] == (true, true) {
                continue;
            }
            let copy = match pidfd::get(self.pidfd.as_fd(), fd) {
                // Closed meanwhile.
                Err(e) if e.raw_os_error() == Some(libc::EBADF) => continue,
                other => other.context("copy", self.name(fd))?,
            };
            if !pipe::is_widowed(&copy).context("poll", self.name(fd))? {
                obstacles.push(Obstacle::new(
                    self.name(fd),
                    "is a pipe whose other end is held where it cannot be seen from here",
                    "let it go through a file instead",
                ));
            }
        }
        if obstacles.is_empty() {
            Ok(())
        } else {
            Err(Error::Refused(obstacles))
        }
    }

    fn name(&self, fd: i32) -> String {
        match self.seen.get(&fd) {
            Some((glance, _)) => object(fd, &glance.link),
            None => format!("fd {fd}"),
        }
    }

    /// Looks once more, just before the process is stopped, whether a pipe of
    /// its own has got another holder. The look at the freeze spares the search
    /// through all processes for pipes known to be private: what is given away
    /// between this call and the freeze goes unnoticed.
    ///
    /// # Errors
    /// Where `/proc` cannot be read.
    pub fn recheck_pipes(&mut self) -> Result<()> {
        let shared = others_with_pipes(self.pid, &self.private)?;
        self.private.retain(|ino| !shared.contains_key(ino));
        Ok(())
    }

    fn claims(&mut self, obstacles: &mut Vec<Obstacle>) -> Result<Vec<Found>> {
        let numbers = self.proc.numbers()?;
        let mut found = Vec::with_capacity(numbers.len());
        let mut seen = BTreeMap::new();
        for fd in numbers {
            let Some((glance, nature)) = self.settled(fd, obstacles)? else {
                continue;
            };
            let subject = Subject {
                fd,
                link: &glance.link,
                flags: glance.flags & !libc::O_CLOEXEC,
                position: glance.position,
                locked: glance.locked,
                nature: &nature,
            };
            match claim(&subject) {
                Ok(kind) => found.push(Found {
                    fd,
                    glance: glance.clone(),
                    kind,
                    ino: nature.ino,
                }),
                Err(obstacle) => obstacles.push(obstacle),
            }
            seen.insert(fd, (glance, nature));
        }
        self.seen = seen;
        Ok(found)
    }

    /// A glance at a descriptor and what it is of, both of the same file.
    fn settled(&self, fd: i32, obstacles: &mut Vec<Obstacle>) -> Result<Option<(Glance, Nature)>> {
        for _ in 0..PATIENCE {
            let Some(glance) = self.proc.glance(fd)? else {
                return Ok(None);
            };
            if let Some((before, nature)) = self.seen.get(&fd) {
                if before.is_of_same_file(&glance) {
                    return Ok(Some((glance, nature.clone())));
                }
            }
            if let Some(nature) = self.proc.nature(fd, &glance)? {
                return Ok(Some((glance, nature)));
            }
        }
        obstacles.push(Obstacle::new(
            format!("fd {fd}"),
            "is opened and closed faster than it can be looked at",
            "try again",
        ));
        Ok(None)
    }

    fn places(&self, obstacles: &mut Vec<Obstacle>) -> Result<(FilePath, FilePath)> {
        let mut place = |which| {
            Ok::<_, Error>(match self.proc.directory(which)? {
                Ok(path) => path,
                Err(obstacle) => {
                    obstacles.push(obstacle);
                    FilePath::new("/")?
                }
            })
        };
        Ok((place("cwd")?, place("root")?))
    }

    /// Numbers the pipes, and refuses those somebody else has open.
    fn pipes(&mut self, found: &mut [Found], obstacles: &mut Vec<Obstacle>) -> Result<usize> {
        let mut order: Vec<u64> = Vec::new();
        let mut index: BTreeMap<u64, u32> = BTreeMap::new();
        for f in found.iter_mut() {
            if let Kind::Pipe(end) = &mut f.kind {
                end.pipe = *index.entry(f.ino).or_insert_with(|| {
                    order.push(f.ino);
                    order.len() as u32 - 1
                });
            }
        }
        self.private.retain(|ino| index.contains_key(ino));
        let new: BTreeSet<u64> = order
            .iter()
            .copied()
            .filter(|ino| !self.private.contains(ino))
            .collect();
        let shared = others_with_pipes(self.pid, &new)?;
        for f in found.iter().filter(|f| matches!(f.kind, Kind::Pipe(_))) {
            if let Some(other) = shared.get(&f.ino) {
                obstacles.push(Obstacle::new(
                    object(f.fd, &f.glance.link),
                    format!("is a pipe that process {other} has open as well"),
                    "let it go through a file instead",
                ));
            }
        }
        self.private
            .extend(new.into_iter().filter(|ino| !shared.contains_key(ino)));
        Ok(order.len())
    }

    fn groups(&self, found: &[Found]) -> Result<Vec<Vec<i32>>> {
        let fds: Vec<i32> = found.iter().map(|f| f.fd).collect();
        let key = |n: usize| {
            let g = &found[n].glance;
            (g.ino, g.mount, g.flags & !libc::O_CLOEXEC)
        };
        share(&fds, key, |a, b| match kcmp_file(self.pid, a, b) {
            // Closed meanwhile: whatever is said of it is corrected at the
            // freeze.
            Err(e) if e.raw_os_error() == Some(libc::EBADF) => Ok(crate::sys::fds::Order::Less),
            other => other,
        })
        .context(
            "compare the descriptors of",
            format!("process {}", self.pid),
        )
    }

    /// What can be asked only of a copy of the descriptor.
    fn look_inside(&self, table: &mut FdTable) -> Result<()> {
        let mut obstacles = Vec::new();
        let mut done = vec![false; table.pipes.len()];
        let mut first = vec![-1; table.descriptions.len()];
        for h in table.holders.iter().rev() {
            first[h.description as usize] = h.fd;
        }
        for (d, &fd) in table.descriptions.iter().zip(&first) {
            let name = || self.name(fd);
            let copy = pidfd::get(self.pidfd.as_fd(), fd).context("copy", name())?;
            if tells_by_signal(copy.as_fd()).context("look at", name())? {
                obstacles.push(Obstacle::new(
                    name(),
                    "is set to send a signal (F_SETOWN, F_SETSIG or F_NOTIFY)",
                    "let the program turn that off first",
                ));
            }
            if let Kind::Pipe(end) = &d.kind {
                let n = end.pipe as usize;
                if !std::mem::replace(&mut done[n], true) {
                    match pipe::capture(&copy, d.flags, &name()) {
                        Ok(pipe) => table.pipes[n] = pipe,
                        Err(Error::Refused(o)) => obstacles.extend(o),
                        Err(e) => return Err(e),
                    }
                }
            }
        }
        if obstacles.is_empty() {
            Ok(())
        } else {
            Err(Error::Refused(obstacles))
        }
    }
}
