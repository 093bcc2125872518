//! What follows for shipped files once the fate of a migration is known.

use pmig::error::{Error, Result};
use pmig::resolve::Files;
use pmig::state::files::Pending;
use serde_json::Value;

/// The files room's, as [`Files`]. What is noted is a list of [`Pending`].
pub struct Shipped;

impl Files for Shipped {
    fn finish(&self, noted: &Value) -> Result<()> {
        each(noted, Pending::commit)
    }

    fn undo(&self, noted: &Value) -> Result<()> {
        each(noted, Pending::abort)
    }
}

/// All are tried; the first failure is told.
fn each(noted: &Value, act: impl Fn(&Pending) -> Result<()>) -> Result<()> {
    let all: Vec<Pending> =
        serde_json::from_value(noted.clone()).map_err(|e| Error::bad("noted files", e))?;
    let tried: Vec<Result<()>> = all.iter().map(act).collect();
    tried.into_iter().collect()
}
