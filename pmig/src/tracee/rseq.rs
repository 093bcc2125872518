//! A program that was stopped inside a restartable sequence (rseq(2)).

use super::{RemoteAddr, Stopped};
use crate::sys::ptrace::Regs;

impl Stopped {
    /// A program stopped inside a restartable sequence goes on at the
    /// sequence's abort address, as after any preemption (rseq(2)). Whether it was.
    pub(super) fn leave_rseq_section(&self, regs: &mut Regs) -> bool {
        // A sequence makes no system calls.
        if regs.orig_rax as i64 >= 0 {
            return false;
        }
        let Ok(config) = self.rseq() else {
            return false;
        };
        if config.address == 0 {
            return false;
        }
        let word = |at: u64| {
            let mut b = [0; 8];
            self.read(RemoteAddr(at), &mut b).ok()?;
            Some(u64::from_le_bytes(b))
        };
        let Some(section @ 1..) = word(config.address.wrapping_add(8)) else {
            return false;
        };
        let field = |n: u64| word(section.wrapping_add(8 * n));
        if let (Some(start), Some(len), Some(abort)) = (field(1), field(2), field(3)) {
            if regs.rip.wrapping_sub(start) < len {
                regs.rip = abort;
                let _ = self.write(RemoteAddr(config.address + 8), &[0; 8]);
                return true;
            }
        }
        false
    }
}
