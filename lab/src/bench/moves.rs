//! Programs that are moved to and fro, and what each move cost them.

use super::link::Link;
use super::{window, Stage};
use crate::agent::WORK;
use crate::host::{clock_offset, Host, Make};
use crate::wire::Cmd;
use anyhow::{bail, ensure, Context, Result};
use pmig::phase::Phase;
use pmig::report::{Event, Freeze, Summary};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

/// How long a program may take to fill its memory.
const FILLING: Duration = Duration::from_secs(120);
/// The program starts anew when it has written so many bytes: they travel too.
const MOST_WRITTEN: u64 = 8 << 20;

/// A program on one of the two hosts.
pub struct Mover {
    stage: Rc<Stage>,
    /// The index of the host where it is.
    at: usize,
    pid: u32,
    argv: Vec<String>,
    output: String,
    /// More words for `pmig migrate`.
    more: String,
    /// It starts anew when it has written so many bytes.
    most_written: u64,
}

/// One move as pmig tells it.
#[derive(Clone, Debug)]
pub struct Told {
    pub summary: Summary,
    /// Bytes of memory and files sent in all rounds, and how long these took.
    pub copied: u64,
    pub copying: Duration,
    /// Bytes per second that it wrote during the first round, if there was
    /// another.
    pub dirty_rate: Option<u64>,
}

impl Told {
    /// How long the program stood still, by pmig's word.
    pub fn freeze(&self) -> &Freeze {
        &self.summary.freeze
    }
}

/// One move of a ticking program, and what is told of it by whoever moved it.
#[derive(Clone, Debug)]
pub struct Moved<T = Told> {
    pub told: T,
    /// The largest gap in its time stamps around the move.
    pub gap: Duration,
    /// The gap between its last line here and its first there.
    pub switch: Duration,
    /// The largest gap in as long a time before the move.
    pub baseline: Duration,
}

impl Mover {
    /// Starts a program on a, and waits until it has written something.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(stage: &Rc<Stage>, line: &str, more: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut mover = Self {
            stage: Rc::clone(stage),
            at: 0,
            pid: 0,
            argv: line.split_whitespace().map(str::to_owned).collect(),
            output: format!("{WORK}/bench.{count}"),
            more: more.into(),
            most_written: MOST_WRITTEN,
        };
        mover.run()?;
        Ok(mover)
    }

    fn run(&mut self) -> Result<()> {
        let stage = Rc::clone(&self.stage);
        let host = stage.host(self.at);
        self.pid = host.spawn(&Cmd::new(self.argv.clone()), &self.output)?;
        host.wait_for("its first line", FILLING, &mut || {
            thread::sleep(Duration::from_millis(100));
            Ok(self.written(host)? > 0)
        })
    }

    fn written(&self, host: &dyn Host) -> Result<u64> {
        let said = host.sh(&format!("stat -c %s {}", self.output))?;
        Ok(said.trim().parse()?)
    }

    /// Moves it to the other host.
    ///
    /// # Errors
    /// What pmig says.
    pub fn go(&mut self) -> Result<Told> {
        let stage = Rc::clone(&self.stage);
        let (here, there) = (stage.host(self.at), stage.host(1 - self.at));
        let line = format!(
            "timeout -k 1 300 pmig migrate {} {} --insecure --json --files ship {}",
            self.pid,
            there.address(),
            self.more
        );
        let output = here.exec(&Cmd::shell(&line))?;
        let said = output.out();
        if !output.status.success() {
            bail!("{line}: {}{}", said, output.err());
        }
        self.at = 1 - self.at;
        told(&said)
    }

    /// Moves a ticking program, and looks at its time stamps.
    ///
    /// # Errors
    /// What pmig says, or a line lost, doubled or out of place.
    pub fn tick(&mut self) -> Result<Moved> {
        self.tick_by(Self::go)
    }

    /// The same, moved by any means.
    ///
    /// # Errors
    /// As [`Mover::tick`].
    pub fn tick_by<T>(&mut self, go: impl FnOnce(&mut Self) -> Result<T>) -> Result<Moved<T>> {
        let stage = Rc::clone(&self.stage);
        let (here, there) = (stage.host(self.at), stage.host(1 - self.at));
        let mut from = self.written(here)?;
        if from > self.most_written {
            self.end()?;
            self.run()?;
            from = self.written(here)?;
        }
        // What asking did to the program must not be seen in its time stamps.
        let settle = Duration::from_millis(150);
        thread::sleep(settle + 2 * window());
        let asked = here.clocks()?.realtime;
        let told = go(self)?;
        thread::sleep(settle + window());
        let left = self.written(here)?;
        let ahead = match self.stage.lab.make() {
            Make::Netns => 0,
            Make::Vm => clock_offset(here, there)?.0,
        };
        let text = there.read_from(&self.output, from)?;
        let ticks = Ticks::read(&text, from, left, ahead)?;
        let (last, first) = ticks.switch();
        let window = i128::try_from(window().as_nanos())?;
        Ok(Moved {
            told,
            gap: ticks.largest(last - window, first + window),
            switch: nanos(first - last),
            baseline: ticks.largest(asked - 2 * window, asked),
        })
    }

    /// Has it start anew more often, since what it wrote takes time to be moved
    /// by other means.
    pub fn write_less(&mut self, most: u64) {
        self.most_written = most;
    }

    /// Its PID.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The file that it writes to.
    pub fn output(&self) -> &str {
        &self.output
    }

    /// It is on the other host now.
    pub fn arrived(&mut self) {
        self.at = 1 - self.at;
    }

    /// What the link between the hosts can do.
    pub fn link(&self) -> &Link {
        &self.stage.link
    }

    /// The hosts' make.
    pub fn make(&self) -> Make {
        self.stage.lab.make()
    }

    /// The host where it is, and the other.
    pub fn hosts(&self) -> (&dyn Host, &dyn Host) {
        (self.stage.host(self.at), self.stage.host(1 - self.at))
    }

    /// Ends it.
    ///
    /// # Errors
    /// Its host is gone.
    pub fn end(&self) -> Result<()> {
        // It may have ended by itself.
        let _ = self.stage.host(self.at).signal(self.pid, 9);
        for index in [0, 1] {
            self.stage
                .host(index)
                .sh(&format!("rm -f {}", self.output))?;
        }
        Ok(())
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn told(said: &str) -> Result<Told> {
    let (mut summary, mut copied, mut copying) = (None, 0, Duration::ZERO);
    let mut dirty_rate = None;
    for line in said.lines() {
        match serde_json::from_str::<Event>(line) {
            Ok(Event::RoundEnded(round)) => {
                copied += round.bytes;
                dirty_rate = dirty_rate.or(round.dirty_rate);
            }
            Ok(Event::Ended {
                phase: Phase::Copy,
                elapsed,
                ..
            }) => copying = elapsed,
            Ok(Event::Done(done)) => summary = Some(done),
            _ => {}
        }
    }
    Ok(Told {
        summary: summary.with_context(|| format!("no summary in: {said}"))?,
        copied,
        copying,
        dirty_rate,
    })
}

fn nanos(value: i128) -> Duration {
    Duration::from_nanos(u64::try_from(value).unwrap_or(0))
}

/// A ticking program's time stamps, in nanoseconds by the source's real-time
/// clock.
struct Ticks {
    times: Vec<i128>,
    /// How many of them were written at the source.
    before: usize,
}

impl Ticks {
    /// Takes the lines from `start` on, of which those below `left` were written
    /// at the source; the target's clock is ahead by so much.
    fn read(text: &[u8], start: u64, left: u64, ahead: i128) -> Result<Self> {
        let text = String::from_utf8_lossy(text);
        let (mut at, mut before, mut times) = (start, 0, Vec::new());
        let mut last = None;
        for line in text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
        {
            let mut words = line.split_whitespace();
            let number: u64 = words.next().context("an empty line")?.parse()?;
            let time: i128 = words.nth(1).context("a short line")?.parse()?;
            ensure!(
                last.is_none_or(|last| number == last + 1),
                "line {number} follows line {last:?}"
            );
            last = Some(number);
            at += line.len() as u64;
            if at <= left {
                before = times.len() + 1;
                times.push(time);
            } else {
                times.push(time - ahead);
            }
        }
        ensure!(
            before > 0 && before < times.len(),
            "{before} lines before the move and {} in all",
            times.len()
        );
        Ok(Self { times, before })
    }

    /// The last time before the move and the first after it.
    fn switch(&self) -> (i128, i128) {
        (self.times[self.before - 1], self.times[self.before])
    }

    /// The largest gap between neighbours that reaches into that time.
    fn largest(&self, from: i128, to: i128) -> Duration {
        let pairs = self.times.windows(2);
        let within = pairs.filter(|pair| pair[1] > from && pair[0] < to);
        nanos(within.map(|pair| pair[1] - pair[0]).max().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_told_apart() {
        let text = b"7 0 1000\n8 0 2000\n9 0 9500\n10 0 9600\n11 0 9";
        let ticks = Ticks::read(text, 100, 118, 500).unwrap();
        assert_eq!(ticks.switch(), (2000, 9000));
        assert_eq!(ticks.largest(0, 2000), Duration::from_nanos(1000));
        assert_eq!(ticks.largest(0, 10_000), Duration::from_nanos(7000));
    }

    #[test]
    fn a_lost_line_is_an_error() {
        assert!(Ticks::read(b"7 0 1\n9 0 2\n", 0, 6, 0).is_err());
        assert!(Ticks::read(b"7 0 1\n8 0 2\n", 0, 90, 0).is_err());
    }
}
