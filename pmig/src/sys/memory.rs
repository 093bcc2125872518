//! This process's own memory.

use nix::sys::resource::{getrusage, UsageWho};

/// From now on nothing this process touches is missing: its code and data are
/// brought in and stay, what it frees it keeps, and what it asks for comes
/// filled. While a program stands still, a page fault costs as much as a system
/// call, and more in a virtual machine.
///
/// Where it is not allowed (RLIMIT_MEMLOCK), everything works as before, only
/// slower.
pub fn keep_in() {
    /// Given out by the allocator in pieces of this, not mapped one by one.
    const PIECES: i32 = 4 << 20;
    // SAFETY: numbers only; the allocator takes them at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 512 << 20);
        libc::mallopt(libc::M_TOP_PAD, PIECES);
        libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE);
    }
}

/// The most memory that this process has had resident so far, in bytes; 0 where the
/// kernel does not tell.
pub fn peak() -> u64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0, |u| (u.max_rss().max(0) as u64) << 10)
}
