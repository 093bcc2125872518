//! A connection to a holder: messages, each behind its length.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::protocol::{decode, encode};

/// The longest message a holder says, in bytes: pictures of all terminals.
const LONGEST: usize = 12 << 20;

/// One end of it.
#[derive(Debug)]
pub struct Line {
    stream: UnixStream,
    came: Vec<u8>,
    /// To be sent as the other side takes it.
    going: Vec<u8>,
    /// The longest message that is taken.
    longest: usize,
}

impl Line {
    pub fn new(stream: UnixStream) -> Line {
        Line {
            stream,
            came: Vec::new(),
            going: Vec::new(),
            longest: LONGEST,
        }
    }

    /// One that never waits, and takes no message longer than `longest`.
    pub(super) fn patient(stream: UnixStream, longest: usize) -> Result<Line> {
        stream
            .set_nonblocking(true)
            .context("set up", "a connection")?;
        Ok(Line {
            longest,
            ..Line::new(stream)
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// How long [`Line::hear`] waits; none for ever.
    pub fn set_patience(&self, patience: Option<Duration>) -> Result<()> {
        self.stream
            .set_read_timeout(patience)
            .context("set up", "the connection to a holder")
    }

    /// Says something, waiting until it is taken.
    pub fn say(&mut self, message: &impl Serialize) -> Result<()> {
        let framed = frame(message)?;
        self.stream
            .write_all(&framed)
            .context("write to", "the program's holder")
    }

    /// Waits for a message.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        loop {
            if let Some(message) = self.heard()? {
                return Ok(message);
            }
            if self.read().context("hear", "the program's holder")? == 0 {
                return Err(Error::bad("the program's holder", "is gone"));
            }
        }
    }

    /// The next message that is here already.
    pub fn heard<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let Some(head) = self.came.first_chunk::<4>() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes(*head) as usize;
        if len > self.longest {
            return Err(Error::bad("message", format!("{len} bytes are too many")));
        }
        let Some(body) = self.came.get(4..4 + len) else {
            return Ok(None);
        };
        let message = decode(body)?;
        self.came.drain(..4 + len);
        Ok(Some(message))
    }

    /// Reads once. 0: the other side is gone.
    pub fn read(&mut self) -> io::Result<usize> {
        let mut part = [0; 16 << 10];
        loop {
            match self.stream.read(&mut part) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(n) => {
                    self.came.extend_from_slice(&part[..n]);
                    return Ok(n);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Puts a message among those to be sent.
    pub(super) fn queue(&mut self, message: &impl Serialize) -> Result<()> {
        self.going.extend(frame(message)?);
        Ok(())
    }

    /// Bytes not taken yet.
    pub(super) fn pending(&self) -> usize {
        self.going.len()
    }

    /// Sends what is taken without waiting.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.going.is_empty() {
            match self.stream.write(&self.going) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => drop(self.going.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn frame(message: &impl Serialize) -> Result<Vec<u8>> {
    let body = encode(message)?;
    let mut framed = (body.len() as u32).to_le_bytes().to_vec();
    framed.extend(body);
    Ok(framed)
}
