//! Terminals: ioctl_tty(2), and what nix has no wrapper for.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use serde::{Deserialize, Serialize};

/// Special characters of the kernel's `struct termios2`.
const CHARS: usize = 19;
/// A special character that is switched off.
pub const DISABLED: u8 = 0;

/// Modes of a terminal, `struct termios2`: termios(3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modes {
    pub input: u32,
    pub output: u32,
    pub control: u32,
    pub local: u32,
    /// The line discipline; 0: N_TTY.
    pub line: u8,
    pub chars: [u8; CHARS],
    /// In bits per second, as the speed.
    pub ispeed: u32,
    pub ospeed: u32,
}

/// `struct winsize`, in characters and in pixels (0: not known).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    pub rows: u16,
    pub cols: u16,
    pub width: u16,
    pub height: u16,
}

/// `<asm-generic/ioctls.h>`: what libc does not name.
const TIOCGDEV: libc::c_ulong = 0x8004_5432;
const TIOCGLCKTRMIOS: libc::c_ulong = 0x5456;
const TIOCGEXCL: libc::c_ulong = 0x8004_5440;
const TIOCGPTPEER: libc::c_ulong = 0x5441;
const TIOCSPTLCK: libc::c_ulong = 0x4004_5431;

fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// # Errors
/// `ENOTTY` where it is no terminal, `EIO` where it was hung up.
pub fn modes(fd: BorrowedFd<'_>) -> io::Result<Modes> {
    // SAFETY: all zeros is a struct termios2, which the kernel then fills.
    let t = unsafe {
        let mut t: libc::termios2 = std::mem::zeroed();
        check(libc::ioctl(fd.as_raw_fd(), libc::TCGETS2, &mut t))?;
        t
    };
    Ok(Modes {
        input: t.c_iflag,
        output: t.c_oflag,
        control: t.c_cflag,
        local: t.c_lflag,
        line: t.c_line,
        chars: t.c_cc,
        ispeed: t.c_ispeed,
        ospeed: t.c_ospeed,
    })
}

/// Sets all of them at once, without waiting for output or dropping input.
pub fn set_modes(fd: BorrowedFd<'_>, modes: &Modes) -> io::Result<()> {
    // SAFETY: all zeros is a struct termios2, of which the kernel only reads.
    unsafe {
        let mut t: libc::termios2 = std::mem::zeroed();
        t.c_iflag = modes.input;
        t.c_oflag = modes.output;
        t.c_cflag = modes.control;
        t.c_lflag = modes.local;
        t.c_line = modes.line;
        t.c_cc = modes.chars;
        t.c_ispeed = modes.ispeed;
        t.c_ospeed = modes.ospeed;
        check(libc::ioctl(fd.as_raw_fd(), libc::TCSETS2, &t)).map(drop)
    }
}

/// Whether any mode is locked against changes (`TIOCSLCKTRMIOS`).
pub fn has_locked_modes(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // As large as struct termios, and more.
    let mut locked = [0u8; 64];
    // SAFETY: the kernel writes a struct termios, 36 bytes.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TIOCGLCKTRMIOS, locked.as_mut_ptr()) })?;
    Ok(locked.iter().any(|b| *b != 0))
}

pub fn size(fd: BorrowedFd<'_>) -> io::Result<Size> {
    let mut s = [0u16; 4];
    // SAFETY: struct winsize is four shorts.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, s.as_mut_ptr()) })?;
    Ok(Size {
        rows: s[0],
        cols: s[1],
        width: s[2],
        height: s[3],
    })
}

/// Sets it; whoever runs in the foreground gets SIGWINCH if it is another one.
pub fn set_size(fd: BorrowedFd<'_>, size: Size) -> io::Result<()> {
    let s = [size.rows, size.cols, size.width, size.height];
    // SAFETY: struct winsize is four shorts, which are only read.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, s.as_ptr()) }).map(drop)
}

/// The terminal behind a descriptor, as stat(2) shows device numbers; for
/// `/dev/tty` the one that was meant when it was opened.
pub fn device(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut n: libc::c_uint = 0;
    // SAFETY: TIOCGDEV writes one unsigned int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TIOCGDEV, &mut n) })?;
    Ok(decode(n))
}

/// A device number as the kernel shows it in 32 bits (`new_encode_dev`).
pub fn decode(n: u32) -> u64 {
    libc::makedev((n >> 8) & 0xfff, (n & 0xff) | ((n >> 12) & 0xf_ff00))
}

/// Whether others but root are kept from opening it (`TIOCEXCL`).
pub fn is_exclusive(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut n: libc::c_int = 0;
    // SAFETY: TIOCGEXCL writes one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TIOCGEXCL, &mut n) })?;
    Ok(n != 0)
}

pub fn set_exclusive(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCEXCL takes no argument.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCEXCL) }).map(drop)
}

/// Puts a byte into the terminal's input as if it had been typed.
///
/// # Errors
/// `EIO`, `EPERM` without CAP_SYS_ADMIN.
pub fn type_in(fd: BorrowedFd<'_>, byte: u8) -> io::Result<()> {
    // SAFETY: TIOCSTI reads one byte.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSTI, &byte) }).map(drop)
}

/// Moves at most `most` bytes of unread input into a pipe, splice(2): at no
/// moment are they in this process alone. 0: there are none.
pub fn take_input(fd: BorrowedFd<'_>, pipe: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
    // SAFETY: numbers, and null pointers, which mean no offsets.
    let n = unsafe {
        libc::splice(
            fd.as_raw_fd(),
            null_mut(),
            pipe.as_raw_fd(),
            null_mut(),
            most,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(n as usize)
}

/// If it controls this process, which runs in the background, leaves it: there
/// reads fail and changes stop whoever makes them (`tty_check_change`).
pub fn leave_if_background(fd: BorrowedFd<'_>) {
    // SAFETY: numbers only; TIOCNOTTY takes no argument. It hangs nothing up
    // unless this process led its session, and then it is in the foreground or
    // nobody is.
    unsafe {
        let front = libc::tcgetpgrp(fd.as_raw_fd());
        if front >= 0 && front != libc::getpgrp() {
            libc::ioctl(fd.as_raw_fd(), libc::TIOCNOTTY);
        }
    }
}

/// A new terminal: the end that shows it, and the end for programs.
///
/// # Errors
/// Those of opening `/dev/ptmx`.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let open = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the path is a C string; descriptors that were just made are owned
    // from here on; TIOCSPTLCK reads one int.
    unsafe {
        let fd = check(libc::open(c"/dev/ptmx".as_ptr(), open))?;
        let master = OwnedFd::from_raw_fd(fd);
        let unlocked: libc::c_int = 0;
        check(libc::ioctl(master.as_raw_fd(), TIOCSPTLCK, &unlocked))?;
        let slave = peer_by(&master, libc::O_RDWR)?;
        Ok((master, slave))
    }
}

/// Another description of the end for programs, with these flags.
pub fn peer(master: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    peer_by(&master, flags)
}

fn peer_by(master: &impl AsRawFd, flags: i32) -> io::Result<OwnedFd> {
    // The kernel would leave O_CLOEXEC among the description's flags, where
    // procfs cannot tell it from the descriptor's.
    let flags = (flags | libc::O_NOCTTY) & !libc::O_CLOEXEC;
    // SAFETY: the flags are numbers; the new descriptor is owned from here on.
    unsafe {
        let fd = check(libc::ioctl(master.as_raw_fd(), TIOCGPTPEER, flags))?;
        let fd = OwnedFd::from_raw_fd(fd);
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC))?;
        Ok(fd)
    }
}
