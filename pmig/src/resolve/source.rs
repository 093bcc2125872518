use std::time::{Duration, Instant};

use super::input::give_input_back;
use crate::checkpoint;
use crate::error::{Error, Result};
use crate::fill;
use crate::hold::Frozen;
use crate::id::Id;
use crate::journal::{self, Armed, Committing, Found, Record, Stage, Verdict};
use crate::protocol::fate::{self, Answer, Question, What};
use crate::protocol::preface;
use crate::transport::Addr;

/// Between two questions to a target that didn't answer.
const PAUSE: Duration = Duration::from_secs(1);

/// Where the source's program is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Now {
    /// It runs here.
    RunsHere,
    /// It runs at the target; what was held here is gone.
    Moved,
    /// It runs at the target, and memory that is held here is still to be sent
    /// ([`crate::fill`]).
    Serving,
    /// It is held here, frozen, and why nothing more can be done.
    Held { why: String },
    /// It ended, or somebody killed it.
    Ended,
    /// The machine has rebooted since.
    Rebooted,
}

/// Asks the target of a migration, once.
///
/// # Errors
/// The target cannot be reached, or does not answer in time.
pub fn ask(record: &Record, what: What) -> Result<Answer> {
    let addr = record
        .addr
        .as_ref()
        .ok_or_else(|| Error::bad(format!("migration {}", record.id), "has no address to ask"))?;
    let mut link = checkpoint::connect(addr).map_err(|cause| Error::Link {
        peer: addr.host(),
        cause,
    })?;
    preface::open(&mut *link, preface::Kind::Fate)?;
    fate::ask(
        &mut *link,
        &Question {
            id: record.id,
            secret: record.secret.clone(),
            what,
        },
    )
}

/// Has the target decide, and records what it says. Asks again for `patience`;
/// `tick` is called before each question.
///
/// # Errors
/// The explanation of [`Now::Held`].
pub fn settle(
    committing: &Committing,
    patience: Duration,
    mut tick: impl FnMut(),
) -> Result<Verdict, String> {
    let start = Instant::now();
    loop {
        tick();
        let record = committing.record();
        // To know is not enough: a Commit may lie unread in a dead connection.
        let why = match ask(record, What::Abandon) {
            Ok(Answer::Committed) => return committing.runs_there().map_err(|e| e.to_string()),
            Ok(Answer::NeverRan(word)) => {
                return committing.never_ran(word).map_err(|e| e.to_string())
            }
            Ok(Answer::Unknown(why)) => {
                return Err(format!(
                    "{} cannot say whether it runs there: {why}",
                    record.peer
                ))
            }
            Ok(Answer::Undecided) => format!("{} has not decided", record.peer),
            Err(e) => e.to_string(),
        };
        if start.elapsed() + PAUSE > patience {
            return Err(why);
        }
        tracing::info!("migration {}: {why}; asking again", record.id);
        std::thread::sleep(PAUSE);
    }
}

/// Tells the target that a migration was aborted, so that nothing stays held
/// there. Gives up after `patience`.
///
/// # Errors
/// The husk may still be held there; it never runs unless a person says so.
pub fn abandon(record: &Record, patience: Duration) -> Result<()> {
    if let Some(addr @ Addr::File(_)) = &record.addr {
        checkpoint::forget(addr, record.id);
        return Ok(());
    }
    let start = Instant::now();
    loop {
        match ask(record, What::Abandon) {
            Ok(Answer::Committed) => {
                return Err(Error::bad(
                    format!("migration {}", record.id),
                    format!(
                    "was aborted here, but {} says that it runs there: somebody revived it by hand",
                    record.peer
                ),
                ))
            }
            Ok(Answer::NeverRan(_)) => return Ok(()),
            Ok(Answer::Unknown(why)) => {
                tracing::info!("migration {}: {} says: {why}", record.id, record.peer);
                return Ok(());
            }
            Ok(Answer::Undecided) if start.elapsed() + PAUSE > patience => {
                return Err(Error::bad(
                    record.peer.clone(),
                    format!("has not decided on migration {}", record.id),
                ))
            }
            Err(e) if start.elapsed() + PAUSE > patience => return Err(e),
            Ok(Answer::Undecided) | Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Brings a migration to its end by its records: aborts it where nothing is
/// decided, has the target decide after COMMITTING, and acts on what stands.
/// May be called again, and beside others who do the same.
///
/// # Errors
/// A record cannot be read or written, or the cgroup does not obey.
pub fn finish(armed: &Armed, why: &str, patience: Duration, tick: impl FnMut()) -> Result<Now> {
    if !armed.this_boot()? {
        armed.settle()?;
        return Ok(Now::Rebooted);
    }
    let stage = match armed.stage()? {
        Stage::Armed(armed) => armed.abort(why)?,
        stage => stage,
    };
    let verdict = match stage {
        Stage::Committing(committing) => match settle(&committing, patience, tick) {
            Ok(verdict) => verdict,
            Err(why) => return Ok(Now::Held { why }),
        },
        Stage::Decided(_, verdict) => verdict,
        Stage::Aborted(_, why) => Verdict::RunsHere { why },
        Stage::Armed(_) => {
            return Err(Error::bad(
                format!("migration {}", armed.record().id),
                "could not be aborted",
            ))
        }
    };
    act(armed, &verdict)
}

/// Does what follows from a verdict.
pub(super) fn act(armed: &Armed, verdict: &Verdict) -> Result<Now> {
    let record = armed.record();
    let held = Frozen::open(&record.place)?;
    let now = match verdict {
        Verdict::RunsHere { .. } => {
            if let Some(held) = held {
                // It goes on in any case.
                if let Err(e) = give_input_back(armed, &held) {
                    tracing::warn!("what was typed for process {} is lost: {e}", record.pid);
                }
                held.thaw()?.release()?;
            }
            here(record)
        }
        Verdict::Moved { .. } => {
            if let Some(held) = held {
                if armed.serving()? && !verdict.is_by_hand() && held.populated()? {
                    return Ok(Now::Serving);
                }
                held.kill()?;
            }
            Now::Moved
        }
    };
    if let Err(e) = armed.settle() {
        // All was done, whether there is room to write that down or not.
        tracing::warn!("the record of {} stays open: {e}", record.id);
    }
    if let (Verdict::RunsHere { .. }, Some(addr)) = (verdict, &record.addr) {
        checkpoint::forget(addr, record.id);
    }
    Ok(now)
}

/// Ends what is held here though memory of it may be missing at the target: a
/// person said so.
pub(super) fn give_up_memory(armed: &Armed) -> Result<Now> {
    armed.served()?;
    match armed.stage()? {
        Stage::Decided(_, verdict) => act(armed, &verdict),
        _ => Err(Error::bad("migration", "is not decided")),
    }
}

fn here(record: &Record) -> Now {
    match record.lives() {
        true => Now::RunsHere,
        false => Now::Ended,
    }
}

pub(super) fn sweep_one(id: Id) -> Result<()> {
    let Found::Mine(armed) = journal::open_source(id)? else {
        return Ok(());
    };
    if let Stage::Committing(_) = armed.stage()? {
        let (pid, peer) = (armed.record().pid, &armed.record().peer);
        tracing::warn!("process {pid} is held here; asking {peer} whether it runs there");
    }
    let why = "its pmig and its keeper died";
    let now = finish(&armed, why, Duration::ZERO, || {})?;
    tracing::info!("migration {id} of {}: {now:?}", armed.record().pid);
    if now == Now::Serving {
        // It takes the record over.
        drop(armed);
        return fill::serve_in_background(id);
    }
    if now == Now::RunsHere {
        // The target may be long gone, and it was told by then or never will be.
        let _ = abandon(armed.record(), Duration::ZERO);
    }
    Ok(())
}
