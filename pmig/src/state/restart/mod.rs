//! A system call that the stop interrupted, and how it goes on.
//!
//! Most calls go on by their registers alone: the kernel makes them again. A
//! relative wait cannot, it would start afresh: the kernel keeps its deadline
//! in a restart block, which no file shows. Here it is worked out, from best
//! to worst:
//!
//! - the sleep wrote what is left of it where the program asked for that;
//! - it was known at the stop before, and the process still sleeps in it;
//! - of the machine's timers, one vanished with the sleep;
//! - the scheduler knows when the process fell asleep, by a clock that leaves
//!   out interrupts and stolen time and differs between CPUs: good enough for
//!   short sleeps.
//!
//! It is carried in the program's own monotonic time, which goes on across a
//! move, and put into a restart block again by making the call with what is
//! left of it.

mod watch;

use nix::time::{clock_gettime, ClockId};
use serde::{Deserialize, Serialize};

pub use watch::Watch;

use super::words::{bytes_of, u64_at};
use crate::error::{Error, Obstacle, Result};
use crate::sys::ptrace::Regs;
use crate::tracee::{Primed, RemoteAddr, Stopped, DATA};

/// "Make the call again unless a handler runs" and "go on with the restart
/// block" (include/linux/errno.h, not for user space).
const ERESTARTNOHAND: i64 = -514;
pub const ERESTART_RESTARTBLOCK: i64 = -516;

pub(in crate::state) const NANOSLEEP: i64 = libc::SYS_nanosleep;
pub(in crate::state) const CLOCK_NANOSLEEP: i64 = libc::SYS_clock_nanosleep;
pub(in crate::state) const POLL: i64 = libc::SYS_poll;
pub(in crate::state) const FUTEX: i64 = libc::SYS_futex;
pub(in crate::state) const RESTART: i64 = libc::SYS_restart_syscall;

/// FUTEX_WAIT and FUTEX_WAIT_BITSET without their flags.
const FUTEX_WAIT: u64 = 0;
const FUTEX_WAIT_BITSET: u64 = 9;
const FUTEX_COMMAND: u64 = 0x7f;
const TIMER_ABSTIME: u64 = 1;
const SECOND: i64 = 1_000_000_000;

/// How an interrupted call goes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Restart {
    /// By the registers, or there is none.
    #[default]
    Registers,
    /// By making the call of this number again: it had a restart block, and
    /// needs none, since its arguments name its end or it has none.
    Again(i64),
    /// By a restart block, until a deadline.
    Timed(Timed),
}

/// A relative wait in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timed {
    /// nanosleep, clock_nanosleep, poll or futex, by number.
    pub call: i64,
    pub args: [u64; 6],
    /// When it ends, in ns of the program's CLOCK_MONOTONIC.
    pub deadline: i64,
}

/// The program's CLOCK_MONOTONIC: this machine's, shifted by a time namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProgramClock {
    /// The program's clock minus this machine's, in ns.
    pub offset: i64,
}

impl ProgramClock {
    /// What the program would read now, in ns.
    pub fn now(&self) -> i64 {
        clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| {
            t.tv_sec()
                .saturating_mul(SECOND)
                .saturating_add(t.tv_nsec())
                .saturating_add(self.offset)
        })
    }
}

pub(in crate::state) fn args_of(r: &Regs) -> [u64; 6] {
    [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9]
}

/// What a call waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::state) enum Wait {
    /// Its registers say it whenever it is made: for ever, or until an
    /// absolute time.
    Registers,
    /// A timespec at `asked`; what is left of it is written to `left` when the
    /// sleep is interrupted (0: nowhere).
    Relative {
        asked: u64,
        left: u64,
    },
    Milliseconds(i32),
}

/// `None` where it is none of the calls known here.
pub(in crate::state) fn wait(call: i64, args: &[u64; 6]) -> Option<Wait> {
    let command = args[1] & FUTEX_COMMAND;
    match call {
        NANOSLEEP => Some(Wait::Relative {
            asked: args[0],
            left: args[1],
        }),
        CLOCK_NANOSLEEP if relative_clock(args) => Some(Wait::Relative {
            asked: args[2],
            left: args[3],
        }),
        POLL => Some(match args[2] as i32 {
            ms if ms < 0 => Wait::Registers,
            ms => Wait::Milliseconds(ms),
        }),
        FUTEX if command == FUTEX_WAIT_BITSET => Some(Wait::Registers),
        FUTEX if command == FUTEX_WAIT && args[3] != 0 => Some(Wait::Relative {
            asked: args[3],
            left: 0,
        }),
        _ => None,
    }
}

/// Which call was restarted, by the kernel function it sleeps in. Those of the
/// sleeps themselves count as scheduling, which leaves the one that made the
/// call. The two sleeps are told apart by their first argument: no timespec
/// lies at 0 to 11.
pub(in crate::state) fn guess(place: &str, args: &[u64; 6]) -> Option<i64> {
    let sleep = if relative_clock(args) {
        CLOCK_NANOSLEEP
    } else {
        NANOSLEEP
    };
    match place {
        p if p.contains("poll") => Some(POLL),
        p if p.contains("futex") => Some(FUTEX),
        p if p.contains("cpu_n") => None,
        "do_syscall_64" | "x64_sys_call" => Some(sleep),
        p if p.contains("nanosleep") || p.contains("restart_syscall") => Some(sleep),
        _ => None,
    }
}

/// Relative sleeps on clocks that all advance alike while the machine is up:
/// CLOCK_REALTIME (0), MONOTONIC (1), BOOTTIME (7), TAI (11).
fn relative_clock(args: &[u64; 6]) -> bool {
    args[1] & TIMER_ABSTIME == 0 && matches!(args[0], 0 | 1 | 7 | 11)
}

impl Restart {
    /// # Errors
    /// [`Error::Refused`] where the process waits until a moment that cannot
    /// be found out.
    pub fn capture(stopped: &Stopped, watch: &Watch) -> Result<Restart> {
        let regs = stopped.regs();
        if regs.rax as i64 != ERESTART_RESTARTBLOCK {
            return Ok(Restart::Registers);
        }
        match watch.now {
            Some(restart) => Ok(restart),
            None => Err(Error::Refused(vec![Restart::unknown(
                &regs,
                "try again when the program is elsewhere, or load pmig.ko",
            )])),
        }
    }

    pub(in crate::state) fn unknown(regs: &Regs, remedy: &str) -> Obstacle {
        Obstacle::new(
            format!("system call {}", regs.orig_rax as i64),
            "it waits until a moment that the kernel does not tell",
            remedy,
        )
    }

    /// What [`Restart::restore`] or the kernel module is to put in place, if
    /// anything, and the registers that go with it.
    ///
    /// # Errors
    /// [`Error::Bad`] where registers and restart do not go together.
    pub(in crate::state) fn with(&self, regs: &Regs) -> Result<(Regs, Option<&Timed>)> {
        let mut regs = *regs;
        let blocked = regs.rax as i64 == ERESTART_RESTARTBLOCK;
        match self {
            Restart::Registers if !blocked => Ok((regs, None)),
            Restart::Again(call) if blocked && *call >= 0 => {
                // As with a restart block, a handler ends the call with EINTR.
                regs.rax = ERESTARTNOHAND as u64;
                regs.orig_rax = *call as u64;
                Ok((regs, None))
            }
            Restart::Timed(timed) if blocked => Ok((regs, Some(timed))),
            _ => Err(Error::bad("interrupted call", "does not fit its registers")),
        }
    }

    /// Whether [`Restart::restore`] has the kernel look at what the program's
    /// arguments point to: of a sleep it looks only at the time that is left,
    /// which is ours.
    pub(in crate::state) fn reads_memory(&self) -> bool {
        match self {
            Restart::Timed(t) => !matches!(t.call, NANOSLEEP | CLOCK_NANOSLEEP),
            Restart::Registers | Restart::Again(_) => false,
        }
    }

    /// Puts everything in place so that the program goes on where it was:
    /// returns the registers it is to have. Nothing more may be done inside
    /// the process after it.
    ///
    /// # Errors
    /// [`Error::Bad`] for a call that is none of those above; ptrace's own.
    pub fn restore(&self, stopped: &mut Stopped, regs: &Regs, clock: ProgramClock) -> Result<Regs> {
        let (mut regs, timed) = self.with(regs)?;
        let Some(timed) = timed else {
            return Ok(regs);
        };
        let (args, data) = timed.remaining(clock.now())?;
        // There the kernel writes what is left when we end the sleep.
        let left = match wait(timed.call, &timed.args) {
            Some(Wait::Relative { left, .. }) if left != 0 => Some(RemoteAddr(left)),
            _ => None,
        };
        let mut before = [0; 16];
        let left = left.filter(|at| stopped.read(*at, &mut before).is_ok());
        match stopped.prime(timed.call, args, &data)? {
            Primed::Armed => {}
            Primed::Finished(result) => {
                // It is due: the program gets the result the kernel gave.
                regs.rax = result as u64;
                regs.orig_rax = u64::MAX;
            }
        }
        // All memory is as it came: only changes of it may still come.
        left.map_or(Ok(()), |at| stopped.write(at, &before))?;
        Ok(regs)
    }
}

impl Timed {
    /// The call with what is left of its time, and the data for [`DATA`].
    fn remaining(&self, now: i64) -> Result<([u64; 6], Vec<u8>)> {
        let left = self.deadline.saturating_sub(now).max(0);
        let mut args = self.args;
        let place = match (wait(self.call, &args), self.call) {
            (Some(Wait::Milliseconds(_)), _) => {
                // Rounded up: a wait may end late, never early.
                let ms = left.saturating_add(999_999) / 1_000_000;
                args[2] = ms.min(i32::MAX as i64) as u64;
                return Ok((args, Vec::new()));
            }
            (Some(Wait::Relative { .. }), NANOSLEEP) => 0,
            (Some(Wait::Relative { .. }), CLOCK_NANOSLEEP) => 2,
            (Some(Wait::Relative { .. }), _) => 3,
            _ => {
                return Err(Error::bad(
                    "interrupted call",
                    format!("system call {} has no restart block", self.call),
                ))
            }
        };
        args[place] = DATA;
        Ok((
            args,
            bytes_of(&[(left / SECOND) as u64, (left % SECOND) as u64]),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timed(call: i64, args: [u64; 6], deadline: i64) -> Timed {
        Timed {
            call,
            args,
            deadline,
        }
    }

    #[test]
    fn a_sleep_has_what_is_left() {
        let t = timed(NANOSLEEP, [10, 20, 0, 0, 0, 0], 5 * SECOND);
        let (args, data) = t.remaining(2 * SECOND - 1).unwrap();
        assert_eq!((args[0], args[1]), (DATA, 20));
        assert_eq!((u64_at(&data, 0), u64_at(&data, 8)), (3, 1));
        let (_, data) = t.remaining(9 * SECOND).unwrap();
        assert_eq!((u64_at(&data, 0), u64_at(&data, 8)), (0, 0));
    }

    #[test]
    fn poll_is_never_early() {
        let t = timed(POLL, [1, 2, 500, 0, 0, 0], 1_000_001);
        assert_eq!(t.remaining(0).unwrap().0[2], 2);
        let t = timed(POLL, [0; 6], i64::MAX);
        assert_eq!(t.remaining(0).unwrap().0[2], i32::MAX as u64);
    }

    #[test]
    fn registers_and_restart_go_together() {
        let blocked = Regs {
            rax: ERESTART_RESTARTBLOCK as u64,
            orig_rax: RESTART as u64,
            ..Regs::default()
        };
        let (regs, none) = Restart::Again(FUTEX).with(&blocked).unwrap();
        assert_eq!((regs.rax as i64, regs.orig_rax as i64), (-514, FUTEX));
        assert!(none.is_none());
        let sleep = Restart::Timed(timed(NANOSLEEP, [0; 6], 1));
        assert!(sleep.with(&blocked).unwrap().1.is_some());
        assert!(Restart::Registers.with(&blocked).is_err());
        assert!(sleep.with(&Regs::default()).is_err());
        assert!(Restart::Again(-1).with(&blocked).is_err());
        assert!(Restart::Registers.with(&Regs::default()).is_ok());
    }

    #[test]
    fn other_calls_are_refused() {
        for (call, args) in [
            (libc::SYS_execve, [0; 6]),
            (CLOCK_NANOSLEEP, [1, TIMER_ABSTIME, 0, 0, 0, 0]),
            (CLOCK_NANOSLEEP, [3, 0, 0, 0, 0, 0]),
            (FUTEX, [0, 1, 0, 0, 0, 0]),
            (FUTEX, [0, FUTEX_WAIT_BITSET, 0, 1, 0, 0]),
            (POLL, [0, 0, u32::MAX as u64, 0, 0, 0]),
        ] {
            assert!(timed(call, args, 1).remaining(0).is_err(), "{call}");
        }
    }

    #[test]
    fn a_restarted_call_is_known_by_its_place() {
        let sleep = [0x7ffe_0000, 0, 0, 0, 0, 0];
        assert_eq!(guess("hrtimer_nanosleep", &sleep), Some(NANOSLEEP));
        assert_eq!(
            guess("hrtimer_nanosleep", &[1, 0, 9, 0, 0, 0]),
            Some(CLOCK_NANOSLEEP)
        );
        assert_eq!(guess("do_poll.constprop.0", &sleep), Some(POLL));
        assert_eq!(guess("futex_wait_queue", &sleep), Some(FUTEX));
        assert_eq!(guess("do_syscall_64", &sleep), Some(NANOSLEEP));
        assert_eq!(guess("do_cpu_nanosleep", &sleep), None);
        assert_eq!(guess("0", &sleep), None);
    }

    #[test]
    fn the_clock_is_shifted() {
        let (host, ahead) = (
            ProgramClock::default().now(),
            ProgramClock { offset: SECOND }.now(),
        );
        assert!((ahead - host - SECOND).abs() < SECOND / 2);
    }
}
