//! A pipe that a program keeps for itself, never empty.

use super::Mix;
use nix::fcntl::OFlag;
use std::fs::File;
use std::io::{Read, Write};

/// Both ends of a pipe, and what its bytes must be.
#[derive(Debug)]
pub struct OwnPipe {
    reader: File,
    writer: File,
    written: Mix,
    read: Mix,
    inside: usize,
}

// The portions in which bytes go in and come out may differ, so each byte
// depends on those before it alone.
fn bytes(mix: &mut Mix, count: usize) -> Vec<u8> {
    (0..count).map(|_| mix.add(1) as u8).collect()
}

impl OwnPipe {
    /// A pipe with that many bytes in it; they must fit.
    ///
    /// # Errors
    /// Those of pipe(2) and write(2).
    pub fn new(inside: usize) -> Result<Self, String> {
        let (reader, writer) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| format!("pipe: {e}"))?;
        let mut pipe = Self {
            reader: reader.into(),
            writer: writer.into(),
            written: Mix(7),
            read: Mix(7),
            inside: 0,
        };
        pipe.put(inside)?;
        Ok(pipe)
    }

    fn put(&mut self, count: usize) -> Result<(), String> {
        let bytes = bytes(&mut self.written, count);
        self.inside += count;
        self.writer
            .write_all(&bytes)
            .map_err(|e| format!("write the pipe: {e}"))
    }

    fn take(&mut self, count: usize) -> Result<(), String> {
        let mut got = vec![0; count];
        self.reader
            .read_exact(&mut got)
            .map_err(|e| format!("read the pipe: {e}"))?;
        self.inside -= count;
        if got != bytes(&mut self.read, count) {
            return Err("the pipe gave other bytes than went in".into());
        }
        Ok(())
    }

    /// Puts bytes in at one end and takes as many out at the other.
    ///
    /// # Errors
    /// Other bytes came out than went in, or a failing system call.
    pub fn turn(&mut self, count: usize) -> Result<(), String> {
        self.put(count)?;
        self.take(count)
    }

    /// Takes out what is left.
    ///
    /// # Errors
    /// As [`OwnPipe::turn`].
    pub fn finish(&mut self) -> Result<(), String> {
        self.take(self.inside)
    }
}
