//! Watches its clocks: none may step back or leap, and the vdso and the system
//! call must agree.

use lab::victim::{raw, run, Args, Mix, Pace};
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

const CLOCKS: [(i32, &str); 4] = [
    (libc::CLOCK_MONOTONIC, "monotonic"),
    (libc::CLOCK_BOOTTIME, "boottime"),
    (libc::CLOCK_MONOTONIC_RAW, "monotonic raw"),
    (libc::CLOCK_MONOTONIC_COARSE, "monotonic coarse"),
];

fn main() -> ExitCode {
    run(|| {
        let args = Args::new(&["lines", "pace_us", "leap_ms"])?;
        let pace = Pace::new(&args, 10_000)?;
        let leap = Duration::from_millis(args.number("leap_ms", 1500)?);
        let mut last = CLOCKS.map(|(id, _)| raw::clock(id));
        let mut mix = Mix(1);
        let mut out = std::io::stdout();
        for number in 0..args.number("lines", 400)? {
            let pause = pace.pause() / 20;
            // Many looks a line, so that a step between two of them is seen.
            for _ in 0..20 {
                for (last, (id, name)) in last.iter_mut().zip(CLOCKS) {
                    look(id, name, last, leap)?;
                }
                raw::nanosleep(pause).map_err(|e| format!("nanosleep: {e}"))?;
            }
            let line = format!("{number} {:016x}\n", mix.add(number));
            out.write_all(line.as_bytes()).map_err(|e| e.to_string())?;
        }
        Ok(mix.0)
    })
}

fn look(id: i32, name: &str, last: &mut Duration, leap: Duration) -> Result<(), String> {
    for (way, now) in [
        ("vdso", raw::clock(id)),
        ("call", raw::clock_by_call(id)),
        ("vdso", raw::clock(id)),
    ] {
        // The coarse clock moves once a tick, the others with every look.
        match now.checked_sub(*last) {
            None => return Err(format!("{name} went from {last:?} to {now:?} by {way}")),
            Some(step) if step > leap => {
                return Err(format!("{name} leapt by {step:?} by {way}"));
            }
            Some(_) => *last = now,
        }
    }
    Ok(())
}
