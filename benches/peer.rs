//! The peer beside us: the same programs moved between the same hosts by pmig
//! and by each means of CRIU, in one run. A table and pictures go to
//! `target/pmig-bench`.
//!
//! What CRIU cannot do here is said with its own words.

mod common;

use anyhow::{Context, Result};
use common::measuring;
use criterion::SamplingMode;
use lab::bench::moves::{Moved, Mover};
use lab::bench::peer::{tick, Criu, Means};
use lab::bench::rows::{PeerRow, Results};
use lab::bench::{guarded, leave, short, summary, Stage, Stages, Went};
use lab::Make;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

/// What a program may have written before it starts anew: the other means copy
/// all of it while the program stands still.
const MOST_WRITTEN: u64 = 256 << 10;

type Config = (Make, &'static str, u32, Means);

fn configs() -> Vec<Config> {
    let sizes: &[(Make, &[u32])] = match short() {
        true => &[(Make::Netns, &[16]), (Make::Vm, &[16])],
        false => &[
            (Make::Netns, &[1, 16, 64, 256, 1024]),
            (Make::Vm, &[1, 16, 64, 256]),
        ],
    };
    let modes: &[&str] = if short() {
        &["hot"]
    } else {
        &["hot", "roaming"]
    };
    let mut all = Vec::new();
    for (make, sizes) in sizes {
        for mode in modes {
            for size in *sizes {
                all.extend(Means::ALL.map(|means| (*make, *mode, *size, means)));
            }
        }
    }
    all
}

struct Trial {
    criu: Option<Criu>,
    mover: Mover,
}

/// Starts the program, once.
fn start<'a>(
    stages: &mut Stages,
    (make, mode, size, means): Config,
    trial: &'a mut Option<Trial>,
) -> Result<&'a mut Trial> {
    if trial.is_none() {
        let stage: Rc<Stage> = stages.get(make)?;
        let criu = match means {
            Means::Pmig => None,
            _ => Some(Criu::new(make, [stage.host(0), stage.host(1)])?),
        };
        let line = format!("ticker mode={mode} resident_mb={size} ticks=1000000000");
        let mut mover = Mover::start(&stage, &line, "")?;
        mover.write_less(MOST_WRITTEN);
        *trial = Some(Trial { criu, mover });
    }
    trial.as_mut().context("no program was started")
}

/// Moves so often, and gives the largest gaps of all of them together.
fn measure(
    means: Means,
    trial: &mut Trial,
    times: u64,
    moved: &mut Vec<Moved<Duration>>,
) -> Result<Duration> {
    let mut stood = Duration::ZERO;
    for _ in 0..times {
        let one = tick(means, trial.criu.as_ref(), &mut trial.mover)?;
        stood += one.gap;
        moved.push(one);
    }
    Ok(stood)
}

fn main() -> ExitCode {
    let mut criterion = measuring(Duration::from_secs(1));
    let mut group = criterion.benchmark_group("peer");
    group.sampling_mode(SamplingMode::Flat);
    let mut results = Results::new();
    let mut stages = Stages::default();
    for config in configs() {
        let (make, mode, size, means) = config;
        let name = format!("{make} {mode} {size} MB {}", means.name());
        let (mut trial, mut moved) = (None, Vec::new());
        let went = guarded(&name, &mut results, || {
            group.bench_function(&name, |bencher| {
                let trial = start(&mut stages, config, &mut trial).unwrap_or_else(|e| leave(&e));
                bencher.iter_custom(|times| {
                    measure(means, trial, times, &mut moved).unwrap_or_else(|e| leave(&e))
                });
            });
        });
        if let (Went::Well, Some(trial)) = (went, &trial) {
            if let Some(criu) = &trial.criu {
                results.note_peer(make, &criu.version);
            }
            results.add_link(make, trial.mover.link());
            let moved = if moved.len() > 1 { &moved[1..] } else { &moved };
            let row = PeerRow::new((make, means), (mode, size), moved);
            results.peers.push(row);
        }
        drop(trial);
        if went == Went::Failed {
            stages.forget();
        }
    }
    group.finish();
    summary::conclude("peer", &results)
}
