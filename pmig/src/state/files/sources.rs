//! The files of a process, described at the source.

use std::collections::BTreeMap;

use super::{boot_id, FileRef, FileSet, Identity, Shipment, Stamp, Uses};
use crate::error::{Context, Error, Obstacle, Result};
use crate::state::objects::OpenFile;
use crate::state::paths::{FilePath, Pinned};

/// Through which of its handles a process's file is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// A descriptor.
    Fd(i32),
    /// A mapping, by its bounds as /proc/PID/maps shows them.
    Map { start: u64, end: u64 },
    /// The executable.
    Exe,
}

impl Link {
    fn of(self, pid: i32) -> String {
        match self {
            Link::Fd(fd) => format!("/proc/{pid}/fd/{fd}"),
            Link::Map { start, end } => format!("/proc/{pid}/map_files/{start:x}-{end:x}"),
            Link::Exe => format!("/proc/{pid}/exe"),
        }
    }

    fn obstacle(self, path: &FilePath, why: &str, remedy: &str) -> Error {
        let object = match self {
            Link::Fd(fd) => format!("fd {fd} {path}"),
            Link::Map { .. } => format!("mapping {path}"),
            Link::Exe => format!("executable {path}"),
        };
        Error::Refused(vec![Obstacle::new(object, why, remedy)])
    }
}

/// What the process does with a file through a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Exe,
    Mapped,
    Read,
    Written,
}

impl Uses {
    fn add(&mut self, how: Use) {
        match how {
            Use::Exe => self.exe = true,
            Use::Mapped => self.mapped = true,
            Use::Read => self.read = true,
            Use::Written => self.written = true,
        }
    }
}

struct Held {
    pinned: Pinned,
    uses: Uses,
    identity: Option<(Identity, Stamp)>,
}

/// The files of one process, held so that none can be exchanged for another
/// under our hands.
pub struct Sources {
    pid: i32,
    boot: String,
    held: BTreeMap<FilePath, Held>,
}

impl Sources {
    /// # Errors
    /// Where the kernel does not give its boot id.
    pub fn new(pid: i32) -> Result<Sources> {
        Ok(Sources {
            pid,
            boot: boot_id()?,
            held: BTreeMap::new(),
        })
    }

    /// Notes the files of all descriptors; says whether anything new was learnt.
    /// What is known already costs nothing.
    ///
    /// # Errors
    /// As [`Sources::add`], with all obstacles at once.
    pub fn add_open(&mut self, files: &[OpenFile]) -> Result<bool> {
        let mut new = false;
        let mut obstacles = Vec::new();
        for file in files {
            let how = if file.writable {
                Use::Written
            } else {
                Use::Read
            };
            if self.knows(file, how) {
                continue;
            }
            match self.add(Link::Fd(file.fd), &file.path, how) {
                Ok(learnt) => new |= learnt,
                Err(Error::Refused(o)) => obstacles.extend(o),
                Err(e) => return Err(e),
            }
        }
        if obstacles.is_empty() {
            Ok(new)
        } else {
            Err(Error::Refused(obstacles))
        }
    }

    fn knows(&self, file: &OpenFile, how: Use) -> bool {
        self.held.get(&file.path).is_some_and(|held| {
            held.pinned.stat().st_ino == file.ino && {
                let mut uses = held.uses;
                uses.add(how);
                uses == held.uses
            }
        })
    }

    /// Notes that the process uses the file `path`, reached through `link`; says
    /// whether anything new was learnt. The file's content is not looked at yet.
    ///
    /// # Errors
    /// [`Error::Refused`] where the path leads to another file, or to one that
    /// cannot be carried.
    pub fn add(&mut self, link: Link, path: &FilePath, how: Use) -> Result<bool> {
        let pinned = Pinned::by_link(&link.of(self.pid))?;
        let refuse = |why, remedy| Err(link.obstacle(path, why, remedy));
        if pinned.file_type() != libc::S_IFREG || pinned.is_special().context("look at", path)? {
            return refuse("is no regular file", "let the program close it first");
        }
        if pinned.stat().st_nlink == 0 {
            return refuse(
                "is a deleted file, which no name leads to",
                "let the program close it first",
            );
        }
        if !Pinned::by_path(path).is_ok_and(|named| named.is_same_file(&pinned)) {
            return refuse(
                "its name leads to another file now",
                "put the file back under its name, or let the program open it again",
            );
        }
        let held = match self.held.entry(path.clone()) {
            std::collections::btree_map::Entry::Occupied(e) => {
                let held = e.into_mut();
                if !held.pinned.is_same_file(&pinned) {
                    return refuse(
                        "was replaced by another file while the process was being moved",
                        "try again",
                    );
                }
                held
            }
            std::collections::btree_map::Entry::Vacant(e) => e.insert(Held::new(pinned)),
        };
        let before = held.uses;
        held.uses.add(how);
        let new = before != held.uses;
        if new {
            held.identity = None;
        }
        Ok(new)
    }

    /// Reads the files whose content must be known, and describes all of them.
    /// Takes as long as reading and hashing them takes; only once for each.
    ///
    /// # Errors
    /// Where one cannot be read, or changes while it is.
    pub fn describe(&mut self) -> Result<FileSet> {
        let mut files = Vec::with_capacity(self.held.len());
        for (path, held) in &mut self.held {
            let stat = held.pinned.stat_now().context("stat", path)?;
            let stamp = Stamp::of(&stat);
            let identity = match &held.identity {
                Some((identity, then)) if held.uses.written || *then == stamp => identity.clone(),
                _ => {
                    let identity = Identity::of(&held.pinned, held.uses, path)?;
                    held.identity = Some((identity.clone(), stamp));
                    identity
                }
            };
            files.push(FileRef {
                path: path.clone(),
                uses: held.uses,
                stamp,
                allocated: (stat.st_blocks.max(0) as u64).saturating_mul(512),
                mode: stat.st_mode & 0o7777,
                uid: stat.st_uid,
                gid: stat.st_gid,
                identity,
            });
        }
        Ok(FileSet {
            boot: self.boot.clone(),
            files,
        })
    }

    /// Files that are only read, and that somebody has changed since they were
    /// described: what the target compared is no longer true.
    ///
    /// # Errors
    /// Where one cannot be looked at.
    pub fn changed(&self) -> Result<Vec<&FilePath>> {
        let mut changed = Vec::new();
        for (path, held) in self.held.iter().filter(|(_, h)| !h.uses.written) {
            let now = Stamp::of(&held.pinned.stat_now().context("stat", path)?);
            // A new name or owner changes the ctime alone.
            let same = |a: &Stamp, b: &Stamp| a.size == b.size && a.mtime == b.mtime;
            if !held
                .identity
                .as_ref()
                .is_some_and(|(_, then)| same(then, &now))
            {
                changed.push(path);
            }
        }
        Ok(changed)
    }

    /// A sender of a file that is among these.
    ///
    /// # Errors
    /// Where it is not, or cannot be opened.
    pub fn shipment(&self, path: &FilePath) -> Result<Shipment> {
        let held = self
            .held
            .get(path)
            .ok_or_else(|| Error::bad(path, "is no file of the process"))?;
        Shipment::open(&held.pinned, path)
    }

    /// What the ledger should remember of a file that was shipped, as it is now.
    ///
    /// # Errors
    /// Where it is not among these, or cannot be looked at.
    pub fn stamp(&self, path: &FilePath) -> Result<Stamp> {
        let held = self
            .held
            .get(path)
            .ok_or_else(|| Error::bad(path, "is no file of the process"))?;
        Ok(Stamp::of(&held.pinned.stat_now().context("stat", path)?))
    }
}

impl Held {
    fn new(pinned: Pinned) -> Held {
        Held {
            pinned,
            uses: Uses::default(),
            identity: None,
        }
    }
}
