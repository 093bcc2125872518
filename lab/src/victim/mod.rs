//! What the sample programs share.
//!
//! Each is deterministic given its arguments, ends by itself, and closes with
//! `PASS` and a checksum of everything it computed, or with `FAIL` and why.

pub mod area;
pub mod crowd;
pub mod pipe;
pub mod random;
pub mod raw;
pub mod restless;
pub mod vectors;

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

/// A running hash that depends on the order of what goes in.
#[derive(Clone, Copy, Debug)]
pub struct Mix(pub u64);

impl Mix {
    /// Takes in one value and gives the new state.
    pub fn add(&mut self, value: u64) -> u64 {
        let mut z = (self.0 ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.0 = z ^ (z >> 31);
        self.0
    }
}

/// A program's arguments, each `name=value`.
#[derive(Debug)]
pub struct Args(Vec<(String, String)>);

impl Args {
    /// This program's own.
    ///
    /// # Errors
    /// An argument without `=`, or of a name not among those known.
    pub fn new(known: &[&str]) -> Result<Self, String> {
        let mut all = Vec::new();
        for word in std::env::args().skip(1) {
            match word.split_once('=') {
                Some((name, value)) if known.contains(&name) => {
                    all.push((name.into(), value.into()));
                }
                _ => return Err(format!("{word}: expected one of {known:?} and =value")),
            }
        }
        Ok(Self(all))
    }

    /// The text of that name, if given.
    pub fn text(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().rev().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The number of that name, or what stands for it.
    ///
    /// # Errors
    /// It is no number.
    pub fn number(&self, name: &str, otherwise: u64) -> Result<u64, String> {
        self.text(name).map_or(Ok(otherwise), |text| {
            text.parse().map_err(|e| format!("{name}={text}: {e}"))
        })
    }
}

/// Runs a program's body and says how it ended.
pub fn run(body: impl FnOnce() -> Result<u64, String>) -> ExitCode {
    let (word, code) = match body() {
        Ok(checksum) => (format!("PASS checksum {checksum:016x}\n"), 0),
        Err(e) => (format!("FAIL {e}\n"), 1),
    };
    let mut out = io::stdout();
    let _ = out.write_all(word.as_bytes()).and_then(|()| out.flush());
    ExitCode::from(code)
}

/// The time that a program lets pass with every line, so that somebody can move
/// it meanwhile.
#[derive(Debug)]
pub struct Pace {
    pause: Duration,
    hurry: PathBuf,
}

impl Pace {
    /// As the argument `pace_us` says, in microseconds.
    ///
    /// # Errors
    /// It is no number.
    pub fn new(args: &Args, otherwise_us: u64) -> Result<Self, String> {
        Ok(Self {
            pause: Duration::from_micros(args.number("pace_us", otherwise_us)?),
            hurry: hurry(std::process::id()).into(),
        })
    }

    /// How long a line is to take: no time once somebody has made the file
    /// [`hurry`].
    pub fn pause(&self) -> Duration {
        if self.pause.is_zero() || self.is_hurried() {
            Duration::ZERO
        } else {
            self.pause
        }
    }

    /// Whether somebody has made that file.
    pub fn is_hurried(&self) -> bool {
        self.hurry.exists()
    }

    /// Sleeps for as long.
    ///
    /// # Errors
    /// The sleep is interrupted.
    pub fn pass(&self) -> Result<(), String> {
        match self.pause() {
            Duration::ZERO => Ok(()),
            pause => raw::nanosleep(pause).map(drop),
        }
        .map_err(|e| format!("nanosleep: {e}"))
    }
}

/// The file that lets the program of that PID go on without its pauses.
pub fn hurry(pid: u32) -> String {
    format!("{}/hurry.{pid}", crate::agent::WORK)
}

/// Computation whose state lives in the heap, in vector registers, in a pipe
/// and in a file's offset, and goes through all of them with every line.
pub struct Work {
    mix: Mix,
    heap: Vec<u64>,
    vectors: vectors::Vectors,
    pipe: pipe::OwnPipe,
    file: Option<File>,
    late: Option<String>,
    opened: Vec<File>,
    pace: Pace,
    spins: u64,
    lines: u64,
}

/// The arguments that [`Work`] takes.
pub const WORK_ARGS: [&str; 5] = ["seed", "pace_us", "heap_kb", "file", "late"];

impl Work {
    /// Work as the arguments say: `seed`, `pace_us` (microseconds a line),
    /// `heap_kb` (kilobytes), `file` (written beside standard output), `late`
    /// (what the names of more files begin with, one opened every five lines).
    ///
    /// # Errors
    /// An argument out of place, or a failing system call.
    pub fn new(args: &Args, pace_us: u64) -> Result<Self, String> {
        let mut mix = Mix(args.number("seed", 1)?);
        let heap = args.number("heap_kb", 1024)?.clamp(1, 1 << 22) * 1024 / 8;
        let heap = (0..heap).map(|index| mix.add(index)).collect();
        let pace = Pace::new(args, pace_us)?;
        let file = match args.text("file") {
            None => None,
            Some(path) => Some(File::create(path).map_err(|e| format!("create {path}: {e}"))?),
        };
        Ok(Self {
            vectors: vectors::Vectors::new(&mut mix),
            pipe: pipe::OwnPipe::new(20_000)?,
            mix,
            heap,
            file,
            late: args.text("late").map(str::to_owned),
            opened: Vec::new(),
            spins: vectors::spins_in(pace.pause / 2),
            pace,
            lines: 0,
        })
    }

    /// Takes a value in.
    pub fn add(&mut self, value: u64) -> u64 {
        self.mix.add(value)
    }

    /// Computes, writes one line, and lets the pace's time pass, half of it
    /// computing and half of it asleep.
    ///
    /// # Errors
    /// Bytes that came out of the pipe wrong, or a failing system call.
    pub fn line(&mut self, note: &str) -> Result<(), String> {
        for _ in 0..256 {
            let place = (self.mix.0 % self.heap.len() as u64) as usize;
            self.heap[place] = self.mix.add(self.heap[place]);
        }
        self.pipe.turn(512)?;
        self.lines += 1;
        let text = format!("{} {note} {:016x}\n", self.lines, self.mix.0);
        if let Some(file) = &mut self.file {
            file.write_all(text.as_bytes())
                .map_err(|e| format!("write the file: {e}"))?;
        }
        self.open_late(&text)?;
        let half = self.pace.pause() / 2;
        let spins = if half.is_zero() { 0 } else { self.spins };
        self.vectors.write_line(1, text.as_bytes(), spins)?;
        self.mix.add(self.vectors.sum());
        if !half.is_zero() {
            thread::sleep(half);
        }
        Ok(())
    }

    /// Opens one more file now and then, up to fifty, and writes to all.
    fn open_late(&mut self, text: &str) -> Result<(), String> {
        let Some(prefix) = &self.late else {
            return Ok(());
        };
        if self.lines % 5 == 0 && self.opened.len() < 50 {
            let path = format!("{prefix}.{}", self.lines);
            let file = File::create_new(&path).map_err(|e| format!("create {path}: {e}"))?;
            self.opened.push(file);
        }
        for file in &mut self.opened {
            file.write_all(text.as_bytes())
                .map_err(|e| format!("write a late file: {e}"))?;
        }
        Ok(())
    }

    /// The checksum over all state.
    ///
    /// # Errors
    /// Bytes that came out of the pipe wrong.
    pub fn finish(mut self) -> Result<u64, String> {
        self.pipe.finish()?;
        for value in std::mem::take(&mut self.heap) {
            self.mix.add(value);
        }
        Ok(self.mix.add(self.vectors.sum()))
    }
}
