//! Does anything with its memory, by a seed, and checks every byte of it, until
//! it is hurried.

use lab::victim::random::{Program, ARGS};
use lab::victim::{run, Args};
use std::process::ExitCode;

fn main() -> ExitCode {
    run(|| Program::new(&Args::new(&ARGS)?)?.run())
}
