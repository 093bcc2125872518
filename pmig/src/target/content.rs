//! What memory and files hold, as it comes.

use std::ops::Range;

use super::{no_husk, out_of_turn, Building};
use crate::error::{Error, Result};
use crate::husk::Husk;
use crate::image::Picture;
use crate::protocol::message::{ToTarget, MAX_RAW};
use crate::protocol::Wire;
use crate::state::memory::Layout;
use crate::state::pcb::Backend;

impl Building {
    pub(super) fn pages(&mut self, runs: &[(u64, u32)], wire: &mut Wire) -> Result<()> {
        let all: u64 = runs.iter().map(|(_, len)| *len as u64).sum();
        if all > MAX_RAW as u64 {
            return Err(Error::bad(
                "pages from peer",
                format!("{all} bytes are too many"),
            ));
        }
        let raw = &mut self.buf[..all as usize];
        wire.recv_raw(raw)?;
        let husk = self.husk.as_ref().ok_or_else(no_husk)?;
        let runs = runs.iter().map(|&(start, len)| {
            let end = start.checked_add(len.into());
            end.map(|end| start..end)
                .ok_or_else(|| Error::bad("pages from peer", "they wrap around"))
        });
        let runs: Vec<Range<u64>> = runs.collect::<Result<_>>()?;
        husk.write(&runs, raw)
    }

    pub(super) fn drop_pages(&mut self, runs: &[(u64, u64)], backend: &Backend) -> Result<()> {
        self.discard(runs)?;
        self.clear_out(backend)
    }

    /// Something was done inside the husk, and the program may stop any moment.
    fn clear_out(&mut self, backend: &Backend) -> Result<()> {
        match self.ahead {
            Some(_) => backend.clear_out(self.husk()?.stopped()),
            None => Ok(()),
        }
    }

    pub(super) fn adopt(&mut self, layout: &Layout, backend: &Backend) -> Result<()> {
        layout.check()?;
        self.files.open_mapped(layout, &mut self.mapped)?;
        self.expected = None;
        let husk = self.husk.as_mut().ok_or_else(no_husk)?;
        if let Some(ahead) = &mut self.ahead {
            ahead.descriptors_go();
            self.present.leave_rseq(husk.stopped())?;
        }
        husk.adopt(layout, &self.mapped)?;
        self.clear_out(backend)
    }

    fn discard(&mut self, runs: &[(u64, u64)]) -> Result<()> {
        // That is done inside it.
        self.expected = None;
        let runs: Vec<Range<u64>> = runs.iter().map(|(a, b)| *a..*b).collect();
        self.husk()?.discard(&runs)
    }

    /// A piece of a shipped file.
    pub(super) fn block(
        &mut self,
        file: u32,
        offset: u64,
        len: u32,
        wire: &mut Wire,
    ) -> Result<()> {
        let raw = self
            .buf
            .get_mut(..len as usize)
            .ok_or_else(|| Error::bad("block from peer", format!("{len} bytes are too many")))?;
        wire.recv_raw(raw)?;
        self.files.write(file, offset, raw)
    }

    /// Takes in what was written last. `prepare` is called when nothing more is to be
    /// done inside the husk, unless that was done already.
    pub(super) fn rest(
        &mut self,
        wire: &mut Wire,
        mut is_prepared: bool,
        prepare: impl Fn(&mut Husk) -> Result<()>,
    ) -> Result<()> {
        let mut may_drop = true;
        loop {
            let message = wire.recv()?;
            if !matches!(message, ToTarget::Drops(_) | ToTarget::Later(_)) {
                may_drop = false;
                if !std::mem::replace(&mut is_prepared, true) {
                    prepare(self.husk()?)?;
                    self.laps.add("registers");
                }
            }
            match message {
                ToTarget::Drops(runs) if may_drop => {
                    self.discard(&runs)?;
                    is_prepared = false;
                }
                ToTarget::Later(runs) if may_drop => self.later(&runs)?,
                ToTarget::Pages(runs) => self.pages(&runs, wire)?,
                ToTarget::Block { file, offset, len } => self.block(file, offset, len, wire)?,
                ToTarget::Pictures(pictures) => {
                    Picture::check(&pictures)?;
                    self.pictures = pictures;
                }
                ToTarget::Complete(shipped) => return self.files.finish(&shipped),
                other => return Err(out_of_turn(wire, &other)),
            }
        }
    }
}
