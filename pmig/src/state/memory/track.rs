//! Which pages of a running program must travel, and again.
//!
//! Which were written since they were last looked at is told by one of several
//! means ([`writes`](super::writes)). Absence is state as well: a page that was
//! sent and is gone now is told as a drop.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use self::faults::Faults;
use super::layout::{steps, Backing, Layout, Step, Vma, PAGE};
use super::ranges::{neighbours, push, span, without, Ranges};
use super::writes::{begin, Nothing, Part, Then, Tracking, Writes};
use crate::error::{Context, Error, Obstacle, Result};
use crate::proc::smaps::{self, Lines, Mapping};
use crate::proc::Maps;
use crate::sys::across;
use crate::sys::pagemap::{category, scan, Query};
use crate::tracee::Stopped;

/// Mappings up to this size, and those that are full for the most part, are
/// looked at whole, which is quicker; of larger and sparser ones only what is
/// there. Where holes are looked at their page tables are built, and they count as
/// content that has to be read to be seen to be nothing: in a reservation of which
/// the program uses a piece here and there that would be most of a round.
const SMALL: u64 = 64 * PAGE;

/// Holes up to this size lie within what is looked through at once.
const SKIPPED: u64 = 64 << 20;

/// Bytes whose page tables are walked within a millisecond or so, to list an
/// address space with its flags.
const QUICKLY_WALKED: u64 = 8 << 20;

/// Mappings up to this number can be asked one by one whether they are followed.
const MOST_ASKED: usize = 1024;

/// A mapping's part of such a list takes as long as to walk so many bytes.
const AS_LONG: u64 = 16 * PAGE;

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
    /// Whether nothing but pages has changed.
    pub fn is_of_pages(&self) -> bool {
        self.steps.is_empty() && self.drops.is_empty()
    }

    /// Bytes of content.
    pub fn bytes(&self) -> u64 {
        self.pages.iter().map(|r| r.end - r.start).sum()
    }
}

/// How the mappings of a program that stands still compare with the last list.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    /// They are others, or it is as quick to list them again.
    Changed,
    /// They have the same lines, and are too many to be asked one by one whether they
    /// are followed still.
    SameLines,
    /// They are the same.
    Same,
    /// The same, and of their pages these were written, in order, and no others.
    Written(Vec<Range<u64>>),
}

/// Follows the memory of one process.
pub struct Tracker {
    pid: i32,
    pagemap: File,
    mem: File,
    maps: Maps,
    writes: Box<dyn Writes>,
    pub layout: Layout,
    /// What the target has.
    sent: Ranges,
    /// What could not be read when its turn came.
    owed: Ranges,
    /// Somebody may write to it unseen: in the end all is sent again.
    distrusted: bool,
    /// What follows when the program runs at the target.
    later: Ranges,
    /// The last list, and the lines of maps that belong to it.
    seen: Vec<Mapping>,
    lines: Lines,
    /// What has become of them, where the program stands still and it was asked.
    standing: Option<Standing>,
    /// Which mappings of the layout are dense, one for each of them.
    dense: Vec<bool>,
    /// Whether all mappings of the last list are followed that can be.
    all_watched: bool,
    faults: Faults,
}

impl Tracker {
    /// For a process that cannot be watched: everything is sent when it stands
    /// still.
    ///
    /// # Errors
    /// Its memory cannot be looked at.
    pub fn without_tracking(pid: i32) -> Result<Tracker> {
        Tracker::with(pid, Box::new(Nothing::new(pid)?))
    }

    /// Follows a process that is stopped, by the first of these means that can.
    ///
    /// # Errors
    /// None of them can.
    pub fn attach(stopped: &mut Stopped, candidates: &[Tracking]) -> Result<Tracker> {
        Tracker::with(stopped.pid(), begin(stopped, candidates)?)
    }

    fn with(pid: i32, writes: Box<dyn Writes>) -> Result<Tracker> {
        let open = |what: &str| {
            let path = format!("/proc/{pid}/{what}");
            File::open(&path).context("open", path)
        };
        Ok(Tracker {
            pid,
            pagemap: open("pagemap")?,
            mem: open("mem")?,
            maps: Maps::open(pid)?,
            writes,
            layout: Layout::default(),
            sent: Ranges::default(),
            owed: Ranges::default(),
            distrusted: false,
            later: Ranges::default(),
            seen: Vec::new(),
            standing: None,
            lines: Lines::default(),
            dense: Vec::new(),
            all_watched: false,
            faults: Faults::of(pid),
        })
    }

    /// By which means it is followed.
    pub fn tracking(&self) -> Tracking {
        self.writes.tracking()
    }

    /// Whether rounds while the program runs are of any use.
    pub fn tracks(&self) -> bool {
        self.tracking() != Tracking::None
    }

    /// From now on what was sent is not believed to be what is there: somebody
    /// writes to the program's memory past its page tables. A device that has got
    /// hold of pages (open(2), O_DIRECT) goes on writing to them whatever a look
    /// counts as clean; only the program standing still, in no system call of its
    /// own, ends that.
    pub fn distrust(&mut self) {
        self.distrusted = true;
    }

    /// Looks while the program runs: what is found counts as clean from then
    /// on, and must be sent.
    pub fn look(&mut self) -> Result<Found> {
        let mut found = self.look_once(&Ranges::default())?;
        self.settle_owed(&mut found);
        if self.tracking() == Tracking::Faults {
            self.faults.note(&found);
        }
        Ok(found)
    }

    /// What a look finds by itself, but for some runs.
    fn look_once(&mut self, but: &Ranges) -> Result<Found> {
        let (mut found, renewed) = self.list()?;
        if !self.tracks() {
            return Ok(found);
        }
        self.all_watched = true;
        for (vma, dense) in self.private() {
            // A mapping that vanished meanwhile is fresh at the next look.
            if vma.fresh && !self.writes.follow(vma.range()) {
                self.all_watched = false;
                continue;
            }
            self.scan(&vma, dense, (&renewed, but), Then::Clean, &mut found)?;
        }
        Ok(found)
    }

    /// Looks at the program standing still: what is left.
    ///
    /// To list an address space with its flags the kernel walks through all of
    /// its pages, which in a large program takes many times as long as all the
    /// rest of the freeze. There, where everything still stands as it did at the
    /// last look, only advice (madvise(2)) given to a whole mapping since then
    /// would go unseen.
    pub fn last_look(&mut self) -> Result<Found> {
        let standing = match self.standing.take() {
            Some(known) => known,
            None => self.compare()?,
        };
        let quick = match standing {
            Standing::Changed => None,
            standing => self.look_at_the_same(standing)?,
        };
        let mut found = match quick {
            Some(found) => found,
            None => {
                let (mut found, renewed) = self.list()?;
                let all = (&renewed, &Ranges::default());
                for (vma, dense) in self.private() {
                    self.scan(&vma, dense, all, Then::Leave, &mut found)?;
                }
                found
            }
        };
        if self.distrusted && self.tracks() {
            self.sent.iter().for_each(|r| self.owed.insert(r));
        }
        self.settle_owed(&mut found);
        Ok(found)
    }

    /// Whether the program, which stands still, has the mappings that it had at the
    /// last look, and no other: then [`Tracker::last_look`] finds pages only, and
    /// may come late. False too where it would take long to ask.
    ///
    /// # Errors
    /// The program has ended, or has executed another one.
    pub fn stands(&mut self) -> Result<bool> {
        let standing = self.compare()?;
        let stands = matches!(standing, Standing::Same | Standing::Written(_));
        self.standing = Some(standing);
        Ok(stands)
    }

    fn is_quickly_walked(&self) -> bool {
        let walked: u64 = self.seen.iter().map(|m| m.resident + AS_LONG).sum();
        walked <= QUICKLY_WALKED
    }

    /// Whether it can be known at the stop that nothing but pages has changed.
    fn can_be_asked(&self) -> bool {
        let private = self.layout.vmas.iter().filter(|v| v.is_private());
        !self.is_quickly_walked() && private.count() <= MOST_ASKED
    }

    fn compare(&mut self) -> Result<Standing> {
        if self.is_quickly_walked() || !self.is_unchanged()? {
            return Ok(Standing::Changed);
        }
        let private = || self.layout.vmas.iter().filter(|v| v.is_private());
        if private().count() > MOST_ASKED {
            return Ok(Standing::SameLines);
        }
        // Of those too of which nothing was sent: what a look found there may since have
        // moved away and back, and is not found again.
        for vma in private() {
            if !self.writes.still_follows(vma.start)? {
                return Ok(Standing::Changed);
            }
        }
        Ok(match self.all_written()? {
            Some(written) => Standing::Written(written),
            None => Standing::Same,
        })
    }

    /// Whether no mapping has come, gone or changed since the last look, as far
    /// as its line tells.
    fn is_unchanged(&self) -> Result<bool> {
        self.same_space()?;
        Ok(self.all_watched && Lines::again(&self.maps)? == self.lines)
    }

    /// Where the stack of a process that stands still lies, as of the last look.
    pub fn stack(&self) -> Option<Range<u64>> {
        self.lines.find(b"[stack]")
    }

    /// The same of its heap, or the last part of it.
    pub fn heap(&self) -> Option<Range<u64>> {
        self.lines.find(b"[heap]")
    }

    /// The mappings whose pages can be the process's own, and which are dense.
    fn private(&self) -> Vec<(Vma, bool)> {
        let all = self.layout.vmas.iter().zip(&self.dense);
        all.filter(|(vma, _)| vma.is_private())
            .map(|(vma, dense)| (vma.clone(), *dense))
            .collect()
    }

    /// Looks where all mappings have the lines that they had. `None` where one
    /// was unmapped and mapped again at the same place, and it is watched no
    /// longer.
    fn look_at_the_same(&mut self, standing: Standing) -> Result<Option<Found>> {
        let changed = match standing {
            Standing::Written(runs) => vec![self.of_the_program(runs)],
            standing => match self.changed_in_the_same(&standing)? {
                Some(changed) => changed,
                None => return Ok(None),
            },
        };
        self.layout.vmas.iter_mut().for_each(|v| v.fresh = false);
        let mut found = Found::default();
        for runs in changed {
            self.categorise(&runs, &mut found)?;
        }
        let of_a_file = |v: &&Vma| v.is_private() && matches!(v.backing, Backing::File(_));
        let files: Vec<Vma> = self.layout.vmas.iter().filter(of_a_file).cloned().collect();
        for vma in files {
            self.find_reverted(vma.range(), &mut found)?;
        }
        Ok(Some(found))
    }

    fn changed_in_the_same(&mut self, standing: &Standing) -> Result<Option<Vec<Vec<Range<u64>>>>> {
        let sparse = self.private().into_iter().filter(|(_, dense)| !dense);
        let sparse: Vec<Range<u64>> = sparse.map(|(vma, _)| vma.range()).collect();
        let stretches = self.stretches().into_iter().map(|r| (r, true));
        let mut changed = Vec::new();
        for (range, dense) in stretches.chain(sparse.into_iter().map(|r| (r, false))) {
            let part = Part {
                range,
                dense,
                sent: &self.sent,
            };
            let runs = match standing {
                // What has come since is our own.
                Standing::Same => Some(self.writes.changed(part, Then::Leave)?),
                _ => self.writes.changed_in_the_same(part)?,
            };
            match runs {
                Some(runs) => changed.push(self.of_the_program(runs)),
                None => return Ok(None),
            }
        }
        Ok(Some(changed))
    }

    /// What of these runs, in order, lies in mappings of the last list: beside those a
    /// stack may have grown when calls were made inside the program.
    fn of_the_program(&self, runs: Vec<Range<u64>>) -> Vec<Range<u64>> {
        let mut all = Vec::with_capacity(runs.len());
        for run in runs {
            let first = self.layout.vmas.partition_point(|v| v.end <= run.start);
            let within = self.layout.vmas[first..].iter();
            for vma in within.take_while(|v| v.start < run.end) {
                push(&mut all, run.start.max(vma.start)..run.end.min(vma.end));
            }
        }
        all
    }

    /// Where private, dense mappings follow one another, with nothing but small holes
    /// between them, or not even those.
    fn stretches(&self) -> Vec<Range<u64>> {
        let mut all: Vec<Range<u64>> = Vec::new();
        let mut goes_on = false;
        for (vma, dense) in self.layout.vmas.iter().zip(&self.dense) {
            let dense = vma.is_private() && *dense;
            let hole = |r: &Range<u64>| vma.start - r.end;
            let joins =
                |r: &Range<u64>| hole(r) == 0 || (self.writes.skips_holes() && hole(r) <= SKIPPED);
            match all.last_mut() {
                Some(last) if dense && goes_on && joins(last) => last.end = vma.end,
                _ if dense => all.push(vma.range()),
                _ => {}
            }
            goes_on = dense;
        }
        all
    }

    /// Lists the address space again; also returns where nothing that was sent
    /// counts any more.
    fn list(&mut self) -> Result<(Found, Ranges)> {
        self.same_space()?;
        (self.seen, self.lines) = smaps::list(self.pid)?;
        let follows = |m: &Mapping| self.writes.follows(m);
        let layout = Layout::from_mappings(&self.seen, &self.layout.files, follows)?;
        let steps = steps(&self.layout.vmas, &layout.vmas);
        let mut renewed = Ranges::default();
        for step in &steps {
            match step {
                Step::Unmap(r) => {
                    self.sent.remove(r.clone());
                    self.owed.remove(r.clone());
                    self.later.remove(r.clone());
                }
                Step::Map(v) => {
                    self.later.remove(v.range());
                    renewed.insert(v.range());
                }
                _ => {}
            }
        }
        self.dense = density(&layout.vmas, &self.seen);
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
        dense: bool,
        (renewed, but): (&Ranges, &Ranges),
        then: Then,
        found: &mut Found,
    ) -> Result<()> {
        let anew = renewed.within(vma.range());
        // What was mapped anew is sent whatever it is.
        for part in &anew {
            let there = self.writes.present(part.clone(), then)?;
            self.categorise(&there, found)?;
        }
        for range in without(vma.range(), &anew) {
            if matches!(vma.backing, Backing::File(_)) {
                self.find_reverted(range.clone(), found)?;
            }
            for range in without(range.clone(), &but.within(range)) {
                let part = Part {
                    range,
                    dense,
                    sent: &self.sent,
                };
                let changed = self.writes.changed(part, then)?;
                self.categorise(&changed, found)?;
            }
        }
        Ok(())
    }

    /// Tells what the pages of runs, which are in order, are now.
    fn categorise(&mut self, runs: &[Range<u64>], found: &mut Found) -> Result<()> {
        use category::*;
        let query = Query {
            any: PRESENT | SWAPPED,
            tell: FILE | PFNZERO,
            ..Query::default()
        };
        for some in neighbours(runs) {
            let whole = span(some);
            let mut there = Vec::new();
            scan(&self.pagemap, whole.start, whole.end, query, |r| {
                there.push((r.start..r.end, r.categories));
            })
            .context("scan the pages of", self.pid)?;
            let mut n = 0;
            for run in some {
                let mut at = run.start;
                while let Some((r, what)) = there.get(n).filter(|(r, _)| r.start < run.end) {
                    let part = r.start.max(run.start)..r.end.min(run.end);
                    if !part.is_empty() {
                        self.gone(at..part.start, found);
                        at = part.end;
                        self.sort(part, *what, found);
                    }
                    if r.end > run.end {
                        // The rest of it may lie in the next run.
                        break;
                    }
                    n += 1;
                }
                self.gone(at..run.end, found);
            }
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
            scan(&self.pagemap, sent.start, sent.end, query, |r| {
                runs.push((r.start..r.end, r.categories));
            })
            .context("scan the pages of", self.pid)?;
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
        self.owed.remove(r.clone());
        self.later.remove(r);
    }

    /// Leaves what was found in anonymous memory for later, but for what lies in
    /// `now`, which is taken out of what was left before too. What the target has of
    /// it is dropped there: absent is what it must be to be asked for. Where that are
    /// no more than `few` bytes they travel now, and nothing has to be dropped.
    pub fn postpone(&mut self, found: &mut Found, now: &[Range<u64>], few: u64) {
        let mut pages = Ranges::default();
        for r in found.pages.drain(..) {
            pages.insert(r);
        }
        for vma in self.layout.vmas.iter().filter(|v| v.may_follow()) {
            for r in pages.within(vma.range()) {
                self.later.insert(r);
            }
        }
        // What has since been told to be wiped at a fork must not be missing then.
        let comes = |v: &&Vma| v.is_private() && !v.may_follow();
        let comes = self.layout.vmas.iter().filter(comes).map(Vma::range);
        for r in comes.chain(now.iter().cloned()) {
            for r in self.later.within(r) {
                self.later.remove(r.clone());
                pages.insert(r);
            }
        }
        let known = |r| self.sent.within(r);
        let stale: Vec<Range<u64>> = self.later.iter().flat_map(known).collect();
        let bytes: u64 = stale.iter().map(|r| r.end - r.start).sum();
        for part in stale {
            if bytes <= few {
                self.later.remove(part);
                continue;
            }
            push(&mut found.drops, part.clone());
            self.sent.remove(part);
        }
        self.later.iter().for_each(|r| pages.remove(r));
        found.pages = pages.iter().collect();
    }

    /// What was left for later.
    pub fn postponed(&self) -> Vec<Range<u64>> {
        let anonymous = |v: &&Vma| v.may_follow();
        let vmas = self.layout.vmas.iter().filter(anonymous);
        vmas.flat_map(|v| self.later.within(v.range())).collect()
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

    /// Reads runs of pages to be sent, which are in order, into `buf`, which has room
    /// for all of them. Returns the runs that could be read, in order, packed at the
    /// front of `buf`; what could not (the program took it away meanwhile) is owed
    /// until the next look.
    pub fn read(&mut self, runs: &[Range<u64>], buf: &mut [u8]) -> Result<Vec<Range<u64>>> {
        let mut read: Vec<Range<u64>> = Vec::with_capacity(runs.len());
        let mut at = 0;
        let mut rest = runs;
        while !rest.is_empty() {
            let mut got = across::read(self.pid, rest, &mut buf[at..]);
            while let [r, more @ ..] = rest {
                let len = (r.end - r.start) as usize;
                if got < len {
                    break;
                }
                push(&mut read, r.clone());
                (at, got, rest) = (at + len, got - len, more);
            }
            // What the program may not read itself is read like that only.
            let [r, more @ ..] = rest else { break };
            for page in r.clone().step_by(PAGE as usize) {
                let to = &mut buf[at..at + PAGE as usize];
                match self.mem.read_exact_at(to, page) {
                    Ok(()) => {
                        push(&mut read, page..page + PAGE);
                        at += PAGE as usize;
                    }
                    Err(_) => self.owed.insert(page..page + PAGE),
                }
            }
            rest = more;
        }
        Ok(read)
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

/// Which of these mappings are dense, by the list that they come from.
fn density(vmas: &[Vma], list: &[Mapping]) -> Vec<bool> {
    let mut rest = list.iter().peekable();
    let mut of = |vma: &Vma| {
        while rest.next_if(|m| m.start < vma.start).is_some() {}
        let resident = rest.peek().map_or(0, |m| m.resident);
        let len = vma.end - vma.start;
        len <= SMALL || resident >= len / 2
    };
    vmas.iter().map(&mut of).collect()
}

mod faults;
#[cfg(test)]
mod tests;
