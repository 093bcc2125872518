//! What the target has of the pages that were sent last: of a page that is written
//! again and again, mostly a few bytes each time, only those travel.

use std::collections::HashMap;
use std::ops::Range;

use super::layout::PAGE;

const LEN: usize = PAGE as usize;
/// Pages that are remembered, at most: 4 MB.
const MOST: usize = 1024;
/// Bytes that are compared, and sent, at once.
const STEP: usize = 8;
/// Bytes between two changes that travel with them: a run of its own would cost the
/// target more than to copy them.
const GAP: usize = 128;
/// Runs of changes in a page that travels in pieces.
const MOST_RUNS: usize = 8;

/// Pages as they were sent, the latest of them.
#[derive(Debug, Default)]
pub struct Delta {
    /// Where in `bytes` a page is, by its address.
    slots: HashMap<u64, usize>,
    /// What page is in each slot.
    pages: Vec<u64>,
    bytes: Vec<u8>,
    /// The slot that is overwritten next.
    next: usize,
}

impl Delta {
    /// Forgets all: something else than pages changed what the target has.
    pub fn forget(&mut self) {
        *self = Delta::default();
    }

    /// Of pages that lie packed in `buf` moves to its front what the target is to get:
    /// the pages, or of those it has what differs by now. Returns where that belongs, and
    /// its bytes. Remembers the pages, unless they are the `last`.
    pub fn reduce(
        &mut self,
        pages: Vec<Range<u64>>,
        buf: &mut [u8],
        last: bool,
    ) -> (Vec<Range<u64>>, usize) {
        let mut runs: Vec<Range<u64>> = Vec::with_capacity(pages.len());
        let (mut from, mut to) = (0, 0);
        for page in pages.into_iter().flat_map(|run| run.step_by(LEN)) {
            let now = from..from + LEN;
            let changes = match self.slots.get(&page) {
                Some(&slot) => changes(&self.bytes[slot * LEN..][..LEN], &buf[now.clone()]),
                None => None,
            };
            let whole = || std::iter::once(0..LEN).collect();
            let changes: Vec<Range<usize>> = changes.unwrap_or_else(whole);
            if !last && !changes.is_empty() {
                self.remember(page, &buf[now.clone()]);
            }
            for change in changes {
                buf.copy_within(from + change.start..from + change.end, to);
                to += change.len();
                let run = page + change.start as u64..page + change.end as u64;
                match runs.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => runs.push(run),
                }
            }
            from += LEN;
        }
        (runs, to)
    }

    fn remember(&mut self, page: u64, content: &[u8]) {
        let slot = match self.slots.get(&page) {
            Some(&slot) => slot,
            None if self.pages.len() < MOST => {
                self.pages.push(page);
                self.bytes.resize(self.pages.len() * LEN, 0);
                self.pages.len() - 1
            }
            None => {
                let slot = self.next;
                self.next = (slot + 1) % MOST;
                self.slots.remove(&self.pages[slot]);
                self.pages[slot] = page;
                slot
            }
        };
        self.slots.insert(page, slot);
        self.bytes[slot * LEN..][..LEN].copy_from_slice(content);
    }
}

/// Where two pages differ; `None` where it is simpler to send all of it.
fn changes(then: &[u8], now: &[u8]) -> Option<Vec<Range<usize>>> {
    let mut all: Vec<Range<usize>> = Vec::new();
    let both = then.chunks_exact(STEP).zip(now.chunks_exact(STEP));
    for (n, (then, now)) in both.enumerate() {
        if then == now {
            continue;
        }
        let at = n * STEP;
        let runs = all.len();
        match all.last_mut() {
            Some(last) if at - last.end <= GAP => last.end = at + STEP,
            _ if runs == MOST_RUNS => return None,
            _ => all.push(at..at + STEP),
        }
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target: what it has of some pages.
    fn put(target: &mut [u8], runs: &[Range<u64>], bytes: &[u8]) {
        let mut rest = bytes;
        for r in runs {
            let (some, more) = rest.split_at((r.end - r.start) as usize);
            target[r.start as usize..r.end as usize].copy_from_slice(some);
            rest = more;
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn what_the_target_has_in_the_end_is_what_was_there() {
        let pages = 40u64;
        let mut delta = Delta::default();
        let mut source = vec![0u8; pages as usize * LEN];
        let mut target = source.clone();
        let mut seed = 7u64;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            (seed >> 33) as usize % below
        };
        for round in 0..300 {
            let mut written: Vec<u64> = Vec::new();
            for _ in 0..random(30) {
                let page = random(pages as usize);
                for _ in 0..random(20) {
                    let (at, len) = (random(LEN), random(300));
                    let end = (at + len).min(LEN);
                    source[page * LEN + at..page * LEN + end].fill(random(256) as u8);
                }
                written.push(page as u64 * PAGE);
            }
            written.sort();
            written.dedup();
            let runs: Vec<Range<u64>> = written.iter().map(|p| *p..p + PAGE).collect();
            let mut buf: Vec<u8> = written
                .iter()
                .flat_map(|p| source[*p as usize..][..LEN].to_vec())
                .collect();
            if round % 50 == 49 {
                delta.forget();
            }
            let (runs, len) = delta.reduce(runs, &mut buf, false);
            put(&mut target, &runs, &buf[..len]);
            assert!(source == target, "round {round}");
        }
    }

    #[test]
    fn of_a_page_that_is_known_only_what_differs_travels() {
        let mut delta = Delta::default();
        let mut page = vec![3u8; LEN];
        let whole = PAGE..2 * PAGE;
        let all = || std::iter::once(whole.clone()).collect::<Vec<_>>();
        assert_eq!(delta.reduce(all(), &mut page.clone(), false), (all(), LEN));
        page[100] = 4;
        page[4000] = 5;
        let mut buf = page.clone();
        let (runs, len) = delta.reduce(all(), &mut buf, false);
        assert_eq!(runs, vec![PAGE + 96..PAGE + 104, PAGE + 4000..PAGE + 4008]);
        assert_eq!((len, buf[4], buf[8]), (16, 4, 5));
        // It is the same by now.
        assert_eq!(delta.reduce(all(), &mut page.clone(), false), (vec![], 0));
        // Changed all over it is not worth the trouble.
        page.iter_mut().step_by(200).for_each(|b| *b += 1);
        assert_eq!(delta.reduce(all(), &mut page.clone(), true), (all(), LEN));
        // The last ones are not remembered.
        assert_eq!(delta.reduce(all(), &mut page.clone(), false), (all(), LEN));
        delta.forget();
        assert_eq!(delta.reduce(all(), &mut page.clone(), false), (all(), LEN));
    }

    #[test]
    fn of_many_pages_the_latest_are_known() {
        let mut delta = Delta::default();
        let page = |n: usize| n as u64 * PAGE..(n as u64 + 1) * PAGE;
        for n in 0..2 * MOST {
            delta.reduce(vec![page(n)], &mut [n as u8; LEN], false);
        }
        assert_eq!(delta.bytes.len(), MOST * LEN);
        assert_eq!(delta.slots.len(), MOST);
        for n in 0..2 * MOST {
            let (_, len) = delta.reduce(vec![page(n)], &mut [n as u8; LEN], true);
            assert_eq!(len, if n < MOST { LEN } else { 0 });
        }
    }
}
