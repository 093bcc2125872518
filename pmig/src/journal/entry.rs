//! One migration's records on one side: where they lie, who has them locked, and
//! how its fate is decided.

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::store::Folder;
use super::{
    boot_id, fates, folder, json, now, read, run_dir, start_of, New, Record, Role, VERSION,
};
use crate::error::{Error, Result};
use crate::id::Id;

/// Where nothing is decided there is this file, and who decides renames it: it takes no
/// room, and where it is gone nobody can.
const UNDECIDED: &str = "undecided";

/// Beside it: why what was aborted was.
const WHY: &str = "why";

/// Why something was aborted where there was no room to write why.
const UNSAID: &str = "why could not be written down";

/// What is decided of a migration on one side. The first is final.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Decision {
    /// At the source: the order is given.
    Committing,
    /// At the target: it runs there.
    Committed,
    Aborted {
        why: String,
    },
}

impl Decision {
    /// What the undecided becomes.
    fn name(&self) -> &'static str {
        match self {
            Decision::Committing => "committing",
            Decision::Committed => "committed",
            Decision::Aborted { .. } => "aborted",
        }
    }

    pub(super) fn aborted(why: &str) -> Decision {
        Decision::Aborted { why: why.into() }
    }

    fn read(fates: &Folder) -> Result<Option<Decision>> {
        let all = [Decision::Committing, Decision::Committed];
        for one in all.into_iter().chain([Decision::aborted(UNSAID)]) {
            if !fates.has(one.name())? {
                continue;
            }
            return Ok(Some(match (one, fates.read(WHY)?) {
                (Decision::Aborted { .. }, Some(why)) => {
                    Decision::aborted(&String::from_utf8_lossy(&why))
                }
                (one, _) => one,
            }));
        }
        Ok(None)
    }
}

/// A directory of a migration, opened.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) folder: Folder,
    /// Where its fate is decided, if that is of this boot.
    fates: Option<Folder>,
    pub(super) record: Record,
    /// Nobody else works on it.
    alone: bool,
    /// None where the fate is only looked up or decided beside a live owner.
    _lock: Option<Flock<std::os::fd::OwnedFd>>,
}

impl Entry {
    /// Records ARMED.
    pub(super) fn create(role: Role, new: New) -> Result<Entry> {
        let all = folder(role)?;
        let name = new.id.to_string();
        let known = || {
            Error::bad(
                format!("migration {}", new.id),
                format!(
                    "this machine has a record of it as its {} already",
                    role.name()
                ),
            )
        };
        let folder = all.make(&name)?.ok_or_else(known)?;
        // Without a record they are nobody's, and go with age.
        let fates = fates(role)?.make(&name)?.ok_or_else(known)?;
        fates.replace(UNDECIDED, b"", false)?;
        let lock = folder.lock(FlockArg::LockSharedNonblock)?;
        let record = Record {
            version: VERSION,
            role,
            id: new.id,
            secret: new.secret,
            boot_id: boot_id()?,
            start: start_of(new.pid)?,
            pid: new.pid,
            comm: new.comm,
            peer: new.peer,
            addr: new.addr,
            place: new.place,
            time: now(),
        };
        folder.replace("record", &json(&record)?, true)?;
        all.sync()?;
        Ok(Entry {
            folder,
            fates: Some(fates),
            record,
            alone: false,
            _lock: lock,
        })
    }

    /// What was decided, if anything was.
    ///
    /// # Errors
    /// Among others, [`Entry::lost`].
    pub(super) fn decided(&self) -> Result<Option<Decision>> {
        // As long as this boot lasts it stays where it was decided.
        if let Some(fates) = &self.fates {
            if let Some(decision) = Decision::read(fates)? {
                return Ok(Some(decision));
            }
        }
        let decision = read(&self.folder, "fate")?;
        if decision.is_none() {
            self.not_lost()?;
        }
        Ok(decision)
    }

    /// Whether nobody can read any more what was decided, if anything was: the place is
    /// gone where it was to be decided, though the machine is up since.
    pub(super) fn lost(&self) -> Result<bool> {
        if !self.this_boot()? || self.folder.has("fate")? || self.settled()? {
            return Ok(false);
        }
        match &self.fates {
            // In this order, for the one becomes the other.
            Some(fates) => Ok(!fates.has(UNDECIDED)? && Decision::read(fates)?.is_none()),
            None => Ok(true),
        }
    }

    pub(super) fn is_alone(&self) -> bool {
        self.alone
    }

    pub(super) fn not_lost(&self) -> Result<()> {
        match self.lost()? {
            false => Ok(()),
            true => Err(Error::bad(
                run_dir().join("fates").display(),
                format!(
                    "what was decided there on migration {} is gone from it",
                    self.record.id
                ),
            )),
        }
    }

    /// Decides in the records themselves, where the usual place is lost: for whom
    /// nobody else can contradict.
    pub(super) fn decide_what_is_lost(&self, wish: &Decision) -> Result<bool> {
        self.folder.decide("fate", &json(wish)?)
    }

    /// Decides the fate, unless it is decided; whether it won.
    ///
    /// # Errors
    /// Among others, [`Entry::lost`].
    pub(super) fn decide(&self, wish: &Decision) -> Result<bool> {
        let Some(fates) = &self.fates else {
            self.not_lost()?;
            // Nothing that stands still is of another boot.
            return match self.this_boot()? {
                true => self.was_decided().map(|()| false),
                false => self.folder.decide("fate", &json(wish)?),
            };
        };
        if let Decision::Aborted { why } = wish {
            if fates.has(UNDECIDED)? {
                // It must be possible on a full disk too.
                let _ = fates.replace(WHY, why.as_bytes(), false);
            }
        }
        let won = fates.rename(UNDECIDED, wish.name())?;
        if !won {
            self.was_decided()?;
        }
        Ok(won)
    }

    fn was_decided(&self) -> Result<()> {
        match self.decided()? {
            Some(_) => Ok(()),
            None => Err(Error::bad(
                format!("migration {}", self.record.id),
                "is settled, and nothing can be decided any more",
            )),
        }
    }

    /// Decides against the move from the one process that alone could have decided for
    /// it, and has not: good where the place of decision is lost, too.
    pub(super) fn withdraw(&self, wish: &Decision) -> Result<bool> {
        // It may be lost at any moment.
        self.decide(wish).or_else(|e| match self.lost()? {
            true => self.decide_what_is_lost(wish),
            false => Err(e),
        })
    }

    pub(super) fn open(
        folder: Folder,
        role: Role,
        id: Id,
        lock: Option<FlockArg>,
    ) -> Result<Option<Entry>> {
        let alone = lock == Some(FlockArg::LockExclusiveNonblock);
        let lock = match lock {
            Some(how) => match folder.lock(how)? {
                Some(lock) => Some(lock),
                None => return Ok(None),
            },
            None => None,
        };
        let record: Record = read(&folder, "record")?
            .ok_or_else(|| Error::bad(folder.path().display(), "has no record"))?;
        if record.version != VERSION || record.id != id || record.role != role {
            return Err(Error::bad(
                folder.path().join("record").display(),
                "is not the record of this migration, or of another version",
            ));
        }
        // Where those of another boot are still there, they may be half written.
        let fates = match record.boot_id == boot_id()? {
            true => fates(role)?.find(&id.to_string())?,
            false => None,
        };
        Ok(Some(Entry {
            folder,
            fates,
            record,
            alone,
            _lock: lock,
        }))
    }

    pub(super) fn this_boot(&self) -> Result<bool> {
        Ok(self.record.boot_id == boot_id()?)
    }

    /// Where it is asked for after a boot, and stays whatever becomes of the place of
    /// decision. `known`: what was decided, if the caller knows.
    pub(super) fn keep(&self, known: Option<&Decision>) -> Result<()> {
        if self.folder.has("fate")? {
            return Ok(());
        }
        let there = self.fates.as_ref().map(Decision::read).transpose()?;
        match there.flatten().as_ref().or(known) {
            Some(decision) => self.folder.replace("fate", &json(decision)?, false),
            None => Ok(()),
        }
    }

    /// Nothing more is to be done.
    pub(super) fn settle(&self, known: Option<&Decision>) -> Result<()> {
        self.keep(known)?;
        if let Some(fates) = &self.fates {
            fates.forget(UNDECIDED)?;
        }
        self.folder.forget("input")?;
        self.folder.decide("settled", b"{}\n").map(drop)
    }

    pub(super) fn settled(&self) -> Result<bool> {
        self.folder.has("settled")
    }
}
