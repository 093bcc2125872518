//! Memory on its way to the target.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::later::Outlook;
use super::{answer, unexpected, Building, Run, LITTLE};
use crate::error::Result;
use crate::fault::{self, Role};
use crate::holder;
use crate::interrupt;
use crate::phase::Phase;
use crate::protocol::message::{ToSource, ToTarget, MAX_RAW};
use crate::report::{Event, Round};
use crate::state::fd::Beat;
use crate::state::memory::{Backing, Found, Tracker, Vma, PAGE};
use crate::state::pcb;
use crate::sys::across::MOST_RUNS;

/// Rounds of the copy, at most.
const MOST_ROUNDS: u32 = 30;
/// Seconds that the last round must take for one more to make the freeze shorter.
const WORTH_WHILE: f64 = 1e-3;
/// Half of a round trip, in nanoseconds, to a target that takes its time for what it
/// is to drop as well.
const SLOW_ANSWER: i64 = 100_000;
/// Looks right before the stop of a large program, at most, so that the last one is a
/// quick one: none is, where what it writes to changes all the time.
const CLOSE_LOOKS: u32 = 4;
/// Bytes that are read, and sent, at once.
const PIECE: u64 = MAX_RAW as u64;

impl Run<'_> {
    /// Copies memory and files while the program runs, until what is left fits
    /// the freeze.
    pub(super) fn copy(&mut self, b: &mut Building) -> Result<()> {
        let begun = self.begin(Phase::Copy);
        b.keeper.enter(Phase::Copy)?;
        self.buf = vec![0; MAX_RAW];
        self.rehearse_there()?;
        let mut smallest = u64::MAX;
        let mut worse = 0;
        let mut budget = 0;
        let mut last_look = None;
        let table = loop {
            let looked = Instant::now();
            let mut found = b.tracker.look()?;
            let table = self.descriptors.look(Beat::Running)?;
            if table.reads_past_the_cache() {
                b.tracker.distrust();
            }
            self.sync_files(&b.tracker.layout, &table.files())?;
            let bytes = found.bytes();
            // What was written since the last look, over that time.
            let dirty_rate =
                last_look.map(|then: Instant| per_second(bytes, looked.duration_since(then)));
            last_look = Some(looked);
            self.rounds += 1;
            // Rounds that do not shrink lead nowhere.
            worse = if bytes as f64 > smallest as f64 * 0.9 {
                worse + 1
            } else {
                0
            };
            smallest = smallest.min(bytes);
            let outlook = Outlook {
                round: self.rounds,
                bytes,
                budget,
                stuck: worse > 0 || self.rounds >= MOST_ROUNDS || !b.tracker.tracks(),
            };
            if self.is_left_behind(&outlook) {
                self.postpone(b)?;
                b.tracker.postpone(&mut found, &[], 0);
            }
            let rate = self.round(&mut b.tracker, &found, dirty_rate)?;
            fault::point(Phase::Copy, Role::Source, || self.wire.link().cut());
            if !b.tracker.tracks() || self.postponed {
                break table;
            }
            budget = (rate as f64 * self.options.max_freeze.as_secs_f64() / 2.0) as u64;
            budget = budget.max(16 * PAGE);
            if self.rounds > 1 && bytes <= budget {
                self.slow = bytes as f64 / rate as f64 > WORTH_WHILE;
                break table;
            }
            if worse >= 3 || self.rounds >= MOST_ROUNDS {
                self.progress.event(&Event::Note {
                    text: format!(
                        "the program writes as fast as the link carries; the rest, {}, is copied \
                         while it stands still",
                        size(bytes)
                    ),
                });
                break table;
            }
        };
        self.compare_clocks()?;
        self.slow |= self.postponed && self.difference.error() > SLOW_ANSWER;
        self.descriptors.recheck()?;
        // Opens what is read at the freeze; what is found now may be gone by then.
        pcb::look_again(&self.entries)?;
        self.holder = holder::find(self.pid)?;
        self.send_ahead(table, &b.tracker.layout)?;
        self.ended(Phase::Copy, format!("{} rounds", self.rounds), begun);
        Ok(())
    }

    /// What was written since the last round: little, and nobody waits until it has
    /// come, so that still less is left when the program stops. Of what is to follow
    /// later the target drops what it has.
    pub(super) fn send_meanwhile(&mut self, b: &mut Building) -> Result<()> {
        let mut looks = 0;
        while !self.postponed && looks < CLOSE_LOOKS && b.tracker.counts_faults() {
            interrupt::check()?;
            let found = b.tracker.look_closely()?;
            self.send_found(b, &found)?;
            if b.tracker.is_accounted() {
                return Ok(());
            }
            looks += 1;
        }
        if !self.slow || looks > 0 {
            return Ok(());
        }
        let mut found = b.tracker.look()?;
        if self.postponed {
            b.tracker.postpone(&mut found, &[], 0);
        }
        self.send_found(b, &found)
    }

    fn send_found(&mut self, b: &mut Building, found: &Found) -> Result<()> {
        self.send_layout(&b.tracker, found)?;
        self.send_drops(found)?;
        let keeper = &mut b.keeper;
        self.send_pages(&mut b.tracker, found, &mut |_, _| keeper.alive())
    }

    /// One round; returns its rate in bytes per second.
    pub(super) fn round(
        &mut self,
        tracker: &mut Tracker,
        found: &Found,
        dirty_rate: Option<u64>,
    ) -> Result<u64> {
        let started = Instant::now();
        let mut shown = started;
        let of = found.bytes() + self.files.pending();
        let round = |sent: u64, now: Instant, n: u32| {
            let elapsed = now.duration_since(started);
            let rate = per_second(sent, elapsed);
            Round {
                round: n,
                pages: of / PAGE,
                bytes: sent,
                of,
                elapsed,
                rate,
                dirty_rate,
                eta: (rate > 0)
                    .then(|| Duration::from_secs_f64(of.saturating_sub(sent) as f64 / rate as f64)),
            }
        };
        let mut sent = 0;
        self.send_layout(tracker, found)?;
        self.send_drops(found)?;
        let n = self.rounds;
        self.send_pages(tracker, found, &mut |run, bytes| {
            sent += bytes;
            interrupt::check()?;
            let now = Instant::now();
            if now.duration_since(shown) > Duration::from_millis(200) {
                shown = now;
                run.progress.event(&Event::Round(round(sent, now, n)));
            }
            Ok(())
        })?;
        sent += self.files.pass(&mut self.wire)?;
        self.wire
            .send(&ToTarget::RoundEnd)
            .map_err(|e| self.better(e))?;
        match answer(&mut self.wire)? {
            ToSource::RoundDone => {}
            other => return Err(unexpected(&self.wire, &other)),
        }
        let ended = round(sent, Instant::now(), n);
        self.progress.event(&Event::RoundEnded(ended.clone()));
        Ok(ended.rate.max(1))
    }

    pub(super) fn send_layout(&mut self, tracker: &Tracker, found: &Found) -> Result<()> {
        if found.steps.is_empty() {
            return Ok(());
        }
        self.delta.forget();
        // What is mapped must be known to be the same file there.
        self.sync_files(&tracker.layout, &[])?;
        self.wire
            .send(&ToTarget::Layout(tracker.layout.clone()))
            .map_err(|e| self.better(e))
    }

    /// Tells what was there and is gone.
    pub(super) fn send_drops(&mut self, found: &Found) -> Result<()> {
        let drops: Vec<(u64, u64)> = found.drops.iter().map(|r| (r.start, r.end)).collect();
        if !drops.is_empty() {
            self.delta.forget();
        }
        for some in drops.chunks(4096) {
            self.wire
                .send(&ToTarget::Drops(some.to_vec()))
                .map_err(|e| self.better(e))?;
        }
        Ok(())
    }

    /// Sends what was written; `sent` hears of every piece.
    pub(super) fn send_pages(
        &mut self,
        tracker: &mut Tracker,
        found: &Found,
        sent: &mut dyn FnMut(&mut Self, u64) -> Result<()>,
    ) -> Result<()> {
        // Taken for as long: what hears of pieces has all of `self`.
        let mut buf = std::mem::take(&mut self.buf);
        let sent = self.send_runs(tracker, found, &mut buf, sent);
        self.buf = buf;
        sent
    }

    fn send_runs(
        &mut self,
        tracker: &mut Tracker,
        found: &Found,
        buf: &mut [u8],
        sent: &mut dyn FnMut(&mut Self, u64) -> Result<()>,
    ) -> Result<()> {
        // Much is not worth remembering, what follows later is dropped there, and what
        // the kernel may drop it may drop there too.
        let droppable = |v: &Vma| matches!(v.backing, Backing::Droppable);
        let by_changes = found.bytes() <= LITTLE
            && !self.postponed
            && !tracker.layout.vmas.iter().any(droppable);
        if !by_changes {
            self.delta.forget();
        }
        let mut some: Vec<Range<u64>> = Vec::new();
        let mut len = 0;
        for run in &found.pages {
            let mut at = run.start;
            while at < run.end {
                let to = run.end.min(at + (PIECE - len));
                some.push(at..to);
                len += to - at;
                at = to;
                if len == PIECE || some.len() == MOST_RUNS {
                    let bytes = self.send_piece(tracker, &some, buf, by_changes)?;
                    sent(self, bytes)?;
                    some.clear();
                    len = 0;
                }
            }
        }
        let bytes = self.send_piece(tracker, &some, buf, by_changes)?;
        sent(self, bytes)
    }

    /// Sends what of these runs the target has not anyway; returns the bytes of the
    /// pages in which that lies.
    fn send_piece(
        &mut self,
        tracker: &mut Tracker,
        runs: &[Range<u64>],
        buf: &mut [u8],
        by_changes: bool,
    ) -> Result<u64> {
        let read = tracker.read(runs, buf)?;
        let (kept, len) = keep_content(tracker, read, buf);
        if kept.is_empty() {
            return Ok(0);
        }
        kept.iter().for_each(|r| tracker.mark_sent(r.clone()));
        let last = self.stopped_at.is_some();
        let (runs, rest) = match by_changes {
            true => self.delta.reduce(kept, &mut buf[..len], last),
            false => (kept, len),
        };
        if runs.is_empty() {
            return Ok(len as u64);
        }
        let runs = runs.iter().map(|r| (r.start, (r.end - r.start) as u32));
        let pages = ToTarget::Pages(runs.collect());
        let sent = match last {
            // The last word comes right behind it.
            true => self.wire.queue_with(&pages, &buf[..rest]),
            false => self.wire.send_with(&pages, &buf[..rest]),
        };
        sent.map_err(|e| self.better(e))?;
        Ok(len as u64)
    }
}

/// Keeps of what was read, packed at the front of `buf`, what the target has not
/// anyway: zeros where it has nothing. Returns the runs of that, and their bytes.
fn keep_content(
    tracker: &Tracker,
    read: Vec<Range<u64>>,
    buf: &mut [u8],
) -> (Vec<Range<u64>>, usize) {
    const LEN: usize = PAGE as usize;
    let mut kept: Vec<Range<u64>> = Vec::with_capacity(read.len());
    let (mut from, mut to) = (0, 0);
    for run in read {
        for page in run.step_by(LEN) {
            let zero = buf[from..from + LEN] == [0; LEN];
            if !zero || tracker.was_sent(page) || !tracker.is_anonymous(page) {
                if to != from {
                    buf.copy_within(from..from + LEN, to);
                }
                match kept.last_mut() {
                    Some(last) if last.end == page => last.end += PAGE,
                    _ => kept.push(page..page + PAGE),
                }
                to += LEN;
            }
            from += LEN;
        }
    }
    (kept, to)
}

pub(super) fn per_second(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64().max(1e-6)) as u64
}

pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} bytes"),
        10_000..=999_999 => format!("{} kB", bytes / 1000),
        1_000_000..=9_949_999 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{} MB", bytes / 1_000_000),
    }
}
