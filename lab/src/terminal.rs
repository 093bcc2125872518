//! A person at a terminal of a host, played by rexpect.

use crate::host::Host;
use crate::session::Typed;
use crate::wire::{Cmd, Status};
use anyhow::{anyhow, Context, Result};
use rexpect::reader::Options;
use rexpect::session::StreamSession;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{channel, Sender};
use std::thread::{self, JoinHandle};

/// How long something may take to be seen, in ms.
const PATIENCE: u64 = 60_000;
/// The size of the terminal at first.
const SIZE: (u16, u16) = (24, 80);
/// Control and `]`, which leaves `pmig attach`.
const LEAVE: &str = "\x1d";

struct Keys(Sender<Typed>);

impl Write for Keys {
    fn write(&mut self, keys: &[u8]) -> io::Result<usize> {
        let sent = self.0.send(Typed::Keys(keys.to_vec()));
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(keys.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A command that runs on a terminal, and is looked at.
pub struct Terminal {
    what: String,
    screen: StreamSession<Keys>,
    sizes: Sender<Typed>,
    command: JoinHandle<Result<Status>>,
}

impl Terminal {
    /// Runs a command on a terminal of the host.
    ///
    /// # Errors
    /// The host is gone.
    pub fn open(host: &dyn Host, words: &[&str]) -> Result<Self> {
        let what = format!("{} on {}", words.join(" "), host.name());
        let cmd = Cmd::new(words.iter().copied()).env("TERM", "xterm-256color");
        let (keys, typed) = channel();
        let (out, shown) = UnixStream::pair()?;
        let mut session = host.talk()?;
        let command = thread::spawn(move || {
            let end = out.try_clone()?;
            // rexpect's own way takes some letters for parts of sequences.
            let mut text = strip_ansi_escapes::Writer::new(out);
            let status = session.exec_on_terminal(&cmd, SIZE, typed, &mut text);
            let _ = text.flush();
            let _ = end.shutdown(Shutdown::Both);
            status
        });
        let options = Options::new().timeout_ms(Some(PATIENCE));
        Ok(Self {
            what,
            screen: StreamSession::new(shown, Keys(keys.clone()), options),
            sizes: keys,
            command,
        })
    }

    /// Shows a program that pmig holds there.
    ///
    /// # Errors
    /// As [`Terminal::open`].
    pub fn attach(host: &dyn Host, pid: u32) -> Result<Self> {
        Self::open(host, &["pmig", "attach", &pid.to_string()])
    }

    /// Waits until that text is shown, and gives what was shown before.
    ///
    /// # Errors
    /// It is not shown in time, or the command ends.
    pub fn sees(&mut self, text: &str) -> Result<String> {
        let seen = self.screen.exp_string(text);
        seen.map_err(|e| anyhow!("{}: {text:?} is not seen: {e}", self.what))
    }

    /// Types keys.
    ///
    /// # Errors
    /// The command has ended.
    pub fn types(&mut self, keys: &str) -> Result<()> {
        let typed = self.screen.send(keys).and_then(|_| self.screen.flush());
        typed.map_err(|e| anyhow!("{}: type: {e}", self.what))
    }

    /// Gives the terminal another size.
    ///
    /// # Errors
    /// The command has ended.
    pub fn resize(&mut self, rows: u16, cols: u16) -> Result<()> {
        let sent = self.sizes.send(Typed::Size(rows, cols));
        sent.with_context(|| format!("{}: it has ended", self.what))
    }

    /// Leaves the program that is shown to itself.
    ///
    /// # Errors
    /// It is not left.
    pub fn detach(mut self) -> Result<()> {
        self.types(LEAVE)?;
        self.sees("[detached")?;
        self.ends().map(drop)
    }

    /// Waits for the command's end.
    ///
    /// # Errors
    /// It does not end, or the host is gone.
    pub fn ends(mut self) -> Result<Status> {
        let ended = self.screen.exp_eof();
        ended.map_err(|e| anyhow!("{}: does not end: {e}", self.what))?;
        match self.command.join() {
            Ok(status) => status.with_context(|| self.what.clone()),
            Err(_) => Err(anyhow!("{}: the conversation panicked", self.what)),
        }
    }
}
