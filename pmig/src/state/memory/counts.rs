//! What the kernel counts of a process's memory.

use std::path::Path;
use std::sync::OnceLock;

use super::PAGE;
use crate::error::{Error, Result};
use crate::proc;
use crate::proc::stat::Stat;
use crate::proc::status::Held;
use crate::proc::Kept;

/// Where this machine says which sizes of huge pages there are, and who gets them.
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage";

/// The counters of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    pub faults: u64,
    pub settled: Settled,
    /// It has no child: none was born before that writes to its memory still.
    pub childless: bool,
}

/// What must not have changed meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Settled {
    pub held: Held,
    /// The last PID given out here, and to all that is contained here: a child that
    /// shares the program's memory (vfork(2)) writes to it by faults of its own.
    born: i32,
}

impl Counts {
    /// # Errors
    /// As [`Stat::again`] and [`Held::again`].
    pub fn read(files: &Kept) -> Result<Counts> {
        // minflt, cminflt, majflt.
        let [minor, _, major] = Stat::again(files)?.fields(10)?;
        let loads = proc::setting("/proc/loadavg");
        let born = loads.and_then(|text| text.rsplit(' ').next()?.parse().ok());
        let unknown = || Error::bad("/proc/loadavg", "tells no PID");
        // Behind the last PID: who is born later changes that.
        let children = files.read(format!("task/{}/children", files.pid()));
        Ok(Counts {
            childless: children.is_ok_and(|all| all.is_empty()),
            faults: minor.wrapping_add(major),
            settled: Settled {
                held: Held::again(files)?,
                born: born.ok_or_else(unknown)?,
            },
        })
    }

    /// Faults since then.
    pub fn since(&self, before: &Counts) -> u64 {
        self.faults.wrapping_sub(before.faults)
    }
}

/// Whether this kernel tells exactly what a process holds (fs/proc/task_mmu.c,
/// `task_mem`: get_mm_counter_sum()); others tell it by many pages at once. Tried
/// once, before this process locks its memory.
pub(super) fn tells_exactly() -> bool {
    static TOLD: OnceLock<bool> = OnceLock::new();
    *TOLD.get_or_init(|| (0..3).any(|_| try_exactness().unwrap_or(false)))
}

fn try_exactness() -> Result<bool> {
    const PAGES: usize = 16;
    let files = Kept::of(std::process::id() as i32);
    // More than is ever taken from what was used before.
    let mut room: Vec<u8> = Vec::new();
    if room.try_reserve_exact(64 << 20).is_err() {
        return Ok(false);
    }
    let mut last = Counts::read(&files)?;
    for n in 1..=PAGES {
        room.resize(n * PAGE as usize, 1);
        std::hint::black_box(&room);
        let now = Counts::read(&files)?;
        let held = |counts: &Counts| counts.settled.held.anonymous;
        if held(&now) < held(&last) + PAGE / 1024 || now.since(&last) == 0 {
            return Ok(false);
        }
        last = now;
    }
    Ok(true)
}

/// Whether no fault brings several pages at once to a mapping for which the program
/// did not ask for that: huge pages of all sizes are off, or for those who ask
/// (Documentation/admin-guide/mm/transhuge.rst).
pub(super) fn brings_one_page() -> bool {
    let few = |path: &Path| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let chosen = text
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'));
        chosen.is_some_and(|(word, _)| ["never", "madvise", "inherit"].contains(&word))
    };
    let all = Path::new(HUGE_PAGES);
    let Ok(entries) = std::fs::read_dir(all) else {
        // Without the directory above it nothing is known.
        return all.parent().is_some_and(Path::is_dir);
    };
    let mut files = entries.flatten().map(|entry| entry.path().join("enabled"));
    // Sizes that only shared memory comes in have no such file.
    few(&all.join("enabled")) && files.all(|file| !file.exists() || few(&file))
}
