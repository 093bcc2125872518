//! From the target's word that all is ready to the end of the copy here.

use std::time::{Duration, Instant};

use super::{answer, unexpected, Building, Run, FATE_PATIENCE};
use crate::error::{Error, Obstacle, Result};
use crate::fault::{self, Role};
use crate::fill;
use crate::hold::Frozen;
use crate::interrupt;
use crate::journal::Committing;
use crate::patience::patience;
use crate::phase::Phase;
use crate::protocol::message::{ToSource, ToTarget};
use crate::report::{Event, Failure, Outcome, Summary};
use crate::resolve::{self, Now};
use crate::state::clock::Reading;
use crate::transport::Addr;

impl Run<'_> {
    /// Waits until all is restored at the target.
    pub(super) fn ready(&mut self, b: &mut Building, _held: &Frozen) -> Result<()> {
        self.begin(Phase::Ready);
        b.keeper.enter(Phase::Ready)?;
        self.send_typed(b)?;
        let there = loop {
            match answer(&mut self.wire)? {
                ToSource::Ready(there) => break there,
                ToSource::Want(pieces) if self.postponed => {
                    fill::send_pieces(b.armed.record(), &pieces, &mut self.wire)?;
                }
                other => return Err(unexpected(&self.wire, &other)),
            }
        };
        self.wait_in_parts(there);
        fault::point(Phase::Ready, Role::Source, || self.wire.link().cut());
        interrupt::check()?;
        let late = self.late_signals()?;
        if late != 0 {
            return Err(Error::Refused(vec![Obstacle::new(
                "signals",
                format!("one came in the moment of the move (mask {late:#x})"),
                "try again",
            )]));
        }
        Ok(())
    }

    /// Sends the order to let it run, and hears when it does.
    pub(super) fn commit(&mut self, b: &mut Building, committing: &Committing) -> Result<Reading> {
        self.laps.add("recorded");
        if matches!(self.addr, Addr::File(_)) {
            // Who brings it back may be quicker than we, if we live at all.
            self.note_left_behind();
        }
        self.wire.send(&ToTarget::Commit(committing.order()))?;
        self.begin(Phase::Commit);
        // The keeper is woken when nobody waits for it. From here on the
        // migration goes on without one too.
        let _ = b.keeper.enter(Phase::Commit);
        fault::point(Phase::Commit, Role::Source, || self.wire.link().cut());
        match answer(&mut self.wire)? {
            ToSource::Committed { at } => {
                self.laps.add("order answered");
                self.laps.log("source");
                Ok(at)
            }
            other => Err(unexpected(&self.wire, &other)),
        }
    }

    /// The copy here goes, if it runs there.
    pub(super) fn release(
        &mut self,
        mut b: Building,
        frozen: Frozen,
        committing: Committing,
        resumed: Result<Reading>,
        begun: Instant,
    ) -> std::result::Result<Summary, Failure> {
        let id = self.id.to_string();
        let held = match resumed {
            Ok(at) => Some((at, frozen)),
            Err(error) => {
                drop(frozen);
                let keeper = &mut b.keeper;
                let tick = || {
                    let _ = keeper.alive();
                };
                let outcome = match resolve::finish(
                    &b.armed,
                    "the answer was lost",
                    patience(FATE_PATIENCE),
                    tick,
                ) {
                    Ok(Now::Moved | Now::Serving) => None,
                    Ok(Now::RunsHere) => Some(self.runs_on()),
                    Ok(Now::Ended) => Some(Outcome::Ended),
                    Ok(Now::Held { .. } | Now::Rebooted) | Err(_) => {
                        Some(Outcome::Unresolved { id: id.clone() })
                    }
                };
                if let Some(outcome) = outcome {
                    if !matches!(outcome, Outcome::Unresolved { .. }) {
                        b.keeper.done();
                    }
                    return Err(Failure { error, outcome });
                }
                None
            }
        };
        let at = held
            .as_ref()
            .map(|(at, _)| at.minus(self.difference.value()));
        let mut summary = self.summary(id.clone(), begun, at);
        if held.is_some() {
            if !matches!(self.addr, Addr::File(_)) {
                self.send_pictures();
            }
            self.forward_late_signals();
        }
        if !matches!(self.addr, Addr::File(_)) {
            self.note_left_behind();
        }
        if b.armed.serving().unwrap_or(self.postponed) {
            if let Err(error) = self.fill(&mut b) {
                // The keeper does it.
                return Err(Failure {
                    error: self.unfilled(error),
                    outcome: Outcome::Moved { id },
                });
            }
            (summary.filled, summary.bytes_sent) = (self.filled, self.wire.sent);
        }
        self.begin(Phase::Release);
        let _ = b.keeper.enter(Phase::Release);
        fault::point(Phase::Release, Role::Source, || self.wire.link().cut());
        let released = match held {
            Some((_, frozen)) => committing.release(frozen),
            None => resolve::finish(&b.armed, "it moved", Duration::ZERO, || {}).map(drop),
        };
        if let Err(error) = released {
            return Err(Failure {
                error,
                outcome: Outcome::Moved { id },
            });
        }
        b.keeper.done();
        self.progress.event(&Event::Done(summary.clone()));
        Ok(summary)
    }
}
