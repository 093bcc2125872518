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

use nix::time::{clock_gettime, ClockId};
use serde::{Deserialize, Serialize};

use super::words::{bytes_of, u64_at};
use crate::error::{Error, Obstacle, Result};
use crate::proc;
use crate::proc::sched::{InCall, Sched};
use crate::proc::timers::{self, Sleeper};
use crate::sys::ptrace::Regs;
use crate::tracee::{Primed, RemoteAddr, Stopped, DATA};

/// "Make the call again unless a handler runs" and "go on with the restart
/// block" (include/linux/errno.h, not for user space).
const ERESTARTNOHAND: i64 = -514;
pub const ERESTART_RESTARTBLOCK: i64 = -516;

pub(super) const NANOSLEEP: i64 = libc::SYS_nanosleep;
pub(super) const CLOCK_NANOSLEEP: i64 = libc::SYS_clock_nanosleep;
pub(super) const POLL: i64 = libc::SYS_poll;
pub(super) const FUTEX: i64 = libc::SYS_futex;
pub(super) const RESTART: i64 = libc::SYS_restart_syscall;

/// FUTEX_WAIT and FUTEX_WAIT_BITSET without their flags.
const FUTEX_WAIT: u64 = 0;
const FUTEX_WAIT_BITSET: u64 = 9;
const FUTEX_COMMAND: u64 = 0x7f;
const TIMER_ABSTIME: u64 = 1;
const SECOND: i64 = 1_000_000_000;
/// Sleeps that the scheduler's clock measures well enough.
const SHORT: i64 = 50_000_000;

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

/// What was seen of a process just before a stop.
#[derive(Debug, Clone)]
struct Look {
    /// `None`: it ran.
    call: Option<InCall>,
    sched: Sched,
    /// The kernel function it sleeps in (`/proc/PID/wchan`), for a call that
    /// was restarted and does not tell its own number any more.
    place: String,
    /// The machine's timers, where one may be its own.
    timers: Option<Vec<Sleeper>>,
}

/// What the deadline of a wait was found to be, and the state of the process
/// when it was let go on in it.
#[derive(Debug, Clone, Copy)]
struct Known {
    restart: Restart,
    voluntary_switches: u64,
    stack: u64,
    instruction: u64,
}

/// Follows a process through its stops, so that the deadline of a sleep is
/// known at each. Without it, or where something else stopped the process in
/// between, some relative waits cannot be taken over.
///
/// The order around each stop: [`Watch::before`], `Stopped::seize`,
/// [`Watch::stopped`] before any batch runs, [`Watch::going_on`] right before
/// the process is let go on.
#[derive(Debug, Default)]
pub struct Watch {
    look: Option<Look>,
    known: Option<Known>,
    now: Option<Restart>,
    idle: bool,
}

impl Watch {
    pub fn new() -> Watch {
        Watch::default()
    }

    /// One that does nothing: the kernel module knows deadlines by itself.
    pub fn idle() -> Watch {
        Watch {
            idle: true,
            ..Watch::default()
        }
    }

    /// Looks at the running process; cheap, and stops nothing.
    pub fn before(&mut self, pid: i32) {
        if !self.idle {
            self.look = look(pid);
        }
    }

    /// Works out the deadline of the wait that the stop interrupted, if one
    /// did. The clock is the program's at the source.
    ///
    /// # Errors
    /// [`Error::Gone`]; memory that cannot be read.
    pub fn stopped(&mut self, stopped: &Stopped, clock: ProgramClock) -> Result<()> {
        let regs = stopped.regs();
        self.now = None;
        if regs.rax as i64 == ERESTART_RESTARTBLOCK && !self.idle {
            self.now = self.find(stopped, &regs, clock)?;
        }
        Ok(())
    }

    fn find(&self, stopped: &Stopped, regs: &Regs, clock: ProgramClock) -> Result<Option<Restart>> {
        let now = clock.now();
        let args = args_of(regs);
        let call = match regs.orig_rax as i64 {
            RESTART => {
                if let Some(restart) = self.remembered() {
                    return Ok(Some(restart));
                }
                match self.look.as_ref().and_then(|l| guess(&l.place, &args)) {
                    Some(call) => call,
                    None => return Ok(None),
                }
            }
            call => call,
        };
        let timed = |deadline: Option<i64>| {
            Ok(deadline.map(|deadline| {
                Restart::Timed(Timed {
                    call,
                    args,
                    deadline,
                })
            }))
        };
        let wait = match wait(call, &args) {
            None => return Ok(None),
            Some(Wait::Registers) => return Ok(Some(Restart::Again(call))),
            // The kernel has just written there what was left at the stop.
            Some(Wait::Relative { left, .. }) if left != 0 => {
                let left = read_time(stopped, left)?;
                return timed(left.map(|left| now.saturating_add(left)));
            }
            Some(Wait::Relative { asked, .. }) => read_time(stopped, asked)?,
            Some(Wait::Milliseconds(ms)) => Some(ms as i64 * 1_000_000),
        };
        let (Some(wait), Some(look), Ok(after)) =
            (wait, self.look.as_ref(), Sched::read(stopped.pid()))
        else {
            return Ok(None);
        };
        if !continuous(look, regs, &after) {
            // It went to sleep after the look, a moment ago: late by no more
            // than that. A restarted call may be older.
            let fresh = call == regs.orig_rax as i64;
            return timed(fresh.then(|| now.saturating_add(wait)));
        }
        // Of a restarted call this is not the beginning.
        let slept = (call == regs.orig_rax as i64)
            .then(|| after.exec_start.saturating_sub(look.sched.exec_start) as i64);
        let estimate = slept.map(|s| now.saturating_sub(s).saturating_add(wait));
        let same_clock = after.migrations == look.sched.migrations;
        if same_clock && slept.is_some_and(|s| s <= SHORT) {
            return timed(estimate);
        }
        let left = timers::sleepers();
        // What has ended by itself meanwhile did not vanish with the sleep.
        let range = clock.now() - clock.offset..now.saturating_add(wait) - clock.offset;
        let found: Vec<i64> = vanished(look.timers.as_deref(), left.as_deref(), range)
            .into_iter()
            .map(|ends| ends.saturating_add(clock.offset))
            .collect();
        let slept = slept.unwrap_or(0);
        timed(choose(&found, estimate, same_clock, slept))
    }

    /// The wait as found at the stop before, if this is still the same one: the
    /// process has gone to sleep just once since.
    fn remembered(&self) -> Option<Restart> {
        let (k, look) = (self.known?, self.look.as_ref()?);
        let call = look.call?;
        (call.number == RESTART
            && look.sched.voluntary_switches == k.voluntary_switches + 1
            && (call.stack, call.instruction) == (k.stack, k.instruction))
            .then_some(k.restart)
    }

    /// Remembers the wait for the next stop; `stopped` is settled by it, and
    /// no batch may follow.
    ///
    /// # Errors
    /// Those of [`Stopped::settle`].
    pub fn going_on(&mut self, stopped: &mut Stopped) -> Result<()> {
        if self.idle {
            return Ok(());
        }
        stopped.settle()?;
        let regs = stopped.regs();
        self.known = self.now.take().and_then(|restart| {
            Some(Known {
                restart,
                voluntary_switches: Sched::read(stopped.pid()).ok()?.voluntary_switches,
                stack: regs.rsp,
                instruction: regs.rip,
            })
        });
        Ok(())
    }
}

fn look(pid: i32) -> Option<Look> {
    let call = InCall::read(pid).ok()?;
    let sched = Sched::read(pid).ok()?;
    let number = call.map_or(-1, |c| c.number);
    let place = match number {
        RESTART => proc::text(pid, "wchan").unwrap_or_default(),
        _ => String::new(),
    };
    let timers = [NANOSLEEP, CLOCK_NANOSLEEP, POLL, FUTEX, RESTART]
        .contains(&number)
        .then(timers::sleepers)
        .flatten();
    Some(Look {
        call,
        sched,
        place,
        timers,
    })
}

/// Whether the process slept in the call of `regs` from the look to the stop.
fn continuous(look: &Look, regs: &Regs, after: &Sched) -> bool {
    look.call.is_some_and(|call| {
        call.number == regs.orig_rax as i64
            && call.stack == regs.rsp
            && call.instruction == regs.rip
            && call.args == args_of(regs)
    }) && after.voluntary_switches == look.sched.voluntary_switches + 1
}

/// The end of a wait, out of the timers that vanished with it and what the
/// scheduler's clock says, which is off by interrupts and stolen time (and
/// says nothing where the process changed its CPU).
fn choose(found: &[i64], estimate: Option<i64>, same_clock: bool, slept: i64) -> Option<i64> {
    let Some(e) = estimate else {
        return match found {
            [one] => Some(*one),
            _ => None,
        };
    };
    let nearest = found.iter().copied().min_by_key(|f| f.abs_diff(e));
    let bearable = (SHORT / 2 + slept / 4).unsigned_abs();
    match nearest {
        Some(n) if !same_clock || n.abs_diff(e) <= bearable => Some(n),
        _ => same_clock.then_some(e),
    }
}

/// When the timers end that are not there any more without having ended: the
/// sleep's own, and those of whoever else was woken early in the same moment.
fn vanished(
    before: Option<&[Sleeper]>,
    after: Option<&[Sleeper]>,
    range: std::ops::Range<i64>,
) -> Vec<i64> {
    let (Some(before), Some(after)) = (before, after) else {
        return Vec::new();
    };
    before
        .iter()
        .filter(|t| range.contains(&t.ends) && !after.contains(t))
        .map(|t| t.ends)
        .collect()
}

pub(super) fn args_of(r: &Regs) -> [u64; 6] {
    [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9]
}

/// What a call waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
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
pub(super) fn wait(call: i64, args: &[u64; 6]) -> Option<Wait> {
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
pub(super) fn guess(place: &str, args: &[u64; 6]) -> Option<i64> {
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

fn read_time(stopped: &Stopped, at: u64) -> Result<Option<i64>> {
    let mut t = [0u8; 16];
    stopped.read(RemoteAddr(at), &mut t)?;
    Ok(nanoseconds(&t))
}

/// Relative sleeps on clocks that all advance alike while the machine is up:
/// CLOCK_REALTIME (0), MONOTONIC (1), BOOTTIME (7), TAI (11).
fn relative_clock(args: &[u64; 6]) -> bool {
    args[1] & TIMER_ABSTIME == 0 && matches!(args[0], 0 | 1 | 7 | 11)
}

fn nanoseconds(timespec: &[u8; 16]) -> Option<i64> {
    let (s, ns) = (u64_at(timespec, 0) as i64, u64_at(timespec, 8) as i64);
    if s < 0 || !(0..SECOND).contains(&ns) {
        return None;
    }
    Some(s.saturating_mul(SECOND).saturating_add(ns))
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

    pub(super) fn unknown(regs: &Regs, remedy: &str) -> Obstacle {
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
    pub(super) fn with(&self, regs: &Regs) -> Result<(Regs, Option<&Timed>)> {
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
        match stopped.prime(timed.call, args, &data)? {
            Primed::Armed => {}
            Primed::Finished(result) => {
                // It is due: the program gets the result the kernel gave.
                regs.rax = result as u64;
                regs.orig_rax = u64::MAX;
            }
        }
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
    fn a_time_that_is_none_waits_for_nothing_known() {
        let ts = |s: i64, ns: i64| {
            let b = bytes_of(&[s as u64, ns as u64]);
            <[u8; 16]>::try_from(b.as_slice()).unwrap()
        };
        assert_eq!(nanoseconds(&ts(1, 5)), Some(SECOND + 5));
        assert_eq!(nanoseconds(&ts(-1, 5)), None);
        assert_eq!(nanoseconds(&ts(1, SECOND)), None);
        assert_eq!(nanoseconds(&ts(i64::MAX, 5)), Some(i64::MAX));
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

    #[test]
    fn of_several_ends_the_likely_one_is_chosen() {
        let second = SECOND;
        // Of a restarted call nothing is known but its timer.
        assert_eq!(choose(&[7], None, true, 0), Some(7));
        assert_eq!(choose(&[7, 9], None, true, 0), None);
        assert_eq!(choose(&[], None, true, 0), None);
        let near = second + SHORT / 10;
        assert_eq!(choose(&[5, near], Some(second), true, 0), Some(near));
        assert_eq!(choose(&[5], Some(second), true, 0), Some(second));
        assert_eq!(choose(&[5], Some(second), false, 0), Some(5));
        assert_eq!(choose(&[], Some(second), false, 0), None);
    }

    #[test]
    fn only_an_unbroken_sleep_counts() {
        let regs = Regs {
            orig_rax: NANOSLEEP as u64,
            rsp: 7,
            rip: 8,
            rdi: 9,
            ..Regs::default()
        };
        let look = Look {
            call: Some(InCall {
                number: NANOSLEEP,
                args: args_of(&regs),
                stack: 7,
                instruction: 8,
            }),
            sched: Sched {
                exec_start: 1,
                voluntary_switches: 4,
                migrations: 0,
            },
            place: String::new(),
            timers: None,
        };
        let after = |voluntary_switches| Sched {
            exec_start: 2,
            voluntary_switches,
            migrations: 0,
        };
        assert!(continuous(&look, &regs, &after(5)));
        assert!(!continuous(&look, &regs, &after(6)));
        assert!(!continuous(&look, &Regs { rdi: 1, ..regs }, &after(5)));
    }
}
