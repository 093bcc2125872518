//! Arranges handlers, mask, alternative stack and queued signals, waits, and
//! checks that all of them are still what they were.

use lab::victim::{raw, run, Args, Mix, Pace};
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

static SEEN: AtomicU64 = AtomicU64::new(0);
static STACK: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    SEEN.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn on_stack(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Both the frame and its locals lie on the alternative stack.
    STACK.store(info as u64, Ordering::Relaxed);
}

/// Blocked signals with what is queued: signal, values, to the thread alone.
const QUEUED: [(i32, [u64; 3], bool); 3] = [
    (40, [11, 12, 13], false),
    (41, [0xffff_ffff_1234, 22, 23], true),
    (42, [31, 31, 31], false),
];
const ALTSTACK: usize = 64 * 1024;

type Snapshot = (Vec<[u64; 4]>, u64, u64, (u64, i32, usize));

fn snapshot() -> std::io::Result<Snapshot> {
    let actions = (1..=64)
        .filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal))
        .map(raw::action)
        .collect::<std::io::Result<Vec<_>>>()?;
    Ok((
        actions,
        raw::set_mask(None)?,
        raw::pending()?,
        raw::altstack()?,
    ))
}

fn arrange() -> std::io::Result<()> {
    raw::set_altstack(ALTSTACK)?;
    raw::handle(libc::SIGUSR1, libc::SA_RESTART | libc::SA_NODEFER, count)?;
    raw::handle(libc::SIGURG, libc::SA_ONSTACK, on_stack)?;
    raw::handle(43, libc::SA_RESETHAND, count)?;
    for signal in [libc::SIGHUP, libc::SIGTRAP, libc::SIGWINCH] {
        raw::ignore(signal);
    }
    let mut mask = 1 << (libc::SIGTERM - 1) | 1 << (libc::SIGCHLD - 1);
    for (signal, ..) in QUEUED {
        mask |= 1 << (signal - 1);
    }
    raw::set_mask(Some(mask))?;
    for (signal, values, thread) in QUEUED {
        for value in values {
            raw::queue(signal, value, thread)?;
        }
    }
    raw::kill_self(libc::SIGTERM)?;
    Ok(())
}

fn main() -> ExitCode {
    run(|| {
        let args = Args::new(&["lines", "pace_us"])?;
        let pace = Pace::new(&args, 10_000)?;
        let lines = args.number("lines", 400)?;
        arrange().map_err(|e| format!("arrange: {e}"))?;
        let before = snapshot().map_err(|e| format!("look: {e}"))?;
        let mut mix = Mix(1);
        let mut out = std::io::stdout();
        for number in 0..lines {
            raw::kill_self(libc::SIGUSR1).map_err(|e| e.to_string())?;
            pace.pass()?;
            let now = snapshot().map_err(|e| format!("look: {e}"))?;
            if now != before {
                return Err(differences(&before, &now));
            }
            let line = format!("{number} {:016x}\n", mix.add(number));
            out.write_all(line.as_bytes()).map_err(|e| e.to_string())?;
        }
        let seen = SEEN.load(Ordering::Relaxed);
        if seen != lines {
            return Err(format!("{seen} signals handled instead of {lines}"));
        }
        take_queued(&mut mix)?;
        handle_on_stack()?;
        Ok(mix.0)
    })
}

fn differences(before: &Snapshot, now: &Snapshot) -> String {
    let actions = before.0.iter().zip(&now.0).enumerate();
    let changed = actions
        .filter(|(_, (before, now))| before != now)
        .map(|(index, (before, now))| format!("action {index}: {before:x?} -> {now:x?}; "))
        .collect::<String>();
    format!(
        "{changed}mask {:x} -> {:x}, pending {:x} -> {:x}, stack {:x?} -> {:x?}",
        before.1, now.1, before.2, now.2, before.3, now.3
    )
}

fn take_queued(mix: &mut Mix) -> Result<(), String> {
    for (signal, values, _) in QUEUED {
        for value in values {
            let (number, info) = raw::sigtimedwait(signal, Duration::ZERO)
                .map_err(|e| format!("signal {signal} with {value:x} is gone: {e}"))?;
            let found = raw::value(&info);
            if (number, found, info.si_code) != (i64::from(signal), value, libc::SI_QUEUE) {
                return Err(format!(
                    "signal {number} code {} with {found:x} instead of {signal} with {value:x}",
                    info.si_code
                ));
            }
            mix.add(found);
        }
    }
    let (_, info) = raw::sigtimedwait(libc::SIGTERM, Duration::ZERO)
        .map_err(|e| format!("SIGTERM is gone: {e}"))?;
    if info.si_code != libc::SI_USER {
        return Err(format!("SIGTERM came with code {}", info.si_code));
    }
    Ok(())
}

fn handle_on_stack() -> Result<(), String> {
    let (stack, ..) = raw::altstack().map_err(|e| e.to_string())?;
    raw::kill_self(libc::SIGURG).map_err(|e| e.to_string())?;
    let at = STACK.load(Ordering::Relaxed);
    if !(stack..stack + ALTSTACK as u64).contains(&at) {
        return Err(format!("handled at {at:x}, the stack is at {stack:x}"));
    }
    Ok(())
}
