//! Bits of the page tables: one word a page tells whether it was written and
//! which page it is.
//!
//! The bits say nothing of a page that is gone. So each look is compared with
//! the one before: only a page that is the same one, and unwritten, holds the
//! same bytes. Nor is that enough where memory is moved (mremap(2)): pages come
//! with bits as clear as they were, and if others lay there while it was read,
//! nothing tells that they did. So mappings are registered with a userfaultfd,
//! which protects nothing, but is lost by all that is moved or made anew.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use super::registered::Registered;
use super::{open_pagemap, there, Part, Then, Tracking, Writes};
use crate::error::{Context, Error, Obstacle, Result};
use crate::proc::smaps::Mapping;
use crate::state::memory::ranges::push;
use crate::state::memory::PAGE;
use crate::sys::kmod::{abi, Kmod};
use crate::sys::pagemap::{self, entry};
use crate::sys::pidfd;
use crate::tracee::Stopped;

/// Pages that are remembered together, and their bytes: those of a page table.
const BLOCK: usize = 512;
const BLOCK_BYTES: u64 = BLOCK as u64 * PAGE;
/// Blocks that are read at once.
const MOST: u64 = 128 * BLOCK_BYTES;

/// In a word: the page may have been written since the last look.
const WRITTEN: u64 = 1 << 63;
/// It may be written to, or have been, without that being told.
const HELD: u64 = 1 << 62;

/// Where the words come from. Zero is a page that is not there.
pub(in crate::state::memory) trait Source {
    fn tracking(&self) -> Tracking;

    /// Reads the words of the pages from `start` on.
    fn read(&mut self, start: u64, words: &mut [u64], then: Then) -> Result<()>;
}

/// Compares words with those of the last look.
pub(in crate::state::memory) struct Words<S> {
    source: S,
    registered: Registered,
    /// By the address of the block.
    known: BTreeMap<u64, Box<[u64; BLOCK]>>,
}

impl<S: Source> Words<S> {
    fn new(registered: Registered, source: S) -> Words<S> {
        Words {
            source,
            registered,
            known: BTreeMap::new(),
        }
    }

    /// Reads a range anew; calls `each` with every page, its last word and its
    /// new one.
    fn renew(
        &mut self,
        r: Range<u64>,
        then: Then,
        mut each: impl FnMut(u64, u64, u64),
    ) -> Result<()> {
        let mut words = Vec::new();
        let mut at = r.start;
        while at < r.end {
            let end = r.end.min((at & !(BLOCK_BYTES - 1)) + MOST);
            words.clear();
            words.resize(((end - at) / PAGE) as usize, 0);
            self.source.read(at, &mut words, then)?;
            let mut rest = &words[..];
            while at < end {
                let block = at & !(BLOCK_BYTES - 1);
                let first = ((at - block) / PAGE) as usize;
                let n = (BLOCK - first).min(rest.len());
                let (now, more) = rest.split_at(n);
                rest = more;
                self.renew_block(block, first, now, &mut each);
                at += n as u64 * PAGE;
            }
        }
        Ok(())
    }

    fn renew_block(
        &mut self,
        block: u64,
        first: usize,
        now: &[u64],
        each: &mut impl FnMut(u64, u64, u64),
    ) {
        if now.iter().all(|w| *w == 0) && !self.known.contains_key(&block) {
            return;
        }
        let known = self
            .known
            .entry(block)
            .or_insert_with(|| Box::new([0; BLOCK]));
        let mut at = block + first as u64 * PAGE;
        for (was, is) in known[first..].iter_mut().zip(now) {
            each(at, *was, *is);
            *was = *is;
            at += PAGE;
        }
    }

    /// The blocks of a range in which something is, or was, as parts of it.
    fn worth_reading(&self, r: Range<u64>) -> Result<Vec<Range<u64>>> {
        let block = |at: u64| at & !(BLOCK_BYTES - 1);
        let (pagemap, pid) = (&self.registered.pagemap, self.registered.pid);
        let mut all: BTreeMap<u64, ()> = self
            .known
            .range(block(r.start)..r.end)
            .map(|(at, _)| (*at, ()))
            .collect();
        for run in there(pagemap, pid, r.clone(), Then::Leave)? {
            for at in (block(run.start)..run.end).step_by(BLOCK_BYTES as usize) {
                all.insert(at, ());
            }
        }
        let mut parts = Vec::new();
        for at in all.into_keys() {
            push(&mut parts, at.max(r.start)..(at + BLOCK_BYTES).min(r.end));
        }
        Ok(parts)
    }
}

/// Whether a page may hold other bytes than at the last look.
fn differs(was: u64, is: u64) -> bool {
    is & WRITTEN != 0 || (was | is) & HELD != 0 || was & !WRITTEN != is & !WRITTEN
}

impl<S: Source> Writes for Words<S> {
    fn tracking(&self) -> Tracking {
        self.source.tracking()
    }

    fn follows(&self, mapping: &Mapping) -> bool {
        self.registered.follows(mapping)
    }

    fn follow(&mut self, mapping: Range<u64>) -> bool {
        self.registered.follow(mapping)
    }

    fn present(&mut self, part: Range<u64>, then: Then) -> Result<Vec<Range<u64>>> {
        let mut found = Vec::new();
        for some in self.worth_reading(part)? {
            self.renew(some, then, |at, _, is| {
                if is != 0 {
                    push(&mut found, at..at + PAGE);
                }
            })?;
        }
        Ok(found)
    }

    fn changed(&mut self, part: Part<'_>, then: Then) -> Result<Vec<Range<u64>>> {
        let parts = match part.dense {
            true => vec![part.range],
            false => self.worth_reading(part.range)?,
        };
        let mut found = Vec::new();
        for some in parts {
            self.renew(some, then, |at, was, is| {
                if differs(was, is) {
                    push(&mut found, at..at + PAGE);
                }
            })?;
        }
        Ok(found)
    }

    fn still_follows(&self, at: u64) -> Result<bool> {
        self.registered.still_follows(at)
    }
}

/// The soft-dirty bits (Documentation/admin-guide/mm/soft-dirty.rst).
///
/// They can be read, and all of them together be cleared, but not both in one
/// step: what a running program writes in between would be lost. So they are
/// cleared once, before the first look, and each look tells all that was
/// written since.
pub(in crate::state::memory) struct SoftDirty {
    pid: i32,
    pagemap: File,
}

pub(in crate::state::memory) type BySoftDirty = Words<SoftDirty>;

impl Words<SoftDirty> {
    /// # Errors
    /// Those of /proc/PID/clear_refs; the process cannot make a userfaultfd.
    pub fn begin(stopped: &mut Stopped) -> Result<Self> {
        let registered = Registered::begin(stopped)?;
        let pid = stopped.pid();
        let path = format!("/proc/{pid}/clear_refs");
        std::fs::write(&path, "4").context("write", path)?;
        let pagemap = open_pagemap(pid)?;
        Ok(Words::new(registered, SoftDirty { pid, pagemap }))
    }
}

impl Source for SoftDirty {
    fn tracking(&self) -> Tracking {
        Tracking::SoftDirty
    }

    fn read(&mut self, start: u64, words: &mut [u64], _: Then) -> Result<()> {
        pagemap::entries(&self.pagemap, start, words).context("read the page map of", self.pid)?;
        for word in words {
            *word = word_of(*word);
        }
        Ok(())
    }
}

fn word_of(e: u64) -> u64 {
    // Of what is not there the bit tells only how old the mapping is.
    if e & (entry::PRESENT | entry::SWAPPED) == 0 {
        return 0;
    }
    let kind = (e & (entry::PRESENT | entry::SWAPPED | entry::FILE)) >> 5;
    let written = if e & entry::SOFT_DIRTY != 0 {
        WRITTEN
    } else {
        0
    };
    e & entry::WHICH | kind | written
}

/// The dirty bits, by the kernel module: `kmod/dirty.c` says how, and what it
/// does not see.
pub(in crate::state::memory) struct DirtyBits {
    kmod: Kmod,
    pid: i32,
    process: OwnedFd,
}

pub(in crate::state::memory) type ByModule = Words<DirtyBits>;

impl Words<DirtyBits> {
    /// # Errors
    /// There is no module, or this process is not for it, or cannot make a
    /// userfaultfd.
    pub fn begin(stopped: &mut Stopped) -> Result<Self> {
        let pid = stopped.pid();
        let kmod = Kmod::open()
            .context("open", crate::sys::kmod::DEVICE)?
            .filter(Kmod::tells_writes)
            .ok_or_else(|| {
                Error::bad(crate::sys::kmod::DEVICE, "it cannot tell what is written")
            })?;
        let process = pidfd::open(pid).context("open process", pid)?;
        let mut source = DirtyBits { kmod, pid, process };
        source.read(PAGE, &mut [0], Then::Leave)?;
        Ok(Words::new(Registered::begin(stopped)?, source))
    }
}

impl Source for DirtyBits {
    fn tracking(&self) -> Tracking {
        Tracking::Kmod
    }

    fn read(&mut self, start: u64, words: &mut [u64], then: Then) -> Result<()> {
        let process = self.process.as_fd();
        match self
            .kmod
            .written(process, start, words, then == Then::Clean)
        {
            Ok(()) => Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Err(Error::Refused(vec![Obstacle::new(
                    "dirty tracking by kmod",
                    "a virtual machine or a device writes to the program's memory",
                    "leave the choice of tracking to auto",
                )]))
            }
            Err(e) => Err(e).context("ask the kernel module what was written by", self.pid),
        }
    }
}

const _: () = assert!(WRITTEN == abi::PAGE_WRITTEN && HELD == abi::PAGE_HELD);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_page_unwritten_is_what_it_was() {
        let page = 77 | 1 << 61;
        assert!(!differs(0, 0));
        assert!(!differs(page, page));
        assert!(!differs(page | WRITTEN, page));
        for (was, is) in [
            (page, page | WRITTEN),
            (page | WRITTEN, page | WRITTEN),
            (page, page + 1),
            (page, 0),
            (0, page),
            (page | HELD, page),
            (page, page | HELD),
        ] {
            assert!(differs(was, is), "{was:x} {is:x}");
        }
    }

    #[test]
    fn what_is_not_there_is_nothing_however_old_its_mapping_is() {
        assert_eq!(word_of(entry::SOFT_DIRTY), 0);
        let there = entry::PRESENT | 5;
        assert_ne!(word_of(there), 0);
        assert_eq!(word_of(there | entry::SOFT_DIRTY), word_of(there) | WRITTEN);
        assert!(differs(word_of(there), word_of(there | entry::FILE)));
        assert!(differs(word_of(there), word_of(entry::SWAPPED | 5)));
        // Whether a page is shared with a child is nobody's business here.
        assert_eq!(word_of(there | 1 << 56), word_of(there));
    }
}
