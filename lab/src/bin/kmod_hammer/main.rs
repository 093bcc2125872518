//! Hammers on the kernel module: `roundtrip`, `edges`, `mutate N SEED`,
//! `stress SECONDS`. Runs in a VM whose kernel log is then looked at.

mod bytes;
mod edges;
mod mutate;
mod raw;
mod roundtrip;
mod stress;
mod victim;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["roundtrip"] => roundtrip::run(),
        ["edges"] => edges::run(),
        ["mutate", calls, seed] => match (calls.parse(), seed.parse()) {
            (Ok(calls), Ok(seed)) => mutate::run(calls, seed),
            _ => Err("mutate: N and SEED are numbers".into()),
        },
        ["stress", seconds] => match seconds.parse() {
            Ok(seconds) => stress::run(seconds),
            _ => Err("stress: SECONDS is a number".into()),
        },
        ["again"] => stress::again(),
        _ => Err("usage: kmod_hammer roundtrip | edges | mutate N SEED | stress SECONDS".into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("kmod_hammer: {e}");
            ExitCode::FAILURE
        }
    }
}
