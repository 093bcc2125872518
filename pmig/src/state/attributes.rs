//! The many small settings of a process, most of them prctl(2)'s.

use std::fs;

use serde::{Deserialize, Serialize};

use super::words::u32_at;
use crate::error::{Context, Error, Obstacle, Result};
use crate::proc::status::Status;
use crate::proc::Kept;
use crate::tracee::{Batch, Call, Done, Slot};

/// Settings by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// At most 15 bytes, any but NUL.
    pub comm: Vec<u8>,
    pub personality: u32,
    pub umask: u32,
    /// The signal sent when the parent dies; 0: none.
    pub parent_death_signal: i32,
    /// PR_GET_DUMPABLE: 0, 1, or 2 (readable by root only).
    pub dumpable: u32,
    pub child_subreaper: bool,
    /// PR_GET_THP_DISABLE, flags of newer kernels included.
    pub thp_disable: u32,
    /// In ns; 0 for a real-time process, which has none.
    pub timer_slack: u64,
    pub oom_score_adj: i32,
    /// `/proc/PID/coredump_filter`.
    pub coredump_filter: u32,
    /// PR_GET_TSC: 1 readable, 2 faulting.
    pub tsc: u32,
    /// Whether cpuid faults (ARCH_GET_CPUID answers 0).
    pub cpuid_faults: bool,
    /// PR_MCE_KILL_GET: 0 late, 1 early, 2 the machine's default.
    pub mce_kill: u32,
    /// PR_GET_MDWE.
    pub mdwe: u32,
    /// PR_GET_MEMORY_MERGE.
    pub memory_merge: bool,
    /// PR_GET_SPECULATION_CTRL of store bypass, indirect branch, L1D flush,
    /// where the process changed it; else 0.
    pub speculation: [u32; 3],
    /// Extended state that needs a permission and has it (ARCH_GET_XCOMP_PERM):
    /// bit 18 for AMX.
    pub xstate_permission: u64,
}

/// `<linux/prctl.h>`, `<asm/prctl.h>`: what libc does not name.
mod number {
    pub const PR_GET_MDWE: i32 = 66;
    pub const PR_SET_MDWE: i32 = 65;
    pub const PR_GET_MEMORY_MERGE: i32 = 68;
    pub const PR_SET_MEMORY_MERGE: i32 = 67;
    pub const PR_GET_IO_FLUSHER: i32 = 58;
    pub const ARCH_GET_CPUID: u64 = 0x1011;
    pub const ARCH_SET_CPUID: u64 = 0x1012;
    pub const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
    pub const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    pub const PR_GET_TID_ADDRESS: i32 = 40;
}
use number::*;

/// Individually controlled, and one of: disabled, force-disabled, disabled
/// until exec (`<linux/prctl.h>`, PR_SPEC_*).
const SPEC_PRCTL: u32 = 1;
const SPEC_ENABLE: u32 = 2;
const SPEC_CHANGED: u32 = 4 | 8 | 16;
const SPECULATIONS: [u64; 3] = [0, 1, 2];
/// The only component that needs a permission so far: AMX tiles.
const XTILE_DATA: u64 = 18;
/// personality(2): what is mapped to be read can be executed.
const READ_IMPLIES_EXEC: u32 = 0x40_0000;
const DUMP_USER: u32 = 1;
const DUMP_ROOT: u32 = 2;

/// Bytes of a name with the NUL at its end (TASK_COMM_LEN).
const COMM: usize = 16;

/// Questions that only the process can answer.
pub struct Asked {
    personality: Call,
    pdeathsig: Slot,
    dumpable: Call,
    subreaper: Slot,
    thp: Call,
    slack: Call,
    tsc: Slot,
    tsc_call: Call,
    cpuid: Call,
    mce: Call,
    mdwe: Call,
    merge: Call,
    io_flusher: Call,
    speculation: [Call; 3],
    permission: Slot,
    tid_address: Slot,
    comm: Slot,
}

impl Asked {
    pub fn tid_address(&self, done: &Done) -> u64 {
        super::words::u64_at(done.bytes(self.tid_address), 0)
    }
}

fn get(batch: &mut Batch, what: &'static str, option: i32) -> Call {
    batch.may_fail(
        what,
        libc::SYS_prctl,
        &[
            option.into(),
            0u64.into(),
            0u64.into(),
            0u64.into(),
            0u64.into(),
        ],
    )
}

/// What files tell of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    pub oom_score_adj: i32,
    pub coredump_filter: u32,
}

impl Told {
    /// # Errors
    /// [`Error::Gone`], [`Error::Bad`].
    pub fn by(files: &Kept) -> Result<Told> {
        Ok(Told {
            oom_score_adj: number_in(files, "oom_score_adj", 10)? as i32,
            coredump_filter: number_in(files, "coredump_filter", 16)? as u32,
        })
    }
}

impl Attributes {
    pub fn ask(batch: &mut Batch) -> Asked {
        let personality = batch.call(
            "read the personality",
            libc::SYS_personality,
            &[0xffff_ffffu64.into()],
        );
        let mut out = |what, option: i32, len: usize| {
            let slot = batch.space(len);
            batch.call(what, libc::SYS_prctl, &[option.into(), slot.into()]);
            slot
        };
        let pdeathsig = out("read the parent-death signal", libc::PR_GET_PDEATHSIG, 4);
        let subreaper = out(
            "read the subreaper setting",
            libc::PR_GET_CHILD_SUBREAPER,
            4,
        );
        let tid_address = out("read the tid address", PR_GET_TID_ADDRESS, 8);
        let comm = out("read the name", libc::PR_GET_NAME, COMM);
        let tsc = batch.space(4);
        let tsc_call = batch.may_fail(
            "read the tsc setting",
            libc::SYS_prctl,
            &[libc::PR_GET_TSC.into(), tsc.into()],
        );
        let permission = batch.space(8);
        batch.may_fail(
            "read the xstate permission",
            libc::SYS_arch_prctl,
            &[ARCH_GET_XCOMP_PERM.into(), permission.into()],
        );
        Asked {
            personality,
            pdeathsig,
            subreaper,
            tid_address,
            comm,
            tsc,
            tsc_call,
            permission,
            dumpable: get(batch, "read dumpable", libc::PR_GET_DUMPABLE),
            thp: get(batch, "read the thp setting", libc::PR_GET_THP_DISABLE),
            slack: get(batch, "read the timer slack", libc::PR_GET_TIMERSLACK),
            cpuid: batch.may_fail(
                "read the cpuid setting",
                libc::SYS_arch_prctl,
                &[ARCH_GET_CPUID.into(), 0u64.into()],
            ),
            mce: get(batch, "read the mce policy", libc::PR_MCE_KILL_GET),
            mdwe: get(batch, "read mdwe", PR_GET_MDWE),
            merge: get(batch, "read the memory merge setting", PR_GET_MEMORY_MERGE),
            io_flusher: get(batch, "read the io flusher setting", PR_GET_IO_FLUSHER),
            speculation: SPECULATIONS.map(|which| {
                batch.may_fail(
                    "read the speculation control",
                    libc::SYS_prctl,
                    &[
                        libc::PR_GET_SPECULATION_CTRL.into(),
                        which.into(),
                        0u64.into(),
                        0u64.into(),
                        0u64.into(),
                    ],
                )
            }),
        }
    }

    pub fn capture(told: Told, status: &Status, asked: &Asked, done: &Done) -> Attributes {
        // What a kernel does not know has its default there.
        let or = |call: Call, default: u32| match done.result(call) {
            r if r < 0 => default,
            r => r as u32,
        };
        let comm = done.bytes(asked.comm).split(|b| *b == 0).next();
        Attributes {
            oom_score_adj: told.oom_score_adj,
            coredump_filter: told.coredump_filter,
            comm: comm.unwrap_or_default().to_vec(),
            personality: done.result(asked.personality) as u32,
            umask: status.umask.unwrap_or(0o022),
            parent_death_signal: u32_at(done.bytes(asked.pdeathsig), 0) as i32,
            dumpable: or(asked.dumpable, DUMP_USER),
            child_subreaper: u32_at(done.bytes(asked.subreaper), 0) != 0,
            thp_disable: or(asked.thp, 0),
            timer_slack: done.result(asked.slack).max(0) as u64,
            tsc: if done.result(asked.tsc_call) < 0 {
                1
            } else {
                u32_at(done.bytes(asked.tsc), 0)
            },
            cpuid_faults: done.result(asked.cpuid) == 0,
            mce_kill: or(asked.mce, 2),
            mdwe: or(asked.mdwe, 0),
            memory_merge: or(asked.merge, 0) != 0,
            speculation: asked.speculation.map(|c| match or(c, 0) {
                state if state & SPEC_PRCTL != 0 => state & SPEC_CHANGED,
                _ => 0,
            }),
            xstate_permission: super::words::u64_at(done.bytes(asked.permission), 0)
                & (1 << XTILE_DATA),
        }
    }

    /// What was found to be set and cannot be carried.
    pub fn obstacles(asked: &Asked, done: &Done) -> Vec<Obstacle> {
        if done.result(asked.io_flusher) > 0 {
            return vec![Obstacle::new(
                "io flusher state (PR_SET_IO_FLUSHER)",
                "the process serves a block device of this machine",
                "end that service first",
            )];
        }
        Vec::new()
    }

    /// # Errors
    /// [`Error::Bad`] for values that no kernel tells.
    pub fn check(&self) -> Result<()> {
        let sound = self.comm.len() <= 15
            && !self.comm.contains(&0)
            && (0..=64).contains(&self.parent_death_signal)
            && self.dumpable <= 2
            && self.umask <= 0o777
            && (-1000..=1000).contains(&self.oom_score_adj);
        if sound {
            Ok(())
        } else {
            Err(Error::bad("process settings", "not what a kernel tells"))
        }
    }

    /// As far as it can be set while the husk's address space may still change and
    /// its parent is not found yet.
    pub fn ahead(&self) -> Attributes {
        Attributes {
            personality: self.personality & !READ_IMPLIES_EXEC,
            dumpable: DUMP_USER,
            parent_death_signal: 0,
            mdwe: 0,
            ..self.clone()
        }
    }

    /// The first beat, while the process is root and may do everything: sets what
    /// differs from `now`, its own at present (`None`: those of a new process).
    ///
    /// # Errors
    /// As [`Attributes::check`].
    pub fn restore(&self, batch: &mut Batch, now: Option<&Attributes>) -> Result<()> {
        self.check()?;
        if self.xstate_permission >> XTILE_DATA & 1 == 1
            && now.is_none_or(|n| n.xstate_permission != self.xstate_permission)
        {
            batch.call(
                "ask for the vector state permission",
                libc::SYS_arch_prctl,
                &[ARCH_REQ_XCOMP_PERM.into(), XTILE_DATA.into()],
            );
        }
        if now.is_none_or(|n| n.comm != self.comm) {
            let mut name = self.comm.clone();
            name.resize(COMM, 0);
            let name = batch.data(&name);
            batch.call(
                "set the name",
                libc::SYS_prctl,
                &[libc::PR_SET_NAME.into(), name.into()],
            );
        }
        if now.is_none_or(|n| n.personality != self.personality) {
            batch.call(
                "set the personality",
                libc::SYS_personality,
                &[self.personality.into()],
            );
        }
        if now.is_none_or(|n| n.umask != self.umask) {
            batch.may_fail("set the umask", libc::SYS_umask, &[self.umask.into()]);
        }
        let mut set = |what, option: i32, a: u64, b: u64| {
            batch.call(
                what,
                libc::SYS_prctl,
                &[option.into(), a.into(), b.into(), 0u64.into(), 0u64.into()],
            );
        };
        let fresh = Attributes::fresh();
        let now = now.unwrap_or(&fresh);
        if self.child_subreaper != now.child_subreaper {
            set(
                "set the subreaper setting",
                libc::PR_SET_CHILD_SUBREAPER,
                self.child_subreaper as u64,
                0,
            );
        }
        if self.thp_disable != now.thp_disable {
            set(
                "set the thp setting",
                libc::PR_SET_THP_DISABLE,
                (self.thp_disable != 0) as u64,
                (self.thp_disable & !1) as u64,
            );
        }
        if self.timer_slack != now.timer_slack {
            // 0: that of its birth.
            set(
                "set the timer slack",
                libc::PR_SET_TIMERSLACK,
                self.timer_slack,
                0,
            );
        }
        if self.tsc != now.tsc {
            set("set the tsc setting", libc::PR_SET_TSC, self.tsc.into(), 0);
        }
        if self.mce_kill != now.mce_kill {
            // PR_MCE_KILL_CLEAR (0), or PR_MCE_KILL_SET (1) and then
            // PR_MCE_KILL_LATE (0) or _EARLY (1).
            let how = match self.mce_kill {
                how @ (0 | 1) => Some(how),
                _ => None,
            };
            set(
                "set the mce policy",
                libc::PR_MCE_KILL,
                how.is_some() as u64,
                how.unwrap_or(0) as u64,
            );
        }
        if self.memory_merge != now.memory_merge {
            let merge = self.memory_merge as u64;
            set("set memory merging", PR_SET_MEMORY_MERGE, merge, 0);
        }
        let speculation = self.speculation.iter().zip(now.speculation);
        for (which, (state, now)) in SPECULATIONS.iter().zip(speculation) {
            if *state != now {
                let wanted = match state & SPEC_CHANGED {
                    0 => SPEC_ENABLE,
                    changed => changed,
                };
                // A processor that is not affected refuses, and needs nothing.
                batch.may_fail(
                    "set the speculation control",
                    libc::SYS_prctl,
                    &[
                        libc::PR_SET_SPECULATION_CTRL.into(),
                        (*which).into(),
                        wanted.into(),
                        0u64.into(),
                        0u64.into(),
                    ],
                );
            }
        }
        if self.cpuid_faults != now.cpuid_faults {
            batch.call(
                "let cpuid fault, or not",
                libc::SYS_arch_prctl,
                &[ARCH_SET_CPUID.into(), (!self.cpuid_faults as u64).into()],
            );
        }
        Ok(())
    }

    /// What a process is born with, as far as [`Attributes::restore`] asks.
    fn fresh() -> Attributes {
        Attributes {
            tsc: 1,
            mce_kill: 2,
            ..Attributes::default()
        }
    }

    /// The second beat: what a change of credentials resets, and what cannot
    /// be taken back. `now` as in [`Attributes::restore`], `None` after such a change.
    pub fn restore_late(&self, batch: &mut Batch, now: Option<&Attributes>) {
        let late = |a: &Attributes| (a.dumpable, a.parent_death_signal, a.mdwe);
        if now.is_some_and(|n| late(n) == late(self)) {
            return;
        }
        let mut set = |what, option: i32, a: u64| {
            batch.call(
                what,
                libc::SYS_prctl,
                &[
                    option.into(),
                    a.into(),
                    0u64.into(),
                    0u64.into(),
                    0u64.into(),
                ],
            );
        };
        if self.dumpable == DUMP_ROOT {
            // Only the kernel sets 2, at a change of ids and by the machine's
            // fs.suid_dumpable; 0 is its stricter neighbour.
            set("set dumpable", libc::PR_SET_DUMPABLE, 0);
        } else {
            set("set dumpable", libc::PR_SET_DUMPABLE, self.dumpable as u64);
        }
        set(
            "set the parent-death signal",
            libc::PR_SET_PDEATHSIG,
            self.parent_death_signal as u64,
        );
        if self.mdwe != 0 {
            set("set mdwe", PR_SET_MDWE, self.mdwe as u64);
        }
    }

    /// What is set from outside, by files.
    ///
    /// # Errors
    /// [`Error::Os`]: lowering oom_score_adj below what `pmig serve` was
    /// started with wants CAP_SYS_RESOURCE.
    pub fn restore_outside(&self, pid: i32, now: Option<&Attributes>) -> Result<()> {
        self.check()?;
        if now.is_none_or(|n| n.oom_score_adj != self.oom_score_adj) {
            let score = write(pid, "oom_score_adj", &self.oom_score_adj.to_string());
            let wanted = i64::from(self.oom_score_adj);
            if score.is_err() && number_in(&Kept::of(pid), "oom_score_adj", 10)? != wanted {
                return score;
            }
        }
        if now.is_none_or(|n| n.coredump_filter != self.coredump_filter) {
            let filter = format!("{:#x}", self.coredump_filter);
            write(pid, "coredump_filter", &filter)?;
        }
        Ok(())
    }
}

fn number_in(files: &Kept, name: &'static str, radix: u32) -> Result<i64> {
    let text = files.text(name)?;
    i64::from_str_radix(text.trim(), radix)
        .map_err(|e| Error::bad(format!("/proc/{}/{name}", files.pid()), e))
}

fn write(pid: i32, name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/{pid}/{name}");
    fs::write(&path, value).context("write", path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_tell_of_this_process() {
        let told = Told::by(&Kept::of(std::process::id() as i32)).unwrap();
        assert!(told.coredump_filter != 0);
        let a = Attributes {
            oom_score_adj: told.oom_score_adj,
            coredump_filter: told.coredump_filter,
            ..Attributes::default()
        };
        a.check().unwrap();
        a.restore_outside(std::process::id() as i32, None).unwrap();
    }

    #[test]
    fn impossible_settings_are_refused() {
        let mut b = Batch::new();
        for spoil in [
            |a: &mut Attributes| a.comm = vec![b'x'; 16],
            |a: &mut Attributes| a.comm = vec![0],
            |a: &mut Attributes| a.parent_death_signal = 65,
            |a: &mut Attributes| a.dumpable = 3,
            |a: &mut Attributes| a.umask = 0o1000,
            |a: &mut Attributes| a.oom_score_adj = 1001,
        ] {
            let mut a = Attributes::default();
            spoil(&mut a);
            assert!(a.restore(&mut b, None).is_err(), "{a:?}");
        }
        assert!(b.is_empty());
    }
}
