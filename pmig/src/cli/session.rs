use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::unistd::{dup2_stdin, setsid};
use pmig::error::{Context, Result};
use pmig::protocol::Wire;
use pmig::resolve::Files;
use pmig::sys::inherit::close_from;
use pmig::transport::Link;
use pmig::{fill, target, transport};

use super::{files, lines, Exit, Session, Verbose};

pub fn run(args: &Session) -> Exit {
    match session(args) {
        Ok(()) => Exit::Done,
        Err(e) => {
            // serve, whose log this is, may be gone.
            tracing::warn!("a migration from {} failed: {}", args.peer, lines(&e));
            Exit::Other
        }
    }
}

/// What a session is for.
#[derive(Debug, Clone, Copy)]
pub enum What<'a> {
    Migration,
    /// The same, and what stands for the other side.
    File(&'a Path),
    /// Memory that a migration left behind.
    Fill,
}

/// Hands a connection to a process of its own, which lives on if this one dies.
/// Its warnings go to `log`.
pub fn start(link: Box<dyn Link>, what: What<'_>, verbose: Verbose, log: Stdio) -> Result<Child> {
    link.set_deadline(None)
        .context("set up", "the connection")?;
    let fd: OwnedFd = link
        .fd()
        .try_clone_to_owned()
        .context("hand over", "the connection")?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("pmig")
        .args(["session", "--peer", &link.peer()])
        .stdin(fd)
        .stdout(Stdio::null())
        .stderr(log);
    match what {
        What::Migration => {}
        What::File(file) => drop(command.arg("--file").arg(file)),
        What::Fill => drop(command.arg("--fill")),
    }
    if verbose.level > 0 {
        command.arg(format!("-{}", "v".repeat(verbose.level.into())));
    }
    // Otherwise the other side wouldn't notice when the session dies.
    drop(link);
    command.spawn().context("start", "a session")
}

fn session(args: &Session) -> Result<()> {
    close_from(3).context("close", "inherited descriptors")?;
    // What ends serve, Ctrl-C at its terminal too, leaves this alone.
    let _ = setsid();
    let fd = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("take over", "the connection")?;
    let null = File::open("/dev/null").context("open", "/dev/null")?;
    dup2_stdin(&null).context("close", "standard input")?;
    let link = transport::adopt(fd, args.peer.clone()).context("take over", "the connection")?;
    let options = target::Options {
        file: args.file.clone(),
        ..target::Options::open()?
    };
    if args.fill {
        return fill::take_over(&mut Wire::new(link), &|noted| files::Shipped.finish(noted));
    }
    target::session(Wire::new(link), &options)
}
