//! Descriptors of other processes: what nix has no wrapper for.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const KCMP_FILE: libc::c_long = 0;
const F_GETOWN_EX: libc::c_int = 16;
const F_GETSIG: libc::c_int = 11;

fn check(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// How two descriptors stand to each other in kcmp(2)'s order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Both name the same open file description.
    Same,
    Less,
    Greater,
    /// Different, and the kernel gives no order.
    Different,
}

/// Compares two descriptors of one process, kcmp(2) with `KCMP_FILE`.
///
/// # Errors
/// `EBADF` where one of them is closed, `EPERM` without ptrace access.
pub fn kcmp_file(pid: i32, a: i32, b: i32) -> io::Result<Order> {
    // SAFETY: kcmp takes numbers only.
    let ret = check(unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, a, b) })?;
    Ok(match ret {
        0 => Order::Same,
        1 => Order::Less,
        2 => Order::Greater,
        _ => Order::Different,
    })
}

/// Whether somebody is to be told by a signal when the file gets ready
/// (`F_SETOWN`, `F_SETSIG`; dnotify sets an owner as well).
pub fn tells_by_signal(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut owner = [0i32; 2];
    // SAFETY: F_GETOWN_EX writes a struct f_owner_ex, two ints, to `owner`.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) }.into())?;
    // SAFETY: F_GETSIG takes no argument.
    let signal = check(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) }.into())?;
    Ok(owner[1] != 0 || signal != 0)
}

/// How many bytes wait in a pipe, ioctl `FIONREAD`.
pub fn bytes_waiting(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut n: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to `n`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &mut n) }.into())?;
    Ok(n.max(0) as usize)
}
