//! userfaultfd(2) write protection in its asynchronous mode: the kernel takes
//! the faults and only remembers which pages were written.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `struct uffdio_api`, `<linux/userfaultfd.h>`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

const API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const REGISTER_MODE_WP: u64 = 1 << 1;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;

/// Flag of userfaultfd(2): faults of the kernel itself are not handled, which
/// is all that an unprivileged process may ask for. The asynchronous mode sees
/// them nevertheless.
pub const USER_MODE_ONLY: i32 = 1;

fn ioctl<T>(fd: &OwnedFd, request: u64, arg: &mut T) -> io::Result<()> {
    // SAFETY: each caller passes the struct that belongs to the request, and
    // it lives for the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, arg as *mut T) };
    if r == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Makes one for this process: userfaultfd(2).
pub fn create() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    // SAFETY: a number; the descriptor is new.
    unsafe {
        match libc::syscall(libc::SYS_userfaultfd, flags) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd as i32)),
        }
    }
}

/// Chooses asynchronous write protection (Linux 6.7).
pub fn enable_async_wp(fd: &OwnedFd) -> io::Result<()> {
    let mut api = Api {
        api: API,
        features: FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED,
        ioctls: 0,
    };
    ioctl(fd, UFFDIO_API, &mut api)
}

/// The same without anything chosen, for what only marks mappings.
pub fn enable(fd: &OwnedFd) -> io::Result<()> {
    let mut api = Api {
        api: API,
        features: 0,
        ioctls: 0,
    };
    ioctl(fd, UFFDIO_API, &mut api)
}

/// Registers a range of the address space that the descriptor was made in.
/// Doing it again is no error.
pub fn register_wp(fd: &OwnedFd, start: u64, len: u64) -> io::Result<()> {
    let mut r = Register {
        start,
        len,
        mode: REGISTER_MODE_WP,
        ioctls: 0,
    };
    ioctl(fd, UFFDIO_REGISTER, &mut r)
}

/// Takes a range out again, and its write protection off.
pub fn unregister(fd: &OwnedFd, start: u64, len: u64) -> io::Result<()> {
    ioctl(fd, UFFDIO_UNREGISTER, &mut Range { start, len })
}
