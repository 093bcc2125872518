//! What the lab and the agent in a host say to each other.
//!
//! A connection starts with a preamble that both sides repeat, so that a
//! serial port still holding the rest of an earlier, broken conversation falls
//! into step again. After it come frames: a tag, a length, and as many bytes.

use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// The first bytes of every conversation; a nonce of [`NONCE`] bytes follows.
pub const MAGIC: [u8; 8] = *b"\x01pmiglab";
/// Length of the nonce that follows [`MAGIC`], in bytes.
pub const NONCE: usize = 8;
/// The largest payload of one frame, in bytes.
pub const LARGEST: usize = 256 * 1024;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// A [`Request`] in JSON, from the lab.
    Request,
    /// Bytes for the command's standard input or the pushed file; none: its end.
    Input,
    /// Bytes of standard output, or of the pulled file.
    Output,
    /// Bytes of standard error.
    Error,
    /// A [`Reply`] in JSON: the end of the request.
    Reply,
    /// The terminal's new size: two numbers in JSON, rows and columns.
    Size,
}

impl Tag {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Request,
            2 => Self::Input,
            3 => Self::Output,
            4 => Self::Error,
            5 => Self::Reply,
            6 => Self::Size,
            _ => return None,
        })
    }

    fn byte(self) -> u8 {
        match self {
            Self::Request => 1,
            Self::Input => 2,
            Self::Output => 3,
            Self::Error => 4,
            Self::Reply => 5,
            Self::Size => 6,
        }
    }
}

/// A command to run in a host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Cmd {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables added to the host's small, fixed environment.
    pub env: Vec<(String, String)>,
    /// Where it runs; `/srv/work` unless told.
    pub cwd: Option<String>,
}

impl Cmd {
    /// A command of these words.
    pub fn new<I, S>(argv: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }

    /// A line for `sh -c`.
    pub fn shell(line: &str) -> Self {
        Self::new(["sh", "-c", line])
    }

    /// The same with one more variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// The same, run in that directory.
    #[must_use]
    pub fn cwd(mut self, path: &str) -> Self {
        self.cwd = Some(path.into());
        self
    }
}

impl From<&str> for Cmd {
    fn from(line: &str) -> Self {
        Self::shell(line)
    }
}

/// What a host can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Is anybody there?
    Ping,
    /// End the host when this connection ends.
    Hold,
    /// Take back [`Request::Hold`].
    Free,
    /// Run a command and wait for it, on a terminal of so many rows and columns
    /// or with pipes.
    Exec {
        cmd: Cmd,
        input: bool,
        terminal: Option<(u16, u16)>,
    },
    /// Start a command in a session of its own, its output going to a file.
    Spawn { cmd: Cmd, output: String },
    /// How a spawned command ended, if it has.
    Ended { pid: u32 },
    /// Write a file from what follows.
    Push { path: String, mode: u32 },
    /// Send a file, from this offset on.
    Pull { path: String, offset: u64 },
    /// Send a signal to a process.
    Signal { pid: i32, signal: i32 },
    /// List the processes.
    Ps,
    /// List that process alone, if it is there.
    Process { pid: u32 },
    /// Read the clocks.
    Clocks,
    /// End the host, at once and without syncing.
    Halt,
}

/// One process of a host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    pub ppid: u32,
    /// The state letter of proc_pid_stat(5).
    pub state: char,
    /// Those that have not ended, and the first one even then.
    pub threads: u32,
    pub comm: String,
    pub cmdline: Vec<String>,
}

impl Process {
    /// Whether it holds nothing any more: the first thread's state says it of that
    /// thread only.
    pub fn is_dead(&self) -> bool {
        self.state == 'Z' && self.threads <= 1
    }
}

/// A host's clocks in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Clocks {
    pub realtime: i128,
    pub monotonic: i128,
    pub boottime: i128,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// It exited with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
}

impl Status {
    /// True for exit code 0.
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }

    /// The status as a shell gives it: 128 is added to a signal's number.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// The end of a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    Done,
    Ended(Option<Status>),
    Spawned { pid: u32 },
    Processes(Vec<Process>),
    Clocks(Clocks),
    Failed { error: String },
}

/// Writes one frame.
///
/// # Errors
/// Those of the stream; `InvalidInput` if the payload exceeds [`LARGEST`].
pub fn write_frame(stream: &mut dyn Write, tag: Tag, payload: &[u8]) -> io::Result<()> {
    if payload.len() > LARGEST {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "frame too large",
        ));
    }
    let length = payload.len() as u32;
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(tag.byte());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    stream.write_all(&frame)?;
    stream.flush()
}

/// Writes a value in JSON as one frame.
///
/// # Errors
/// As [`write_frame`].
pub fn write_json<T: Serialize>(stream: &mut dyn Write, tag: Tag, value: &T) -> io::Result<()> {
    write_frame(stream, tag, &serde_json::to_vec(value)?)
}

/// Reads one frame; `None` if the stream ended before it.
///
/// # Errors
/// Those of the stream; `InvalidData` for an unknown tag or too long a frame.
pub fn read_frame(stream: &mut dyn Read) -> io::Result<Option<(Tag, Vec<u8>)>> {
    let mut head = [0; 5];
    loop {
        match stream.read(&mut head[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(e) => return Err(e),
        }
    }
    stream.read_exact(&mut head[1..])?;
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let bad = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let tag = Tag::from_byte(head[0]).ok_or_else(|| bad("unknown frame tag"))?;
    if length > LARGEST {
        return Err(bad("frame too large"));
    }
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok(Some((tag, payload)))
}

/// Reads and drops bytes until [`MAGIC`] has gone by, then gives the nonce
/// behind it; `None` if the stream ended first.
///
/// # Errors
/// Those of the stream.
pub fn find_preamble(stream: &mut dyn Read) -> io::Result<Option<[u8; NONCE]>> {
    let mut window = [0; MAGIC.len()];
    while window != MAGIC {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(e) => return Err(e),
        }
        window.rotate_left(1);
        window[MAGIC.len() - 1] = byte[0];
    }
    let mut nonce = [0; NONCE];
    stream.read_exact(&mut nonce)?;
    Ok(Some(nonce))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_out_as_it_went_in() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, Tag::Output, b"words").unwrap();
        let (tag, payload) = read_frame(&mut bytes.as_slice()).unwrap().unwrap();
        assert_eq!((tag, payload.as_slice()), (Tag::Output, &b"words"[..]));
    }

    #[test]
    fn a_frame_too_large_or_unknown_is_refused() {
        let mut long = vec![3];
        long.extend_from_slice(&u32::MAX.to_le_bytes());
        assert!(read_frame(&mut long.as_slice()).is_err());
        assert!(read_frame(&mut &[9, 0, 0, 0, 0][..]).is_err());
        assert!(read_frame(&mut &[][..]).unwrap().is_none());
    }

    #[test]
    fn the_preamble_is_found_behind_rubbish() {
        let mut bytes = b"\x01pmig rubbish \x01\x01pmi".to_vec();
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(b"12345678rest");
        let mut stream = bytes.as_slice();
        assert_eq!(find_preamble(&mut stream).unwrap(), Some(*b"12345678"));
        assert_eq!(stream, b"rest");
    }
}
