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
use crate::state::memory::ranges::{push, union, without};
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
            let written = self.0.written(&part.range, false)?;
            return Ok(written.unwrap_or_default());
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
        let mut gone = Vec::new();
        for sent in part.sent.within(part.range) {
            let is = there(pagemap, pid, sent.clone(), Then::Leave)?;
            for hole in without(sent, &is) {
                push(&mut gone, hole);
            }
        }
        Ok(union(written, gone))
    }

    fn still_follows(&self, at: u64) -> Result<bool> {
        self.0.still_follows(at)
    }

    fn changed_in_the_same(&mut self, part: Part<'_>) -> Result<Option<Vec<Range<u64>>>> {
        if !part.dense {
            return match self.0.still(&part)? {
                true => self.changed(part, Then::Leave).map(Some),
                false => Ok(None),
            };
        }
        self.0.written(&part.range, true)
    }
}
