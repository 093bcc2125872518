//! A process in a file.
//!
//! The road is that of a migration with a file in its middle. For `dump` the
//! source runs as ever, and what it speaks to is `record`, which answers as a
//! target would and writes down what is said. For `restore` it is a
//! [`Player`] that says it again to a target, which runs as ever.
//!
//! A file has a head, the messages of one migration in their own framing, and
//! a tail with their length and hash. It has its name only when it is whole
//! and on the disk; until then it is `NAME.pmig-ID`. The program is gone when
//! the file has its name, and only then: what became of a dump whose pmig died
//! is read off the names (`fate`).

mod fate;
mod file;
mod look;
mod play;
mod record;

use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Obstacle, Result};
use crate::id::Id;
use crate::image::Preview;
use crate::protocol::fate as question;
use crate::protocol::preface::{self, Kind};
use crate::protocol::Wire;
use crate::state::files::{FileRef, FileSet};
use crate::state::paths::FilePath;
use crate::transport::{self, Addr, Link};

pub use look::{look, Looked};
pub use play::{Played, Player};

/// Reaches what a migration goes to: another pmig, or a file.
///
/// # Errors
/// As [`transport::connect`].
pub fn connect(addr: &Addr) -> io::Result<Box<dyn Link>> {
    let Addr::File(path) = addr else {
        return transport::connect(addr);
    };
    let (ours, theirs) = transport::pair(&path.display().to_string(), "pmig")?;
    let path = path.clone();
    std::thread::Builder::new()
        .name("file".into())
        .spawn(move || {
            if let Err(e) = serve(&path, theirs) {
                tracing::debug!("{}: {e}", path.display());
            }
        })?;
    Ok(ours)
}

fn serve(path: &Path, mut link: Box<dyn Link>) -> Result<()> {
    match preface::accept(&mut *link)? {
        Kind::Migration => record::record(path, Wire::new(link)),
        Kind::Fill => Err(Error::bad("a file", "leaves no memory behind")),
        Kind::Fate => question::serve(&mut *link, |q| fate::answer(path, q)),
    }
}

/// Clears away what was written for a migration that does not come about.
pub fn forget(addr: &Addr, id: Id) {
    if let Addr::File(path) = addr {
        forget_at(path, id);
    }
}

fn forget_at(path: &Path, id: Id) {
    for name in [temporary(path, id), never(path, id)] {
        match std::fs::remove_file(&name) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("{}: {e}", name.display());
            }
            _ => {}
        }
    }
}

/// Whether that migration's file is whole and has its name.
pub fn is_whole(addr: &Addr, id: Id) -> bool {
    match addr {
        Addr::File(path) => file::id_of(path).is_ok_and(|found| found == Some(id)),
        _ => false,
    }
}

/// What it is called when it was decided that it never gets its name.
fn never(path: &Path, id: Id) -> PathBuf {
    let mut name = temporary(path, id).into_os_string();
    name.push(".never");
    name.into()
}

fn temporary(path: &Path, id: Id) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".pmig-{id}"));
    name.into()
}

/// The files whose content is kept, in the order in which it is asked for:
/// those that the program writes to.
#[derive(Debug, Default)]
struct Kept(Vec<FilePath>);

/// Files that the program only read when they were described first: their
/// content is not kept, and described as it is no more.
fn written_since(before: &FileSet, now: &FileSet) -> Vec<Obstacle> {
    let only_read = |f: &&FileRef| {
        let then = before.files.iter().find(|b| b.path == f.path);
        f.uses.written && then.is_some_and(|then| !then.uses.written)
    };
    let since = now.files.iter().filter(only_read);
    since
        .map(|f| {
            Obstacle::new(
                format!("file {}", f.path),
                "was opened for writing while the program was being copied",
                "try again",
            )
        })
        .collect()
}

impl Kept {
    /// Adds those of a set that were not known; gives their places in it.
    fn add(&mut self, set: &FileSet) -> Vec<u32> {
        let places = (0u32..).zip(&set.files);
        let new: Vec<_> = places
            .filter(|(_, f)| f.uses.written && !self.0.contains(&f.path))
            .collect();
        self.0.extend(new.iter().map(|(_, f)| f.path.clone()));
        new.into_iter().map(|(n, _)| n).collect()
    }
}

/// Numbers of devices and inodes mean nothing to who reads this later.
fn detach(preview: &mut Preview) {
    preview.files.boot.clear();
}

fn bad(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::bad(path.display(), what)
}
