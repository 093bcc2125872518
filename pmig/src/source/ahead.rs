//! What of the program is told before it stops, so that only what differs is left to
//! be restored in the freeze.

use std::ops::Range;

use super::Run;
use crate::error::Result;
use crate::image::Final;
use crate::protocol::message::ToTarget;
use crate::state::clock::{self, Clock};
use crate::state::fd::FdTable;
use crate::state::memory::Layout;
use crate::state::pcb::{Answers, Backend, CaptureContext, Captured, Foreseen, Moving, Pcb};
use crate::state::restart::{ProgramClock, Watch};
use crate::tracee::Stopped;
use crate::transport::Addr;

/// What there is before the program stops for good.
#[derive(Default)]
pub(super) struct Ahead {
    /// For the target's rehearsal.
    pub rehearsed: Option<Final>,
    /// The program as captured at its first stop.
    known: Option<Pcb>,
    /// What the target was told of it.
    told: Option<Final>,
    /// It was told at the freeze what it most likely will be told.
    likely: bool,
    /// What it said of itself at its first stop.
    answers: Option<Answers>,
    /// The same, and what files told right before the stop.
    foreseen: Option<Foreseen>,
}

impl Run<'_> {
    /// Captures it at its first stop. What stands in the way now may not at the
    /// freeze: then nothing is known ahead.
    pub(super) fn know_ahead(&mut self, stopped: &mut Stopped, watch: &Watch, clock: ProgramClock) {
        let context = CaptureContext {
            watch,
            clock,
            files: &self.entries,
            questions: &self.questions,
            foreseen: None,
            heap: None,
        };
        match self.backend.capture(stopped, &context, &mut |_| Ok(())) {
            Ok(Captured { pcb, answers }) => {
                self.ahead.known = Some(pcb);
                self.ahead.answers = answers;
            }
            Err(e) => tracing::debug!("nothing is known ahead: {e}"),
        }
    }

    /// The clocks must have been compared for the last time. `table`: the descriptors
    /// as seen last.
    ///
    /// # Errors
    /// Those of the connection, and of procfs.
    pub(super) fn send_ahead(&mut self, table: FdTable, layout: &Layout) -> Result<()> {
        let Some(mut pcb) = self.ahead.known.take() else {
            return Ok(());
        };
        // The kernel writes there as soon as it is registered.
        let is_mapped = |at: u64| layout.vmas.iter().any(|v| v.range().contains(&at));
        pcb.areas.rseq = pcb.areas.rseq.filter(|rseq| is_mapped(rseq.address));
        if matches!(self.addr, Addr::File(_)) {
            // Who brings it back knows all of it at once.
            return Ok(());
        }
        let clock = Clock::capture(clock::ahead(self.pid)?, self.difference.least());
        let told = Final {
            pcb,
            descriptors: table,
            clock,
        };
        self.wire
            .send(&ToTarget::Ahead(Box::new(told.clone())))
            .map_err(|e| self.better(e))?;
        self.ahead.told = Some(told);
        Ok(())
    }

    /// What need not be found out while it stands still, unless it must not be taken for
    /// granted.
    ///
    /// # Errors
    /// Those of procfs.
    pub(super) fn foresee(&mut self) -> Result<()> {
        let answers = self.ahead.answers.take();
        if !self.cautious {
            self.ahead.foreseen = self.backend.foresee(&self.entries, answers)?;
        }
        Ok(())
    }

    /// Looks whether it was so, of a program that is about to be held.
    ///
    /// # Errors
    /// As [`Foreseen::confirm`].
    pub(super) fn confirm(&self, stopped: &mut Stopped, was_asked: bool) -> Result<()> {
        match &self.ahead.foreseen {
            Some(f) => f.confirm((stopped, was_asked), &self.questions, &self.entries),
            None => Ok(()),
        }
    }

    /// Captures it at the freeze. `only_pages`: nothing else can have changed, so what
    /// the target will have to do is likely known before all of it was asked. With the
    /// module there is little to do, and to hear of it costs more.
    ///
    /// # Errors
    /// Those of [`crate::state::pcb::Backend::capture`], and of the connection.
    pub(super) fn capture(
        &mut self,
        stopped: &mut Stopped,
        watch: &Watch,
        clock: ProgramClock,
        (only_pages, there): (bool, Clock),
        heap: Option<Range<u64>>,
    ) -> Result<Captured> {
        let is_slow = self.accepted.pcb == Backend::Ptrace.name();
        let told = self.ahead.told.as_ref();
        // With terminals the target waits for the last word.
        let is_free =
            told.is_some_and(|told| told.pcb.is_of_root() && told.descriptors.terminals.is_empty());
        let likely = is_slow && only_pages && !self.postponed && is_free;
        let context = CaptureContext {
            watch,
            clock,
            files: &self.entries,
            questions: &self.questions,
            foreseen: self.ahead.foreseen.as_ref(),
            heap,
        };
        let (wire, told) = (&mut self.wire, &mut self.ahead.likely);
        let mut early = |moving: Moving| match likely && !moving.has_signals() {
            true => {
                *told = true;
                wire.send(&ToTarget::Likely {
                    moving: Box::new(moving),
                    clock: there,
                })
            }
            false => Ok(()),
        };
        let captured = self.backend.capture(stopped, &context, &mut early);
        captured.map_err(|e| self.better(e))
    }

    /// Says what it is at the freeze.
    pub(super) fn send_final(&mut self, last: Final) -> Result<()> {
        let since = self.ahead.told.as_ref().and_then(|told| last.since(told));
        let message = match since {
            Some(since) => ToTarget::Since(Box::new(since)),
            None => ToTarget::Final(Box::new(last)),
        };
        let sent = match self.ahead.likely {
            // It is at work, and needs this no sooner than what comes behind it.
            true => self.wire.queue_with(&message, &[]),
            false => self.wire.send(&message),
        };
        sent.map_err(|e| self.better(e))
    }
}
