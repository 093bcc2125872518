//! What is measured on the way: phases, the parts of the freeze, and how far
//! the two machines' clocks are apart.

use std::time::{Duration, Instant};

use super::{answer, unexpected, Mode, Run};
use crate::error::Result;
use crate::phase::Phase;
use crate::protocol::message::{Ready, ToSource, ToTarget};
use crate::report::{End, Event, Summary};
use crate::state::clock::{self, Difference, Reading};
use crate::state::memory::{Tracking, TrackingChoice};
use crate::state::restart::ProgramClock;
use crate::sys::memory::peak;
use crate::transport::Addr;

/// Questions by which the clocks are compared.
const PINGS: usize = 8;

impl Run<'_> {
    /// `at`: when it went on there, by this machine's clock; none where nobody
    /// could say.
    pub(super) fn summary(&mut self, id: String, begun: Instant, at: Option<Reading>) -> Summary {
        if let Some(at) = at {
            self.freeze.total = self.stood_still(at);
            self.freeze.at = begun
                .elapsed()
                .saturating_sub(self.stood_still(Reading::now()));
            self.freeze.clock_error = Some(Duration::from_nanos(self.difference.error() as u64));
            let known: Duration = self.freeze.parts.iter().map(|p| p.time).sum();
            self.freeze
                .add("resume", self.freeze.total.saturating_sub(known));
        }
        Summary {
            id,
            pid: self.pid,
            comm: self.preview.comm.clone(),
            to: self.accepted.host.clone(),
            end: match (self.addr, self.options.stays) {
                (Addr::File(_), false) => End::InFile,
                (Addr::File(_), true) => End::Copied,
                _ => End::Moved,
            },
            total: begun.elapsed(),
            bytes_sent: self.wire.sent,
            rounds: self.rounds,
            attach: self.attach,
            tracking: self.tracking[0].name().into(),
            left_behind: self.left_behind,
            filled: None,
            peak: [peak(), self.peak_there],
            freeze: self.freeze.clone(),
        }
    }

    /// From the stop to a moment by this machine's clock.
    pub(super) fn stood_still(&self, until: Reading) -> Duration {
        let ns = self.stopped_at.map_or(0, |at| until.minus(at).monotonic);
        Duration::from_nanos(ns.max(0) as u64)
    }

    pub(super) fn compare_clocks(&mut self) -> Result<()> {
        self.difference = Difference::default();
        for _ in 0..PINGS {
            let before = Reading::now();
            self.wire.send(&ToTarget::Ping)?;
            match answer(&mut self.wire)? {
                ToSource::Pong(theirs) => self.difference.add(before, theirs, Reading::now()),
                other => return Err(unexpected(&self.wire, &other)),
            }
        }
        Ok(())
    }

    pub(super) fn program_clock(&self) -> Result<ProgramClock> {
        Ok(ProgramClock {
            offset: clock::ahead(self.pid)?.monotonic,
        })
    }

    pub(super) fn begin(&mut self, phase: Phase) -> Instant {
        self.progress.event(&Event::Phase { phase });
        Instant::now()
    }

    pub(super) fn ended(&mut self, phase: Phase, what: String, begun: Instant) {
        self.progress.event(&Event::Ended {
            phase,
            what,
            elapsed: begun.elapsed(),
        });
    }

    /// The end of the build: by which means the program is followed.
    pub(super) fn built(&mut self, tracking: Tracking, begun: Instant) {
        let asked_for = self.options.tracking != TrackingChoice::Auto;
        if tracking == Tracking::None && self.options.mode == Mode::Pre && !asked_for {
            self.progress.event(&Event::Note {
                text: "this kernel cannot tell which pages are written: all memory is copied \
                       while the program stands still"
                    .into(),
            });
        }
        self.tracking = vec![tracking];
        let what = format!(
            "{} mappings, {} descriptors; stopped {:.1} ms to track writes",
            self.preview.layout.vmas.len(),
            self.preview.descriptors.holders.len(),
            self.attach.as_secs_f64() * 1e3
        );
        self.ended(Phase::Build, what, begun);
    }

    pub(super) fn part(&mut self, name: &'static str) {
        let now = Instant::now();
        self.freeze.add(name, now.duration_since(self.lap));
        self.laps.add(name);
        self.lap = now;
    }

    /// Divides the wait for Ready into the target's own work and the wire.
    pub(super) fn wait_in_parts(&mut self, there: Ready) {
        let waited = self.lap.elapsed();
        self.peak_there = there.peak;
        self.laps.add("waited for ready");
        self.lap = Instant::now();
        let mut left = waited;
        for (name, ns) in [
            ("pages", there.memory),
            ("descriptors", there.descriptors),
            ("pcb", there.pcb),
        ] {
            let part = Duration::from_nanos(ns).min(left);
            left -= part;
            self.freeze.add(name, part);
        }
        self.freeze.add("wire", left);
    }
}
