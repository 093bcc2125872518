//! A rehearsal of the freeze: what the source captured of a process of its own
//! is restored into one of ours, and thrown away. See the source's.

use super::Building;
use crate::error::Result;
use crate::husk::Husk;
use crate::image::Final;
use crate::state::fd::Whose;
use crate::state::memory::Layout;
use crate::state::pcb::{Backend, Present};
use crate::state::restart::ProgramClock;
use crate::tracee::Batch;

impl Building {
    /// A process that stands in for the husk.
    pub(super) fn stand_in(layout: &Layout) -> Option<Husk> {
        Husk::stand_in(layout)
            .map_err(|e| tracing::debug!("no rehearsal: {e}"))
            .ok()
    }

    /// Where it goes wrong, the freeze is slower, or the program is told so
    /// when it really matters.
    pub(super) fn rehearse(&mut self, last: &Final, backend: &Backend) {
        if let Some(stand_in) = self.stand_in.take() {
            if let Err(e) = self.restore_stand_in(stand_in, last, backend) {
                tracing::debug!("the rehearsal ended early: {e}");
            }
        }
    }

    fn restore_stand_in(
        &mut self,
        mut stand_in: Husk,
        last: &Final,
        backend: &Backend,
    ) -> Result<()> {
        let mut present = Present::fresh(stand_in.pid())?;
        let mut batch = Batch::new();
        let own = std::process::id() as i32;
        let installation = self.descriptors.install(own, &mut batch, Whose::StandIn);
        let clock = ProgramClock::default();
        let done = backend.restore(stand_in.stopped(), batch, &last.pcb, &mut present)?;
        installation.check(&done)?;
        backend.prepare(stand_in.stopped(), &last.pcb, clock)?;
        backend.finish(stand_in.stopped(), &last.pcb, clock)
    }
}
