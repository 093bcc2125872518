//! `/proc/PID/sched` and `/proc/PID/syscall`: what a process waits in, and
//! since when.

use crate::error::{Error, Result};

/// `/proc/PID/sched` (kernel/sched/debug.c), the lines that tell of a sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sched {
    /// When the scheduler last charged the process, in ns of the scheduler's
    /// own clock on that CPU: for a sleeper, when it went to sleep.
    pub exec_start: u64,
    /// How often the process has gone to sleep.
    pub voluntary_switches: u64,
    /// How often it has changed its CPU, and with it that clock.
    pub migrations: u64,
}

impl Sched {
    /// # Errors
    /// [`Error::Gone`]; [`Error::Os`] where the kernel has no such file
    /// (CONFIG_SCHED_DEBUG in older ones).
    pub fn read(pid: i32) -> Result<Sched> {
        Sched::parse(&super::text(pid, "sched")?)
            .ok_or_else(|| Error::bad(format!("/proc/{pid}/sched"), "not understood"))
    }

    fn parse(text: &str) -> Option<Sched> {
        let field = |name: &str| {
            // The first line holds the program's name, which may imitate others.
            text.lines().skip(1).find_map(|l| {
                let (key, value) = l.split_once(':')?;
                (key.trim() == name).then(|| value.trim())
            })
        };
        // Milliseconds with six decimals: nanoseconds with a dot in between.
        let (ms, ns) = field("se.exec_start")?.split_once('.')?;
        if ns.len() != 6 || !ns.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        Some(Sched {
            exec_start: ms
                .parse::<u64>()
                .ok()?
                .checked_mul(1_000_000)?
                .checked_add(ns.parse().ok()?)?,
            voluntary_switches: field("nr_voluntary_switches")?.parse().ok()?,
            migrations: field("se.nr_migrations")?.parse().ok()?,
        })
    }
}

/// `/proc/PID/syscall` (proc_pid_syscall(5)) of a process that is blocked in a
/// system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InCall {
    pub number: i64,
    pub args: [u64; 6],
    pub stack: u64,
    pub instruction: u64,
}

impl InCall {
    /// `None` where the process runs, or is blocked outside of a call.
    ///
    /// # Errors
    /// [`Error::Gone`], or [`Error::Os`] without the right to trace it.
    pub fn read(pid: i32) -> Result<Option<InCall>> {
        Ok(InCall::parse(&super::text(pid, "syscall")?))
    }

    fn parse(text: &str) -> Option<InCall> {
        let mut words = text.split_whitespace();
        let number = words.next()?.parse().ok().filter(|n| *n >= 0)?;
        let mut word = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
        let mut args = [0; 6];
        for a in &mut args {
            *a = word()?;
        }
        Some(InCall {
            number,
            args,
            stack: word()?,
            instruction: word()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_own() {
        let s = Sched::read(std::process::id() as i32).unwrap();
        assert!(s.exec_start > 0);
        assert_eq!(InCall::parse("running\n"), None);
    }

    #[test]
    fn a_name_cannot_imitate_a_field() {
        let text = "nr_voluntary_switches : 7 (12, #threads: 1)\n----\n\
            se.exec_start          :       1212939.319727\n\
            se.nr_migrations       :                    2\n\
            nr_voluntary_switches  :                    3\n";
        assert_eq!(
            Sched::parse(text),
            Some(Sched {
                exec_start: 1_212_939_319_727,
                voluntary_switches: 3,
                migrations: 2,
            })
        );
        assert_eq!(Sched::parse("x\nse.exec_start : 1.5\n"), None);
    }

    #[test]
    fn a_blocked_call_is_read_whole() {
        let c = InCall::parse("230 0x0 0x0 0x7ffe 0x0 0x0 0x0 0x7ff0 0x7f12\n").unwrap();
        assert_eq!((c.number, c.args[2], c.stack), (230, 0x7ffe, 0x7ff0));
        assert_eq!(InCall::parse("-1 0x7ff0 0x7f12\n"), None);
        assert_eq!(InCall::parse("230 0x0\n"), None);
    }
}
