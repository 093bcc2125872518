//! The target's record: ARMED, then the first of COMMITTED and ABORTED.

use std::sync::Arc;

use nix::fcntl::FlockArg;

use super::entry::{Decision, Entry};
use super::{claim, folder, json, read, Found, New, Order, Record, Role};
use crate::error::{Error, Result};
use crate::hold::{Frozen, Hold};
use crate::id::{Id, Secret};
use crate::transport::Addr;

/// ARMED: a husk that may yet become the program.
#[derive(Debug, Clone)]
pub struct Husk(Arc<Entry>);

/// A copy of which nobody can tell any more whether it was to run here: the place of
/// decision is lost. A person has to know.
#[derive(Debug)]
pub struct Strayed(Husk);

/// COMMITTED won: it runs here, or is about to.
#[derive(Debug, Clone)]
pub struct Committed(Arc<Entry>);

/// ABORTED won: it must never run here.
#[derive(Debug, Clone)]
pub struct Aborted(Arc<Entry>);

/// ABORTED is recorded and the husk is dead: the only thing that lets anyone
/// say "it never ran here".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NeverRan(());

impl NeverRan {
    /// The target has told so.
    pub(crate) fn told() -> NeverRan {
        NeverRan(())
    }
}

/// Which of the two won.
#[derive(Debug, Clone)]
pub enum Fate {
    Committed(Committed),
    Aborted(Aborted),
}

/// What is known here of a migration somebody asks about.
#[derive(Debug)]
pub enum Looked {
    Decided(Fate),
    Undecided(Husk),
    /// Nobody can tell any more whether it was to run here; a session that is alive
    /// may yet say that it was not.
    Lost,
    /// Why nothing can be said.
    Unknown(String),
}

impl Husk {
    /// Records ARMED and syncs it. Before the source freezes.
    ///
    /// # Errors
    /// Fails where the id was used before.
    pub fn arm(new: New) -> Result<Husk> {
        Entry::create(Role::Target, new).map(|e| Husk(Arc::new(e)))
    }

    pub fn record(&self) -> &Record {
        &self.0.record
    }

    pub fn this_boot(&self) -> Result<bool> {
        self.0.this_boot()
    }

    /// Notes what is to be done with files at the commit, for whoever may have
    /// to do it. Replaces what was noted before. Not synced.
    pub fn note_files(&self, files: &serde_json::Value) -> Result<()> {
        self.0.folder.replace("files", &json(files)?, false)
    }

    /// Notes that memory may be missing when it runs. Before that.
    pub fn note_filling(&self) -> Result<()> {
        self.0.folder.replace("fill", b"{}\n", false)
    }

    /// Whether memory of it may be missing.
    pub fn filling(&self) -> Result<bool> {
        self.0.folder.has("fill")
    }

    /// Records COMMITTED for the order of the source, unless ABORTED won
    /// before; says which stands.
    ///
    /// # Errors
    /// Fails where the order is for another migration.
    pub fn commit(&self, order: &Order) -> Result<Fate> {
        let record = self.record();
        if order.id() != record.id || !order.secret().is(&record.secret) {
            return Err(Error::bad("commit", "is for another migration"));
        }
        self.let_run()
    }

    /// A person revives it here.
    pub fn commit_by_hand(&self) -> Result<Fate> {
        self.let_run()
    }

    /// Whether a file was to become it: then nobody else decides.
    pub fn is_from_file(&self) -> bool {
        matches!(self.record().addr, Some(Addr::File(_)))
    }

    /// Records ABORTED, unless COMMITTED won before; says which stands.
    pub fn abort(&self, why: &str) -> Result<Fate> {
        let wish = Decision::aborted(why);
        self.stands(self.0.decide(&wish), &wish)
    }

    /// The same, from the session that alone could have recorded COMMITTED, and has
    /// not: good where the place of decision is lost, too.
    pub fn withdraw(&self, why: &str) -> Result<Fate> {
        let wish = Decision::aborted(why);
        self.stands(self.0.withdraw(&wish), &wish)
    }

    /// Whether nobody can tell any more what was decided, if anything was.
    pub fn lost(&self) -> Result<bool> {
        self.0.lost()
    }

    pub fn settled(&self) -> Result<bool> {
        self.0.settled()
    }

    /// Takes over what nobody can tell any more of whether it was to run here. `None`
    /// if that is not so, or somebody is at work on it.
    pub fn strayed(&self) -> Result<Option<Strayed>> {
        let strayed = self.0.is_alone() && self.0.lost()?;
        Ok(strayed.then(|| Strayed(self.clone())))
    }

    /// Whether it became ready, and is held. Before that it dies with its
    /// session.
    pub fn held(&self) -> Result<bool> {
        match Frozen::open(&self.record().place)? {
            Some(cgroup) => cgroup.holds(),
            None => Ok(false),
        }
    }

    /// Whether nothing is left of it, nor of the program that it became.
    pub fn is_gone(&self) -> Result<bool> {
        let record = self.record();
        let there = match Frozen::open(&record.place)? {
            Some(cgroup) => cgroup.populated()?,
            None => false,
        };
        Ok(!there && !record.lives())
    }

    pub fn fate(&self) -> Result<Option<Fate>> {
        Ok(self.0.decided()?.map(|decision| self.fate_of(&decision)))
    }

    fn fate_of(&self, decision: &Decision) -> Fate {
        match decision {
            Decision::Aborted { .. } => Fate::Aborted(Aborted(self.0.clone())),
            _ => Fate::Committed(Committed(self.0.clone())),
        }
    }

    /// Notes how the program ended that came here.
    pub fn note_end(&self, how: &serde_json::Value) -> Result<()> {
        self.0.folder.replace("ended", &json(how)?, false)
    }

    /// What was noted of its end.
    pub fn end(&self) -> Result<Option<serde_json::Value>> {
        read(&self.0.folder, "ended")
    }

    /// For a record of another boot: whatever it was, it is no more.
    pub fn settle_lost(&self) -> Result<()> {
        self.0.settle(None)
    }

    fn let_run(&self) -> Result<Fate> {
        self.stands(self.0.decide(&Decision::Committed), &Decision::Committed)
    }

    /// What was decided, by whomever: a decision that failed may still have
    /// been made.
    fn stands(&self, won: Result<bool>, wish: &Decision) -> Result<Fate> {
        if let Ok(true) = won {
            // Whatever becomes of where it was written.
            return Ok(self.fate_of(wish));
        }
        match self.fate()? {
            Some(fate) => Ok(fate),
            None => Err(won.err().unwrap_or_else(|| {
                Error::bad(self.0.folder.path().display(), "the record vanished")
            })),
        }
    }
}

impl Strayed {
    /// A person lets it run here.
    pub fn run_here(&self) -> Result<Fate> {
        self.decide(&Decision::Committed)
    }

    /// A person says that it must not run here.
    pub fn drop_it(&self) -> Result<Fate> {
        self.decide(&Decision::aborted("a person said so"))
    }

    fn decide(&self, wish: &Decision) -> Result<Fate> {
        let husk = &self.0;
        husk.stands(husk.0.decide_what_is_lost(wish), wish)
    }

    /// Nothing of it is left: what it was stays unknown.
    pub fn settle(&self) -> Result<()> {
        self.0 .0.settle(None)
    }
}

impl Committed {
    pub fn record(&self) -> &Record {
        &self.0.record
    }

    /// Lets the husk be the program.
    pub fn thaw(&self, husk: Frozen) -> Result<Hold> {
        husk.thaw()
    }

    /// The same for whoever comes later: harmless where it runs already.
    pub fn thaw_again(&self) -> Result<()> {
        if let Some(held) = Frozen::open(&self.record().place)? {
            self.let_live(held.thaw()?);
        }
        Ok(())
    }

    /// It is a program like any other from now on.
    pub fn let_live(&self, running: Hold) {
        if let Err(e) = running.set_memory_max(None) {
            tracing::warn!("the program's memory stays limited: {e}");
        }
        running.leave();
    }

    /// What [`Husk::note_files`] noted.
    pub fn files(&self) -> Result<Option<serde_json::Value>> {
        read(&self.0.folder, "files")
    }

    /// Freezes it again, if it is still there.
    pub fn stop(&self) -> Result<bool> {
        match Frozen::open(&self.record().place)? {
            Some(program) if program.populated()? => program.stop().map(|()| true),
            _ => Ok(false),
        }
    }

    /// Whether memory of the program may still be missing.
    pub fn filling(&self) -> Result<bool> {
        self.0.folder.has("fill")
    }

    /// Nothing is missing any more.
    pub fn filled(&self) -> Result<()> {
        self.0.folder.forget("fill")
    }

    pub fn settled(&self) -> Result<bool> {
        self.0.settled()
    }

    /// Writes that down where it stays, whatever becomes of the place of decision.
    pub fn keep(&self) -> Result<()> {
        self.0.keep(Some(&Decision::Committed))
    }

    /// It runs, its files are in place, nothing more is to be done.
    pub fn settle(&self) -> Result<()> {
        self.0.settle(Some(&Decision::Committed))
    }
}

impl Aborted {
    pub fn record(&self) -> &Record {
        &self.0.record
    }

    /// What [`Husk::note_files`] noted: shipped files that must go.
    pub fn files(&self) -> Result<Option<serde_json::Value>> {
        read(&self.0.folder, "files")
    }

    /// Kills what there is of the husk and sees that it is gone.
    pub fn bury(&self) -> Result<NeverRan> {
        if let Some(held) = Frozen::open(&self.record().place)? {
            held.kill()?;
        }
        Ok(NeverRan(()))
    }

    /// The husk is dead, its files are gone, nothing more is to be done.
    pub fn settle(&self) -> Result<()> {
        self.0.settle(Some(&Decision::aborted("it was ended")))
    }
}

/// Looks up what is known of a migration, for somebody who quotes its secret.
/// May be called beside a living session.
///
/// # Errors
/// Whoever asks must be told that nothing is known.
pub fn look(id: Id, secret: &Secret) -> Result<Looked> {
    let unknown = |why: &str| Ok(Looked::Unknown(why.into()));
    let Some(folder) = folder(Role::Target)?.find(&id.to_string())? else {
        return unknown("there is no record of it here");
    };
    let Some(entry) = Entry::open(folder, Role::Target, id, None)? else {
        return unknown("there is no record of it here");
    };
    if !secret.is(&entry.record.secret) {
        return unknown("the secret is wrong");
    }
    let husk = Husk(Arc::new(entry));
    if husk.0.lost()? {
        return Ok(Looked::Lost);
    }
    // Looked at before the fate, which comes first.
    let settled = husk.0.settled()?;
    let fate = match husk.fate() {
        Err(_) if husk.0.lost()? => return Ok(Looked::Lost),
        fate => fate?,
    };
    match (fate, husk.this_boot()?) {
        // Recorded by somebody who saw to it, and no husk outlives a boot.
        (Some(Fate::Aborted(a)), _) => Ok(Looked::Decided(Fate::Aborted(a))),
        (Some(fate), true) => Ok(Looked::Decided(fate)),
        (None, true) if settled => unknown("what was decided there was lost"),
        (None, true) => Ok(Looked::Undecided(husk)),
        (Some(Fate::Committed(_)), false) => {
            unknown("it was committed here, but the machine has rebooted since")
        }
        (None, false) => {
            unknown("the machine has rebooted since, and what was recorded last is lost")
        }
    }
}

/// Looks at a migration beside whoever works on it.
pub fn see(id: Id) -> Result<Option<Husk>> {
    Ok(super::see(Role::Target, id)?.map(|entry| Husk(Arc::new(entry))))
}

/// Takes over a husk whose session is dead.
pub fn open(id: Id) -> Result<Found<Husk>> {
    Ok(match claim(Role::Target, id)? {
        Found::Mine(entry) => Found::Mine(Husk(Arc::new(entry))),
        Found::Busy => Found::Busy,
        Found::Missing => Found::Missing,
    })
}

impl Husk {
    /// Opens the record beside its session, if there is one.
    pub fn join(id: Id) -> Result<Husk> {
        let missing = || Error::bad(format!("migration {id}"), "has no record here");
        let folder = folder(Role::Target)?
            .find(&id.to_string())?
            .ok_or_else(missing)?;
        Entry::open(folder, Role::Target, id, Some(FlockArg::LockSharedNonblock))?
            .map(|e| Husk(Arc::new(e)))
            .ok_or_else(missing)
    }
}
