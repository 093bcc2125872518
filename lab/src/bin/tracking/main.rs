//! Tries and measures what tells the written pages of a program: `mirror HOW
//! SECONDS SEED [FILE]` follows a restless one and keeps a copy of its memory,
//! `discarded HOW` has one discard a large piece of it, `foreign HOW` writes into one
//! from outside, `cost HOW MB` measures, `have HOW`
//! says whether it is there.

mod cost;
mod mirror;

use lab::victim::restless::Arena;
use pmig::state::memory::{Tracker, Tracking};
use pmig::tracee::Stopped;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

type Outcome<T = ()> = Result<T, String>;

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// This program again, in another part, which answers each line with one.
pub struct Subject {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Subject {
    pub fn start(words: &[&str]) -> Outcome<Self> {
        let mut child = Command::new("/proc/self/exe")
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(text)?;
        let out = child.stdout.take().ok_or("no output")?;
        let mut subject = Self {
            child,
            out: BufReader::new(out),
        };
        subject.hear()?;
        Ok(subject)
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn hear(&mut self) -> Outcome<u64> {
        let mut line = String::new();
        self.out.read_line(&mut line).map_err(text)?;
        line.trim()
            .parse()
            .map_err(|e| format!("the subject says {line:?}: {e}"))
    }

    pub fn ask(&mut self, what: &str) -> Outcome<u64> {
        let stdin = self.child.stdin.as_mut().ok_or("no input")?;
        writeln!(stdin, "{what}").map_err(text)?;
        self.hear()
    }

    /// Begins to follow it; also how long it was stopped for that.
    pub fn follow(&self, how: Tracking) -> Outcome<(Tracker, Duration)> {
        let ground = pmig::tracee::Ground::survey(self.pid()).map_err(text)?;
        let begun = Instant::now();
        let mut stopped = Stopped::seize(self.pid())
            .map_err(text)?
            .on(ground)
            .map_err(text)?;
        let tracker = Tracker::attach(&mut stopped, &[how]).map_err(text)?;
        stopped.detach().map_err(text)?;
        Ok((tracker, begun.elapsed()))
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn restless(seed: u64, file: Option<&str>) -> Outcome {
    let mut arena = Arena::new(seed, file)?;
    println!("0");
    loop {
        arena.step()?;
    }
}

fn how(name: &str) -> Outcome<Tracking> {
    let found = Tracking::ALL.into_iter().find(|t| t.name() == name);
    found.ok_or_else(|| format!("{name}: no such means"))
}

fn run(words: &[&str]) -> Outcome {
    match *words {
        ["restless", seed] => restless(seed.parse().map_err(text)?, None),
        ["restless", seed, file] => restless(seed.parse().map_err(text)?, Some(file)),
        ["resident", mb, pages] => cost::resident(mb.parse().map_err(text)?, pages == "huge"),
        ["have", name] => how(name)?
            .probe()
            .map_err(|o| format!("{}: {}", o.object, o.why)),
        ["mirror", name, seconds, seed, ref file @ ..] => mirror::run(
            how(name)?,
            Duration::from_secs(seconds.parse().map_err(text)?),
            seed,
            file.first().copied(),
        ),
        ["discarded", name] => mirror::discarded(how(name)?),
        ["foreign", name] => mirror::foreign(how(name)?),
        ["cost", name, mb] => cost::run(how(name)?, mb.parse().map_err(text)?),
        _ => Err(
            "usage: tracking mirror HOW SECONDS SEED [FILE] | discarded HOW | foreign HOW | \
             cost HOW MB | have HOW"
                .into(),
        ),
    }
}

fn main() -> ExitCode {
    // As pmig does, or each wait for a stop lasts longer.
    pmig::sys::ptrace::listen();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("tracking: {e}");
            ExitCode::FAILURE
        }
    }
}
