//! Programs move between two hosts, as a user would have them move.
//!
//! Each claim is tried on namespaces of this machine and on machines of QEMU's
//! where it can be, there with both ways to read a process control block.

mod dumping;
#[path = "../faults/mod.rs"]
mod faults;
mod holders;
mod hosts;
mod listing;
mod moving;
mod random;
mod refusing;
mod reporting;
mod surviving;
mod terminals;
mod tracking;

use lab::harness::{main as run, Trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(hosts::trials());
    trials.extend(moving::trials());
    trials.extend(tracking::trials());
    trials.extend(listing::trials());
    trials.extend(dumping::trials());
    trials.extend(terminals::trials());
    trials.extend(holders::trials());
    trials.extend(random::trials());
    trials.extend(refusing::trials());
    trials.extend(reporting::trials());
    trials.extend(surviving::trials());
    trials.extend(faults::trials());
    run(trials)
}
