//! A person's wish to end a migration (Ctrl-C, or SIGTERM).

use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};

use crate::error::{Context, Error, Result};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Whether the end was asked for. Polled between two steps up to the commit;
/// what has reached the commit is finished.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// Fails with [`Error::Interrupted`] once the end was asked for.
pub fn check() -> Result<()> {
    if requested() {
        Err(Error::Interrupted)
    } else {
        Ok(())
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP only raise the flag. Must be called
/// before any other thread is started, since they inherit the signal mask.
pub fn listen() -> Result<()> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()
        .context("block", "SIGINT, SIGTERM and SIGHUP")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while set.wait().is_ok() {
                REQUESTED.store(true, Ordering::Relaxed);
            }
        })
        .context("start", "the thread that waits for signals")?;
    Ok(())
}
