//! What moved in and out of this machine, by its records.

use std::collections::BTreeSet;

use serde::Serialize;

use super::person::{unresolved, Unresolved};
use crate::error::Result;
use crate::id::Id;
use crate::journal::{self, Fate, Record, Role, Stage, Verdict};
use crate::transport::Addr;

/// Where a program is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Whereabouts {
    /// It came here and runs.
    Here,
    /// It came here and has ended since.
    Ended,
    /// It left for another machine.
    Left,
    /// It was written to a file.
    InFile,
    /// It was to leave, or to come, and did not.
    Stayed,
    /// The machine was booted anew before it was decided, or a person decided.
    Unknown,
}

/// A migration that is settled.
#[derive(Debug, Clone, Serialize)]
pub struct Past {
    pub id: Id,
    pub role: Role,
    pub pid: i32,
    /// Unescaped, as the program set it.
    pub comm: String,
    /// The other machine, or the file.
    pub peer: String,
    /// When it began, in seconds since 1970.
    pub time: u64,
    pub whereabouts: Whereabouts,
}

/// All that this machine knows of.
#[derive(Debug, Clone, Serialize)]
pub struct Known {
    /// What waits for something, or is at work.
    pub open: Vec<Unresolved>,
    /// The latest last. A program that came and left again is in it once.
    pub past: Vec<Past>,
}

/// Reads the records. Those settled more than a month ago, and all but the
/// latest thousand of each kind, are gone.
///
/// # Errors
/// The state directory cannot be read. A single record that cannot is skipped
/// with a warning.
pub fn known() -> Result<Known> {
    let open = unresolved()?;
    let mut past = Vec::new();
    let mut left = BTreeSet::new();
    let going = open.iter().filter(|one| one.role == Role::Source);
    let leaving: BTreeSet<i32> = going.map(|one| one.pid).collect();
    // Those that left first: who left again is not here.
    for role in [Role::Source, Role::Target] {
        for id in journal::settled(role)? {
            let one = match role {
                Role::Source => of_source(id),
                Role::Target => of_target(id),
            };
            match one {
                Ok(Some((record, whereabouts))) => {
                    let process = (record.boot_id.clone(), record.pid, record.start);
                    match role {
                        Role::Source if whereabouts != Whereabouts::Stayed => {
                            left.insert(process);
                        }
                        Role::Target if left.contains(&process) => continue,
                        // That is said there.
                        Role::Target if leaving.contains(&record.pid) => continue,
                        _ => {}
                    }
                    past.push(describe(record, whereabouts));
                }
                Ok(None) => {}
                Err(e) => tracing::warn!("migration {id}: {e}"),
            }
        }
    }
    past.sort_by_key(|one| one.time);
    Ok(Known { open, past })
}

fn of_source(id: Id) -> Result<Option<(Record, Whereabouts)>> {
    let Some(armed) = journal::see_source(id)? else {
        return Ok(None);
    };
    let whereabouts = match armed.stage()? {
        Stage::Decided(_, verdict @ Verdict::Moved { .. }) if verdict.is_by_hand() => {
            Whereabouts::Unknown
        }
        Stage::Armed(_) | Stage::Committing(_) => Whereabouts::Unknown,
        Stage::Decided(_, Verdict::Moved { .. }) => match armed.record().addr {
            Some(Addr::File(_)) => Whereabouts::InFile,
            _ => Whereabouts::Left,
        },
        _ => Whereabouts::Stayed,
    };
    Ok(Some((armed.record().clone(), whereabouts)))
}

fn of_target(id: Id) -> Result<Option<(Record, Whereabouts)>> {
    let Some(husk) = journal::see_target(id)? else {
        return Ok(None);
    };
    let record = husk.record();
    let runs = || husk.this_boot().is_ok_and(|this| this) && record.lives();
    let whereabouts = match husk.fate()? {
        Some(Fate::Committed(_)) if runs() => Whereabouts::Here,
        Some(Fate::Committed(_)) => Whereabouts::Ended,
        Some(Fate::Aborted(_)) => Whereabouts::Stayed,
        // What was decided last went with the boot, or was lost.
        None => Whereabouts::Unknown,
    };
    Ok(Some((record.clone(), whereabouts)))
}

fn describe(record: Record, whereabouts: Whereabouts) -> Past {
    Past {
        id: record.id,
        role: record.role,
        pid: record.pid,
        comm: record.comm,
        peer: record.peer,
        time: record.time,
        whereabouts,
    }
}
