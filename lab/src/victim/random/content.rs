//! What the bytes of one page must be, told in few words.

use super::dice::stir;
use crate::victim::area::PAGE;
use std::ops::Range;

/// So many pieces may lie over one another in a page; then it is written whole.
pub const MOST: usize = 10;

/// Where bytes come from. Each says what a byte is by its place in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    Zero,
    /// Computed from a seed.
    Seed(u64),
    /// The same byte everywhere.
    Byte(u8),
    /// The page of that number in the mapped file.
    File(u32),
    /// These, from the first byte of the piece on.
    Bytes([u8; 16]),
}

impl What {
    /// The same for the page that comes so many pages later.
    pub fn later(self, pages: u32) -> Self {
        match self {
            Self::Seed(seed) => Self::Seed(seed.wrapping_add(u64::from(pages))),
            Self::File(page) => Self::File(page + pages),
            other => other,
        }
    }

    /// Puts the bytes of a piece of a page where they belong in it.
    fn put(self, piece: Range<usize>, file: &[u8], page: &mut [u8; PAGE]) {
        match self {
            Self::Zero => page[piece].fill(0),
            Self::Byte(byte) => page[piece].fill(byte),
            Self::File(number) => {
                let from = number as usize * PAGE;
                let bytes = &file[from + piece.start..from + piece.end];
                page[piece].copy_from_slice(bytes);
            }
            Self::Bytes(bytes) => {
                let len = piece.len();
                page[piece].copy_from_slice(&bytes[..len]);
            }
            Self::Seed(seed) => {
                for index in piece.start / 8..piece.end.div_ceil(8) {
                    // Never a word of zeros: what is lost shows.
                    let word = (stir(seed ^ (index as u64) << 48) | 1).to_le_bytes();
                    let start = piece.start.max(index * 8);
                    let end = piece.end.min(index * 8 + 8);
                    page[start..end].copy_from_slice(&word[start - index * 8..end - index * 8]);
                }
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Piece {
    start: u16,
    end: u16,
    what: What,
}

/// A page's bytes: what the whole page was filled with, and what was written
/// over parts of it since.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Content {
    base: What,
    over: Vec<Piece>,
    /// What it was filled with before.
    before: Option<What>,
    /// Given up by `MADV_FREE`: it may be all zero at any time from now on,
    /// until it is written.
    pub loose: bool,
}

impl Content {
    /// A page filled with that.
    pub fn new(base: What) -> Self {
        Self {
            base,
            over: Vec::new(),
            before: None,
            loose: false,
        }
    }

    /// The whole page is filled with something else.
    pub fn renew(&mut self, base: What) {
        let before = Some(self.base);
        *self = Self {
            before,
            ..Self::new(base)
        };
    }

    /// Whether a piece of it looks as it did before it was last filled.
    pub fn is_old(&self, found: &[u8], piece: Range<usize>, file: &[u8]) -> bool {
        let Some(before) = self.before else {
            return false;
        };
        let mut old = [0; PAGE];
        before.put(0..PAGE, file, &mut old);
        let same = |n: &usize| found[*n] == old[*n];
        // Parts of it had been written since.
        piece.clone().filter(same).count() > piece.len() / 2
    }

    /// Whether only the whole page can be written, lest more would have to be
    /// remembered or nobody could say what the rest of it is.
    pub fn whole_only(&self) -> bool {
        self.loose || self.over.len() >= MOST
    }

    /// Bytes of the page are written.
    pub fn write(&mut self, piece: Range<usize>, what: What) {
        if piece.len() == PAGE {
            self.renew(what);
            return;
        }
        let (start, end) = (piece.start as u16, piece.end as u16);
        // What lies all below another piece shows no more.
        self.over.retain(|o| o.start < start || end < o.end);
        self.over.push(Piece { start, end, what });
    }

    /// All of its bytes; `file` is the mapped file's.
    pub fn bytes(&self, file: &[u8], page: &mut [u8; PAGE]) {
        self.base.put(0..PAGE, file, page);
        for piece in &self.over {
            let range = usize::from(piece.start)..usize::from(piece.end);
            piece.what.put(range, file, page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::dice::Dice;
    use super::*;

    fn file() -> Vec<u8> {
        (0..4 * PAGE).map(|n| stir(n as u64) as u8).collect()
    }

    fn bytes(content: &Content) -> Vec<u8> {
        let mut page = [0xaa; PAGE];
        content.bytes(&file(), &mut page);
        page.to_vec()
    }

    #[test]
    fn a_page_is_what_was_last_written_to_each_of_its_bytes() {
        let file = file();
        let mut dice = Dice::new(3, 3);
        let mut content = Content::new(What::Zero);
        let mut naive = [0u8; PAGE];
        for _ in 0..3000 {
            let start = dice.below(PAGE as u64) as usize;
            let end = start + 1 + dice.below((PAGE - start) as u64) as usize;
            let mut piece = start..end;
            if content.whole_only() || dice.one_in(20) {
                piece = 0..PAGE;
            }
            let (seed, byte) = (dice.any(), dice.any() as u8);
            let page = dice.below(4) as u32;
            let what = dice.pick(&[
                What::Zero,
                What::Seed(seed),
                What::Byte(byte),
                What::File(page),
            ]);
            content.write(piece.clone(), what);
            let mut all = [0u8; PAGE];
            what.put(0..PAGE, &file, &mut all);
            naive[piece.clone()].copy_from_slice(&all[piece]);
            assert!(bytes(&content) == naive, "{content:?}");
        }
    }

    #[test]
    fn a_few_bytes_stay_theirs_when_their_neighbours_are_written() {
        let mut content = Content::new(What::Byte(7));
        content.write(
            100..104,
            What::Bytes([1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        );
        content.write(100..102, What::Zero);
        assert_eq!(bytes(&content)[99..105], [7, 0, 0, 3, 4, 7]);
    }

    #[test]
    fn a_page_knows_what_it_was_before() {
        let mut content = Content::new(What::Seed(1));
        let old = bytes(&content);
        content.renew(What::File(1));
        assert!(content.is_old(&old, 0..PAGE, &file()));
        assert!(!content.is_old(&bytes(&content), 0..PAGE, &file()));
    }

    #[test]
    fn a_seed_gives_no_zeros_and_another_seed_other_bytes() {
        let one = bytes(&Content::new(What::Seed(1)));
        assert!(one.chunks(8).all(|word| word != [0; 8]));
        assert_ne!(one, bytes(&Content::new(What::Seed(1).later(1))));
    }
}
