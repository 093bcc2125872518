//! What the kernel keeps of a file: pages in memory, extents on the disk.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `struct cachestat` (Linux 6.5, mm/filemap.c), in pages.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cached {
    pub present: u64,
    /// Written, and not on the disk yet.
    pub dirty: u64,
    /// On the way to the disk.
    pub writeback: u64,
    pub evicted: u64,
    pub recently_evicted: u64,
}

const SYS_CACHESTAT: libc::c_long = 451;

/// Looks which pages of a range of a file are in memory, and how.
///
/// # Errors
/// ENOSYS before Linux 6.5; EOPNOTSUPP for hugetlbfs.
pub fn cached(file: &File, offset: u64, len: u64) -> io::Result<Cached> {
    let range = [offset, len];
    let mut found = Cached::default();
    // SAFETY: the range is two numbers, as struct cachestat_range; it and the
    // answer live for the call.
    let r = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            range.as_ptr(),
            &raw mut found,
            0,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(found)
}

/// `struct fiemap_extent` (Documentation/filesystems/fiemap.rst), in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extent {
    pub logical: u64,
    pub physical: u64,
    pub length: u64,
    reserved: [u64; 2],
    pub flags: u32,
    reserved_too: [u32; 3],
}

impl Extent {
    /// Neither said to be somewhere else than it is, nor without content of its
    /// own: all flags but LAST, MERGED and SHARED.
    pub fn is_written(&self) -> bool {
        self.flags & !(1 | 0x1000 | 0x2000) == 0
    }

    pub fn end(&self) -> u64 {
        self.logical.saturating_add(self.length)
    }
}

const MOST_EXTENTS: usize = 2048;
const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
const LAST: u32 = 1;

/// `struct fiemap`, with room for what it tells.
#[repr(C)]
struct Map {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; MOST_EXTENTS],
}

/// The extents of a file, in order; nothing is synced for it.
///
/// # Errors
/// EOPNOTSUPP where the file system does not tell; `Other` where there are too
/// many.
pub fn extents(file: &File) -> io::Result<Vec<Extent>> {
    let mut map = Box::new(Map {
        start: 0,
        length: u64::MAX,
        flags: 0,
        mapped: 0,
        count: MOST_EXTENTS as u32,
        reserved: 0,
        extents: [Extent::default(); MOST_EXTENTS],
    });
    // SAFETY: the kernel writes at most `count` extents behind the head, for
    // which there is room.
    let r = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &raw mut *map) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    let found = &map.extents[..(map.mapped as usize).min(MOST_EXTENTS)];
    if found.last().is_some_and(|last| last.flags & LAST == 0) {
        return Err(io::Error::other("too many extents"));
    }
    Ok(found.to_vec())
}

const FS_IOC_GETFLAGS: libc::c_ulong = 0x8008_6601;

/// The file's attributes, `FS_*_FL` of ioctl_iflags(2).
///
/// # Errors
/// ENOTTY where the file system has none.
pub fn attributes(file: &File) -> io::Result<u32> {
    let mut flags: libc::c_long = 0;
    // SAFETY: the kernel writes an int, for which there is room.
    let r = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_GETFLAGS as _, &raw mut flags) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(flags as u32)
}
