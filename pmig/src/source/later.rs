//! Memory that stays behind at the freeze, and follows when the program runs.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::send::{per_second, size};
use super::{answer, unexpected, Building, Mode, Run};
use crate::error::{Error, Result};
use crate::fault::{self, Role};
use crate::fill::{self, Told};
use crate::interrupt;
use crate::phase::Phase;
use crate::protocol::message::{ToSource, ToTarget};
use crate::report::{Event, Filling};
use crate::state::memory::{page_of, Found, PAGE};
use crate::sys::ptrace::Regs;
use crate::tracee::Stopped;
use crate::transport::Addr;

/// Around each address in the registers, in bytes: what the program touches when it
/// goes on, and what is touched for it before.
const AROUND: Range<u64> = PAGE..4 * PAGE;
/// Of the stack, in bytes.
const STACK: Range<u64> = 2 * PAGE..16 * PAGE;
/// Bytes of what poll(2) waits for, at most.
const POLLED: u64 = 1 << 20;

/// Bytes that are sent sooner than what the target has of them is dropped there: for
/// that it executes something in the husk.
const FEW: u64 = 64 * PAGE;

/// What is to be known of a round before it is sent.
pub(super) struct Outlook {
    /// From 1.
    pub round: u32,
    pub bytes: u64,
    /// What fits the freeze.
    pub budget: u64,
    /// The rounds before did not get smaller.
    pub stuck: bool,
}

impl Run<'_> {
    /// Whether what is left is to follow later.
    pub(super) fn is_left_behind(&self, o: &Outlook) -> bool {
        if matches!(self.addr, Addr::File(_)) {
            return false;
        }
        match self.options.mode {
            Mode::Stop | Mode::Pre => false,
            Mode::Post => true,
            Mode::Hybrid => o.round > 1,
            Mode::Auto => o.stuck && o.bytes > o.budget,
        }
    }

    /// Has the target get ready for memory that follows later.
    pub(super) fn postpone(&mut self, b: &mut Building) -> Result<()> {
        // From here on what is held at the end must not go before all of it was sent.
        b.armed.note_serving()?;
        self.wire.send(&ToTarget::Postpone)?;
        match answer(&mut self.wire)? {
            ToSource::Postponed => {}
            other => return Err(unexpected(&self.wire, &other)),
        }
        self.postponed = true;
        Ok(())
    }

    /// What is left at the freeze: all but the pages themselves is told, among it what
    /// stays behind.
    pub(super) fn last_look(&mut self, b: &mut Building, stopped: &Stopped) -> Result<Found> {
        let mut found = b.tracker.last_look()?;
        if self.postponed {
            b.tracker
                .postpone(&mut found, &wanted_at_once(stopped)?, FEW);
        }
        self.send_layout(&b.tracker, &found)?;
        self.send_drops(&found)?;
        self.send_later(b)?;
        Ok(found)
    }

    fn send_later(&mut self, b: &Building) -> Result<()> {
        let later = b.tracker.postponed();
        self.left_behind = later.iter().map(|r| r.end - r.start).sum();
        let later: Vec<(u64, u64)> = later.into_iter().map(|r| (r.start, r.end)).collect();
        for some in later.chunks(1 << 16) {
            // Behind it come pages, or the last word.
            self.wire
                .queue_with(&ToTarget::Later(some.to_vec()), &[])
                .map_err(|e| self.better(e))?;
        }
        Ok(())
    }

    /// It runs at the target: sends what stayed behind, until nothing is missing.
    ///
    /// # Errors
    /// The copy here is gone, or a person does not want to wait: then the keeper goes
    /// on.
    pub(super) fn fill(&mut self, b: &mut Building) -> Result<()> {
        self.progress.event(&Event::Resumed(self.freeze.clone()));
        let begun = self.begin(Phase::Fill);
        let _ = b.keeper.enter(Phase::Fill);
        let (of, mut sent, mut shown, mut struck) = (self.left_behind, 0, begun, false);
        let filling = |sent: u64| {
            let elapsed = begun.elapsed();
            let rate = per_second(sent, elapsed);
            Event::Fill(Filling {
                bytes: sent,
                of,
                elapsed,
                rate,
                eta: (rate > 0)
                    .then(|| Duration::from_secs_f64(of.saturating_sub(sent) as f64 / rate as f64)),
            })
        };
        let before = self.wire.sent;
        let Run { wire, progress, .. } = self;
        let keeper = &mut b.keeper;
        fill::serve_until_whole(&b.armed, Some(wire), &mut |told| {
            // Without a keeper it goes on as well.
            let _ = keeper.alive();
            interrupt::check()?;
            match told {
                Told::Sent(bytes, wire) => {
                    sent += bytes;
                    if !std::mem::replace(&mut struck, true) {
                        fault::point(Phase::Fill, Role::Source, || wire.link().cut());
                    }
                }
                Told::Waiting => {}
                Told::Lost(why) => progress.event(&Event::Note {
                    text: format!("{why}; the program waits for its memory; trying again"),
                }),
                Told::Back => tracing::info!("the target is reached again"),
            }
            if shown.elapsed() > Duration::from_millis(200) {
                shown = Instant::now();
                progress.event(&filling(sent));
            }
            Ok(())
        })?;
        // Over however many connections.
        self.wire.sent = before + sent;
        self.filled = Some(begun.elapsed());
        self.progress.event(&filling(sent));
        let rate = size(per_second(sent, begun.elapsed()));
        let what = format!("{} followed at {rate}/s", size(sent));
        self.ended(Phase::Fill, what, begun);
        Ok(())
    }

    /// Why the rest could not be sent, and who goes on with it.
    pub(super) fn unfilled(&self, error: Error) -> Error {
        let to = crate::error::printable(&self.accepted.host);
        match error {
            Error::Interrupted | Error::Link { .. } | Error::Deadline { .. } => Error::bad(
                format!("process {}", self.pid),
                format!(
                    "runs on {to}, and part of its memory is here still; pmig's keeper goes on \
                     sending it ({error})"
                ),
            ),
            error => error,
        }
    }
}

/// What must not be absent when the program is put together, and what it wants
/// first: the kernel writes to the rseq area, and reads what a call is made with.
fn wanted_at_once(stopped: &Stopped) -> Result<Vec<Range<u64>>> {
    let r = stopped.regs();
    let mut all = vec![around(r.rsp, &STACK)];
    all.extend(pointers(&r).map(|at| around(at, &AROUND)));
    if r.orig_rax as i64 == libc::SYS_poll || r.orig_rax as i64 == libc::SYS_restart_syscall {
        let end = r.rdi.saturating_add(r.rsi.saturating_mul(8).min(POLLED));
        all.push(page_of(r.rdi).start..page_of(end.min(u64::MAX - PAGE)).end);
    }
    let rseq = stopped.rseq()?;
    if rseq.address != 0 {
        all.push(around(rseq.address, &AROUND));
    }
    Ok(all)
}

fn pointers(r: &Regs) -> impl Iterator<Item = u64> {
    [
        r.rip, r.rbp, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15, r.fs_base, r.gs_base,
    ]
    .into_iter()
}

fn around(at: u64, by: &Range<u64>) -> Range<u64> {
    let start = page_of(at.saturating_sub(by.start)).start;
    start..page_of(at.saturating_add(by.end).min(u64::MAX - PAGE)).start
}
