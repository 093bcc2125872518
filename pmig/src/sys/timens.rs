//! Time namespaces (time_namespaces(7)).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;

/// Gives the children-to-be of this thread's process a new time namespace.
/// In the main thread or a single-threaded process.
pub fn unshare() -> io::Result<()> {
    // SAFETY: a number only; it concerns children that are made later.
    if unsafe { libc::unshare(libc::CLONE_NEWTIME) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What [`set_offsets`] writes to.
pub fn open_offsets() -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .open("/proc/self/timens_offsets")
}

/// Sets how far its clocks are ahead of this machine's, in nanoseconds.
/// Possible until the first process is in it.
pub fn set_offsets(mut file: &File, monotonic: i128, boottime: i128) -> io::Result<()> {
    let split = |ns: i128| (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    let ((ms, mn), (bs, bn)) = (split(monotonic), split(boottime));
    file.write_all(format!("monotonic {ms} {mn}\nboottime {bs} {bn}\n").as_bytes())
}

/// The namespace, for setns(2).
pub fn open() -> io::Result<File> {
    File::open("/proc/self/ns/time_for_children")
}

/// Enters the time namespace of the machine's first process, if this
/// single-threaded process is in another: what procfs tells of other processes'
/// start is by the reader's clock.
pub fn enter_first() -> io::Result<()> {
    let link = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/time"));
    if link("1")? == link("self")? {
        return Ok(());
    }
    let first = File::open("/proc/1/ns/time")?;
    // SAFETY: numbers only.
    match unsafe { libc::setns(first.as_raw_fd(), libc::CLONE_NEWTIME) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Reads a clock of this machine, in nanoseconds.
pub fn clock(id: libc::clockid_t) -> i128 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a live timespec.
    unsafe { libc::clock_gettime(id, &mut t) };
    t.tv_sec as i128 * 1_000_000_000 + t.tv_nsec as i128
}
