//! What a newcomer runs first: a program moves from a to b while it runs.

use crate::agent::WORK;
use crate::build;
use crate::host::{Host, Make};
use crate::pair::{serve, Lab};
use crate::recording::Recording;
use crate::scenario::same;
use crate::state;
use crate::steps::Steps;
use crate::wire::{Cmd, Status};
use anyhow::{ensure, Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// The program: as many lines, one each 150 ms.
const LINES: &str = "lines=80";
const PACE: &str = "pace_us=150000";
/// How many lines it writes before it is moved.
const BEFORE: usize = 15;
/// How long it may take at most.
const LIMIT: Duration = Duration::from_secs(120);

/// A host's output, shown line by line as it comes.
struct Shown<'a> {
    host: &'a dyn Host,
    path: &'a str,
    text: String,
    lines: usize,
}

impl Shown<'_> {
    /// Shows the lines that are new; gives how many there are in all.
    fn follow(&mut self, screen: &mut Recording) -> Result<usize> {
        let new = self
            .host
            .read_from(self.path, self.text.len() as u64)
            .unwrap_or_default();
        self.text.push_str(&String::from_utf8_lossy(&new));
        let whole = self.text.rfind('\n').map_or(0, |at| at + 1);
        for line in self.text[..whole].lines().skip(self.lines) {
            screen.say(&format!("  {} | {line}", self.host.name()));
            self.lines += 1;
        }
        Ok(self.lines)
    }
}

/// Boots what is not up, shows the move, and ends what it booted; `record`: where
/// a picture of what was seen goes.
///
/// # Errors
/// Anything that goes wrong on the way.
pub fn run(make: Make, record: Option<&Path>) -> Result<()> {
    let steps = Steps::default();
    let _change = state::change()?;
    let start = Instant::now();
    let up = match state::current() {
        Ok(state) if state.make == make => Some(state),
        _ => None,
    };
    let booted = up.is_none();
    let lab = match up {
        Some(state) => state.lab()?,
        None => {
            eprintln!("two hosts, a and b:");
            let lab = state::up(make, &|what| steps.begin(what))?.lab()?;
            steps.begin("starting pmig serve on both");
            serve(lab.a(), &[])?;
            serve(lab.b(), &[])?;
            lab
        }
    };
    steps.end();
    let mut screen = Recording::new(match make {
        Make::Vm => "cargo lab demo",
        Make::Netns => "cargo lab demo --netns",
    });
    let result = show(&lab, &mut screen);
    if booted {
        state::down()?;
    }
    result?;
    if let Some(path) = record {
        fs::write(path, screen.svg()).with_context(|| format!("write {}", path.display()))?;
    }
    println!(
        "\n  all in {:.0} s. To try it yourself: cargo lab up",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn show(lab: &Lab, screen: &mut Recording) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let path = format!("{WORK}/demo");
    // An earlier demo's output would be taken for somebody else's file.
    b.sh(&format!("rm -f {path}"))?;
    let pid = a.spawn(&Cmd::new(["recursive", LINES, PACE]), &path)?;
    screen.say(&format!(
        "\n  a$ recursive {LINES} &        process {pid}: 120,000 frames down, and up again"
    ));
    let mut on_a = Shown {
        host: a,
        path: &path,
        text: String::new(),
        lines: 0,
    };
    let deadline = Instant::now() + LIMIT;
    while on_a.follow(screen)? < BEFORE {
        ensure!(Instant::now() < deadline, "the program does not get on");
        thread::sleep(Duration::from_millis(50));
    }
    let line = format!("pmig migrate {pid} tcp://b --insecure --files ship");
    screen.say(&format!("\n  a$ {line}\n"));
    let moved = thread::scope(|scope| -> Result<_> {
        let moving = scope.spawn(|| a.exec(&Cmd::shell(&format!("{line} 2>&1"))));
        while !moving.is_finished() {
            on_a.follow(screen)?;
            thread::sleep(Duration::from_millis(50));
        }
        moving.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    })?;
    on_a.follow(screen)?;
    screen.say("");
    for line in moved.out().lines() {
        screen.say(&format!("    {line}"));
    }
    screen.say("");
    ensure!(moved.status == Status::Code(0), "the program did not move");
    // The file on b begins with what the program wrote on a.
    let mut on_b = Shown {
        host: b,
        path: &path,
        text: String::new(),
        lines: on_a.lines,
    };
    while !on_b.text.ends_with('\n') || !on_b.text.contains("PASS") {
        on_b.follow(screen)?;
        ensure!(Instant::now() < deadline, "the program does not end");
        thread::sleep(Duration::from_millis(50));
    }
    on_b.follow(screen)?;
    let program = build::build()?.samples();
    let program = program.iter().find(|path| path.ends_with("recursive"));
    let unmoved = Command::new(program.context("no sample program")?)
        .args([LINES, "pace_us=0"])
        .output()
        .context("run the program unmoved")?;
    same(&on_b.text, &String::from_utf8_lossy(&unmoved.stdout))?;
    screen.say(&format!(
        "\n  {} lines on a, {} on b, none missing and none twice: the same bytes as without a move",
        on_a.lines,
        on_b.lines - on_a.lines
    ));
    Ok(())
}
