use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::{source, target, Files, Now};
use crate::error::{printable, Error, Result};
use crate::fill;
use crate::id::Id;
use crate::journal::{self, Armed, Fate, Found, Husk, Record, Role, Stage};
use crate::transport::Addr;

/// Of one that somebody is at work on.
const LOST: &str = "what was decided is lost; whoever is at work on it may know";

/// A migration that waits for something.
#[derive(Debug, Clone, Serialize)]
pub struct Unresolved {
    pub id: Id,
    pub role: Role,
    pub pid: i32,
    /// Unescaped, as the program set it.
    pub comm: String,
    pub peer: String,
    /// Seconds since it began.
    pub age: u64,
    /// A pmig or a keeper is at work on it.
    pub busy: bool,
    /// Where it stands, as a sentence.
    pub what: String,
}

/// What a person wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// What the two machines agree on.
    Ask,
    /// That it runs on this machine.
    RunHere,
    /// That it does not run on this machine.
    Drop,
}

/// What became of it.
#[derive(Debug, Clone, Serialize)]
pub struct Resolved {
    pub id: Id,
    /// Whether nothing is held on this machine any more.
    pub resolved: bool,
    /// What happened and where the program is, as one or more lines.
    pub text: String,
}

/// All migrations of this machine that are not settled.
///
/// # Errors
/// The state directory cannot be read. A single record that cannot is skipped
/// with a warning.
pub fn unresolved() -> Result<Vec<Unresolved>> {
    let mut all = Vec::new();
    for role in [Role::Source, Role::Target] {
        for id in journal::unsettled(role)? {
            let one = match role {
                Role::Source => of_source(id),
                Role::Target => of_target(id),
            };
            match one {
                Ok(one) => all.extend(one),
                Err(e) => tracing::warn!("migration {id}: {e}"),
            }
        }
    }
    Ok(all)
}

fn of_source(id: Id) -> Result<Option<Unresolved>> {
    Ok(match journal::open_source(id)? {
        Found::Missing => None,
        Found::Mine(armed) => {
            let peer = printable(&armed.record().peer);
            let what = match armed.stage()? {
                Stage::Committing(_) if matches!(armed.record().addr, Some(Addr::File(_))) => {
                    format!("held here, frozen: whether it is in {peer} is not known")
                }
                Stage::Committing(_) if !armed.record().lives() => {
                    format!("has ended here: whether it runs on {peer} is not known")
                }
                Stage::Committing(_) => {
                    format!("held here, frozen: whether it runs on {peer} is not known")
                }
                Stage::Decided(..) => "decided, but what follows was not done".into(),
                Stage::Armed(_) | Stage::Aborted(..) => "aborted, but not cleared away".into(),
            };
            Some(describe(armed.record(), false, what))
        }
        Found::Busy => {
            let armed = Armed::join(id)?;
            let peer = printable(&armed.record().peer);
            let what = match armed.stage() {
                Err(_) if armed.lost()? => LOST.into(),
                Err(e) => return Err(e),
                Ok(Stage::Armed(_)) => format!("on its way to {peer}"),
                Ok(_) => format!("being settled with {peer}"),
            };
            Some(describe(armed.record(), true, what))
        }
    })
}

fn of_target(id: Id) -> Result<Option<Unresolved>> {
    Ok(match journal::open_target(id)? {
        Found::Missing => None,
        Found::Mine(husk) => {
            let peer = printable(&husk.record().peer);
            if husk.strayed()?.is_some() {
                let what = format!("{}: what was decided is lost", what_strayed(&husk)?);
                return Ok(Some(describe(husk.record(), false, what)));
            }
            let what = match husk.fate()? {
                None if husk.is_from_file() => "what was to bring it back from a file died".into(),
                None if husk.held()? => {
                    format!("a copy is held here, frozen: {peer} has not said whether it may run")
                }
                None => "its copy here died before it was ready".into(),
                Some(_) => "decided, but what follows was not done".into(),
            };
            Some(describe(husk.record(), false, what))
        }
        Found::Busy => {
            let husk = Husk::join(id)?;
            let peer = printable(&husk.record().peer);
            let what = match husk.fate() {
                Err(_) if husk.lost()? => LOST.into(),
                Err(e) => return Err(e),
                Ok(None) => format!("on its way here from {peer}"),
                Ok(Some(Fate::Committed(_))) => format!("has come here from {peer}; clearing up"),
                Ok(Some(Fate::Aborted(_))) => format!("did not come from {peer}; clearing up"),
            };
            Some(describe(husk.record(), true, what))
        }
    })
}

fn describe(record: &Record, busy: bool, what: String) -> Unresolved {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    Unresolved {
        id: record.id,
        role: record.role,
        pid: record.pid,
        comm: record.comm.clone(),
        peer: record.peer.clone(),
        age: now.saturating_sub(record.time),
        busy,
        what,
    }
}

/// Resolves one migration, by what the machines agree on if they do, and
/// otherwise as the person says.
///
/// # Errors
/// There is no such migration here, somebody is at work on it, or its record or
/// cgroup cannot be used.
pub fn resolve(id: Id, how: How, files: &dyn Files) -> Result<Resolved> {
    let busy = || {
        Err(Error::bad(
            format!("migration {id}"),
            "a pmig or its keeper is at work on it; try again in a minute",
        ))
    };
    match journal::open_source(id)? {
        Found::Mine(armed) => return resolve_source(&armed, how),
        Found::Busy => return busy(),
        Found::Missing => {}
    }
    match journal::open_target(id)? {
        Found::Mine(husk) => resolve_target(&husk, how, files),
        Found::Busy => busy(),
        Found::Missing => Err(Error::bad(
            format!("migration {id}"),
            "this machine has no record of it",
        )),
    }
}

fn resolve_source(armed: &Armed, how: How) -> Result<Resolved> {
    let record = armed.record();
    let (name, there) = (name(record), record.there());
    let why = "a person ended it";
    let mut now = source::finish(armed, why, Duration::ZERO, || {})?;
    let mut by_hand = false;
    if let (Now::Held { .. }, How::RunHere | How::Drop) = (&now, how) {
        if let Stage::Committing(committing) = armed.stage()? {
            by_hand = true;
            let verdict = committing.by_hand(how == How::RunHere)?;
            now = source::act(armed, &verdict)?;
        }
    }
    if now == Now::Serving {
        now = match how {
            How::Drop => source::give_up_memory(armed)?,
            _ => {
                fill::serve_in_background(record.id)?;
                now
            }
        };
    }
    let (resolved, text) = match now {
        Now::RunsHere if by_hand => (
            true,
            format!("{name} runs on here, because you said so; make sure that no other {there}"),
        ),
        Now::RunsHere => {
            let peer = printable(&record.peer);
            let mut text = format!("{name} runs here; that it {there} never came about");
            if let Err(e) = source::abandon(record, Duration::ZERO) {
                text += &format!("\na copy may still be held, frozen, on {peer} ({e}); there: pmig resolve {} --drop", record.id);
            }
            (true, text)
        }
        Now::Moved if by_hand => (
            true,
            format!("the copy of {name} held here is gone, because you said so; whether it {there} is not known here"),
        ),
        Now::Moved => (
            true,
            format!("{name} {there}; the copy held here is gone"),
        ),
        Now::Held { why } => (
            false,
            format!(
                "{name} stays held here, frozen: {why}\n\
                 unless it {there}:            pmig resolve {id} --run-here\n\
                 if you know that it {there}:  pmig resolve {id} --drop",
                id = record.id
            ),
        ),
        Now::Serving => (
            false,
            format!(
                "{name} {there}, and part of its memory is still here; it is being sent\n\
                 if it is not wanted any more:   pmig resolve {id} --drop",
                id = record.id
            ),
        ),
        Now::Ended => (true, format!("{name} has ended; nothing is held here")),
        Now::Rebooted => (
            true,
            format!(
                "this machine has rebooted since, so the {name} that was here is gone; \
                 perhaps it {there} or is held there (pmig resolve {})",
                record.id
            ),
        ),
    };
    Ok(Resolved {
        id: record.id,
        resolved,
        text,
    })
}

fn resolve_target(husk: &Husk, how: How, files: &dyn Files) -> Result<Resolved> {
    let record = husk.record();
    let (name, peer) = (name(record), printable(&record.peer));
    let done = |text| (true, text);
    let said = |(resolved, text)| {
        Ok(Resolved {
            id: record.id,
            resolved,
            text,
        })
    };
    let (resolved, text) = if !husk.this_boot()? {
        husk.settle_lost()?;
        done(format!(
            "this machine has rebooted since, so the {name} that was here is gone; what {peer} holds is the last copy"
        ))
    } else {
        if husk.settled()? && husk.fate()?.is_none() {
            return said(done(format!(
                "what was decided on {name} was lost, and nothing of it was left here; whether it ever ran here is not known"
            )));
        }
        let strayed = husk.strayed()?;
        let was_lost = strayed.is_some();
        let (fate, by_hand) = match (strayed, how) {
            (Some(lost), _) if husk.is_gone()? => {
                lost.settle()?;
                return said(done(format!(
                    "what was decided on {name} was lost, and nothing of it is left here; whether it ever ran here is not known"
                )));
            }
            (Some(_), How::Ask) => {
                return said((
                    false,
                    format!(
                        "{what}: what was decided on {name} is lost with {fates}\n\
                         on {peer} try:                {resolve}\n\
                         unless it runs on {peer}:     {resolve} --run-here\n\
                         if it runs on {peer}:         {resolve} --drop",
                        what = what_strayed(husk)?,
                        fates = journal::run_dir().join("fates").display(),
                        resolve = format_args!("pmig resolve {}", record.id),
                    ),
                ))
            }
            (Some(lost), How::RunHere) => (Some(lost.run_here()?), true),
            (Some(lost), How::Drop) => (Some(lost.drop_it()?), true),
            (None, _) => undecided(husk, how)?,
        };
        match fate {
            None => (
                false,
                format!(
                    "a copy of {name} is held here, frozen, until {peer} says whether it may run\n\
                     on {peer} try:                                pmig resolve {id}\n\
                     if {peer} is gone for good and runs it no more: pmig resolve {id} --run-here\n\
                     if it runs on {peer}:                          pmig resolve {id} --drop",
                    id = record.id
                ),
            ),
            Some(Fate::Committed(committed)) => match target::finish(&committed, files) {
                Ok(()) if by_hand => done(format!(
                    "{name} runs here, because you said so; make sure that {peer} does not run it too"
                )),
                Ok(()) => done(format!(
                    "{name} was committed here: it runs here, or has ended since"
                )),
                Err(e) if how == How::Drop => {
                    committed.settle()?;
                    done(format!(
                        "{name} was committed here, and runs or has ended; what was left to do is given up: {e}"
                    ))
                }
                Err(e) => (
                    false,
                    format!(
                        "{name} was committed here, and runs or has ended, but not all is done: {e}\n\
                         once that is put right:  pmig resolve {id}\n\
                         to leave it as it is:    pmig resolve {id} --drop",
                        id = record.id
                    ),
                ),
            },
            Some(Fate::Aborted(aborted)) => {
                target::undo(&aborted, files)?;
                done(match was_lost {
                    true => format!("the copy of {name} that was here is gone, because you said so"),
                    false => format!("the copy of {name} held here is gone; it never ran here"),
                })
            }
        }
    };
    said((resolved, text))
}

/// What is decided, or is by this, and whether the person did it.
fn undecided(husk: &Husk, how: How) -> Result<(Option<Fate>, bool)> {
    Ok(match (husk.fate()?, how) {
        (Some(fate), _) => (Some(fate), false),
        (None, _) if !husk.held()? => (Some(husk.abort("its session died")?), false),
        (None, How::Ask) => (None, false),
        (None, How::RunHere) => (Some(husk.commit_by_hand()?), true),
        (None, How::Drop) => (Some(husk.abort("a person dropped it")?), true),
    })
}

/// How a copy looks of which nobody can tell whether it was to run.
fn what_strayed(husk: &Husk) -> Result<&'static str> {
    Ok(match husk.held()? {
        true => "a copy is held here, frozen",
        false => "a copy is here, and runs",
    })
}

fn name(record: &Record) -> String {
    format!("{} {}", record.pid, printable(&record.comm))
}
