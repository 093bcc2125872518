//! The program's files at the target: which are there, and taking in those
//! that are not.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;

use crate::error::{Context, Error, Result};
use crate::image::Shipped;
use crate::journal;
use crate::policy::Policy;
use crate::protocol::message::Hello;
use crate::state::files::{compare, FileRef, FileSet, Ledger, Plan, Receiver, Stamp};
use crate::state::memory::{file_of, Layout, Step};
use crate::state::objects::Opener;
use crate::state::paths::FilePath;

pub(super) struct TargetFiles {
    opener: Opener,
    receiver: Receiver,
    ship: bool,
    ledger: Ledger,
    lineage: String,
    /// Being received, or about to.
    known: BTreeSet<FilePath>,
    wanted: Vec<(FileRef, Option<Stamp>)>,
}

impl TargetFiles {
    pub fn new(hello: &Hello, policy: &Policy) -> Result<TargetFiles> {
        Ok(TargetFiles {
            opener: Opener::new(policy.roots.clone()),
            receiver: Receiver::new(hello.id, policy.ship),
            ship: hello.ship,
            ledger: Ledger::open(&journal::state_dir().join("leftovers"))?,
            lineage: hello.preview.lineage.clone(),
            known: BTreeSet::new(),
            wanted: Vec::new(),
        })
    }

    /// Looks which files are here; returns the places in the set of those that
    /// are to be sent and were not asked for before.
    pub fn compare(&mut self, set: &FileSet) -> Result<Vec<u32>> {
        let leftovers = Some((&self.ledger, self.lineage.as_str()));
        let known = &self.known;
        let mut fresh = set.clone();
        let places: Vec<u32> = (0u32..)
            .zip(&set.files)
            .filter(|(_, f)| !known.contains(&f.path))
            .map(|(n, _)| n)
            .collect();
        fresh.files.retain(|f| !known.contains(&f.path));
        let plans = compare(&fresh, &mut self.opener, self.ship, leftovers)?;
        let mut wanted = Vec::new();
        for ((plan, file), n) in plans.into_iter().zip(fresh.files).zip(places) {
            if let Plan::Ship { replace } = plan {
                wanted.push(n);
                self.known.insert(file.path.clone());
                self.wanted.push((file, replace));
            }
        }
        Ok(wanted)
    }

    /// Makes the temporary files for what was asked for, and notes them for
    /// whoever may have to put them in place.
    pub fn create(&mut self, record: &journal::Husk) -> Result<()> {
        if self.wanted.is_empty() {
            return Ok(());
        }
        for (file, replace) in std::mem::take(&mut self.wanted) {
            self.receiver.create(&file, replace, &mut self.opener)?;
        }
        let noted = serde_json::to_value(self.receiver.pending())
            .map_err(|e| Error::bad("list of files", e))?;
        record.note_files(&noted)
    }

    pub fn opener(&self) -> &Opener {
        &self.opener
    }

    /// Opens a file for reading.
    pub fn open(&self, path: &FilePath) -> Result<OwnedFd> {
        self.opener
            .regular(path)?
            .open(OFlag::O_RDONLY)
            .context("open", path)
    }

    /// Opens the files of a layout that are not open yet.
    pub fn open_mapped(&self, layout: &Layout, open: &mut BTreeMap<u32, OwnedFd>) -> Result<()> {
        use std::os::unix::ffi::OsStrExt;
        for vma in &layout.vmas {
            let Some(n) = file_of(&Step::Map(vma.clone())) else {
                continue;
            };
            if open.contains_key(&n) {
                continue;
            }
            let path = &layout.files[n as usize].path;
            let path = FilePath::new(path.as_os_str().as_bytes())?;
            open.insert(n, self.open(&path)?);
        }
        Ok(())
    }

    pub fn write(&mut self, file: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        self.receiver.write(file as usize, offset, bytes)
    }

    pub fn end_pass(&mut self, file: u32, size: u64) -> Result<()> {
        self.receiver.end_pass(file as usize, size)
    }

    /// All content has come.
    pub fn finish(&mut self, shipped: &[Shipped]) -> Result<()> {
        for (n, s) in shipped.iter().enumerate() {
            self.receiver.finish(n, s.size, s.mtime)?;
        }
        Ok(())
    }

    pub fn check(&self) -> Result<()> {
        self.receiver.check()
    }

    pub fn place(&mut self) -> Result<()> {
        self.receiver.place()
    }

    /// What the program's files replaced goes.
    pub fn clear(&self) -> Result<()> {
        self.receiver.clear()
    }

    /// What the program left here earlier is replaced now, or is no longer
    /// what it left.
    pub fn forget_leftovers(&self) {
        if let Err(e) = self.ledger.forget(&self.lineage) {
            tracing::warn!("{e}");
        }
    }

    pub fn keep(&mut self) {
        self.receiver.keep();
    }

    pub fn sync(&self) {
        if let Err(e) = self.receiver.sync() {
            tracing::warn!("shipped files may be lost with the machine: {e}");
        }
    }
}
