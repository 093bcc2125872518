//! How the scheduler treats the process (sched(7)), from outside.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Obstacle, Result};
use crate::proc;
use crate::sys::sched::{self, SchedAttr};

/// Policies of `<linux/sched.h>`.
const SCHED_DEADLINE: u32 = 6;
const SCHED_RESET_ON_FORK: u64 = 1;
const SCHED_UTIL_CLAMP: u64 = 0x60;
const UTIL_MAX: u32 = 1024;

/// Scheduling state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// SCHED_OTHER, FIFO, RR, BATCH, IDLE, EXT.
    pub policy: u32,
    pub reset_on_fork: bool,
    pub nice: i32,
    /// Of the real-time policies.
    pub priority: u32,
    /// A time slice of its own, in ns (Linux 6.12 and later).
    pub slice: Option<u64>,
    /// Utilisation clamps, where they are not the default.
    pub clamp: Option<(u32, u32)>,
    /// `None`: every CPU of the machine.
    pub cpus: Option<Vec<u32>>,
    pub io_priority: u32,
}

/// The slice that a process gets which asks for none, as ours does.
fn own_slice() -> Result<u64> {
    static OWN: OnceLock<u64> = OnceLock::new();
    if let Some(slice) = OWN.get() {
        return Ok(*slice);
    }
    let own = sched::getattr(0).context("read the scheduling of process", "self")?;
    Ok(*OWN.get_or_init(|| own.runtime))
}

impl Scheduling {
    /// # Errors
    /// [`Error::Os`] of the calls; a policy that cannot be carried is an
    /// obstacle, not an error ([`Scheduling::obstacles`]).
    pub fn capture(pid: i32) -> Result<Scheduling> {
        let attr = sched::getattr(pid).context("read the scheduling of process", pid)?;
        let real_time = attr.priority != 0;
        Ok(Scheduling {
            policy: attr.policy,
            reset_on_fork: attr.flags & SCHED_RESET_ON_FORK != 0,
            // Of a real-time policy the kernel tells only its priority.
            nice: match real_time || attr.policy == SCHED_DEADLINE {
                true => sched::nice(pid).context("read the nice value of process", pid)?,
                false => attr.nice,
            },
            priority: attr.priority,
            // The default is a setting of the machine; ours is the default.
            slice: (!real_time && attr.policy != SCHED_DEADLINE && attr.runtime != own_slice()?)
                .then_some(attr.runtime),
            clamp: ((attr.util_min, attr.util_max) != (0, UTIL_MAX)
                && (attr.util_min, attr.util_max) != (0, 0))
                .then_some((attr.util_min, attr.util_max)),
            cpus: restricted(
                sched::affinity(pid).context("read the affinity of process", pid)?,
                &online(),
            ),
            io_priority: sched::ioprio(pid).context("read the io priority of process", pid)?,
        })
    }

    /// What cannot be carried.
    pub fn obstacles(&self) -> Vec<Obstacle> {
        if self.policy == SCHED_DEADLINE {
            return vec![Obstacle::new(
                "scheduling policy SCHED_DEADLINE",
                "its reserved bandwidth cannot be promised by another machine",
                "give it another policy: chrt -o -p 0 PID",
            )];
        }
        Vec::new()
    }

    /// CPUs it is bound to that this machine does not have; it will run on all
    /// of them then.
    pub fn lost_affinity(&self, online: &[u32]) -> Option<Vec<u32>> {
        let missing: Vec<u32> = self
            .cpus
            .iter()
            .flatten()
            .copied()
            .filter(|c| !online.contains(c))
            .collect();
        (!missing.is_empty()).then_some(missing)
    }

    /// Comes when nothing more is to be done inside the process: with a low
    /// priority it might not get to it.
    ///
    /// # Errors
    /// The calls', each by name.
    pub fn restore(&self, pid: i32) -> Result<()> {
        if self.policy == SCHED_DEADLINE || self.policy > 7 || !(-20..20).contains(&self.nice) {
            return Err(Error::bad("scheduling", "not what can be carried"));
        }
        let fits = |_: &&[u32]| self.lost_affinity(&online()).is_none();
        let cpus = self.cpus.as_deref().filter(fits);
        sched::set_affinity(pid, cpus).context("set the affinity of process", pid)?;
        if self.io_priority != 0 {
            sched::set_ioprio(pid, self.io_priority)
                .context("set the io priority of process", pid)?;
        }
        sched::set_nice(pid, self.nice).context("set the nice value of process", pid)?;
        let (util_min, util_max) = self.clamp.unwrap_or((0, 0));
        let mut attr = SchedAttr {
            policy: self.policy,
            nice: self.nice,
            priority: self.priority,
            runtime: self.slice.unwrap_or(0),
            util_min,
            util_max,
            ..SchedAttr::default()
        };
        if self.reset_on_fork {
            attr.flags |= SCHED_RESET_ON_FORK;
        }
        if self.clamp.is_some() {
            attr.flags |= SCHED_UTIL_CLAMP;
        }
        sched::setattr(pid, &attr).context("set the scheduling of process", pid)
    }
}

/// CPUs that are online here, or were when first asked for.
pub fn online() -> Vec<u32> {
    static ONLINE: OnceLock<Vec<u32>> = OnceLock::new();
    ONLINE
        .get_or_init(|| {
            proc::setting("/sys/devices/system/cpu/online")
                .and_then(|l| proc::ranges(&l, 8192))
                .unwrap_or_default()
        })
        .clone()
}

/// `None` where the mask leaves out no CPU that is online: it is no wish, and
/// shall not bind the process on a larger machine.
fn restricted(mask: Vec<u32>, online: &[u32]) -> Option<Vec<u32>> {
    if online.iter().all(|c| mask.contains(c)) {
        None
    } else {
        Some(mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captures_this_process() {
        let s = Scheduling::capture(std::process::id() as i32).unwrap();
        assert_eq!(s.policy, 0);
        assert_eq!(s.slice, None);
        assert!(s.obstacles().is_empty());
        assert!(!online().is_empty());
    }

    #[test]
    fn a_full_mask_is_no_wish() {
        assert_eq!(restricted(vec![0, 1], &[0, 1]), None);
        assert_eq!(restricted(vec![0, 1, 2, 3], &[0, 1]), None);
        assert_eq!(restricted(vec![1], &[0, 1]), Some(vec![1]));
    }

    #[test]
    fn affinity_that_does_not_fit_is_said() {
        let mut s = Scheduling::capture(0).unwrap();
        s.cpus = Some(vec![1, 5]);
        assert_eq!(s.lost_affinity(&[0, 1]), Some(vec![5]));
        assert_eq!(s.lost_affinity(&[0, 1, 5]), None);
        s.policy = SCHED_DEADLINE;
        assert_eq!(s.obstacles().len(), 1);
        assert!(s.restore(i32::MAX).is_err());
    }
}
