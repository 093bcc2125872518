//! Memory that stays behind at the source, and follows when the program runs.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::{no_husk, out_of_turn, watch_over, Building, PATIENCE};
use crate::error::{Context, Error, Result};
use crate::fault::{self, Role};
use crate::fill::{Filler, Guard, Log};
use crate::image::Picture;
use crate::journal::Committed;
use crate::phase::Phase;
use crate::protocol::message::{ToSource, ToTarget, MAX_RAW};
use crate::protocol::Wire;
use crate::sys::{pidfd, uffd};
use crate::tracee::Batch;

/// Runs of pages that may follow later, at most: every other page of 32 GB. Each
/// takes some 150 bytes.
const MOST_RUNS: usize = 4 << 20;

impl Building {
    /// Gets everything ready for pages that are not there when the program runs.
    pub(super) fn postpone(&mut self, wire: &mut Wire) -> Result<()> {
        let husk = self.husk.as_mut().ok_or_else(no_husk)?;
        // Made while it is root: then what system calls touch is waited for as well.
        let mut b = Batch::new();
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = b.call("userfaultfd", libc::SYS_userfaultfd, &[flags.into()]);
        let fd = husk.stopped().run(b)?.result(fd);
        let process = pidfd::open(husk.pid()).context("open the husk", husk.pid())?;
        let ours = pidfd::get(process.as_fd(), fd as i32);
        let mut b = Batch::new();
        b.call("close", libc::SYS_close, &[fd.into()]);
        husk.stopped().run(b)?;
        let ours = ours.context("fetch the userfaultfd of", husk.pid())?;
        uffd::enable_missing(&ours).context("set up", "a userfaultfd")?;
        self.record.note_filling()?;
        let log = Log::new()?;
        let guard = Guard::start(self.record.record().id, &log, &[Some(&ours)])?;
        // The first who is born into a time namespace fixes it: that was the guard.
        self.time = self.time.another()?;
        self.filler = Some(Filler::new(log, guard, vec![Some(ours)])?);
        wire.send(&ToSource::Postponed)
    }

    /// Takes a note of pages that are not to come before the program runs.
    pub(super) fn later(&mut self, runs: &[(u64, u64)]) -> Result<()> {
        let husk = self.husk.as_ref().ok_or_else(no_husk)?;
        let filler = self
            .filler
            .as_mut()
            .ok_or_else(|| Error::bad("memory from peer", "was never said to follow later"))?;
        self.postponed_runs += runs.len();
        if self.postponed_runs > MOST_RUNS {
            return Err(Error::bad(
                "memory from peer",
                format!("{} runs are too many to follow later", self.postponed_runs),
            ));
        }
        for &(start, end) in runs {
            husk.anonymous(&(start..end))?;
            filler.leave_behind(start..end)?;
        }
        Ok(())
    }

    /// From here on whoever touches what is missing waits for it. What was touched
    /// before must not wait: it is zeros.
    pub(super) fn watch_missing(&mut self) -> Result<()> {
        let Some(filler) = &mut self.filler else {
            return Ok(());
        };
        let husk = self.husk.as_ref().ok_or_else(no_husk)?;
        let missing: Vec<Range<u64>> = filler.left_behind();
        let mut mappings = BTreeSet::new();
        for run in &missing {
            for mapping in husk.anonymous(run)? {
                mappings.insert((mapping.start, mapping.end));
            }
        }
        for (start, end) in mappings {
            uffd::register_missing(filler.uffd()?, start, end - start)
                .context("watch memory at", format_args!("{start:#x}"))?;
        }
        let touched = husk.present(&missing)?;
        for run in &touched {
            filler.is_there(run.clone())?;
        }
        if !touched.is_empty() {
            let path = format!("/proc/{}/mem", husk.pid());
            let mem = File::options().write(true).open(&path);
            self.touched = Some((mem.context("open", path)?, touched));
        }
        Ok(())
    }

    /// Has what was touched too early sent now.
    pub(super) fn fetch_touched(&mut self, wire: &mut Wire) -> Result<()> {
        let Some((mem, touched)) = self.touched.take() else {
            return Ok(());
        };
        let pieces = touched.iter().flat_map(|r| {
            let starts = (r.start..r.end).step_by(MAX_RAW);
            starts.map(|at| at..r.end.min(at + MAX_RAW as u64))
        });
        let pieces: Vec<Range<u64>> = pieces.collect();
        let wanted = pieces.iter().map(|p| (p.start, (p.end - p.start) as u32));
        wire.send(&ToSource::Want(wanted.collect()))?;
        for piece in pieces {
            let bytes = &mut self.buf[..(piece.end - piece.start) as usize];
            match wire.recv()? {
                ToTarget::Piece { start, len, zero }
                    if start == piece.start && len as usize == bytes.len() =>
                {
                    if zero {
                        bytes.fill(0);
                    } else {
                        wire.recv_raw(bytes)?;
                    }
                }
                other => return Err(out_of_turn(wire, &other)),
            }
            mem.write_all_at(bytes, piece.start).context(
                "fill the husk's memory at",
                format_args!("{:#x}", piece.start),
            )?;
        }
        Ok(())
    }
}

/// Fills what is missing, while the program runs.
///
/// # Errors
/// The connection broke: the source comes back with another one, and finds the
/// guard.
pub(super) fn fill(
    filler: Filler,
    wire: &mut Wire,
    committed: &Committed,
    pictures: &mut Vec<Picture>,
    late: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut hear = |message| match message {
        ToTarget::Pictures(last) => match Picture::check(&last) {
            Ok(()) => *pictures = last,
            Err(e) => tracing::warn!("{e}"),
        },
        ToTarget::Late(mask) => late(mask),
        _ => tracing::warn!("the source speaks out of turn"),
    };
    let mut struck = false;
    let mut tick = |wire: &Wire| {
        watch_over(PATIENCE);
        if !std::mem::replace(&mut struck, true) {
            fault::point(Phase::Fill, Role::Target, || wire.link().cut());
        }
    };
    filler.run(wire, committed, &mut hear, &mut tick)
}
