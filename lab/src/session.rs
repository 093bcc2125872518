//! One conversation with a host's agent.

use crate::wire::{self, Reply, Request, Status, Tag, LARGEST};
use anyhow::{bail, Context, Result};
use nix::fcntl::Flock;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What is done at a terminal.
#[derive(Debug)]
pub enum Typed {
    Keys(Vec<u8>),
    /// It has so many rows and columns now.
    Size(u16, u16),
}

/// A connection to an agent; requests go through it one at a time.
#[derive(Debug)]
pub struct Session {
    stream: UnixStream,
    // Keeps a serial port ours for as long as the session lasts.
    _port: Option<Flock<File>>,
}

impl Session {
    /// Greets the agent behind a socket, and waits for its answer until the
    /// deadline.
    ///
    /// # Errors
    /// No socket there, or no answer in time.
    pub fn open(socket: &Path, port: Option<Flock<File>>, deadline: Instant) -> Result<Self> {
        loop {
            let tried = Self::try_open(socket);
            match tried {
                Ok(stream) => {
                    return Ok(Self {
                        stream,
                        _port: port,
                    })
                }
                Err(e) if Instant::now() >= deadline => {
                    return Err(e).with_context(|| format!("reach {}", socket.display()))
                }
                // The pause lets a serial port's other end see that we left.
                Err(_) => thread::sleep(Duration::from_millis(30)),
            }
        }
    }

    fn try_open(socket: &Path) -> Result<UnixStream> {
        let mut stream = UnixStream::connect(socket)?;
        let nonce = nonce();
        let mut preamble = wire::MAGIC.to_vec();
        preamble.extend_from_slice(&nonce);
        stream.write_all(&preamble)?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        while wire::find_preamble(&mut stream)?.context("the agent hung up")? != nonce {}
        stream.set_read_timeout(None)?;
        Ok(stream)
    }

    /// Asks, and hands on the output that comes before the reply.
    ///
    /// # Errors
    /// The agent's own, a broken connection, or those of the two writers.
    pub fn ask(
        &mut self,
        request: &Request,
        out: &mut dyn Write,
        err: &mut dyn Write,
    ) -> Result<Reply> {
        wire::write_json(&mut self.stream, Tag::Request, request).context("ask the agent")?;
        self.answer(out, err)
    }

    fn answer(&mut self, out: &mut dyn Write, err: &mut dyn Write) -> Result<Reply> {
        loop {
            let frame = wire::read_frame(&mut self.stream).context("hear the agent")?;
            let (tag, payload) = frame.context("the agent hung up")?;
            match tag {
                Tag::Output => {
                    out.write_all(&payload)?;
                    out.flush()?;
                }
                Tag::Error => {
                    err.write_all(&payload)?;
                    err.flush()?;
                }
                Tag::Reply => match serde_json::from_slice(&payload)? {
                    Reply::Failed { error } => bail!("{error}"),
                    reply => return Ok(reply),
                },
                Tag::Request | Tag::Input | Tag::Size => bail!("the agent speaks out of turn"),
            }
        }
    }

    /// Asks what has no output.
    ///
    /// # Errors
    /// As [`Session::ask`].
    pub fn tell(&mut self, request: &Request) -> Result<Reply> {
        self.ask(request, &mut std::io::sink(), &mut std::io::sink())
    }

    /// Runs a command, its input being what `input` gives.
    ///
    /// # Errors
    /// As [`Session::ask`].
    pub fn exec(
        &mut self,
        cmd: &wire::Cmd,
        input: Option<Box<dyn Read + Send>>,
        out: &mut dyn Write,
        err: &mut dyn Write,
    ) -> Result<Status> {
        let request = Request::Exec {
            cmd: cmd.clone(),
            input: input.is_some(),
            terminal: None,
        };
        wire::write_json(&mut self.stream, Tag::Request, &request).context("ask the agent")?;
        if let Some(input) = input {
            let mut stream = self.stream.try_clone()?;
            // Not joined: it may wait for input for ever.
            thread::spawn(move || feed(&mut stream, input));
        }
        match self.answer(out, err)? {
            Reply::Ended(Some(status)) => Ok(status),
            other => bail!("a reply of another kind: {other:?}"),
        }
    }

    /// Runs a command on a terminal of that size, on which is typed what comes
    /// from `typed`.
    ///
    /// # Errors
    /// As [`Session::ask`].
    pub fn exec_on_terminal(
        &mut self,
        cmd: &wire::Cmd,
        size: (u16, u16),
        typed: Receiver<Typed>,
        out: &mut dyn Write,
    ) -> Result<Status> {
        let request = Request::Exec {
            cmd: cmd.clone(),
            input: true,
            terminal: Some(size),
        };
        wire::write_json(&mut self.stream, Tag::Request, &request).context("ask the agent")?;
        let mut stream = self.stream.try_clone()?;
        // Not joined: nobody may ever type again.
        thread::spawn(move || {
            for typed in typed {
                let sent = match typed {
                    Typed::Keys(keys) => wire::write_frame(&mut stream, Tag::Input, &keys),
                    Typed::Size(rows, cols) => {
                        wire::write_json(&mut stream, Tag::Size, &(rows, cols))
                    }
                };
                if sent.is_err() {
                    return;
                }
            }
        });
        match self.answer(out, &mut std::io::sink())? {
            Reply::Ended(Some(status)) => Ok(status),
            other => bail!("a reply of another kind: {other:?}"),
        }
    }

    /// Writes a file in the host.
    ///
    /// # Errors
    /// As [`Session::ask`], and those of `from`.
    pub fn push(&mut self, path: &str, mode: u32, from: &mut dyn Read) -> Result<()> {
        let request = Request::Push {
            path: path.into(),
            mode,
        };
        wire::write_json(&mut self.stream, Tag::Request, &request)?;
        feed(&mut self.stream, from).context("read what is to be pushed")?;
        self.answer(&mut std::io::sink(), &mut std::io::sink())
            .with_context(|| format!("push {path}"))?;
        Ok(())
    }

    /// Waits until the agent hangs up.
    pub fn drain(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Write);
        let _ = std::io::copy(&mut self.stream, &mut std::io::sink());
    }
}

fn feed(stream: &mut UnixStream, mut from: impl Read) -> std::io::Result<()> {
    let mut buffer = vec![0; LARGEST];
    loop {
        match from.read(&mut buffer)? {
            0 => return wire::write_frame(stream, Tag::Input, &[]),
            n => wire::write_frame(stream, Tag::Input, &buffer[..n])?,
        }
    }
}

/// Eight bytes that no earlier conversation on the same port used.
fn nonce() -> [u8; wire::NONCE] {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    let thread = format!("{:?}", thread::current().id()).len() as u64;
    let mixed = (now as u64) ^ (u64::from(std::process::id()) << 40) ^ thread;
    mixed.to_le_bytes()
}
