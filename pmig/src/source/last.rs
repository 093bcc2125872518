//! What came for the program while it was on its way.

use super::{Building, Run};
use crate::error::Result;
use crate::protocol::message::ToTarget;
use crate::resolve;
use crate::state::fd::Taken;

impl Run<'_> {
    /// Signals sent to the program since it was captured.
    pub(super) fn late_signals(&self) -> Result<u64> {
        let captured = self.signals.as_ref();
        captured.map_or(Ok(0), |(s, pending)| Ok(s.arrived_since(pending.now()?)))
    }

    /// What was sent to the copy here after the commit is for the program
    /// there.
    pub(super) fn forward_late_signals(&mut self) {
        let told = self.late_signals().and_then(|mask| {
            self.wire.send(&ToTarget::Late(mask))?;
            Ok(mask)
        });
        match told {
            Ok(0) => {}
            Ok(mask) => tracing::info!("signals {mask:#x} were passed on"),
            Err(e) => tracing::warn!("signals that came last may be lost: {e}"),
        }
    }

    /// What was typed for the program, which is frozen now, and that it has not
    /// read.
    pub(super) fn send_typed(&mut self, b: &Building) -> Result<()> {
        let Some(table) = self.last_table.take() else {
            return Ok(());
        };
        let mut note = |taken: &Taken| resolve::note_input(&b.armed, taken);
        let passage = b.keeper.passage();
        let input = self.descriptors.take_input(&table, passage, &mut note)?;
        self.wire.send(&ToTarget::Typed(input))?;
        self.part("terminal");
        Ok(())
    }

    /// What its terminals show, and what was typed meanwhile: nothing that the
    /// program itself depends on.
    pub(super) fn send_pictures(&mut self) {
        let Some(mut holder) = self.holder.take() else {
            return;
        };
        let sent = holder
            .pictures()
            .and_then(|pictures| self.wire.send(&ToTarget::Pictures(pictures)));
        if let Err(e) = sent {
            tracing::warn!("what the program's terminal showed is lost: {e}");
        }
        self.holder = Some(holder);
    }
}
