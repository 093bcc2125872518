//! The kernel module's calls: a whole process control block in one.
//!
//! `kmod/pmig_abi.h` is the contract; [`abi`] mirrors it. Everything here is
//! plain data: numbers are as the kernel keeps them, addresses are the
//! program's.

pub mod abi;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The device the module makes.
pub const DEVICE: &str = "/dev/pmig";

/// A listing longer than this is not believed (`vm.max_map_count` is 65,530 by
/// default).
const MAX_VMAS: usize = 4 << 20;

/// The open device.
#[derive(Debug)]
pub struct Kmod {
    file: File,
    query: abi::Query,
}

/// A captured process control block: what is to be restored.
///
/// Only the parts whose bit is in `sections` (`abi::SEC_*`) mean anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawPcb {
    /// `abi::SEC_*`
    pub sections: u64,
    /// The fixed parts.
    pub pcb: Box<abi::Pcb>,
    /// In the format of the `NT_X86_XSTATE` regset (ptrace(2)).
    pub xstate: Vec<u8>,
    /// Both pending queues in order, told apart by `abi::SI_SHARED`.
    pub siginfos: Vec<abi::Siginfo>,
}

impl RawPcb {
    /// One with nothing in it, to be filled by hand.
    pub fn empty() -> Self {
        RawPcb {
            sections: 0,
            pcb: Box::default(),
            xstate: Vec::new(),
            siginfos: Vec::new(),
        }
    }
}

/// Why a restore failed, and how far it got.
#[derive(Debug)]
pub struct RestoreError {
    /// What the module said; `pmig_abi.h` lists the errors.
    pub source: io::Error,
    /// `abi::SEC_*` that were restored.
    pub done: u64,
    /// The one section that failed, or 0 if the failure was before any.
    pub failed: u64,
}

impl fmt::Display for RestoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "restore by the kernel module: section {}: {}",
            section_name(self.failed),
            self.source
        )
    }
}

impl std::error::Error for RestoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// A section's name in messages.
pub fn section_name(section: u64) -> &'static str {
    match section {
        0 => "none",
        abi::SEC_REGS => "registers",
        abi::SEC_XSTATE => "xstate",
        abi::SEC_SIGMASK => "signal mask",
        abi::SEC_ALTSTACK => "alternate stack",
        abi::SEC_PENDING => "pending signals",
        abi::SEC_RESTART => "restart block",
        abi::SEC_SCHED => "scheduling",
        abi::SEC_COMM => "name",
        abi::SEC_TIDS => "tid addresses",
        abi::SEC_RSEQ => "rseq",
        abi::SEC_PRCTL => "prctl settings",
        abi::SEC_SIGACTIONS => "signal actions",
        abi::SEC_SHARED_PENDING => "shared pending signals",
        abi::SEC_MM => "memory bounds",
        abi::SEC_EXE => "executable link",
        abi::SEC_OOM => "oom score",
        abi::SEC_ITIMERS => "interval timers",
        abi::SEC_OWN => "settings of its own",
        abi::SEC_INFO => "identity",
        _ => "unknown",
    }
}

impl Kmod {
    /// Opens the device and asks the module what it is.
    ///
    /// # Errors
    /// `Ok(None)` if there is no module. An error if there is one that cannot
    /// be used: no permission, or of another version (`Unsupported`).
    pub fn open() -> io::Result<Option<Self>> {
        let file = match OpenOptions::new().read(true).write(true).open(DEVICE) {
            Ok(file) => file,
            Err(e) if absent(&e) => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut query = abi::Query {
            size: size_of::<abi::Query>() as u32,
            ..Default::default()
        };
        // SAFETY: the structure announces its own size and holds no pointers.
        unsafe { call(&file, abi::IOC_QUERY, &mut query) }?;
        if query.abi_version != abi::ABI_VERSION {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "kernel module speaks version {}, this program {}",
                    query.abi_version,
                    abi::ABI_VERSION
                ),
            ));
        }
        Ok(Some(Kmod { file, query }))
    }

    /// The module's version of the contract.
    pub fn version(&self) -> u32 {
        self.query.abi_version
    }

    /// `abi::FEAT_*`
    pub fn features(&self) -> u64 {
        self.query.features
    }

    /// `abi::SEC_*` that can be captured here.
    pub fn capture_sections(&self) -> u64 {
        self.query.capture_sections
    }

    /// `abi::SEC_*` that can be restored here.
    pub fn restore_sections(&self) -> u64 {
        self.query.restore_sections
    }

    /// Bytes of an xstate on this machine.
    pub fn xstate_size(&self) -> u32 {
        self.query.xstate_size
    }

    /// Captures sections of the stopped task that `pidfd` stands for.
    ///
    /// The task must be in the ptrace stop of PTRACE_INTERRUPT, in a group
    /// stop, or frozen by cgroup version 2.
    ///
    /// # Errors
    /// As listed in `pmig_abi.h`.
    pub fn capture(&self, pidfd: BorrowedFd<'_>, sections: u64) -> io::Result<RawPcb> {
        let with_queues = sections & (abi::SEC_PENDING | abi::SEC_SHARED_PENDING) != 0;
        let mut out = RawPcb {
            sections,
            ..RawPcb::empty()
        };
        if sections & abi::SEC_XSTATE != 0 {
            out.xstate = vec![0; self.query.xstate_size as usize];
        }
        if with_queues {
            out.siginfos = vec![abi::Siginfo::default(); 16];
        }
        loop {
            let mut arg = self.arguments(pidfd, &mut out, sections);
            // SAFETY: the pointers in the structure are to buffers of `out`, as
            // long as said beside them, and `out` outlives the call.
            let result = unsafe { call(&self.file, abi::IOC_CAPTURE, &mut arg) };
            match result {
                Ok(()) => {
                    out.xstate.truncate(arg.xstate_size as usize);
                    out.siginfos.truncate(arg.siginfo_count as usize);
                    return Ok(out);
                }
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                    // Twice the room every time, so this ends.
                    let room = out.siginfos.len().max(arg.siginfo_count as usize) * 2;
                    let room = room.min(self.query.max_siginfos as usize);
                    if !with_queues || room <= out.siginfos.len() {
                        return Err(e);
                    }
                    out.siginfos = vec![abi::Siginfo::default(); room];
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Restores sections of `pcb` into the stopped task that `pidfd` stands
    /// for; with `abi::SEC_EXE`, `exe` becomes its executable.
    ///
    /// # Errors
    /// As listed in `pmig_abi.h`; `InvalidInput` for a section that `pcb` does
    /// not hold.
    pub fn restore(
        &self,
        pidfd: BorrowedFd<'_>,
        pcb: &RawPcb,
        sections: u64,
        exe: Option<BorrowedFd<'_>>,
    ) -> Result<(), RestoreError> {
        let missing = sections & !pcb.sections & !abi::SEC_EXE;
        if missing != 0 || exe.is_some() != (sections & abi::SEC_EXE != 0) {
            return Err(RestoreError {
                source: io::ErrorKind::InvalidInput.into(),
                done: 0,
                failed: missing & missing.wrapping_neg(),
            });
        }
        let mut copy = pcb.clone();
        copy.pcb.size = size_of::<abi::Pcb>() as u32;
        copy.pcb.flags = 0;
        copy.siginfos.retain(|s| {
            let section = if s.flags & abi::SI_SHARED != 0 {
                abi::SEC_SHARED_PENDING
            } else {
                abi::SEC_PENDING
            };
            sections & section != 0
        });
        if sections & abi::SEC_XSTATE == 0 {
            copy.xstate.clear();
        }
        let mut arg = self.arguments(pidfd, &mut copy, sections);
        if let Some(exe) = exe {
            arg.exe_fd = exe.as_raw_fd();
        }
        // SAFETY: the pointers in the structure are to buffers of `copy`, as
        // long as said beside them, and `copy` outlives the call.
        let result = unsafe { call(&self.file, abi::IOC_RESTORE, &mut arg) };
        result.map_err(|source| RestoreError {
            source,
            done: arg.done,
            failed: arg.failed,
        })
    }

    /// Lists the task's mappings without walking its page tables. The task
    /// need not be stopped; the list is then true only piecewise.
    ///
    /// # Errors
    /// As listed in `pmig_abi.h`; `InvalidData` if the list does not end.
    pub fn vmas(&self, pidfd: BorrowedFd<'_>) -> io::Result<Vec<abi::Vma>> {
        let mut out = Vec::new();
        let mut part = vec![abi::Vma::default(); 256];
        let mut start = 0;
        loop {
            let mut arg = abi::Vmas {
                size: size_of::<abi::Vmas>() as u32,
                pidfd: pidfd.as_raw_fd(),
                entry_size: size_of::<abi::Vma>() as u32,
                start,
                entries: part.as_mut_ptr() as u64,
                count: part.len() as u32,
                ..Default::default()
            };
            // SAFETY: `entries` points to `count` entries of `entry_size` bytes.
            unsafe { call(&self.file, abi::IOC_VMAS, &mut arg) }?;
            let got = (arg.count as usize).min(part.len());
            out.extend_from_slice(&part[..got]);
            if arg.next == 0 {
                return Ok(out);
            }
            if arg.next <= start || out.len() > MAX_VMAS {
                return Err(io::ErrorKind::InvalidData.into());
            }
            start = arg.next;
            if part.len() < 4096 {
                part.resize(4096, abi::Vma::default());
            }
        }
    }

    /// Whether the module can tell which pages were written: an older one, or
    /// one that did not find what it needs in its kernel, cannot.
    pub fn tells_writes(&self) -> bool {
        self.query.features & abi::FEAT_DIRTY != 0
    }

    /// Looks at the pages from `start` on, one for each of `words`
    /// (`abi::PAGE_*`, and which page it is). With `clean`, what is told as
    /// written counts as clean from then on.
    ///
    /// # Errors
    /// As listed in `pmig_abi.h`. What was written is lost then.
    pub fn written(
        &self,
        pidfd: BorrowedFd<'_>,
        start: u64,
        words: &mut [u64],
        clean: bool,
    ) -> io::Result<()> {
        let mut arg = abi::Dirty {
            size: size_of::<abi::Dirty>() as u32,
            flags: if clean { abi::DIRTY_CLEAN } else { 0 },
            pidfd: pidfd.as_raw_fd(),
            start,
            end: start + words.len() as u64 * 4096,
            pages: words.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the module writes one word a page between `start` and `end`,
        // and `words` has as many.
        unsafe { call(&self.file, abi::IOC_DIRTY, &mut arg) }
    }

    fn arguments(&self, pidfd: BorrowedFd<'_>, raw: &mut RawPcb, sections: u64) -> abi::Call {
        let pointer = |len: usize, p: u64| if len == 0 { 0 } else { p };
        abi::Call {
            size: size_of::<abi::Call>() as u32,
            pidfd: pidfd.as_raw_fd(),
            exe_fd: -1,
            sections,
            pcb: &raw mut *raw.pcb as u64,
            xstate: pointer(raw.xstate.len(), raw.xstate.as_mut_ptr() as u64),
            siginfos: pointer(raw.siginfos.len(), raw.siginfos.as_mut_ptr() as u64),
            pcb_size: size_of::<abi::Pcb>() as u32,
            xstate_size: raw.xstate.len() as u32,
            siginfo_count: raw.siginfos.len() as u32,
            ..Default::default()
        }
    }
}

fn absent(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV)
    )
}

/// # Safety
/// `arg` must begin with its own size, and every pointer in it must be valid
/// for the lengths it gives.
unsafe fn call<T>(file: &File, request: u32, arg: &mut T) -> io::Result<()> {
    // SAFETY: as the caller promises; the module reads and writes no more of
    // `arg` than its size.
    let r = unsafe { libc::ioctl(file.as_raw_fd(), request as libc::Ioctl, arg as *mut T) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
