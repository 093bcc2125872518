//! Doing one thing, in memory and in the model alike.

use super::content::{Content, What};
use super::hands::{self, Reader, Writer};
use super::op::Op;
use super::world::{Access, Kind, Lot, Origin, Page, Run};
use super::Program;
use crate::victim::area::PAGE;
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;

impl Program {
    /// Does one thing.
    ///
    /// # Errors
    /// Something is not as it must be, or the kernel refuses what it must not.
    pub(super) fn do_step(&mut self, op: Op) -> Result<(), String> {
        let deed = self.deed(op.verb());
        match op {
            Op::Write {
                run,
                from,
                to,
                what,
                by,
            } => self.write(run, from, to, what, by, op.verb()),
            Op::Any { run, from, to } => {
                let at = self.address(run) + from;
                let bytes = self.hands.put_any(at, to - from)?;
                let lot = &mut self.world.lots[run.lot];
                lot.change(run.first, deed, |page| {
                    page.content.write(from..to, What::Bytes(bytes));
                })
            }
            Op::Check { run, from, to, by } => self.check(run, from, to, by),
            Op::Discard(run) => {
                self.advise(run, libc::MADV_DONTNEED)?;
                self.change(run, &op, |page, _| page.revert())
            }
            Op::Free(run) => {
                self.advise(run, libc::MADV_FREE)?;
                self.change(run, &op, |page, _| page.content.loose = true)
            }
            Op::Advise(run, advice) => {
                // Kernels differ in what they can be told.
                let _ = self.advise(run, advice);
                self.change(run, &op, |_, _| ())
            }
            Op::Protect(run, access) => {
                hands::protect(self.address(run), run.len(), access)?;
                self.change(run, &op, |page, _| page.access = access)
            }
            Op::Map {
                run,
                access,
                origin,
                fill,
            } => {
                self.map(Some(self.address(run)), run.count, access, origin, 0)?;
                self.appear(run, access, origin, op.verb());
                match fill {
                    Some(seed) if access.writes() => self.fill(run, seed),
                    _ => Ok(()),
                }
            }
            Op::MapAnywhere {
                pages,
                access,
                origin,
            } => {
                let base = self.map(None, pages, access, origin, 0)?;
                let run = self.new_lot(Kind::Anywhere, base, pages);
                self.appear(run, access, origin, op.verb());
                Ok(())
            }
            Op::Unmap(run) => {
                hands::unmap(self.address(run), run.len())?;
                self.world.take(run)?;
                self.forget_empty();
                Ok(())
            }
            Op::Move { run, to, keep } => self.relocate(run, to, keep, &op),
            Op::Grow { run, by, moves } => self.grow(run, by, moves, &op),
            Op::Shrink { run, by } => {
                let (old, new) = (run.len(), run.len() - by as usize * PAGE);
                match hands::remap(self.address(run), old, new, 0, 0) {
                    Ok(_) => {
                        let tail = Run {
                            first: run.first + run.count - by,
                            count: by,
                            ..run
                        };
                        self.world.take(tail).map(drop)
                    }
                    // They were several mappings.
                    Err(Errno::EFAULT) => Ok(()),
                    Err(e) => Err(format!("mremap: {e}")),
                }
            }
            Op::Break(by) => self.move_break(by, &op),
            Op::Reserve { pages, access } => {
                let flags = libc::MAP_NORESERVE;
                // There may be no room for as much.
                if let Ok(base) = self.map(None, pages, access, Origin::Anonymous, flags) {
                    self.new_lot(Kind::Reserve(pages, access), base, pages);
                }
                Ok(())
            }
            Op::Unreserve(lot) => {
                let reserve = self.world.lots.remove(lot);
                hands::unmap(reserve.base, reserve.end() as usize * PAGE)
            }
            Op::Probe { lot, page, access } => {
                let at = self.world.lots[lot].address(page);
                self.hands.refused(at, access)
            }
            Op::Deepen(_) | Op::Return | Op::Nothing => Ok(()),
        }
    }

    fn address(&self, run: Run) -> usize {
        self.world.lots[run.lot].address(run.first)
    }

    fn advise(&self, run: Run, advice: i32) -> Result<(), String> {
        let done = hands::advise(self.address(run), run.len(), advice);
        done.map_err(|e| format!("madvise {advice}: {e}"))
    }

    fn map(
        &self,
        at: Option<usize>,
        pages: u32,
        access: Access,
        origin: Origin,
        flags: i32,
    ) -> Result<usize, String> {
        let from = match origin {
            Origin::File(page) => Some(page),
            Origin::Anonymous => None,
        };
        let len = pages as usize * PAGE;
        let done = self.hands.map(at, len, access, from, flags);
        done.map_err(|e| format!("mmap: {e}"))
    }

    /// Changes what the model has of each page of a run; they are counted.
    fn change(
        &mut self,
        run: Run,
        op: &Op,
        mut what: impl FnMut(&mut Page, u32),
    ) -> Result<(), String> {
        let deed = self.deed(op.verb());
        let lot = &mut self.world.lots[run.lot];
        run.pages()
            .try_for_each(|number| lot.change(number, deed, |page| what(page, number - run.first)))
    }

    /// Pages have been mapped.
    fn appear(&mut self, run: Run, access: Access, origin: Origin, verb: &'static str) {
        for number in run.pages() {
            let page = self.fresh(access, origin.later(number - run.first), verb);
            self.world.lots[run.lot].set(number, Some(page));
        }
    }

    fn new_lot(&mut self, kind: Kind, base: usize, count: u32) -> Run {
        self.world.lots.push(Lot::new(kind, base));
        Run {
            lot: self.world.lots.len() - 1,
            first: 0,
            count,
        }
    }

    fn forget_empty(&mut self) {
        let anywhere = |lot: &Lot| lot.kind == Kind::Anywhere && lot.mapped() == 0;
        self.world.lots.retain(|lot| !anywhere(lot));
    }

    /// Writes from a byte of the first page to one of the last.
    pub(super) fn write(
        &mut self,
        run: Run,
        from: usize,
        to: usize,
        what: What,
        by: Writer,
        verb: &'static str,
    ) -> Result<(), String> {
        let mut bytes = vec![0; run.len()];
        for (page, number) in bytes.chunks_exact_mut(PAGE).zip(0..) {
            if let Some(page) = page.first_chunk_mut() {
                Content::new(what.later(number)).bytes(&self.world.file, page);
            }
        }
        let end = run.len() - PAGE + to;
        let at = self.address(run) + from;
        self.hands.put(by, at, &bytes[from..end], what)?;
        let deed = self.deed(verb);
        for number in 0..run.count {
            let piece = piece(run, number, from, to);
            let lot = &mut self.world.lots[run.lot];
            lot.change(run.first + number, deed, |page| {
                page.content.write(piece, what.later(number));
            })?;
        }
        Ok(())
    }

    fn check(&mut self, run: Run, from: usize, to: usize, by: Reader) -> Result<(), String> {
        let mut found = vec![0; run.len()];
        let end = run.len() - PAGE + to;
        let at = self.address(run) + from;
        self.hands.get(by, at, &mut found[from..end])?;
        for (page, number) in found.chunks_exact(PAGE).zip(0..) {
            self.compare(run, number, page, piece(run, number, from, to))?;
        }
        Ok(())
    }

    /// Compares a piece of a page with what it must be.
    fn compare(
        &self,
        run: Run,
        number: u32,
        found: &[u8],
        piece: Range<usize>,
    ) -> Result<(), String> {
        let lot = &self.world.lots[run.lot];
        let number = run.first + number;
        let page = lot.page(number)?;
        let page = page.ok_or_else(|| format!("page {number} is not mapped"))?;
        let mut expected = [0; PAGE];
        page.content.bytes(&self.world.file, &mut expected);
        if found[piece.clone()] == expected[piece.clone()] {
            return Ok(());
        }
        let zero = found[piece.clone()].iter().all(|byte| *byte == 0);
        if zero && page.content.loose {
            return Ok(());
        }
        let wrong: Vec<usize> = piece
            .clone()
            .filter(|n| found[*n] != expected[*n])
            .collect();
        let (first, last) = (wrong[0], wrong[wrong.len() - 1]);
        let mut original = [0; PAGE];
        Content::new(page.origin.what()).bytes(&self.world.file, &mut original);
        let old = page.content.is_old(found, piece.clone(), &self.world.file);
        let like = match () {
            () if old => ", which is as it was before it was last filled",
            () if zero => ", all of them zero",
            () if found[piece.clone()] == original[piece.clone()] => ", all as in the file",
            () => "",
        };
        Err(format!(
            "{:#x} holds {:#04x} instead of {:#04x}: of the bytes {piece:?} of its page{like}, {} are \
             wrong, from {first} to {last}. Page {number} of {:?} at {:#x}: {page}",
            lot.address(number) + first,
            found[first],
            expected[first],
            wrong.len(),
            lot.kind,
            lot.base,
        ))
    }

    fn relocate(&mut self, run: Run, to: Run, keep: bool, op: &Op) -> Result<(), String> {
        let more = if keep { libc::MREMAP_DONTUNMAP } else { 0 };
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | more;
        let (at, place) = (self.address(run), self.address(to));
        let moved: Vec<u32> = match hands::remap(at, run.len(), run.len(), flags, place) {
            Ok(_) => (0..run.count).collect(),
            // They were several mappings; some kernels move the first of them.
            Err(Errno::EFAULT) if run.count > 1 => (0..run.count)
                .filter(|n| hands::is_mapped(place + *n as usize * PAGE))
                .collect(),
            Err(e) => return Err(format!("mremap: {e}")),
        };
        let deed = self.deed(op.verb());
        for number in moved {
            let one = |run: Run| Run {
                first: run.first + number,
                count: 1,
                ..run
            };
            let mut pages = self.world.take(one(run))?;
            let page = pages.pop().flatten();
            let mut page = page.ok_or("what was moved was not mapped")?;
            page.note(deed);
            if keep {
                let mut left = page.clone();
                left.revert();
                self.world.lots[run.lot].set(run.first + number, Some(left));
            }
            self.world.lots[to.lot].set(to.first + number, Some(page));
        }
        self.forget_empty();
        Ok(())
    }

    fn grow(&mut self, run: Run, by: u32, moves: bool, op: &Op) -> Result<(), String> {
        let at = self.address(run);
        let new = run.len() + by as usize * PAGE;
        let flags = if moves { libc::MREMAP_MAYMOVE } else { 0 };
        let place = match hands::remap(at, run.len(), new, flags, 0) {
            Ok(place) => place,
            // There is no room, or they were several mappings.
            Err(Errno::ENOMEM | Errno::EFAULT) => return Ok(()),
            Err(e) => return Err(format!("mremap: {e}")),
        };
        let first = self.world.lots[run.lot].page(run.first)?;
        let first = first.ok_or("what grew was not mapped")?;
        let mut grown = Run {
            first: run.first + run.count,
            count: by,
            ..run
        };
        if place != at {
            let pages = self.world.take(run)?;
            let to = self.new_lot(Kind::Anywhere, place, run.count);
            let deed = self.deed(op.verb());
            for (page, number) in pages.into_iter().flatten().zip(0..) {
                let mut page = page;
                page.note(deed);
                self.world.lots[to.lot].set(number, Some(page));
            }
            grown = Run {
                first: run.count,
                count: by,
                ..to
            };
        }
        let origin = first.origin.later(run.count);
        self.appear(grown, first.access, origin, op.verb());
        self.forget_empty();
        Ok(())
    }

    fn move_break(&mut self, by: i32, op: &Op) -> Result<(), String> {
        let heap = self.world.lots.iter().position(|l| l.kind == Kind::Heap);
        let index = heap.ok_or("there is no heap")?;
        let lot = &self.world.lots[index];
        let pages = lot.end();
        let by = by.max(-(pages as i32));
        let (is, must) = (hands::move_break(0)?, lot.address(pages));
        if is != must {
            return Err(format!("the program break is at {is:#x}, not at {must:#x}"));
        }
        hands::move_break(by as isize * PAGE as isize)?;
        let run = |first, count| Run {
            lot: index,
            first,
            count,
        };
        match u32::try_from(by) {
            Ok(by) => {
                let more = run(pages, by);
                self.appear(more, Access::WRITE, Origin::Anonymous, op.verb());
                Ok(())
            }
            Err(_) => {
                let less = by.unsigned_abs();
                self.world.take(run(pages - less, less)).map(drop)
            }
        }
    }

    /// Looks at everything; at the `end` also at what no system call tells but by
    /// a file of the kernel's, which a program that is moved cannot have open.
    pub(super) fn check_all(&mut self, end: bool) -> Result<(), String> {
        for lot in 0..self.world.lots.len() {
            for first in self.world.lots[lot].numbers() {
                let run = Run {
                    lot,
                    first,
                    count: 1,
                };
                let page = self.world.lots[lot].page(first)?;
                let access = page.map_or(Access::NONE, |page| page.access);
                let at = self.address(run);
                if access.reads() {
                    self.check(run, 0, PAGE, Reader::Program)?;
                    continue;
                }
                // What is out of reach keeps its content: look, and close it.
                self.hands.refused(at, access)?;
                hands::protect(at, PAGE, Access::READ)?;
                self.check(run, 0, PAGE, Reader::Program)?;
                hands::protect(at, PAGE, access)?;
            }
        }
        if end {
            self.check_mappings()?;
        }
        Ok(())
    }

    fn check_mappings(&self) -> Result<(), String> {
        let maps = maps()?;
        for lot in &self.world.lots {
            let end = match lot.kind {
                // The rest of it is looked at by steps.
                Kind::Reserve(..) => 0,
                _ => lot.end(),
            };
            for number in (0..end).chain(lot.numbers()) {
                let at = lot.address(number);
                let found = maps.range(..=at).next_back();
                let found = found.filter(|(_, (end, _))| at < *end);
                let page = lot.page(number)?;
                match (&page, found) {
                    (None, None) => {}
                    // Somebody else's.
                    (None, Some(_)) if lot.kind == Kind::Anywhere => {}
                    (Some(page), Some((_, (_, is)))) if page.access.to_string() == is[..3] => {}
                    _ => {
                        let must = page.map(|page| page.to_string());
                        return Err(format!(
                            "{at:#x} is mapped as {found:x?}, but must be {must:?}"
                        ));
                    }
                }
            }
        }
        // The copy that pages were compared with.
        let mut bytes = vec![0; self.world.file.len()];
        let read = self.hands.file().read_exact_at(&mut bytes, 0);
        read.map_err(|e| format!("read the file again: {e}"))?;
        if bytes != self.world.file {
            return Err("what is remembered of the file was altered".into());
        }
        Ok(())
    }
}

/// The part of a page of a run that is meant.
fn piece(run: Run, number: u32, from: usize, to: usize) -> Range<usize> {
    let start = if number == 0 { from } else { 0 };
    let end = if number + 1 == run.count { to } else { PAGE };
    start..end
}

/// All mappings by their starts: where they end, and what may be done there.
fn maps() -> Result<BTreeMap<usize, (usize, String)>, String> {
    let text = std::fs::read_to_string("/proc/self/maps").map_err(|e| format!("maps: {e}"))?;
    let line = |line: &str| {
        let (start, rest) = line.split_once('-')?;
        let (end, rest) = rest.split_once(' ')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        let access = rest.split(' ').next()?;
        Some((number(start)?, (number(end)?, access.to_owned())))
    };
    Ok(text.lines().filter_map(line).collect())
}
