//! How a move's time grows with the number of a program's mappings and
//! descriptors, and with what it writes; CRIU beside it, where it can.
//!
//! The program looks after every mapping and descriptor in turn, and ends where one
//! is not as it was left.

mod common;

use anyhow::{bail, Context, Result};
use common::measuring;
use criterion::SamplingMode;
use lab::bench::moves::{Moved, Mover, Told};
use lab::bench::peer::{tick, Criu, Means};
use lab::bench::rows::Results;
use lab::bench::scale::{descriptors, Scale, ScaleRow};
use lab::bench::{guarded, leave, short, summary, Stages, Went};
use lab::{Cmd, Make};
use std::process::ExitCode;
use std::time::Duration;

/// What a program may have written before it starts anew, where others move it.
const MOST_WRITTEN: u64 = 256 << 10;
/// Pages that a program writes to in a tick of a millisecond, and a bit, for each
/// megabyte per second.
const PAGES: f64 = 0.26;

#[derive(Clone, Copy)]
struct Config {
    make: Make,
    scale: Scale,
    /// None: as fast as it can.
    asked: Option<u32>,
    means: Means,
    mode: &'static str,
}

impl Config {
    fn means(&self) -> String {
        match (self.means, self.mode) {
            (Means::Pmig, "auto") => "pmig".into(),
            (Means::Pmig, mode) => format!("pmig --mode {mode}"),
            (other, _) => other.name().into(),
        }
    }

    fn name(&self) -> String {
        let asked = self.asked.map_or("all it can".into(), |n| n.to_string());
        let what = self.scale.name();
        format!("{} {asked} {what} {}", self.make, self.means())
    }

    /// How much of it there can be, on a host where so many descriptors may be open.
    fn within(&self, limit: u32) -> Result<Option<u32>> {
        match (self.scale, self.asked) {
            (Scale::Descriptors, Some(wanted)) => Ok(Some(descriptors(wanted, limit)?)),
            (_, asked) => Ok(asked),
        }
    }

    /// The program that has so much of it.
    fn line(&self, asked: Option<u32>) -> String {
        let number = asked.unwrap_or(0);
        let special = match (self.scale, asked) {
            (Scale::Mappings, _) => format!("mappings={number}"),
            (Scale::Descriptors, _) => format!("descriptors={number}"),
            // It is idle: its first tick lasts for hours.
            (_, Some(0)) => "resident_mb=256 tick_us=100000000000".into(),
            (_, Some(rate)) => {
                let pages = (f64::from(rate) * PAGES).ceil();
                format!("resident_mb=256 mode=roaming per_tick={pages}")
            }
            (_, None) => "resident_mb=256 mode=roaming per_tick=4096 tick_us=0".into(),
        };
        format!("ticker ticks=1000000000 {special}")
    }
}

fn configs() -> Vec<Config> {
    let (makes, numbers, rates): (&[Make], &[u32], &[Option<u32>]) = match short() {
        true => (&[Make::Netns], &[100, 5000], &[Some(0), Some(100)]),
        false => (
            &[Make::Netns, Make::Vm],
            &[10, 100, 1000, 5000, 20_000],
            &[Some(0), Some(10), Some(100), Some(1000), None],
        ),
    };
    let means: &[Means] = match short() {
        true => &[Means::Pmig],
        false => &[Means::Pmig, Means::Dump],
    };
    let mut all = Vec::new();
    for make in makes {
        for scale in [Scale::Mappings, Scale::Descriptors] {
            for number in numbers {
                all.extend(means.iter().map(|means| Config {
                    make: *make,
                    scale,
                    asked: Some(*number),
                    means: *means,
                    mode: "auto",
                }));
            }
        }
        for mode in ["auto", "hybrid"] {
            // Nothing follows of what does not write.
            let rates = rates
                .iter()
                .filter(|rate| mode == "auto" || **rate != Some(0));
            all.extend(rates.map(|rate| Config {
                make: *make,
                scale: Scale::DirtyRate,
                asked: *rate,
                means: Means::Pmig,
                mode,
            }));
        }
    }
    all
}

/// A program, who else moves it, and what became of its moves.
struct Trial {
    /// What there is of it.
    asked: Option<u32>,
    mover: Mover,
    criu: Option<Criu>,
    told: Vec<Told>,
    moved: Vec<Moved<Duration>>,
}

/// Starts the program, once.
fn start<'a>(
    stages: &mut Stages,
    config: &Config,
    trial: &'a mut Option<Trial>,
) -> Result<&'a mut Trial> {
    if trial.is_none() {
        let stage = stages.get(config.make)?;
        let criu = match config.means {
            Means::Pmig => None,
            _ => Some(Criu::new(config.make, [stage.host(0), stage.host(1)])?),
        };
        let limit = stage.host(0).exec(&Cmd::shell("ulimit -Hn"))?.out();
        // Without a limit it is a word.
        let limit = limit.trim().parse().unwrap_or(u32::MAX);
        let more = format!("--mode {}", config.mode);
        let asked = config.within(limit)?;
        let mut mover = Mover::start(&stage, &config.line(asked), &more)?;
        if criu.is_some() {
            mover.write_less(MOST_WRITTEN);
        }
        *trial = Some(Trial {
            asked,
            mover,
            criu,
            told: Vec::new(),
            moved: Vec::new(),
        });
    }
    trial.as_mut().context("no program was started")
}

impl Trial {
    /// Moves so often, and gives the time the program stood still in all of them.
    fn measure(&mut self, means: Means, times: u64) -> Result<Duration> {
        let mut still = Duration::ZERO;
        for _ in 0..times {
            if means == Means::Pmig {
                let told = self.mover.go()?;
                still += told.freeze().total;
                self.told.push(told);
            } else {
                let moved = tick(means, self.criu.as_ref(), &mut self.mover)?;
                still += moved.gap;
                self.moved.push(moved);
            }
        }
        self.lives()?;
        Ok(still)
    }

    /// It would have ended if anything were not as it was.
    fn lives(&self) -> Result<()> {
        let (host, _) = self.mover.hosts();
        if host.process(self.mover.pid())?.is_none() {
            let said = host.read(self.mover.output())?;
            let last = String::from_utf8_lossy(&said);
            bail!("the program has ended: {:?}", last.lines().last());
        }
        Ok(())
    }

    fn row(&self, config: &Config) -> ScaleRow {
        let at = (config.scale, self.asked);
        match config.means {
            Means::Pmig => ScaleRow::new(config.make, &config.means(), at, but_first(&self.told)),
            other => ScaleRow::of_peer(config.make, other, at, but_first(&self.moved)),
        }
    }
}

/// The first move finds nothing prepared.
fn but_first<T>(moves: &[T]) -> &[T] {
    match moves {
        [_, rest @ ..] if !rest.is_empty() => rest,
        all => all,
    }
}

fn main() -> ExitCode {
    let mut criterion = measuring(Duration::from_millis(if short() { 1 } else { 1000 }));
    let mut group = criterion.benchmark_group("scale");
    group.sampling_mode(SamplingMode::Flat);
    let mut results = Results::new();
    let mut stages = Stages::default();
    for config in configs() {
        let name = config.name();
        let mut trial = None;
        let went = guarded(&name, &mut results, || {
            group.bench_function(&name, |bencher| {
                let trial = start(&mut stages, &config, &mut trial).unwrap_or_else(|e| leave(&e));
                bencher.iter_custom(|times| {
                    let still = trial.measure(config.means, times);
                    still.unwrap_or_else(|e| leave(&e))
                });
            });
        });
        if let (Went::Well, Some(trial)) = (went, &trial) {
            if let Some(criu) = &trial.criu {
                results.note_peer(config.make, &criu.version);
            }
            results.add_link(config.make, trial.mover.link());
            results.scales.push(trial.row(&config));
        }
        drop(trial);
        if went == Went::Failed {
            stages.forget();
        }
    }
    group.finish();
    summary::conclude("scale", &results)
}
