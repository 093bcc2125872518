//! The few calls for which no safe wrapper exists.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes the command the leader of a session of its own; see setsid(2).
pub fn in_new_session(command: &mut Command) {
    // SAFETY: setsid is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Kills the command when the thread that starts it ends; see prctl(2),
/// `PR_SET_PDEATHSIG`.
pub fn dies_with_parent(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe and this option takes no pointer.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Asks for a SIGIO to this process whenever something happens at the file;
/// see fcntl(2), `F_SETOWN` and `O_ASYNC`.
///
/// # Errors
/// Those of fcntl(2).
pub fn signal_events(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: the descriptor is open and neither command takes a pointer.
    let failed = unsafe {
        libc::fcntl(fd, libc::F_SETOWN, libc::getpid()) < 0
            || libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC) < 0
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets no program started from here inherit a descriptor beside the standard
/// ones: this process may itself have inherited some.
///
/// # Errors
/// Those of close_range(2).
pub fn hand_on_nothing() -> io::Result<()> {
    // SAFETY: no descriptor is closed, and no pointer is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Opens a perf event on this process that counts nothing of interest.
///
/// While any such event is open the kernel does not patch the static key that
/// ptrace's debug registers otherwise switch on and off, a patch under which
/// QEMU's multi-threaded TCG can lose an instruction and panic the guest.
///
/// # Errors
/// Those of perf_event_open(2).
pub fn hold_perf_event() -> io::Result<OwnedFd> {
    const TYPE_SOFTWARE: u32 = 1;
    const SOFTWARE_DUMMY: u64 = 9;
    const FLAG_FD_CLOEXEC: u64 = 8;
    // The first published size of struct perf_event_attr, PERF_ATTR_SIZE_VER0.
    const SIZE: u32 = 64;
    let mut attr = [0u64; SIZE as usize / 8];
    attr[0] = u64::from(TYPE_SOFTWARE) | u64::from(SIZE) << 32;
    attr[1] = SOFTWARE_DUMMY;
    // SAFETY: attr lives through the call and its size field says how long it is.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            attr.as_ptr(),
            0,
            -1,
            -1,
            FLAG_FD_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call gave a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Heeds Ctrl-C and Ctrl-\\ again, and so does what this process starts: who runs in
/// the background of a script has them ignored, and a shell below it would never
/// interrupt anything.
pub fn heed_keys() {
    use nix::sys::signal::{signal, SigHandler, Signal};
    for key in [Signal::SIGINT, Signal::SIGQUIT] {
        // SAFETY: no handler of ours is replaced, and none installed.
        let _ = unsafe { signal(key, SigHandler::SigDfl) };
    }
}
