//! How a holder begins: told over its standard input whom to hold.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::unistd::setsid;
use serde::{Deserialize, Serialize};

use super::{make_folder, Line};
use crate::error::{printable, Context, Error, Result};
use crate::id::Id;
use crate::image::Picture;
use crate::proc::stat::Stat;
use crate::sys::spawn;
use crate::sys::tty::{self, Modes, Size};

/// How long a holder may take to do what it is told.
const PATIENCE: Duration = Duration::from_secs(10);

/// The place of the parent in proc_pid_stat(5).
const PARENT: usize = 4;

/// What a holder is told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Setup {
    /// To hold its child, a husk.
    Adopt(Arrived),
    /// The program runs.
    Go,
    /// What its terminals showed before.
    Show(Vec<Picture>),
    /// To end, so that its child is an orphan.
    Leave,
    /// To start a program.
    Start {
        argv: Vec<OsString>,
        size: Size,
        modes: Option<Modes>,
        /// Somebody is about to look.
        watched: bool,
    },
}

/// A husk that is to be held.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Arrived {
    pub pid: i32,
    pub id: Id,
    /// Who has the terminals, under these numbers.
    pub session: i32,
    pub terminals: Vec<(i32, Size)>,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Done(i32),
    Failed(String),
}

/// The session's line to the holder of its husk. Dropped, the holder goes by
/// what becomes of the husk.
#[derive(Debug)]
pub struct Adopting {
    line: Line,
    theirs: Option<UnixStream>,
}

impl Adopting {
    pub fn new() -> Result<Adopting> {
        let (ours, theirs) = UnixStream::pair().context("make", "a line to the holder")?;
        let line = Line::new(ours);
        line.set_patience(Some(PATIENCE))?;
        Ok(Adopting {
            line,
            theirs: Some(theirs),
        })
    }

    /// What is to be the holder's standard input.
    pub fn stdin(&self) -> Option<BorrowedFd<'_>> {
        self.theirs.as_ref().map(AsFd::as_fd)
    }

    /// Hands the terminals over, in place of those handed over before.
    ///
    /// # Errors
    /// The holder is gone, or cannot take them.
    pub fn give(&mut self, pid: i32, id: Id, terminals: &[(&OwnedFd, Size)]) -> Result<()> {
        self.theirs = None;
        let numbers = terminals.iter().map(|(fd, size)| (fd.as_raw_fd(), *size));
        self.line.say(&Setup::Adopt(Arrived {
            pid,
            id,
            session: std::process::id() as i32,
            terminals: numbers.collect(),
        }))?;
        answer(&mut self.line).map(drop)
    }

    /// Whether it lives: its end of the line is open.
    pub fn is_there(&self) -> bool {
        let mut fds = [PollFd::new(self.line.fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }

    /// The program is to be an orphan. Returns when it is.
    ///
    /// # Errors
    /// It does not become one.
    pub fn leave(mut self, pid: i32) -> Result<()> {
        let parent = || Stat::read(pid)?.fields::<1>(PARENT);
        let holder = parent()?;
        self.line.say(&Setup::Leave)?;
        // Its end of the line is closed before its children are given away.
        let begun = Instant::now();
        while parent()? == holder {
            if begun.elapsed() > PATIENCE {
                return Err(Error::bad("holder", "does not end"));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// The program runs.
    ///
    /// # Errors
    /// The holder is gone.
    pub fn go(&mut self) -> Result<()> {
        self.line.say(&Setup::Go)
    }

    /// What its terminals showed before: the last that is said.
    ///
    /// # Errors
    /// The holder is gone.
    pub fn show(mut self, pictures: Vec<Picture>) -> Result<()> {
        self.line.say(&Setup::Show(pictures))
    }
}

fn answer(line: &mut Line) -> Result<i32> {
    match line.hear()? {
        Answer::Done(pid) => Ok(pid),
        Answer::Failed(why) => Err(Error::bad("holder", printable(&why))),
    }
}

/// Starts a program under a holder of its own, on a new terminal of that size,
/// with the environment and directory of this process. Returns its PID. If
/// `watched`, its holder waits for the first who looks before it ends.
///
/// # Errors
/// It cannot be started.
pub fn start(argv: Vec<OsString>, size: Size, modes: Option<Modes>, watched: bool) -> Result<i32> {
    make_folder()?;
    let (ours, theirs) = UnixStream::pair().context("make", "a line to the holder")?;
    Command::new("/proc/self/exe")
        .arg0("pmig")
        .arg("holder")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start", "the program's holder")?;
    let mut line = Line::new(ours);
    line.set_patience(Some(PATIENCE))?;
    line.say(&Setup::Start {
        argv,
        size,
        modes,
        watched,
    })?;
    answer(&mut line)
}

/// What [`Setup::Start`] asks for: the program's PID, and the end of its
/// terminal that shows it.
pub(super) fn spawn(
    argv: &[OsString],
    size: Size,
    modes: Option<Modes>,
) -> io::Result<(i32, OwnedFd)> {
    let (master, slave) = tty::pair()?;
    tty::set_size(slave.as_fd(), size)?;
    if let Some(modes) = modes {
        tty::set_modes(slave.as_fd(), &modes)?;
    }
    let (program, words) = argv
        .split_first()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut command = Command::new(program);
    command.args(words);
    spawn::on_terminal(&mut command, &slave)?;
    let child = command.spawn()?;
    Ok((child.id() as i32, master))
}

/// Becomes a process of its own: no terminal, no descriptors but the line.
pub(super) fn detach() -> Result<UnixStream> {
    let line = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("take over", "the line to the holder")?;
    let _ = setsid();
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("open", "/dev/null")?;
    nix::unistd::dup2_stdin(&null).context("close", "the line")?;
    Ok(line.into())
}

pub(super) fn word(program: &OsString) -> String {
    printable(&String::from_utf8_lossy(&program.clone().into_vec()))
}
