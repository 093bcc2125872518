//! A call to the module as bytes that can be bent.

use crate::raw;
use pmig::sys::kmod::{abi, Kmod, RawPcb, DEVICE};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// More than any size the module accepts, so that a bent size stays inside.
const ROOM: usize = 20 << 10;

/// A number in one of the structures.
#[derive(Clone, Debug)]
pub struct Leaf {
    pub name: String,
    pub offset: usize,
    pub size: usize,
}

fn fields_of(name: &str) -> Option<(usize, Vec<abi::FieldLayout>)> {
    let layouts = abi::struct_layouts();
    let found = layouts.into_iter().find(|s| s.0 == name)?;
    Some((found.1, found.2))
}

/// Every number of a structure, those of nested structures and arrays too.
pub fn leaves(name: &str) -> Vec<Leaf> {
    let mut all = Vec::new();
    let Some((_, fields)) = fields_of(name) else {
        return all;
    };
    for (field, offset, size) in fields {
        let inner = match field {
            "sigactions" => "pmig_sigaction".to_owned(),
            "real" => "pmig_itimer".to_owned(),
            other => format!("pmig_{other}"),
        };
        let nests = matches!(name, "pmig_pcb" | "pmig_itimers") && size > 8;
        if let Some((inner_size, _)) = fields_of(&inner).filter(|_| nests) {
            for i in 0..size / inner_size {
                for leaf in leaves(&inner) {
                    all.push(Leaf {
                        name: format!("{field}[{i}].{}", leaf.name),
                        offset: offset + i * inner_size + leaf.offset,
                        size: leaf.size,
                    });
                }
            }
            continue;
        }
        let word = match (field, size) {
            ("auxv", _) => 8,
            ("comm" | "info", _) => 1,
            _ => size,
        };
        for i in 0..size / word {
            all.push(Leaf {
                name: format!("{field}[{i}]"),
                offset: offset + i * word,
                size: word,
            });
        }
    }
    all
}

/// The section whose bytes in `struct pmig_pcb` hold this offset.
pub fn section_at(offset: usize) -> u64 {
    let Some((_, fields)) = fields_of("pmig_pcb") else {
        return 0;
    };
    let holds = |f: &&abi::FieldLayout| offset >= f.1 && offset < f.1 + f.2;
    match fields.iter().find(holds).map(|f| f.0) {
        Some("regs") => abi::SEC_REGS,
        Some("sigmask") => abi::SEC_SIGMASK,
        Some("altstack") => abi::SEC_ALTSTACK,
        Some("restart") => abi::SEC_RESTART,
        Some("sched") => abi::SEC_SCHED,
        Some("comm") => abi::SEC_COMM,
        Some("tids") => abi::SEC_TIDS,
        Some("rseq") => abi::SEC_RSEQ,
        Some("prctl") => abi::SEC_PRCTL,
        Some("oom") => abi::SEC_OOM,
        Some("itimers") => abi::SEC_ITIMERS,
        Some("mm") => abi::SEC_MM,
        Some("sigactions") => abi::SEC_SIGACTIONS,
        _ => 0,
    }
}

pub fn get(bytes: &[u8], offset: usize, size: usize) -> u64 {
    let mut word = [0u8; 8];
    word[..size].copy_from_slice(&bytes[offset..offset + size]);
    u64::from_ne_bytes(word)
}

pub fn put(bytes: &mut [u8], offset: usize, size: usize, value: u64) {
    bytes[offset..offset + size].copy_from_slice(&value.to_ne_bytes()[..size]);
}

/// Values at which something could go wrong, beside those next to the old one.
pub fn edges(old: u64) -> Vec<u64> {
    const TASK_SIZE: u64 = 0x7fff_ffff_f000;
    let mut all = vec![
        0,
        1,
        2,
        3,
        7,
        64,
        65,
        4095,
        4096,
        4097,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x7fff_ffff_ffff_ffff,
        0x8000_0000_0000_0000,
        u64::MAX,
        TASK_SIZE - 1,
        TASK_SIZE,
        TASK_SIZE + 1,
        0xffff_8000_0000_0000,
        0xffff_ffff_8100_0000,
        old.wrapping_add(1),
        old.wrapping_sub(1),
        old.wrapping_mul(2),
        !old,
    ];
    all.retain(|v| *v != old);
    all
}

/// The device, opened a second time for bent calls.
pub fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(DEVICE)
}

/// Buffers of one call, with room behind each.
pub struct Bent {
    pub call: Vec<u8>,
    pub pcb: Vec<u8>,
    pub xstate: Vec<u8>,
    pub siginfos: Vec<u8>,
}

const CALL: &str = "pmig_call";

fn call_field(name: &str) -> (usize, usize) {
    let (_, fields) = fields_of(CALL).unwrap_or_default();
    fields
        .iter()
        .find(|f| f.0 == name)
        .map_or((0, 4), |f| (f.1, f.2))
}

impl Bent {
    pub fn set(&mut self, field: &str, value: u64) {
        let (offset, size) = call_field(field);
        put(&mut self.call, offset, size, value);
    }

    pub fn field(&self, field: &str) -> u64 {
        let (offset, size) = call_field(field);
        get(&self.call, offset, size)
    }

    fn blank(pidfd: BorrowedFd<'_>, sections: u64) -> Self {
        let mut bent = Bent {
            call: vec![0; ROOM],
            pcb: vec![0; ROOM],
            xstate: vec![0; ROOM],
            siginfos: vec![0; ROOM],
        };
        bent.set("size", size_of::<abi::Call>() as u64);
        bent.set("pidfd", pidfd.as_raw_fd() as u64);
        bent.set("exe_fd", u64::MAX);
        bent.set("sections", sections);
        bent.set("pcb", bent.pcb.as_ptr() as u64);
        bent.set("pcb_size", size_of::<abi::Pcb>() as u64);
        bent
    }

    /// A valid capture of everything in `sections`.
    pub fn capture(kmod: &Kmod, pidfd: BorrowedFd<'_>, sections: u64) -> Self {
        let mut bent = Bent::blank(pidfd, sections);
        if sections & abi::SEC_XSTATE != 0 {
            bent.set("xstate", bent.xstate.as_ptr() as u64);
            bent.set("xstate_size", u64::from(kmod.xstate_size()));
        }
        if sections & (abi::SEC_PENDING | abi::SEC_SHARED_PENDING) != 0 {
            bent.set("siginfos", bent.siginfos.as_ptr() as u64);
            bent.set("siginfo_count", 64);
        }
        bent
    }

    /// A valid restore of `raw`, of those of its parts that are in `sections`.
    pub fn restore(pidfd: BorrowedFd<'_>, raw: &RawPcb, sections: u64) -> Self {
        let mut bent = Bent::blank(pidfd, sections);
        let pcb = pcb_bytes(&raw.pcb);
        bent.pcb[..pcb.len()].copy_from_slice(&pcb);
        put(&mut bent.pcb, 0, 4, size_of::<abi::Pcb>() as u64);
        if sections & abi::SEC_XSTATE != 0 {
            bent.xstate[..raw.xstate.len()].copy_from_slice(&raw.xstate);
            bent.set("xstate", bent.xstate.as_ptr() as u64);
            bent.set("xstate_size", raw.xstate.len() as u64);
        }
        let mut count = 0;
        for s in &raw.siginfos {
            let shared = s.flags & abi::SI_SHARED != 0;
            let section = [abi::SEC_PENDING, abi::SEC_SHARED_PENDING][usize::from(shared)];
            if sections & section == 0 {
                continue;
            }
            let at = count * size_of::<abi::Siginfo>();
            put(&mut bent.siginfos, at, 4, u64::from(s.signo));
            put(&mut bent.siginfos, at + 4, 4, u64::from(s.flags));
            bent.siginfos[at + 8..at + 136].copy_from_slice(&s.info);
            count += 1;
        }
        if count > 0 {
            bent.set("siginfos", bent.siginfos.as_ptr() as u64);
            bent.set("siginfo_count", count as u64);
        }
        bent
    }

    pub fn call(&mut self, device: &File, request: u32) -> Result<(), i32> {
        raw::ioctl(device, request, &mut self.call)
    }
}

fn pcb_bytes(pcb: &abi::Pcb) -> Vec<u8> {
    raw::bytes_of(pcb)
}
