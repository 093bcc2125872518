//! Sets of addresses, as ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of addresses. Ranges that touch are one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    pub fn of(runs: &[Range<u64>]) -> Ranges {
        let mut all = Ranges::default();
        runs.iter().cloned().for_each(|r| all.insert(r));
        all
    }

    pub fn insert(&mut self, r: Range<u64>) {
        if r.is_empty() {
            return;
        }
        let (mut start, mut end) = (r.start, r.end);
        while let Some((&s, &e)) = self.0.range(..=end).next_back() {
            if e < start {
                break;
            }
            self.0.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.0.insert(start, end);
    }

    pub fn remove(&mut self, r: Range<u64>) {
        if r.is_empty() {
            return;
        }
        while let Some((&s, &e)) = self.0.range(..r.end).next_back() {
            if e <= r.start {
                break;
            }
            self.0.remove(&s);
            if e > r.end {
                self.0.insert(r.end, e);
            }
            if s < r.start {
                self.0.insert(s, r.start);
            }
        }
    }

    pub fn contains(&self, at: u64) -> bool {
        self.0
            .range(..=at)
            .next_back()
            .is_some_and(|(_, &e)| at < e)
    }

    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(&s, &e)| s..e)
    }

    /// The parts of `r` that are in the set.
    pub fn within(&self, r: Range<u64>) -> Vec<Range<u64>> {
        let first = self
            .0
            .range(..=r.start)
            .next_back()
            .map_or(r.start, |(&s, _)| s);
        self.0
            .range(first..r.end.max(first))
            .map(|(&s, &e)| s.max(r.start)..e.min(r.end))
            .filter(|p| !p.is_empty())
            .collect()
    }

    /// Bytes in the set.
    pub fn len(&self) -> u64 {
        self.iter().map(|r| r.end - r.start).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Adds a run, joined to the last where they touch.
pub(super) fn push(runs: &mut Vec<Range<u64>>, r: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == r.start => last.end = r.end,
        _ if r.is_empty() => {}
        _ => runs.push(r),
    }
}

/// `r` without `parts`, which lie in it in order.
pub(super) fn without(r: Range<u64>, parts: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    let mut at = r.start;
    for p in parts {
        push(&mut rest, at..p.start.max(at));
        at = at.max(p.end);
    }
    push(&mut rest, at..r.end.max(at));
    rest
}

/// Bytes between two runs up to which it is quicker to look at both, and at what
/// lies between them, in one call.
const NEAR: u64 = 64 * super::PAGE;

/// Runs in order, those that are near each other together.
pub(super) fn neighbours(runs: &[Range<u64>]) -> impl Iterator<Item = &[Range<u64>]> {
    runs.chunk_by(|a, b| b.start - a.end <= NEAR)
}

/// From the first of some runs to the end of the last.
pub(super) fn span(runs: &[Range<u64>]) -> Range<u64> {
    runs.first().map_or(0, |r| r.start)..runs.last().map_or(0, |r| r.end)
}

/// What is in `a` and not in `b`, both in order.
pub(super) fn minus(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    let mut n = 0;
    for r in a {
        let mut at = r.start;
        while let Some(taken) = b.get(n).filter(|taken| taken.start < r.end) {
            push(&mut rest, at..taken.start.max(at));
            at = at.max(taken.end);
            if taken.end > r.end {
                // It may reach into the next one.
                break;
            }
            n += 1;
        }
        push(&mut rest, at..r.end.max(at));
    }
    rest
}

/// Both, in order.
pub(super) fn union(a: Vec<Range<u64>>, b: Vec<Range<u64>>) -> Vec<Range<u64>> {
    if b.is_empty() {
        return a;
    }
    let mut all = Ranges::default();
    a.into_iter().chain(b).for_each(|r| all.insert(r));
    all.iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_away_is_away_and_nothing_else() {
        let mut seed = 3u64;
        let mut runs = || {
            let mut all = Vec::new();
            for at in 0..60 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                if seed >> 40 & 1 == 1 {
                    push(&mut all, at..at + 1);
                }
            }
            all
        };
        let within = |runs: &[Range<u64>], at: u64| runs.iter().any(|r| r.contains(&at));
        for _ in 0..2000 {
            let (a, b) = (runs(), runs());
            let rest = minus(&a, &b);
            for at in 0..60 {
                let left = within(&a, at) && !within(&b, at);
                assert_eq!(within(&rest, at), left, "{a:?} {b:?} {rest:?}");
            }
            assert!(rest.windows(2).all(|two| two[0].end < two[1].start));
        }
        assert_eq!(minus(&[0..9, 20..30], &[5..25, 28..40]), [0..5, 25..28]);
    }

    #[test]
    fn a_set_of_ranges_is_the_set_of_its_addresses() {
        let mut seed = 1u64;
        let mut next = |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            (seed >> 33) % n
        };
        let mut set = Ranges::default();
        let mut model = [false; 100];
        for _ in 0..5000 {
            let start = next(100);
            let end = start + next(101 - start);
            if next(2) == 0 {
                set.insert(start..end);
                model[start as usize..end as usize].fill(true);
            } else {
                set.remove(start..end);
                model[start as usize..end as usize].fill(false);
            }
            for (i, m) in model.iter().enumerate() {
                assert_eq!(set.contains(i as u64), *m);
            }
            assert_eq!(set.len(), model.iter().filter(|m| **m).count() as u64);
            let (a, b) = (next(100), next(100));
            let n: u64 = set.within(a..b).iter().map(|r| r.end - r.start).sum();
            let m = if a < b {
                model[a as usize..b as usize].iter().filter(|m| **m).count()
            } else {
                0
            };
            assert_eq!(n, m as u64);
            assert!(set
                .iter()
                .zip(set.iter().skip(1))
                .all(|(x, y)| x.end < y.start));
        }
    }
}
