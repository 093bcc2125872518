//! Mappings under a userfaultfd of ours: one that was made anew or moved is
//! registered no longer, and so is told from the one that stood there before.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use super::{open_pagemap, runs};
use crate::error::{Context, Error, Result};
use crate::proc::smaps::Mapping;
use crate::state::memory::PAGE;
use crate::sys::pagemap::{category, Query};
use crate::sys::{pidfd, uffd};
use crate::tracee::{Batch, Stopped};

/// A userfaultfd of a process, which asks for nothing by itself.
pub(super) struct Registered {
    pub pid: i32,
    pub pagemap: File,
    uffd: OwnedFd,
    /// Whether write protection is asynchronous (Linux 6.7). Without that only
    /// anonymous memory can be registered, and PAGEMAP_SCAN tells nothing of it.
    pub asynchronous: bool,
}

impl Registered {
    /// Has the process make one for us.
    ///
    /// # Errors
    /// It cannot.
    pub fn begin(stopped: &mut Stopped) -> Result<Registered> {
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
        let asynchronous = uffd::enable_async_wp(&uffd).is_ok();
        if !asynchronous {
            uffd::enable(&uffd).context("begin with the userfaultfd of", pid)?;
        }
        Ok(Registered {
            pid,
            pagemap,
            uffd,
            asynchronous,
        })
    }

    pub fn follows(&self, mapping: &Mapping) -> bool {
        mapping.has(b"uw") || !self.can(mapping)
    }

    /// Whether a mapping could be registered. Of a file's, before Linux 6.7, it is
    /// believed that nobody moves one to where another of the same file stood.
    fn can(&self, mapping: &Mapping) -> bool {
        self.asynchronous || mapping.inode == 0
    }

    /// Begins with a mapping, no page of which is protected then. One that was
    /// registered before and is no longer (mremap(2) put another beside it, and both
    /// became one) may have pages that look protected but are not; no scan would
    /// protect those (fs/proc/task_mmu.c, `pagemap_scan_pmd_entry`). To take them
    /// out clears them.
    pub fn follow(&self, mapping: Range<u64>) -> bool {
        let (start, len) = (mapping.start, mapping.end - mapping.start);
        let registered = uffd::register_wp(&self.uffd, start, len).is_ok()
            && uffd::unregister(&self.uffd, start, len).is_ok()
            && uffd::register_wp(&self.uffd, start, len).is_ok();
        registered || !self.asynchronous
    }

    /// Whether the mapping at that address is registered still.
    pub fn still_follows(&self, at: u64) -> Result<bool> {
        let query = Query {
            all: category::WPALLOWED,
            tell: category::WPALLOWED,
            ..Query::default()
        };
        let found = runs(&self.pagemap, self.pid, at..at + PAGE, query)?;
        Ok(self.asynchronous && !found.is_empty())
    }

    /// What was written since it was protected, and is of one of the categories `any`,
    /// if any are given, in order. With `check`, none where a mapping is registered no
    /// longer.
    pub fn written(
        &self,
        r: &Range<u64>,
        any: u64,
        check: bool,
    ) -> Result<Option<Vec<Range<u64>>>> {
        // Only a question for this alone is quick (pagemap_scan_pmd_entry() in
        // fs/proc/task_mmu.c).
        let query = Query {
            all: category::WRITTEN,
            any,
            tell: category::WRITTEN,
            followed: check,
            ..Query::default()
        };
        match runs(&self.pagemap, self.pid, r.clone(), query) {
            Ok(written) => Ok(Some(written)),
            Err(e) if check && e.errno() == Some(libc::EPERM) => Ok(None),
            Err(e) => Err(e),
        }
    }
}
