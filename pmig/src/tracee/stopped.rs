//! A stopped process.

use std::cell::RefCell;
use std::fs::File;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::excursion::Home;
use super::ground::Ground;
use super::outside::{is_fault, open_mem, undo_eintr};
use super::scratch::Scratch;
use super::RemoteAddr;
use crate::error::{Context, Error, Result};
use crate::proc::smaps::Lines;
use crate::proc::status::Status;
use crate::sys::ptrace::{self, Change, Regs, RseqConfig};

/// How long a process may take to stop, or to execute a batch.
const PATIENCE: Duration = Duration::from_secs(10);
pub(super) const PAGE: u64 = 4096;

/// A single-threaded process in ptrace-stop, held by this thread.
///
/// Not `Clone`, not `Send`: ptrace obeys only the thread that attached. Letting
/// the process go consumes it. Dropping it is the net for errors on the way:
/// the program gets its registers and signals back and goes on.
pub struct Stopped {
    pub(super) pid: i32,
    pub(super) mem: File,
    /// What the program will have when it goes on.
    pub(super) regs: Regs,
    pub(super) mask: u64,
    /// Whether the kernel holds other registers at present.
    pub(super) displaced: bool,
    /// Whether a mask of ours is in force.
    pub(super) masked: bool,
    /// Whether a system call may be taken up again from the present stop.
    pub(super) at_syscall: bool,
    pub(super) scratch: Option<Scratch>,
    /// `None` for a husk, which nobody else lives in.
    pub(super) home: Option<Home>,
    pub(super) ground: Option<Ground>,
    /// Where its stack lies, where that is known already.
    pub(super) stack: Option<Range<u64>>,
    /// Signals that are caught, blocked or pending, where that is known already.
    pub(super) busy: Option<u64>,
    /// A system call instruction, where one was looked for ahead of time.
    pub(super) way_out: Option<u64>,
    /// Its vector state, where that was read and nothing of ours has run since.
    pub(super) seen: RefCell<Option<Vec<u8>>>,
    pub(super) live: bool,
    /// The signal whose delivery ends a batch; `None`: step by system calls.
    pub(super) end: Option<i32>,
    /// Signals that came in between, sent again at the end.
    pub(super) held: Vec<i32>,
    pub(super) over: bool,
    /// It was led out of a restartable sequence, and its memory written to for that.
    left_section: bool,
    /// How long it may take to stop, or to execute a batch.
    pub(super) patience: Duration,
    pub(super) _thread: PhantomData<*const ()>,
}

impl Stopped {
    /// Stops a running process. No system call it is in will return EINTR for
    /// it.
    ///
    /// # Errors
    ///
    /// [`Error::Gone`] when it died, [`Error::Bad`] when it is stopped by job
    /// control.
    pub fn seize(pid: i32) -> Result<Stopped> {
        Stopped::seize_with(pid, open_mem(pid)?, || {})
    }

    /// The same, where [`open_mem`] was called before anybody waits. `attached` is
    /// called when it is traced, and still runs.
    ///
    /// # Errors
    /// Those of [`Stopped::seize`].
    pub fn seize_with(pid: i32, mem: File, attached: impl FnOnce()) -> Result<Stopped> {
        ptrace::seize(pid, ptrace::TRACESYSGOOD).map_err(|e| match e.raw_os_error() {
            Some(libc::ESRCH) => Error::Gone(pid),
            _ => Error::Os {
                op: "attach to",
                object: format!("process {pid}"),
                cause: e,
            },
        })?;
        let mut s = Stopped {
            pid,
            mem,
            regs: Regs::default(),
            mask: 0,
            displaced: false,
            masked: false,
            at_syscall: false,
            scratch: None,
            home: None,
            ground: None,
            stack: None,
            busy: None,
            way_out: None,
            seen: RefCell::default(),
            live: true,
            end: None,
            held: Vec::new(),
            over: false,
            left_section: false,
            patience: PATIENCE,
            _thread: PhantomData,
        };
        attached();
        ptrace::interrupt(pid).context("stop process", pid)?;
        s.await_stop()?;
        s.regs = ptrace::regs(pid).context("read the registers of", pid)?;
        s.mask = ptrace::sigmask(pid).context("read the signal mask of", pid)?;
        let mut regs = s.regs;
        undo_eintr(&mut regs);
        s.left_section = s.leave_rseq_section(&mut regs);
        if regs != s.regs {
            s.set_regs(&regs)?;
        }
        Ok(s)
    }

    /// Whether its memory was written to when it was stopped.
    pub(crate) fn was_written_to(&self) -> bool {
        self.left_section
    }

    /// Takes over a process that this thread seized and that stands at a trap,
    /// with the runner mapped at `scratch`.
    pub(crate) fn husk(pid: i32, scratch: RemoteAddr, len: u64) -> Result<Stopped> {
        Ok(Stopped {
            pid,
            mem: open_mem(pid)?,
            regs: ptrace::regs(pid).context("read the registers of", pid)?,
            mask: 0,
            displaced: true,
            masked: false,
            at_syscall: false,
            scratch: Some(Scratch::mapped(scratch.0, len)),
            home: None,
            ground: None,
            stack: None,
            busy: None,
            way_out: None,
            seen: RefCell::default(),
            live: false,
            end: Some(libc::SIGURG),
            held: Vec::new(),
            over: false,
            left_section: false,
            patience: PATIENCE,
            _thread: PhantomData,
        })
    }

    /// Spares the search for the way home, when one was made before the stop.
    ///
    /// # Errors
    /// [`Error::Bad`] where it still makes calls for a pmig that was killed.
    pub fn on(mut self, ground: Ground) -> Result<Stopped> {
        ground.is_left_by(self.pid, &self.regs)?;
        self.ground = Some(ground);
        Ok(self)
    }

    /// Spares the question which signals mean something to the program, when it was
    /// asked in this stop.
    pub fn signals_known(&mut self, status: &Status) {
        let [private, shared] = status.pending;
        self.busy = Some(private | shared | self.mask | status.caught);
    }

    /// Spares the list of all mappings, when one was read in this stop: there its
    /// stack lies.
    pub fn stack_lies_at(&mut self, stack: Option<Range<u64>>) {
        self.stack = stack;
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The program's registers, as at the stop or as last set.
    pub fn regs(&self) -> Regs {
        self.regs
    }

    /// Sets what the program will have when it goes on.
    pub fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        if !self.displaced {
            ptrace::set_regs(self.pid, regs).context("set the registers of", self.pid)?;
        }
        self.regs = *regs;
        Ok(())
    }

    /// FPU and vector state, as the NT_X86_XSTATE register set.
    pub fn xstate(&self) -> Result<Vec<u8>> {
        let xstate = ptrace::xstate(self.pid).context("read the vector state of", self.pid)?;
        if !self.masked {
            self.seen.replace(Some(xstate.clone()));
        }
        Ok(xstate)
    }

    pub fn set_xstate(&mut self, state: &[u8]) -> Result<()> {
        self.seen.take();
        ptrace::set_xstate(self.pid, state).context("set the vector state of", self.pid)
    }

    /// The signals that the program blocks.
    pub fn sigmask(&self) -> u64 {
        self.mask
    }

    /// Sets what the program will block when it goes on.
    pub fn set_sigmask(&mut self, mask: u64) -> Result<()> {
        if !self.masked {
            ptrace::set_sigmask(self.pid, mask).context("set the signal mask of", self.pid)?;
        }
        self.mask = mask;
        Ok(())
    }

    /// A queue of pending signals, of the thread or of the process.
    pub fn pending(&self, shared: bool) -> Result<Vec<[u8; 128]>> {
        ptrace::pending(self.pid, shared).context("read the pending signals of", self.pid)
    }

    pub fn rseq(&self) -> Result<RseqConfig> {
        ptrace::rseq(self.pid).context("read the rseq area of", self.pid)
    }

    /// Reads memory, whatever its protection.
    pub fn read(&self, at: RemoteAddr, buf: &mut [u8]) -> Result<()> {
        self.mem
            .read_exact_at(buf, at.0)
            .context("read memory of", format_args!("{} at {at}", self.pid))
    }

    /// Writes memory, whatever its protection.
    pub fn write(&self, at: RemoteAddr, buf: &[u8]) -> Result<()> {
        ptrace::step();
        self.mem
            .write_all_at(buf, at.0)
            .context("write memory of", format_args!("{} at {at}", self.pid))
    }

    /// /proc/PID/mem, open for both.
    pub fn mem(&self) -> &File {
        &self.mem
    }

    /// A mapping that is ours at present and no part of the program: where it
    /// begins, and its bytes.
    pub fn scratch(&self) -> Option<(u64, u64)> {
        self.scratch.and_then(|s| s.mapped)
    }

    /// Waits, no longer than `within`, until nothing is left of a process that
    /// was killed: of a dead one its parent learns only after its tracer.
    pub fn await_end(mut self, within: Duration) {
        self.over = true;
        let until = Instant::now() + within;
        let left = || until.saturating_duration_since(Instant::now());
        while !matches!(
            ptrace::wait(self.pid, left()),
            Ok(None | Some(Change::Gone)) | Err(_)
        ) {}
        let entry = format!("/proc/{}", self.pid);
        while std::path::Path::new(&entry).exists() && !left().is_zero() {
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Lets the process go on.
    pub fn detach(mut self) -> Result<()> {
        let settled = self.settle();
        // The last one gives back what was lent: while we still may.
        self.ground = None;
        self.over = true;
        let r = ptrace::detach(self.pid, 0).context("let go of process", self.pid);
        for signal in self.held.drain(..) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(self.pid),
                nix::sys::signal::Signal::try_from(signal).ok(),
            );
        }
        settled.and(r)
    }

    pub(super) fn borrowed(&self) -> Regs {
        Regs {
            orig_rax: u64::MAX,
            eflags: 0x202,
            rsp: self.home.as_ref().map_or(self.regs.rsp, |h| h.sp),
            rbp: self.home.as_ref().map_or(self.regs.rbp, |h| h.bp),
            ..self.regs
        }
    }

    /// Looks ahead of time for where the last call will be made from. The vdso
    /// must not move any more.
    ///
    /// # Errors
    /// There is no vdso.
    pub fn find_way_out(&mut self) -> Result<()> {
        self.way_out = Some(self.syscall_instruction()?);
        Ok(())
    }

    /// Where a single call can be made from.
    pub(super) fn syscall_instruction(&self) -> Result<u64> {
        let known = self.home.as_ref().map(|home| home.ground.syscall);
        if let Some(at) = known.or(self.way_out) {
            return Ok(at);
        }
        let vdso = Lines::of(self.pid)?
            .find(b"[vdso]")
            .ok_or_else(|| Error::bad(format!("process {}", self.pid), "it has no vdso"))?;
        let mut code = vec![0; (vdso.end - vdso.start) as usize];
        self.read(RemoteAddr(vdso.start), &mut code)?;
        code.windows(2)
            .position(|w| w == [0x0f, 0x05])
            .map(|at| vdso.start + at as u64)
            .ok_or_else(|| Error::bad("vdso", "it makes no system call"))
    }

    /// Makes one call with the instruction at `at`; an error of the call is an
    /// error.
    pub(super) fn call_at(&mut self, at: u64, number: i64, args: [u64; 6]) -> Result<u64> {
        self.enter_call(at, number, args)?;
        self.next_syscall_stop()?;
        self.at_syscall = true;
        self.result()
    }

    /// Up to the stop at the beginning of a call.
    pub(super) fn enter_call(&mut self, at: u64, number: i64, args: [u64; 6]) -> Result<()> {
        let mut regs = self.borrowed();
        regs.rip = at;
        regs.rax = number as u64;
        (regs.rdi, regs.rsi, regs.rdx) = (args[0], args[1], args[2]);
        (regs.r10, regs.r8, regs.r9) = (args[3], args[4], args[5]);
        self.displace(&regs)?;
        self.next_syscall_stop()
    }

    /// From a stop at a call to one on the way through signal handling: only there
    /// does the kernel take up an interrupted call again.
    pub(super) fn leave_call(&mut self) -> Result<()> {
        ptrace::interrupt(self.pid).context("interrupt process", self.pid)?;
        ptrace::cont(self.pid, 0).context("continue process", self.pid)?;
        self.await_stop()?;
        self.at_syscall = false;
        Ok(())
    }

    /// What the call just made returned.
    pub(super) fn result(&self) -> Result<u64> {
        let result = ptrace::regs(self.pid)
            .context("read the registers of", self.pid)?
            .rax as i64;
        if (-4095..0).contains(&result) {
            return Err(Error::Os {
                op: "make room",
                object: format!("in process {}", self.pid),
                cause: std::io::Error::from_raw_os_error(-result as i32),
            });
        }
        Ok(result as u64)
    }

    pub(super) fn next_syscall_stop(&mut self) -> Result<()> {
        ptrace::cont_to_syscall(self.pid, 0).context("continue process", self.pid)?;
        self.wait_for(|c| *c == Change::Syscall, ptrace::cont_to_syscall)
    }

    pub(super) fn until_signal(&mut self, signal: i32) -> Result<()> {
        let pid = self.pid;
        ptrace::cont(pid, 0).context("continue process", pid)?;
        self.wait_for(
            |c| {
                // Another one of that kind has no effect on the program, or it
                // would not have been chosen.
                *c == Change::Signal(signal)
                    && ptrace::siginfo(pid).is_ok_and(|info| {
                        let word = |at: usize| {
                            i32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes"))
                        };
                        word(8) == libc::SI_TKILL && word(16) == pid
                    })
            },
            ptrace::cont,
        )?;
        self.at_syscall = false;
        Ok(())
    }

    /// Steps from call to call until the runner tells its end.
    pub(super) fn until_last_call(&mut self, scratch: &Scratch) -> Result<()> {
        loop {
            self.next_syscall_stop()?;
            let regs = ptrace::regs(self.pid).context("read the registers of", self.pid)?;
            self.next_syscall_stop()?;
            if scratch.runner().contains(&regs.rip)
                && regs.orig_rax == libc::SYS_tgkill as u64
                && regs.rdx == 0
            {
                self.at_syscall = true;
                return Ok(());
            }
        }
    }

    /// Waits for one kind of stop; other stops are passed over with `go_on`,
    /// and signals that cannot be blocked are put aside.
    fn wait_for(
        &mut self,
        wanted: impl Fn(&Change) -> bool,
        go_on: fn(i32, i32) -> std::io::Result<()>,
    ) -> Result<()> {
        let until = Instant::now() + self.patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let change = ptrace::wait(self.pid, left).context("wait for process", self.pid)?;
            match change {
                None => {
                    return Err(Error::Deadline {
                        what: format!("a system call inside process {}", self.pid),
                        after: self.patience,
                    })
                }
                Some(Change::Gone) => {
                    self.over = true;
                    return Err(Error::Gone(self.pid));
                }
                Some(c) if wanted(&c) => return Ok(()),
                Some(Change::Signal(s)) if is_fault(s) => {
                    return Err(Error::bad(
                        format!("process {}", self.pid),
                        format!("signal {s} while it made our calls"),
                    ))
                }
                Some(Change::Signal(s)) => {
                    if Some(s) != self.end {
                        self.held.push(s);
                    }
                }
                Some(_) => {}
            }
            go_on(self.pid, 0).context("continue process", self.pid)?;
        }
    }

    /// Waits for the stop that PTRACE_INTERRUPT asked for; signals that come
    /// first are delivered to a live program.
    fn await_stop(&mut self) -> Result<()> {
        let until = Instant::now() + self.patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match ptrace::wait(self.pid, left).context("wait for process", self.pid)? {
                None => {
                    return Err(Error::Deadline {
                        what: format!("stopping process {}", self.pid),
                        after: self.patience,
                    })
                }
                Some(Change::Gone) => {
                    self.over = true;
                    return Err(Error::Gone(self.pid));
                }
                Some(Change::Event { event, signal }) if event == libc::PTRACE_EVENT_STOP => {
                    if signal != libc::SIGTRAP {
                        return Err(Error::bad(
                            format!("process {}", self.pid),
                            format!("it is stopped by job control (signal {signal})"),
                        ));
                    }
                    return Ok(());
                }
                Some(Change::Signal(s)) => {
                    let deliver = if self.masked {
                        if Some(s) != self.end {
                            self.held.push(s);
                        }
                        0
                    } else {
                        s
                    };
                    ptrace::cont(self.pid, deliver).context("continue process", self.pid)?;
                }
                Some(_) => ptrace::cont(self.pid, 0).context("continue process", self.pid)?,
            }
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        if self.live {
            if let Err(e) = self.settle() {
                tracing::warn!("process {} could not be put in order: {e}", self.pid);
            }
        }
        self.ground = None;
        let _ = ptrace::detach(self.pid, 0);
        for signal in self.held.drain(..) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(self.pid),
                nix::sys::signal::Signal::try_from(signal).ok(),
            );
        }
    }
}
