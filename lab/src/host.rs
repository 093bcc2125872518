//! What can be done with a host, whatever it is made of.

use crate::session::Session;
use crate::wire::{Clocks, Cmd, Process, Reply, Request, Status};
use anyhow::{bail, Context, Result};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// What a host is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Make {
    /// Namespaces on this machine's own kernel.
    Netns,
    /// A QEMU machine with a kernel of its own.
    Vm,
}

impl fmt::Display for Make {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Netns => "netns",
            Self::Vm => "vm",
        })
    }
}

/// What a command wrote and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub status: Status,
}

impl Output {
    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The output, if the command succeeded.
    ///
    /// # Errors
    /// What it wrote, if it did not.
    pub fn ok(self) -> Result<Self> {
        if self.status.success() {
            return Ok(self);
        }
        bail!("{:?}: {}{}", self.status, self.out(), self.err());
    }
}

/// One host of a lab.
pub trait Host: Send + Sync {
    /// Its name, which the other hosts know too.
    fn name(&self) -> &str;

    /// What it is made of.
    fn make(&self) -> Make;

    /// Opens a conversation with its agent.
    ///
    /// # Errors
    /// No agent answers before the deadline.
    fn session(&self, deadline: Instant) -> Result<Session>;

    /// Ends it without warning, as a power cut would.
    ///
    /// # Errors
    /// Those of signalling its first process.
    fn crash(&self) -> Result<()>;

    /// Starts it again after a crash, its disk as the crash left it.
    ///
    /// # Errors
    /// A make that cannot do so, or a host that does not come up.
    fn restart(&self) -> Result<()>;

    /// What it said before it ended, if it has ended by itself.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// Where pmig listens on it, as the other hosts reach it.
    fn address(&self) -> String {
        format!("tcp://{}", self.name())
    }

    /// A conversation with the deadline that suits a host that is up.
    ///
    /// # Errors
    /// As [`Host::session`].
    fn talk(&self) -> Result<Session> {
        self.session(Instant::now() + Duration::from_secs(20))
            .with_context(|| format!("talk to {}", self.name()))
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// It could not be started, or the host is gone; a failing command is no
    /// error here, see [`Output::ok`].
    fn exec(&self, cmd: &Cmd) -> Result<Output> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let status = self.talk()?.exec(cmd, None, &mut stdout, &mut stderr)?;
        Ok(Output {
            stdout,
            stderr,
            status,
        })
    }

    /// Runs a shell line to its end and gives its output.
    ///
    /// # Errors
    /// As [`Host::exec`], or the line fails.
    fn sh(&self, line: &str) -> Result<String> {
        let output = self.exec(&Cmd::shell(line))?;
        Ok(output
            .ok()
            .with_context(|| format!("{line} on {}", self.name()))?
            .out())
    }

    /// Starts a program in the background, leader of its own session, its
    /// output going to a file of the host; gives its PID.
    ///
    /// # Errors
    /// It could not be started.
    fn spawn(&self, cmd: &Cmd, output: &str) -> Result<u32> {
        let request = Request::Spawn {
            cmd: cmd.clone(),
            output: output.into(),
        };
        match self.talk()?.tell(&request)? {
            Reply::Spawned { pid } => Ok(pid),
            other => bail!("a reply of another kind: {other:?}"),
        }
    }

    /// How a program started by [`Host::spawn`] ended; `None` if it runs.
    ///
    /// # Errors
    /// It was not started here.
    fn ended(&self, pid: u32) -> Result<Option<Status>> {
        match self.talk()?.tell(&Request::Ended { pid })? {
            Reply::Ended(status) => Ok(status),
            other => bail!("a reply of another kind: {other:?}"),
        }
    }

    /// Writes a file in the host.
    ///
    /// # Errors
    /// Those of the file there.
    fn write(&self, path: &str, mode: u32, contents: &[u8]) -> Result<()> {
        self.talk()?.push(path, mode, &mut &contents[..])
    }

    /// Copies a file into the host, with its mode.
    ///
    /// # Errors
    /// Those of the file here or there.
    fn push(&self, file: &Path, path: &str) -> Result<()> {
        let mut open = File::open(file).with_context(|| format!("open {}", file.display()))?;
        let mode = open.metadata()?.permissions().mode() & 0o7777;
        self.talk()?.push(path, mode, &mut open)
    }

    /// The contents of a file of the host, from an offset on.
    ///
    /// # Errors
    /// Those of the file there.
    fn read_from(&self, path: &str, offset: u64) -> Result<Vec<u8>> {
        let mut contents = Vec::new();
        let request = Request::Pull {
            path: path.into(),
            offset,
        };
        self.talk()?
            .ask(&request, &mut contents, &mut std::io::sink())
            .with_context(|| format!("read {path} on {}", self.name()))?;
        Ok(contents)
    }

    /// The contents of a file of the host.
    ///
    /// # Errors
    /// Those of the file there.
    fn read(&self, path: &str) -> Result<Vec<u8>> {
        self.read_from(path, 0)
    }

    /// Copies a file out of the host.
    ///
    /// # Errors
    /// Those of the file here or there.
    fn pull(&self, path: &str, file: &Path) -> Result<()> {
        let mut open = File::create(file).with_context(|| format!("create {}", file.display()))?;
        let request = Request::Pull {
            path: path.into(),
            offset: 0,
        };
        self.talk()?
            .ask(&request, &mut open, &mut std::io::sink())
            .with_context(|| format!("read {path} on {}", self.name()))?;
        Ok(())
    }

    /// Sends a signal to one process of the host; 9 kills it.
    ///
    /// # Errors
    /// Those of kill(2).
    fn signal(&self, pid: u32, signal: i32) -> Result<()> {
        let pid = i32::try_from(pid)?;
        self.talk()?.tell(&Request::Signal { pid, signal })?;
        Ok(())
    }

    /// The host's processes.
    ///
    /// # Errors
    /// The host is gone.
    fn ps(&self) -> Result<Vec<Process>> {
        match self.talk()?.tell(&Request::Ps)? {
            Reply::Processes(all) => Ok(all),
            other => bail!("a reply of another kind: {other:?}"),
        }
    }

    /// The process with that PID, if it is there.
    ///
    /// # Errors
    /// The host is gone.
    fn process(&self, pid: u32) -> Result<Option<Process>> {
        match self.talk()?.tell(&Request::Process { pid })? {
            Reply::Processes(all) => Ok(all.into_iter().next()),
            other => bail!("a reply of another kind: {other:?}"),
        }
    }

    /// The host's clocks, now.
    ///
    /// # Errors
    /// The host is gone.
    fn clocks(&self) -> Result<Clocks> {
        match self.talk()?.tell(&Request::Clocks)? {
            Reply::Clocks(clocks) => Ok(clocks),
            other => bail!("a reply of another kind: {other:?}"),
        }
    }

    /// Types a line at the host's console and gives what it answers.
    ///
    /// # Errors
    /// It has none, or it does not answer.
    fn console(&self, line: &str) -> Result<String> {
        let what = format!("{} has no console to type {line:?} at", self.name());
        Err(crate::harness::CannotHere(what).into())
    }

    /// Makes the host unreachable for the others, or reachable again.
    ///
    /// # Errors
    /// Those of ip(8).
    fn link(&self, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        self.sh(&format!("ip link set eth0 {state}")).map(drop)
    }

    /// Waits until `done` says so.
    ///
    /// # Errors
    /// It did not within `limit`, or it failed.
    fn wait_for(
        &self,
        what: &str,
        limit: Duration,
        done: &mut dyn FnMut() -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !done()? {
            if Instant::now() >= deadline {
                bail!("{what} did not come about on {} in {limit:?}", self.name());
            }
            thread::sleep(Duration::from_millis(match self.make() {
                Make::Netns => 20,
                Make::Vm => 100,
            }));
        }
        Ok(())
    }
}

/// Hands the reader of this program's own input to a session.
pub fn own_input() -> Box<dyn Read + Send> {
    Box::new(std::io::stdin())
}

/// How far b's real-time clock is ahead of a's, in nanoseconds, and half the
/// round trip in which that was measured, the error it may have.
///
/// # Errors
/// One of the hosts is gone.
pub fn clock_offset(a: &dyn Host, b: &dyn Host) -> Result<(i128, i128)> {
    let (to_a, error_a) = clock_against_here(a)?;
    let (to_b, error_b) = clock_against_here(b)?;
    Ok((to_b - to_a, error_a + error_b))
}

fn clock_against_here(host: &dyn Host) -> Result<(i128, i128)> {
    let mut session = host.talk()?;
    let start = Instant::now();
    let epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let epoch = i128::try_from(epoch.as_nanos())?;
    let mut best: Option<(i128, i128)> = None;
    for _ in 0..40 {
        let before = i128::try_from(start.elapsed().as_nanos())?;
        let reply = session.tell(&Request::Clocks)?;
        let after = i128::try_from(start.elapsed().as_nanos())?;
        let Reply::Clocks(clocks) = reply else {
            bail!("a reply of another kind: {reply:?}");
        };
        let error = (after - before) / 2;
        let offset = clocks.realtime - (epoch + before + error);
        if best.is_none_or(|(_, smallest)| error < smallest) {
            best = Some((offset, error));
        }
    }
    best.context("no clock was read")
}
