//! The guard: holds what the filler holds, and does nothing else as long as the
//! filler lives.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::unistd::setsid;
use serde::{Deserialize, Serialize};

use super::log::Log;
use crate::error::{Context, Error, Result};
use crate::hold::{Frozen, Hold};
use crate::id::Id;
use crate::journal::{self, run_dir, Folder};
use crate::protocol::Wire;
use crate::sys::inherit::close_from;
use crate::sys::limits::raise_descriptors;
use crate::sys::pidfd;
use crate::transport::{self, Addr, Listener};

/// How long filler and guard wait for each other's word.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks whether the program is still there.
const LOOK: u16 = 1000;

/// Descriptors, by their numbers in the process `pid`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Held {
    pid: i32,
    log: i32,
    /// The userfaultfds, by address space; none of those that ended.
    spaces: Vec<Option<i32>>,
}

/// What a filler says.
#[derive(Debug, Serialize, Deserialize)]
enum ToGuard {
    Hold(Held),
    /// The program has a child; its userfaultfd.
    Child(i32),
    /// That address space is no more.
    Ended(usize),
    /// I am a new filler, with this PID.
    TakeOver(i32),
    /// And know all that my predecessor knew: the program may go on.
    Ready,
    /// Nothing is missing any more.
    Done,
}

#[derive(Debug, Serialize, Deserialize)]
enum ToFiller {
    Holding,
    Yours(Held),
}

/// The filler's line to its guard.
pub struct Guard {
    wire: Wire,
    id: Id,
    held: Held,
}

impl Guard {
    /// Starts a guard that holds the same from now on.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(id: Id, log: &Log, spaces: &[Option<&OwnedFd>]) -> Result<Guard> {
        let (ours, theirs) = UnixStream::pair().context("make", "a line to the guard")?;
        Command::new("/proc/self/exe")
            .arg0("pmig")
            .args(["guard", &id.to_string()])
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .current_dir("/")
            .spawn()
            .context("start", "the guard of missing memory")?;
        let held = Held {
            pid: std::process::id() as i32,
            log: log.file().as_raw_fd(),
            spaces: numbers(spaces.iter().copied()),
        };
        let mut guard = Guard {
            wire: line(ours.into())?,
            id,
            held,
        };
        guard.wire.send(&ToGuard::Hold(guard.held.clone()))?;
        guard.holding()?;
        Ok(guard)
    }

    /// Takes over from a filler that is dead or whose source speaks to nobody: the
    /// guard ends it. The program stands still until [`Guard::ready`].
    ///
    /// # Errors
    /// There is no guard.
    pub fn take_over(id: Id) -> Result<(Guard, Log, Vec<Option<OwnedFd>>)> {
        let (_folder, path) = socket(id)?;
        let link = transport::connect(&Addr::Unix(path))
            .context("reach", "the guard of missing memory")?;
        let mut wire = Wire::new(link);
        wire.set_deadline(PATIENCE)?;
        let pid = std::process::id() as i32;
        wire.send(&ToGuard::TakeOver(pid))?;
        let ToFiller::Yours(held) = wire.recv()? else {
            return Err(out_of_turn());
        };
        let (log, spaces) = fetch(&held)?;
        let log = Log::open(log)?;
        Ok((Guard { wire, id, held }, log, spaces))
    }

    /// Everything that happened is known.
    pub fn ready(&mut self) -> Result<()> {
        self.wire.send(&ToGuard::Ready)
    }

    /// Has it hold the memory of a child as well.
    pub fn child(&mut self, uffd: &OwnedFd) -> Result<()> {
        self.held.spaces.push(Some(uffd.as_raw_fd()));
        self.wire.send(&ToGuard::Child(uffd.as_raw_fd()))?;
        self.holding()
    }

    /// It need not hold that any more.
    pub fn ended(&mut self, space: usize) {
        // One that is dead is noticed elsewhere.
        let _ = self.wire.send(&ToGuard::Ended(space));
    }

    /// Nothing is missing any more: it ends. Returns when it has let go of the record.
    pub fn done(mut self) {
        let ended = self
            .wire
            .send(&ToGuard::Done)
            .and_then(|()| self.wire.recv::<ToFiller>());
        if let Ok(_) | Err(Error::Deadline { .. }) = ended {
            tracing::warn!("the guard of missing memory does not end");
        }
    }

    /// Readable when it is dead.
    pub fn line(&self) -> &Wire {
        &self.wire
    }

    pub fn id(&self) -> Id {
        self.id
    }

    fn holding(&mut self) -> Result<()> {
        match self.wire.recv()? {
            ToFiller::Holding => Ok(()),
            ToFiller::Yours(_) => Err(out_of_turn()),
        }
    }
}

fn out_of_turn() -> Error {
    Error::bad("the guard of missing memory", "speaks out of turn")
}

fn line(fd: OwnedFd) -> Result<Wire> {
    let link = transport::adopt(fd, "the guard".into()).context("set up", "a line to the guard")?;
    let wire = Wire::new(link);
    wire.set_deadline(PATIENCE)?;
    Ok(wire)
}

/// Where the guard listens: short enough for a socket, however long the name of the
/// directory is, for as long as that is held open.
fn socket(id: Id) -> Result<(File, PathBuf)> {
    let folder = Folder::at(&run_dir())?.sub("fills")?;
    let held = File::open(folder.path()).context("open", folder.path().display())?;
    let path = format!("/proc/self/fd/{}/{id}", held.as_raw_fd());
    Ok((held, path.into()))
}

/// Makes what another process holds one's own too.
fn fetch(held: &Held) -> Result<(OwnedFd, Vec<Option<OwnedFd>>)> {
    let process = pidfd::open(held.pid).context("open", "who fills the program's memory")?;
    let get = |fd: i32| {
        pidfd::get(process.as_fd(), fd).context("share what fills the memory, descriptor", fd)
    };
    let spaces = held.spaces.iter().map(|fd| fd.map(get).transpose());
    let spaces: Result<Vec<Option<OwnedFd>>> = spaces.collect();
    Ok((get(held.log)?, spaces?))
}

/// A program that misses memory, from outside.
pub(super) struct Program(Option<Frozen>);

impl Program {
    pub(super) fn of(id: Id) -> Result<Program> {
        let husk = journal::see_target(id)?
            .ok_or_else(|| Error::bad(format!("migration {id}"), "has no record here"))?;
        Frozen::open(&husk.record().place).map(Program)
    }

    /// Stands still from now on, so far as it is not waiting for memory anyway.
    pub(super) fn stop(&self) {
        self.try_to("stop", Frozen::stop);
    }

    pub(super) fn go_on(&self) {
        self.try_to("let go on", Frozen::go_on);
    }

    fn try_to(&self, what: &str, act: impl Fn(&Frozen) -> Result<()>) {
        if let Some(Err(e)) = self.0.as_ref().map(act) {
            tracing::warn!("the program whose memory is missing could not be {what}: {e}");
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        let populated = |f: &Frozen| f.populated().unwrap_or(false);
        !self.0.as_ref().is_some_and(populated)
    }
}

struct Keeping {
    log: OwnedFd,
    spaces: Vec<Option<OwnedFd>>,
    /// Where new fillers find this guard, and what that was when it was made.
    path: PathBuf,
    inode: u64,
    filler: Option<(Wire, OwnedFd)>,
    program: Program,
    record: journal::Husk,
}

/// The guard's life. Standard input is the line to the filler that started it.
///
/// # Errors
/// It could not begin.
pub fn run(id: Id) -> Result<()> {
    close_from(3).context("close", "inherited descriptors")?;
    let _ = setsid();
    // Nobody else takes the record for abandoned meanwhile.
    let record = journal::Husk::join(id)?;
    // What ends pmig serve with all that it started leaves this alone.
    let moved = Hold::guard(id).and_then(|hold| {
        let moved = hold.take(std::process::id() as i32);
        hold.leave();
        moved
    });
    if let Err(e) = moved {
        tracing::warn!("the guard stays in the cgroup of who started it: {e}");
    }
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    let line_fd = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("take over", "the line to the filler")?;
    let null = File::open("/dev/null").context("open", "/dev/null")?;
    nix::unistd::dup2_stdin(&null).context("close", "the line")?;
    raise_descriptors();
    let (_folder, path) = socket(id)?;
    // One that is believed to be dead must not be in the way.
    let _ = std::fs::remove_file(&path);
    let listener =
        Listener::bind(&Addr::Unix(path.clone())).context("listen on", path.display())?;
    let inode = inode(&path);
    let mut wire = line(line_fd)?;
    let ToGuard::Hold(held) = wire.recv()? else {
        return Err(out_of_turn());
    };
    let (log, spaces) = fetch(&held)?;
    let filler = pidfd::open(held.pid).context("open", "the filler")?;
    let program = Program::of(id)?;
    wire.send(&ToFiller::Holding)?;
    let mut keeping = Keeping {
        log,
        spaces,
        path,
        inode,
        filler: Some((wire, filler)),
        program,
        record,
    };
    while keeping.watch(&listener) {}
    if keeping.is_found() {
        let _ = std::fs::remove_file(&keeping.path);
    }
    // Before the filler hears that this has ended.
    let Keeping {
        spaces,
        record,
        filler,
        ..
    } = keeping;
    drop(spaces);
    drop(record);
    drop(filler);
    Ok(())
}

fn numbers<'a>(spaces: impl Iterator<Item = Option<&'a OwnedFd>>) -> Vec<Option<i32>> {
    spaces.map(|fd| fd.map(AsRawFd::as_raw_fd)).collect()
}

fn inode(path: &Path) -> u64 {
    std::fs::symlink_metadata(path).map_or(0, |m| m.ino())
}

impl Keeping {
    /// Whether no other guard has taken its place.
    fn is_found(&self) -> bool {
        inode(&self.path) == self.inode
    }

    /// Waits for one thing to happen. `false`: nothing is left to hold.
    fn watch(&mut self, listener: &Listener) -> bool {
        let mut fds = vec![PollFd::new(listener.fd(), PollFlags::POLLIN)];
        if let Some((wire, _)) = &self.filler {
            fds.push(PollFd::new(wire.link().fd(), PollFlags::POLLIN));
        }
        let came = |fd: &PollFd| fd.any() == Some(true);
        let (new, said) = match poll(&mut fds, PollTimeout::from(LOOK)) {
            Ok(0) => return self.filler.is_some() || !self.program.has_ended(),
            Ok(_) => (came(&fds[0]), fds.get(1).is_some_and(came)),
            Err(_) => return true,
        };
        if said {
            match self.hear() {
                Ok(goes_on) => return goes_on,
                Err(e) => {
                    tracing::info!("who filled the program's memory is gone: {e}");
                    if !self.record.filling().unwrap_or(true) {
                        self.program.go_on();
                        return false;
                    }
                    if !self.is_found() {
                        return false;
                    }
                    self.program.stop();
                    self.filler = None;
                }
            }
        }
        if new {
            if let Err(e) = self.receive(listener) {
                tracing::warn!("a new filler does not come about: {e}");
            }
        }
        true
    }

    fn hear(&mut self) -> Result<bool> {
        let Some((wire, filler)) = &mut self.filler else {
            return Ok(true);
        };
        match wire.recv()? {
            ToGuard::Child(fd) => {
                let child = pidfd::get(filler.as_fd(), fd).context("share", "a child's memory")?;
                self.spaces.push(Some(child));
                wire.send(&ToFiller::Holding)?;
            }
            ToGuard::Ended(space) => {
                if let Some(fd) = self.spaces.get_mut(space) {
                    *fd = None;
                }
            }
            ToGuard::Ready => self.program.go_on(),
            ToGuard::Done => return Ok(false),
            ToGuard::Hold(_) | ToGuard::TakeOver(_) => return Err(out_of_turn()),
        }
        Ok(true)
    }

    /// A new filler takes the place of the old one, if there is one.
    fn receive(&mut self, listener: &Listener) -> Result<()> {
        let link = listener.accept().context("hear", "a new filler")?;
        let mut wire = Wire::new(link);
        wire.set_deadline(PATIENCE)?;
        let ToGuard::TakeOver(pid) = wire.recv()? else {
            return Err(out_of_turn());
        };
        self.program.stop();
        if let Some((_, old)) = self.filler.take() {
            pidfd::kill(old.as_fd());
            await_end(&old)?;
        }
        let new = pidfd::open(pid).context("open", "the new filler")?;
        wire.send(&ToFiller::Yours(Held {
            pid: std::process::id() as i32,
            log: self.log.as_raw_fd(),
            spaces: numbers(self.spaces.iter().map(Option::as_ref)),
        }))?;
        self.filler = Some((wire, new));
        Ok(())
    }
}

/// Two must never act at once.
fn await_end(process: &OwnedFd) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        if matches!(poll(&mut fds, PollTimeout::from(100u8)), Ok(n) if n > 0) {
            return Ok(());
        }
    }
    Err(Error::Deadline {
        what: "the end of who filled the program's memory before".into(),
        after: PATIENCE,
    })
}
