//! Excursions: what a stopped process executes for us, from the batch to the
//! registers that it gets back.

use std::ops::Range;

use super::batch::Head;
use super::ground::Ground;
use super::home::{frame, frame_len};
use super::outside::{quiet_among, quiet_signal, unused_stack};
use super::stopped::PAGE;
use super::{Batch, Done, RemoteAddr, Stopped};
use crate::error::{Context, Result};
use crate::sys::ptrace::{self, Regs};
use crate::sys::runner;

/// In the arguments of [`Stopped::prime`]: the address of its data.
pub const DATA: u64 = 0xda7a_da7a_da7a_da7a;

/// What became of a call that was to be left hanging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Primed {
    /// It waits: a restart block is in place, and the program goes on in it
    /// when its registers say so (rax -516).
    Armed,
    /// It was over at once, with this result.
    Finished(i64),
}

/// Bytes of its unused stack that a live program lends for tables.
const ROOM: u64 = 3 * PAGE;

/// What keeps a live program safe while it runs our calls.
pub(super) struct Home {
    pub(super) ground: Ground,
    pub(super) sp: u64,
    pub(super) bp: u64,
    /// Where the frame begins.
    base: u64,
    /// Where tables may go.
    pub(super) room: Range<u64>,
}

impl Stopped {
    /// Executes a batch inside the process.
    pub fn run(&mut self, batch: Batch) -> Result<Done> {
        if batch.is_empty() {
            return Ok(Done::of_nothing(batch));
        }
        self.prepare()?;
        self.room_for(batch.len())?;
        let scratch = self.scratch.expect("made just now");
        let (home_sp, home_bp, home_ip) = self
            .home
            .as_ref()
            .map_or((0, 0, 0), |h| (h.sp, h.bp, h.ground.syscall));
        let (mapped, mapped_len) = scratch.mapped.unwrap_or_default();
        let table = batch.table(
            scratch.table,
            &Head {
                pid: self.pid,
                signal: self.end.unwrap_or(0),
                scratch: mapped,
                scratch_len: mapped_len,
                home_sp,
                home_bp,
                home_ip,
            },
        );
        self.write(RemoteAddr(scratch.table), &table)?;
        let mut regs = self.borrowed();
        regs.rip = scratch.code;
        regs.rbx = scratch.table;
        self.displace(&regs)?;
        match self.end {
            Some(signal) => self.until_signal(signal)?,
            None => self.until_last_call(&scratch)?,
        }
        let mut after = vec![0; table.len()];
        self.read(RemoteAddr(scratch.table), &mut after)?;
        batch.done(self.pid, after)
    }

    /// Makes a call that will wait, and leaves it waiting with its restart
    /// block in place. `data` is put where the arguments say [`DATA`].
    pub fn prime(&mut self, number: i64, args: [u64; 6], data: &[u8]) -> Result<Primed> {
        self.prepare()?;
        self.room_for(data.len())?;
        let scratch = self.scratch.expect("made just now");
        self.write(RemoteAddr(scratch.table), data)?;
        let call = runner::code()
            .windows(2)
            .position(|w| w == [0x0f, 0x05])
            .expect("the runner makes calls");
        let arg = |i: usize| {
            if args[i] == DATA {
                scratch.table
            } else {
                args[i]
            }
        };
        let mut regs = self.borrowed();
        regs.rip = scratch.code + call as u64;
        regs.rax = number as u64;
        (regs.rdi, regs.rsi, regs.rdx) = (arg(0), arg(1), arg(2));
        (regs.r10, regs.r8, regs.r9) = (arg(3), arg(4), arg(5));
        self.displace(&regs)?;
        self.next_syscall_stop()?;
        self.leave_call()?;
        let result = ptrace::regs(self.pid)
            .context("read the registers of", self.pid)?
            .rax as i64;
        Ok(match result {
            -516 => Primed::Armed,
            r => Primed::Finished(r),
        })
    }

    /// Gives the process its own mask, registers and memory; it stays stopped.
    /// Only what a [`Ground`] has lent stays with that.
    pub fn settle(&mut self) -> Result<()> {
        if let Some((start, len)) = self.scratch() {
            let at = self.syscall_instruction()?;
            let args = [start, len, 0, 0, 0, 0];
            self.enter_call(at, libc::SYS_munmap, args)?;
            // The call is made, and its end is this stop.
            self.leave_call()?;
            self.result()?;
        } else if self.at_syscall {
            self.leave_call()?;
        }
        self.scratch = None;
        // In this order: with other registers it goes home, which brings the mask back.
        if self.masked {
            ptrace::set_sigmask(self.pid, self.mask).context("set the signal mask of", self.pid)?;
            self.masked = false;
        }
        if self.displaced {
            ptrace::set_regs(self.pid, &self.regs).context("set the registers of", self.pid)?;
            self.displaced = false;
        }
        let Some(home) = self.home.take() else {
            return Ok(());
        };
        if let Some(spare) = &home.ground.spare {
            spare.is_free_again();
        }
        // Leaves the stack that was used as it was found: empty.
        home.ground.ours.set(Some(home.base));
        let len = home.room.end - home.base;
        self.write(RemoteAddr(home.base), &vec![0; len as usize])
    }

    /// From the stop that a batch ended in to one of PTRACE_INTERRUPT.
    ///
    /// # Errors
    /// Those of ptrace; the process has ended.
    pub fn stop_anew(&mut self) -> Result<()> {
        self.leave_call()
    }

    /// Gives it other registers, and blocks all signals but the one that ends
    /// batches: in this order, for only with other registers it has a way home, to its
    /// own mask.
    pub(super) fn displace(&mut self, regs: &Regs) -> Result<()> {
        ptrace::set_regs(self.pid, regs).context("set the registers of", self.pid)?;
        self.displaced = true;
        if !self.masked {
            let open = self.end.map_or(0, |s| 1u64 << (s - 1));
            ptrace::set_sigmask(self.pid, !open).context("set the signal mask of", self.pid)?;
            self.masked = true;
        }
        Ok(())
    }

    /// Makes a live program's way home.
    fn prepare(&mut self) -> Result<()> {
        if !self.live || self.home.is_some() {
            return Ok(());
        }
        self.end = match self.busy {
            Some(busy) => quiet_among(busy),
            None => quiet_signal(self.pid)?,
        };
        let ground = match self.ground.take() {
            Some(g) if g.holds(&self.mem) => g,
            _ => Ground::survey(self.pid)?,
        };
        let xstate = match self.seen.take() {
            Some(xstate) => xstate,
            None => self.xstate()?,
        };
        self.seen.take();
        ground.is_left_by(self.pid, &self.regs)?;
        let frame_len = (frame_len(xstate.len()) as u64).next_multiple_of(PAGE);
        let len = frame_len + ROOM;
        let of = (self.pid, &self.mem);
        let base = unused_stack(of, self.regs.rsp, len, self.stack.take(), ground.ours.get())?;
        let frame = frame(
            base,
            &ground.gadget,
            ground.syscall,
            ground.back,
            &self.regs,
            &xstate,
            self.mask,
        )?;
        self.write(RemoteAddr(base), &frame.bytes)?;
        self.ground = Some(ground.clone());
        self.home = Some(Home {
            ground,
            sp: frame.sp,
            bp: frame.bp,
            base,
            room: base + frame_len..base + len,
        });
        Ok(())
    }
}
