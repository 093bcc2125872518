//! userfaultfd(2), both ways that pmig uses it: write protection in its
//! asynchronous mode, where the kernel takes the faults and only remembers which
//! pages were written, and absent pages that somebody fills in when they are
//! touched.

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
const REGISTER_MODE_MISSING: u64 = 1;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const FEATURE_EVENT_FORK: u64 = 1 << 1;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
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

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    zeroed: i64,
}

/// Chooses to be told of faults on absent pages, and of all that happens to the
/// address space meanwhile: whoever discards, unmaps or moves memory, or forks,
/// waits until that is read. Needs `CAP_SYS_PTRACE`.
pub fn enable_missing(fd: &OwnedFd) -> io::Result<()> {
    let mut api = Api {
        api: API,
        features: FEATURE_EVENT_FORK
            | FEATURE_EVENT_REMAP
            | FEATURE_EVENT_REMOVE
            | FEATURE_EVENT_UNMAP,
        ioctls: 0,
    };
    ioctl(fd, UFFDIO_API, &mut api)
}

/// Faults on absent pages of a range wait to be filled from now on.
pub fn register_missing(fd: &OwnedFd, start: u64, len: u64) -> io::Result<()> {
    let mut r = Register {
        start,
        len,
        mode: REGISTER_MODE_MISSING,
        ioctls: 0,
    };
    ioctl(fd, UFFDIO_REGISTER, &mut r)
}

/// Fills absent pages and wakes who waits for them. Returns the bytes filled,
/// where it is not all of them; the next page says why when it is tried alone.
///
/// # Errors
/// EEXIST: a page is there. EAGAIN: something happens to the address space that
/// is to be read first. ENOENT: nothing is registered there. ESRCH: the process
/// has ended.
pub fn copy(fd: &OwnedFd, to: u64, bytes: &[u8]) -> io::Result<u64> {
    let mut arg = Copy {
        dst: to,
        src: bytes.as_ptr() as u64,
        len: bytes.len() as u64,
        mode: 0,
        copied: 0,
    };
    match ioctl(fd, UFFDIO_COPY, &mut arg) {
        Err(_) if arg.copied > 0 => Ok(arg.copied as u64),
        r => r.map(|()| bytes.len() as u64),
    }
}

/// Fills absent pages with zeros, as [`copy`] would.
///
/// # Errors
/// As [`copy`].
pub fn zero(fd: &OwnedFd, to: u64, len: u64) -> io::Result<u64> {
    let mut arg = Zero {
        range: Range { start: to, len },
        mode: 0,
        zeroed: 0,
    };
    match ioctl(fd, UFFDIO_ZEROPAGE, &mut arg) {
        Err(_) if arg.zeroed > 0 => Ok(arg.zeroed as u64),
        r => r.map(|()| len),
    }
}

/// Wakes who waits in a range; they look again.
pub fn wake(fd: &OwnedFd, start: u64, len: u64) -> io::Result<()> {
    ioctl(fd, UFFDIO_WAKE, &mut Range { start, len })
}

/// Bytes of a message (`struct uffd_msg`).
pub const MESSAGE: usize = 32;

/// What a userfaultfd tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Somebody touched this absent page.
    Fault(u64),
    /// The process forked; the child's memory is told of by this descriptor, which
    /// [`adopt`] makes one's own.
    Fork(i32),
    /// A mapping lies elsewhere now.
    Moved { from: u64, to: u64, len: u64 },
    /// Content was discarded, or the memory itself is gone.
    Gone(std::ops::Range<u64>),
}

impl Message {
    /// `None`: there is no message (its first byte is zero), or an unknown one.
    pub fn parse(raw: &[u8; MESSAGE]) -> Option<Message> {
        let word = |n: usize| {
            let at = 8 + 8 * n;
            raw[at..at + 8].try_into().map_or(0, u64::from_ne_bytes)
        };
        match raw[0] {
            0x12 => Some(Message::Fault(word(1) & !0xfff)),
            0x13 => Some(Message::Fork(word(0) as u32 as i32)),
            0x14 => Some(Message::Moved {
                from: word(0),
                to: word(1),
                len: word(2),
            }),
            0x15 | 0x16 => Some(Message::Gone(word(0)..word(1))),
            _ => None,
        }
    }
}

/// Takes the descriptor that a [`Message::Fork`] that this process has read brought.
pub fn adopt(fork: i32) -> OwnedFd {
    // SAFETY: the kernel made this descriptor for us when the message was read,
    // and each message is acted on once.
    unsafe { OwnedFd::from_raw_fd(fork) }
}
