//! What can be done next with a program's memory.

use super::content::What;
use super::dice::Dice;
use super::hands::{Reader, Writer, PIPE};
use super::world::{Access, Kind, Lot, Origin, Page, Run, World};
use crate::victim::area::PAGE;

/// One thing to do. Runs in it are mapped, unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes from a byte of the first page to one of the last.
    Write {
        run: Run,
        from: usize,
        to: usize,
        what: What,
        by: Writer,
    },
    /// Writes a few bytes of one page that only the kernel knows before.
    Any {
        run: Run,
        from: usize,
        to: usize,
    },
    /// Looks at bytes.
    Check {
        run: Run,
        from: usize,
        to: usize,
        by: Reader,
    },
    /// `MADV_DONTNEED`
    Discard(Run),
    /// `MADV_FREE`
    Free(Run),
    /// Advice that changes no content.
    Advise(Run, i32),
    Protect(Run, Access),
    /// Maps a part of a land, over what may be there, and fills it.
    Map {
        run: Run,
        access: Access,
        origin: Origin,
        fill: Option<u64>,
    },
    /// Maps pages where the kernel likes.
    MapAnywhere {
        pages: u32,
        access: Access,
        origin: Origin,
    },
    Unmap(Run),
    /// Moves pages to a part of a land; `keep`: what they were in stays mapped,
    /// with nothing in it.
    Move {
        run: Run,
        to: Run,
        keep: bool,
    },
    /// Lets a mapping grow, to another place if need be and it may.
    Grow {
        run: Run,
        by: u32,
        moves: bool,
    },
    /// Cuts pages off the end of a run.
    Shrink {
        run: Run,
        by: u32,
    },
    /// Moves the program break by so many pages.
    Break(i32),
    /// Maps very many pages to touch a few of them.
    Reserve {
        pages: u32,
        access: Access,
    },
    /// Takes that away again.
    Unreserve(usize),
    /// Sees that the kernel may do no more with a page than is allowed.
    Probe {
        lot: usize,
        page: u32,
        access: Access,
    },
    /// Goes on so many calls deeper in the stack.
    Deepen(u32),
    /// Comes back from there.
    Return,
    /// What was chosen cannot be done just now.
    Nothing,
}

const ADVICE: [i32; 12] = [
    libc::MADV_COLD,
    libc::MADV_PAGEOUT,
    libc::MADV_WILLNEED,
    libc::MADV_POPULATE_READ,
    libc::MADV_POPULATE_READ,
    libc::MADV_POPULATE_WRITE,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    // MADV_COLLAPSE, of Linux 6.1
    25,
    libc::MADV_RANDOM,
    libc::MADV_SEQUENTIAL,
    libc::MADV_NORMAL,
];
/// More lots than this are not made.
const LOTS: usize = 20;

fn ours(lot: &Lot) -> bool {
    matches!(lot.kind, Kind::Land(_) | Kind::Anywhere)
}

fn reserves(lot: &Lot) -> bool {
    matches!(lot.kind, Kind::Reserve(..))
}

fn some_access(dice: &mut Dice) -> Access {
    match dice.one_in(2) {
        true => Access::WRITE,
        false => dice.pick(&Access::ALL),
    }
}

/// Where so many pages to be mapped come from.
fn some_origin(world: &World, dice: &mut Dice, pages: u32) -> Origin {
    let file = world.file_pages();
    if pages <= file && dice.one_in(3) {
        return Origin::File(dice.below(u64::from(file - pages + 1)) as u32);
    }
    Origin::Anonymous
}

impl Op {
    /// What the dice say is to be done next.
    pub fn draw(world: &World, dice: &mut Dice) -> Self {
        let mapped = world.mapped();
        if mapped > world.aim * 9 / 8 && dice.one_in(3) {
            return unmap(world, dice).unwrap_or(Self::Nothing);
        }
        if mapped < world.aim * 7 / 8 && dice.one_in(3) {
            return map(world, dice, true).unwrap_or(Self::Nothing);
        }
        match dice.below(400) {
            0..=119 => write(world, dice),
            120..=203 => check(world, dice),
            204..=227 => world.some_run(dice, 16, |_, _| true).map(Self::Discard),
            228..=239 => {
                let anonymous = |_: &Lot, page: &Page| page.origin == Origin::Anonymous;
                world.some_run(dice, 16, anonymous).map(Self::Free)
            }
            240..=263 => {
                let run = world.some_run(dice, 64, |_, _| true);
                run.map(|run| Self::Advise(run, dice.pick(&ADVICE)))
            }
            264..=291 => {
                let run = world.some_run(dice, 32, |_, _| true);
                run.map(|run| Self::Protect(run, some_access(dice)))
            }
            292..=311 => map(world, dice, false),
            312..=319 => map_anywhere(world, dice),
            320..=331 => unmap(world, dice),
            332..=351 => movement(world, dice),
            352..=359 => grow(world, dice),
            360..=363 => shrink(world, dice),
            364..=375 => {
                let by = dice.few(16) as i32;
                Some(Self::Break(if dice.one_in(2) { by } else { -by }))
            }
            376..=387 => probe(world, dice),
            388 => reserve(world, dice),
            389..=393 => Some(Self::Deepen(dice.few(40) as u32)),
            _ => Some(Self::Return),
        }
        .unwrap_or(Self::Nothing)
    }

    /// In one word, for those who ask what was done to a page.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Write { by, .. } => match by {
                Writer::Program => "written",
                Writer::Pipe => "read into from a pipe",
                Writer::File => "read into from the file",
                Writer::Zero => "read into from /dev/zero",
                Writer::Process => "written by process_vm_writev",
            },
            Self::Any { .. } => "written by getrandom",
            Self::Check { .. } => "checked",
            Self::Discard(_) => "discarded",
            Self::Free(_) => "given up by MADV_FREE",
            Self::Advise(..) => "advised",
            Self::Protect(..) => "protected",
            Self::Map { .. } | Self::MapAnywhere { .. } => "mapped",
            Self::Unmap(_) => "unmapped",
            Self::Move { keep: true, .. } => "moved and left mapped",
            Self::Move { .. } => "moved",
            Self::Grow { .. } => "grown",
            Self::Shrink { .. } => "shrunk",
            Self::Break(_) => "come with the program break",
            Self::Reserve { .. } | Self::Unreserve(_) => "reserved",
            Self::Probe { .. } => "probed",
            Self::Deepen(_) | Self::Return | Self::Nothing => "left alone",
        }
    }
}

/// A few pages of a reservation, most of which nobody ever touched, and the least
/// that may be done with one of them.
fn some_reserved(world: &World, dice: &mut Dice) -> Option<(Run, Access)> {
    let index = world.some_lot(dice, reserves)?;
    let lot = &world.lots[index];
    let first = dice.below(u64::from(lot.end())) as u32;
    let run = Run {
        lot: index,
        first,
        count: (dice.few(3) as u32).min(lot.end() - first),
    };
    let access = |number| lot.page(number).ok().flatten().map(|page| page.access);
    let all: Vec<Access> = run.pages().filter_map(access).collect();
    let closed = all.iter().find(|access| !access.reads());
    let least = closed.or_else(|| all.iter().find(|access| !access.writes()));
    Some((run, least.copied().unwrap_or(Access::WRITE)))
}

fn write(world: &World, dice: &mut Dice) -> Option<Op> {
    let run = match dice.one_in(8) {
        true => match some_reserved(world, dice) {
            Some((run, access)) if access.writes() => run,
            Some((run, _)) => return Some(Op::Protect(run, Access::WRITE)),
            None => return None,
        },
        false => world.some_run(dice, (PIPE / PAGE) as u64, |_, page| page.access.writes())?,
    };
    let page = |number| world.lots[run.lot].page(number).ok().flatten();
    let whole = |number| page(number).is_none_or(|page| page.content.whole_only());
    let (mut from, mut to) = (0, PAGE);
    if !run.pages().any(whole) && !dice.one_in(3) {
        from = dice.below(PAGE as u64) as usize;
        to = match run.count {
            1 => from + dice.few((PAGE - from) as u64) as usize,
            _ => 1 + dice.below(PAGE as u64) as usize,
        };
        if dice.one_in(12) {
            let run = Run { count: 1, ..run };
            let to = (from + 1 + dice.below(16) as usize).min(PAGE);
            return Some(Op::Any { run, from, to });
        }
    }
    let what = match dice.below(8) {
        0 | 1 => What::Zero,
        2 => What::Byte(dice.any() as u8),
        3 if run.count <= world.file_pages() => {
            let pages = world.file_pages() - run.count + 1;
            What::File(dice.below(u64::from(pages)) as u32)
        }
        _ => What::Seed(dice.any()),
    };
    let by = match (dice.below(8), what) {
        (0..=3, _) => Writer::Program,
        (_, What::File(_)) => Writer::File,
        (4 | 5, What::Zero) => Writer::Zero,
        (4..=6, _) => Writer::Pipe,
        _ => Writer::Process,
    };
    Some(Op::Write {
        run,
        from,
        to,
        what,
        by,
    })
}

fn check(world: &World, dice: &mut Dice) -> Option<Op> {
    let run = match dice.one_in(8) {
        true => {
            some_reserved(world, dice)
                .filter(|(_, access)| access.reads())?
                .0
        }
        false => world.some_run(dice, (PIPE / PAGE) as u64, |_, page| page.access.reads())?,
    };
    let from = dice.below(PAGE as u64) as usize;
    let (from, to) = match (dice.below(3), run.count) {
        (0, 1) => (from, from + 1),
        (1, 2..) => (from, 1 + dice.below(PAGE as u64) as usize),
        _ => (0, PAGE),
    };
    let by = dice.pick(&[
        Reader::Program,
        Reader::Program,
        Reader::Pipe,
        Reader::Process,
    ]);
    Some(Op::Check { run, from, to, by })
}

fn map(world: &World, dice: &mut Dice, fill: bool) -> Option<Op> {
    let free = fill || dice.one_in(2);
    let run = world.some_land(dice, if fill { 256 } else { 64 }, free)?;
    Some(Op::Map {
        run,
        access: some_access(dice),
        origin: some_origin(world, dice, run.count),
        fill: fill.then(|| dice.any()),
    })
}

fn map_anywhere(world: &World, dice: &mut Dice) -> Option<Op> {
    let pages = dice.few(64) as u32;
    (world.lots.len() < LOTS).then(|| Op::MapAnywhere {
        pages,
        access: some_access(dice),
        origin: some_origin(world, dice, pages),
    })
}

fn unmap(world: &World, dice: &mut Dice) -> Option<Op> {
    let run = world.some_run(dice, 128, |lot, _| ours(lot))?;
    if world.lots[run.lot].kind != Kind::Anywhere || dice.one_in(2) {
        return Some(Op::Unmap(run));
    }
    // All of it, so that there is room for others.
    let numbers = world.lots[run.lot].numbers();
    let first = *numbers.first()?;
    let count = numbers.iter().zip(first..).take_while(|(a, b)| *a == b);
    let count = count.count() as u32;
    Some(Op::Unmap(Run {
        first,
        count,
        ..run
    }))
}

fn movement(world: &World, dice: &mut Dice) -> Option<Op> {
    let run = world.some_run(dice, 16, |lot, _| ours(lot))?;
    let mut run = world.alike(run);
    // The kernel takes away what is in the way before it looks whether it can
    // move what may be several mappings.
    let free = run.count > 1 || dice.one_in(2);
    let mut to = world.some_land(dice, 16, free)?;
    run.count = run.count.min(to.count);
    to.count = run.count;
    let apart =
        run.lot != to.lot || run.first + run.count <= to.first || to.first + to.count <= run.first;
    let keep = dice.one_in(3);
    apart.then_some(Op::Move { run, to, keep })
}

fn grow(world: &World, dice: &mut Dice) -> Option<Op> {
    let run = world.some_run(dice, 8, |lot, _| ours(lot))?;
    let run = world.alike(run);
    let lot = &world.lots[run.lot];
    let by = dice.few(8) as u32;
    let moves = dice.one_in(2) && world.lots.len() < LOTS;
    let end = run.first + run.count;
    let behind = |number| matches!(lot.page(number), Ok(None));
    let free = lot.kind == Kind::Anywhere || (end + by <= lot.end() && (end..end + by).all(behind));
    let first = lot.page(run.first).ok().flatten()?;
    let fits = match first.origin {
        Origin::File(page) => page + run.count + by <= world.file_pages(),
        Origin::Anonymous => true,
    };
    (fits && free).then_some(Op::Grow { run, by, moves })
}

fn shrink(world: &World, dice: &mut Dice) -> Option<Op> {
    let run = world.some_run(dice, 16, |lot, _| ours(lot))?;
    let run = world.alike(run);
    (run.count > 1).then(|| Op::Shrink {
        run,
        by: dice.within(1..u64::from(run.count)) as u32,
    })
}

fn probe(world: &World, dice: &mut Dice) -> Option<Op> {
    if dice.one_in(3) {
        let run = world.some_land(dice, 1, true)?;
        return Some(Op::Probe {
            lot: run.lot,
            page: run.first,
            access: Access::NONE,
        });
    }
    let run = match dice.one_in(4) {
        true => some_reserved(world, dice)?.0,
        false => world.some_run(dice, 1, |_, page| !page.access.writes())?,
    };
    let page = world.lots[run.lot].page(run.first).ok().flatten()?;
    Some(Op::Probe {
        lot: run.lot,
        page: run.first,
        access: page.access,
    })
}

fn reserve(world: &World, dice: &mut Dice) -> Option<Op> {
    let many = world.lots.iter().filter(|lot| reserves(lot)).count() >= 2;
    if many {
        return world.some_lot(dice, reserves).map(Op::Unreserve);
    }
    // From 256 megabytes to 64 gigabytes.
    Some(Op::Reserve {
        pages: 1 << dice.within(16..25),
        access: dice.pick(&[Access::NONE, Access::WRITE]),
    })
}

#[cfg(test)]
mod tests {
    use super::super::world::Deed;
    use super::*;
    use std::collections::BTreeSet;

    fn world() -> World {
        let deed = Deed {
            step: 1,
            verb: "mapped",
        };
        let kinds = [
            (Kind::Land(64), 0..40),
            (Kind::Anywhere, 3..9),
            (Kind::Heap, 0..16),
            (Kind::Reserve(1 << 16, Access::NONE), 70..74),
        ];
        let lots = kinds.into_iter().zip(1..).map(|((kind, pages), place)| {
            let mut lot = Lot::new(kind, place << 32);
            for number in pages {
                let access = Access::ALL[number as usize % Access::ALL.len()];
                lot.set(number, Some(Page::new(access, Origin::Anonymous, deed)));
            }
            lot
        });
        World {
            lots: lots.collect(),
            file: vec![1; 8 * PAGE],
            aim: 66,
        }
    }

    #[test]
    fn everything_is_done_sooner_or_later_and_only_to_what_is_mapped() {
        let world = world();
        let mut verbs = BTreeSet::new();
        for step in 0..20_000 {
            let op = Op::draw(&world, &mut Dice::new(1, step));
            verbs.insert(op.verb());
            let (run, may): (Run, fn(Access) -> bool) = match op {
                Op::Write { run, .. } | Op::Any { run, .. } => (run, Access::writes),
                Op::Check { run, .. } => (run, Access::reads),
                Op::Discard(run) | Op::Free(run) | Op::Advise(run, _) | Op::Unmap(run) => {
                    (run, |_| true)
                }
                Op::Move { run, .. } | Op::Grow { run, .. } | Op::Shrink { run, .. } => {
                    (run, |_| true)
                }
                _ => continue,
            };
            for number in run.pages() {
                let page = world.lots[run.lot].page(number).unwrap();
                assert!(page.is_some_and(|page| may(page.access)), "{op:?}");
            }
        }
        assert_eq!(verbs.len(), 20, "{verbs:?}");
    }
}
