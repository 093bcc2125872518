//! Giving back what was taken from a terminal, to a program that goes on here.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::journal::Armed;
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

/// Gives it back, if anything was taken. The program must stand still.
///
/// # Errors
/// Those of the record and of the terminal.
pub fn give_input_back(armed: &Armed) -> Result<()> {
    let Some(taken) = noted(armed)? else {
        return Ok(());
    };
    fd::give_back(armed.record().pid, &taken)?;
    armed.forget_input()
}
