//! `/proc/timer_list`: the sleepers' timers, the only file that tells when a
//! sleep ends. It does not say whose a timer is, but its timers vanish with
//! the sleep.

use std::fs::File;
use std::io::Read;

/// A machine with thousands of CPUs shows less.
const LIMIT: u64 = 64 << 20;
/// The function of a timer that wakes a sleeper (kernel/time/hrtimer.c).
const WAKES: &str = "hrtimer_wakeup,";

/// A timer that will wake a sleeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sleeper {
    /// A hash of where the timer lies in the kernel.
    place: u64,
    /// When it ends at the earliest, in ns of CLOCK_MONOTONIC.
    pub ends: i64,
}

/// All sleepers' timers; `None` where the kernel does not show them.
pub fn sleepers() -> Option<Vec<Sleeper>> {
    let mut text = String::new();
    File::open("/proc/timer_list")
        .ok()?
        .take(LIMIT)
        .read_to_string(&mut text)
        .ok()?;
    Some(parse(&text))
}

fn parse(text: &str) -> Vec<Sleeper> {
    let mut all = Vec::new();
    let mut offset = 0i64;
    let mut place = None;
    for line in text.lines().map(str::trim) {
        if let Some(o) = line.strip_prefix(".offset:") {
            // Of the clock that follows, against CLOCK_MONOTONIC.
            offset = first_number(o).unwrap_or(0);
        } else if line.starts_with('#') && line.contains('<') {
            place = line
                .contains(WAKES)
                .then(|| {
                    let (_, rest) = line.split_once('<')?;
                    u64::from_str_radix(rest.split_once('>')?.0, 16).ok()
                })
                .flatten();
        } else if let Some(times) = line.strip_prefix("# expires at ") {
            if let (Some(place), Some(ends)) = (place.take(), first_number(times)) {
                all.push(Sleeper {
                    place,
                    ends: ends.saturating_sub(offset),
                });
            }
        }
    }
    all
}

fn first_number(text: &str) -> Option<i64> {
    let text = text.trim_start();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Timer List Version: v0.10\n\
        now at 1626183156146 nsecs\n\
        cpu: 0\n clock 0:\n  .offset:     0 nsecs\nactive timers:\n\
        \x20#0: <0000000023f824d7>, tick_nohz_handler, S:01\n\
        \x20# expires at 1626184000000-1626184000000 nsecs [in 1 to 1 nsecs]\n\
        \x20#1: <00000000507b8b5d>, hrtimer_wakeup, S:01\n\
        \x20# expires at 1626231234077-1626231296076 nsecs [in 2 to 3 nsecs]\n\
        \x20clock 1:\n  .offset:     1000 nsecs\nactive timers:\n\
        \x20#0: <0000000000000007>, hrtimer_wakeup, S:01\n\
        \x20# expires at 5000-6000 nsecs [in 2 to 3 nsecs]\n";

    #[test]
    fn only_sleepers_are_listed_in_monotonic_time() {
        assert_eq!(
            parse(TEXT),
            vec![
                Sleeper {
                    place: 0x507b_8b5d,
                    ends: 1_626_231_234_077
                },
                Sleeper {
                    place: 7,
                    ends: 4000
                },
            ]
        );
    }

    #[test]
    fn nonsense_is_nothing() {
        assert!(
            parse("#0: <zz>, hrtimer_wakeup, S\n# expires at x\n# expires at 1-2\n").is_empty()
        );
    }

    #[test]
    fn the_kernel_shows_them() {
        if nix::unistd::geteuid().is_root() {
            assert!(sleepers().is_some());
        }
    }
}
