//! Asynchronous write protection (userfaultfd(2), UFFD_FEATURE_WP_ASYNC): the
//! kernel takes the faults and remembers which pages were written, and
//! PAGEMAP_SCAN tells and protects them again in one step.
//!
//! A page that was discarded counts as written. A huge page is split at the
//! first write to it, as long as it is protected; what is only read stays whole.

use std::fs::File;
use std::ops::Range;
use std::sync::OnceLock;

use super::registered::Registered;
use super::{runs, there, Part, Then, Tracking, Writes};
use crate::error::{Error, Result};
use crate::proc::smaps::Mapping;
use crate::state::memory::ranges::{minus, neighbours, push, span, union};
use crate::state::memory::PAGE;
use crate::sys::pagemap::{category, scan, Query};
use crate::sys::uffd;
use crate::tracee::Stopped;

pub(in crate::state::memory) struct Protection {
    registered: Registered,
    tells_holes: bool,
    /// As which of those that use it.
    tracking: Tracking,
}

/// What one page table spans, in bytes.
const TABLE: u64 = 2 << 20;

impl Protection {
    /// # Errors
    /// The process cannot make a userfaultfd, or not with this feature.
    pub fn begin(stopped: &mut Stopped, tracking: Tracking) -> Result<Protection> {
        let registered = Registered::begin(stopped)?;
        match registered.asynchronous {
            true => Ok(Protection {
                registered,
                tells_holes: tells_holes(),
                tracking,
            }),
            false => Err(Error::bad(
                "userfaultfd",
                "this kernel has no asynchronous write protection",
            )),
        }
    }
}

impl Writes for Protection {
    fn tracking(&self) -> Tracking {
        self.tracking
    }

    fn follows(&self, mapping: &Mapping) -> bool {
        self.registered.follows(mapping)
    }

    fn follow(&mut self, mapping: Range<u64>) -> bool {
        self.registered.follow(mapping)
    }

    fn skips_holes(&self) -> bool {
        true
    }

    fn present(&mut self, part: Range<u64>, then: Then) -> Result<Vec<Range<u64>>> {
        there(&self.registered.pagemap, self.registered.pid, part, then)
    }

    fn changed(&mut self, part: Part<'_>, then: Then) -> Result<Vec<Range<u64>>> {
        // What is absent counts as written, and protected it would look like something
        // that is there: swapped out.
        if part.dense && then == Then::Leave {
            let written = self.registered.written(&part.range, 0, false)?;
            return Ok(union(written.unwrap_or_default(), self.unseen(&part)?));
        }
        let (pagemap, pid) = (&self.registered.pagemap, self.registered.pid);
        let query = Query {
            all: category::WRITTEN,
            any: category::PRESENT | category::SWAPPED,
            tell: category::WRITTEN,
            protect: then == Then::Clean,
            ..Query::default()
        };
        let written = runs(pagemap, pid, part.range.clone(), query)?;
        Ok(union(written, self.gone(&part)?))
    }

    fn still_follows(&self, at: u64) -> Result<bool> {
        self.registered.still_follows(at)
    }

    fn changed_in_the_same(&mut self, part: Part<'_>) -> Result<Option<Vec<Range<u64>>>> {
        let there = match part.dense {
            true => 0,
            false => category::PRESENT | category::SWAPPED,
        };
        let Some(written) = self.registered.written(&part.range, there, true)? else {
            return Ok(None);
        };
        Ok(Some(match part.dense {
            true => union(written, self.unseen(&part)?),
            false => union(written, self.gone(&part)?),
        }))
    }
}

impl Protection {
    /// What may have gone unseen by a scan for what is written.
    fn unseen(&self, part: &Part<'_>) -> Result<Vec<Range<u64>>> {
        match self.tells_holes {
            true => Ok(Vec::new()),
            false => without_table(&self.registered.pagemap, self.registered.pid, part),
        }
    }

    /// What was sent of a part, and is not there any more.
    fn gone(&self, part: &Part<'_>) -> Result<Vec<Range<u64>>> {
        let mut gone = Vec::new();
        for some in neighbours(&part.sent.within(part.range.clone())) {
            let is = there(
                &self.registered.pagemap,
                self.registered.pid,
                span(some),
                Then::Leave,
            )?;
            minus(some, &is)
                .into_iter()
                .for_each(|r| push(&mut gone, r));
        }
        Ok(gone)
    }
}

/// What was sent of a part, and may have gone together with its page table. A page
/// tells for all of a table that it is there.
fn without_table(pagemap: &File, pid: i32, part: &Part<'_>) -> Result<Vec<Range<u64>>> {
    let mut all = Vec::new();
    for sent in part.sent.within(part.range.clone()) {
        let mut at = sent.start;
        while at < sent.end {
            let end = sent.end.min((at + 1).next_multiple_of(TABLE));
            if there(pagemap, pid, at..at + PAGE, Then::Leave)?.is_empty() {
                push(&mut all, at..end);
            }
            at = end;
        }
    }
    Ok(all)
}

/// Whether a scan for what is written tells of memory without page tables as well: of a
/// huge page that was discarded, say. Kernels before the summer of 2026 do not
/// (fs/proc/task_mmu.c, `pagemap_scan_pte_hole`); so it is tried. False in doubt.
///
/// Tried once, which takes longer than a program should stand still for it.
pub(super) fn tells_holes() -> bool {
    static TOLD: OnceLock<bool> = OnceLock::new();
    *TOLD.get_or_init(try_holes)
}

fn try_holes() -> bool {
    let room: Vec<u8> = Vec::with_capacity(2 * TABLE as usize);
    let start = (room.as_ptr() as u64).next_multiple_of(TABLE);
    let ask = || -> std::io::Result<bool> {
        let uffd = uffd::create()?;
        uffd::enable_async_wp(&uffd)?;
        uffd::register_wp(&uffd, start, TABLE)?;
        let pagemap = File::open("/proc/self/pagemap")?;
        let scan_for = |what| {
            let query = Query {
                all: what,
                tell: what,
                ..Query::default()
            };
            let mut found = 0;
            scan(&pagemap, start, start + TABLE, query, |r| {
                found += r.end - r.start;
            })
            .map(|()| found)
        };
        Ok(scan_for(category::PRESENT)? == 0 && scan_for(category::WRITTEN)? == TABLE)
    };
    let told = ask().unwrap_or(false);
    drop(room);
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::memory::Ranges;

    #[test]
    fn what_went_with_its_page_table_is_found() {
        let mut memory = vec![0u8; 5 * TABLE as usize];
        let start = (memory.as_ptr() as u64).next_multiple_of(TABLE);
        let at = |offset: u64| (start - memory.as_ptr() as u64 + offset) as usize;
        let touched = [at(3 * PAGE), at(3 * TABLE)];
        touched.into_iter().for_each(|n| memory[n] = 1);
        std::hint::black_box(&memory);
        let mut sent = Ranges::default();
        sent.insert(start + 3 * PAGE..start + 4 * TABLE);
        let part = Part {
            range: start..start + 4 * TABLE,
            dense: true,
            sent: &sent,
        };
        let pid = std::process::id() as i32;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let gone = start + TABLE..start + 3 * TABLE;
        assert_eq!(without_table(&pagemap, pid, &part).unwrap(), [gone]);
    }
}
