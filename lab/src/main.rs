//! `cargo lab`: hosts to try pmig on.

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use lab::steps::Steps;
use lab::{serve, state, Cmd, Make};
use std::io::{stderr, stdin, stdout, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

/// Boots two hosts, a and b, and does things on them.
#[derive(Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab")]
struct Arguments {
    #[command(subcommand)]
    command: Words,
}

#[derive(Subcommand)]
enum Words {
    /// Boot both hosts and start pmig serve on them
    Up {
        /// Namespaces on this machine instead of virtual machines
        #[arg(long)]
        netns: bool,
        /// Start no pmig serve on them
        #[arg(long)]
        bare: bool,
    },
    /// End both hosts
    Down,
    /// See a program move from one host to the other while it runs
    Demo {
        /// Namespaces on this machine instead of virtual machines
        #[arg(long)]
        netns: bool,
        /// Write what is seen to a picture that moves
        #[arg(long, value_name = "FILE.svg")]
        record: Option<PathBuf>,
    },
    /// Use a machine's serial console
    Console { host: String },
    /// Say what is up
    Status,
    /// Run a command on a host
    Exec {
        host: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Start a program in the background on a host, and print its PID
    Spawn {
        host: String,
        /// The host's file that takes its output
        #[arg(long, default_value = "/srv/work/out")]
        output: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Copy a file into a host
    Push { file: PathBuf, to: String },
    /// Copy a file out of a host
    Pull { from: String, file: PathBuf },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("lab: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn place(text: &str) -> Result<(&str, &str)> {
    text.split_once(':')
        .with_context(|| format!("{text}: expected HOST:PATH"))
}

fn make(netns: bool) -> Make {
    if netns {
        Make::Netns
    } else {
        Make::Vm
    }
}

fn run(words: Words) -> Result<ExitCode> {
    match words {
        Words::Up { netns, bare } => {
            let _change = state::change()?;
            let make = make(netns);
            let steps = Steps::default();
            let lab = state::up(make, &|what| steps.begin(what))?.lab()?;
            if !bare {
                steps.begin("starting pmig serve on both");
                serve(lab.a(), &[])?;
                serve(lab.b(), &[])?;
            }
            steps.end();
            println!("a and b are up ({make}). To get in:");
            println!("  cargo lab exec a -- COMMAND     runs it there; as root, in /srv/work");
            if make == Make::Vm {
                println!("  cargo lab console a             is the machine's serial console");
            }
            println!("To move a program:");
            println!("  cargo lab spawn a -- recursive  starts it and prints its PID");
            println!("  cargo lab exec a -- pmig migrate PID tcp://b --insecure --files ship");
            println!("To move an editor:");
            println!("  cargo lab exec a -- pmig run vi letter");
            println!("  cargo lab exec a -- pmig migrate PID tcp://b --insecure --files ship");
            println!("  cargo lab exec b -- pmig attach PID");
        }
        Words::Demo { netns, record } => lab::demo::run(make(netns), record.as_deref())?,
        Words::Console { host } => {
            lab::console::interactive(&state::current()?.machine(&host)?)?;
        }
        Words::Down => {
            let _change = state::change()?;
            println!(
                "{}",
                if state::down()? {
                    "ended"
                } else {
                    "nothing was up"
                }
            );
        }
        Words::Status => match state::current() {
            Ok(state) => println!("a and b are up ({})", state.make),
            Err(e) => {
                println!("{e}");
                return Ok(ExitCode::FAILURE);
            }
        },
        Words::Exec { host, command } => {
            let host = state::current()?.host(&host)?;
            if stdin().is_terminal() && stdout().is_terminal() {
                let status = lab::console::on_terminal(&*host, &Cmd::new(command))?;
                return Ok(ExitCode::from(u8::try_from(status.code()).unwrap_or(1)));
            }
            let input = (!std::io::stdin().is_terminal()).then(lab::host::own_input);
            let status =
                host.talk()?
                    .exec(&Cmd::new(command), input, &mut stdout(), &mut stderr())?;
            return Ok(ExitCode::from(u8::try_from(status.code()).unwrap_or(1)));
        }
        Words::Spawn {
            host,
            output,
            command,
        } => {
            let host = state::current()?.host(&host)?;
            println!("{}", host.spawn(&Cmd::new(command), &output)?);
        }
        Words::Push { file, to } => {
            let (host, path) = place(&to)?;
            state::current()?.host(host)?.push(&file, path)?;
        }
        Words::Pull { from, file } => {
            let (host, path) = place(&from)?;
            state::current()?.host(host)?.pull(path, &file)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
