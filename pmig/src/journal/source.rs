//! The source's record: ARMED, then the first of COMMITTING and ABORTED, then,
//! after COMMITTING, where the program is.

use std::fmt;
use std::sync::Arc;

use nix::fcntl::FlockArg;
use serde::{Deserialize, Serialize};

use super::entry::{Decision, Entry};
use super::{claim, folder, json, read, Found, NeverRan, New, Record, Role};
use crate::error::{Error, Result};
use crate::hold::Frozen;
use crate::id::{Id, Secret};

/// ARMED, and nothing decided that is known here.
#[derive(Debug, Clone)]
pub struct Armed(pub(super) Arc<Entry>);

/// COMMITTING was recorded: the only way to an [`Order`]. From here on the
/// program may only go on here if the target says that it never ran there, or
/// a person does.
#[derive(Debug, Clone)]
pub struct Committing(Arc<Entry>);

/// What a Commit message carries. Cannot be had without [`Committing`], but
/// from the wire or of a file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    id: Id,
    secret: Secret,
}

impl Order {
    /// For what comes out of a file, whose source is gone or will not go on.
    pub(crate) fn of_a_file(id: Id, secret: Secret) -> Order {
        Order { id, secret }
    }
}

/// Why COMMITTING could not be recorded.
#[derive(Debug)]
pub enum Lost {
    /// Somebody recorded ABORTED first: the keeper, for one, whose patience
    /// ended.
    Aborted { why: String },
    /// The record could not be written; nothing is decided.
    Failed(Error),
}

/// How it ended after COMMITTING.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Verdict {
    /// It runs at the target, or a person gave the copy here up: it must go.
    Moved { why: String },
    /// It never ran at the target, or a person said to go on here.
    RunsHere { why: String },
}

/// Why it was aborted that runs here though nobody can read why.
const LOST: &str = "the program runs, and what was decided is lost";

/// Why a verdict that is a person's stands.
const BY_HAND: &str = "a person said so";

impl Verdict {
    /// Whether a person gave it, who may know less than the target.
    pub fn is_by_hand(&self) -> bool {
        let (Verdict::Moved { why } | Verdict::RunsHere { why }) = self;
        why == BY_HAND
    }
}

/// Where the record stands.
#[derive(Debug)]
pub enum Stage {
    Armed(Armed),
    /// ABORTED was recorded; it runs here or is about to.
    Aborted(Armed, String),
    Committing(Committing),
    Decided(Committing, Verdict),
}

impl Armed {
    /// Records ARMED and syncs it. Before the freeze.
    ///
    /// # Errors
    /// Fails where the id was used before.
    pub fn arm(new: New) -> Result<Armed> {
        Entry::create(Role::Source, new).map(|e| Armed(Arc::new(e)))
    }

    /// Opens the record of a living migration beside its owner (for its
    /// keeper).
    pub fn join(id: Id) -> Result<Armed> {
        let missing = || {
            Error::bad(
                format!("migration {id}"),
                "has no record at the source, or another pmig is resolving it",
            )
        };
        let folder = folder(Role::Source)?
            .find(&id.to_string())?
            .ok_or_else(missing)?;
        let how = Some(FlockArg::LockSharedNonblock);
        Entry::open(folder, Role::Source, id, how)?
            .map(|e| Armed(Arc::new(e)))
            .ok_or_else(missing)
    }

    pub fn record(&self) -> &Record {
        &self.0.record
    }

    /// Whether the record is of this boot of the machine.
    pub fn this_boot(&self) -> Result<bool> {
        self.0.this_boot()
    }

    /// Records COMMITTING, unless ABORTED was recorded before: the point of no
    /// return.
    pub fn commit(&self) -> Result<Committing, Lost> {
        let won = self.0.decide(&Decision::Committing);
        if let Ok(true) = won {
            return Ok(Committing(self.0.clone()));
        }
        // A decision that failed may still have been made.
        match (self.0.decided(), won) {
            (Ok(Some(Decision::Aborted { why })), _) => Err(Lost::Aborted { why }),
            (Ok(Some(_)), _) => Ok(Committing(self.0.clone())),
            (_, Err(e)) | (Err(e), _) => Err(Lost::Failed(e)),
            (Ok(None), Ok(_)) => Err(Lost::Failed(Error::bad(
                self.0.folder.path().display(),
                "the record vanished",
            ))),
        }
    }

    /// Records ABORTED, unless COMMITTING was recorded before; then that stands.
    /// Only after this may the program be let go on.
    pub fn abort(&self, why: &str) -> Result<Stage> {
        self.stands(self.0.decide(&Decision::aborted(why)), why)
    }

    /// The same, from the pmig that alone could have recorded COMMITTING, and has
    /// not: good where the place of decision is lost, too.
    pub fn withdraw(&self, why: &str) -> Result<Stage> {
        self.stands(self.0.withdraw(&Decision::aborted(why)), why)
    }

    /// What was decided, by whomever: a decision that failed may still have been made.
    fn stands(&self, won: Result<bool>, why: &str) -> Result<Stage> {
        if let Ok(true) = won {
            // Whatever becomes of where it was written.
            return Ok(Stage::Aborted(self.clone(), why.into()));
        }
        match self.stage()? {
            Stage::Armed(_) => Err(won.err().unwrap_or_else(|| {
                Error::bad(self.0.folder.path().display(), "the record vanished")
            })),
            stage => Ok(stage),
        }
    }

    /// Whether nobody can tell any more what was decided, if anything was. See
    /// [`open`].
    pub fn lost(&self) -> Result<bool> {
        self.0.lost()
    }

    /// # Errors
    /// It is lost: no use in stopping the program.
    pub fn not_lost(&self) -> Result<()> {
        self.0.not_lost()
    }

    /// Notes what was taken from the program's terminal, and is to be given back
    /// if it goes on here. Replaces what was noted before. Not synced.
    pub fn note_input(&self, taken: &serde_json::Value) -> Result<()> {
        self.0.folder.replace("input", &json(taken)?, false)
    }

    /// It was given back.
    pub fn forget_input(&self) -> Result<()> {
        self.0.folder.forget("input")
    }

    /// What [`Armed::note_input`] noted.
    pub fn input(&self) -> Result<Option<serde_json::Value>> {
        read(&self.0.folder, "input")
    }

    /// Notes that memory may stay behind, and is to be sent after the commit.
    pub fn note_serving(&self) -> Result<()> {
        self.0.folder.replace("serves", b"{}\n", false)
    }

    /// Whether memory that stayed behind is needed still: what is held must not go.
    pub fn serving(&self) -> Result<bool> {
        self.0.folder.has("serves")
    }

    /// All of it was sent.
    pub fn served(&self) -> Result<()> {
        self.0.folder.forget("serves")
    }

    pub fn stage(&self) -> Result<Stage> {
        let committing = Committing(self.0.clone());
        // There is none without COMMITTING, whatever became of that.
        if let Some(verdict) = committing.verdict()? {
            return Ok(Stage::Decided(committing, verdict));
        }
        Ok(match self.0.decided()? {
            None => Stage::Armed(self.clone()),
            Some(Decision::Aborted { why }) => Stage::Aborted(self.clone(), why),
            Some(_) => Stage::Committing(committing),
        })
    }

    /// Nothing is held any more, and all that follows was done.
    pub fn settle(&self) -> Result<()> {
        self.0.settle(None)
    }

    pub fn settled(&self) -> Result<bool> {
        self.0.settled()
    }
}

impl Committing {
    pub fn record(&self) -> &Record {
        &self.0.record
    }

    pub fn armed(&self) -> Armed {
        Armed(self.0.clone())
    }

    /// What the target needs to let it run.
    pub fn order(&self) -> Order {
        Order {
            id: self.0.record.id,
            secret: self.0.record.secret.clone(),
        }
    }

    /// The target's word that it runs there. Says what stands now, which is
    /// another thing where a person was faster.
    pub fn runs_there(&self) -> Result<Verdict> {
        self.decide(Verdict::Moved {
            why: "the target said that it runs there".into(),
        })
    }

    /// The target's word that it never ran there.
    pub fn never_ran(&self, _: NeverRan) -> Result<Verdict> {
        self.decide(Verdict::RunsHere {
            why: "the target said that it never ran there".into(),
        })
    }

    /// A person's word, where the target can say nothing.
    pub fn by_hand(&self, runs_here: bool) -> Result<Verdict> {
        let why = BY_HAND.into();
        self.decide(if runs_here {
            Verdict::RunsHere { why }
        } else {
            Verdict::Moved { why }
        })
    }

    /// The target has acknowledged: records it, kills the copy here, settles.
    ///
    /// # Errors
    /// Fails, and kills nothing, where a person has meanwhile said that it goes
    /// on here.
    pub fn release(&self, held: Frozen) -> Result<()> {
        match self.runs_there()? {
            Verdict::Moved { .. } => {
                held.kill()?;
                self.0.settle(Some(&Decision::Committing))
            }
            Verdict::RunsHere { why } => Err(Error::bad(
                format!("migration {}", self.0.record.id),
                format!("runs at the target, and here too: {why}"),
            )),
        }
    }

    /// Records where the program is, unless that was recorded before.
    fn decide(&self, wish: Verdict) -> Result<Verdict> {
        let won = self.0.folder.decide("verdict", &json(&wish)?);
        match self.verdict()? {
            Some(verdict) => Ok(verdict),
            None => Err(won.err().unwrap_or_else(|| {
                Error::bad(self.0.folder.path().display(), "the record vanished")
            })),
        }
    }

    fn verdict(&self) -> Result<Option<Verdict>> {
        read(&self.0.folder, "verdict")
    }
}

impl Order {
    pub fn id(&self) -> Id {
        self.id
    }

    pub fn secret(&self) -> &Secret {
        &self.secret
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lost::Aborted { why } => write!(f, "aborted before the commit: {why}"),
            Lost::Failed(e) => write!(f, "the commit could not be recorded: {e}"),
        }
    }
}

impl From<Lost> for Error {
    fn from(lost: Lost) -> Error {
        Error::bad("commit", lost)
    }
}

/// Looks at a migration beside whoever works on it.
pub fn see(id: Id) -> Result<Option<Armed>> {
    Ok(super::see(Role::Source, id)?.map(|entry| Armed(Arc::new(entry))))
}

/// Takes over a migration whose pmig and keeper are dead. Where the place of
/// decision is lost it becomes COMMITTING, unless the program runs: the order may have
/// been given.
pub fn open(id: Id) -> Result<Found<Armed>> {
    Ok(match claim(Role::Source, id)? {
        Found::Mine(entry) => {
            if entry.lost()? {
                entry.decide_what_is_lost(&match runs(&entry.record)? {
                    // After COMMITTING nothing lets it run but a verdict.
                    true => Decision::aborted(LOST),
                    false => Decision::Committing,
                })?;
            }
            Found::Mine(Armed(Arc::new(entry)))
        }
        Found::Busy => Found::Busy,
        Found::Missing => Found::Missing,
    })
}

/// Whether the program is there and nothing holds it.
fn runs(record: &Record) -> Result<bool> {
    let held = match Frozen::open(&record.place)? {
        Some(cgroup) => cgroup.holds()?,
        None => false,
    };
    Ok(!held && record.lives())
}

/// Where a process of this boot went, if the copy of it that was here is of a
/// migration that was committed.
///
/// # Errors
/// The state directory cannot be read.
pub fn left(pid: i32, start: u64) -> Result<Option<String>> {
    let mut ids = super::unsettled(Role::Source)?;
    ids.extend(super::settled(Role::Source)?);
    for id in ids {
        // What cannot be read says nothing.
        let Ok(Some(armed)) = see(id) else { continue };
        let record = armed.record();
        if (record.pid, record.start) != (pid, start) || !armed.this_boot()? {
            continue;
        }
        if let Stage::Decided(_, Verdict::Moved { .. }) = armed.stage()? {
            return Ok(Some(record.there()));
        }
    }
    Ok(None)
}
