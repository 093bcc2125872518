//! Resource limits (getrlimit(2)).

use serde::{Deserialize, Serialize};

use super::words::{bytes_of, u64_at};
use crate::error::{Context, Error, Obstacle, Result};
use crate::sys::limits;
use crate::tracee::{Batch, Done, Slot};

/// Limits are numbered from 0 to 15 (`<asm-generic/resource.h>`).
pub const NAMES: [&str; 16] = [
    "cpu time",
    "file size",
    "data size",
    "stack size",
    "core file size",
    "resident set",
    "processes",
    "open files",
    "locked memory",
    "address space",
    "file locks",
    "pending signals",
    "message queue bytes",
    "nice priority",
    "realtime priority",
    "realtime timeout",
];

/// One soft and hard limit; `u64::MAX` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    pub soft: u64,
    pub hard: u64,
}

/// All of them, by number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits(pub Vec<Limit>);

/// Questions that only the process can answer: prlimit(2) of another user's
/// process wants CAP_SYS_RESOURCE, which not every root has.
pub struct Asked(Vec<Slot>);

impl Limits {
    pub fn ask(batch: &mut Batch) -> Asked {
        Asked(
            (0..NAMES.len())
                .map(|n| {
                    let out = batch.space(16);
                    batch.call(
                        "read a resource limit",
                        libc::SYS_prlimit64,
                        &[0u64.into(), n.into(), 0u64.into(), out.into()],
                    );
                    out
                })
                .collect(),
        )
    }

    pub fn capture(asked: &Asked, done: &Done) -> Limits {
        Limits(
            asked
                .0
                .iter()
                .map(|slot| {
                    let b = done.bytes(*slot);
                    Limit {
                        soft: u64_at(b, 0),
                        hard: u64_at(b, 8),
                    }
                })
                .collect(),
        )
    }

    /// This process's own, which a child of it inherits.
    ///
    /// # Errors
    /// prlimit(2)'s.
    pub fn own() -> Result<Limits> {
        Limits::of(0)
    }

    /// Those of a process of the same user.
    ///
    /// # Errors
    /// prlimit(2)'s.
    pub fn of(pid: i32) -> Result<Limits> {
        (0..NAMES.len() as u32)
            .map(|n| {
                limits::get(pid, n)
                    .map(|(soft, hard)| Limit { soft, hard })
                    .context("read the resource limits of process", pid)
            })
            .collect::<Result<_>>()
            .map(Limits)
    }

    /// Limits whose hard value lies above `ceiling`'s: only CAP_SYS_RESOURCE
    /// raises them.
    pub fn above(&self, ceiling: &Limits) -> Vec<usize> {
        self.0
            .iter()
            .zip(&ceiling.0)
            .enumerate()
            .filter(|(_, (want, have))| want.hard > have.hard)
            .map(|(n, _)| n)
            .collect()
    }

    /// What stands in the way when a process born with `inherited` shall have
    /// these.
    pub fn obstacles(&self, inherited: &Limits, may_raise: bool) -> Vec<Obstacle> {
        if may_raise {
            return Vec::new();
        }
        self.above(inherited)
            .into_iter()
            .map(|n| {
                Obstacle::new(
                    format!("limit of {}", NAMES[n]),
                    format!(
                        "hard limit {} is above the target's {}, and its root may not raise limits",
                        amount(self.0[n].hard),
                        amount(inherited.0[n].hard)
                    ),
                    "start pmig serve with CAP_SYS_RESOURCE or with higher limits",
                )
            })
            .collect()
    }

    /// # Errors
    /// [`Error::Bad`] for limits that are none.
    fn check(&self) -> Result<()> {
        if self.0.len() != NAMES.len() || self.0.iter().any(|l| l.soft > l.hard) {
            return Err(Error::bad("resource limits", "not what a kernel tells"));
        }
        Ok(())
    }

    /// Whether those of memory differ from `now`.
    pub fn differ_in_memory(&self, now: &Limits) -> bool {
        let of_memory = [libc::RLIMIT_DATA, libc::RLIMIT_AS].map(|n| n as usize);
        self.different(now).any(|(n, _)| of_memory.contains(&n))
    }

    /// Those that differ from `now`, by number.
    fn different<'a>(&'a self, now: &'a Limits) -> impl Iterator<Item = (usize, &'a Limit)> {
        let both = self.0.iter().zip(&now.0).enumerate();
        both.filter_map(|(n, (want, have))| (want != have).then_some((n, want)))
    }

    /// Sets from outside those that differ from `now`, the process's own at present.
    /// It must be of the same user.
    ///
    /// # Errors
    /// [`Error::Bad`] for limits that are none; prlimit(2)'s.
    pub fn restore_outside(&self, pid: i32, now: &Limits) -> Result<()> {
        self.check()?;
        self.different(now).try_for_each(|(n, want)| {
            limits::set(pid, n as u32, (want.soft, want.hard)).map_err(|cause| Error::Os {
                op: NAMES_OF_CALLS[n],
                object: format!("of process {pid}"),
                cause,
            })
        })
    }

    /// Sets those that differ from `now`, the process's own at present.
    ///
    /// # Errors
    /// [`Error::Bad`] for limits that are none.
    pub fn restore(&self, batch: &mut Batch, now: &Limits) -> Result<()> {
        self.check()?;
        for (n, want) in self.different(now) {
            let value = batch.data(&bytes_of(&[want.soft, want.hard]));
            batch.call(
                NAMES_OF_CALLS[n],
                libc::SYS_prlimit64,
                &[0u64.into(), n.into(), value.into(), 0u64.into()],
            );
        }
        Ok(())
    }
}

/// What an error of the batch says.
const NAMES_OF_CALLS: [&str; 16] = [
    "set the limit of cpu time",
    "set the limit of file size",
    "set the limit of data size",
    "set the limit of stack size",
    "set the limit of core file size",
    "set the limit of resident set",
    "set the limit of processes",
    "set the limit of open files",
    "set the limit of locked memory",
    "set the limit of address space",
    "set the limit of file locks",
    "set the limit of pending signals",
    "set the limit of message queue bytes",
    "set the limit of nice priority",
    "set the limit of realtime priority",
    "set the limit of realtime timeout",
];

fn amount(v: u64) -> String {
    match v {
        u64::MAX => "unlimited".to_string(),
        v => v.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_higher_hard_limits_need_a_privilege() {
        let own = Limits::own().unwrap();
        assert_eq!(own.0.len(), 16);
        assert!(own.obstacles(&own, false).is_empty());
        let mut higher = own.clone();
        let mut lower = own.clone();
        lower.0[7].hard = 100;
        higher.0[7].hard = 101;
        let o = higher.obstacles(&lower, false);
        assert_eq!(o.len(), 1);
        assert!(o[0].object.contains("open files"), "{}", o[0]);
        assert!(higher.obstacles(&lower, true).is_empty());
    }

    #[test]
    fn impossible_limits_are_refused() {
        let own = Limits::own().unwrap();
        let mut b = Batch::new();
        assert!(Limits(Vec::new()).restore(&mut b, &own).is_err());
        let mut odd = own.clone();
        odd.0[3] = Limit { soft: 2, hard: 1 };
        assert!(odd.restore(&mut b, &own).is_err());
        assert!(b.is_empty());
    }
}
