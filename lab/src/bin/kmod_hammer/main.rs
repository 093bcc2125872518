//! Hammers on the kernel module: `roundtrip`, `edges`, `mutate N SEED`,
//! `stress SECONDS`. Runs in a VM whose kernel log is then looked at.

mod bytes;
mod edges;
mod raw;
mod roundtrip;
mod victim;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["roundtrip"] => roundtrip::run(),
        ["edges"] => edges::run(),
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
