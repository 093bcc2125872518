//! Waits in one system call after another, and checks that each returns what it
//! must and when it must.

use lab::victim::{raw, run, Args, Mix};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

const CALLS: [&str; 8] = [
    "nanosleep",
    "clock_nanosleep",
    "clock_nanosleep_until",
    "poll",
    "ppoll",
    "select",
    "futex",
    "sigtimedwait",
];

/// More than it is moved within one wait.
const MOVES: u32 = 13;

static WAKE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn wake(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    raw::write_byte(WAKE.load(Ordering::Relaxed), 42);
}

fn main() -> ExitCode {
    run(|| {
        let args = Args::new(&["call", "ms", "rounds", "slack_ms"])?;
        let time = Duration::from_millis(args.number("ms", 500)?);
        let slack = Duration::from_millis(args.number("slack_ms", 500)?);
        let asked = args.text("call").unwrap_or("all");
        let (reader, writer) = nix::unistd::pipe().map_err(|e| format!("pipe: {e}"))?;
        let fd = reader.as_raw_fd();
        raw::set_mask(Some(1 << (libc::SIGUSR2 - 1))).map_err(|e| e.to_string())?;
        if asked == "read" {
            WAKE.store(writer.as_raw_fd(), Ordering::Relaxed);
            return wait_for_a_byte(fd);
        }
        let mut mix = Mix(1);
        let mut out = std::io::stdout();
        for round in 0..args.number("rounds", 1)? {
            for call in CALLS {
                if asked != "all" && asked != call {
                    continue;
                }
                let before = raw::clock(libc::CLOCK_MONOTONIC);
                let result = wait(call, fd, before, time);
                let took = raw::clock(libc::CLOCK_MONOTONIC).saturating_sub(before);
                let expected = match call {
                    "futex" => Err(libc::ETIMEDOUT),
                    "sigtimedwait" => Err(libc::EAGAIN),
                    _ => Ok(0),
                };
                if result != expected {
                    return Err(format!("{call} gave {result:?} after {took:?}"));
                }
                // A wait that the kernel ends with a hard EINTR is made again, and
                // its time begins anew: as often as the program is moved.
                let most = match call {
                    "sigtimedwait" => time * MOVES + slack,
                    _ => time + slack,
                };
                // poll counts in whole milliseconds.
                if took + Duration::from_millis(1) < time || took > most {
                    return Err(format!("{call} of {time:?} took {took:?}"));
                }
                let line = format!("{round} {call} {:016x}\n", mix.add(round));
                out.write_all(line.as_bytes()).map_err(|e| e.to_string())?;
            }
        }
        Ok(mix.0)
    })
}

fn wait(call: &str, fd: i32, now: Duration, time: Duration) -> Result<i64, i32> {
    let result = match call {
        "nanosleep" => raw::nanosleep(time),
        "clock_nanosleep" => raw::clock_nanosleep(false, time),
        "clock_nanosleep_until" => raw::clock_nanosleep(true, now + time),
        "poll" => raw::poll(fd, time),
        "ppoll" => raw::ppoll(fd, time),
        "select" => raw::select(fd, time),
        "futex" => raw::futex_wait(time),
        _ => raw::sigtimedwait(libc::SIGUSR2, time).map(|(signal, _)| signal),
    };
    result.map_err(|e| e.raw_os_error().unwrap_or(0))
}

/// Reads from an empty pipe until a SIGUSR1 from outside puts a byte in.
fn wait_for_a_byte(fd: i32) -> Result<u64, String> {
    raw::handle(libc::SIGUSR1, libc::SA_RESTART, wake).map_err(|e| e.to_string())?;
    println!("reading");
    match raw::read_byte(fd) {
        Ok((1, 42)) => Ok(42),
        other => Err(format!("read gave {other:?}")),
    }
}
