//! What memory and files hold, as it comes.

use std::ops::Range;

use super::{no_husk, out_of_turn, Building};
use crate::error::{Error, Result};
use crate::husk::Husk;
use crate::image::Picture;
use crate::protocol::message::{ToTarget, MAX_RAW};
use crate::protocol::Wire;

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

    pub(super) fn discard(&mut self, runs: &[(u64, u64)]) -> Result<()> {
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
    /// done inside the husk.
    pub(super) fn rest(
        &mut self,
        wire: &mut Wire,
        prepare: impl FnOnce(&mut Husk) -> Result<()>,
    ) -> Result<()> {
        let mut prepare = Some(prepare);
        loop {
            let message = wire.recv()?;
            if !matches!(message, ToTarget::Drops(_) | ToTarget::Later(_)) {
                if let Some(prepare) = prepare.take() {
                    prepare(self.husk()?)?;
                    self.laps.add("registers");
                }
            }
            match message {
                ToTarget::Drops(runs) if prepare.is_some() => self.discard(&runs)?,
                ToTarget::Later(runs) if prepare.is_some() => self.later(&runs)?,
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
