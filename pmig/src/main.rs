//! `pmig`: the command line. Words in, words out; the work is the library's.

mod cli;

fn main() -> std::process::ExitCode {
    // Before any thread is started, for all inherit it.
    pmig::sys::ptrace::listen();
    cli::run()
}
