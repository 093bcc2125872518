//! Descriptors for processes (pidfd_open(2), pidfd_getfd(2)).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn owned(r: libc::c_long) -> io::Result<OwnedFd> {
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(r as i32) })
}

/// A descriptor for a process, which never comes to mean another one.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A copy of descriptor `fd` of that process.
pub fn get(process: BorrowedFd<'_>, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) })
}

/// Kills that process. One that is gone already is no error.
pub fn kill(process: BorrowedFd<'_>) {
    send_signal(process, libc::SIGKILL);
}

/// Sends it a signal, as kill(2) would. One that is gone is no error.
pub fn send_signal(process: BorrowedFd<'_>, signal: i32) {
    // SAFETY: numbers and a null pointer, which means no siginfo.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            0usize,
            0,
        )
    };
}
