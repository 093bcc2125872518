//! How long a ticking program stands still when it is moved: pmig's own figure
//! (stop at the source to resume at the target), and the gap in the program's
//! time stamps beside the one it shows unmoved.
//!
//! It goes there and back, once a sample. `PMIG_BENCH=short` measures a few
//! sizes only; a word on the command line picks those whose names contain it.
//! Without hardware virtualisation all of it takes about an hour.

mod common;

use anyhow::{Context, Result};
use common::measuring;
use criterion::SamplingMode;
use lab::bench::moves::{Moved, Mover};
use lab::bench::rows::{FreezeRow, Results};
use lab::bench::{guarded, leave, short, summary, CannotHere, Stages, Went};
use lab::{Cmd, Make, Status};
use std::process::ExitCode;
use std::time::Duration;

/// A program to move, and how: `roaming, hybrid` is `--mode hybrid`, `hot, whole`
/// writes whole pages instead of a word in each, and `hot, faults` is
/// `--dirty-tracking faults`.
type Config = (Make, &'static str, &'static str, u32);

fn configs() -> Vec<Config> {
    if short() {
        return vec![
            (Make::Netns, "ptrace", "hot", 1),
            (Make::Netns, "ptrace", "hot", 64),
            (Make::Vm, "auto", "hot", 16),
        ];
    }
    let mut all = Vec::new();
    for (make, pcbs, sizes) in [
        (
            Make::Netns,
            &["ptrace"][..],
            &[1, 16, 64, 256, 1024, 4096][..],
        ),
        (Make::Vm, &["ptrace", "kmod"][..], &[1, 16, 64, 256][..]),
    ] {
        for pcb in pcbs {
            for mode in ["hot", "roaming"] {
                all.extend(sizes.iter().map(|size| (make, *pcb, mode, *size)));
            }
            // Pages of which every byte is another one.
            all.push((make, *pcb, "hot, whole", 64));
            // This lab's machines hand out huge pages to any program: refused there.
            if make == Make::Netns {
                let large = sizes.iter().filter(|size| **size >= 64);
                all.extend(large.map(|size| (make, *pcb, "hot, faults", *size)));
            }
            // Memory that follows later.
            for mode in ["roaming, hybrid", "roaming, post"] {
                let large = sizes.iter().filter(|size| **size >= 64);
                all.extend(large.map(|size| (make, *pcb, mode, *size)));
            }
        }
    }
    all
}

/// Starts the program, once.
fn start<'a>(
    stages: &mut Stages,
    (make, pcb, mode, size): Config,
    mover: &'a mut Option<Mover>,
) -> Result<&'a mut Mover> {
    if mover.is_none() {
        let stage = stages.get(make)?;
        if pcb == "kmod" && !stage.has_module() {
            return Err(CannotHere("the hosts have no /dev/pmig".into()).into());
        }
        let (mode, how) = mode.split_once(", ").unwrap_or((mode, "auto"));
        let (how, words, tracking) = match how {
            "whole" => ("auto", 512, "auto"),
            "faults" => ("auto", 1, "faults"),
            how => (how, 1, "auto"),
        };
        if tracking != "auto" {
            let tried = stage
                .host(0)
                .exec(&Cmd::new(["tracking", "have", tracking]))?;
            if tried.status != Status::Code(0) {
                return Err(CannotHere(tried.err().trim().to_owned()).into());
            }
        }
        let line = format!("ticker mode={mode} resident_mb={size} words={words} ticks=1000000000");
        let more = format!("--pcb {pcb} --mode {how} --dirty-tracking {tracking}");
        *mover = Some(Mover::start(&stage, &line, &more)?);
    }
    mover.as_mut().context("no program was started")
}

/// Moves so often, and gives the time the program stood still in all of them.
fn measure(mover: &mut Mover, times: u64, moved: &mut Vec<Moved>) -> Result<Duration> {
    let mut frozen = Duration::ZERO;
    for _ in 0..times {
        let one = mover.tick()?;
        frozen += one.told.freeze().total;
        moved.push(one);
    }
    Ok(frozen)
}

fn main() -> ExitCode {
    let mut criterion = measuring(Duration::from_secs(1));
    let mut group = criterion.benchmark_group("freeze_time");
    group.sampling_mode(SamplingMode::Flat);
    let mut results = Results::new();
    let mut stages = Stages::default();
    for config in configs() {
        let (make, pcb, mode, size) = config;
        let name = format!("{make} {pcb} {mode} {size} MB");
        let (mut mover, mut moved) = (None, Vec::new());
        let went = guarded(&name, &mut results, || {
            group.bench_function(&name, |bencher| {
                let mover = start(&mut stages, config, &mut mover).unwrap_or_else(|e| leave(&e));
                bencher.iter_custom(|times| {
                    measure(mover, times, &mut moved).unwrap_or_else(|e| leave(&e))
                });
            });
        });
        if let (Went::Well, Some(mover)) = (went, &mover) {
            results.add_link(make, mover.link());
            let moved = if moved.len() > 1 { &moved[1..] } else { &moved };
            let row = FreezeRow::new((make, mover.link()), (pcb, mode, size), moved);
            results.freezes.push(row);
        }
        drop(mover);
        if went == Went::Failed {
            stages.forget();
        }
    }
    group.finish();
    summary::conclude("freeze_time", &results)
}
