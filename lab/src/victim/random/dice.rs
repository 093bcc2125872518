//! Numbers that look random and follow from a seed alone.

use std::ops::Range;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Spreads a number over all bits; no two numbers give the same.
pub fn stir(value: u64) -> u64 {
    let z = value.wrapping_add(GOLDEN);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Dice for one purpose: those of a step know nothing of the step before.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The dice of a seed for its step of that number.
    pub fn new(seed: u64, step: u64) -> Self {
        Self(stir(seed ^ stir(step)))
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        stir(self.0)
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.any() % end
    }

    /// A number of a range, which is not empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.below(range.end - range.start)
    }

    /// True once in so many times.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of those.
    pub fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// A count from 1 to `most`, small ones more often.
    pub fn few(&mut self, most: u64) -> u64 {
        let bits = u64::from(most.max(1).ilog2()) + 1;
        let end = 1u64 << self.within(0..bits + 1);
        1 + self.below(end.min(most.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_step_give_the_same_numbers_and_others_others() {
        let first = |seed, step| Dice::new(seed, step).any();
        assert_eq!(first(1, 2), first(1, 2));
        assert_ne!(first(1, 2), first(2, 1));
        assert_ne!(first(1, 2), first(1, 3));
    }

    #[test]
    fn a_few_are_at_least_one_and_at_most_what_is_allowed() {
        let mut dice = Dice::new(1, 1);
        let mut seen = [0u32; 12];
        for _ in 0..4000 {
            seen[dice.few(11) as usize] += 1;
        }
        assert_eq!(seen[0], 0);
        assert!(seen[1..].iter().all(|n| *n > 0), "{seen:?}");
        assert!(seen[1] > 3 * seen[11], "{seen:?}");
        assert_eq!(dice.few(1), 1);
    }
}
