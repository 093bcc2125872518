//! What can be learnt of a process, and of why it stopped, without running
//! anything in it.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result};
use crate::proc;
use crate::proc::smaps::Lines;
use crate::sys::ptrace::Regs;

const PAGE: u64 = 4096;

/// Opens `/proc/PID/mem` for both.
///
/// # Errors
/// [`Error::Gone`]; there is no right to.
pub fn open_mem(pid: i32) -> Result<File> {
    let path = format!("/proc/{pid}/mem");
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => Error::Gone(pid),
            _ => Error::Os {
                op: "open",
                object: path,
                cause: e,
            },
        })
}

pub(super) fn is_fault(signal: i32) -> bool {
    matches!(
        signal,
        libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE | libc::SIGTRAP | libc::SIGSYS
    )
}

/// Calls that the kernel ends with a hard EINTR whenever the thread is woken
/// (signal(7)) are made again, unless a handler really runs.
pub(super) fn undo_eintr(regs: &mut Regs) {
    const EINTR: i64 = -(libc::EINTR as i64);
    /// ERESTARTNOHAND, include/linux/errno.h
    const RESTART: i64 = -514;
    let again = matches!(
        regs.orig_rax as i64,
        libc::SYS_epoll_wait
            | libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_rt_sigtimedwait
            | libc::SYS_semop
            | libc::SYS_semtimedop
            | libc::SYS_msgrcv
            | libc::SYS_msgsnd
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_recvmmsg
            | libc::SYS_sendto
            | libc::SYS_sendmsg
            | libc::SYS_accept
            | libc::SYS_accept4
            | libc::SYS_connect
            | libc::SYS_io_getevents
            | 333 // io_pgetevents
            | libc::SYS_io_uring_enter
    );
    if again && regs.rax as i64 == EINTR {
        regs.rax = RESTART as u64;
    }
}

/// A signal that means nothing to this program: without a handler, ignored by
/// default, neither blocked nor pending.
pub(super) fn quiet_signal(pid: i32) -> Result<Option<i32>> {
    let text = proc::text(pid, "status")?;
    let busy = text
        .lines()
        .filter_map(|l| l.split_once(":\t"))
        .filter(|(k, _)| matches!(*k, "SigPnd" | "ShdPnd" | "SigBlk" | "SigCgt"))
        .filter_map(|(_, v)| u64::from_str_radix(v.trim(), 16).ok())
        .fold(0, |all, one| all | one);
    Ok(quiet_among(busy))
}

/// The same, where it is known which signals are caught, blocked or pending.
pub(super) fn quiet_among(busy: u64) -> Option<i32> {
    [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD]
        .into_iter()
        .find(|s| busy & (1 << (s - 1)) == 0)
}

/// `len` bytes of stack that the program does not use: at its low end, where
/// nothing is, or new ones below. `known`: where it was a moment ago; `ours`: where we
/// were before.
pub(super) fn unused_stack(
    (pid, mem): (i32, &File),
    sp: u64,
    len: u64,
    known: Option<Range<u64>>,
    ours: Option<u64>,
) -> Result<u64> {
    let is_empty = |stack: &Range<u64>| {
        let low = stack.start + len + PAGE;
        // A program that is on another stack may have left zeros here that it needs.
        let is_below = (low..stack.end).contains(&sp)
            || low < stack.end
                && !(stack.start..low).contains(&sp)
                && (ours == Some(stack.start) || is_untouched(pid, stack.start, len));
        let mut there = vec![0; len as usize];
        is_below
            && mem.read_exact_at(&mut there, stack.start).is_ok()
            && there.iter().all(|b| *b == 0)
    };
    if let Some(stack) = known.filter(is_empty) {
        return Ok(stack.start);
    }
    let lines = Lines::of(pid)?;
    let stack = lines
        .find(b"[stack]")
        .ok_or_else(|| Error::bad(format!("process {pid}"), "it has no stack of its own"))?;
    if is_empty(&stack) {
        return Ok(stack.start);
    }
    let floor = if (stack.start.saturating_sub(1 << 20)..stack.start).contains(&sp) {
        sp - 128
    } else {
        stack.start
    };
    // What lies right below is stack too, if in another mapping. Below anything else
    // nothing grows, and to write there is an error.
    Ok(lines.hole_below(floor & !(PAGE - 1), len))
}

/// Whether a process has never used that memory (`/proc/PID/pagemap`, proc(5)).
fn is_untouched(pid: i32, start: u64, len: u64) -> bool {
    let mut entries = vec![0; (len / PAGE * 8) as usize];
    File::open(format!("/proc/{pid}/pagemap"))
        .and_then(|pagemap| pagemap.read_exact_at(&mut entries, start / PAGE * 8))
        .is_ok_and(|()| entries.chunks_exact(8).all(|e| e[7] & 0xc0 == 0))
}

/// Writing below a stack makes it grow, within the limit of who writes.
pub(super) fn raise_stack_limit() {
    use nix::sys::resource::{getrlimit, setrlimit, Resource};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_STACK) {
        if soft != hard {
            let _ = setrlimit(Resource::RLIMIT_STACK, hard, hard);
        }
    }
}
