//! Pages of a running program whose content is still on the machine that it came
//! from.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::layout::PAGE;
use super::ranges::Ranges;

/// Which pages are missing, and what their addresses were at the source, which
/// goes on knowing them by these: the program may have moved them since.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missing {
    /// By where it is now: its end, and where it was at the source.
    runs: BTreeMap<u64, (u64, u64)>,
    /// By how much runs have been moved, ever.
    shifts: BTreeSet<u64>,
    bytes: u64,
}

impl Missing {
    /// Adds a run that lies where it lay at the source.
    pub fn insert(&mut self, r: Range<u64>) {
        self.place(r.clone(), r.start);
    }

    fn place(&mut self, r: Range<u64>, source: u64) {
        if r.is_empty() {
            return;
        }
        self.remove(r.clone());
        self.bytes += r.end - r.start;
        self.shifts.insert(r.start.wrapping_sub(source));
        self.runs.insert(r.start, (r.end, source));
    }

    /// Nothing is missing there any more: it was filled, discarded or unmapped.
    pub fn remove(&mut self, r: Range<u64>) {
        for (part, _) in self.take(r) {
            self.bytes -= part.end - part.start;
        }
    }

    /// A mapping has moved: what was missing of it is missing there.
    pub fn moved(&mut self, from: u64, to: u64, len: u64) {
        let taken = self.take(from..from.saturating_add(len));
        self.remove(to..to.saturating_add(len));
        for (part, source) in taken {
            self.bytes -= part.end - part.start;
            let at = to + (part.start - from);
            self.place(at..at + (part.end - part.start), source);
        }
    }

    /// Takes the parts of `r` out, with where they were at the source.
    fn take(&mut self, r: Range<u64>) -> Vec<(Range<u64>, u64)> {
        let mut taken = Vec::new();
        while let Some((&start, &(end, source))) = self.runs.range(..r.end).next_back() {
            if end <= r.start {
                break;
            }
            self.runs.remove(&start);
            if end > r.end {
                self.runs.insert(r.end, (end, source + (r.end - start)));
            }
            if start < r.start {
                self.runs.insert(start, (r.start, source));
            }
            let part = start.max(r.start)..end.min(r.end);
            let source = source + (part.start - start);
            taken.push((part, source));
        }
        taken
    }

    /// Where memory is missing, in order.
    pub fn runs(&self) -> Vec<Range<u64>> {
        self.runs.iter().map(|(&s, &(e, _))| s..e).collect()
    }

    /// Where a missing page was at the source.
    pub fn source_of(&self, page: u64) -> Option<u64> {
        let (&start, &(end, source)) = self.runs.range(..=page).next_back()?;
        (page < end).then(|| source + (page - start))
    }

    /// Where missing parts of what lay at `source` are now, with their offsets in
    /// it.
    pub fn places(&self, source: Range<u64>) -> Vec<(Range<u64>, u64)> {
        let mut all = Vec::new();
        for shift in &self.shifts {
            let (start, end) = (
                source.start.wrapping_add(*shift),
                source.end.wrapping_add(*shift),
            );
            if start > end {
                continue;
            }
            let first = self.runs.range(..=start).next_back();
            let first = first.map_or(start, |(&s, _)| s);
            for (&s, &(e, was)) in self.runs.range(first..end) {
                let part = s.max(start)..e.min(end);
                // Another shift may have led there.
                if !part.is_empty() && s.wrapping_sub(was) == *shift {
                    let offset = part.start - start;
                    all.push((part, offset));
                }
            }
        }
        all
    }

    /// The first missing run of at most `most` bytes from `from` on, round the end
    /// if need be, that is not among what was asked for, as addresses at the
    /// source; and where to go on from.
    pub fn next(&self, from: u64, most: u64, asked: &Ranges) -> Option<(Range<u64>, u64)> {
        let before = self.runs.range(..=from).next_back();
        let first = before.map_or(from, |(&s, _)| s);
        let ahead = self.runs.range(first..).map(|r| (r, from));
        let behind = self.runs.range(..=first).map(|r| (r, 0));
        for ((&start, &(end, source)), from) in ahead.chain(behind) {
            let mut at = start.max(from);
            if at >= end {
                continue;
            }
            while at < end {
                let was = source + (at - start);
                let whole = was..source + (end - start);
                match asked.within(whole.clone()).first() {
                    Some(a) if a.start == was => at += a.end - a.start,
                    known => {
                        let free = known.map_or(whole.end, |a| a.start);
                        let piece = was..free.min(was.saturating_add(most));
                        return Some((piece.clone(), at + (piece.end - piece.start)));
                    }
                }
            }
        }
        None
    }

    /// Bytes missing.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

/// One page of what is missing, for who touched it.
pub fn page_of(address: u64) -> Range<u64> {
    let start = address & !(PAGE - 1);
    start..start + PAGE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By page: where it was at the source.
    type Model = BTreeMap<u64, u64>;

    fn random(seed: &mut u64, n: u64) -> u64 {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
        (*seed >> 33) % n
    }

    #[test]
    fn missing_pages_follow_the_program() {
        let mut seed = 7;
        for _ in 0..200 {
            let (mut missing, mut model) = (Missing::default(), Model::new());
            for _ in 0..3 {
                let start = random(&mut seed, 90);
                let end = start + 1 + random(&mut seed, 20);
                missing.insert(start * PAGE..end * PAGE);
                model.extend((start..end).map(|p| (p, p)));
            }
            for _ in 0..30 {
                let start = random(&mut seed, 100);
                let len = 1 + random(&mut seed, 12);
                if random(&mut seed, 3) > 0 {
                    missing.remove(start * PAGE..(start + len) * PAGE);
                    model.retain(|p, _| !(start..start + len).contains(p));
                } else {
                    let to = 200 + random(&mut seed, 100);
                    missing.moved(start * PAGE, to * PAGE, len * PAGE);
                    model.retain(|p, _| !(to..to + len).contains(p));
                    for n in 0..len {
                        if let Some(source) = model.remove(&(start + n)) {
                            model.insert(to + n, source);
                        }
                    }
                }
                assert_eq!(missing.len(), model.len() as u64 * PAGE);
                for page in 0..320 {
                    let source = missing.source_of(page * PAGE).map(|s| s / PAGE);
                    assert_eq!(source, model.get(&page).copied());
                }
                let (start, len) = (random(&mut seed, 100), 1 + random(&mut seed, 20));
                let mut found = Model::new();
                for (part, offset) in missing.places(start * PAGE..(start + len) * PAGE) {
                    for n in 0..(part.end - part.start) / PAGE {
                        found.insert(part.start / PAGE + n, start + offset / PAGE + n);
                    }
                }
                let mut expected = model.clone();
                expected.retain(|_, s| (start..start + len).contains(s));
                assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn every_missing_page_is_asked_for_once() {
        let mut missing = Missing::default();
        missing.insert(0x10000..0x20000);
        missing.insert(0x40000..0x43000);
        missing.moved(0x11000, 0x80000, 0x2000);
        let mut asked = Ranges::default();
        let mut from = 0x15000;
        let mut bytes = 0;
        while let Some((piece, on)) = missing.next(from, 0x3000, &asked) {
            assert!(asked.within(piece.clone()).is_empty(), "{piece:x?}");
            bytes += piece.end - piece.start;
            asked.insert(piece);
            from = on;
        }
        assert_eq!(bytes, missing.len());
        let mut one = Missing::default();
        one.insert(0x1000..0x9000);
        assert_eq!(one.next(0x5000, 0x1000, &Ranges::default()).unwrap().0, 0x5000..0x6000);
        let mut tail = Ranges::default();
        tail.insert(0x5000..0x9000);
        assert_eq!(one.next(0x9000, 0x1000, &tail).unwrap().0, 0x1000..0x2000);
        assert_eq!(page_of(0x1234), 0x1000..0x2000);
    }
}
