//! Capturing the descriptor table of a process, twice: while it runs, and
//! again when it stands still.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{fcntl, FcntlArg};

use super::look::{object, still_there, Glance, Nature, ProcDir, Subject};
use super::terminal::{self, Control, Terminal};
use super::typed::{self, Input, Passage, Taken};
use super::{claim, pipe, Description, FdTable, Holder, Kind, MAX_TERMINALS};
use crate::error::{Context, Error, Obstacle, Result};
use crate::state::objects::{others_with_pipes, share};
use crate::state::paths::FilePath;
use crate::sys::fds::{kcmp_file, tells_by_signal};
use crate::sys::pidfd;
use crate::tracee::{Batch, Stopped};

/// In which state the process is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beat {
    /// It runs: nothing is copied, for a copy of a pipe's end would keep it
    /// open. Pipes come without size and content.
    Running,
    /// It stands still: everything is captured.
    Stopped,
    /// The same, but what still is of the same file is taken to be called as before,
    /// and the directories are taken to be the same, until [`Watch::look_again`].
    Brief,
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
    /// Which place each has in the order of descriptions that was found last.
    ranks: BTreeMap<i32, usize>,
    /// Pipes nobody else had open.
    private: BTreeSet<u64>,
    /// Descriptors of which only the process can say whether they are closed by
    /// execve(2): their descriptions have that flag too (`TIOCGPTPEER`).
    ambiguous: BTreeSet<i32>,
    /// Nobody else is in its process group.
    alone: bool,
    /// Names were taken for granted at the last look.
    granted: bool,
}

/// A descriptor by its number and what it leads to; written only where it is
/// wanted.
#[derive(Clone, Copy)]
struct Name<'a> {
    watch: &'a Watch,
    fd: i32,
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.watch.seen.get(&self.fd) {
            Some((glance, _)) => f.write_str(&object(self.fd, &glance.link)),
            None => write!(f, "fd {}", self.fd),
        }
    }
}

struct Found {
    fd: i32,
    glance: Glance,
    kind: Kind,
    ino: u64,
    /// Of a terminal: its device number, and what is known of it.
    terminal: Option<(u64, Terminal)>,
    /// The file system of its node.
    dev: u64,
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
            ranks: BTreeMap::new(),
            private: BTreeSet::new(),
            ambiguous: BTreeSet::new(),
            alone: false,
            granted: false,
        })
    }

    /// Captures the table.
    ///
    /// # Errors
    /// [`Error::Refused`] with every descriptor that cannot be carried.
    pub fn look(&mut self, beat: Beat) -> Result<FdTable> {
        let mut obstacles = Vec::new();
        self.granted = beat == Beat::Brief;
        let mut found = self.claims(&mut obstacles)?;
        let (cwd, root) = self.places(&mut obstacles)?;
        let pipes = self.pipes(&mut found, &mut obstacles)?;
        let terminals = number_terminals(&mut found, &mut obstacles);
        if !obstacles.is_empty() {
            return Err(Error::Refused(obstacles));
        }
        let groups = self.groups(&found)?;
        let mut table = FdTable {
            descriptions: Vec::with_capacity(groups.len()),
            holders: Vec::with_capacity(found.len()),
            pipes: vec![pipe::Pipe::default(); pipes],
            terminals,
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
        if beat != Beat::Running {
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

    fn name(&self, fd: i32) -> Name<'_> {
        Name { watch: self, fd }
    }

    /// Looks once more, just before the process is stopped, whether a pipe of
    /// its own has got another holder, and whether others of its process group
    /// may read what is typed. The look at the freeze spares the search
    /// through all processes for pipes known to be private: what is given away
    /// between this call and the freeze goes unnoticed.
    ///
    /// # Errors
    /// Where `/proc` cannot be read.
    pub fn recheck(&mut self) -> Result<()> {
        self.alone = Control::is_alone(self.pid)?;
        let shared = others_with_pipes(self.pid, &self.private)?;
        self.private.retain(|ino| !shared.contains_key(ino));
        Ok(())
    }

    fn claims(&mut self, obstacles: &mut Vec<Obstacle>) -> Result<Vec<Found>> {
        let known = self.seen.len();
        if known != 0 && self.proc.count()? == known {
            let numbers = self.seen.keys().copied().collect();
            // As many, and each of them is there: then it is those.
            if let Some(found) = self.claims_of(numbers, true, &mut Vec::new())? {
                return Ok(found);
            }
        }
        let numbers = self.proc.numbers()?;
        Ok(self
            .claims_of(numbers, false, obstacles)?
            .unwrap_or_default())
    }

    /// The claims of these. `strictly`: `None` where one of them is not there, or
    /// cannot be carried.
    fn claims_of(
        &mut self,
        numbers: Vec<i32>,
        strictly: bool,
        obstacles: &mut Vec<Obstacle>,
    ) -> Result<Option<Vec<Found>>> {
        let mut found = Vec::with_capacity(numbers.len());
        let mut seen = BTreeMap::new();
        // Looked up where there is a terminal.
        let mut control = None;
        let mut closed = false;
        for fd in numbers {
            let Some((glance, nature)) = self.settled(fd, obstacles)? else {
                if strictly {
                    return Ok(None);
                }
                closed = true;
                continue;
            };
            if terminal::may_be(nature.rdev) && control.is_none() {
                control = Some(Control::of(self.pid)?);
            }
            let subject = Subject {
                fd,
                link: &glance.link,
                flags: glance.flags & !libc::O_CLOEXEC,
                position: glance.position,
                locked: glance.locked,
                control: control.unwrap_or(Control::NONE),
                nature: &nature,
            };
            match claim(&subject) {
                Ok(kind) => found.push(Found {
                    fd,
                    glance: glance.clone(),
                    ino: nature.ino,
                    dev: nature.dev,
                    terminal: matches!(kind, Kind::Terminal(_))
                        .then(|| (terminal::device(&subject), terminal::glance(&subject))),
                    kind,
                }),
                Err(obstacle) => obstacles.push(obstacle),
            }
            seen.insert(fd, (glance, nature));
        }
        // Of one that has ended all of them are.
        if closed && !still_there(&self.proc).context("look at", self.pid)? {
            return Err(Error::Gone(self.pid));
        }
        if strictly && !obstacles.is_empty() {
            return Ok(None);
        }
        self.seen = seen;
        Ok(Some(found))
    }

    /// A glance at a descriptor and what it is of, both of the same file.
    fn settled(&self, fd: i32, obstacles: &mut Vec<Obstacle>) -> Result<Option<(Glance, Nature)>> {
        let before = self.seen.get(&fd).filter(|_| self.granted);
        if let Some((before, nature)) = before {
            if let Some(glance) = self.proc.glance_again(fd, before)? {
                return Ok(Some((glance, nature.clone())));
            }
        }
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
            if let Some(known) = self.proc.known_directory(which).filter(|_| self.granted) {
                return Ok(known);
            }
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

    fn groups(&mut self, found: &[Found]) -> Result<Vec<Vec<i32>>> {
        let fds: Vec<i32> = found.iter().map(|f| f.fd).collect();
        let key = |n: usize| {
            let g = &found[n].glance;
            (g.ino, g.mount, g.flags & !libc::O_CLOEXEC)
        };
        // New ones come last.
        let rank = |fd| self.ranks.get(&fd).copied().unwrap_or(usize::MAX);
        let shared = share(&fds, key, rank, |a, b| match kcmp_file(self.pid, a, b) {
            // Closed meanwhile: whatever is said of it is corrected at the
            // freeze.
            Err(e) if e.raw_os_error() == Some(libc::EBADF) => Ok(crate::sys::fds::Order::Less),
            other => other,
        })
        .context(
            "compare the descriptors of",
            format!("process {}", self.pid),
        )?;
        self.ranks = shared.order.into_iter().zip(0..).collect();
        Ok(shared.groups)
    }

    /// What can be asked only of a copy of the descriptor.
    fn look_inside(&mut self, table: &mut FdTable) -> Result<()> {
        let mut ambiguous = BTreeSet::new();
        let mut obstacles = Vec::new();
        let mut done = vec![false; table.pipes.len()];
        let mut passage = pipe::Passage::default();
        let mut looked = vec![false; table.terminals.len()];
        let typed = self.alone && readable_control(table).is_some();
        let control = match table.terminals.is_empty() {
            true => Control::NONE,
            false => Control::of(self.pid)?,
        };
        let all = table.descriptions.iter().zip(first_holders(table));
        for (n, (d, fd)) in all.enumerate() {
            if !matches!(d.kind, Kind::Terminal(_) | Kind::Pipe(_)) {
                continue;
            }
            let name = self.name(fd);
            let copy = pidfd::get(self.pidfd.as_fd(), fd).context("copy", name)?;
            if let Kind::Terminal(end) = &d.kind {
                let flags = fcntl(&copy, FcntlArg::F_GETFL).context("read the flags of", name)?;
                if flags & libc::O_CLOEXEC != 0 {
                    let its = table.holders.iter().filter(|h| h.description as usize == n);
                    ambiguous.extend(its.map(|h| h.fd));
                }
                let n = end.terminal as usize;
                if !std::mem::replace(&mut looked[n], true) {
                    match terminal::look(
                        &copy,
                        &mut table.terminals[n],
                        control,
                        typed,
                        &name.to_string(),
                    ) {
                        Ok(()) => {}
                        Err(Error::Refused(o)) => obstacles.extend(o),
                        Err(e) => return Err(e),
                    }
                }
            }
            if let Kind::Pipe(end) = &d.kind {
                let n = end.pipe as usize;
                if !std::mem::replace(&mut done[n], true) {
                    match pipe::capture(&copy, d.flags, &mut passage, name) {
                        Ok(pipe) => table.pipes[n] = pipe,
                        Err(Error::Refused(o)) => obstacles.extend(o),
                        Err(e) => return Err(e),
                    }
                }
            }
        }
        self.ambiguous = ambiguous;
        if obstacles.is_empty() {
            Ok(())
        } else {
            Err(Error::Refused(obstacles))
        }
    }

    /// Looks at what nothing else depends on, when all of the table is on its way and
    /// the process still is stopped.
    ///
    /// # Errors
    /// [`Error::Refused`] with every descriptor that cannot be carried;
    /// [`Error::Changed`] where something is called otherwise than was taken for
    /// granted.
    pub fn look_again(&self, table: &FdTable) -> Result<()> {
        if self.granted && !self.are_called_so()? {
            let what = "what one of its files or directories is called";
            return Err(Error::Changed {
                pid: self.pid,
                what,
            });
        }
        let mut obstacles = Vec::new();
        for fd in first_holders(table) {
            let name = self.name(fd);
            let copy = pidfd::get(self.pidfd.as_fd(), fd).context("copy", name)?;
            if tells_by_signal(copy.as_fd()).context("look at", name)? {
                obstacles.push(Obstacle::new(
                    name,
                    "is set to send a signal (F_SETOWN, F_SETSIG or F_NOTIFY)",
                    "let the program turn that off first",
                ));
            }
        }
        match obstacles.is_empty() {
            true => Ok(()),
            false => Err(Error::Refused(obstacles)),
        }
    }

    fn are_called_so(&self) -> Result<bool> {
        for (fd, (glance, _)) in &self.seen {
            if self.proc.link_of(*fd)? != glance.link {
                return Ok(false);
            }
        }
        Ok(self.proc.stays_in("cwd")? && self.proc.stays_in("root")?)
    }

    /// Asks the process itself what cannot be seen from outside, if anything.
    ///
    /// # Errors
    /// Those of a batch.
    pub fn ask(&self, table: &mut FdTable, stopped: &mut Stopped) -> Result<()> {
        if self.ambiguous.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new();
        let mut asked = BTreeMap::new();
        for &fd in &self.ambiguous {
            let args = [fd.into(), libc::F_GETFD.into()];
            let call = batch.call("read the flags of a descriptor", libc::SYS_fcntl, &args);
            asked.insert(fd, call);
        }
        let done = stopped.run(batch)?;
        for holder in &mut table.holders {
            if let Some(call) = asked.get(&holder.fd) {
                holder.cloexec = done.result(*call) & i64::from(libc::FD_CLOEXEC) != 0;
            }
        }
        Ok(())
    }

    /// Takes the input that was typed for the process and not read yet: it goes
    /// with it. The process must be frozen. `note` is told how that is undone,
    /// before it is done and after; whoever holds `passage` too can
    /// [complete](Taken::complete) what was not noted any more.
    ///
    /// # Errors
    /// Those of the terminal and of `note`. What was noted must be undone.
    pub fn take_input(
        &self,
        table: &FdTable,
        passage: &Passage,
        note: &mut dyn FnMut(&Taken) -> Result<()>,
    ) -> Result<Input> {
        let fd = readable_control(table)
            .ok_or_else(|| Error::bad("terminal", "is not open for reading"))?;
        let copy = pidfd::get(self.pidfd.as_fd(), fd).context("copy", self.name(fd))?;
        typed::take(&copy, fd, passage, note)
    }
}

/// A descriptor by which the controlling terminal can be read.
fn readable_control(table: &FdTable) -> Option<i32> {
    let n = table.terminals.iter().position(|t| t.controls)?;
    let fits = |h: &&Holder| {
        let d = &table.descriptions[h.description as usize];
        let of_it = matches!(&d.kind, Kind::Terminal(end) if end.terminal as usize == n);
        of_it && d.flags & libc::O_ACCMODE != libc::O_WRONLY
    };
    table.holders.iter().find(fits).map(|h| h.fd)
}

/// Undoes [`Watch::take_input`] for a process that is frozen. `note` is called
/// before anything is done.
///
/// # Errors
/// Those of the terminal; a process that is gone needs nothing.
pub fn give_back(
    pid: i32,
    taken: &Taken,
    note: &mut dyn FnMut(&Taken) -> Result<()>,
) -> Result<()> {
    let process = match pidfd::open(pid) {
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        other => other.context("open a handle on", format!("process {pid}"))?,
    };
    match pidfd::get(process.as_fd(), taken.fd) {
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => taken.give_back(&other.context("copy", format!("fd {}", taken.fd))?, note),
    }
}

/// The lowest descriptor of each description.
fn first_holders(table: &FdTable) -> Vec<i32> {
    let mut first = vec![-1; table.descriptions.len()];
    for h in table.holders.iter().rev() {
        first[h.description as usize] = h.fd;
    }
    first
}

/// Numbers the terminals; those of one device are one.
fn number_terminals(found: &mut [Found], obstacles: &mut Vec<Obstacle>) -> Vec<Terminal> {
    let mut index: BTreeMap<u64, u32> = BTreeMap::new();
    let mut places: BTreeMap<u64, u64> = BTreeMap::new();
    let mut all: Vec<Terminal> = Vec::new();
    for f in found {
        let Some((device, terminal)) = f.terminal.take() else {
            continue;
        };
        let Kind::Terminal(end) = &mut f.kind else {
            continue;
        };
        if index.len() == MAX_TERMINALS && !index.contains_key(&device) {
            obstacles.push(Obstacle::new(
                object(f.fd, &f.glance.link),
                format!("is one of more than {MAX_TERMINALS} terminals"),
                "let the program close some first",
            ));
            continue;
        }
        end.terminal = *index.entry(device).or_insert_with(|| {
            all.push(terminal);
            all.len() as u32 - 1
        });
        if !end.by_name && *places.entry(device).or_insert(f.dev) != f.dev {
            obstacles.push(Obstacle::new(
                object(f.fd, &f.glance.link),
                "is a terminal of another instance of devpts than one with the same number",
                "let the program close one of them",
            ));
        }
    }
    all
}
