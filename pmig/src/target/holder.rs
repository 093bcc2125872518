//! What the target asks of the husk's parent.

use super::Building;
use crate::error::{Error, Result};
use crate::state::pcb::Pcb;

impl Building {
    /// Without it the program's terminals would hang up as soon as it runs.
    pub(super) fn holder_lives(&self) -> Result<()> {
        let needed = !self.descriptors.masters().is_empty();
        match &self.holder {
            Some(holder) if needed && !holder.is_there() => Err(Error::bad(
                "the program's holder",
                "died before the program could run",
            )),
            _ => Ok(()),
        }
    }

    /// What is to be sent a signal at its parent's end has one that does not
    /// end, unless it would be hung up then anyway.
    pub(super) fn find_parent(&mut self, pcb: &Pcb) -> Result<()> {
        if pcb.attributes.parent_death_signal == 0 || !self.descriptors.masters().is_empty() {
            return Ok(());
        }
        let pid = self.record.record().pid;
        self.holder.take().map_or(Ok(()), |h| h.leave(pid))
    }
}
