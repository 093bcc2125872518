//! Which pages of a running program were written: by different means of the
//! kernel's, behind one trait.
//!
//! What all of them answer is "which pages may not be what they were at the last
//! look?" Written is one reason. A page that was discarded, or is another one
//! because something else was mapped or moved there, is as well: absence is
//! state.

mod protection;
mod registered;
mod words;

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::str::FromStr;

use super::counts::{brings_one_page, tells_exactly};
use super::PAGE;
use crate::error::{Context, Error, Obstacle, Result};
use crate::proc::smaps::Mapping;
use crate::sys::kmod::Kmod;
use crate::sys::pagemap::{self, category, scan, Query};
use crate::sys::uffd;
use crate::tracee::Stopped;
pub(super) use protection::Protection;
pub(super) use words::{ByModule, BySoftDirty};

/// A means to tell which pages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// Asynchronous write protection by a userfaultfd (Linux 6.7).
    Uffd,
    /// The soft-dirty bits of the page tables (CONFIG_MEM_SOFT_DIRTY).
    SoftDirty,
    /// As [`Tracking::Uffd`], and the program's page faults are counted: mostly they
    /// tell at the freeze that there is nothing to look for (Linux 6.16).
    Faults,
    /// The dirty bits of the page tables, by the kernel module.
    Kmod,
    /// Nothing does: all is sent when the program stands still.
    None,
}

impl Tracking {
    /// In the order in which `auto` would have them: what is safe before what is
    /// not, and what keeps the freeze short first.
    ///
    /// Medians in milliseconds of 27 November 2026 (`cargo bench --bench tracking`;
    /// 64 and 256 MB, in a virtual machine emulated without KVM on a computer of two
    /// cores that compiled now and then):
    ///
    /// | | uffd | soft-dirty | kmod |
    /// |---|---|---|---|
    /// | the program is stopped for it | 3.4, 3.4 | 4.0, 4.3 | 3.9, 3.9 |
    /// | a look, nothing written | 2.5, 6.9 | 5.2, 16.8 | 3.2, 10.2 |
    /// | a look, 4,096 pages written | 5.3, 13.8 | 5.4, 17.4 | 5.9, 16.7 |
    /// | the last look, at the freeze | 3.1, 7.2 | 4.3, 13.9 | 4.4, 13.0 |
    /// | writing to 4,096 pages after a look (untracked 0.5, 0.6) | 9.7, 10.2 | 0.5, 1.3; the first time 9.3, 10.7 | 0.6, 1.2 |
    ///
    /// On the computer itself (6.18): uffd 0.2, 0.2; 0.3, 1.2; 1.0, 2.7; 0.6, 1.4;
    /// 2.4, 2.5 (0.04 untracked). The module costs the program least, but is not
    /// safe by itself; soft-dirty costs it nothing after the first write, because it
    /// does not forget.
    pub const ALL: [Tracking; 5] = [
        Tracking::Uffd,
        Tracking::SoftDirty,
        Tracking::Faults,
        Tracking::Kmod,
        Tracking::None,
    ];

    /// As `--dirty-tracking` has it.
    pub fn name(self) -> &'static str {
        match self {
            Tracking::Uffd => "uffd",
            Tracking::SoftDirty => "soft-dirty",
            Tracking::Faults => "faults",
            Tracking::Kmod => "kmod",
            Tracking::None => "none",
        }
    }

    /// Whether `auto` may choose it. The module cannot see who else writes to the
    /// program's memory (process_vm_writev(2), a debugger's ptrace(2)), if it is done
    /// between two looks, and of such a writer the faults are counted elsewhere:
    /// whoever asks for one of them has to know that there is none.
    fn is_safe(self) -> bool {
        self.sees_other_writers()
    }

    /// Whether it sees what other processes write into the program.
    pub fn sees_other_writers(self) -> bool {
        !matches!(self, Tracking::Kmod | Tracking::Faults)
    }

    /// Whether it is there on this machine.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub fn probe(self) -> Result<(), Obstacle> {
        let no = |why: String, remedy: &str| {
            Err(Obstacle::new(
                format!("dirty tracking by {}", self.name()),
                why,
                remedy,
            ))
        };
        // By it they see what is mapped anew or moved.
        let needs_userfaultfd = || match uffd::create() {
            Ok(_) => Ok(()),
            Err(e) => no(
                format!("no userfaultfd: {e}"),
                "it needs CONFIG_USERFAULTFD",
            ),
        };
        match self {
            Tracking::None => Ok(()),
            Tracking::Uffd => match probe_uffd() {
                Ok(()) => Ok(()),
                Err(e) => no(
                    e,
                    "it needs Linux 6.7 with CONFIG_USERFAULTFD; leave the choice to auto",
                ),
            },
            Tracking::Faults => match probe_uffd() {
                Ok(()) if !brings_one_page() => no(
                    "here a page fault may bring many pages to any program".into(),
                    "write madvise to /sys/kernel/mm/transparent_hugepage/enabled, or leave \
                     the choice to auto",
                ),
                Ok(()) if !tells_exactly() => no(
                    "this kernel tells by many pages at once what a process holds".into(),
                    "it needs Linux 6.16; leave the choice to auto",
                ),
                Ok(()) => Ok(()),
                Err(e) => no(
                    e,
                    "it needs Linux 6.16 with CONFIG_USERFAULTFD; leave the choice to auto",
                ),
            },
            Tracking::SoftDirty => match pagemap::has_soft_dirty() {
                Ok(true) => needs_userfaultfd(),
                Ok(false) => no(
                    "this kernel does not note soft-dirty pages".into(),
                    "it needs CONFIG_MEM_SOFT_DIRTY; leave the choice to auto",
                ),
                Err(e) => no(format!("/proc/self/pagemap: {e}"), "run pmig as root"),
            },
            Tracking::Kmod => match Kmod::open() {
                Ok(Some(module)) if module.tells_writes() && has_swap() => no(
                    "this machine swaps: what was written before a page went there is not seen"
                        .into(),
                    "swapoff -a, or leave the choice to auto",
                ),
                Ok(Some(module)) if module.tells_writes() => needs_userfaultfd(),
                Ok(Some(_)) => no(
                    "the kernel module that is loaded cannot tell what is written".into(),
                    "load the pmig.ko of this version; leave the choice to auto",
                ),
                Ok(None) => no(
                    "the kernel module is not loaded".into(),
                    "load pmig.ko; leave the choice to auto",
                ),
                Err(e) => no(format!("{}: {e}", crate::sys::kmod::DEVICE), "load pmig.ko"),
            },
        }
    }
}

impl fmt::Display for Tracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether pages can be swapped out; so too where that cannot be told.
fn has_swap() -> bool {
    let swaps = std::fs::read_to_string("/proc/swaps");
    swaps.map_or(true, |text| text.lines().nth(1).is_some())
}

fn probe_uffd() -> Result<(), String> {
    let query = Query {
        any: category::PRESENT,
        tell: category::PRESENT,
        protect: false,
        followed: true,
        ..Query::default()
    };
    // What is asked for of the mapping tells the ioctl from its stand-in.
    match File::open("/proc/self/pagemap")
        .and_then(|file| scan(&file, PAGE, 2 * PAGE, query, |_| {}))
    {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
        Err(e) => return Err(format!("no PAGEMAP_SCAN: {e}")),
    }
    uffd::create()
        .and_then(|fd| uffd::enable_async_wp(&fd))
        .map_err(|e| format!("no asynchronous write protection by userfaultfd: {e}"))?;
    protection::tells_holes();
    Ok(())
}

/// Which means is wanted: `--dirty-tracking`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrackingChoice {
    /// The best that is safe and there.
    #[default]
    Auto,
    /// This one or none.
    Only(Tracking),
}

impl FromStr for TrackingChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<TrackingChoice, String> {
        if s == "auto" {
            return Ok(TrackingChoice::Auto);
        }
        let one = Tracking::ALL.into_iter().find(|t| t.name() == s);
        one.map(TrackingChoice::Only)
            .ok_or_else(|| format!("{s}: there are auto, uffd, soft-dirty, faults, kmod and none"))
    }
}

impl TrackingChoice {
    /// What is there of what is wanted, the best first; never empty.
    ///
    /// # Errors
    /// [`Error::Refused`] where it is one that is not there.
    pub fn candidates(self) -> Result<Vec<Tracking>> {
        match self {
            TrackingChoice::Only(one) => match one.probe() {
                Ok(()) => Ok(vec![one]),
                Err(obstacle) => Err(Error::Refused(vec![obstacle])),
            },
            TrackingChoice::Auto => {
                let all = Tracking::ALL.into_iter();
                Ok(all.filter(|t| t.is_safe() && t.probe().is_ok()).collect())
            }
        }
    }
}

/// A stretch of addresses in which private mappings lie.
#[derive(Debug, Clone)]
pub(super) struct Part<'a> {
    pub range: Range<u64>,
    /// Full for the most part, or small. Of others only what is there should be
    /// walked through, lest the page tables of their holes be built.
    pub dense: bool,
    /// What the target has.
    pub sent: &'a super::Ranges,
}

/// What becomes of what a look tells as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// It counts as unwritten from then on: it must be sent.
    Clean,
    /// It stays as it is: the program stands still, and is not looked at again.
    Leave,
}

/// A means at work on one process.
pub(super) trait Writes {
    fn tracking(&self) -> Tracking;

    /// Whether looks find what was done to a mapping since the last one, whatever
    /// it was. What does not is fresh: nothing that was sent for it counts.
    fn follows(&self, mapping: &Mapping) -> bool;

    /// Follows a fresh mapping from now on. False where it has gone meanwhile; it
    /// is fresh at the next look then.
    fn follow(&mut self, mapping: Range<u64>) -> bool;

    /// Whether looking where nothing is mapped takes no time, however large that
    /// is: then one look may span several mappings.
    fn skips_holes(&self) -> bool {
        false
    }

    /// What is there now, in order.
    fn present(&mut self, part: Range<u64>, then: Then) -> Result<Vec<Range<u64>>>;

    /// Whether the mapping that begins at that address is followed still. Asked when
    /// nothing changes any more.
    fn still_follows(&self, at: u64) -> Result<bool>;

    /// What may not be what it was at the last look, in order: written, come,
    /// gone, or another page. May tell more, never less.
    fn changed(&mut self, part: Part<'_>, then: Then) -> Result<Vec<Range<u64>>>;

    /// The same, with the program standing still, where all mappings have the
    /// lines in /proc/PID/maps that they had at the last look. None where one of
    /// them is followed no longer, and where that is not told by the same look: one
    /// given up halfway must not have forgotten anything.
    fn changed_in_the_same(&mut self, _: Part<'_>) -> Result<Option<Vec<Range<u64>>>> {
        Ok(None)
    }
}

/// Begins to follow a stopped process by the first of these that can.
///
/// # Errors
/// [`Error::Refused`] where there is but one and it cannot.
pub(super) fn begin(stopped: &mut Stopped, candidates: &[Tracking]) -> Result<Box<dyn Writes>> {
    let mut last = None;
    for tracking in candidates {
        let begun: Result<Box<dyn Writes>> = match tracking {
            Tracking::Uffd | Tracking::Faults => {
                Protection::begin(stopped, *tracking).map(|w| Box::new(w) as _)
            }
            Tracking::SoftDirty => BySoftDirty::begin(stopped).map(|w| Box::new(w) as _),
            Tracking::Kmod => ByModule::begin(stopped).map(|w| Box::new(w) as _),
            Tracking::None => Nothing::new(stopped.pid()).map(|w| Box::new(w) as _),
        };
        match begun {
            Ok(writes) => return Ok(writes),
            Err(e) => {
                tracing::debug!("dirty tracking by {tracking}: {e}");
                last = Some(e);
            }
        }
    }
    Err(last.unwrap_or_else(|| Error::bad("dirty tracking", "there is none to choose from")))
}

/// Where nothing tells what is written.
pub(super) struct Nothing {
    pid: i32,
    pagemap: File,
}

impl Nothing {
    pub fn new(pid: i32) -> Result<Nothing> {
        let pagemap = open_pagemap(pid)?;
        Ok(Nothing { pid, pagemap })
    }
}

impl Writes for Nothing {
    fn tracking(&self) -> Tracking {
        Tracking::None
    }

    fn follows(&self, _: &Mapping) -> bool {
        false
    }

    fn follow(&mut self, _: Range<u64>) -> bool {
        true
    }

    fn present(&mut self, part: Range<u64>, _: Then) -> Result<Vec<Range<u64>>> {
        there(&self.pagemap, self.pid, part, Then::Leave)
    }

    fn changed(&mut self, part: Part<'_>, _: Then) -> Result<Vec<Range<u64>>> {
        Ok(vec![part.range])
    }

    fn still_follows(&self, _: u64) -> Result<bool> {
        Ok(false)
    }
}

fn open_pagemap(pid: i32) -> Result<File> {
    let path = format!("/proc/{pid}/pagemap");
    File::open(&path).context("open", path)
}

/// The pages of a range that are there; with [`Then::Clean`] they are
/// write-protected in the same step.
fn there(pagemap: &File, pid: i32, r: Range<u64>, then: Then) -> Result<Vec<Range<u64>>> {
    let query = Query {
        any: category::PRESENT | category::SWAPPED,
        tell: category::PRESENT,
        protect: then == Then::Clean,
        ..Query::default()
    };
    runs(pagemap, pid, r, query)
}

fn runs(pagemap: &File, pid: i32, r: Range<u64>, query: Query) -> Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    scan(pagemap, r.start, r.end, query, |r| {
        super::ranges::push(&mut found, r.start..r.end);
    })
    .context("scan the pages of", pid)?;
    Ok(found)
}
