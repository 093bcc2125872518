//! Who a program is across its moves, so that it finds what it left behind
//! when it comes back.
//!
//! A note is kept for every program that came in: PID, start time and boot name
//! it for as long as it lives here.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::id::Id;
use crate::journal;

#[derive(Serialize, Deserialize)]
struct Note {
    pid: i32,
    start: u64,
    boot: String,
    lineage: String,
}

fn dir() -> PathBuf {
    journal::state_dir().join("lineages")
}

/// The lineage of a process that runs here: the one it came with, or a new one.
pub fn of(pid: i32) -> Result<String> {
    let path = dir().join(pid.to_string());
    match fs::read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        read => {
            let note: Option<Note> = serde_json::from_slice(&read.context("read", path.display())?)
                // A note that cannot be read names nobody.
                .ok();
            if let Some(note) = note {
                if note.start == journal::start_of(pid)? && note.boot == journal::boot_id()? {
                    return Ok(note.lineage);
                }
            }
        }
    }
    Ok(Id::random()?.to_string())
}

/// Notes that a program came in.
pub fn note(pid: i32, lineage: &str) -> Result<()> {
    let note = Note {
        pid,
        start: journal::start_of(pid)?,
        boot: journal::boot_id()?,
        lineage: lineage.into(),
    };
    let text = serde_json::to_vec(&note).map_err(|e| Error::bad("lineage", e))?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir())
        .context("make", dir().display())?;
    let (path, new) = (
        dir().join(pid.to_string()),
        dir().join(format!(".{pid}.new")),
    );
    let write = || {
        use std::io::Write;
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?
            .write_all(&text)?;
        fs::rename(&new, &path)
    };
    write().context("write", path.display())
}
