//! All of a program's memory as it must be.

use super::content::{Content, What};
use super::dice::Dice;
use crate::victim::area::PAGE;
use std::collections::hash_map::DefaultHasher;
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash, Hasher};

/// What may be done with a page, as mmap(2) has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access(pub i32);

impl Access {
    pub const NONE: Self = Self(libc::PROT_NONE);
    pub const READ: Self = Self(libc::PROT_READ);
    pub const WRITE: Self = Self(libc::PROT_READ | libc::PROT_WRITE);
    pub const ALL: [Self; 5] = [
        Self::NONE,
        Self::READ,
        Self::WRITE,
        Self(libc::PROT_READ | libc::PROT_EXEC),
        Self(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC),
    ];

    pub fn reads(self) -> bool {
        self.0 & libc::PROT_READ != 0
    }

    pub fn writes(self) -> bool {
        self.0 & libc::PROT_WRITE != 0
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bit = |bit, letter| if self.0 & bit != 0 { letter } else { '-' };
        let (r, w) = (bit(libc::PROT_READ, 'r'), bit(libc::PROT_WRITE, 'w'));
        write!(f, "{r}{w}{}", bit(libc::PROT_EXEC, 'x'))
    }
}

/// What a page is when nothing was written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    Anonymous,
    /// The page of that number of the file, mapped privately.
    File(u32),
}

impl Origin {
    pub fn what(self) -> What {
        match self {
            Self::Anonymous => What::Zero,
            Self::File(page) => What::File(page),
        }
    }

    /// That of the page that comes so many pages later in the same mapping.
    pub fn later(self, pages: u32) -> Self {
        match self {
            Self::Anonymous => self,
            Self::File(page) => Self::File(page + pages),
        }
    }
}

/// What was done to a page, and in which step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Deed {
    pub step: u64,
    pub verb: &'static str,
}

/// A page that is mapped.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Page {
    pub access: Access,
    pub origin: Origin,
    pub content: Content,
    /// The last few, the newest first.
    pub deeds: [Option<Deed>; 5],
}

impl Page {
    /// A page just mapped.
    pub fn new(access: Access, origin: Origin, deed: Deed) -> Self {
        Self {
            access,
            origin,
            content: Content::new(origin.what()),
            deeds: [Some(deed), None, None, None, None],
        }
    }

    /// Notes what is done to it.
    pub fn note(&mut self, deed: Deed) {
        self.deeds.rotate_right(1);
        self.deeds[0] = Some(deed);
    }

    /// It is what it was when nothing was written to it.
    pub fn revert(&mut self) {
        self.content.renew(self.origin.what());
    }

    fn seal(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

impl fmt::Display for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.origin {
            Origin::Anonymous => write!(f, "anonymous, {}", self.access)?,
            Origin::File(page) => write!(f, "page {page} of the file, {}", self.access)?,
        }
        f.write_str("; last done to it:")?;
        for deed in self.deeds.iter().flatten() {
            write!(f, " {} in step {},", deed.verb, deed.step)?;
        }
        write!(f, " so that it is {:?}", self.content)
    }
}

/// What stretches of addresses are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ours alone, mapped or not: so many pages.
    Land(u32),
    /// Where the kernel put it; what is not mapped of it is anybody's.
    Anywhere,
    /// Below the program break, which can move.
    Heap,
    /// So many pages mapped at once, of which few are ever touched: a page that
    /// the model does not have is zero, with this access.
    Reserve(u32, Access),
}

/// A stretch of addresses and what is mapped there.
#[derive(Clone, Debug)]
pub struct Lot {
    pub kind: Kind,
    pub base: usize,
    pages: BTreeMap<u32, (Page, u64)>,
}

/// A page of a lot and those behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub lot: usize,
    pub first: u32,
    pub count: u32,
}

impl Run {
    pub fn pages(self) -> std::ops::Range<u32> {
        self.first..self.first + self.count
    }

    /// Bytes.
    pub fn len(self) -> usize {
        self.count as usize * PAGE
    }

    pub fn is_empty(self) -> bool {
        self.count == 0
    }
}

impl Lot {
    pub fn new(kind: Kind, base: usize) -> Self {
        Self {
            kind,
            base,
            pages: BTreeMap::new(),
        }
    }

    pub fn address(&self, page: u32) -> usize {
        self.base + page as usize * PAGE
    }

    /// How many pages the model has of it.
    pub fn mapped(&self) -> usize {
        self.pages.len()
    }

    /// One behind the last page that may be asked for.
    pub fn end(&self) -> u32 {
        match self.kind {
            Kind::Land(pages) | Kind::Reserve(pages, _) => pages,
            Kind::Anywhere | Kind::Heap => self.pages.keys().next_back().map_or(0, |last| last + 1),
        }
    }

    /// The pages that the model has, by number.
    pub fn numbers(&self) -> Vec<u32> {
        self.pages.keys().copied().collect()
    }

    /// A page that the model has, unsealed.
    fn peek(&self, number: u32) -> Option<&Page> {
        self.pages.get(&number).map(|(page, _)| page)
    }

    /// What a page must be; nothing where none is mapped.
    ///
    /// # Errors
    /// What is remembered of it is not what was noted.
    pub fn page(&self, number: u32) -> Result<Option<Page>, String> {
        match (self.pages.get(&number), self.kind) {
            (Some((page, seal)), _) if page.seal() == *seal => Ok(Some(page.clone())),
            (Some((page, _)), _) => Err(format!(
                "the model itself was altered: of page {number} at {:#x} it says: {page}",
                self.address(number)
            )),
            (None, Kind::Reserve(pages, access)) if number < pages => {
                let deed = Deed {
                    step: 0,
                    verb: "reserved",
                };
                Ok(Some(Page::new(access, Origin::Anonymous, deed)))
            }
            (None, _) => Ok(None),
        }
    }

    /// A page is that from now on; nothing: it is not mapped.
    pub fn set(&mut self, number: u32, page: Option<Page>) {
        match page {
            Some(page) => {
                let seal = page.seal();
                self.pages.insert(number, (page, seal));
            }
            None => drop(self.pages.remove(&number)),
        }
    }

    /// Something is done to a page that is mapped.
    ///
    /// # Errors
    /// As [`Lot::page`], or it is not mapped.
    pub fn change(
        &mut self,
        number: u32,
        deed: Deed,
        what: impl FnOnce(&mut Page),
    ) -> Result<(), String> {
        let page = self.page(number)?;
        let mut page = page.ok_or_else(|| format!("{} of page {number}: none", deed.verb))?;
        what(&mut page);
        page.note(deed);
        self.set(number, Some(page));
        Ok(())
    }
}

/// All lots, and the file that some of their pages are of.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub lots: Vec<Lot>,
    /// The file's first pages.
    pub file: Vec<u8>,
    /// How many pages are to be mapped, more or less.
    pub aim: usize,
}

impl World {
    /// Pages of the file.
    pub fn file_pages(&self) -> u32 {
        (self.file.len() / PAGE) as u32
    }

    /// Pages that the model has.
    pub fn mapped(&self) -> usize {
        self.lots.iter().map(Lot::mapped).sum()
    }

    /// A lot that is as wanted.
    pub fn some_lot(&self, dice: &mut Dice, fits: impl Fn(&Lot) -> bool) -> Option<usize> {
        let all = 0..self.lots.len();
        let all: Vec<usize> = all.filter(|lot| fits(&self.lots[*lot])).collect();
        (!all.is_empty()).then(|| dice.pick(&all))
    }

    /// Up to `most` pages one behind the other that the model has, each as
    /// wanted.
    pub fn some_run(
        &self,
        dice: &mut Dice,
        most: u64,
        fits: impl Fn(&Lot, &Page) -> bool,
    ) -> Option<Run> {
        let index = self.some_lot(dice, |lot| lot.mapped() > 0)?;
        let lot = &self.lots[index];
        let from = dice.below(u64::from(lot.end())) as u32;
        let behind = lot.pages.range(from..).chain(lot.pages.range(..from));
        let mut behind = behind.filter(|(_, (page, _))| fits(lot, page));
        let first = *behind.next()?.0;
        let mut count = 1;
        let most = dice.few(most) as u32;
        while count < most && lot.peek(first + count).is_some_and(|page| fits(lot, page)) {
            count += 1;
        }
        Some(Run {
            lot: index,
            first,
            count,
        })
    }

    /// So much of the beginning of a run as one mapping could be.
    pub fn alike(&self, run: Run) -> Run {
        let lot = &self.lots[run.lot];
        let Some(first) = lot.peek(run.first) else {
            return Run { count: 0, ..run };
        };
        let like = |more: &u32| {
            lot.peek(run.first + more).is_some_and(|page| {
                page.access == first.access && page.origin == first.origin.later(*more)
            })
        };
        let count = (1..run.count).take_while(like).count() as u32 + 1;
        Run { count, ..run }
    }

    /// Up to `most` pages of a land; `free` of them all where nothing is mapped.
    pub fn some_land(&self, dice: &mut Dice, most: u64, free: bool) -> Option<Run> {
        let index = self.some_lot(dice, |lot| matches!(lot.kind, Kind::Land(_)))?;
        let lot = &self.lots[index];
        let first = dice.below(u64::from(lot.end())) as u32;
        let count = (dice.few(most) as u32).min(lot.end() - first);
        let mut run = Run {
            lot: index,
            first,
            count,
        };
        if free {
            run.count = match lot.pages.range(run.pages()).next() {
                Some((taken, _)) => taken - first,
                None => count,
            };
        }
        (run.count > 0).then_some(run)
    }

    /// Takes pages out of the model as they are.
    ///
    /// # Errors
    /// As [`Lot::page`].
    pub fn take(&mut self, run: Run) -> Result<Vec<Option<Page>>, String> {
        let lot = &mut self.lots[run.lot];
        let pages = run.pages().map(|number| {
            let page = lot.page(number);
            lot.set(number, None);
            page
        });
        pages.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEED: Deed = Deed {
        step: 1,
        verb: "mapped",
    };

    fn world() -> World {
        let mut lot = Lot::new(Kind::Land(20), 0x10000);
        for number in [3, 4, 5, 6, 9, 10] {
            let origin = match number {
                5 | 6 => Origin::File(number - 5),
                _ => Origin::Anonymous,
            };
            lot.set(number, Some(Page::new(Access::WRITE, origin, DEED)));
        }
        let reserve = Lot::new(Kind::Reserve(1 << 20, Access::NONE), 0x100_0000);
        World {
            lots: vec![lot, reserve],
            file: vec![1; 4 * PAGE],
            aim: 10,
        }
    }

    #[test]
    fn what_is_remembered_wrongly_is_noticed() {
        let mut world = world();
        assert!(world.lots[0].page(3).unwrap().is_some());
        world.lots[0].pages.get_mut(&3).unwrap().0.access = Access::READ;
        let said = world.lots[0].page(3).unwrap_err();
        assert!(
            said.contains("altered") && said.contains("mapped in step 1"),
            "{said}"
        );
    }

    #[test]
    fn a_change_is_remembered_with_what_was_done() {
        let mut world = world();
        let deed = Deed {
            step: 9,
            verb: "filled",
        };
        let lot = &mut world.lots[0];
        lot.change(9, deed, |page| page.content = Content::new(What::Byte(1)))
            .unwrap();
        let page = lot.page(9).unwrap().unwrap();
        assert_eq!(page.deeds[..2], [Some(deed), Some(DEED)]);
        assert_eq!(page.content, Content::new(What::Byte(1)));
        lot.change(0, deed, |_| ()).unwrap_err();
    }

    #[test]
    fn an_untouched_page_of_a_reservation_is_zero_and_a_hole_is_nothing() {
        let world = world();
        assert_eq!(world.lots[0].page(7), Ok(None));
        let page = world.lots[1].page(77).unwrap().unwrap();
        assert_eq!(page.content, Content::new(What::Zero));
        assert_eq!(page.access, Access::NONE);
        assert_eq!(world.lots[1].page(1 << 20), Ok(None));
    }

    #[test]
    fn runs_hold_only_what_is_wanted_one_behind_the_other() {
        let world = world();
        for step in 0..500 {
            let mut dice = Dice::new(1, step);
            let run = world.some_run(&mut dice, 8, |_, page| page.origin == Origin::Anonymous);
            let run = run.unwrap();
            assert!(run.pages().all(|n| [3, 4, 9, 10].contains(&n)), "{run:?}");
            if let Some(free) = world.some_land(&mut dice, 8, true) {
                let lot = &world.lots[0];
                assert!(free.pages().all(|n| lot.peek(n).is_none() && n < 20));
            }
        }
    }

    #[test]
    fn what_could_be_one_mapping_ends_where_another_begins() {
        let world = world();
        let run = |first, count| Run {
            lot: 0,
            first,
            count,
        };
        assert_eq!(world.alike(run(3, 4)), run(3, 2));
        assert_eq!(world.alike(run(5, 2)), run(5, 2));
        assert_eq!(world.alike(run(9, 9)), run(9, 2));
    }
}
