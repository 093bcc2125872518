//! What it costs to be followed, and what a look takes.

use super::{text, Outcome, Subject};
use lab::victim::restless;
use pmig::state::memory::Tracking;
use pmig::tracee::Stopped;
use std::io::BufRead;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;
/// Pages that are written between two looks.
const WRITTEN: usize = 4096;
const TIMES: usize = 15;

/// Fills so much memory and does with it what it is told. Answers with
/// nanoseconds, or an address.
pub fn resident(mb: usize, huge: bool) -> Outcome {
    let mut memory = vec![0u8; (mb << 20) + 2 * HUGE];
    let first = memory.as_ptr() as usize;
    let skip = first.next_multiple_of(HUGE) - first;
    let memory = &mut memory[skip..skip + (mb << 20)];
    restless::advise_huge(memory, huge)?;
    memory.iter_mut().step_by(PAGE).for_each(|b| *b = 1);
    println!("0");
    let mut round = 1u8;
    for line in std::io::stdin().lock().lines() {
        let step = match line.map_err(text)?.as_str() {
            "where" => {
                println!("{}", memory.as_ptr() as usize);
                continue;
            }
            // Whole tables of pages, and huge ones.
            "discard" => {
                restless::discard(&mut memory[HUGE..3 * HUGE])?;
                println!("0");
                continue;
            }
            // Spread over all of it.
            "touch" => (memory.len() / PAGE / WRITTEN).max(1) * PAGE,
            _ => HUGE,
        };
        round = round.wrapping_add(1);
        let begun = Instant::now();
        for byte in memory.iter_mut().step_by(step) {
            *std::hint::black_box(byte) = round;
        }
        println!("{}", begun.elapsed().as_nanos());
    }
    Ok(())
}

fn median(mut all: Vec<Duration>) -> f64 {
    all.sort();
    all[all.len() / 2].as_secs_f64() * 1e3
}

/// Kilobytes in huge pages.
fn huge_kb(pid: i32) -> Outcome<u64> {
    let text_of = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).map_err(text)?;
    let line = text_of
        .lines()
        .find_map(|l| l.strip_prefix("AnonHugePages:"));
    let kb = line.and_then(|l| l.trim().trim_end_matches(" kB").parse().ok());
    kb.ok_or_else(|| "no AnonHugePages".into())
}

/// Prints one line of JSON, in milliseconds: medians.
pub fn run(how: Tracking, mb: usize) -> Outcome {
    let size = mb.to_string();
    let mut attach = Vec::new();
    for _ in 0..TIMES {
        let subject = Subject::start(&["resident", "1", "small"])?;
        let (tracker, time) = subject.follow(how)?;
        attach.push(time);
        drop(tracker);
    }
    let mut subject = Subject::start(&["resident", &size, "small"])?;
    let mut untracked = Vec::new();
    for _ in 0..TIMES {
        untracked.push(Duration::from_nanos(subject.ask("touch")?));
    }
    let (mut tracker, _) = subject.follow(how)?;
    let begun = Instant::now();
    tracker.look().map_err(text)?;
    let first = begun.elapsed();
    let first_touch = Duration::from_nanos(subject.ask("touch")?);
    let (mut clean, mut dirty, mut last, mut touched) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..TIMES {
        tracker.look().map_err(text)?;
        let begun = Instant::now();
        tracker.look().map_err(text)?;
        clean.push(begun.elapsed());
        touched.push(Duration::from_nanos(subject.ask("touch")?));
        let begun = Instant::now();
        tracker.look().map_err(text)?;
        dirty.push(begun.elapsed());
        subject.ask("touch")?;
        let stopped = Stopped::seize(subject.pid()).map_err(text)?;
        let begun = Instant::now();
        tracker.last_look().map_err(text)?;
        last.push(begun.elapsed());
        stopped.detach().map_err(text)?;
    }
    drop(tracker);
    // One write to each huge page.
    let mut subject = Subject::start(&["resident", &size, "huge"])?;
    let before = huge_kb(subject.pid())?;
    let (mut tracker, _) = subject.follow(how)?;
    tracker.look().map_err(text)?;
    tracker.look().map_err(text)?;
    let looked = huge_kb(subject.pid())?;
    subject.ask("huge")?;
    let written = huge_kb(subject.pid())?;
    let found = tracker.look().map_err(text)?;
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    println!(
        "{{\"attach\":{:.3},\"first\":{:.3},\"clean\":{:.3},\"dirty\":{:.3},\"last\":{:.3},\
         \"first_touch\":{:.3},\"touch\":{:.3},\"untracked\":{:.3},\
         \"huge_kb\":[{before},{looked},{written}],\"huge_pages_found\":{}}}",
        median(attach),
        ms(first),
        median(clean),
        median(dirty),
        median(last),
        ms(first_touch),
        median(touched),
        median(untracked),
        found.bytes() / PAGE as u64,
    );
    Ok(())
}
