//! This terminal, joined with a machine's serial console or with a command that
//! runs on a host.

use crate::host::Host;
use crate::session::Typed;
use crate::vm::{console, Machine};
use crate::wire::{Cmd, Status};
use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use pmig::sys::tty;
use std::io::{stdin, stdout, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;

/// Control and `]`, which leaves the console.
const LEAVE: u8 = 0x1d;

/// Puts the terminal back as it was.
struct Restored(Option<String>);

impl Restored {
    fn raw() -> Self {
        let saved = stty(&["-g"]);
        if saved.is_some() {
            stty(&["raw", "-echo"]);
        }
        Self(saved)
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if let Some(saved) = &self.0 {
            stty(&[saved.trim()]);
        }
    }
}

fn stty(words: &[&str]) -> Option<String> {
    let output = Command::new("stty")
        .args(words)
        .stdin(Stdio::inherit())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then_some(text)
}

/// Joins this terminal and a machine's console until either side ends it.
///
/// # Errors
/// The machine is gone, or somebody else is connected.
pub fn interactive(machine: &Machine) -> Result<()> {
    let mut port = console(machine)?;
    let mut typed = port.try_clone()?;
    eprintln!("the console of {}; control-] leaves it", machine.name);
    let _restored = Restored::raw();
    thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(n @ 1..) = stdin().read(&mut buffer) {
            if buffer[..n].contains(&LEAVE) || typed.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = typed.shutdown(Shutdown::Both);
    });
    port.write_all(b"\n").context("type at the console")?;
    let mut buffer = [0; 4096];
    let mut out = stdout();
    while let Ok(n @ 1..) = port.read(&mut buffer) {
        out.write_all(&buffer[..n])?;
        out.flush()?;
    }
    Ok(())
}

/// Runs a command on a terminal of the host that is this one, for all it can
/// tell.
///
/// # Errors
/// It could not be started, or the host is gone.
pub fn on_terminal(host: &dyn Host, cmd: &Cmd) -> Result<Status> {
    let mut resized = SigSet::empty();
    resized.add(Signal::SIGWINCH);
    // Before any thread is started.
    resized.thread_block().context("block SIGWINCH")?;
    let size = || tty::size(stdin().as_fd()).map_or((24, 80), |size| (size.rows, size.cols));
    let (keys, typed) = channel();
    let sizes = keys.clone();
    let _restored = Restored::raw();
    thread::spawn(move || {
        while resized.wait().is_ok() {
            let (rows, cols) = size();
            if sizes.send(Typed::Size(rows, cols)).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(n @ 1..) = stdin().read(&mut buffer) {
            if keys.send(Typed::Keys(buffer[..n].to_vec())).is_err() {
                return;
            }
        }
    });
    let term = std::env::var("TERM").unwrap_or_else(|_| "xterm".into());
    let cmd = cmd.clone().env("TERM", &term);
    host.talk()?
        .exec_on_terminal(&cmd, size(), typed, &mut stdout())
}
