//! A machine's serial console on this terminal.

use crate::vm::{console, Machine};
use anyhow::{Context, Result};
use std::io::{stdin, stdout, Read, Write};
use std::net::Shutdown;
use std::process::{Command, Stdio};
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
