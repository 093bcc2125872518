//! prlimit(2) by number.

use std::io;
use std::ptr::null;

/// Soft and hard limit of a process (0: this one).
///
/// # Errors
/// EPERM for another user's process without CAP_SYS_RESOURCE.
pub fn get(pid: i32, resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = [0u64; 2];
    // SAFETY: limit is as large as struct rlimit64; nothing is set.
    let r = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource,
            null::<u64>(),
            limit.as_mut_ptr(),
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((limit[0], limit[1]))
}

/// Sets soft and hard limit of a process.
///
/// # Errors
/// EPERM where it is another user's, or its hard limit is to be raised, without
/// CAP_SYS_RESOURCE; ESRCH.
pub fn set(pid: i32, resource: u32, (soft, hard): (u64, u64)) -> io::Result<()> {
    let limit = [soft, hard];
    // SAFETY: limit is as large as struct rlimit64; nothing is read back.
    let r = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource,
            limit.as_ptr(),
            null::<u64>(),
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// This process's securebits (PR_GET_SECUREBITS).
pub fn securebits() -> u32 {
    // SAFETY: numbers only.
    let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
    bits.max(0) as u32
}

/// Lets this process have as many descriptors as it may: it holds those of a program
/// beside its own.
pub fn raise_descriptors() {
    use nix::sys::resource::{getrlimit, setrlimit, Resource};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
