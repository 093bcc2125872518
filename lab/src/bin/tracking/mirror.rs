//! A copy of a program's memory, kept by what looks tell: as a husk has it.

use super::{text, Outcome, Subject};
use nix::sys::uio::{process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;
use pmig::state::memory::{Backing, Found, Step, Tracker, Tracking, PAGE};
use pmig::tracee::Stopped;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

struct Mirror(BTreeMap<u64, Vec<u8>>);

impl Mirror {
    fn lose(&mut self, r: &Range<u64>) {
        let gone: Vec<u64> = self.0.range(r.clone()).map(|(at, _)| *at).collect();
        gone.iter().for_each(|at| drop(self.0.remove(at)));
    }

    fn take(&mut self, tracker: &mut Tracker, found: &Found) -> Outcome {
        for step in &found.steps {
            match step {
                Step::Unmap(r) => self.lose(r),
                Step::Map(v) => self.lose(&v.range()),
                Step::Protect(..) | Step::Advise(..) => {}
            }
        }
        found.drops.iter().for_each(|r| self.lose(r));
        let mut buf = vec![0; 1 << 20];
        for run in &found.pages {
            for at in (run.start..run.end).step_by(buf.len()) {
                let piece = at..run.end.min(at + buf.len() as u64);
                let mut from = 0;
                for got in tracker.read(&[piece], &mut buf).map_err(text)? {
                    for page in got.step_by(PAGE as usize) {
                        let bytes = buf[from..from + PAGE as usize].to_vec();
                        from += PAGE as usize;
                        self.0.insert(page, bytes);
                        tracker.mark_sent(page..page + PAGE);
                    }
                }
            }
        }
        Ok(())
    }

    /// Compares all of a stopped program's own memory.
    fn compare(&self, pid: i32, tracker: &Tracker) -> Outcome<Vec<u64>> {
        let mem = File::open(format!("/proc/{pid}/mem")).map_err(text)?;
        let zero = vec![0; PAGE as usize];
        let mut bytes = vec![0; PAGE as usize];
        let mut wrong = Vec::new();
        for vma in tracker.layout.vmas.iter().filter(|v| v.is_private()) {
            for page in (vma.start..vma.end).step_by(PAGE as usize) {
                let is = match self.0.get(&page) {
                    Some(is) => is,
                    None if vma.backing == Backing::Anonymous => &zero,
                    None => continue,
                };
                mem.read_exact_at(&mut bytes, page).map_err(text)?;
                if *is != bytes {
                    wrong.push(page);
                }
            }
        }
        let inside = |at: &&u64| {
            let n = tracker.layout.vmas.partition_point(|v| v.end <= **at);
            tracker.layout.vmas.get(n).is_none_or(|v| v.start > **at)
        };
        wrong.extend(self.0.keys().filter(inside));
        Ok(wrong)
    }
}

/// Looks at it as it runs, and now and then at it standing still; then the copy
/// must be what it has.
pub fn run(how: Tracking, time: Duration, seed: &str, file: Option<&str>) -> Outcome {
    let words: Vec<&str> = ["restless", seed].into_iter().chain(file).collect();
    let subject = Subject::start(&words)?;
    let (mut tracker, _) = subject.follow(how)?;
    if file.is_some() && std::env::var_os("TRUST").is_none() {
        tracker.distrust();
    }
    let mut mirror = Mirror(BTreeMap::new());
    let begun = Instant::now();
    let (mut looks, mut compared) = (0, 0);
    while begun.elapsed() < time {
        for n in 0..4 {
            let found = tracker.look().map_err(text)?;
            mirror.take(&mut tracker, &found)?;
            looks += 1;
            std::thread::sleep(Duration::from_millis(n));
        }
        let stopped = Stopped::seize(subject.pid()).map_err(text)?;
        let found = tracker.last_look().map_err(text)?;
        mirror.take(&mut tracker, &found)?;
        tracker.owes().map_err(text)?;
        let wrong = mirror.compare(subject.pid(), &tracker)?;
        stopped.detach().map_err(text)?;
        compared += 1;
        if let Some(at) = wrong.first() {
            let n = wrong.len();
            return Err(format!(
                "{how}: {n} pages differ, the first {at:x}, after {looks} looks"
            ));
        }
    }
    println!("ok mirror {how}: {looks} looks, {compared} comparisons");
    Ok(())
}

/// Whether a look at a program standing still finds that it discarded a large piece
/// of its memory.
pub fn discarded(how: Tracking) -> Outcome {
    for pages in ["small", "huge"] {
        let mut subject = Subject::start(&["resident", "16", pages])?;
        let (mut tracker, _) = subject.follow(how)?;
        let mut mirror = Mirror(BTreeMap::new());
        for _ in 0..2 {
            let found = tracker.look().map_err(text)?;
            mirror.take(&mut tracker, &found)?;
        }
        subject.ask("discard")?;
        let stopped = Stopped::seize(subject.pid()).map_err(text)?;
        let found = tracker.last_look().map_err(text)?;
        mirror.take(&mut tracker, &found)?;
        let wrong = mirror.compare(subject.pid(), &tracker)?;
        stopped.detach().map_err(text)?;
        if let Some(at) = wrong.first() {
            let n = wrong.len();
            return Err(format!("{how}: {n} {pages} pages stayed, the first {at:x}"));
        }
    }
    Ok(())
}

/// Whether a look finds what another process writes into the program.
pub fn foreign(how: Tracking) -> Outcome {
    let mut subject = Subject::start(&["resident", "1", "small"])?;
    let at = subject.ask("where")?;
    let (mut tracker, _) = subject.follow(how)?;
    for _ in 0..2 {
        tracker.look().map_err(text)?;
    }
    let local = [std::io::IoSlice::new(&[7u8; 8])];
    let remote = [RemoteIoVec {
        base: at as usize + PAGE as usize,
        len: 8,
    }];
    process_vm_writev(Pid::from_raw(subject.pid()), &local, &remote).map_err(text)?;
    let found = tracker.look().map_err(text)?;
    let page = at + PAGE;
    match found.pages.iter().any(|r| r.contains(&page)) {
        true => println!("seen"),
        false => println!("unseen"),
    }
    Ok(())
}
