//! Writes a line each millisecond and dirties ten pages a tick: `mode=hot`
//! walks round 64 pages, `mode=roaming` through all of its memory. In each it
//! writes one word, or as many as `words=` says. Beside that it can have many
//! mappings and descriptors, which it looks after in turn.

use lab::victim::crowd::Crowd;
use lab::victim::{hurry, run, Args, Mix};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const PAGE: usize = 4096;
const PER_TICK: u64 = 10;
const HOT: u64 = 64;

fn main() -> ExitCode {
    run(|| {
        let args = Args::new(&[
            "ticks",
            "resident_mb",
            "mode",
            "tick_us",
            "seed",
            "per_tick",
            "words",
            "mappings",
            "mapping_kb",
            "descriptors",
        ])?;
        let ticks = args.number("ticks", 5000)?;
        let tick = Duration::from_micros(args.number("tick_us", 1000)?);
        let resident = args.number("resident_mb", 1)?.clamp(1, 1 << 16);
        let pages = resident * 256;
        let round = match args.text("mode").unwrap_or("hot") {
            "hot" => HOT.min(pages),
            "roaming" => pages,
            other => return Err(format!("mode={other}: neither hot nor roaming")),
        };
        let per_tick = args.number("per_tick", PER_TICK)?;
        let words = args.number("words", 1)?.clamp(1, PAGE as u64 / 8) as usize;
        let mut crowd = Crowd::new(
            args.number("mappings", 0)?,
            args.number("mapping_kb", 4)? / 4,
            args.number("descriptors", 0)?,
        )?;
        let mut mix = Mix(args.number("seed", 1)?);
        let mut memory = vec![0u64; pages as usize * PAGE / 8];
        for value in &mut memory {
            *value = mix.add(1);
        }
        let fresh = sum(&memory, words);
        let begin = Instant::now();
        let mut out = std::io::stdout();
        let mut dirtied = 0;
        let hurry = PathBuf::from(hurry(std::process::id()));
        for number in 0..ticks {
            // Looked for rarely: it must tick.
            if number % 512 == 511 && hurry.exists() {
                break;
            }
            for _ in 0..per_tick {
                let at = (dirtied % round) as usize * PAGE / 8;
                memory[at..at + words].fill(dirtied);
                dirtied += 1;
            }
            let line = format!(
                "{number} {} {}\n",
                begin.elapsed().as_nanos(),
                SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .map_err(|e| e.to_string())?
                    .as_nanos()
            );
            out.write_all(line.as_bytes())
                .map_err(|e| format!("write: {e}"))?;
            crowd.tick(number)?;
            thread::sleep(tick);
        }
        crowd.check()?;
        check(&memory, round, dirtied, words)?;
        if sum(&memory, words) != fresh {
            return Err("a word that nobody wrote has changed".into());
        }
        Ok(fresh ^ dirtied)
    })
}

/// The words of all pages but their first ones, which the ticks overwrite.
fn sum(memory: &[u64], written: usize) -> u64 {
    let mut mix = Mix(0);
    for page in memory.chunks(PAGE / 8) {
        for word in &page[written..] {
            mix.add(*word);
        }
    }
    mix.0
}

/// The first words of each page walked must be the last number put there.
fn check(memory: &[u64], round: u64, dirtied: u64, words: usize) -> Result<(), String> {
    for page in 0..round.min(dirtied) {
        let last = dirtied - 1 - (dirtied - 1 - page) % round;
        let at = page as usize * PAGE / 8;
        if let Some(found) = memory[at..at + words].iter().find(|w| **w != last) {
            return Err(format!("page {page} holds {found} instead of {last}"));
        }
    }
    Ok(())
}
