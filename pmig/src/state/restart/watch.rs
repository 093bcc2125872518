//! When an interrupted wait ends, worked out from outside.

use super::*;
use crate::proc;
use crate::proc::sched::{InCall, Sched};
use crate::proc::timers::{self, Sleeper};
use crate::tracee::RemoteAddr;

/// Sleeps that the scheduler's clock measures well enough.
const SHORT: i64 = 50_000_000;

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
    pub(super) now: Option<Restart>,
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
/// scheduler's clock says, which is off by interrupts and stolen time. Where the
/// process changed its CPU that says nothing, and of several the last is chosen: a
/// wait may end late, never early.
fn choose(found: &[i64], estimate: Option<i64>, same_clock: bool, slept: i64) -> Option<i64> {
    let Some(e) = estimate else {
        return match found {
            [one] => Some(*one),
            _ => None,
        };
    };
    if !same_clock {
        return found.iter().copied().max();
    }
    let nearest = found.iter().copied().min_by_key(|f| f.abs_diff(e));
    let bearable = (SHORT / 2 + slept / 4).unsigned_abs();
    nearest.filter(|n| n.abs_diff(e) <= bearable).or(Some(e))
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

fn read_time(stopped: &Stopped, at: u64) -> Result<Option<i64>> {
    let mut t = [0u8; 16];
    stopped.read(RemoteAddr(at), &mut t)?;
    Ok(nanoseconds(&t))
}

fn nanoseconds(timespec: &[u8; 16]) -> Option<i64> {
    let (s, ns) = (u64_at(timespec, 0) as i64, u64_at(timespec, 8) as i64);
    if s < 0 || !(0..SECOND).contains(&ns) {
        return None;
    }
    Some(s.saturating_mul(SECOND).saturating_add(ns))
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(choose(&[5, second], Some(6), false, 0), Some(second));
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
