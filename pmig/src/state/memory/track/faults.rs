//! What a program's page faults tell: that nothing was written but where it was looked
//! for.
//!
//! A look walks through the page tables of all memory, which in a program of some
//! gigabytes is most of the time that it stands still. But a page that is
//! write-protected is written behind a page fault, and the kernel counts those
//! (proc_pid_stat(5), `minflt` and `majflt`). So right before the stop the few pages
//! that are written all the time, the *hot* ones, are looked at before and behind a
//! look at all: where the faults meanwhile are as many as the hot pages found written,
//! all the rest has been clean since. At the stop it is the same: as many hot pages
//! written as there were faults, and no others can have been.
//!
//! What is discarded goes without a fault. It shows in how much memory the process
//! holds, for what comes anew, to make up for it, comes by a fault that wrote to no hot
//! page: those were all there.
//!
//! All that holds where
//! - a fault makes one page written: no fault brings several anonymous pages at once
//!   (transparent huge pages of any size, unless the program asked for them);
//! - what the process holds is told exactly, which kernels before 6.16 do not do;
//! - it has no child, and no process is born meanwhile: a child may share the memory
//!   (vfork(2));
//! - equal pages are not merged (MADV_MERGEABLE), which makes them written;
//! - nobody else writes to its memory (process_vm_writev(2), another's /proc/PID/mem).
//!   The faults of such a one are its own, so a write of it may be lost, and one of the
//!   program's as well, which it makes up for in the count;
//! - nothing is guarded (MADV_GUARD_INSTALL) where nothing is, in the last moment.
//!
//! All but the last two are looked at, and in doubt is all memory. For those it is for
//! who asks for it (`--dirty-tracking faults`).

use std::ops::Range;

use super::{Found, Tracker};
use crate::error::{Context, Result};
use crate::proc::smaps::Mapping;
use crate::proc::Kept;
use crate::state::memory::counts::{brings_one_page, Counts};
use crate::state::memory::{Ranges, Tracking, PAGE};
use crate::sys::pagemap::{category, scan, Query};

/// Hot pages, at most: fewer than a huge page has.
const MOST_PAGES: u64 = 511;
/// And runs of them.
const MOST_RUNS: usize = 64;

/// The hot pages, as looked at.
struct Hot {
    written: Vec<Range<u64>>,
    /// All of them are there, are the process's own, and are small ones.
    plain: bool,
}

/// What is known of a process's faults.
pub(super) struct Faults {
    files: Kept,
    /// What was written lately, if it is little.
    recent: Ranges,
    /// The last look found more than can be hot.
    many: bool,
    /// All but the hot pages, which are `recent`, has been clean since.
    since: Option<Counts>,
}

impl Faults {
    pub fn of(pid: i32) -> Faults {
        Faults {
            files: Kept::of(pid),
            recent: Ranges::default(),
            many: false,
            since: None,
        }
    }

    /// A look found this.
    pub fn note(&mut self, found: &Found) {
        self.since = None;
        self.many = !is_little(&found.pages);
        if self.many {
            self.recent = Ranges::default();
            return;
        }
        // What is written now and then is hot as well.
        let mut all = Ranges::of(&found.pages);
        self.recent.iter().for_each(|r| all.insert(r));
        let little = is_little(&all.iter().collect::<Vec<_>>());
        self.recent = if little {
            all
        } else {
            Ranges::of(&found.pages)
        };
    }
}

fn is_little(runs: &[Range<u64>]) -> bool {
    runs.len() <= MOST_RUNS && bytes(runs) <= MOST_PAGES * PAGE
}

impl Tracker {
    /// Whether [`Tracker::look_closely`] can make the freeze shorter.
    pub fn counts_faults(&self) -> bool {
        let odd = |m: &Mapping| m.has(b"hg") || m.has(b"mg");
        self.tracking() == Tracking::Faults
            && !self.distrusted
            && !self.faults.many
            && self.all_watched
            && self.can_be_asked()
            && brings_one_page()
            && !self.seen.iter().any(odd)
    }

    /// As [`Tracker::look`], right before the program is stopped: afterwards it may be
    /// known that only hot pages can have been written ([`Tracker::is_accounted`]),
    /// and then the last look is a quick one.
    ///
    /// # Errors
    /// As [`Tracker::look`].
    pub fn look_closely(&mut self) -> Result<Found> {
        self.faults.since = None;
        let hot: Vec<Range<u64>> = self.faults.recent.iter().collect();
        // What is owed may not be there.
        let nothing_owed = self.owed.is_empty();
        let before = Counts::read(&self.faults.files)?;
        let first = self.look_at(&hot, true)?;
        // Looked at here as well a page could count twice.
        let mut found = self.look_once(&Ranges::of(&hot))?;
        let second = self.look_at(&hot, true)?;
        let now = Counts::read(&self.faults.files)?;

        let known = first.plain
            && second.plain
            && nothing_owed
            && before.childless
            && self.all_watched
            && found.steps.is_empty()
            && now.settled == before.settled
            && now.since(&before) * PAGE == bytes(&second.written);
        for run in first.written.into_iter().chain(second.written) {
            self.owed.insert(run);
        }
        self.settle_owed(&mut found);
        self.faults.note(&found);
        if !first.plain || !second.plain {
            self.faults.recent = Ranges::default();
            self.faults.note(&found);
        }
        // What was found besides was there and clean by now too, and counts as hot.
        self.faults.since = known.then_some(now);
        Ok(found)
    }

    /// Whether all faults have been accounted for: nothing was written since but hot
    /// pages.
    pub fn is_accounted(&self) -> bool {
        self.faults.since.is_some()
    }

    /// Somebody else wrote to its memory since: what the faults tell is not believed.
    pub fn doubt(&mut self) {
        self.faults.since = None;
    }

    /// What was written since, of a program that stands still and whose mappings are
    /// the same; none where it is not known that this is all.
    pub(super) fn all_written(&mut self) -> Result<Option<Vec<Range<u64>>>> {
        let Some(before) = self.faults.since.take() else {
            return Ok(None);
        };
        let now = Counts::read(&self.faults.files)?;
        let hot: Vec<Range<u64>> = self.faults.recent.iter().collect();
        let hot = self.look_at(&hot, false)?;
        let known = hot.plain
            && !self.distrusted
            && now.settled == before.settled
            && now.since(&before) * PAGE == bytes(&hot.written);
        tracing::debug!(
            "{} faults, {} bytes of hot pages written; all told: {known}",
            now.since(&before),
            bytes(&hot.written)
        );
        Ok(known.then_some(hot.written))
    }

    /// Looks at pages that are believed to be hot; with `protect` they count as clean
    /// from then on, and what is told must be sent.
    fn look_at(&self, hot: &[Range<u64>], protect: bool) -> Result<Hot> {
        use category::*;
        let query = Query {
            all: PRESENT,
            tell: PRESENT | WRITTEN | FILE | PFNZERO | HUGE,
            protect,
            ..Query::default()
        };
        let (mut written, mut there, mut other) = (Vec::new(), 0, false);
        for run in hot {
            scan(&self.pagemap, run.start, run.end, query, |r| {
                there += r.end - r.start;
                other |= r.categories & (FILE | PFNZERO | HUGE) != 0;
                if r.categories & WRITTEN != 0 {
                    super::push(&mut written, r.start..r.end);
                }
            })
            .context("scan the pages of", self.pid)?;
        }
        Ok(Hot {
            written,
            plain: !other && there == bytes(hot),
        })
    }
}

fn bytes(runs: &[Range<u64>]) -> u64 {
    runs.iter().map(|r| r.end - r.start).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracee::Stopped;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    /// Writes to a few pages all the time, and now and then to another, or discards
    /// one, so that as much is held as before or not.
    const PROGRAM: &str = r#"
import ctypes, random, sys, time
c = ctypes.CDLL(None)
c.mmap.restype = ctypes.c_void_p
c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
size, hot, page = 16 << 20, 24, 4096
full = c.mmap(None, size, 3, 0x22, -1, 0)
empty = c.mmap(None, 1 << 36, 3, 0x4022, -1, 0)
ctypes.memset(full, 7, size)
write = lambda at: ctypes.memset(at, 1, 1)
discard = lambda at: c.madvise(at, page, 4)
random.seed(int(sys.argv[1]))
cold = lambda: full + random.randrange(hot, size // page) * page
print(flush=True)
while True:
    for _ in range(random.randrange(400)):
        write(full + random.randrange(hot) * page)
    if random.randrange(60):
        time.sleep(0.0002)
        continue
    what = random.randrange(5)
    if what == 0:
        write(cold())
    if what in (1, 2):
        discard(cold())
    if what == 2:
        write(empty)
        empty += page
    if what == 3:
        at = full + random.randrange(hot) * page
        discard(at)
        write(at)
    if what == 4:
        at = cold()
        discard(at)
        write(at)
"#;

    struct Ended(Child);

    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn mark(tracker: &mut Tracker, found: &Found) {
        found
            .pages
            .iter()
            .for_each(|r| tracker.mark_sent(r.clone()));
    }

    #[test]
    fn what_faults_tell_is_what_a_scan_finds() {
        for seed in 1..=3 {
            let child = Command::new("python3")
                .args(["-c", PROGRAM, &format!("{seed}")])
                .stdout(Stdio::piped())
                .spawn();
            let mut child = Ended(child.unwrap());
            let mut out = BufReader::new(child.0.stdout.take().unwrap());
            out.read_line(&mut String::new()).unwrap();
            let pid = child.0.id() as i32;
            let mut stopped = Stopped::seize(pid).unwrap();
            let mut tracker = Tracker::attach(&mut stopped, &[Tracking::Faults]).unwrap();
            stopped.detach().unwrap();
            for _ in 0..3 {
                let found = tracker.look().unwrap();
                mark(&mut tracker, &found);
            }
            let able = tracker.counts_faults();
            let mut accounted = 0;
            for n in 0..if able { 150 } else { 0 } {
                for _ in 0..4 {
                    let found = tracker.look_closely().unwrap();
                    mark(&mut tracker, &found);
                    if tracker.is_accounted() {
                        break;
                    }
                }
                std::thread::sleep(Duration::from_micros(n % 20 * 200));
                let stopped = Stopped::seize(pid).unwrap();
                let told = tracker.all_written().unwrap();
                let found = tracker.last_look().unwrap();
                stopped.detach().unwrap();
                if let Some(written) = told {
                    accounted += 1;
                    assert!(found.is_of_pages(), "seed {seed}, {n}: {found:x?}");
                    let written = Ranges::of(&written);
                    let known = found.pages.iter().flat_map(|r| written.within(r.clone()));
                    let known: Vec<Range<u64>> = known.collect();
                    assert_eq!(bytes(&known), found.bytes(), "seed {seed}, {n}: {found:x?}");
                }
            }
            if !able {
                eprintln!("skipped: this kernel does not tell exactly what a process holds");
                return;
            }
            assert!(accounted > 5, "seed {seed}: {accounted} times of 150");
        }
    }
}
