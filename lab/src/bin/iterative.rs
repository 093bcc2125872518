//! Computes line after line in one loop.

use lab::victim::{run, Args, Work, WORK_ARGS};
use std::process::ExitCode;

fn main() -> ExitCode {
    run(|| {
        let known = [&WORK_ARGS[..], &["lines"]].concat();
        let args = Args::new(&known)?;
        let lines = args.number("lines", 400)?;
        let mut work = Work::new(&args, 10_000)?;
        for _ in 0..lines {
            work.line("iterative")?;
        }
        work.finish()
    })
}
