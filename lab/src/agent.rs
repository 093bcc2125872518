//! The lab's hand inside a host: carries out [`Request`]s one after another.

use crate::sys;
use crate::wire::{self, Clocks, Cmd, Process, Reply, Request, Status, Tag, LARGEST};
use anyhow::{bail, Context, Result};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{kill, killpg, Signal};
use nix::time::{clock_gettime, ClockId};
use nix::unistd::Pid;
use pmig::sys::spawn::on_terminal;
use pmig::sys::tty::{self, Size};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Where commands run unless they say otherwise.
pub const WORK: &str = "/srv/work";
/// Where the sample programs lie.
pub const PROGRAMS: &str = "/srv/lab/bin";

type Out = Arc<Mutex<Box<dyn Write + Send>>>;
type Spawned = Arc<Mutex<HashMap<u32, Option<Status>>>>;

/// What ends the host: called when a held connection ends, or by request.
pub type End = fn();

/// The agent of one host; clones share what was spawned.
#[derive(Clone)]
pub struct Agent {
    spawned: Spawned,
    end: End,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The part of a conversation that outlives single requests.
struct Talk {
    out: Out,
    running: Arc<Mutex<Option<Pid>>>,
    input: Option<ChildStdin>,
    /// The terminal of the command that runs.
    terminal: Option<File>,
    file: Option<File>,
    hold: bool,
}

impl Agent {
    /// An agent whose host ends by `end`.
    pub fn new(end: End) -> Self {
        Self {
            spawned: Arc::default(),
            end,
        }
    }

    /// Serves one connection until it ends; false if nobody greeted.
    pub fn serve(&self, mut input: impl Read, mut out: Box<dyn Write + Send>) -> bool {
        let greeted = wire::find_preamble(&mut input).ok().flatten();
        let Some(nonce) = greeted else { return false };
        let mut answer = wire::MAGIC.to_vec();
        answer.extend_from_slice(&nonce);
        if out.write_all(&answer).and_then(|()| out.flush()).is_err() {
            return true;
        }
        let mut talk = Talk {
            out: Arc::new(Mutex::new(out)),
            running: Arc::default(),
            input: None,
            terminal: None,
            file: None,
            hold: false,
        };
        while let Ok(Some((tag, payload))) = wire::read_frame(&mut input) {
            if self.frame(&mut talk, tag, &payload).is_err() {
                break;
            }
        }
        if let Some(group) = lock(&talk.running).take() {
            let _ = killpg(group, Signal::SIGTERM);
        }
        if talk.hold {
            (self.end)();
        }
        true
    }

    fn frame(&self, talk: &mut Talk, tag: Tag, payload: &[u8]) -> Result<()> {
        match tag {
            Tag::Request => {
                let request = serde_json::from_slice(payload)?;
                let reply = self.request(talk, request).unwrap_or_else(|e| {
                    Some(Reply::Failed {
                        error: format!("{e:#}"),
                    })
                });
                match reply {
                    Some(reply) => wire::write_json(&mut **lock(&talk.out), Tag::Reply, &reply)?,
                    None => return Ok(()),
                }
            }
            Tag::Input if talk.file.is_some() => {
                let result = match (&mut talk.file, payload.is_empty()) {
                    (Some(file), false) => file.write_all(payload),
                    _ => {
                        talk.file = None;
                        wire::write_json(&mut **lock(&talk.out), Tag::Reply, &Reply::Done)
                    }
                };
                result?;
            }
            Tag::Input if talk.terminal.is_some() => {
                if let Some(terminal) = &mut talk.terminal {
                    // What runs there may have ended.
                    let _ = terminal.write_all(payload);
                }
            }
            Tag::Size => {
                if let (Some(terminal), Ok((rows, cols))) =
                    (&talk.terminal, serde_json::from_slice(payload))
                {
                    let _ = tty::set_size(terminal.as_fd(), size(rows, cols));
                }
            }
            Tag::Input if payload.is_empty() => talk.input = None,
            Tag::Input => {
                if let Some(stdin) = &mut talk.input {
                    if stdin.write_all(payload).is_err() {
                        talk.input = None;
                    }
                }
            }
            _ => bail!("unexpected frame"),
        }
        Ok(())
    }

    /// Carries out one request; no reply means that it comes later.
    fn request(&self, talk: &mut Talk, request: Request) -> Result<Option<Reply>> {
        Ok(Some(match request {
            Request::Ping => Reply::Done,
            Request::Hold => {
                talk.hold = true;
                Reply::Done
            }
            Request::Free => {
                talk.hold = false;
                Reply::Done
            }
            Request::Exec {
                cmd,
                input,
                terminal,
            } => {
                match terminal {
                    Some((rows, cols)) => self.exec_on_terminal(talk, &cmd, size(rows, cols))?,
                    None => self.exec(talk, &cmd, input)?,
                }
                return Ok(None);
            }
            Request::Spawn { cmd, output } => self.spawn(&cmd, &output)?,
            Request::Ended { pid } => match lock(&self.spawned).get(&pid) {
                Some(status) => Reply::Ended(*status),
                None => bail!("{pid} was not spawned here"),
            },
            Request::Push { path, mode } => {
                talk.file = Some(
                    OpenOptions::new()
                        .write(true)
                        .create(true)
                        .truncate(true)
                        .mode(mode)
                        .open(&path)
                        .with_context(|| format!("create {path}"))?,
                );
                return Ok(None);
            }
            Request::Pull { path, offset } => {
                let mut file = File::open(&path).with_context(|| format!("open {path}"))?;
                file.seek(SeekFrom::Start(offset))?;
                pump(file, Tag::Output, &talk.out);
                Reply::Done
            }
            Request::Signal { pid, signal } => {
                let signal = match signal {
                    0 => None,
                    number => Some(Signal::try_from(number)?),
                };
                kill(Pid::from_raw(pid), signal).with_context(|| format!("signal {pid}"))?;
                Reply::Done
            }
            Request::Ps => Reply::Processes(processes()?),
            Request::Process { pid } => Reply::Processes(process(pid).into_iter().collect()),
            Request::Clocks => Reply::Clocks(Clocks {
                realtime: clock(ClockId::CLOCK_REALTIME)?,
                monotonic: clock(ClockId::CLOCK_MONOTONIC)?,
                boottime: clock(ClockId::CLOCK_BOOTTIME)?,
            }),
            Request::Halt => {
                (self.end)();
                Reply::Done
            }
        }))
    }

    fn exec(&self, talk: &mut Talk, cmd: &Cmd, input: bool) -> Result<()> {
        let mut command = command(cmd)?;
        command
            .stdin(if input { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let mut child = start(&mut command, cmd)?;
        talk.input = child.stdin.take();
        let group = Pid::from_raw(child.id() as i32);
        *lock(&talk.running) = Some(group);
        let (out, running) = (Arc::clone(&talk.out), Arc::clone(&talk.running));
        thread::spawn(move || {
            let reply = finish(&mut child, &out);
            *lock(&running) = None;
            let _ = wire::write_json(&mut **lock(&out), Tag::Reply, &reply);
        });
        Ok(())
    }

    fn exec_on_terminal(&self, talk: &mut Talk, cmd: &Cmd, size: Size) -> Result<()> {
        let (master, slave) = tty::pair().context("make a terminal")?;
        tty::set_size(slave.as_fd(), size)?;
        let mut command = command(cmd)?;
        command.env("TERM", "xterm-256color");
        on_terminal(&mut command, &slave)?;
        let mut child = start(&mut command, cmd)?;
        // Those of this process would keep it open when the command has ended.
        drop((command, slave));
        talk.terminal = Some(File::from(master.try_clone()?));
        let group = Pid::from_raw(child.id() as i32);
        *lock(&talk.running) = Some(group);
        let (out, running) = (Arc::clone(&talk.out), Arc::clone(&talk.running));
        thread::spawn(move || {
            let pumped = File::from(master);
            let to = Arc::clone(&out);
            let (done, wait) = std::sync::mpsc::channel();
            thread::spawn(move || {
                pump(pumped, Tag::Output, &to);
                let _ = done.send(());
            });
            let status = child.wait();
            // What was written last is on its way through the kernel's queues, and
            // seen before the end of the terminal.
            let _ = wait.recv_timeout(std::time::Duration::from_secs(5));
            let reply = match status {
                Ok(status) => Reply::Ended(Some(ended(status))),
                Err(e) => Reply::Failed {
                    error: format!("wait: {e}"),
                },
            };
            *lock(&running) = None;
            let _ = wire::write_json(&mut **lock(&out), Tag::Reply, &reply);
        });
        Ok(())
    }

    fn spawn(&self, cmd: &Cmd, output: &str) -> Result<Reply> {
        let out = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(output)
            .with_context(|| format!("create {output}"))?;
        let mut command = command(cmd)?;
        command
            .stdin(Stdio::null())
            .stderr(out.try_clone()?)
            .stdout(out);
        sys::in_new_session(&mut command);
        let mut child = start(&mut command, cmd)?;
        let pid = child.id();
        lock(&self.spawned).insert(pid, None);
        let spawned = Arc::clone(&self.spawned);
        thread::spawn(move || {
            if let Ok(status) = child.wait() {
                lock(&spawned).insert(pid, Some(ended(status)));
            }
        });
        Ok(Reply::Spawned { pid })
    }
}

fn size(rows: u16, cols: u16) -> Size {
    Size {
        rows,
        cols,
        ..Size::default()
    }
}

fn command(cmd: &Cmd) -> Result<Command> {
    let (program, arguments) = cmd.argv.split_first().context("an empty command")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", path())
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .env("TERM", "dumb")
        .envs(cmd.env.iter().map(|(name, value)| (name, value)))
        .current_dir(cmd.cwd.as_deref().unwrap_or(WORK));
    Ok(command)
}

/// The search path of every command in a host.
pub fn path() -> String {
    format!("{PROGRAMS}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

fn start(command: &mut Command, cmd: &Cmd) -> Result<Child> {
    command
        .spawn()
        .with_context(|| format!("start {}", cmd.argv[0]))
}

fn ended(status: ExitStatus) -> Status {
    match status.code() {
        Some(code) => Status::Code(code),
        None => Status::Signal(status.signal().unwrap_or(0)),
    }
}

/// Hands on what the child writes until it and its pipes have ended.
fn finish(child: &mut Child, out: &Out) -> Reply {
    let pumps = [
        child.stdout.take().map(|p| (Tag::Output, OwnedFd::from(p))),
        child.stderr.take().map(|p| (Tag::Error, OwnedFd::from(p))),
    ]
    .into_iter()
    .flatten()
    .map(|(tag, pipe)| {
        let out = Arc::clone(out);
        let (done, wait) = std::sync::mpsc::channel();
        let again = pipe.try_clone();
        thread::spawn(move || {
            pump(File::from(pipe), tag, &out);
            let _ = done.send(());
        });
        (wait, again)
    })
    .collect::<Vec<_>>();
    let status = child.wait();
    // A daemon that the command left behind may hold the pipes for ever, but what is
    // in them is handed on.
    for (wait, pipe) in pumps {
        for _ in 0..100 {
            let ended = wait.recv_timeout(std::time::Duration::from_millis(300));
            if ended.is_ok() || !pipe.as_ref().is_ok_and(holds_something) {
                break;
            }
        }
    }
    match status {
        Ok(status) => Reply::Ended(Some(ended(status))),
        Err(e) => Reply::Failed {
            error: format!("wait: {e}"),
        },
    }
}

fn holds_something(pipe: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    let asked = poll(&mut fds, PollTimeout::ZERO);
    asked.is_ok()
        && fds[0]
            .revents()
            .is_some_and(|r| r.contains(PollFlags::POLLIN))
}

fn pump(mut from: impl Read, tag: Tag, out: &Out) {
    let mut buffer = vec![0; LARGEST];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => {
                if wire::write_frame(&mut **lock(out), tag, &buffer[..n]).is_err() {
                    return;
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

fn clock(id: ClockId) -> Result<i128> {
    let time = clock_gettime(id)?;
    Ok(i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
}

fn processes() -> Result<Vec<Process>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").context("read /proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // Processes may end while they are being listed.
        if let Some(process) = process(pid) {
            all.push(process);
        }
    }
    all.sort_by_key(|process| process.pid);
    Ok(all)
}

fn process(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (open, close) = (stat.find('(')?, stat.rfind(')')?);
    let mut fields = stat.get(close + 1..)?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let ppid = fields.next()?.parse().ok()?;
    // proc_pid_stat(5): the state is field 3, the number of threads 20.
    let threads = fields.nth(15)?.parse().ok()?;
    let cmdline = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(Process {
        pid,
        ppid,
        state,
        threads,
        comm: stat.get(open + 1..close)?.to_owned(),
        cmdline: cmdline
            .split(|&byte| byte == 0)
            .filter(|word| !word.is_empty())
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect(),
    })
}
