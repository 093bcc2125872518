//! Letting the program go on here, when a migration does not come to its
//! commit.

use std::time::Instant;

use super::{Building, Run, FATE_PATIENCE};
use crate::error::Error;
use crate::hold::{Frozen, Hold};
use crate::journal::{Armed, Stage};
use crate::keeper::Keeper;
use crate::patience::patience;
use crate::proc::status::Status;
use crate::report::{Failure, Outcome};
use crate::resolve::{self, Now};

/// Whether a process that could not be moved has ended, which shows in many
/// errors.
pub(super) fn has_ended(pid: i32, error: &Error) -> bool {
    match Status::read(pid) {
        _ if matches!(error, Error::Gone(_)) => true,
        Ok(status) => matches!(status.letter, 'Z' | 'X'),
        Err(e) => matches!(e, Error::Gone(_)),
    }
}

impl Run<'_> {
    /// Before anything is decided: lets the program go on here.
    pub(super) fn give_up(
        &mut self,
        mut b: Building,
        error: Error,
        since: Option<Instant>,
    ) -> Failure {
        drop(b.last.take());
        let ended = has_ended(self.pid, &error);
        let outcome = match (ended, since) {
            (true, _) => Outcome::Ended,
            (_, Some(at)) => Outcome::RunsOn {
                stopped: at.elapsed(),
            },
            (_, None) => Outcome::NeverStopped,
        };
        abandon(&b.armed, b.keeper, b.hold, &error);
        Failure { error, outcome }
    }

    /// The same when its cgroup holds it.
    pub(super) fn thaw(
        &mut self,
        b: Building,
        frozen: Frozen,
        error: Error,
        since: Instant,
    ) -> Failure {
        match b.armed.abort(&error.to_string()) {
            Ok(Stage::Aborted(..)) => {}
            // Whoever decided otherwise knew why; the records say what to do.
            Ok(_) | Err(_) => {
                drop(frozen);
                let finished =
                    resolve::finish(&b.armed, "undecided", patience(FATE_PATIENCE), || {});
                let outcome = match finished {
                    Ok(Now::RunsHere) => Outcome::RunsOn {
                        stopped: since.elapsed(),
                    },
                    Ok(Now::Ended) => Outcome::Ended,
                    Ok(Now::Moved) => Outcome::Moved {
                        id: self.id.to_string(),
                    },
                    _ => Outcome::Unresolved {
                        id: self.id.to_string(),
                    },
                };
                return Failure { error, outcome };
            }
        }
        match frozen.thaw() {
            Ok(hold) => {
                let stopped = since.elapsed();
                abandon(&b.armed, b.keeper, Some(hold), &error);
                Failure {
                    error,
                    outcome: Outcome::RunsOn { stopped },
                }
            }
            // The keeper tries again.
            Err(_) => Failure {
                error,
                outcome: Outcome::Unresolved {
                    id: self.id.to_string(),
                },
            },
        }
    }
}

/// Lets the program go on, and tells whoever has to know.
pub(super) fn abandon(armed: &Armed, keeper: Keeper, hold: Option<Hold>, why: &Error) {
    let aborted = armed.abort(&why.to_string());
    if let Some(hold) = hold {
        if let Err(e) = hold.release() {
            tracing::warn!("the cgroup made for the migration stays: {e}");
        }
    }
    if aborted.is_ok() {
        if let Err(e) = armed.settle() {
            tracing::warn!("the record of the migration stays open: {e}");
        }
    }
    keeper.done();
}
