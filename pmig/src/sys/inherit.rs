//! Descriptors that a process has from whoever started it.

/// Closes every descriptor from `first` on. Only for the start of a process,
/// before it has opened anything itself: close_range(2).
pub fn close_from(first: u32) -> std::io::Result<()> {
    // SAFETY: no pointers are passed; nothing in this process owns a descriptor
    // yet, as the caller promises.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if done == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}
