//! Letting the program go on here, when a migration does not come to its
//! commit.

use std::time::Instant;

use super::{answer, unexpected, Building, Run, FATE_PATIENCE, PATIENCE};
use crate::checkpoint;
use crate::error::Error;
use crate::hold::{Frozen, Hold};
use crate::journal::{Armed, Stage};
use crate::keeper::Keeper;
use crate::patience::patience;
use crate::phase::Phase;
use crate::proc::status::Status;
use crate::protocol::message::{ToSource, ToTarget};
use crate::report::{Event, Failure, Outcome, Summary};
use crate::resolve::{self, Now};
use crate::state::clock::Reading;

/// Whether a process that could not be moved has ended, which shows in many
/// errors.
fn has_ended(pid: i32, error: &Error) -> bool {
    match Status::read(pid) {
        _ if matches!(error, Error::Gone(_)) => true,
        Ok(status) => matches!(status.letter, 'Z' | 'X'),
        Err(e) => matches!(e, Error::Gone(_)),
    }
}

/// A failure before anything stopped the program.
pub(super) fn never(pid: i32, error: Error) -> Failure {
    let outcome = match has_ended(pid, &error) {
        true => Outcome::Ended,
        false => Outcome::NeverStopped,
    };
    Failure { error, outcome }
}

impl Run<'_> {
    /// Before anything is decided: lets the program go on here.
    pub(super) fn give_up(&mut self, mut b: Building, error: Error) -> Failure {
        drop(b.last.take());
        let ended = has_ended(self.pid, &error);
        let outcome = match (ended, self.stopped_at) {
            (true, _) => Outcome::Ended,
            (_, Some(_)) => self.runs_on(),
            (_, None) => Outcome::NeverStopped,
        };
        self.holder = None;
        abandon(&b.armed, b.keeper, b.hold, &error.to_string());
        Failure { error, outcome }
    }

    /// The same when its cgroup holds it.
    pub(super) fn thaw(&mut self, b: Building, frozen: Frozen, error: Error) -> Failure {
        let outcome = match self.let_go(&b, frozen, &error.to_string()) {
            Ok(hold) => {
                self.holder = None;
                let outcome = self.runs_on();
                abandon(&b.armed, b.keeper, Some(hold), &error.to_string());
                outcome
            }
            Err(outcome) => outcome,
        };
        Failure { error, outcome }
    }

    /// All of it is in a file, and it runs on here: that goes first.
    pub(super) fn stay(
        &mut self,
        mut b: Building,
        frozen: Frozen,
        begun: Instant,
    ) -> std::result::Result<Summary, Failure> {
        const WHY: &str = "it was to run on here";
        let hold = self.let_go(&b, frozen, WHY).map_err(|outcome| {
            let error = Error::bad(format!("process {}", self.pid), "was not let go on");
            Failure { error, outcome }
        })?;
        self.holder = None;
        let at = Reading::now();
        // Nothing stands still any more.
        let _ = b.keeper.running();
        let _ = self.wire.set_deadline(patience(PATIENCE));
        let kept = self.wire.send(&ToTarget::Keep);
        let kept = kept.and_then(|()| match answer(&mut self.wire)? {
            ToSource::Committed { .. } => Ok(()),
            other => Err(unexpected(&self.wire, &other)),
        });
        let kept = match kept {
            Err(_) if checkpoint::is_whole(self.addr, self.id) => Ok(()),
            kept => kept,
        };
        abandon(&b.armed, b.keeper, Some(hold), WHY);
        kept.map_err(|error| Failure {
            error,
            outcome: Outcome::RunsOn {
                stopped: self.stood_still(at),
            },
        })?;
        let summary = self.summary(self.id.to_string(), begun, Some(at));
        self.begin(Phase::Release);
        self.progress.event(&Event::Done(summary.clone()));
        Ok(summary)
    }

    /// It goes on here from now on, having stood still until now.
    pub(super) fn runs_on(&self) -> Outcome {
        Outcome::RunsOn {
            stopped: self.stood_still(Reading::now()),
        }
    }

    /// Records ABORTED and thaws, if nothing else was decided meanwhile.
    fn let_go(
        &self,
        b: &Building,
        frozen: Frozen,
        why: &str,
    ) -> std::result::Result<Hold, Outcome> {
        let unresolved = || Outcome::Unresolved {
            id: self.id.to_string(),
        };
        match b.armed.withdraw(why) {
            // If it does not thaw, the keeper tries again.
            Ok(Stage::Aborted(..)) => {
                let passage = b.keeper.passage();
                let given = resolve::complete_input(&b.armed, passage)
                    .and_then(|()| resolve::give_input_back(&b.armed, &frozen));
                if let Err(e) = given {
                    tracing::warn!("what was typed for the program is lost: {e}");
                }
                frozen.thaw().map_err(|_| unresolved())
            }
            // Whoever decided otherwise knew why; the records say what to do.
            Ok(_) | Err(_) => {
                drop(frozen);
                let finished =
                    resolve::finish(&b.armed, "undecided", patience(FATE_PATIENCE), || {});
                Err(match finished {
                    Ok(Now::RunsHere) => self.runs_on(),
                    Ok(Now::Ended) => Outcome::Ended,
                    Ok(Now::Moved | Now::Serving) => Outcome::Moved {
                        id: self.id.to_string(),
                    },
                    _ => unresolved(),
                })
            }
        }
    }
}

/// Lets the program go on, and tells whoever has to know.
pub(super) fn abandon(armed: &Armed, keeper: Keeper, hold: Option<Hold>, why: &str) {
    let aborted = armed.withdraw(why);
    if let Some(hold) = hold {
        if let Err(e) = hold.release() {
            tracing::warn!("the cgroup made for the migration stays: {e}");
        }
    }
    if aborted.is_ok() {
        if let Some(addr) = &armed.record().addr {
            checkpoint::forget(addr, armed.record().id);
        }
        if let Err(e) = armed.settle() {
            tracing::warn!("the record of the migration stays open: {e}");
        }
    }
    keeper.done();
}
