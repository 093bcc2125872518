//! A terminal here joined with a program's: `attach`, and `run`.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{cfmakeraw, tcgetattr, tcsetattr, SetArg, Termios};
use pmig::error::{printable, Context, Error, Result};
use pmig::holder::{self, Ask, Ended, Holder, Said, MAX_KEYS};
use pmig::sys::tty::{self, Size};

use super::output::{error_line, line};
use super::{say, Attach, Exit, Run};

/// Control and `]`.
const DETACH: u8 = 0x1d;

/// What puts a terminal emulator back to what a shell expects of it: main
/// screen, visible cursor, no colours, plain keys, no mouse, no pasting marks.
const PLAIN: &str =
    "\x1b[?1049l\x1b[?25h\x1b[m\x1b[?1l\x1b>\x1b[?9l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?2004l";

/// How looking at a program ended.
enum Over {
    Detached,
    Ended(Ended),
    Left(String),
}

pub fn attach(args: &Attach) -> u8 {
    let found = match find(args.pid) {
        Ok(found) => found,
        Err(exit) => return exit as u8,
    };
    if found.terminals == 0 {
        error_line(&format!(
            "pmig: {} has no terminal that could be shown",
            args.pid
        ));
        return Exit::Other as u8;
    }
    look(args.pid, found, args.watch, args.key)
}

pub fn run(args: &Run) -> u8 {
    let here = io::stdin();
    let on_terminal = here.is_terminal();
    let size = tty::size(here.as_fd()).unwrap_or_default();
    let size = match (size.rows, size.cols) {
        (0, _) | (_, 0) => Size {
            rows: 24,
            cols: 80,
            ..Size::default()
        },
        _ => size,
    };
    let modes = tty::modes(here.as_fd()).ok();
    let show = on_terminal && !args.detach;
    let pid = match holder::start(args.command.clone(), size, modes, show) {
        Ok(pid) => pid,
        Err(e) => {
            say(&e);
            return Exit::Other as u8;
        }
    };
    if !show {
        line(&pid.to_string());
        return Exit::Done as u8;
    }
    match holder::find_started(pid) {
        Ok(Some(found)) => look(pid, found, false, args.key),
        // It has ended already, and nobody was told how.
        Ok(None) => Exit::Done as u8,
        Err(e) => {
            say(&e);
            Exit::Other as u8
        }
    }
}

/// Shows a program that was just brought back, if it has a terminal and so has
/// this process.
pub fn shown(pid: i32) -> Option<u8> {
    if !io::stdin().is_terminal() {
        return None;
    }
    match holder::find_soon(pid) {
        Ok(Some(found)) if found.terminals > 0 => Some(look(pid, found, false, DETACH)),
        _ => None,
    }
}

fn find(pid: i32) -> std::result::Result<Holder, Exit> {
    match holder::find_soon(pid) {
        Ok(Some(found)) => Ok(found),
        Ok(None) if !std::path::Path::new(&format!("/proc/{pid}")).exists() => {
            say(&Error::Gone(pid));
            Err(Exit::Other)
        }
        Ok(None) => {
            error_line(&format!(
                "pmig: nobody of pmig's holds {pid}: it was neither started by pmig run nor moved \
                 here"
            ));
            Err(Exit::Other)
        }
        Err(e) => {
            say(&e);
            Err(Exit::Other)
        }
    }
}

/// Shows a program until it ends, leaves, or somebody detaches.
fn look(pid: i32, found: Holder, only_watch: bool, key: u8) -> u8 {
    let raw = Raw::new();
    let over = show(found, only_watch, key);
    let shown = raw.is_some();
    drop(raw);
    if shown {
        let mut out = io::stdout();
        let _ = out.write_all(PLAIN.as_bytes()).and_then(|()| out.flush());
        line("");
    }
    match over {
        Ok(Over::Detached) => {
            error_line(&format!("[detached; pmig attach {pid}]"));
            Exit::Done as u8
        }
        Ok(Over::Ended(ended)) => {
            error_line(&format!("[{pid} {ended}]"));
            ended.code()
        }
        Ok(Over::Left(there)) => {
            error_line(&format!("[{pid} {}]", printable(&there)));
            Exit::Done as u8
        }
        Err(e) => {
            say(&e);
            Exit::Other as u8
        }
    }
}

/// The terminal here, handing on every key. Dropped, it is as it was.
struct Raw(Termios);

impl Raw {
    fn new() -> Option<Raw> {
        let here = io::stdin();
        let before = tcgetattr(here.as_fd()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(here.as_fd(), SetArg::TCSANOW, &raw).ok()?;
        Some(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.0);
    }
}

fn size_here() -> Option<Size> {
    let size = tty::size(io::stdin().as_fd()).ok()?;
    (size.rows > 0 && size.cols > 0).then_some(size)
}

fn show(found: Holder, only_watch: bool, key: u8) -> Result<Over> {
    let mut line = found.line;
    let mut signals = SigSet::empty();
    let ends = [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT];
    signals.add(Signal::SIGWINCH);
    ends.into_iter().for_each(|s| signals.add(s));
    signals.thread_block().context("block", "signals")?;
    let bell = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .context("wait for", "signals")?;
    // It may have said its last word already.
    let _ = line.say(&Ask::Show {
        terminal: 0,
        size: size_here().filter(|_| !only_watch),
    });
    let (mut input, mut output) = (io::stdin(), io::stdout());
    let mut typing = true;
    loop {
        while let Some(said) = line.heard()? {
            match said {
                Said::Shown(bytes) => output
                    .write_all(&bytes)
                    .and_then(|()| output.flush())
                    .context("write to", "standard output")?,
                Said::Ended(ended) => return Ok(Over::Ended(ended)),
                Said::Left { there } => return Ok(Over::Left(there)),
                Said::Hello { .. } | Said::Held | Said::Pictures(_) => {}
            }
        }
        let mut fds = vec![
            PollFd::new(line.fd(), PollFlags::POLLIN),
            PollFd::new(bell.as_fd(), PollFlags::POLLIN),
        ];
        if typing {
            fds.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            polled => polled.context("wait for", "the program")?,
        };
        let ready = |n: usize| {
            let fd: Option<&PollFd> = fds.get(n);
            fd.is_some_and(|fd| fd.any().unwrap_or(false))
        };
        let (came, rang, typed) = (ready(0), ready(1), ready(2));
        if rang {
            while let Ok(Some(signal)) = bell.read_signal() {
                if ends.iter().any(|s| *s as u32 == signal.ssi_signo) {
                    return Ok(Over::Detached);
                }
                if let Some(size) = size_here().filter(|_| !only_watch) {
                    line.say(&Ask::Resize(size))?;
                }
            }
        }
        if typed {
            let mut keys = vec![0; MAX_KEYS];
            let n = input.read(&mut keys).context("read", "standard input")?;
            keys.truncate(n);
            typing = n > 0;
            if let Some(at) = keys.iter().position(|b| *b == key) {
                keys.truncate(at);
                if !keys.is_empty() && !only_watch {
                    line.say(&Ask::Keys(keys))?;
                }
                return Ok(Over::Detached);
            }
            if n > 0 && !only_watch {
                line.say(&Ask::Keys(keys))?;
            }
        }
        if came && line.read().context("hear", "the program's holder")? == 0 {
            return Err(Error::bad("the program's holder", "is gone"));
        }
    }
}

/// `^]`, `^a`: a key that is typed with Control.
pub fn control_key(text: &str) -> std::result::Result<u8, String> {
    match text.as_bytes() {
        [b'^', key @ (b'@'..=b'_' | b'a'..=b'z')] => Ok(key & 0x1f),
        _ => Err(format!("{text}: a key is written like ^] or ^a")),
    }
}
