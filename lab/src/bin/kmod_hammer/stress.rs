//! Capture and restore while the tasks are frozen, thawed, stopped, traced,
//! killed and replaced by others at the same time.

use crate::mutate::Random;
use crate::raw;
use crate::victim::{module, CGROUP};
use lab::victim::restless::Arena;

use pmig::sys::{pidfd, ptrace};
use std::fs;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

type Outcome = Result<(), String>;

const SLOTS: usize = 7;
/// Kinds of tasks.
const KINDS: usize = 7;
/// After the slots: how often each thing was done.
const NAMES: [&str; 11] = [
    "captured",
    "not captured",
    "restored",
    "not restored",
    "traced and restored",
    "frozen",
    "stopped",
    "killed",
    "replaced",
    "listed",
    "looked for what was written",
];

type Shared = &'static [AtomicU64];

fn count(shared: Shared, name: &str) {
    if let Some(i) = NAMES.iter().position(|n| *n == name) {
        shared[SLOTS + i].fetch_add(1, SeqCst);
    }
}

fn slot_dir(slot: usize) -> String {
    format!("{CGROUP}/hammer-slot-{slot}")
}

fn kill(pid: i32, signal: nix::sys::signal::Signal) {
    if pid > 0 {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
    }
}

/// Runs this program again in one of the ways below.
fn exec_again() -> i32 {
    use std::os::unix::process::CommandExt;
    let error = std::process::Command::new("/proc/self/exe")
        .arg("again")
        .exec();
    error.raw_os_error().unwrap_or(1)
}

/// What `kmod_hammer again` does: exec once more, after a moment.
pub fn again() -> Outcome {
    std::thread::sleep(Duration::from_millis(2));
    Err(format!("exec: errno {}", exec_again()))
}

fn spawn(kind: usize) -> std::io::Result<i32> {
    raw::fork(|| match kind % KINDS {
        0 => loop {
            raw::pause();
        },
        1 => {
            raw::use_altstack(16 << 10);
            raw::handle(libc::SIGUSR1);
            loop {
                raw::exercise();
            }
        }
        2 => {
            raw::with_threads(3);
            0
        }
        3 => exec_again(),
        4 => loop {
            raw::vfork_and_wait(0);
        },
        // Huge pages, moves and discards beneath whoever looks.
        5 => match Arena::new(std::process::id().into(), None) {
            Ok(mut arena) => loop {
                if arena.step().is_err() {
                    return 1;
                }
            },
            Err(_) => 1,
        },
        _ => loop {
            std::thread::sleep(Duration::from_millis(2));
        },
    })
}

fn pick(shared: Shared, random: &mut Random) -> i32 {
    shared[random.below(SLOTS)].load(SeqCst) as i32
}

fn capturer(shared: Shared, mut random: Random, restores: bool) -> Outcome {
    let kmod = module()?;
    let all = kmod.capture_sections();
    let both = all & kmod.restore_sections();
    loop {
        let pid = pick(shared, &mut random);
        let Ok(fd) = pidfd::open(pid) else { continue };
        let Ok(pcb) = kmod.capture(fd.as_fd(), all) else {
            count(shared, "not captured");
            continue;
        };
        count(shared, "captured");
        if restores {
            let name = match kmod.restore(fd.as_fd(), &pcb, both, None) {
                Ok(()) => "restored",
                Err(_) => "not restored",
            };
            count(shared, name);
        } else if kmod.vmas(fd.as_fd()).is_ok() {
            count(shared, "listed");
        }
    }
}

/// Traces, captures, restores and lets go, as pmig does.
fn tracer(shared: Shared, mut random: Random) -> Outcome {
    let kmod = module()?;
    let both = kmod.capture_sections() & kmod.restore_sections();
    let reap = nix::sys::wait::WaitPidFlag::WNOHANG | nix::sys::wait::WaitPidFlag::__WALL;
    loop {
        let pid = pick(shared, &mut random);
        if let Ok(fd) = pidfd::open(pid) {
            if ptrace::seize(pid, 0).is_ok() {
                let _ = ptrace::interrupt(pid);
                let _ = ptrace::wait(pid, Duration::from_millis(20));
                if let Ok(pcb) = kmod.capture(fd.as_fd(), both) {
                    if kmod.restore(fd.as_fd(), &pcb, both, None).is_ok() {
                        count(shared, "traced and restored");
                    }
                }
                let _ = ptrace::detach(pid, 0);
            }
        }
        // Those that died while traced are reported here first.
        while let Ok(status) = nix::sys::wait::waitpid(None, Some(reap)) {
            if status == nix::sys::wait::WaitStatus::StillAlive {
                break;
            }
        }
    }
}

/// Looks for what was written, in ranges that are whole mappings or not, of tasks
/// that run or do not.
fn watcher(shared: Shared, mut random: Random) -> Outcome {
    let kmod = module()?;
    let mut words = vec![0; 40 << 10];
    loop {
        let pid = pick(shared, &mut random);
        let Ok(fd) = pidfd::open(pid) else { continue };
        let Ok(vmas) = kmod.vmas(fd.as_fd()) else {
            continue;
        };
        for vma in vmas {
            let skip = random.below(3) as u64 * 0x5000;
            let start = vma.start.saturating_sub(skip);
            let pages = ((vma.end - start) / 4096).min(words.len() as u64) as usize;
            let pages = pages.saturating_sub(random.below(3)).max(1);
            let clean = random.below(4) != 0;
            if kmod
                .written(fd.as_fd(), start, &mut words[..pages], clean)
                .is_ok()
            {
                count(shared, "looked for what was written");
            }
        }
    }
}

fn freezer(shared: Shared, mut random: Random) -> Outcome {
    loop {
        let file = format!("{}/cgroup.freeze", slot_dir(random.below(SLOTS)));
        if fs::write(&file, "1").is_ok() {
            count(shared, "frozen");
        }
        std::thread::sleep(Duration::from_millis(random.next() % 8));
        let _ = fs::write(&file, "0");
    }
}

fn stopper(shared: Shared, mut random: Random) -> Outcome {
    loop {
        let pid = pick(shared, &mut random);
        kill(pid, nix::sys::signal::Signal::SIGSTOP);
        count(shared, "stopped");
        std::thread::sleep(Duration::from_millis(random.next() % 8));
        kill(pid, nix::sys::signal::Signal::SIGCONT);
    }
}

fn killer(shared: Shared, mut random: Random) -> Outcome {
    loop {
        std::thread::sleep(Duration::from_millis(random.next() % 12));
        kill(pick(shared, &mut random), nix::sys::signal::Signal::SIGKILL);
        count(shared, "killed");
    }
}

fn replace(shared: Shared, slot: usize, kind: usize) -> Outcome {
    let pid = spawn(kind).map_err(|e| format!("fork: {e}"))?;
    // It may be dead already; then the next look replaces it.
    let _ = fs::write(format!("{}/cgroup.procs", slot_dir(slot)), pid.to_string());
    shared[slot].store(pid as u64, SeqCst);
    count(shared, "replaced");
    Ok(())
}

fn chaos(shared: Shared, seed: u64, seconds: u64, workers: &[i32]) -> Outcome {
    let mut random = Random(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    for slot in 0..SLOTS {
        replace(shared, slot, slot)?;
    }
    while Instant::now() < end {
        let flags = nix::sys::wait::WaitPidFlag::WNOHANG;
        use nix::sys::wait::WaitStatus::{Exited, Signaled};
        match nix::sys::wait::waitpid(None, Some(flags)) {
            Ok(Exited(pid, _) | Signaled(pid, ..)) => {
                if workers.contains(&pid.as_raw()) {
                    return Err("a worker ended before its time".into());
                }
                let dead = pid.as_raw() as u64;
                if let Some(slot) = (0..SLOTS).find(|s| shared[*s].load(SeqCst) == dead) {
                    replace(shared, slot, random.below(KINDS))?;
                }
            }
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    Ok(())
}

pub fn run(seconds: u64) -> Outcome {
    module()?;
    let shared = raw::shared_numbers(SLOTS + NAMES.len()).map_err(|e| format!("mmap: {e}"))?;
    for slot in 0..SLOTS {
        fs::create_dir_all(slot_dir(slot)).map_err(|e| format!("{}: {e}", slot_dir(slot)))?;
    }
    let seed = 0x9e37_79b9_7f4a_7c15u64;
    let works: [fn(Shared, Random) -> Outcome; 7] = [
        |s, r| capturer(s, r, false),
        |s, r| capturer(s, r, true),
        tracer,
        watcher,
        freezer,
        stopper,
        killer,
    ];
    let mut workers = Vec::new();
    for (i, work) in works.into_iter().enumerate() {
        let random = Random(seed.wrapping_mul(i as u64 + 1));
        let pid = raw::fork(|| {
            let _ = work(shared, random);
            i as i32
        });
        workers.push(pid.map_err(|e| format!("fork: {e}"))?);
    }
    let outcome = chaos(shared, seed, seconds, &workers);
    for pid in workers {
        kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
    for slot in 0..SLOTS {
        let _ = fs::write(format!("{}/cgroup.kill", slot_dir(slot)), "1");
        let _ = fs::write(format!("{}/cgroup.freeze", slot_dir(slot)), "0");
    }
    while nix::sys::wait::waitpid(None, None).is_ok() {}
    for slot in 0..SLOTS {
        let _ = fs::remove_dir(slot_dir(slot));
    }
    outcome?;
    for (i, name) in NAMES.iter().enumerate() {
        let n = shared[SLOTS + i].load(SeqCst);
        println!("{name}: {n}");
        if n < seconds && *name != "not restored" {
            return Err(format!("only {n} times {name} in {seconds} s"));
        }
    }
    println!("ok stress: {seconds} s");
    Ok(())
}
