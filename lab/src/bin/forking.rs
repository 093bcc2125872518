//! Writes to its memory and checks it; and forks, once there is the file of the
//! argument `when`. Each child finds all of it as it was in that moment, writes to
//! it, discards of it, and has a child of its own find the rest.

use lab::victim::area::Area;
use lab::victim::raw::{end_of, fork};
use lab::victim::{run, Args, Mix, Pace};
use std::collections::VecDeque;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Children at a time.
const MOST: usize = 3;

/// Memory, and what each page of it holds: a seed's bytes, or zeros.
struct Known {
    area: Area,
    pages: Vec<Option<u64>>,
}

impl Known {
    fn check(&self, pages: impl Iterator<Item = usize>) -> Result<(), String> {
        for page in pages {
            let checked = self.area.check(page, self.pages[page]);
            checked.map_err(|e| format!("page {page}: {e}"))?;
        }
        Ok(())
    }

    /// Writes to, or discards, one page.
    fn change(&mut self, mix: &mut Mix) -> Result<(), String> {
        let page = (mix.add(1) % self.pages.len() as u64) as usize;
        self.pages[page] = match mix.add(2) % 4 {
            0 => {
                self.area.advise(page, 1, libc::MADV_DONTNEED)?;
                None
            }
            1 => {
                self.area.protect(page, 1, libc::PROT_READ)?;
                self.area.protect(page, 1, READ_WRITE)?;
                self.pages[page]
            }
            _ => {
                self.area.fill(page, mix.add(3));
                Some(mix.0)
            }
        };
        Ok(())
    }

    /// A child's life.
    fn live(&mut self, mut mix: Mix) -> Result<(), String> {
        let half = self.pages.len() / 2;
        // From behind: nobody else comes from there.
        self.check((half..self.pages.len()).rev())?;
        for _ in 0..half {
            self.change(&mut mix)?;
        }
        let grandchild = fork(|| told("grandchild", self.check((0..half).rev())))
            .map_err(|e| format!("fork: {e}"))?;
        self.check(half..self.pages.len())?;
        well(grandchild)
    }
}

fn told(who: &str, went: Result<(), String>) -> i32 {
    match went {
        Ok(()) => 0,
        Err(e) => {
            println!("FAIL {who}: {e}");
            1
        }
    }
}

fn well(child: i32) -> Result<(), String> {
    match end_of(child).map_err(|e| format!("wait: {e}"))? {
        0 => Ok(()),
        status => Err(format!("child {child} ended with status {status:#x}")),
    }
}

fn main() -> ExitCode {
    run(|| {
        let args = Args::new(&["lines", "pages", "seed", "pace_us", "when"])?;
        let lines = args.number("lines", 400)?;
        let pages = args.number("pages", 1024)?.clamp(2, 1 << 20) as usize;
        let mut mix = Mix(args.number("seed", 1)?);
        let pace = Pace::new(&args, 10_000)?;
        let area = Area::new(pages)?;
        let pages = (0..pages).map(|page| {
            area.fill(page, mix.add(page as u64));
            Some(mix.0)
        });
        let mut known = Known {
            pages: pages.collect(),
            area,
        };
        let mut children = VecDeque::new();
        for line in 0..lines {
            if pace.is_hurried() {
                break;
            }
            for _ in 0..16 {
                known.change(&mut mix)?;
            }
            if args
                .text("when")
                .is_some_and(|when| Path::new(when).exists())
            {
                if children.len() == MOST {
                    well(children.pop_front().unwrap_or(0))?;
                }
                let child = fork(|| told("child", known.live(Mix(line))));
                children.push_back(child.map_err(|e| format!("fork: {e}"))?);
            }
            println!("{line} {:016x} {} children", mix.0, children.len());
            std::io::stdout().flush().map_err(|e| e.to_string())?;
            pace.pass()?;
        }
        children.into_iter().try_for_each(well)?;
        known.check(0..known.pages.len())?;
        Ok(mix.0)
    })
}
