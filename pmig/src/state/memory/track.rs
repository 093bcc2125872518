//! Which pages of a running program must travel, and again.
//!
//! The kernel write-protects the pages and remembers which were written since
//! (userfaultfd(2) in its asynchronous mode, PAGEMAP_SCAN). Absence is state
//! as well: a page that was sent and is gone now is told as a drop.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::sys::uio::{process_vm_readv, RemoteIoVec};
use nix::unistd::Pid;

use super::layout::{steps, Backing, Layout, Step, Vma, PAGE};
use super::ranges::Ranges;
use crate::error::{Context, Error, Obstacle, Result};
use crate::proc::smaps::{self, Mapping};
use crate::sys::pagemap::{category, scan, Query, Region};
use crate::sys::{pidfd, uffd};
use crate::tracee::{Batch, Stopped};

/// Mappings up to this size, and those that are full for the most part, are
/// write-protected whole, which is quicker to look at; of larger and sparser ones
/// only what is there, lest the page tables of their holes be built.
const DENSE: u64 = 64 << 20;

/// Bytes whose page tables are walked within a millisecond or so.
const QUICKLY_WALKED: u64 = 8 << 20;

/// What a look at the memory found.
#[derive(Debug, Default)]
pub struct Found {
    /// How the address space differs from what was last seen; empty when not
    /// at all.
    pub steps: Vec<Step>,
    /// Pages whose content must travel.
    pub pages: Vec<Range<u64>>,
    /// Pages that travelled and are gone now.
    pub drops: Vec<Range<u64>>,
}

impl Found {
    /// Bytes of content.
    pub fn bytes(&self) -> u64 {
        self.pages.iter().map(|r| r.end - r.start).sum()
    }
}

/// Follows the memory of one process.
pub struct Tracker {
    pid: i32,
    pagemap: File,
    mem: File,
    uffd: Option<OwnedFd>,
    pub layout: Layout,
    /// What the target has.
    sent: Ranges,
    /// What could not be read when its turn came.
    owed: Ranges,
    /// The lines of the last list.
    seen: Vec<Mapping>,
    /// The mappings of the last list that are write-protected, by address.
    watched: BTreeSet<u64>,
}

impl Tracker {
    /// For a process that cannot be watched: everything is sent when it stands
    /// still.
    pub fn without_tracking(pid: i32) -> Result<Tracker> {
        let open = |what: &str| {
            let path = format!("/proc/{pid}/{what}");
            File::open(&path).context("open", path)
        };
        Ok(Tracker {
            pid,
            pagemap: open("pagemap")?,
            mem: open("mem")?,
            uffd: None,
            layout: Layout::default(),
            sent: Ranges::default(),
            owed: Ranges::default(),
            seen: Vec::new(),
            watched: BTreeSet::new(),
        })
    }

    /// Watches a process: one short stop, in which it makes a userfaultfd for
    /// us. `Ok` with no tracking where the kernel has none.
    pub fn attach(stopped: &mut Stopped) -> Result<Tracker> {
        let mut tracker = Tracker::without_tracking(stopped.pid())?;
        let mut b = Batch::new();
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | uffd::USER_MODE_ONLY;
        let fd = b.may_fail("userfaultfd", libc::SYS_userfaultfd, &[flags.into()]);
        let fd = stopped.run(b)?.result(fd);
        if fd < 0 {
            return Ok(tracker);
        }
        let process = pidfd::open(stopped.pid()).context("open process", stopped.pid())?;
        let ours = pidfd::get(std::os::fd::AsFd::as_fd(&process), fd as i32);
        let mut b = Batch::new();
        b.call("close", libc::SYS_close, &[fd.into()]);
        stopped.run(b)?;
        let ours = ours.context("fetch the userfaultfd of", stopped.pid())?;
        if uffd::enable_async_wp(&ours).is_ok() {
            tracker.uffd = Some(ours);
        }
        Ok(tracker)
    }

    /// Whether rounds while the program runs are of any use.
    pub fn tracks(&self) -> bool {
        self.uffd.is_some()
    }

    /// Looks while the program runs: what is found counts as clean from then
    /// on, and must be sent.
    pub fn look(&mut self) -> Result<Found> {
        let (mut found, renewed) = self.list()?;
        if !self.tracks() {
            return Ok(found);
        }
        self.watched.clear();
        let vmas = self.layout.vmas.clone();
        for vma in vmas.iter().filter(|v| v.is_private()) {
            // A mapping that vanished meanwhile is fresh at the next look.
            if vma.fresh && !self.register(vma) {
                continue;
            }
            self.watched.insert(vma.start);
            self.scan(vma, &renewed, true, &mut found)?;
        }
        self.settle_owed(&mut found);
        Ok(found)
    }

    /// Begins to watch a mapping, with no page of it protected. One that was
    /// watched before and is no longer (mremap(2) put another beside it, and both
    /// became one) may have pages that look protected but are not; no scan would
    /// protect those (fs/proc/task_mmu.c, `pagemap_scan_pmd_entry`). To take them
    /// out clears them.
    fn register(&self, vma: &Vma) -> bool {
        let (start, len) = (vma.start, vma.end - vma.start);
        self.uffd.as_ref().is_some_and(|fd| {
            uffd::register_wp(fd, start, len).is_ok()
                && uffd::unregister(fd, start, len).is_ok()
                && uffd::register_wp(fd, start, len).is_ok()
        })
    }

    /// Looks at the program standing still: what is left.
    ///
    /// To list an address space with its flags the kernel walks through all of
    /// its pages, which in a large program takes many times as long as all the
    /// rest of the freeze. There, where everything still stands as it did at the
    /// last look, only advice (madvise(2)) given to a whole mapping since then
    /// would go unseen.
    pub fn last_look(&mut self) -> Result<Found> {
        let resident: u64 = self.seen.iter().map(|m| m.resident).sum();
        let quick = match resident > QUICKLY_WALKED && self.is_unchanged()? {
            true => self.look_at_the_same()?,
            false => None,
        };
        let mut found = match quick {
            Some(found) => found,
            None => {
                let (mut found, renewed) = self.list()?;
                let vmas = self.layout.vmas.clone();
                for vma in vmas.iter().filter(|v| v.is_private()) {
                    self.scan(vma, &renewed, false, &mut found)?;
                }
                found
            }
        };
        self.settle_owed(&mut found);
        Ok(found)
    }

    /// Whether no mapping has come, gone or changed since the last look, as far
    /// as its line tells.
    fn is_unchanged(&self) -> Result<bool> {
        self.same_space()?;
        let now = smaps::list(self.pid, "maps")?;
        let same =
            now.len() == self.seen.len() && now.iter().zip(&self.seen).all(|(a, b)| a.same_line(b));
        let mut private = self.layout.vmas.iter().filter(|v| v.is_private());
        Ok(same && private.all(|v| self.watched.contains(&v.start)))
    }

    /// Looks where all mappings have the lines that they had. `None` where one
    /// was unmapped and mapped again at the same place: it is watched no
    /// longer.
    fn look_at_the_same(&mut self) -> Result<Option<Found>> {
        let mut written = Vec::new();
        for stretch in self.stretches() {
            let query = Query {
                all: category::WRITTEN,
                tell: category::WRITTEN,
                followed: true,
                ..Query::default()
            };
            let run = |r: Region| written.push(r.start..r.end);
            match scan(&self.pagemap, stretch.start, stretch.end, query, run) {
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => return Ok(None),
                r => r.context("scan the pages of", self.pid)?,
            }
        }
        let sparse = |v: &&Vma| v.is_private() && !self.is_dense(v);
        let sparse: Vec<Vma> = self.layout.vmas.iter().filter(sparse).cloned().collect();
        for vma in &sparse {
            if !self.is_watched(vma)? {
                return Ok(None);
            }
        }
        self.layout.vmas.iter_mut().for_each(|v| v.fresh = false);
        let mut found = Found::default();
        for r in written {
            self.categorise(r, &mut found)?;
        }
        for vma in &sparse {
            self.scan(vma, &Ranges::default(), false, &mut found)?;
        }
        let of_a_file = |v: &&Vma| v.is_private() && matches!(v.backing, Backing::File(_));
        let files: Vec<Vma> = self.layout.vmas.iter().filter(of_a_file).cloned().collect();
        for vma in files {
            self.find_reverted(vma.range(), &mut found)?;
        }
        Ok(Some(found))
    }

    /// Where private, dense mappings follow one another, with nothing but holes
    /// between them.
    fn stretches(&self) -> Vec<Range<u64>> {
        let mut all: Vec<Range<u64>> = Vec::new();
        let mut goes_on = false;
        for vma in &self.layout.vmas {
            let dense = vma.is_private() && self.is_dense(vma);
            match all.last_mut() {
                Some(last) if dense && goes_on => last.end = vma.end,
                _ if dense => all.push(vma.range()),
                _ => {}
            }
            goes_on = dense;
        }
        all
    }

    fn is_watched(&self, vma: &Vma) -> Result<bool> {
        let query = Query {
            all: category::WPALLOWED,
            tell: category::WPALLOWED,
            ..Query::default()
        };
        let mut watched = false;
        self.pagemap_scan(vma.start..vma.start + PAGE, query, |_| watched = true)?;
        Ok(watched)
    }

    /// Lists the address space again; also returns where nothing that was sent
    /// counts any more.
    fn list(&mut self) -> Result<(Found, Ranges)> {
        self.same_space()?;
        self.seen = smaps::list(self.pid, "smaps")?;
        let layout = Layout::from_mappings(&self.seen, &self.layout.files)?;
        let steps = steps(&self.layout.vmas, &layout.vmas);
        let mut renewed = Ranges::default();
        for step in &steps {
            match step {
                Step::Unmap(r) => {
                    self.sent.remove(r.clone());
                    self.owed.remove(r.clone());
                }
                Step::Map(v) => renewed.insert(v.range()),
                _ => {}
            }
        }
        self.layout = layout;
        let found = Found {
            steps,
            ..Found::default()
        };
        Ok((found, renewed))
    }

    /// Whether the process still has the address space that it had at first:
    /// what we hold open belongs to that one.
    fn same_space(&self) -> Result<()> {
        let Some((at, _)) = self.layout.vdso() else {
            return Ok(());
        };
        // Reading what nobody lives in any more gives nothing, not an error.
        match self.mem.read_at(&mut [0], at) {
            // One that has ended has no executable any more.
            Ok(0) if std::fs::read_link(format!("/proc/{}/exe", self.pid)).is_err() => {
                Err(Error::Gone(self.pid))
            }
            Ok(0) => Err(Error::Refused(vec![Obstacle::new(
                "memory",
                "the program has executed another one while it was being copied",
                "try again",
            )])),
            _ => Ok(()),
        }
    }

    fn scan(
        &mut self,
        vma: &Vma,
        renewed: &Ranges,
        protect: bool,
        found: &mut Found,
    ) -> Result<()> {
        use category::*;
        const THERE: u64 = PRESENT | SWAPPED;
        const ALL: u64 = THERE | FILE | PFNZERO;
        let anew = renewed.within(vma.range());
        // What was mapped anew is sent whatever it is.
        for part in &anew {
            let query = Query {
                any: THERE,
                tell: ALL,
                protect,
                ..Query::default()
            };
            let mut runs = Vec::new();
            self.pagemap_scan(part.clone(), query, |r| runs.push(r))?;
            for (r, what) in runs {
                self.sort(r, what, found);
            }
        }
        for part in without(vma.range(), &anew) {
            if matches!(vma.backing, Backing::File(_)) {
                self.find_reverted(part.clone(), found)?;
            }
            if self.is_dense(vma) {
                let mut written = Vec::new();
                let query = Query {
                    all: WRITTEN,
                    tell: WRITTEN,
                    protect,
                    ..Query::default()
                };
                self.pagemap_scan(part, query, |(r, _)| written.push(r))?;
                for r in written {
                    self.categorise(r, found)?;
                }
            } else {
                let mut runs = Vec::new();
                let query = Query {
                    all: WRITTEN,
                    any: THERE,
                    tell: ALL,
                    protect,
                    ..Query::default()
                };
                self.pagemap_scan(part.clone(), query, |r| runs.push(r))?;
                for (r, what) in runs {
                    self.sort(r, what, found);
                }
                for r in self.sent.within(part) {
                    self.find_gone(r, found)?;
                }
            }
        }
        Ok(())
    }

    fn is_dense(&self, vma: &Vma) -> bool {
        let len = vma.end - vma.start;
        let n = self.seen.partition_point(|m| m.start < vma.start);
        let resident = self.seen.get(n).map_or(0, |m| m.resident);
        len <= DENSE || resident >= len / 2
    }

    fn pagemap_scan(
        &self,
        r: Range<u64>,
        query: Query,
        mut each: impl FnMut((Range<u64>, u64)),
    ) -> Result<()> {
        scan(&self.pagemap, r.start, r.end, query, |region| {
            each((region.start..region.end, region.categories))
        })
        .context("scan the pages of", self.pid)
    }

    /// Tells what the pages of a written run are now.
    fn categorise(&mut self, r: Range<u64>, found: &mut Found) -> Result<()> {
        use category::*;
        let query = Query {
            any: PRESENT | SWAPPED,
            tell: PRESENT | SWAPPED | FILE | PFNZERO,
            ..Query::default()
        };
        let mut runs = Vec::new();
        self.pagemap_scan(r.clone(), query, |x| runs.push(x))?;
        let mut at = r.start;
        for (run, what) in runs {
            self.gone(at..run.start, found);
            at = run.end;
            self.sort(run, what, found);
        }
        self.gone(at..r.end, found);
        Ok(())
    }

    /// Finds what was sent of a run and is absent now.
    fn find_gone(&mut self, r: Range<u64>, found: &mut Found) -> Result<()> {
        use category::*;
        let query = Query {
            any: PRESENT | SWAPPED,
            tell: PRESENT,
            ..Query::default()
        };
        let mut there = Vec::new();
        self.pagemap_scan(r.clone(), query, |(x, _)| there.push(x))?;
        for hole in without(r, &there) {
            self.gone(hole, found);
        }
        Ok(())
    }

    /// Finds what was sent of a file's mapping and is the file's again. Where such
    /// a page is discarded, the kernel keeps a mark that it was write-protected
    /// (mm/memory.c, `zap_install_uffd_wp_if_needed`), so that it is neither
    /// written nor absent: it looks swapped out, or is the file's.
    fn find_reverted(&mut self, r: Range<u64>, found: &mut Found) -> Result<()> {
        use category::*;
        let query = Query {
            any: FILE | SWAPPED,
            tell: FILE | SWAPPED | WRITTEN,
            ..Query::default()
        };
        let mut runs = Vec::new();
        for sent in self.sent.within(r) {
            self.pagemap_scan(sent, query, |run| runs.push(run))?;
        }
        // What is written besides is found as such.
        for (run, what) in runs.into_iter().filter(|(_, what)| what & WRITTEN == 0) {
            self.sort(run, what, found);
        }
        Ok(())
    }

    /// A run of pages that are there: content of the process's own, or what
    /// the husk has anyway.
    fn sort(&mut self, r: Range<u64>, what: u64, found: &mut Found) {
        if what & (category::FILE | category::PFNZERO) != 0 {
            self.gone(r, found);
        } else {
            push(&mut found.pages, r);
        }
    }

    /// A run that has no content of its own now.
    fn gone(&mut self, r: Range<u64>, found: &mut Found) {
        for part in self.sent.within(r.clone()) {
            push(&mut found.drops, part.clone());
            self.sent.remove(part);
        }
        self.owed.remove(r);
    }

    fn settle_owed(&mut self, found: &mut Found) {
        if self.owed.is_empty() {
            return;
        }
        let mut all = Ranges::default();
        found.pages.drain(..).for_each(|r| all.insert(r));
        self.owed.iter().for_each(|r| all.insert(r));
        self.owed = Ranges::default();
        found.pages = all.iter().collect();
    }

    /// Reads pages to be sent into `buf`, which has their length. Returns the
    /// runs that could be read, in order, packed at the front of `buf`; what
    /// could not (the program took it away meanwhile) is owed until the next
    /// look.
    pub fn read(&mut self, r: Range<u64>, buf: &mut [u8]) -> Result<Vec<Range<u64>>> {
        let len = (r.end - r.start) as usize;
        let remote = [RemoteIoVec {
            base: r.start as usize,
            len,
        }];
        let mut local = [std::io::IoSliceMut::new(&mut buf[..len])];
        let got = process_vm_readv(Pid::from_raw(self.pid), &mut local, &remote).unwrap_or(0);
        if got == len {
            return Ok(vec![r]);
        }
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        for page in (r.start..r.end).step_by(PAGE as usize) {
            let to = &mut buf[at..at + PAGE as usize];
            match self.mem.read_exact_at(to, page) {
                Ok(()) => {
                    push(&mut runs, page..page + PAGE);
                    at += PAGE as usize;
                }
                Err(_) => self.owed.insert(page..page + PAGE),
            }
        }
        Ok(runs)
    }

    /// Notes that the target has what was read of `r`.
    pub fn mark_sent(&mut self, r: Range<u64>) {
        self.sent.insert(r);
    }

    /// Whether something could not be read. Standing still, that is an error.
    pub fn owes(&self) -> Result<()> {
        match self.owed.iter().next() {
            None => Ok(()),
            Some(r) => Err(Error::bad(
                format!("memory {:x}-{:x} of {}", r.start, r.end, self.pid),
                "it cannot be read",
            )),
        }
    }

    /// Whether a page of nothing there is a page of zeros.
    pub fn is_anonymous(&self, at: u64) -> bool {
        let n = self.layout.vmas.partition_point(|v| v.end <= at);
        self.layout.vmas.get(n).is_some_and(|v| {
            v.start <= at && matches!(v.backing, Backing::Anonymous | Backing::Droppable)
        })
    }

    /// Whether the target has something other than nothing there.
    pub fn was_sent(&self, at: u64) -> bool {
        self.sent.contains(at)
    }
}

/// Adds a run, joined to the last where they touch.
fn push(runs: &mut Vec<Range<u64>>, r: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == r.start => last.end = r.end,
        _ if r.is_empty() => {}
        _ => runs.push(r),
    }
}

/// `r` without `parts`, which lie in it in order.
fn without(r: Range<u64>, parts: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    let mut at = r.start;
    for p in parts {
        push(&mut rest, at..p.start.max(at));
        at = at.max(p.end);
    }
    push(&mut rest, at..r.end.max(at));
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, ChildStdout, Command, Stdio};

    const LEN: u64 = 16 << 20;
    /// Fills so much memory with mappings that nothing can be joined to, and does
    /// with it what it is told.
    const PROGRAM: &str = r#"
import ctypes, sys
c = ctypes.CDLL(None)
c.mmap.restype = ctypes.c_void_p
c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
size = 16 << 20
at = c.mmap(None, size + 8192, 0, 0x22, -1, 0) + 4096
fresh = lambda: c.mmap(at, size, 3, 0x32, -1, 0)
fresh()
ctypes.memset(at, 7, size)
print(at, flush=True)
for line in sys.stdin:
    if line == "map\n":
        fresh()
    ctypes.memset(at + 5 * 4096, 9, 1)
    print("done", flush=True)
"#;

    struct Program(Child, BufReader<ChildStdout>);

    impl Program {
        fn start() -> (Program, Range<u64>) {
            let mut child = Command::new("python3")
                .args(["-c", PROGRAM])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let out = BufReader::new(child.stdout.take().unwrap());
            let mut program = Program(child, out);
            let at: u64 = program.says().parse().unwrap();
            (program, at..at + LEN)
        }

        fn says(&mut self) -> String {
            let mut line = String::new();
            self.1.read_line(&mut line).unwrap();
            line.trim().into()
        }

        fn does(&mut self, what: &str) {
            let stdin = self.0.stdin.as_mut().unwrap();
            writeln!(stdin, "{what}").unwrap();
            assert_eq!(self.says(), "done");
        }

        /// With all that it has counted as sent.
        fn followed(&self) -> Option<Tracker> {
            let mut stopped = Stopped::seize(self.0.id() as i32).unwrap();
            let mut tracker = Tracker::attach(&mut stopped).unwrap();
            stopped.detach().unwrap();
            for _ in 0..2 {
                let found = tracker.look().unwrap();
                found.pages.into_iter().for_each(|r| tracker.mark_sent(r));
            }
            tracker.tracks().then_some(tracker)
        }

        fn last_look(&self, tracker: &mut Tracker) -> Found {
            let stopped = Stopped::seize(self.0.id() as i32).unwrap();
            let found = tracker.last_look().unwrap();
            stopped.detach().unwrap();
            found
        }
    }

    impl Drop for Program {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn within(runs: &[Range<u64>], area: &Range<u64>) -> u64 {
        let part = |r: &Range<u64>| r.end.min(area.end).saturating_sub(r.start.max(area.start));
        runs.iter().map(part).sum()
    }

    #[test]
    fn the_last_look_finds_what_was_written() {
        let (mut program, area) = Program::start();
        let Some(mut tracker) = program.followed() else {
            eprintln!("skipped: this kernel does not track writes");
            return;
        };
        program.does("write");
        let found = program.last_look(&mut tracker);
        assert!(found.steps.is_empty());
        assert_eq!(within(&found.pages, &area), PAGE);
        assert_eq!(within(&found.drops, &area), 0);
    }

    #[test]
    fn the_last_look_finds_what_was_mapped_again_at_the_same_place() {
        let (mut program, area) = Program::start();
        let Some(mut tracker) = program.followed() else {
            eprintln!("skipped: this kernel does not track writes");
            return;
        };
        program.does("map");
        let found = program.last_look(&mut tracker);
        let page = area.start + 5 * PAGE..area.start + 6 * PAGE;
        assert_eq!(within(&found.pages, &page), PAGE);
        // The husk maps it anew as well, or is told page by page.
        let mapped = |s: &Step| matches!(s, Step::Map(v) if v.start == area.start);
        let gone = LEN - within(&found.pages, &area);
        assert!(
            found.steps.iter().any(mapped) || within(&found.drops, &area) == gone,
            "{found:?}"
        );
    }

    #[test]
    fn stretches_end_where_something_else_is_mapped() {
        let (program, area) = Program::start();
        let Some(tracker) = program.followed() else {
            eprintln!("skipped: this kernel does not track writes");
            return;
        };
        let stretches = tracker.stretches();
        assert!(stretches
            .iter()
            .any(|r| r.start <= area.start && area.end <= r.end));
        for vma in &tracker.layout.vmas {
            let inside = |r: &Range<u64>| r.start < vma.end && vma.start < r.end;
            let covered = stretches.iter().any(inside);
            assert_eq!(
                covered,
                vma.is_private() && tracker.is_dense(vma),
                "{vma:?}"
            );
        }
    }
}
