//! One migration's records on one side: where they lie, who has them locked, and
//! how its fate is decided.

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::Serialize;

use super::store::{Folder, Prepared};
use super::{
    boot_id, fates, folder, json, now, read, run_dir, start_of, New, Record, Role, VERSION,
};
use crate::error::{Error, Result};
use crate::id::Id;

/// The decision against the move, written ahead of time.
const AGAINST: &str = "aborted";

/// A directory of a migration, opened.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) folder: Folder,
    /// Where its fate is decided, if that is of this boot.
    fates: Option<Folder>,
    pub(super) record: Record,
    /// The decision for the program's move, written ahead of time by who may
    /// have to take it while the program stands still.
    prepared: Option<Prepared>,
    /// Nobody else works on it.
    alone: bool,
    /// None where the fate is only looked up or decided beside a live owner.
    _lock: Option<Flock<std::os::fd::OwnedFd>>,
}

impl Entry {
    /// Records ARMED, with what [`Entry::decide_as_prepared`] decides made ready.
    /// `otherwise` is decided if the other way is taken and there is no room left to
    /// say why.
    pub(super) fn create<T: Serialize>(
        role: Role,
        new: New,
        wish: &T,
        otherwise: &T,
    ) -> Result<Entry> {
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
        fates.replace(AGAINST, &json(otherwise)?, false)?;
        let prepared = fates.prepare(&json(wish)?)?;
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
            prepared: Some(prepared),
            alone: false,
            _lock: lock,
        })
    }

    /// What was decided, if anything was.
    ///
    /// # Errors
    /// Among others, [`Entry::lost`].
    pub(super) fn fate<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        // As long as this boot lasts it stays where it was decided.
        for place in self.fates.iter().chain([&self.folder]) {
            if let Some(fate) = read(place, "fate")? {
                return Ok(Some(fate));
            }
        }
        self.not_lost().map(|()| None)
    }

    /// Whether nobody can read there any more what was decided, if anything was:
    /// where it was to be decided all is gone, though the machine is up since.
    pub(super) fn lost(&self) -> Result<bool> {
        if !self.this_boot()? || self.folder.has("fate")? || self.settled()? {
            return Ok(false);
        }
        // One of them is there at any time: in this order, for the one may become the
        // other.
        match &self.fates {
            Some(fates) => Ok(!fates.has(AGAINST)? && !fates.has("fate")?),
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
    pub(super) fn decide_what_is_lost(&self, wish: &impl Serialize) -> Result<bool> {
        self.folder.decide("fate", &json(wish)?)
    }

    /// Puts a decision there by `put`, unless one was taken; whether it won.
    fn decide_by(&self, put: impl FnOnce(&Folder) -> Result<bool>) -> Result<bool> {
        if self.folder.has("fate")? {
            return Ok(false);
        }
        self.not_lost()?;
        // Nothing that stands still is of another boot.
        put(self.fates.as_ref().unwrap_or(&self.folder))
    }

    /// Decides the fate, unless it is decided; whether it won.
    pub(super) fn decide(&self, wish: &impl Serialize) -> Result<bool> {
        let wish = json(wish)?;
        self.decide_by(|fates| fates.decide("fate", &wish))
    }

    /// Decides against the move: that must be possible on a full disk too.
    pub(super) fn decide_against(&self, wish: &impl Serialize) -> Result<bool> {
        self.decide(wish).or_else(|e| {
            let written = self.decide_by(|fates| fates.put_as(AGAINST, "fate"));
            written.map_err(|_| e)
        })
    }

    /// The same, by what was written ahead of time if there is such.
    pub(super) fn decide_as_prepared(&self, wish: &impl Serialize) -> Result<bool> {
        match (&self.prepared, &self.fates) {
            // It cannot be put where all is lost: it would be lost itself.
            (Some(prepared), Some(fates)) => fates
                .put(prepared, "fate")
                .or_else(|e| self.not_lost().and(Err(e))),
            _ => self.decide(wish),
        }
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
            prepared: None,
            alone,
            _lock: lock,
        }))
    }

    pub(super) fn this_boot(&self) -> Result<bool> {
        Ok(self.record.boot_id == boot_id()?)
    }

    pub(super) fn settle(&self) -> Result<()> {
        if let Some(fates) = &self.fates {
            // What was decided is asked for after a boot too. Here it stays as well:
            // somebody may be about to decide.
            match fates.read("fate")? {
                Some(fate) if !self.folder.has("fate")? => {
                    self.folder.replace("fate", &fate, false)?;
                }
                _ => {}
            }
            if let Some(prepared) = &self.prepared {
                fates.discard(prepared)?;
            }
            fates.forget(AGAINST)?;
        }
        self.folder.forget("input")?;
        self.folder.decide("settled", b"{}\n").map(drop)
    }

    pub(super) fn settled(&self) -> Result<bool> {
        self.folder.has("settled")
    }
}
