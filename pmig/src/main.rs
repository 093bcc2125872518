//! `pmig`: the command line. Words in, words out; the work is the library's.

mod cli;

fn main() -> std::process::ExitCode {
    cli::run()
}
