//! What scenarios do with two hosts: start a program, move it, look.

use crate::agent::WORK;
use crate::host::{Host, Make, Output};
use crate::pair::Lab;
use crate::victim::hurry;
use crate::wire::{Cmd, Status};
use anyhow::{bail, ensure, Context, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a migration or a program may take before something is wrong.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A program that runs on a host, its output going to a file there.
#[derive(Clone, Debug)]
pub struct Program {
    pub pid: u32,
    pub argv: Vec<String>,
    pub output: String,
}

/// How a `pmig migrate` went.
#[derive(Clone, Debug)]
pub struct Moved {
    pub status: Status,
    /// Its `--json` lines.
    pub events: Vec<Value>,
    pub output: Output,
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

impl Program {
    /// Starts a program.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(host: &dyn Host, line: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let output = format!("{WORK}/out.{count}");
        let line = &paced(host, line);
        let argv = words(line);
        let pid = host
            .spawn(&Cmd::new(argv.clone()), &output)
            .with_context(|| format!("start {line}"))?;
        Ok(Self { pid, argv, output })
    }

    /// What it has written on that host.
    ///
    /// # Errors
    /// There is no such file.
    pub fn written(&self, host: &dyn Host) -> Result<String> {
        let bytes = host.read(&self.output)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until it has written so many lines more on that host.
    ///
    /// # Errors
    /// It has ended, or does not get on.
    pub fn wait_lines(&self, host: &dyn Host, lines: usize) -> Result<()> {
        // Only what is new is read each time: machines are slow to hand it out.
        let mut bytes = host.read(&self.output)?;
        let count = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == b'\n').count();
        let start = count(&bytes);
        let what = format!("{lines} more lines of {}", self.argv.join(" "));
        host.wait_for(&what, LIMIT, &mut || {
            bytes.extend(host.read_from(&self.output, bytes.len() as u64)?);
            if count(&bytes) >= start + lines {
                return Ok(true);
            }
            let written = String::from_utf8_lossy(&bytes);
            let ended = ["PASS", "FAIL"].iter().any(|word| written.contains(word));
            ensure!(!ended, "it ended: {}", tail(&written));
            Ok(false)
        })
    }

    /// Waits for its end on that host and gives all that it wrote.
    ///
    /// # Errors
    /// It does not end, or ends in another way than it should.
    pub fn finish(&self, host: &dyn Host) -> Result<String> {
        host.write(&hurry(self.pid), 0o644, b"")?;
        let what = format!("the end of {}", self.argv.join(" "));
        let waited = host.wait_for(&what, LIMIT, &mut || {
            let process = host.process(self.pid)?;
            Ok(process.is_none_or(|process| process.state == 'Z'))
        });
        let written = self.written(host)?;
        waited.with_context(|| format!("it wrote: {}", tail(&written)))?;
        let last = written.lines().last().unwrap_or_default();
        ensure!(last.starts_with("PASS"), "it wrote: {}", tail(&written));
        Ok(written)
    }
}

/// What a program writes when nobody moves it, with other arguments that make
/// it quick: `name=value`, or `2=value` for the argument at that place.
///
/// # Errors
/// It does not end well.
pub fn unmoved(host: &dyn Host, line: &str, quick: &[&str]) -> Result<String> {
    static KNOWN: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
    let key = format!("{} {line} {quick:?}", host.make());
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(output) = known().get(&key) {
        return Ok(output.clone());
    }
    // In a directory of its own: files that it makes must not be in the way of
    // those that come with the program.
    let directory = format!("{WORK}/unmoved");
    host.sh(&format!("mkdir -p {directory}"))?;
    let mut argv = words(line);
    for word in quick {
        let name = word.split('=').next().unwrap_or_default();
        match name.parse::<usize>() {
            Ok(place) => argv[place] = word[name.len() + 1..].to_owned(),
            Err(_) => argv.push((*word).to_owned()),
        }
    }
    let output = host.exec(&Cmd::new(argv).cwd(&directory))?.ok()?.out();
    host.sh(&format!("rm -rf {directory}"))?;
    known().insert(key, output.clone());
    Ok(output)
}

/// The line with a pace that leaves time to move the program: machines of
/// QEMU's are slow.
fn paced(host: &dyn Host, line: &str) -> String {
    match host.make() {
        Make::Netns => line.to_owned(),
        // Its stack is all dirty again before the link has carried it once.
        // Or all its memory has to be copied before it ends.
        Make::Vm if line == "recursive lines=150" || line.contains("late=") => {
            format!("{line} pace_us=250000")
        }
        // Nobody waits for the last of them.
        Make::Vm if line.contains("ticks=3000") => line.replace("ticks=3000", "ticks=60000"),
        // A move takes as long as several of its waits.
        Make::Vm if line.contains("ms=700") => line.replace("ms=700", "ms=1500"),
        Make::Vm if line.contains("lines=") => format!("{line} pace_us=150000"),
        Make::Vm => line.replace("0.01", "0.15").replace("10000", "150000"),
    }
}

/// The last lines of a text.
pub fn tail(text: &str) -> String {
    let lines = text.lines().collect::<Vec<_>>();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

/// Runs `pmig migrate` on a host, with more words behind its own and more
/// variables in its environment.
///
/// # Errors
/// The host is gone; a failed migration is no error here, see [`Moved::ok`].
pub fn migrate(
    from: &dyn Host,
    to: &dyn Host,
    program: &Program,
    more: &str,
    env: &[(&str, &str)],
) -> Result<Moved> {
    migrate_to(from, &to.address(), program, more, env)
}

/// What lies between two hosts when a program is brought from one to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// A connection: `pmig migrate`.
    Wire,
    /// A file: `pmig dump`, and `pmig restore` of a copy.
    File,
}

/// How programs are brought from one host to the other.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// How a process control block is read.
    pub pcb: &'static str,
    /// How it is told which pages are written.
    pub tracking: &'static str,
    pub through: Through,
}

impl Way {
    /// With what tells the written pages chosen by itself.
    pub fn new(pcb: &'static str, through: Through) -> Self {
        Self {
            pcb,
            tracking: "auto",
            through,
        }
    }

    /// Brings a program there.
    ///
    /// # Errors
    /// A host is gone, or the file cannot be restored; where it does not leave
    /// is no error here, see [`Moved::ok`].
    pub fn bring(self, from: &dyn Host, to: &dyn Host, program: &Program) -> Result<Moved> {
        let pcb = format!("--pcb {} --dirty-tracking {}", self.pcb, self.tracking);
        if self.through == Through::Wire {
            return migrate(from, to, program, &format!("--files ship {pcb}"), &[]);
        }
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let file = format!("{WORK}/{count}.pmig");
        let moved = dump(from, program, &file, &pcb, &[])?;
        if moved.status.success() {
            to.write(&file, 0o600, &from.read(&file)?)?;
            from.sh(&format!("rm {file}"))?;
            to.sh(&format!(
                "pmig restore {file} --pcb {} && rm {file}",
                self.pcb
            ))
            .with_context(|| format!("pmig restore on {}", to.name()))?;
        }
        Ok(moved)
    }
}

/// Runs `pmig dump` on a host.
///
/// # Errors
/// The host is gone; a failed dump is no error here, see [`Moved::ok`].
pub fn dump(
    host: &dyn Host,
    program: &Program,
    file: &str,
    more: &str,
    env: &[(&str, &str)],
) -> Result<Moved> {
    moving(
        host,
        &format!("dump {} -o {file} --json {more}", program.pid),
        env,
    )
}

/// The same, to an address.
///
/// # Errors
/// As [`migrate`].
pub fn migrate_to(
    from: &dyn Host,
    address: &str,
    program: &Program,
    more: &str,
    env: &[(&str, &str)],
) -> Result<Moved> {
    let words = format!("migrate {} {address} --insecure --json {more}", program.pid);
    moving(from, &words, env)
}

fn moving(from: &dyn Host, what: &str, env: &[(&str, &str)]) -> Result<Moved> {
    let line = format!("timeout -k 1 {} pmig {what}", LIMIT.as_secs());
    let mut cmd = Cmd::new(words(&line));
    for (name, value) in env {
        cmd = cmd.env(name, value);
    }
    let output = from.exec(&cmd)?;
    let events = output.out();
    let events = events
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    Ok(Moved {
        status: output.status,
        events,
        output,
    })
}

impl Moved {
    /// The summary, if the program moved.
    ///
    /// # Errors
    /// What pmig said, if it did not.
    pub fn ok(&self) -> Result<&Value> {
        ensure!(
            self.status.success(),
            "pmig migrate: {:?}: {}\n{}",
            self.status,
            self.said(),
            self.output.err()
        );
        self.event("done").context("no summary was printed")
    }

    /// The last event of that name.
    pub fn event(&self, name: &str) -> Option<&Value> {
        let mut all = self.events.iter().rev();
        all.find(|event| event["event"] == name)
    }

    /// The failure in its own words, and where it says the program is.
    pub fn said(&self) -> String {
        match self.event("failed") {
            Some(event) => event.to_string(),
            None => tail(&self.output.out()),
        }
    }

    /// Checks that pmig ended with that exit code and a message that has these
    /// words.
    ///
    /// # Errors
    /// It did not.
    pub fn failed(&self, code: i32, words: &[&str]) -> Result<()> {
        let said = format!("{}\n{}", self.said(), self.output.err());
        ensure!(
            self.status == Status::Code(code),
            "exit {:?} instead of {code}: {said}",
            self.status
        );
        for word in words {
            ensure!(
                said.to_lowercase().contains(&word.to_lowercase()),
                "no word of {word:?} in: {said}"
            );
        }
        Ok(())
    }
}

/// Starts a program on a, moves it to b while it runs, and compares its whole
/// output there with what it writes unmoved.
///
/// # Errors
/// Anything that is not as it should be.
pub fn moves(lab: &Lab, line: &str, way: Way, quick: &[&str]) -> Result<Moved> {
    let (a, b) = (lab.a(), lab.b());
    let expected = unmoved(b, line, quick)?;
    let program = Program::start(a, line)?;
    program.wait_lines(a, 10)?;
    let mut moved = way.bring(a, b, &program)?;
    for _ in 0..20 {
        // Some of them look at themselves now and then.
        let looking = "is a file the kernel makes";
        if moved.status.success() || !moved.said().contains(looking) {
            break;
        }
        moved = way.bring(a, b, &program)?;
    }
    moved.ok().with_context(|| line.to_owned())?;
    gone(a, program.pid)?;
    let written = program.finish(b)?;
    same(&written, &expected)?;
    let before = program.written(a)?;
    ensure!(
        expected.starts_with(&before) && before.len() < expected.len(),
        "the source's file is no beginning of the whole"
    );
    Ok(moved)
}

/// Checks that a host has a process no more; what is dead may wait for a moment
/// to be reaped.
///
/// # Errors
/// It is alive there.
pub fn gone(host: &dyn Host, pid: u32) -> Result<()> {
    let here = || {
        let process = host.process(pid)?;
        if let Some(alive) = process.as_ref().filter(|p| p.state != 'Z') {
            bail!("{} still has {alive:?}", host.name());
        }
        Ok(process.is_none())
    };
    wait("the end of a dead process", Duration::from_secs(5), here)
}

/// Compares two outputs.
///
/// # Errors
/// The first line that differs.
pub fn same(written: &str, expected: &str) -> Result<()> {
    if written == expected {
        return Ok(());
    }
    let mut pairs = written.lines().zip(expected.lines()).enumerate();
    match pairs.find(|(_, (one, other))| one != other) {
        Some((number, (one, other))) => {
            bail!("line {number} is {one:?} instead of {other:?}")
        }
        None => bail!(
            "{} lines instead of {}",
            written.lines().count(),
            expected.lines().count()
        ),
    }
}

/// Checks that a program runs on on that host, to a good end.
///
/// # Errors
/// It does not.
pub fn runs_on(host: &dyn Host, program: &Program, expected: &str) -> Result<()> {
    let written = program
        .finish(host)
        .with_context(|| format!("on {}", host.name()))?;
    same(&written, expected)
}

/// Waits for a condition that hosts know nothing of.
///
/// # Errors
/// It did not come about in time.
pub fn wait(what: &str, limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !done()? {
        ensure!(Instant::now() < deadline, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(30));
    }
    Ok(())
}
