//! How fast the memory of an idle program travels, beside iperf3 on the same
//! link just before. Each sample is one move, there or back.

mod common;

use anyhow::{Context, Result};
use common::measuring;
use criterion::{SamplingMode, Throughput};
use lab::bench::link::iperf3;
use lab::bench::moves::{Mover, Told};
use lab::bench::rows::{Results, ThroughputRow};
use lab::bench::{guarded, leave, short, summary, Stages, Went};
use lab::Make;
use std::process::ExitCode;
use std::time::Duration;

/// Hosts, when memory travels, and the program's memory in megabytes.
type Config = (Make, &'static str, u32);
/// What a move was like, after iperf3's rate just before it.
type Moved = (Option<f64>, Told);

/// As `--mode` has them.
const PRE: &str = "pre";
const POST: &str = "post";

fn configs() -> &'static [Config] {
    if short() {
        &[
            (Make::Netns, PRE, 256),
            (Make::Netns, POST, 256),
            (Make::Vm, PRE, 32),
            (Make::Vm, POST, 32),
        ]
    } else {
        &[
            (Make::Netns, PRE, 256),
            (Make::Netns, PRE, 1024),
            (Make::Netns, POST, 1024),
            (Make::Vm, PRE, 64),
            (Make::Vm, PRE, 256),
            (Make::Vm, POST, 256),
        ]
    }
}

/// Starts the program, once.
fn start<'a>(
    stages: &mut Stages,
    (make, mode, size): Config,
    mover: &'a mut Option<Mover>,
) -> Result<&'a mut Mover> {
    if mover.is_none() {
        let stage = stages.get(make)?;
        // Its first tick lasts for hours; what it has filled is random.
        let line = format!("ticker resident_mb={size} tick_us=100000000000");
        *mover = Some(Mover::start(&stage, &line, &format!("--mode {mode}"))?);
    }
    mover.as_mut().context("no program was started")
}

/// Moves so often, and gives the time that the copies took, or the fills.
fn measure(mover: &mut Mover, times: u64, moved: &mut Vec<Moved>) -> Result<Duration> {
    let mut copying = Duration::ZERO;
    for _ in 0..times {
        let last = moved.last().and_then(|(line, _)| *line);
        let line = match &mover.link().rate {
            // For a few quick figures not each move needs one of its own.
            Ok(_) if short() && last.is_some() && moved.len() % 3 != 0 => last,
            Ok(_) => {
                let (here, there) = mover.hosts();
                Some(iperf3(here, there)?)
            }
            Err(_) => None,
        };
        let told = mover.go()?;
        copying += told.summary.filled.unwrap_or(told.copying);
        moved.push((line, told));
    }
    Ok(copying)
}

fn main() -> ExitCode {
    let mut criterion = measuring(Duration::from_secs(1));
    let mut group = criterion.benchmark_group("throughput");
    group.sampling_mode(SamplingMode::Flat);
    let mut results = Results::new();
    let mut stages = Stages::default();
    for config in configs() {
        let (make, mode, size) = *config;
        let name = format!("{make} {mode} {size} MB");
        let (mut mover, mut moved) = (None, Vec::new());
        group.throughput(Throughput::Bytes(u64::from(size) << 20));
        let went = guarded(&name, &mut results, || {
            group.bench_function(&name, |bencher| {
                let mover = start(&mut stages, *config, &mut mover).unwrap_or_else(|e| leave(&e));
                bencher.iter_custom(|times| {
                    measure(mover, times, &mut moved).unwrap_or_else(|e| leave(&e))
                });
            });
        });
        if let (Went::Well, Some(mover)) = (went, &mover) {
            results.add_link(make, mover.link());
            let moved = if moved.len() > 1 { &moved[1..] } else { &moved };
            results
                .throughputs
                .push(ThroughputRow::new(make, (mode, size), moved));
        }
        drop(mover);
        if went == Went::Failed {
            stages.forget();
        }
    }
    group.finish();
    summary::conclude("throughput", &results)
}
