//! What only the process itself can tell, and what is refused where it is set.

use crate::error::Obstacle;
use crate::state::words::{u32_at, u64_at};
use crate::tracee::{Batch, Call, Done, Slot};

const TIMERS: [&str; 3] = ["real", "virtual", "profiling"];
/// keyctl(KEYCTL_GET_KEYRING_ID, keyring, do not create).
const KEYCTL_GET_KEYRING_ID: u64 = 0;
const KEYRINGS: [(&str, i32); 2] = [("thread", -1), ("process", -2)];
/// Slots for TLS segments in the descriptor table (arch/x86/asm/segment.h).
const TLS_ENTRIES: [u32; 3] = [12, 13, 14];
/// `seg_not_present` of `struct user_desc`.
const NOT_PRESENT: u32 = 1 << 5;

/// Questions whose answers may be reasons to refuse.
pub struct Asked {
    timers: [Slot; 3],
    policy: (Call, Slot),
    keyrings: [Call; 2],
    segments: [(Call, Slot); 3],
    descriptors: Call,
    /// A page, and whether it is locked.
    locked: (Call, Call),
}

pub fn ask(batch: &mut Batch) -> Asked {
    let timers = [0u64, 1, 2].map(|which| {
        let out = batch.space(32);
        batch.call(
            "read an interval timer",
            libc::SYS_getitimer,
            &[which.into(), out.into()],
        );
        out
    });
    let mode = batch.space(4);
    let policy = batch.may_fail(
        "read the memory policy",
        libc::SYS_get_mempolicy,
        &[
            mode.into(),
            0u64.into(),
            0u64.into(),
            0u64.into(),
            0u64.into(),
        ],
    );
    let keyrings = KEYRINGS.map(|(_, id)| {
        batch.may_fail(
            "look for a keyring",
            libc::SYS_keyctl,
            &[
                KEYCTL_GET_KEYRING_ID.into(),
                id.into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
            ],
        )
    });
    let segments = TLS_ENTRIES.map(|entry| {
        let mut desc = [0u8; 16];
        desc[..4].copy_from_slice(&entry.to_le_bytes());
        let desc = batch.data(&desc);
        let call = batch.may_fail(
            "read a tls segment",
            libc::SYS_get_thread_area,
            &[desc.into()],
        );
        (call, desc)
    });
    let table = batch.space(8);
    let descriptors = batch.may_fail(
        "read the local descriptor table",
        libc::SYS_modify_ldt,
        &[0u64.into(), table.into(), 8u64.into()],
    );
    Asked {
        timers,
        policy: (policy, mode),
        keyrings,
        segments,
        descriptors,
        locked: is_new_memory_locked(batch),
    }
}

/// Nothing tells of mlockall(MCL_FUTURE), but a new mapping then refuses to be
/// invalidated (msync(2), EBUSY).
fn is_new_memory_locked(batch: &mut Batch) -> (Call, Call) {
    const LEN: u64 = 4096;
    let page = batch.may_fail(
        "map a page",
        libc::SYS_mmap,
        &[
            0u64.into(),
            LEN.into(),
            libc::PROT_READ.into(),
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).into(),
            (-1i32).into(),
            0u64.into(),
        ],
    );
    let locked = batch.may_fail(
        "look whether it is locked",
        libc::SYS_msync,
        &[page.into(), LEN.into(), libc::MS_INVALIDATE.into()],
    );
    batch.may_fail("unmap it", libc::SYS_munmap, &[page.into(), LEN.into()]);
    (page, locked)
}

/// What stands in the way where future mappings are locked.
pub fn locks_future() -> Obstacle {
    Obstacle::new(
        "memory locking",
        "mlockall(MCL_FUTURE) is in force, which is not carried",
        "",
    )
}

/// Interval timers (setitimer(2)) that are armed.
pub fn armed(timers: [bool; 3]) -> Vec<Obstacle> {
    timers
        .iter()
        .zip(TIMERS)
        .filter(|(armed, _)| **armed)
        .map(|(_, name)| {
            Obstacle::new(
                format!("{name} interval timer"),
                "armed by alarm or setitimer; timers are not carried",
                "wait until it has expired",
            )
        })
        .collect()
}

impl Asked {
    /// Calls whose answers are others each time.
    pub fn transient(&self) -> [Call; 1] {
        [self.locked.0]
    }

    pub fn obstacles(&self, done: &Done) -> Vec<Obstacle> {
        let mut all = Vec::new();
        all.extend(armed(self.timers.map(|slot| {
            let b = done.bytes(slot);
            // it_interval, it_value: a timer without a value is not armed.
            u64_at(b, 16) != 0 || u64_at(b, 24) != 0
        })));
        let (call, mode) = self.policy;
        if done.result(call) == 0 && u32_at(done.bytes(mode), 0) != 0 {
            all.push(Obstacle::new(
                "memory policy",
                "set by set_mempolicy for the memory nodes of this machine",
                "start the program without numactl",
            ));
        }
        for (call, (name, _)) in self.keyrings.iter().zip(KEYRINGS) {
            if done.result(*call) > 0 {
                all.push(Obstacle::new(
                    format!("{name} keyring"),
                    "the kernel hands out no keys to be carried",
                    "",
                ));
            }
        }
        if done.result(self.locked.1) == -(libc::EBUSY as i64) {
            all.push(locks_future());
        }
        let segment = self.segments.iter().any(|(c, slot)| {
            done.result(*c) == 0 && u32_at(done.bytes(*slot), 12) & NOT_PRESENT == 0
        });
        if segment || done.result(self.descriptors) > 0 {
            all.push(Obstacle::new(
                "segment descriptors",
                "the program has segments of its own (set_thread_area or modify_ldt)",
                "",
            ));
        }
        all
    }
}
