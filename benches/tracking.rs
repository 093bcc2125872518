//! What each means to tell the written pages costs: the program, and pmig. The
//! figure that is timed is a look after 4,096 pages were written; the table has
//! the others. By it the order of `--dirty-tracking auto` was chosen.

mod common;

use anyhow::{Context, Result};
use common::measuring;
use criterion::SamplingMode;
use lab::bench::rows::{Results, TrackingCost, TrackingRow};
use lab::bench::{guarded, leave, short, summary, CannotHere, Stages, Went};
use lab::{Cmd, Make, Status};
use std::process::ExitCode;
use std::time::Duration;

/// Hosts, by which means, and the program's memory in megabytes.
type Config = (Make, &'static str, u32);

fn configs() -> Vec<Config> {
    let sizes: &[u32] = if short() { &[64] } else { &[64, 256] };
    let mut all = Vec::new();
    for make in [Make::Netns, Make::Vm] {
        for size in sizes {
            all.extend(["uffd", "soft-dirty", "kmod"].map(|how| (make, how, *size)));
        }
    }
    all
}

/// Measures so often, and gives the time of the looks in all of them.
fn measure(
    stages: &mut Stages,
    (make, how, size): Config,
    times: u64,
    costs: &mut Vec<TrackingCost>,
) -> Result<Duration> {
    let stage = stages.get(make)?;
    let host = stage.host(0);
    let tried = host.exec(&Cmd::new(["tracking", "have", how]))?;
    if tried.status != Status::Code(0) {
        return Err(CannotHere(tried.err().trim().to_owned()).into());
    }
    let mut looks = Duration::ZERO;
    for _ in 0..times {
        let size = size.to_string();
        let said = host.exec(&Cmd::new(["tracking", "cost", how, &size]))?;
        let cost: TrackingCost = serde_json::from_str(&said.ok()?.out()).context("its figures")?;
        looks += Duration::from_secs_f64(cost.dirty / 1e3);
        costs.push(cost);
    }
    Ok(looks)
}

fn main() -> ExitCode {
    let mut criterion = measuring(Duration::from_secs(1));
    let mut group = criterion.benchmark_group("tracking");
    group.sampling_mode(SamplingMode::Flat);
    let mut results = Results::new();
    let mut stages = Stages::default();
    for config in configs() {
        let (make, how, size) = config;
        let name = format!("{make} {how} {size} MB");
        let mut costs = Vec::new();
        let went = guarded(&name, &mut results, || {
            group.bench_function(&name, |bencher| {
                bencher.iter_custom(|times| {
                    measure(&mut stages, config, times, &mut costs).unwrap_or_else(|e| leave(&e))
                });
            });
        });
        if went == Went::Well && !costs.is_empty() {
            results
                .trackings
                .push(TrackingRow::new(make, how, size, &costs));
        }
        if went == Went::Failed {
            stages.forget();
        }
    }
    group.finish();
    summary::conclude("tracking", &results)
}
