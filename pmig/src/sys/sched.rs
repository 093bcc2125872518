//! Scheduling calls that nix lacks.

use std::io;

use serde::{Deserialize, Serialize};

/// `struct sched_attr` of sched_setattr(2), as of Linux 5.3 (56 bytes).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchedAttr {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
    pub util_min: u32,
    pub util_max: u32,
}

const IOPRIO_WHO_PROCESS: i32 = 1;

fn check(r: i64) -> io::Result<i64> {
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

/// sched_getattr(2).
///
/// # Errors
/// ESRCH, EPERM.
pub fn getattr(pid: i32) -> io::Result<SchedAttr> {
    let mut attr = SchedAttr::default();
    // SAFETY: attr is live and as long as said.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            pid,
            &raw mut attr,
            size_of::<SchedAttr>(),
            0,
        )
    })?;
    Ok(attr)
}

/// sched_setattr(2); `size` is filled in.
///
/// # Errors
/// As the call's.
pub fn setattr(pid: i32, attr: &SchedAttr) -> io::Result<()> {
    let mut attr = *attr;
    attr.size = size_of::<SchedAttr>() as u32;
    // SAFETY: attr is live and as long as it says.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw mut attr, 0) })?;
    Ok(())
}

/// The nice value (getpriority(2)): of a real-time process too, which has one
/// in reserve.
///
/// # Errors
/// ESRCH.
pub fn nice(pid: i32) -> io::Result<i32> {
    // SAFETY: numbers only.
    let raw = check(unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, pid) })?;
    // The kernel answers 20 - nice, so that no answer looks like an error.
    Ok(20 - raw as i32)
}

/// setpriority(2).
///
/// # Errors
/// EPERM, EACCES, ESRCH.
pub fn set_nice(pid: i32, nice: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, pid, nice) })?;
    Ok(())
}

/// ioprio_get(2) of one process.
///
/// # Errors
/// ESRCH.
pub fn ioprio(pid: i32) -> io::Result<u32> {
    // SAFETY: numbers only.
    let r = check(unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, pid) })?;
    Ok(r as u32)
}

/// ioprio_set(2) of one process.
///
/// # Errors
/// EPERM, EINVAL.
pub fn set_ioprio(pid: i32, value: u32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, value) })?;
    Ok(())
}

/// Words of a CPU mask: 8,192 CPUs, the most that any x86 kernel is built for.
const MASK_WORDS: usize = 128;

/// The CPUs a process may run on (sched_getaffinity(2)), as numbers.
///
/// # Errors
/// ESRCH.
pub fn affinity(pid: i32) -> io::Result<Vec<u32>> {
    let mut mask = [0u64; MASK_WORDS];
    // SAFETY: mask is live and as long as said.
    let n = check(unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            pid,
            size_of_val(&mask),
            mask.as_mut_ptr(),
        )
    })?;
    Ok((0..(n as u32 * 8).min(MASK_WORDS as u32 * 64))
        .filter(|c| mask[*c as usize / 64] >> (c % 64) & 1 == 1)
        .collect())
}

/// Sets the CPUs a process may run on; `None` is every CPU.
///
/// # Errors
/// EINVAL when none of them can be used here.
pub fn set_affinity(pid: i32, cpus: Option<&[u32]>) -> io::Result<()> {
    let mut mask = [if cpus.is_none() { u64::MAX } else { 0 }; MASK_WORDS];
    for c in cpus.unwrap_or_default() {
        if let Some(word) = mask.get_mut(*c as usize / 64) {
            *word |= 1 << (c % 64);
        }
    }
    // SAFETY: mask is live and as long as said.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            pid,
            size_of_val(&mask),
            mask.as_ptr(),
        )
    })?;
    Ok(())
}

/// get_robust_list(2) of another process: head and length.
///
/// # Errors
/// EPERM without the right to trace it.
pub fn robust_list(pid: i32) -> io::Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both are live and as wide as the kernel writes.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, pid, &raw mut head, &raw mut len) })?;
    Ok((head, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_about_this_thread() {
        let attr = getattr(0).unwrap();
        assert!(attr.size >= 48);
        assert!((-20..20).contains(&nice(0).unwrap()));
        assert!(!affinity(0).unwrap().is_empty());
        let (_, len) = robust_list(0).unwrap();
        assert_eq!(len, 24);
        ioprio(0).unwrap();
    }
}
