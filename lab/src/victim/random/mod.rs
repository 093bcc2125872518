//! A program that does anything with its memory and knows what every byte of it
//! must be.
//!
//! What it does follows from a seed and the number of the step; so do the lines
//! that it writes, whatever becomes of it. What its memory must be it keeps in a
//! model ([`world`]), which is memory as well: its pages are sealed, so that
//! also a model that was altered is noticed.

pub mod content;
pub mod dice;
pub mod hands;
pub mod op;
mod steps;
pub mod world;

use super::{Args, Mix, Pace};
use dice::Dice;
use hands::Hands;
use op::Op;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use world::{Access, Deed, Kind, Lot, Origin, Page, Run, World};

use super::area::PAGE;
use content::What;

/// Steps to a line.
pub const STEPS: u64 = 16;
/// Lines between two looks at all of the memory.
const ALL: u64 = 64;
/// Pages of a land, at least.
const LAND: u32 = 1024;
/// Pages of the program's own file that are mapped and read.
const FILE: usize = 64;
/// What the model may need of the C library's memory, in bytes.
const HEAP: usize = 12 << 20;
/// Calls that may be below one another.
const DEPTH: u32 = 250;

/// The lines that the program of a seed writes, one after another.
pub fn lines(seed: u64) -> impl Iterator<Item = String> {
    let mut mix = Mix(seed);
    (1u64..).map(move |line| {
        let value = mix.add(line);
        format!("{line} {value:016x}")
    })
}

/// The arguments that the program takes.
pub const ARGS: [&str; 4] = ["seed", "lines", "pace_us", "mb"];

/// The program.
pub struct Program {
    seed: u64,
    step: u64,
    line: u64,
    lines: u64,
    mix: Mix,
    world: World,
    hands: Hands,
    pace: Pace,
    depth: u32,
    over: bool,
}

/// Where lands of that size are: low, in the middle and one behind another so
/// that what is mapped at their border can become one, and high; nothing else is
/// mapped there in any program.
fn lands(size: usize) -> [usize; 5] {
    const MIDDLE: usize = 0x2000_0000_0000;
    const ODD: usize = 0x3456_7890_0000;
    [0x1000_0000, MIDDLE, MIDDLE + size, ODD, 0x7000_0000_0000]
}

impl Program {
    /// As the arguments say: `seed`; `lines` (when it is to end, if nobody hurries
    /// it before); `pace_us` (microseconds a line); `mb` (megabytes, otherwise by
    /// the seed 4 to 24).
    ///
    /// # Errors
    /// An argument out of place, or a failing system call.
    pub fn new(args: &Args) -> Result<Self, String> {
        let seed = args.number("seed", 1)?;
        let mut dice = Dice::new(seed, 0);
        let size = args.number("mb", dice.within(4..25))?.clamp(1, 4096);
        // The model grows with what it is about.
        hands::settle_heap(HEAP.max(size as usize * (HEAP >> 4)));
        let path = "/proc/self/exe";
        let file = File::open(path).map_err(|e| format!("open {path}: {e}"))?;
        let mut bytes = vec![0; FILE * PAGE];
        file.read_exact_at(&mut bytes, 0)
            .map_err(|e| format!("read {path}: {e}"))?;
        let mut program = Self {
            seed,
            step: 0,
            line: 0,
            lines: args.number("lines", 100_000)?,
            mix: Mix(seed),
            world: World {
                lots: Vec::new(),
                file: bytes,
                aim: (size as usize) << 20 >> 12,
            },
            hands: Hands::new(file)?,
            pace: Pace::new(args, 2000)?,
            depth: 0,
            over: false,
        };
        program.settle(&mut dice)?;
        Ok(program)
    }

    /// Finds its lots and fills them.
    fn settle(&mut self, dice: &mut Dice) -> Result<(), String> {
        let pages = LAND.max(self.world.aim as u32 / 3).next_multiple_of(LAND);
        for base in lands(pages as usize * PAGE) {
            hands::is_free(base, pages as usize * PAGE)?;
            self.world.lots.push(Lot::new(Kind::Land(pages), base));
        }
        let at = hands::move_break(0)?;
        hands::move_break((at.next_multiple_of(PAGE) - at) as isize)?;
        let heap = Lot::new(Kind::Heap, at.next_multiple_of(PAGE));
        self.world.lots.push(heap);
        self.do_step(Op::Break(16))?;
        if dice.one_in(3) {
            // Room for huge pages.
            let run = Run {
                lot: 3,
                first: 0,
                count: 1024.min(self.world.aim as u32),
            };
            self.do_step(Op::Map {
                run,
                access: Access::WRITE,
                origin: Origin::Anonymous,
                fill: None,
            })?;
            self.do_step(Op::Advise(run, libc::MADV_HUGEPAGE))?;
            self.fill(run, dice.any())?;
        }
        while self.world.mapped() < self.world.aim * 7 / 8 {
            let Some(run) = self.world.some_land(dice, 256, true) else {
                continue;
            };
            self.do_step(Op::Map {
                run,
                access: Access::WRITE,
                origin: Origin::Anonymous,
                fill: Some(dice.any()),
            })?;
        }
        Ok(())
    }

    /// Writes all of a run.
    fn fill(&mut self, run: Run, seed: u64) -> Result<(), String> {
        for number in run.pages() {
            let page = Run {
                first: number,
                count: 1,
                ..run
            };
            let what = What::Seed(seed).later(number - run.first);
            self.write(page, 0, PAGE, what, hands::Writer::Program, "filled")?;
        }
        Ok(())
    }

    fn deed(&self, verb: &'static str) -> Deed {
        Deed {
            step: self.step,
            verb,
        }
    }

    fn fresh(&self, access: Access, origin: Origin, verb: &'static str) -> Page {
        Page::new(access, origin, self.deed(verb))
    }

    /// Runs until its last line, or until somebody hurries it, and looks at
    /// everything at the end.
    ///
    /// # Errors
    /// What is not as it must be.
    pub fn run(&mut self) -> Result<u64, String> {
        let run = self.stay().and_then(|()| self.check_all(true));
        run.map_err(|e| {
            format!(
                "seed {} line {} step {}: {e}",
                self.seed, self.line, self.step
            )
        })?;
        Ok(self.mix.0)
    }

    /// Goes on, line for line, on this level of the stack.
    fn stay(&mut self) -> Result<(), String> {
        while !self.over {
            self.step += 1;
            let mut dice = Dice::new(self.seed, self.step);
            let op = Op::draw(&self.world, &mut dice);
            let done = self.do_step(op);
            done.map_err(|e| format!("{op:x?}: {e}"))?;
            if self.step % STEPS == 0 {
                self.end_line()?;
            }
            match op {
                Op::Deepen(levels) if self.depth + levels <= DEPTH && !self.over => {
                    self.depth += levels;
                    self.descend(levels)?;
                    self.depth -= levels;
                }
                Op::Return if self.depth > 0 => return Ok(()),
                _ => {}
            }
        }
        Ok(())
    }

    /// Writes a line, perhaps the last.
    fn end_line(&mut self) -> Result<(), String> {
        self.line += 1;
        let line = format!("{} {:016x}\n", self.line, self.mix.add(self.line));
        let mut out = std::io::stdout();
        out.write_all(line.as_bytes())
            .map_err(|e| format!("write: {e}"))?;
        if self.line % ALL == 0 {
            self.check_all(false)?;
        }
        self.over = self.line >= self.lines || self.pace.is_hurried();
        self.pace.pass()
    }

    /// Goes on some levels deeper, about half a page each, and checks them on
    /// the way back.
    #[inline(never)]
    fn descend(&mut self, levels: u32) -> Result<(), String> {
        const WORDS: usize = 250;
        let seed = self.seed ^ self.step << 20 ^ u64::from(levels);
        let mut frame: [u64; WORDS] = std::array::from_fn(|index| dice::stir(seed + index as u64));
        std::hint::black_box(&mut frame);
        match levels {
            0 => self.stay()?,
            _ => self.descend(levels - 1)?,
        }
        std::hint::black_box(&mut frame);
        for (index, word) in frame.iter().enumerate() {
            let expected = dice::stir(seed + index as u64);
            if *word != expected {
                let at = std::ptr::from_ref(word);
                return Err(format!(
                    "{at:?} on the stack holds {word:x} instead of {expected:x}"
                ));
            }
        }
        Ok(())
    }
}
