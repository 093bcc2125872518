//! Words in and out.

mod attach;
mod check;
mod files;
mod inspect;
mod machine;
mod migrate;
mod output;
mod page;
mod ps;
mod resolve;
mod restore;
mod serve;
mod session;
mod show;
mod wait;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pmig::error::Error;
use pmig::fill;
use pmig::holder;
use pmig::id::Id;
use pmig::keeper;
use pmig::source;
use pmig::state::memory::TrackingChoice;
use pmig::state::pcb::PcbChoice;
use pmig::sys::timens;
use pmig::transport::Addr;

/// How pmig ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Done = 0,
    Other = 1,
    /// What clap says too.
    Usage = 2,
    /// The process cannot be moved; nothing was stopped for it, or it was let
    /// go on.
    Refused = 3,
    /// The migration failed; the program runs on at the source.
    RunsOn = 4,
    /// The program is held, frozen, until both machines agree.
    Unresolved = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

const EXITS: &str = "\
Exit codes: 0 done; 1 another error; 2 wrong usage; 3 refused; 4 failed, the \
program runs on at the source; 5 unresolved, the program is held frozen (see \
pmig resolve).";

/// Moves a running process, with everything it is made of, to another machine
/// while it runs.
#[derive(Debug, Parser)]
#[command(name = "pmig", version, after_help = EXITS)]
struct Cli {
    #[command(flatten)]
    verbose: Verbose,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, Args)]
pub struct Verbose {
    /// Log what is done to standard error; twice for more.
    #[arg(short = 'v', long = "verbose", action = clap::ArgAction::Count, global = true)]
    level: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Wait for programs that other machines send.
    Serve(Serve),
    /// Move a process to another machine.
    Migrate(Migrate),
    /// Write a process to a file; it is gone from here when the file is whole.
    Dump(Dump),
    /// Start a program on a terminal of its own, which can be shown and moved.
    Run(Run),
    /// Show the terminal of a program that pmig run started or that was moved
    /// here, and type into it.
    Attach(Attach),
    /// Wait for a program that was moved here, and end as it does.
    Wait(Wait),
    /// Bring a process back from a file, under its PID.
    Restore(Restore),
    /// Say what is in a file.
    Inspect(Inspect),
    /// Say what this machine can do, or what stands in the way of moving a
    /// process.
    Check(Check),
    /// List what came to this machine, what left it, and what is on its way.
    Ps(Ps),
    /// Settle migrations whose end the two machines have not agreed on.
    Resolve(Resolve),
    /// One migration's part of serve: its connection is standard input.
    #[command(hide = true)]
    Session(Session),
    /// One migration's keeper: its line to pmig is standard input.
    #[command(hide = true)]
    Keeper { id: Id, read: i32, write: i32 },
    /// Holds what a program needs that misses memory: its line to who fills it is
    /// standard input.
    #[command(hide = true)]
    Guard { id: Id },
    /// Sends memory that stayed here, for a migration whose pmig and keeper died.
    #[command(hide = true)]
    ServeMemory { id: Id },
    /// A program's parent, which holds its terminals: its line to whoever begins
    /// it is standard input.
    #[command(hide = true)]
    Holder,
}

/// Why plain TCP has to be asked for, on both sides.
pub const INSECURE: &str = "\
tcp:// neither encrypts nor authenticates: whoever can reach the port can read \
the memory of what is moved, and run programs as root on the machine that \
serves. Say --insecure on a network where that is all right, or use unix:/path";

#[derive(Debug, Args)]
pub struct Insecure {
    /// Allow plain tcp://, which neither encrypts nor authenticates: whoever
    /// can reach the port reads the program's memory and runs programs as root.
    #[arg(long)]
    insecure: bool,
}

impl Insecure {
    /// Refuses a plain network that nobody asked for.
    fn allows(&self, addr: &Addr) -> Result<(), Exit> {
        if addr.is_plain_network() && !self.insecure {
            output::error_line(&format!("pmig: {INSECURE}"));
            return Err(Exit::Usage);
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub struct Serve {
    /// tcp://host[:port] or unix:/path
    #[arg(long, value_name = "ADDR", value_parser = served)]
    listen: Addr,
    #[command(flatten)]
    insecure: Insecure,
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// The process to move.
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
    /// Where a pmig serves: tcp://host[:port] or unix:/path
    #[arg(value_parser = served)]
    addr: Addr,
    #[command(flatten)]
    insecure: Insecure,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    report: Report,
    /// Print every event as a line of JSON.
    #[arg(long)]
    json: bool,
}

/// Where the page about it goes.
#[derive(Debug, Args)]
pub struct Report {
    /// Write a page about how it went, for a browser or for paper, in place of
    /// a file of that name: what took how long, and where the program is.
    #[arg(long = "report", value_name = "FILE.html")]
    file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Dump {
    /// The process to write.
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
    /// The file to make. It holds the program's memory: whoever can read it
    /// reads that.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Let it run on here too. Then it is for you to see that the two do not
    /// get into each other's way.
    #[arg(long)]
    leave_running: bool,
    #[command(flatten)]
    capture: Capture,
    #[command(flatten)]
    report: Report,
    /// Print every event as a line of JSON.
    #[arg(long)]
    json: bool,
}

impl Dump {
    /// What the program writes to is always kept.
    fn options(&self) -> source::Options {
        source::Options {
            stays: self.leave_running,
            ..self.capture.options(true)
        }
    }
}

#[derive(Debug, Args)]
pub struct Restore {
    /// What pmig dump made; it stays as it is.
    file: PathBuf,
    /// Do not show its terminal, if it has one.
    #[arg(short, long)]
    detach: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// How registers and signals are written: by the kernel module (`kmod`), by
    /// `ptrace`, or by the module if it is loaded (`auto`).
    #[arg(long, value_enum, default_value_t = Pcb::Auto)]
    pcb: Pcb,
}

#[derive(Debug, Args)]
pub struct Inspect {
    /// What pmig dump made.
    file: PathBuf,
    /// Print one JSON object, with everything but memory and files' contents.
    #[arg(long)]
    json: bool,
}

/// How a process is moved.
#[derive(Debug, Clone, Args)]
pub struct How {
    /// Open files: `check` that the target has the same, or `ship` those that
    /// are missing there or open for writing here.
    #[arg(long, value_enum, default_value_t = Files::Check)]
    files: Files,
    /// When memory travels: before the program stops, again and again (`pre`); while
    /// it stands still (`stop`); when it runs at the target, what it touches first
    /// (`post`); once before and what was written since after it (`hybrid`); or
    /// before, and after it only what the program writes faster than the link carries
    /// (`auto`).
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    mode: Mode,
    #[command(flatten)]
    capture: Capture,
}

impl How {
    fn options(&self) -> source::Options {
        source::Options {
            mode: match self.mode {
                Mode::Auto => source::Mode::Auto,
                Mode::Stop => source::Mode::Stop,
                Mode::Pre => source::Mode::Pre,
                Mode::Post => source::Mode::Post,
                Mode::Hybrid => source::Mode::Hybrid,
            },
            ..self.capture.options(self.files == Files::Ship)
        }
    }
}

/// How a process is captured.
#[derive(Debug, Clone, Args)]
pub struct Capture {
    /// How registers and signals are read here, and by `pmig migrate` written at the
    /// target: by the kernel module (`kmod`), by `ptrace`, or by the module where it is
    /// loaded (`auto`).
    #[arg(long, value_enum, default_value_t = Pcb::Auto)]
    pcb: Pcb,
    /// How it is told here which pages the program writes: `uffd` (write
    /// protection), `soft-dirty`, `faults` (as `uffd`, and what its page faults tell
    /// need not be looked for at the freeze) and `kmod` (the module's dirty bits), both
    /// for where no other process writes into it, `none` (all is copied while it
    /// stands still), or the best that is safe and there (`auto`).
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = str::parse::<TrackingChoice>)]
    dirty_tracking: TrackingChoice,
    /// How long the program may stand still for the last pages: memory is
    /// copied again while it runs until what is left fits.
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = duration)]
    max_freeze: Duration,
}

impl Capture {
    fn options(&self, ship: bool) -> source::Options {
        source::Options {
            pcb: self.pcb.into(),
            tracking: self.dirty_tracking,
            ship,
            max_freeze: self.max_freeze,
            mode: source::Mode::Pre,
            stays: false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Files {
    Check,
    Ship,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    Auto,
    Stop,
    Pre,
    Post,
    Hybrid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pcb {
    Auto,
    Ptrace,
    Kmod,
}

impl From<Pcb> for PcbChoice {
    fn from(pcb: Pcb) -> PcbChoice {
        match pcb {
            Pcb::Auto => PcbChoice::Auto,
            Pcb::Ptrace => PcbChoice::Ptrace,
            Pcb::Kmod => PcbChoice::Kmod,
        }
    }
}

#[derive(Debug, Args)]
pub struct Check {
    /// The process to look at; without it, the machine is looked at.
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// Where it would go, to have the pmig there asked too.
    #[arg(value_parser = served)]
    addr: Option<Addr>,
    #[command(flatten)]
    insecure: Insecure,
    #[command(flatten)]
    how: How,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct Run {
    /// Print its PID, and do not show it.
    #[arg(short, long)]
    detach: bool,
    /// The key that leaves it alone.
    #[arg(long, value_name = "^KEY", default_value = "^]", value_parser = attach::control_key)]
    key: u8,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub struct Attach {
    /// The program.
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
    /// Only look: type nothing, and leave its size alone.
    #[arg(short, long)]
    watch: bool,
    /// The key that leaves it alone.
    #[arg(long, value_name = "^KEY", default_value = "^]", value_parser = attach::control_key)]
    key: u8,
}

#[derive(Debug, Args)]
pub struct Wait {
    /// The program.
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
    /// Print how it ended: {"code":0} or {"signal":9}.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct Ps {
    /// Also what was to move and did not.
    #[arg(short, long)]
    all: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct Resolve {
    /// Only this migration.
    id: Option<Id>,
    /// If the machines cannot agree: let it run here. Make sure that the other
    /// does not run it.
    #[arg(long, requires = "id", conflicts_with = "drop")]
    run_here: bool,
    /// If the machines cannot agree: end what this machine holds of it.
    #[arg(long, requires = "id")]
    drop: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct Session {
    /// What the other side is called in messages.
    #[arg(long)]
    peer: String,
    /// The file that stands for it, if one does.
    #[arg(long)]
    file: Option<PathBuf>,
    /// It comes with memory that it left behind.
    #[arg(long)]
    fill: bool,
}

/// Does what the command line says.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    log(cli.verbose);
    if let Err(e) = timens::enter_first() {
        tracing::debug!("time namespace of the machine: {e}");
    }
    let exit = match cli.command {
        Command::Serve(args) => serve::run(&args, cli.verbose),
        Command::Migrate(args) => migrate::run(&args),
        Command::Dump(args) => migrate::dump(&args),
        Command::Restore(args) => return restore::run(&args, cli.verbose).into(),
        Command::Inspect(args) => inspect::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Run(args) => return attach::run(&args).into(),
        Command::Attach(args) => return attach::attach(&args).into(),
        Command::Wait(args) => return wait::run(&args).into(),
        Command::Ps(args) => ps::run(&args),
        Command::Resolve(args) => resolve::run(&args),
        Command::Session(args) => session::run(&args),
        Command::Holder => match holder::run() {
            Ok(()) => Exit::Done,
            Err(_) => Exit::Other,
        },
        Command::Guard { id } => match fill::run_guard(id) {
            Ok(()) => Exit::Done,
            Err(e) => {
                tracing::error!("{e}");
                Exit::Other
            }
        },
        Command::ServeMemory { id } => match keeper::serve_memory(id) {
            Ok(()) => Exit::Done,
            Err(e) => {
                tracing::error!("{e}");
                Exit::Unresolved
            }
        },
        Command::Keeper { id, read, write } => match keeper::run(id, [read, write]) {
            Ok(()) => Exit::Done,
            Err(e) => {
                tracing::error!("{e}");
                Exit::Unresolved
            }
        },
    };
    exit.into()
}

fn log(verbose: Verbose) {
    let level = match verbose.level {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        2 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        // It would panic where standard error is closed.
        .log_internal_errors(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}

/// Says an error to a person.
fn say(error: &Error) {
    output::error_line(&format!("pmig: {}", lines(error)));
}

/// An error's text, whose line ends are ours and whose other control characters
/// are escaped.
fn lines(error: &Error) -> String {
    error
        .to_string()
        .split('\n')
        .map(pmig::error::printable)
        .collect::<Vec<_>>()
        .join("\n")
}

/// Where a pmig can serve.
fn served(text: &str) -> Result<Addr, String> {
    match text.parse()? {
        Addr::File(_) => Err(format!("{text}: for a file there is pmig dump")),
        addr => Ok(addr),
    }
}

/// `20ms`, `1.5s`, `500us`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text}: a time is written like 20ms, 500us or 1.5s");
    let split = text
        .find(|c: char| c.is_ascii_alphabetic())
        .ok_or_else(wrong)?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * unit).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from(["pmig", "migrate", "42", "tcp://b", "--insecure", "-v"]);
        assert_eq!(cli.unwrap().verbose.level, 1);
        for wrong in [
            &["pmig", "migrate", "0", "tcp://b"][..],
            &["pmig", "migrate", "-1", "tcp://b"],
            &["pmig", "migrate", "42", "b"],
            &["pmig", "migrate", "42", "tcp://b", "--max-freeze", "20"],
            &["pmig", "migrate", "42", "file:/srv/x"],
            &["pmig", "migrate", "42", "tcp://b", "--dirty-tracking", "x"],
            &["pmig", "dump", "42"],
            &["pmig", "resolve", "--drop"],
            &["pmig", "resolve", "../../etc"],
        ] {
            assert!(Cli::try_parse_from(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn times_are_read() {
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        for wrong in ["", "20", "ms", "-1ms", "1h", "NaNs", "1e300s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
