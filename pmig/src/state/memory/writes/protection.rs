//! Asynchronous write protection (userfaultfd(2), UFFD_FEATURE_WP_ASYNC): the
//! kernel takes the faults and remembers which pages were written, and
//! PAGEMAP_SCAN tells and protects them again in one step.
//!
//! A page that was discarded counts as written. A mapping that was made anew or
//! moved is registered no longer. A huge page is split at the first write to
//! it, as long as it is protected; what is only read stays whole.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use super::{open_pagemap, runs, there, Part, Then, Tracking, Writes};
use crate::error::{Context, Error, Result};
use crate::proc::smaps::Mapping;
use crate::state::memory::ranges::{push, union, without};
use crate::state::memory::PAGE;
use crate::sys::pagemap::{category, scan, Query};
use crate::sys::{pidfd, uffd};
use crate::tracee::{Batch, Stopped};

pub(in crate::state::memory) struct Protection {
    pid: i32,
    pagemap: File,
    uffd: OwnedFd,
}

impl Protection {
    /// Has the process make a userfaultfd for us.
    ///
    /// # Errors
    /// It cannot, or not with this feature.
    pub fn begin(stopped: &mut Stopped) -> Result<Protection> {
        let pid = stopped.pid();
        let pagemap = open_pagemap(pid)?;
        let process = pidfd::open(pid).context("open process", pid)?;
        let mut b = Batch::new();
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | uffd::USER_MODE_ONLY;
        let fd = b.may_fail("userfaultfd", libc::SYS_userfaultfd, &[flags.into()]);
        let fd = stopped.run(b)?.result(fd);
        if fd < 0 {
            return Err(Error::Os {
                op: "make a userfaultfd in",
                object: format!("process {pid}"),
                cause: std::io::Error::from_raw_os_error(-fd as i32),
            });
        }
        let ours = pidfd::get(process.as_fd(), fd as i32);
        let mut b = Batch::new();
        b.call("close", libc::SYS_close, &[fd.into()]);
        stopped.run(b)?;
        let uffd = ours.context("fetch the userfaultfd of", pid)?;
        uffd::enable_async_wp(&uffd).context("ask for asynchronous write protection of", pid)?;
        Ok(Protection { pid, pagemap, uffd })
    }
}

impl Writes for Protection {
    fn tracking(&self) -> Tracking {
        Tracking::Uffd
    }

    fn follows(&self, mapping: &Mapping) -> bool {
        mapping.has(b"uw")
    }

    fn follow(&mut self, mapping: Range<u64>) -> bool {
        uffd::register_wp(&self.uffd, mapping.start, mapping.end - mapping.start).is_ok()
    }

    fn skips_holes(&self) -> bool {
        true
    }

    fn present(&mut self, part: Range<u64>, then: Then) -> Result<Vec<Range<u64>>> {
        there(&self.pagemap, self.pid, part, then)
    }

    fn changed(&mut self, part: Part<'_>, then: Then) -> Result<Vec<Range<u64>>> {
        // Only a question for this alone is quick (pagemap_scan_pmd_entry() in
        // fs/proc/task_mmu.c).
        let mut query = Query {
            all: category::WRITTEN,
            tell: category::WRITTEN,
            protect: then == Then::Clean,
            ..Query::default()
        };
        if part.dense {
            return runs(&self.pagemap, self.pid, part.range, query);
        }
        query.any = category::PRESENT | category::SWAPPED;
        let written = runs(&self.pagemap, self.pid, part.range.clone(), query)?;
        let mut gone = Vec::new();
        for sent in part.sent.within(part.range) {
            let is = there(&self.pagemap, self.pid, sent.clone(), Then::Leave)?;
            for hole in without(sent, &is) {
                push(&mut gone, hole);
            }
        }
        Ok(union(written, gone))
    }

    fn changed_in_the_same(&mut self, part: Part<'_>) -> Result<Option<Vec<Range<u64>>>> {
        if !part.dense {
            return match self.is_followed(part.range.start)? {
                true => self.changed(part, Then::Leave).map(Some),
                false => Ok(None),
            };
        }
        let query = Query {
            all: category::WRITTEN,
            tell: category::WRITTEN,
            followed: true,
            ..Query::default()
        };
        let mut written = Vec::new();
        let run = |r: crate::sys::pagemap::Region| push(&mut written, r.start..r.end);
        match scan(&self.pagemap, part.range.start, part.range.end, query, run) {
            Ok(()) => Ok(Some(written)),
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(None),
            Err(e) => Err(e).context("scan the pages of", self.pid),
        }
    }
}

impl Protection {
    fn is_followed(&self, at: u64) -> Result<bool> {
        let query = Query {
            all: category::WPALLOWED,
            tell: category::WPALLOWED,
            ..Query::default()
        };
        let found = runs(&self.pagemap, self.pid, at..at + PAGE, query)?;
        Ok(!found.is_empty())
    }
}
