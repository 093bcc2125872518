//! Discards, protects, punches, maps and grows memory while it runs, and checks
//! every byte and every flag of it.

use lab::victim::area::{grow_break, Area};
use lab::victim::{run, Args, Mix, Pace};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::ExitCode;

const PAGES: usize = 96;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Advice that shows in smaps, and how.
const ADVICE: [(i32, &str); 4] = [
    (libc::MADV_DONTDUMP, "dd"),
    (libc::MADV_DONTFORK, "dc"),
    (libc::MADV_WIPEONFORK, "wf"),
    (libc::MADV_SEQUENTIAL, "sr"),
];

/// What each page of an area must hold: nothing, zero, or a seed's bytes.
struct Known {
    area: Area,
    pages: Vec<Option<Option<u64>>>,
}

impl Known {
    fn new(area: Area, seed: u64) -> Self {
        for page in 0..area.pages() {
            area.fill(page, seed);
        }
        Self {
            pages: vec![Some(Some(seed)); area.pages()],
            area,
        }
    }

    fn check(&self, what: &str) -> Result<(), String> {
        for (page, expected) in self.pages.iter().enumerate() {
            if let Some(seed) = expected {
                let result = self.area.check(page, *seed);
                result.map_err(|e| format!("{what}, page {page}: {e}"))?;
            }
        }
        Ok(())
    }
}

struct Program {
    mix: Mix,
    discarded: Known,
    protected: Known,
    punched: Known,
    heap: Vec<Known>,
    later: Vec<Known>,
    code: Area,
    number: u32,
    advised: Vec<(Area, &'static str)>,
    file: Area,
    file_was: Vec<Vec<u8>>,
    flags: BTreeMap<usize, String>,
}

impl Program {
    fn new() -> Result<Self, String> {
        let file = std::fs::File::open("/proc/self/exe").map_err(|e| e.to_string())?;
        let file = Area::of_file(file.as_raw_fd(), 8)?;
        let file_was = (0..8).map(|page| file.bytes(page)).collect();
        // A page of its own amid those that are still the file's.
        file.fill(3, 77);
        let mut advised = Vec::new();
        for (advice, word) in ADVICE {
            let area = Area::new(3)?;
            area.fill(1, 5);
            area.advise(0, 3, advice)?;
            // Neighbours of other flags, so that no two areas become one.
            area.protect(2, 1, libc::PROT_READ)?;
            advised.push((area, word));
        }
        let mut program = Self {
            mix: Mix(1),
            discarded: Known::new(Area::new(PAGES)?, 1),
            protected: Known::new(Area::new(PAGES)?, 2),
            punched: Known::new(Area::new(PAGES)?, 3),
            heap: Vec::new(),
            later: Vec::new(),
            code: Area::new(1)?,
            number: 0,
            advised,
            file,
            file_was,
            flags: BTreeMap::new(),
        };
        program.code.generate(0, 0)?;
        program.flags = flags()?;
        Ok(program)
    }

    fn round(&mut self, round: u64) -> Result<(), String> {
        self.check()?;
        let page = (self.mix.add(round) % PAGES as u64) as usize;
        let few = 4.min(PAGES - page);
        match round % 4 {
            0 => {
                self.discarded.area.advise(page, few, libc::MADV_DONTNEED)?;
                self.discarded.pages[page..page + few].fill(Some(None));
            }
            1 => {
                self.discarded.area.fill(page, round);
                self.discarded.pages[page] = Some(Some(round));
            }
            2 => {
                // Readable again only for the moment of a check.
                let access = [libc::PROT_NONE, libc::PROT_READ][(round / 4 % 2) as usize];
                self.protected.area.protect(page, few, READ_WRITE)?;
                self.protected.area.fill(page, round);
                self.protected.pages[page] = Some(Some(round));
                self.protected.area.protect(page, few, access)?;
            }
            _ => {
                // What lies in a hole by now is not this area's to unmap.
                if self.punched.pages[page..page + few]
                    .iter()
                    .all(Option::is_some)
                {
                    self.punched.area.punch(page, few)?;
                    self.punched.pages[page..page + few].fill(None);
                }
                let again = (self.mix.add(round) % PAGES as u64) as usize;
                if self.punched.pages[again].is_none() && self.punched.area.renew(again, 1)? {
                    self.punched.pages[again] = Some(None);
                }
            }
        }
        if round % 8 == 5 {
            self.number += 1;
            self.code.generate(0, self.number)?;
        }
        if round % 16 == 7 && self.later.len() < 40 {
            self.later.push(Known::new(Area::new(5)?, round));
            self.heap.push(Known::new(grow_break(3)?, round));
        }
        black_box(deepen(self.mix.0, 20 + round % 400));
        Ok(())
    }

    fn check(&mut self) -> Result<(), String> {
        self.discarded.check("discarded")?;
        self.punched.check("punched")?;
        // What is out of reach keeps its contents: look, and close it again.
        let closed = closed_pages(&self.protected.area)?;
        for page in &closed {
            self.protected.area.protect(*page, 1, libc::PROT_READ)?;
        }
        self.protected.check("protected")?;
        for page in &closed {
            self.protected.area.protect(*page, 1, libc::PROT_NONE)?;
        }
        for known in self.heap.iter().chain(&self.later) {
            known.check("grown")?;
        }
        if self.code.call(0) != self.number {
            return Err(format!(
                "code gave {} for {}",
                self.code.call(0),
                self.number
            ));
        }
        for (page, was) in self.file_was.iter().enumerate() {
            if page == 3 {
                self.file.check(page, Some(77))?;
            } else if self.file.bytes(page) != *was {
                return Err(format!("page {page} of the mapped file has changed"));
            }
        }
        let now = flags()?;
        for (area, word) in &self.advised {
            area.check(1, Some(5))?;
            let at = area.address(0);
            let (was, is) = (self.flags.get(&at), now.get(&at));
            if was != is || !is.is_some_and(|flags| flags.split(' ').any(|flag| flag == *word)) {
                return Err(format!("flags at {at:x} with {word}: {was:?} -> {is:?}"));
            }
        }
        Ok(())
    }
}

/// VmFlags of every mapping by its start, as smaps has them.
fn flags() -> Result<BTreeMap<usize, String>, String> {
    let text = std::fs::read_to_string("/proc/self/smaps").map_err(|e| format!("smaps: {e}"))?;
    let mut all = BTreeMap::new();
    let mut start = 0;
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags: ") {
            // Soft-dirty and userfaultfd tracking come and go with a migration.
            let kept = flags.split_whitespace();
            let kept = kept.filter(|flag| !["sd", "uw", "um"].contains(flag));
            all.insert(start, kept.collect::<Vec<_>>().join(" "));
        } else if let Some((first, _)) = line.split_once('-') {
            start = usize::from_str_radix(first, 16).unwrap_or(start);
        }
    }
    Ok(all)
}

/// The pages of an area that may not be read.
fn closed_pages(area: &Area) -> Result<Vec<usize>, String> {
    let text = std::fs::read_to_string("/proc/self/maps").map_err(|e| format!("maps: {e}"))?;
    let mut closed = Vec::new();
    for line in text.lines() {
        let mut fields = line.split([' ', '-']);
        let mut number = || usize::from_str_radix(fields.next()?, 16).ok();
        let (Some(start), Some(end)) = (number(), number()) else {
            continue;
        };
        if line.split(' ').nth(1).is_some_and(|f| f.starts_with("---")) {
            let pages = 0..area.pages();
            closed.extend(pages.filter(|page| (start..end).contains(&area.address(*page))));
        }
    }
    Ok(closed)
}

/// Grows the stack by about a page a level.
#[inline(never)]
fn deepen(value: u64, levels: u64) -> u64 {
    let frame = black_box([value; 500]);
    if levels == 0 {
        return frame[7];
    }
    deepen(frame[levels as usize % 500] + 1, levels - 1) ^ frame[499]
}

fn main() -> ExitCode {
    run(|| {
        let args = Args::new(&["lines", "pace_us"])?;
        let pace = Pace::new(&args, 10_000)?;
        let mut program = Program::new()?;
        let mut out = std::io::stdout();
        for round in 0..args.number("lines", 400)? {
            program.round(round)?;
            let line = format!("{round} {:016x}\n", program.mix.0);
            out.write_all(line.as_bytes()).map_err(|e| e.to_string())?;
            pace.pass()?;
        }
        program.check()?;
        Ok(program.mix.0)
    })
}
