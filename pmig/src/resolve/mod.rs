//! Finishing or undoing a migration by its records alone: what the keeper does,
//! what every later command does for those whose keeper died too, and what a
//! person decides where the machines cannot.

mod input;
mod past;
mod person;
mod source;
mod target;

use serde_json::Value;

use crate::error::Result;
use crate::hold;
use crate::id::Id;
use crate::journal::{self, Role};

pub use input::{complete_input, give_input_back, note_input};
pub use past::{known, Known, Past, Whereabouts};
pub use person::{resolve, unresolved, How, Resolved, Unresolved};
pub use source::{abandon, ask, finish, settle, Now};
pub use target::answer;

/// What is to be done with the files that [`journal::Husk::note_files`] noted.
/// Both may be called again for what was done before.
pub trait Files: Sync {
    /// The program runs here: put them in their places.
    fn finish(&self, noted: &Value) -> Result<()>;
    /// It never will: remove them.
    fn undo(&self, noted: &Value) -> Result<()>;
}

/// Does for every migration of this machine what its own pmig and keeper did
/// not live to do, and removes old records. What cannot be resolved stays as it
/// is; nothing here is an error to the command that comes first.
pub fn sweep(files: &dyn Files) {
    each(Role::Source, source::sweep_one);
    sweep_arrivals(files);
}

/// The same for what came here only, whose session may just have died; asks no
/// other machine.
pub fn sweep_arrivals(files: &dyn Files) {
    each(Role::Target, |id| target::sweep_one(id, files));
    if let Err(e) = hold::sweep_empty() {
        tracing::debug!("{e}");
    }
}

fn each(role: Role, one: impl Fn(Id) -> Result<()>) {
    match journal::unsettled(role) {
        Ok(ids) => {
            for id in ids {
                if let Err(e) = one(id) {
                    tracing::warn!("migration {id}: {e}");
                }
            }
        }
        Err(e) => tracing::warn!("{e}"),
    }
    if let Err(e) = journal::prune(role) {
        tracing::warn!("{e}");
    }
}
