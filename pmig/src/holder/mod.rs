//! Holders: a small process beside a program, its parent, that holds the other
//! end of its terminals and knows how it ends.
//!
//! A program that came here, or was started by `pmig run`, has one. It depends
//! on no other pmig process: `pmig serve` may end at any time. Whoever wants to
//! see or to type connects to its socket, `/run/pmig/programs/PID-*.sock`, and
//! says [`Ask`]; the holder says [`Said`].
//!
//! It ends with its program. If it is killed, the program's terminals hang up,
//! as when a terminal emulator is killed; one without terminals lives on.

mod line;
mod run;
mod screen;
mod setup;

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use line::Line;
pub use run::run;
pub use setup::{start, Adopting};

use crate::error::{Context, Error, Result};
use crate::image::Picture;
use crate::journal::{self, run_dir};
use crate::sys::tty::Size;

/// The longest piece of input that is sent at once, in bytes.
pub const MAX_KEYS: usize = 4096;

/// How long a holder may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long it may take to tell what its terminals show: whoever waits for that
/// waits for signals that were sent to the program too.
const PICTURE: Duration = Duration::from_secs(1);

/// How long a holder may take to let people in when its program runs.
const SOON: Duration = Duration::from_secs(1);

/// What a holder is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Ask {
    /// Shows a terminal from now on: first what it shows already.
    Show {
        terminal: u32,
        /// It is to be as large as this; none leaves it as it is.
        size: Option<Size>,
    },
    /// What is typed into the terminal that is shown.
    Keys(#[serde(with = "serde_bytes")] Vec<u8>),
    Resize(Size),
    /// Nothing but to be told of the program's end.
    Wait,
    /// Keeps what is typed, until this connection ends; answered by
    /// [`Said::Held`] when no more of it goes to the program.
    Hold,
    /// Asks for [`Said::Pictures`], when all that was written is in them.
    Pictures,
}

/// What a holder says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Said {
    /// The first word.
    Hello {
        pid: i32,
        start: u64,
        /// Numbers of terminals; the first is the controlling one, if any is.
        terminals: u32,
    },
    /// What the program writes.
    Shown(#[serde(with = "serde_bytes")] Vec<u8>),
    Pictures(Vec<Picture>),
    Held,
    /// The last word: it has ended.
    Ended(Ended),
    /// The last word: it left.
    Left {
        there: String,
    },
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    Code(i32),
    Signal(i32),
}

impl Ended {
    fn of(status: i32) -> Ended {
        match status & 0x7f {
            0 => Ended::Code(status >> 8 & 0xff),
            signal => Ended::Signal(signal),
        }
    }

    /// As a shell says it: 128 and the signal for what a signal ended.
    pub fn code(self) -> u8 {
        match self {
            Ended::Code(code) => code as u8,
            Ended::Signal(signal) => 128u8.wrapping_add(signal as u8),
        }
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ended::Code(0) => f.write_str("ended"),
            Ended::Code(code) => write!(f, "ended with exit code {code}"),
            Ended::Signal(signal) => write!(f, "was ended by signal {signal}"),
        }
    }
}

fn folder() -> PathBuf {
    run_dir().join("programs")
}

fn make_folder() -> Result<PathBuf> {
    let path = folder();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .context("make", path.display())?;
    Ok(path)
}

/// A holder that was found.
#[derive(Debug)]
pub struct Holder {
    pub line: Line,
    pub terminals: u32,
}

/// Finds the holder of a program.
///
/// # Errors
/// Those of the folder; none where the program has no holder.
pub fn find(pid: i32) -> Result<Option<Holder>> {
    match journal::start_of(pid) {
        Err(Error::Gone(_)) => Ok(None),
        start => find_by(pid, Some(start?)),
    }
}

/// The same of a program that was just started, and may have ended.
///
/// # Errors
/// As [`find`].
pub fn find_started(pid: i32) -> Result<Option<Holder>> {
    find_by(pid, None)
}

fn find_by(pid: i32, start: Option<u64>) -> Result<Option<Holder>> {
    let path = folder();
    let entries = match fs::read_dir(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries.context("list", path.display())?,
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let whose = name.to_str().and_then(|n| n.split_once('-'));
        if whose.and_then(|(n, _)| n.parse().ok()) != Some(pid) {
            continue;
        }
        let stream = match UnixStream::connect(entry.path()) {
            Ok(stream) => stream,
            // Its holder was killed.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                let _ = fs::remove_file(entry.path());
                continue;
            }
            Err(_) => continue,
        };
        let mut line = Line::new(stream);
        line.set_patience(Some(PATIENCE))?;
        match line.hear() {
            Ok(Said::Hello {
                pid: p,
                start: s,
                terminals,
            }) if p == pid && start.is_none_or(|start| start == s) => {
                return Ok(Some(Holder { line, terminals }))
            }
            _ => {}
        }
    }
    Ok(None)
}

/// The same, of a program that may have come just now, whose holder is about to
/// let people in.
///
/// # Errors
/// As [`find`].
pub fn find_soon(pid: i32) -> Result<Option<Holder>> {
    let begun = Instant::now();
    loop {
        let found = find(pid)?;
        let there = journal::start_of(pid).is_ok();
        if found.is_some() || !there || begun.elapsed() > SOON {
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Holder {
    /// From now on what is typed is kept, until this value is gone.
    ///
    /// # Errors
    /// The holder is gone.
    pub fn hold(&mut self) -> Result<()> {
        self.line.say(&Ask::Hold)?;
        match self.line.hear()? {
            Said::Held => Ok(()),
            other => Err(out_of_turn(&other)),
        }
    }

    /// What the terminals show, and what was typed and kept.
    ///
    /// # Errors
    /// The holder is gone, or does not answer.
    pub fn pictures(&mut self) -> Result<Vec<Picture>> {
        self.line.set_patience(Some(PICTURE))?;
        self.line.say(&Ask::Pictures)?;
        match self.line.hear()? {
            Said::Pictures(all) => Ok(all),
            other => Err(out_of_turn(&other)),
        }
    }
}

fn out_of_turn(said: &Said) -> Error {
    let text: String = format!("{said:?}").chars().take(40).collect();
    Error::bad("holder", format!("answers out of turn: {text}"))
}
