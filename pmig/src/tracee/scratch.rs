//! Memory of ours inside a stopped process, for what it executes for us.

use super::stopped::{Scratch, PAGE};
use super::{RemoteAddr, Stopped};
use crate::error::{Error, Result};
use crate::sys::runner;

impl Stopped {
    /// Makes sure that a table of `len` bytes fits.
    pub(super) fn room_for(&mut self, len: usize) -> Result<()> {
        let want = (PAGE + len as u64).next_multiple_of(PAGE);
        if self.scratch.is_some_and(|s| s.len >= want) {
            return Ok(());
        }
        self.relocate_scratch(0, want.max(4 * PAGE))
    }

    /// Moves our memory to `at` (0: anywhere), with room for `len` bytes.
    pub(crate) fn relocate_scratch(&mut self, at: u64, len: u64) -> Result<()> {
        let call = self.syscall_instruction()?;
        let anon = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let fixed = if at == 0 {
            0
        } else {
            libc::MAP_FIXED_NOREPLACE as u64
        };
        let (read, write, exec) = (
            libc::PROT_READ as u64,
            libc::PROT_WRITE as u64,
            libc::PROT_EXEC as u64,
        );
        let map = |prot| [at, len, prot, anon | fixed, u64::MAX, 0];
        let new = match self.call_at(call, libc::SYS_mmap, map(read | write | exec)) {
            Ok(new) => new,
            // Executable first and writable after: the only order that a process
            // under PR_SET_MDWE allows.
            Err(Error::Os { cause, .. }) if is_forbidden(&cause) => {
                let new = self.call_at(call, libc::SYS_mmap, map(read | exec))?;
                let writable = [new + PAGE, len - PAGE, read | write, 0, 0, 0];
                self.call_at(call, libc::SYS_mprotect, writable)?;
                new
            }
            Err(e) => return Err(e),
        };
        if let Some(old) = self.scratch {
            self.call_at(call, libc::SYS_munmap, [old.at, old.len, 0, 0, 0, 0])?;
        }
        self.scratch = Some(Scratch { at: new, len });
        self.write(RemoteAddr(new), runner::code())
    }
}

/// Memory that can be written and executed is not to be had.
fn is_forbidden(cause: &std::io::Error) -> bool {
    matches!(cause.raw_os_error(), Some(libc::EACCES | libc::EPERM))
}
