//! Programs move between two hosts, as a user would have them move.
//!
//! Each claim is tried on namespaces of this machine and on machines of QEMU's
//! where it can be, there with both ways to read a process control block.

#[path = "../faults/mod.rs"]
mod faults;
mod hosts;
mod moving;
mod refusing;
mod surviving;

use lab::harness::{main as run, Trial};
use lab::Make;
use std::process::ExitCode;

/// What is tried on machines at every change, so that all tests together stay
/// within half an hour on two cores; the rest takes as long again.
const AT_EVERY_CHANGE: [&str; 7] = [
    "vm::hosts::",
    "::a_recursive_program_moves",
    "::an_iterative_program_moves",
    "vm::ptrace::descriptors_keep",
    "vm::ptrace::handlers_masks",
    "vm::kmod::a_program_at_random_addresses",
    "vm::kmod::python_moves",
];

fn main() -> ExitCode {
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(hosts::trials());
    trials.extend(moving::trials());
    trials.extend(refusing::trials());
    trials.extend(surviving::trials());
    trials.extend(faults::trials());
    let long = |t: &Trial| {
        t.make == Make::Vm && !AT_EVERY_CHANGE.iter().any(|claim| t.name.contains(claim))
    };
    let trials = trials
        .into_iter()
        .map(|t| if long(&t) { t.long() } else { t });
    run(trials.collect())
}
