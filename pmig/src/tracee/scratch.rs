//! Memory of ours inside a stopped process, for what it executes for us.

use std::cell::Cell;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::stopped::PAGE;
use super::{RemoteAddr, Stopped};
use crate::error::{Error, Result};
use crate::sys::{ptrace, runner};

/// Where the runner is, and where its table goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scratch {
    pub code: u64,
    pub table: u64,
    /// Bytes from `table` on.
    pub room: u64,
    /// Address and bytes of the mapping that holds both, where one was made.
    pub mapped: Option<(u64, u64)>,
}

/// Bytes of [`Spare`].
const SPARE: usize = 256;

/// The end of the vdso's last page, behind all its code: there the runner can
/// lie without a mapping of its own. The page becomes the process's own by
/// that, as by a debugger's breakpoint. What is lent is cleared again in the end.
pub(super) struct Spare {
    at: u64,
    mem: File,
    lent: Cell<bool>,
    /// The process may have registers that lead there.
    used: Cell<bool>,
}

impl Spare {
    /// Of a vdso with that content that ends at `end`; none, where something is
    /// there. `mem` is the process's.
    pub fn find(end: u64, vdso: &[u8], mem: &File) -> Option<Spare> {
        let code = runner::code();
        let last = vdso.last_chunk::<SPARE>()?;
        // Or the runner of a pmig that was killed.
        let rest = last.strip_prefix(code).unwrap_or(last);
        (code.len() <= SPARE && rest.iter().all(|b| *b == 0)).then_some(())?;
        Some(Spare {
            at: end - SPARE as u64,
            mem: mem.try_clone().ok()?,
            lent: Cell::new(false),
            used: Cell::new(false),
        })
    }

    pub fn contains(&self, address: u64) -> bool {
        (self.at..self.at + SPARE as u64).contains(&address)
    }

    /// Puts the runner there, if it is not there yet; `mem` is the memory of the
    /// process as it is now. `None`: this kernel or this process does not allow it.
    fn lend(&self, mem: &File) -> Option<u64> {
        if !self.has_the_runner(mem) {
            ptrace::step();
            let _ = mem.write_all_at(runner::code(), self.at);
            if !self.has_the_runner(mem) {
                return None;
            }
        }
        self.lent.set(true);
        self.used.set(true);
        Some(self.at)
    }

    fn has_the_runner(&self, mem: &File) -> bool {
        let code = runner::code();
        let mut there = vec![0; code.len()];
        mem.read_exact_at(&mut there, self.at).is_ok() && there == code
    }

    /// The process has its own registers.
    pub fn is_free_again(&self) {
        self.used.set(false);
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        // One that may still be in it needs it. And the program may have moved the vdso
        // away, and have something else there.
        if self.lent.get() && !self.used.get() && self.has_the_runner(&self.mem) {
            ptrace::step();
            let _ = self.mem.write_all_at(&[0; SPARE], self.at);
        }
    }
}

impl Stopped {
    /// Makes sure that a table of `len` bytes fits.
    pub(super) fn room_for(&mut self, len: usize) -> Result<()> {
        let len = len as u64;
        if self.scratch.is_none() {
            self.scratch = self.borrowed_room(len);
        }
        if self.scratch.is_some_and(|s| s.room >= len) {
            return Ok(());
        }
        let want = (PAGE + len).next_multiple_of(PAGE);
        self.relocate_scratch(0, want.max(4 * PAGE))
    }

    /// What a live program has anyhow and does not use, if a table of `len` bytes
    /// fits there.
    fn borrowed_room(&self, len: u64) -> Option<Scratch> {
        let home = self.home.as_ref()?;
        let spare = home.ground.spare.as_ref()?;
        let room = home.room.end - home.room.start;
        Some(Scratch {
            code: (room >= len).then(|| spare.lend(self.mem()))??,
            table: home.room.start,
            room,
            mapped: None,
        })
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
        if let Some((at, len)) = self.scratch() {
            self.call_at(call, libc::SYS_munmap, [at, len, 0, 0, 0, 0])?;
        }
        self.scratch = Some(Scratch::mapped(new, len));
        self.write(RemoteAddr(new), runner::code())
    }
}

impl Scratch {
    /// In a mapping of its own: the runner in its first page.
    pub fn mapped(at: u64, len: u64) -> Scratch {
        Scratch {
            code: at,
            table: at + PAGE,
            room: len - PAGE,
            mapped: Some((at, len)),
        }
    }

    /// Where the runner's instructions lie.
    pub fn runner(&self) -> Range<u64> {
        self.code..self.code + runner::code().len() as u64
    }
}

/// Memory that can be written and executed is not to be had.
fn is_forbidden(cause: &std::io::Error) -> bool {
    matches!(cause.raw_os_error(), Some(libc::EACCES | libc::EPERM))
}
