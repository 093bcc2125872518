//! Giving back what was taken from a terminal, to a program that goes on here.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::hold::Frozen;
use crate::journal::{self, Armed};
use crate::state::fd::{self, Passage, Taken};

fn noted(armed: &Armed) -> Result<Option<Taken>> {
    let parse = |value: Value| {
        serde_json::from_value(value).map_err(|e| Error::bad("record of typed input", e))
    };
    armed.input()?.map(parse).transpose()
}

/// Notes what is taken, and how it is given back.
///
/// # Errors
/// The record cannot be written.
pub fn note_input(armed: &Armed, taken: &Taken) -> Result<()> {
    let value = serde_json::to_value(taken).map_err(|e| Error::bad("typed input", e))?;
    armed.note_input(&value)
}

/// For whoever holds the passage too, when the one who took it is dead: notes
/// what that one could not.
///
/// # Errors
/// Those of the record and of the passage.
pub fn complete_input(armed: &Armed, passage: &Passage) -> Result<()> {
    if let Some(mut taken) = noted(armed)? {
        if taken.complete(passage)? {
            note_input(armed, &taken)?;
        }
    }
    Ok(())
}

/// Gives it back, if anything was taken, to a program that is held.
///
/// # Errors
/// Those of the record and of the terminal.
pub fn give_input_back(armed: &Armed, held: &Frozen) -> Result<()> {
    let Some(taken) = noted(armed)? else {
        return Ok(());
    };
    let record = armed.record();
    // To one that runs, or to another, nothing is given: it would be typed out
    // of turn.
    let there = held.holds()?
        && held.pid()? == Some(record.pid)
        && journal::start_of(record.pid)? == record.start;
    if there {
        fd::give_back(record.pid, &taken, &mut |giving| note_input(armed, giving))?;
    }
    armed.forget_input()
}
