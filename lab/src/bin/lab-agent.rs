//! The lab's own program inside a host: its first process and its agent.

use lab::inside::{machine, namespace};
use std::process::ExitCode;

fn main() -> ExitCode {
    // Whatever the one who started the lab left open is not for its programs.
    let _ = pmig::sys::inherit::close_from(3);
    lab::sys::heed_keys();
    let words = std::env::args().skip(1).collect::<Vec<_>>();
    let words = words.iter().map(String::as_str).collect::<Vec<_>>();
    let result = match words.as_slice() {
        ["namespace", spec] => namespace::launch(spec),
        ["namespace-init", spec] => namespace::init(spec),
        ["namespace-agent"] => namespace::agent(),
        ["machine-agent"] => machine::agent(),
        // As a machine's first process it is given whatever the kernel did not
        // understand itself.
        _ if std::process::id() == 1 => machine::init(),
        _ => Err(anyhow::anyhow!("the lab starts this program by itself")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lab-agent: {e:#}");
            ExitCode::FAILURE
        }
    }
}
