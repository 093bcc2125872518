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
    }
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
