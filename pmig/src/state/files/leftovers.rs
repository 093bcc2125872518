//! What was left behind when a program moved away: files that it may find
//! again, and replace, when it comes back, as long as nobody changed them.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Stamp, MAX_FILES};
use crate::error::{Context, Error, Result};
use crate::state::paths::FilePath;

/// The most programs that are remembered; the longest forgotten goes first.
const MAX_LINEAGES: usize = 256;

/// The most bytes a program's record may take.
const MAX_RECORD: u64 = 64 << 20;

/// A file that was left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftover {
    pub path: FilePath,
    pub stamp: Stamp,
}

/// What one program left here, read once it is asked for.
pub(super) struct Left<'a> {
    /// Whose.
    of: Option<(&'a Ledger, &'a str)>,
    known: Option<BTreeMap<FilePath, Vec<Stamp>>>,
}

impl<'a> Left<'a> {
    /// What the program of that lineage left; none is told of no program.
    pub fn by(of: Option<(&'a Ledger, &'a str)>) -> Left<'a> {
        Left { of, known: None }
    }

    /// Whether a file that stands here is one the program left, exactly as it
    /// left it.
    ///
    /// # Errors
    /// As [`Ledger::read`].
    pub fn has(&mut self, path: &FilePath, now: &Stamp) -> Result<bool> {
        let Some((ledger, lineage)) = self.of else {
            return Ok(false);
        };
        if self.known.is_none() {
            let mut known: BTreeMap<FilePath, Vec<Stamp>> = BTreeMap::new();
            for left in ledger.read(lineage)? {
                known.entry(left.path).or_default().push(left.stamp);
            }
            self.known = Some(known);
        }
        let left = self.known.as_ref().and_then(|known| known.get(path));
        Ok(left.is_some_and(|stamps| stamps.contains(now)))
    }
}

/// A directory of records, one for each program that moved away.
pub struct Ledger {
    dir: PathBuf,
}

impl Ledger {
    /// Opens the ledger in a directory, which is made if it is not there.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub fn open(dir: &Path) -> Result<Ledger> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .context("make", dir.display())?;
        Ok(Ledger { dir: dir.into() })
    }

    /// A lineage names a program across its moves: lower-case hex digits.
    fn record_of(&self, lineage: &str) -> Result<PathBuf> {
        let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if lineage.is_empty() || lineage.len() > 64 || !lineage.bytes().all(hex) {
            return Err(Error::bad("lineage", "is not a name of a program"));
        }
        Ok(self.dir.join(lineage))
    }

    /// Remembers what a program left here, instead of what it left before.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn record(&self, lineage: &str, left: &[Leftover]) -> Result<()> {
        let record = self.record_of(lineage)?;
        if left.len() > MAX_FILES {
            return Err(Error::bad("ledger", "too many files were left behind"));
        }
        let text = serde_json::to_vec(left).map_err(|e| Error::bad("ledger", e))?;
        let new = self.dir.join(format!(".{lineage}.new"));
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(&text)?;
            file.sync_data()?;
            fs::rename(&new, &record)
        };
        write().context("write", record.display())?;
        self.forget_oldest()
    }

    /// What a program left here.
    ///
    /// # Errors
    /// Where the record is there but cannot be read.
    pub fn read(&self, lineage: &str) -> Result<Vec<Leftover>> {
        let record = self.record_of(lineage)?;
        let file = match File::open(&record) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.context("open", record.display())?,
        };
        let mut text = Vec::new();
        file.take(MAX_RECORD)
            .read_to_end(&mut text)
            .context("read", record.display())?;
        serde_json::from_slice(&text).map_err(|e| Error::bad(record.display(), e))
    }

    /// Forgets what a program left.
    ///
    /// # Errors
    /// Where the record cannot be removed.
    pub fn forget(&self, lineage: &str) -> Result<()> {
        let record = self.record_of(lineage)?;
        match fs::remove_file(&record) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.context("remove", record.display()),
        }
    }

    fn forget_oldest(&self) -> Result<()> {
        let list = || -> io::Result<Vec<_>> {
            let mut found = Vec::new();
            for entry in fs::read_dir(&self.dir)? {
                let entry = entry?;
                found.push((entry.metadata()?.modified()?, entry.path()));
            }
            Ok(found)
        };
        let mut records = list().context("read", self.dir.display())?;
        records.sort();
        let surplus = records.len().saturating_sub(MAX_LINEAGES);
        for (_, path) in records.into_iter().take(surplus) {
            // Another pmig may have been first.
            let _ = fs::remove_file(path);
        }
        Ok(())
    }
}
