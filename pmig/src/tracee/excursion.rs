//! Excursions: what a stopped process executes for us, from the batch to the
//! registers that it gets back.

use std::ops::Range;
use std::rc::Rc;

use super::batch::Head;
use super::ground::Ground;
use super::home::{frame, frame_len};
use super::outside::{quiet_among, quiet_signal, unused_stack};
use super::scratch::Spare;
use super::stopped::PAGE;
use super::{Batch, Done, RemoteAddr, Stopped};
use crate::error::{Context, Error, Result};
use crate::sys::{ptrace, runner};

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
    room: Range<u64>,
}

impl Stopped {
    /// What a live program has anyhow and does not use, if a table of `len` bytes
    /// fits there.
    pub(super) fn borrowed_room(&self, len: u64) -> Option<(Rc<Spare>, Range<u64>)> {
        let home = self.home.as_ref()?;
        let room = home.room.clone();
        (room.end - room.start >= len).then_some((home.ground.spare.clone()?, room))
    }

    /// Executes a batch inside the process.
    pub fn run(&mut self, batch: Batch) -> Result<Done> {
        if batch.is_empty() {
            return Ok(Done::of_nothing(batch));
        }
        self.mask_for_batch()?;
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
        self.mask_for_batch()?;
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

    /// Takes our memory out of the process and gives it its own registers and
    /// mask; it stays stopped.
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
        if self.displaced {
            ptrace::set_regs(self.pid, &self.regs).context("set the registers of", self.pid)?;
            self.displaced = false;
        }
        if self.masked {
            ptrace::set_sigmask(self.pid, self.mask).context("set the signal mask of", self.pid)?;
            self.masked = false;
        }
        match self.home.take() {
            Some(home) => self.clear(&home),
            None => Ok(()),
        }
    }

    /// From the stop that a batch ended in to one of PTRACE_INTERRUPT.
    ///
    /// # Errors
    /// Those of ptrace; the process has ended.
    pub fn stop_anew(&mut self) -> Result<()> {
        self.leave_call()
    }

    /// Leaves the stack that was used as it was found: empty.
    fn clear(&self, home: &Home) -> Result<()> {
        let len = home.room.end - home.base;
        self.write(RemoteAddr(home.base), &vec![0; len as usize])
    }

    /// Blocks all signals but the one that ends batches.
    fn mask_for_batch(&mut self) -> Result<()> {
        if self.masked {
            return Ok(());
        }
        if self.live {
            self.end = match self.busy {
                Some(busy) => quiet_among(busy),
                None => quiet_signal(self.pid)?,
            };
            self.prepare_home()?;
        }
        let open = self.end.map_or(0, |s| 1u64 << (s - 1));
        ptrace::set_sigmask(self.pid, !open).context("set the signal mask of", self.pid)?;
        self.masked = true;
        Ok(())
    }

    fn prepare_home(&mut self) -> Result<()> {
        let ground = match self.ground.take() {
            Some(g) if g.holds(&self.mem) => g,
            _ => Ground::survey(self.pid)?,
        };
        let xstate = match self.seen.take() {
            Some(xstate) => xstate,
            None => self.xstate()?,
        };
        self.seen.take();
        if ground
            .spare
            .as_ref()
            .is_some_and(|s| s.contains(self.regs.rip))
        {
            return Err(Error::bad(
                format!("process {}", self.pid),
                "it still makes calls for a pmig that was killed; try again",
            ));
        }
        let frame_len = (frame_len(xstate.len()) as u64).next_multiple_of(PAGE);
        let len = frame_len + ROOM;
        let of = (self.pid, &self.mem);
        let base = unused_stack(of, self.regs.rsp, len, self.stack.take())?;
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
