use std::fs::File;
use std::os::fd::AsFd;

use nix::unistd::{dup2_stdin, setsid};
use pmig::error::{Context, Result};
use pmig::protocol::Wire;
use pmig::sys::inherit::close_from;
use pmig::{target, transport};

use super::{lines, Exit, Session};

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
    target::session(Wire::new(link), &target::Options::open()?)
}
