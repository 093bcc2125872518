//! What came for the program while it was on its way.

use super::Run;
use crate::error::Result;
use crate::protocol::message::ToTarget;

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
