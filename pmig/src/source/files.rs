//! The program's files: which there are, and sending those that the target has
//! not.

use std::collections::BTreeSet;

use super::{answer, unexpected, Run};
use crate::error::{Error, Obstacle, Result};
use crate::image::Shipped;
use crate::journal;
use crate::protocol::message::{ToSource, ToTarget};
use crate::protocol::Wire;
use crate::report::Event;
use crate::state::files::{FileSet, Ledger, Leftover, Link, Shipment, Sources, Use};
use crate::state::memory::{Layout, MappedFile};
use crate::state::objects::OpenFile;
use crate::state::paths::FilePath;

/// What was looked at already.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    Exe(FilePath),
    Mapped((u32, u32), u64, FilePath),
    Open(i32, u64, FilePath, bool),
}

pub(super) struct SourceFiles {
    sources: Sources,
    seen: BTreeSet<Seen>,
    /// As last described.
    set: Option<FileSet>,
    shipments: Vec<Shipment>,
    /// Bytes that the next pass may have to send.
    first: u64,
}

impl SourceFiles {
    pub fn new(pid: i32) -> Result<SourceFiles> {
        Ok(SourceFiles {
            sources: Sources::new(pid)?,
            seen: BTreeSet::new(),
            set: None,
            shipments: Vec::new(),
            first: 0,
        })
    }

    /// Notes what the program uses now; says whether there is anything new.
    pub fn note(&mut self, exe: &FilePath, layout: &Layout, open: &[OpenFile]) -> Result<bool> {
        let mut new = false;
        let mut obstacles = Vec::new();
        let mut add = |seen: Seen, link: Link, path: &FilePath, how: Use| {
            if !self.seen.insert(seen) {
                return Ok(());
            }
            match self.sources.add(link, path, how) {
                Ok(learnt) => new |= learnt,
                Err(Error::Refused(more)) => obstacles.extend(more),
                Err(e) => return Err(e),
            }
            Ok(())
        };
        add(Seen::Exe(exe.clone()), Link::Exe, exe, Use::Exe)?;
        for file in &layout.files {
            let path = path_of(file)?;
            let (start, end) = bounds(&file.link)?;
            let seen = Seen::Mapped(file.dev, file.inode, path.clone());
            add(seen, Link::Map { start, end }, &path, Use::Mapped)?;
        }
        for open in open {
            let how = if open.writable {
                Use::Written
            } else {
                Use::Read
            };
            let seen = Seen::Open(open.fd, open.ino, open.path.clone(), open.writable);
            add(seen, Link::Fd(open.fd), &open.path, how)?;
        }
        if obstacles.is_empty() {
            Ok(new)
        } else {
            Err(Error::Refused(obstacles))
        }
    }

    /// Describes all that was noted; reads and hashes what is new.
    pub fn describe(&mut self) -> Result<FileSet> {
        let set = self.sources.describe()?;
        self.set = Some(set.clone());
        Ok(set)
    }

    /// The target wants these files of the set described last.
    pub fn plan(&mut self, ship: &[u32]) -> Result<()> {
        let set = self.set.iter().flat_map(|s| &s.files).collect::<Vec<_>>();
        for &n in ship {
            let file = set
                .get(n as usize)
                .ok_or_else(|| Error::bad("target", "wants a file that there is not"))?;
            self.first += file.stamp.size;
            self.shipments.push(self.sources.shipment(&file.path)?);
        }
        Ok(())
    }

    /// Bytes that the next pass is expected to send.
    pub fn pending(&self) -> u64 {
        self.first
    }

    /// Sends what changed since the last pass.
    pub fn pass(&mut self, wire: &mut Wire) -> Result<u64> {
        let shipped = self.send(wire, &mut || Ok(()))?;
        for (n, s) in shipped.iter().enumerate() {
            wire.send(&ToTarget::PassEnd {
                file: n as u32,
                size: s.size,
            })?;
        }
        self.first = 0;
        Ok(shipped.iter().map(|s| s.sent).sum())
    }

    /// What the target has of its own must still be what the program has here.
    ///
    /// # Errors
    /// [`Error::Refused`], naming what is not.
    pub fn check_unchanged(&self) -> Result<()> {
        let changed = self.sources.changed()?;
        if changed.is_empty() {
            return Ok(());
        }
        let obstacle = |path| {
            Obstacle::new(
                path,
                "somebody changed it while the program was being copied",
                "try again",
            )
        };
        Err(Error::Refused(changed.into_iter().map(obstacle).collect()))
    }

    /// Sends the rest, while the program does not write; something must be sent right
    /// behind it. `alive` is called again and again.
    pub fn send(
        &mut self,
        wire: &mut Wire,
        alive: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<Shipped>> {
        let mut all = Vec::with_capacity(self.shipments.len());
        for (n, shipment) in self.shipments.iter_mut().enumerate() {
            alive()?;
            let pass = shipment.pass(|offset, bytes| {
                alive()?;
                let head = ToTarget::Block {
                    file: n as u32,
                    offset,
                    len: bytes.len() as u32,
                };
                wire.queue_with(&head, bytes)
            })?;
            all.push(Shipped {
                sent: pass.sent,
                size: pass.size,
                mtime: pass.mtime,
            });
        }
        Ok(all)
    }

    /// Notes what stays here of the shipped files, so that the program finds
    /// its place again when it comes back.
    pub fn left_behind(&self, lineage: &str) -> Result<()> {
        let left = self
            .shipments
            .iter()
            .map(|s| {
                Ok(Leftover {
                    path: s.path().clone(),
                    stamp: self.sources.stamp(s.path())?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        if left.is_empty() {
            return Ok(());
        }
        Ledger::open(&journal::state_dir().join("leftovers"))?.record(lineage, &left)
    }
}

impl Run<'_> {
    /// Notes what stays here of the shipped files.
    pub(super) fn note_left_behind(&mut self) {
        if let Err(error) = self.files.left_behind(&self.preview.lineage) {
            self.progress.event(&Event::Note {
                text: format!("what was left behind could not be noted: {error}"),
            });
        }
    }

    /// Tells the target of files that are new, and hears which to send.
    pub(super) fn sync_files(&mut self, layout: &Layout, open: &[OpenFile]) -> Result<()> {
        if !self.files.note(&self.preview.exe, layout, open)? {
            return Ok(());
        }
        let set = self.files.describe()?;
        self.wire.send(&ToTarget::Files(set))?;
        match answer(&mut self.wire)? {
            ToSource::Ship(wanted) => self.files.plan(&wanted),
            other => Err(unexpected(&self.wire, &other)),
        }
    }
}

fn path_of(file: &MappedFile) -> Result<FilePath> {
    use std::os::unix::ffi::OsStrExt;
    FilePath::new(file.path.as_os_str().as_bytes())
}

fn bounds(link: &str) -> Result<(u64, u64)> {
    link.split_once('-')
        .and_then(|(a, b)| {
            let hex = |s| u64::from_str_radix(s, 16).ok();
            Some((hex(a)?, hex(b)?))
        })
        .ok_or_else(|| Error::bad("mapping", "has impossible bounds"))
}
