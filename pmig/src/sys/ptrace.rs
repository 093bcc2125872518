//! ptrace(2) requests, typed. Every request but `seize` and `interrupt` needs
//! a tracee that is stopped and was seized by the calling thread.

use std::io;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};

/// The general registers, as `struct user_regs_struct` of `<sys/user.h>`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Regs {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    /// The number of the interrupted system call, or -1.
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// What PTRACE_GET_RSEQ_CONFIGURATION tells (`struct
/// ptrace_rseq_configuration`); all zero where nothing is registered.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RseqConfig {
    pub address: u64,
    pub size: u32,
    pub signature: u32,
    pub flags: u32,
    pad: u32,
}

/// `<elf.h>`
const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;

/// `<linux/ptrace.h>`
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_PEEKSIGINFO_SHARED: u32 = 1;

/// Kill the tracee when the tracer dies.
pub const EXITKILL: usize = libc::PTRACE_O_EXITKILL as usize;
/// Stop after execve.
pub const TRACEEXEC: usize = libc::PTRACE_O_TRACEEXEC as usize;
/// Tell system call stops from SIGTRAP.
pub const TRACESYSGOOD: usize = libc::PTRACE_O_TRACESYSGOOD as usize;

/// For tests: the number of further steps after which this process dies, as
/// by `kill -9` between two system calls; negative for never.
#[cfg(test)]
pub static DIE_AFTER: std::sync::atomic::AtomicI64 = std::sync::atomic::AtomicI64::new(-1);

/// Something is about to be done to a process.
#[cfg(test)]
pub fn step() {
    if DIE_AFTER.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) == 0 {
        let _ = nix::sys::signal::raise(Signal::SIGKILL);
    }
}

/// Something is about to be done to a process.
#[cfg(not(test))]
pub fn step() {}

fn request(what: u32, pid: i32, addr: usize, data: usize) -> io::Result<i64> {
    step();
    // SAFETY: every caller in this file passes what the request asks for:
    // numbers, or pointers to live buffers of the size that goes with them.
    let r = unsafe { libc::ptrace(what as _, pid, addr, data) };
    if r == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

/// PTRACE_SEIZE: attaches without stopping.
pub fn seize(pid: i32, options: usize) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, pid, 0, options).map(drop)
}

/// PTRACE_INTERRUPT: asks a seized tracee to stop.
pub fn interrupt(pid: i32) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, pid, 0, 0).map(drop)
}

/// PTRACE_CONT, delivering `signal` (0: none).
pub fn cont(pid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, pid, 0, signal as usize).map(drop)
}

/// PTRACE_SYSCALL: goes on to the next system call's entry or exit.
pub fn cont_to_syscall(pid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, pid, 0, signal as usize).map(drop)
}

/// PTRACE_DETACH, delivering `signal` (0: none).
pub fn detach(pid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, pid, 0, signal as usize).map(drop)
}

/// The general registers.
pub fn regs(pid: i32) -> io::Result<Regs> {
    let mut regs = Regs::default();
    let mut iov = libc::iovec {
        iov_base: (&raw mut regs).cast(),
        iov_len: size_of::<Regs>(),
    };
    request(
        libc::PTRACE_GETREGSET,
        pid,
        NT_PRSTATUS,
        &raw mut iov as usize,
    )?;
    if iov.iov_len != size_of::<Regs>() {
        return Err(io::Error::other("not a 64-bit process"));
    }
    Ok(regs)
}

/// Writes the general registers; the kernel refuses what user space may not
/// have.
pub fn set_regs(pid: i32, regs: &Regs) -> io::Result<()> {
    let mut copy = *regs;
    let mut iov = libc::iovec {
        iov_base: (&raw mut copy).cast(),
        iov_len: size_of::<Regs>(),
    };
    request(
        libc::PTRACE_SETREGSET,
        pid,
        NT_PRSTATUS,
        &raw mut iov as usize,
    )
    .map(drop)
}

/// FPU and vector state in the standard (not compacted) XSAVE format.
pub fn xstate(pid: i32) -> io::Result<Vec<u8>> {
    // With AMX the state exceeds 8 KB; 64 KB leaves room for what comes.
    let mut buf = vec![0u8; 64 << 10];
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    request(
        libc::PTRACE_GETREGSET,
        pid,
        NT_X86_XSTATE,
        &raw mut iov as usize,
    )?;
    buf.truncate(iov.iov_len);
    Ok(buf)
}

/// Writes FPU and vector state.
pub fn set_xstate(pid: i32, state: &[u8]) -> io::Result<()> {
    let mut copy = state.to_vec();
    let mut iov = libc::iovec {
        iov_base: copy.as_mut_ptr().cast(),
        iov_len: copy.len(),
    };
    request(
        libc::PTRACE_SETREGSET,
        pid,
        NT_X86_XSTATE,
        &raw mut iov as usize,
    )
    .map(drop)
}

/// The blocked signals; inside sigsuspend(2) and its kin, those that will be
/// blocked again after it.
pub fn sigmask(pid: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    request(libc::PTRACE_GETSIGMASK, pid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// Replaces the blocked signals.
pub fn set_sigmask(pid: i32, mask: u64) -> io::Result<()> {
    let mut mask = mask;
    request(libc::PTRACE_SETSIGMASK, pid, 8, &raw mut mask as usize).map(drop)
}

/// Reads a whole queue of pending signals without taking any off.
pub fn pending(pid: i32, shared: bool) -> io::Result<Vec<[u8; 128]>> {
    let mut all = Vec::new();
    loop {
        let mut some = [[0u8; 128]; 32];
        let mut args = libc::ptrace_peeksiginfo_args {
            off: all.len() as u64,
            flags: if shared { PTRACE_PEEKSIGINFO_SHARED } else { 0 },
            nr: some.len() as i32,
        };
        let n = request(
            libc::PTRACE_PEEKSIGINFO,
            pid,
            &raw mut args as usize,
            some.as_mut_ptr() as usize,
        )? as usize;
        all.extend_from_slice(&some[..n.min(some.len())]);
        if n < some.len() {
            return Ok(all);
        }
    }
}

/// What rseq(2) area is registered.
pub fn rseq(pid: i32) -> io::Result<RseqConfig> {
    let mut config = RseqConfig::default();
    request(
        PTRACE_GET_RSEQ_CONFIGURATION as _,
        pid,
        size_of::<RseqConfig>(),
        &raw mut config as usize,
    )?;
    Ok(config)
}

/// The siginfo of the signal that the tracee is stopped for.
pub fn siginfo(pid: i32) -> io::Result<[u8; 128]> {
    let mut info = [0u8; 128];
    request(libc::PTRACE_GETSIGINFO, pid, 0, info.as_mut_ptr() as usize)?;
    Ok(info)
}

/// Whether system call user dispatch is on (`<linux/ptrace.h>`, 0x4211).
pub fn syscall_user_dispatch(pid: i32) -> io::Result<bool> {
    // struct ptrace_sud_config { __u64 mode, selector, offset, len; }
    let mut config = [0u64; 4];
    request(0x4211, pid, 32, config.as_mut_ptr() as usize)?;
    Ok(config[0] != 0)
}

/// How a tracee changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A PTRACE_EVENT_* stop, and the signal reported with it.
    Event { event: i32, signal: i32 },
    /// Stopped before this signal is delivered.
    Signal(i32),
    /// Entry or exit of a system call.
    Syscall,
    /// Dead.
    Gone,
}

/// Blocks SIGCHLD, so that [`wait`] hears it. For the main thread, before
/// there are others: one that does not block it would swallow it.
pub fn listen() {
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    // Without it every wait takes longer, and nothing else.
    let _ = set.thread_block();
}

/// Waits for a change of the tracee, at most for `deadline`; `None` when it
/// passes. Sleeps on SIGCHLD: see [`listen`].
pub fn wait(pid: i32, deadline: Duration) -> io::Result<Option<Change>> {
    let until = Instant::now() + deadline;
    loop {
        let mut status = 0;
        // SAFETY: status is a live int.
        let r = unsafe { libc::waitpid(pid, &mut status, libc::__WALL | libc::WNOHANG) };
        if r == pid {
            if !libc::WIFSTOPPED(status) {
                return Ok(Some(Change::Gone));
            }
            let signal = libc::WSTOPSIG(status);
            let event = status >> 16;
            return Ok(Some(if event != 0 {
                Change::Event { event, signal }
            } else if signal == libc::SIGTRAP | 0x80 {
                Change::Syscall
            } else {
                Change::Signal(signal)
            }));
        }
        if r == -1 && Errno::last() != Errno::EINTR {
            return match Errno::last() {
                Errno::ECHILD => Ok(Some(Change::Gone)),
                e => Err(e.into()),
            };
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        // A SIGCHLD that another thread takes must not cost more than this.
        await_sigchld(left.min(Duration::from_millis(5)));
    }
}

fn await_sigchld(at_most: Duration) {
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    let time = libc::timespec {
        tv_sec: at_most.as_secs() as i64,
        tv_nsec: at_most.subsec_nanos() as i64,
    };
    // SAFETY: both pointers are to live values; no siginfo is asked for.
    unsafe { libc::sigtimedwait(set.as_ref(), null_mut(), &time) };
}
