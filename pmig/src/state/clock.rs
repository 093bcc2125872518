//! The clocks of a program: CLOCK_MONOTONIC and CLOCK_BOOTTIME go on without a
//! step, in a time namespace (time_namespaces(7)).

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::time::TimeValLike;
use nix::time::{clock_getres, ClockId};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::sys::timens;

/// Both clocks, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    pub monotonic: i64,
    pub boottime: i64,
}

impl Reading {
    /// This process's clocks now.
    pub fn now() -> Reading {
        Reading {
            monotonic: timens::clock(libc::CLOCK_MONOTONIC) as i64,
            boottime: timens::clock(libc::CLOCK_BOOTTIME) as i64,
        }
    }

    pub fn after(self, nanoseconds: i64) -> Reading {
        self.plus(Reading {
            monotonic: nanoseconds,
            boottime: nanoseconds,
        })
    }

    pub fn minus(self, other: Reading) -> Reading {
        Reading {
            monotonic: self.monotonic.wrapping_sub(other.monotonic),
            boottime: self.boottime.wrapping_sub(other.boottime),
        }
    }

    pub fn plus(self, other: Reading) -> Reading {
        Reading {
            monotonic: self.monotonic.wrapping_add(other.monotonic),
            boottime: self.boottime.wrapping_add(other.boottime),
        }
    }
}

/// How long this thread has had a processor, in nanoseconds.
pub fn own_time() -> i64 {
    timens::clock(libc::CLOCK_THREAD_CPUTIME_ID) as i64
}

fn coarse() -> i64 {
    timens::clock(libc::CLOCK_MONOTONIC_COARSE) as i64
}

/// How long a program that may run is kept, at most, until its clocks have come to
/// where they stood. Whoever lets it run in another's place waits for as long.
pub const A_MOMENT: Duration = Duration::from_millis(8);

/// How long is waited for a clock that does not move.
const LONGEST: Duration = Duration::from_secs(1);

/// What [`coarse`] moves by, in nanoseconds.
fn tick() -> i64 {
    let tick = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE);
    tick.map_or(1, |t| t.num_nanoseconds().max(1))
}

/// How far the clocks of a process are ahead of those of its machine.
fn offsets(pid: &str) -> Result<Reading> {
    let path = format!("/proc/{pid}/timens_offsets");
    let text = match std::fs::read_to_string(&path) {
        // A kernel without time namespaces has no offsets.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Reading::default()),
        r => r.context("read", &path)?,
    };
    let mut all = Reading::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or("");
        let mut number = || words.next().and_then(|w| w.parse::<i64>().ok());
        let (Some(s), Some(ns)) = (number(), number()) else {
            return Err(Error::bad(&path, format!("cannot make sense of {line:?}")));
        };
        let value = s.saturating_mul(1_000_000_000).saturating_add(ns);
        match name {
            "monotonic" => all.monotonic = value,
            "boottime" => all.boottime = value,
            _ => {}
        }
    }
    Ok(all)
}

/// How far a program's clocks are ahead of this process's.
pub fn ahead(pid: i32) -> Result<Reading> {
    Ok(offsets(&pid.to_string())?.minus(offsets("self")?))
}

/// What the target needs to go on with a program's clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// How far the program's clocks are to be ahead of the target's pmig.
    pub ahead: Reading,
    /// What the program's clocks said when it was stopped; they never say less.
    pub at_stop: Reading,
    /// The same of CLOCK_MONOTONIC_COARSE, which moves once a tick, and on each
    /// machine at its own moments.
    pub coarse: i64,
}

impl Clock {
    /// From how far the program is [`ahead`] here and the difference between
    /// the two machines (target less source).
    pub fn capture(ahead: Reading, between: Reading) -> Clock {
        Clock {
            ahead: ahead.minus(between),
            coarse: coarse().wrapping_add(ahead.monotonic),
            at_stop: Reading::now().plus(ahead),
        }
    }

    /// The program's clocks at this moment, at the target.
    pub fn now(&self) -> Reading {
        Reading::now().plus(self.ahead)
    }

    /// By how much the program would see its clocks step back at this moment.
    fn back(&self) -> Reading {
        let back = self.at_stop.minus(self.now());
        let coarse = coarse().wrapping_add(self.ahead.monotonic);
        let back_coarse = self.coarse.wrapping_sub(coarse);
        Reading {
            monotonic: back.monotonic.max(back_coarse).max(0),
            boottime: back.boottime.max(0),
        }
    }

    /// Whether a time namespace that was set before the program stopped, by `ahead`,
    /// is as good as one that is set now: then how long the program must not be let
    /// run in it yet, so as to see no time twice.
    pub fn kept_by(&self, ahead: &Clock) -> Option<Duration> {
        (self.ahead == ahead.ahead).then(|| self.wait())
    }

    /// As long as the program must not be let run yet.
    fn wait(&self) -> Duration {
        let now = self.now();
        let fine = self.at_stop.minus(now);
        let seen = coarse().wrapping_add(self.ahead.monotonic);
        let ticks = match self.coarse.wrapping_sub(seen) {
            ..=0 => 0,
            // At a tick that may be due already.
            behind => {
                let ticks = behind.saturating_add(tick() - 1) / tick() * tick();
                seen.wrapping_add(ticks).wrapping_sub(now.monotonic).max(1)
            }
        };
        let wait = fine.monotonic.max(fine.boottime).max(ticks);
        Duration::from_nanos(wait.max(0) as u64)
    }

    /// Waits until the program can be let run without seeing a time twice.
    ///
    /// # Errors
    /// [`Error::Bad`] when it takes a second. A look at [`Clock::kept_by`], or a
    /// [`Clock::restore`], has excluded that unless the machine itself stands still.
    pub fn await_it(&self) -> Result<()> {
        let until = Instant::now() + LONGEST;
        while Instant::now() < until {
            let wait = self.wait();
            if wait.is_zero() {
                return Ok(());
            }
            // One of the clocks moves once a tick.
            std::thread::sleep(wait.clamp(Duration::from_micros(100), Duration::from_micros(500)));
        }
        Err(Error::bad(
            "clock",
            "it does not reach the time of the stop",
        ))
    }

    /// Sets the clocks of a time namespace, for the husk to enter then.
    /// Afterwards `ahead` is exact.
    pub fn restore(&mut self, namespace: &Namespace) -> Result<()> {
        self.ahead = self.ahead.plus(self.back());
        self.set(namespace)
    }

    /// The same while the program still runs at the source.
    pub fn set(&self, namespace: &Namespace) -> Result<()> {
        let absolute = namespace.own.plus(self.ahead);
        let (monotonic, boottime) = (absolute.monotonic as i128, absolute.boottime as i128);
        timens::set_offsets(&namespace.offsets, monotonic, boottime)
            .context("set", "the clocks of the time namespace")
    }
}

/// A time namespace that nobody is in yet, made ahead of the freeze.
#[derive(Debug)]
pub struct Namespace {
    namespace: File,
    offsets: File,
    /// How far this process's clocks are ahead of the machine's.
    own: Reading,
}

impl Namespace {
    /// For the main thread of a process, whose children are in it from then on; the
    /// first of them fixes its clocks, and another one has to be made.
    ///
    /// # Errors
    /// Those of unshare(2) and of procfs.
    pub fn make() -> Result<Namespace> {
        Namespace::of(offsets("self")?)
    }

    /// Another one, by the thread that made this.
    ///
    /// # Errors
    /// As [`Namespace::make`].
    pub fn another(&self) -> Result<Namespace> {
        // Of this process the kernel tells what its children will have.
        Namespace::of(self.own)
    }

    fn of(own: Reading) -> Result<Namespace> {
        timens::unshare().context("make", "a time namespace")?;
        Ok(Namespace {
            namespace: timens::open().context("open", "the time namespace")?,
            offsets: timens::open_offsets().context("open", "the time namespace's offsets")?,
            own,
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

/// The difference between two machines' clocks, by the quickest of several
/// questions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Difference {
    best: Option<(i64, Reading)>,
}

impl Difference {
    /// Adds an answer: our clocks before and after, the other's in between.
    pub fn add(&mut self, before: Reading, theirs: Reading, after: Reading) {
        let took = after.monotonic - before.monotonic;
        if self.best.is_some_and(|(best, _)| best <= took) {
            return;
        }
        let half = Reading {
            monotonic: took / 2,
            boottime: took / 2,
        };
        self.best = Some((took, theirs.minus(before.plus(half))));
    }

    /// Other less ours; zero before any answer.
    pub fn value(&self) -> Reading {
        self.best.map_or(Reading::default(), |(_, v)| v)
    }

    /// The least that it may be: by that a program's clocks are rather ahead at the
    /// other than behind.
    pub fn least(&self) -> Reading {
        match self.best {
            Some((took, value)) => value.after(-(took / 2)),
            None => Reading::default(),
        }
    }

    /// How wrong it may be, in nanoseconds.
    pub fn error(&self) -> i64 {
        self.best.map_or(i64::MAX, |(took, _)| took / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_set_ahead_is_kept_but_time_does_not_step_back() {
        let told = Clock::capture(Reading::default(), Reading::default());
        let stopped = Clock::capture(Reading::default(), Reading::default());
        assert_eq!(stopped.kept_by(&told), Some(Duration::ZERO));
        stopped.await_it().unwrap();
        let other = Clock {
            ahead: Reading::default().after(1),
            ..stopped
        };
        assert_eq!(other.kept_by(&told), None, "it is to be another time");
        let late = |by: i64| {
            [
                Clock {
                    at_stop: stopped.at_stop.after(by),
                    ..stopped
                },
                Clock {
                    coarse: stopped.coarse + by,
                    ..stopped
                },
            ]
        };
        for late in late(3_600_000_000_000) {
            let wait = late.kept_by(&told).unwrap();
            assert!(
                wait > Duration::from_secs(3000),
                "the program saw a later time"
            );
            assert!(late.await_it().is_err());
        }
        for late in late(20_000_000) {
            late.await_it().unwrap();
            assert_eq!(late.kept_by(&told), Some(Duration::ZERO));
        }
    }

    #[test]
    fn the_quickest_answer_counts() {
        let at = |n| Reading {
            monotonic: n,
            boottime: n,
        };
        let mut d = Difference::default();
        d.add(at(0), at(1050), at(100));
        d.add(at(200), at(1500), at(900));
        assert_eq!(d.value(), at(1000));
        assert_eq!((d.error(), d.least()), (50, at(950)));
    }
}
