//! The PAGEMAP_SCAN ioctl of /proc/PID/pagemap (Linux 6.7,
//! Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// What a page can be.
pub mod category {
    pub const WPALLOWED: u64 = 1 << 0;
    /// Written since it was last write-protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// Belongs to a file (or to shared memory), not to the process.
    pub const FILE: u64 = 1 << 2;
    pub const PRESENT: u64 = 1 << 3;
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared page of zeros.
    pub const PFNZERO: u64 = 1 << 5;
}

/// `struct page_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Region {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Arg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// Write-protect what is found.
const WP_MATCHING: u64 = 1;
/// Fail where the pages of a mapping are not followed.
const CHECK_WPASYNC: u64 = 2;

/// What to look for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Query {
    /// All of these.
    pub all: u64,
    /// At least one of these, where any is given.
    pub any: u64,
    /// What to tell of the pages found.
    pub tell: u64,
    /// Whether to write-protect them in the same step.
    pub protect: bool,
    /// Whether all mappings in the range must be followed by an asynchronous
    /// userfaultfd; EPERM where one is not.
    pub followed: bool,
}

/// Calls `found` for each run of pages in `start..end` that match.
pub fn scan(
    pagemap: &File,
    start: u64,
    end: u64,
    query: Query,
    mut found: impl FnMut(Region),
) -> io::Result<()> {
    let mut regions = [Region::default(); 512];
    let mut at = start;
    while at < end {
        let mut arg = Arg {
            size: size_of::<Arg>() as u64,
            flags: if query.protect { WP_MATCHING } else { 0 }
                | if query.followed { CHECK_WPASYNC } else { 0 },
            start: at,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_mask: query.all,
            category_anyof_mask: query.any,
            return_mask: query.tell,
            ..Arg::default()
        };
        // SAFETY: the argument and the vector it points to live for the call,
        // and the vector's length is its own.
        let n = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
        if n < 0 {
            let e = io::Error::last_os_error();
            if e.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(e);
        }
        for region in &regions[..(n as usize).min(regions.len())] {
            found(*region);
        }
        if arg.walk_end <= at {
            return Err(io::Error::other("PAGEMAP_SCAN makes no progress"));
        }
        at = arg.walk_end;
    }
    Ok(())
}
