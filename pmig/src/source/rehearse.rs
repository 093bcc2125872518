//! A rehearsal of the freeze.
//!
//! What a process does for the first time is slow: its code is not in any
//! cache, and an emulated machine has not even translated it. So before the
//! program stops, both sides do with a small process of their own what they
//! will do with the program: here it is captured, at the target restored. What
//! comes of it is thrown away.

use super::Run;
use crate::error::Result;
use crate::husk::Husk;
use crate::image::Final;
use crate::proc::status::Pending;
use crate::proc::Kept;
use crate::protocol::message::ToTarget;
use crate::state::clock::{self, Clock};
use crate::state::fd::FdTable;
use crate::state::pcb::{self, CaptureContext};
use crate::state::restart::ProgramClock;

impl Run<'_> {
    /// Captures a process that stands in for the program, before that is stopped for
    /// the first time. Where nothing can be rehearsed the stops are longer.
    pub(super) fn rehearse(&mut self) {
        match self.capture_stand_in() {
            Ok(last) => self.ahead.rehearsed = Some(last),
            Err(e) => tracing::debug!("no rehearsal: {e}"),
        }
    }

    /// Has the target restore it.
    ///
    /// # Errors
    /// Those of the connection.
    pub(super) fn rehearse_there(&mut self) -> Result<()> {
        self.ahead.rehearsed.take().map_or(Ok(()), |last| {
            self.wire.send(&ToTarget::Rehearse(Box::new(last)))
        })
    }

    fn capture_stand_in(&mut self) -> Result<Final> {
        let mut stand_in = Husk::stand_in(&self.preview.layout)?;
        let pid = stand_in.pid();
        let mut watch = self.backend.watch();
        watch.before(pid);
        let (clock, files) = (ProgramClock::default(), Kept::of(pid));
        watch.stopped(stand_in.stopped(), clock)?;
        let context = CaptureContext {
            watch: &watch,
            clock,
            files: &files,
            questions: &self.questions,
            foreseen: None,
            heap: None,
        };
        let pcb = self
            .backend
            .capture(stand_in.stopped(), &context, &mut |_| Ok(()))?
            .pcb;
        self.signals = Some((pcb.signals.clone(), Pending::of(pid)?));
        self.late_signals()?;
        self.signals = None;
        pcb::look_again(&files)?;
        Ok(Final {
            pcb,
            descriptors: FdTable {
                descriptions: Vec::new(),
                holders: Vec::new(),
                ..self.preview.descriptors.clone()
            },
            clock: Clock::capture(clock::ahead(pid)?, self.difference.least()),
        })
    }
}
