//! What of the program is restored before it stops.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{no_husk, Building};
use crate::error::{Error, Result};
use crate::husk::Husk;
use crate::image::{Final, Since};
use crate::state::clock::{Clock, A_MOMENT};
use crate::state::fd::{Installation, Shape, Whose};
use crate::state::pcb::{Backend, Moving, Pcb};
use crate::state::restart::ProgramClock;
use crate::tracee::Batch;

/// What the husk has of the program already.
pub(super) struct Ahead {
    pcb: Pcb,
    /// By which its time namespace was set.
    clock: Clock,
    /// Whether it holds the descriptors.
    installed: bool,
    /// How long it took.
    took: Duration,
}

impl Ahead {
    /// Its address space changes: that takes the descriptors.
    pub(super) fn descriptors_go(&mut self) {
        self.installed = false;
    }

    pub(super) fn has_descriptors(&self) -> bool {
        self.installed
    }

    /// Whether the time namespace it is in will do. To wait a moment, at the end, mostly
    /// costs less than another one.
    fn is_kept_by(&self, clock: &Clock) -> bool {
        clock
            .kept_by(&self.clock)
            .is_some_and(|wait| wait <= self.took.min(A_MOMENT))
    }
}

/// What the husk was made before the program was known to be that.
pub(super) struct Expected {
    pub pcb: Pcb,
    pub clock: Clock,
}

impl Building {
    /// Makes the husk the program as it was known last. What is found to be different
    /// at the freeze is done then.
    pub(super) fn restore_ahead(&mut self, known: Final, backend: &Backend) -> Result<()> {
        if self.ahead.is_some() {
            return Err(Error::bad("source", "says twice what it knows already"));
        }
        let begun = Instant::now();
        self.open_descriptors(known.descriptors)?;
        let husk = self.husk.as_mut().ok_or_else(no_husk)?;
        known.clock.set(&self.time)?;
        let mut batch = Batch::new();
        Husk::enter_time(&mut batch, self.time.as_fd());
        // A terminal that it controlled already would tell it by signals what becomes of
        // it until the freeze.
        let installed = self.descriptors.table().terminals.is_empty();
        let installation =
            installed.then(|| self.descriptors.install(own(), &mut batch, Whose::Program));
        let done = backend.restore_ahead(husk.stopped(), batch, &known.pcb, &mut self.present)?;
        installation.map_or(Ok(()), |i| i.check(&done))?;
        self.ahead = Some(Ahead {
            pcb: known.pcb,
            clock: known.clock,
            installed,
            took: begun.elapsed(),
        });
        Ok(())
    }

    /// Makes the husk what the program is likely to be found to be.
    ///
    /// # Errors
    /// As [`Backend::restore`]; what the source says makes no sense here.
    pub(super) fn expect(&mut self, moving: Moving, told: Clock, backend: &Backend) -> Result<()> {
        let known = match (&self.ahead, &self.expected) {
            (Some(known), None) => known,
            _ => return Err(Error::bad("source", "says out of turn what is likely")),
        };
        let pcb = known.pcb.moved_on(moving);
        if !known.installed || !known.is_kept_by(&told) {
            return Ok(());
        }
        let clock = ProgramClock {
            offset: told.ahead.monotonic,
        };
        let husk = self.husk.as_mut().ok_or_else(no_husk)?;
        let done = backend.restore_likely(husk.stopped(), &pcb, clock, &mut self.present)?;
        self.expected = done.then_some(Expected { pcb, clock: told });
        Ok(())
    }

    /// What the program is, by what has changed since.
    pub(super) fn put_together(&self, since: Since) -> Result<Final> {
        let known = self.ahead.as_ref();
        let known = known.ok_or_else(|| {
            Error::bad("source", "says what differs from something it did not say")
        })?;
        Ok(Final {
            pcb: known.pcb.moved_on(since.moving),
            descriptors: since.descriptors,
            clock: since.clock,
        })
    }

    /// What of clocks and descriptors is left to be done in the freeze. Afterwards
    /// `clock` is exact, and says from when on the program may run.
    pub(super) fn what_differs(
        &mut self,
        clock: &mut Clock,
        shape: Shape,
        batch: &mut Batch,
    ) -> Result<Option<Installation>> {
        let ahead = self.ahead.as_ref();
        if !ahead.is_some_and(|a| a.is_kept_by(clock)) {
            if ahead.is_some() {
                // Who is in one has fixed it.
                self.time = self.time.another()?;
            }
            clock.restore(&self.time)?;
            Husk::enter_time(batch, self.time.as_fd());
        }
        let installed = ahead.is_some_and(|a| a.installed) && shape == Shape::Same;
        Ok((!installed).then(|| self.descriptors.install(own(), batch, Whose::Program)))
    }
}

fn own() -> i32 {
    std::process::id() as i32
}
