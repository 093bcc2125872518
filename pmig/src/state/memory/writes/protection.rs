//! Asynchronous write protection (userfaultfd(2), UFFD_FEATURE_WP_ASYNC): the
//! kernel takes the faults and remembers which pages were written, and
//! PAGEMAP_SCAN tells and protects them again in one step.
//!
//! A page that was discarded counts as written. A huge page is split at the
//! first write to it, as long as it is protected; what is only read stays whole.

use std::ops::Range;

use super::registered::Registered;
use super::{runs, there, Part, Then, Tracking, Writes};
use crate::error::{Error, Result};
use crate::proc::smaps::Mapping;
use crate::state::memory::ranges::{minus, neighbours, push, span, union};
use crate::sys::pagemap::{category, Query};
use crate::tracee::Stopped;

pub(in crate::state::memory) struct Protection(Registered);

impl Protection {
    /// # Errors
    /// The process cannot make a userfaultfd, or not with this feature.
    pub fn begin(stopped: &mut Stopped) -> Result<Protection> {
        let registered = Registered::begin(stopped)?;
        match registered.asynchronous {
            true => Ok(Protection(registered)),
            false => Err(Error::bad(
                "userfaultfd",
                "this kernel has no asynchronous write protection",
            )),
        }
    }
}

impl Writes for Protection {
    fn tracking(&self) -> Tracking {
        Tracking::Uffd
    }

    fn follows(&self, mapping: &Mapping) -> bool {
        self.0.follows(mapping)
    }

    fn follow(&mut self, mapping: Range<u64>) -> bool {
        self.0.follow(mapping)
    }

    fn skips_holes(&self) -> bool {
        true
    }

    fn present(&mut self, part: Range<u64>, then: Then) -> Result<Vec<Range<u64>>> {
        there(&self.0.pagemap, self.0.pid, part, then)
    }

    fn changed(&mut self, part: Part<'_>, then: Then) -> Result<Vec<Range<u64>>> {
        // What is absent counts as written, and protected it would look like something
        // that is there: swapped out.
        if part.dense && then == Then::Leave {
            let written = self.0.written(&part.range, 0, false)?;
            return Ok(union(written.unwrap_or_default(), self.gone(&part)?));
        }
        let (pagemap, pid) = (&self.0.pagemap, self.0.pid);
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
        self.0.still_follows(at)
    }

    fn changed_in_the_same(&mut self, part: Part<'_>) -> Result<Option<Vec<Range<u64>>>> {
        let there = match part.dense {
            true => 0,
            false => category::PRESENT | category::SWAPPED,
        };
        let Some(written) = self.0.written(&part.range, there, true)? else {
            return Ok(None);
        };
        Ok(Some(union(written, self.gone(&part)?)))
    }
}

impl Protection {
    /// What was sent of a part, and is not there any more. Where a whole page table is
    /// gone the scan for what is written tells nothing (fs/proc/task_mmu.c,
    /// `pagemap_scan_pte_hole`).
    fn gone(&self, part: &Part<'_>) -> Result<Vec<Range<u64>>> {
        let mut gone = Vec::new();
        for some in neighbours(&part.sent.within(part.range.clone())) {
            let is = there(&self.0.pagemap, self.0.pid, span(some), Then::Leave)?;
            minus(some, &is)
                .into_iter()
                .for_each(|r| push(&mut gone, r));
        }
        Ok(gone)
    }
}
