//! /proc/PID/pagemap: its PAGEMAP_SCAN ioctl (Linux 6.7), and its entries, one
//! for each page (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

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
    /// Part of a huge page that is mapped as one.
    pub const HUGE: u64 = 1 << 6;
}

/// What an entry of the file says of its page.
pub mod entry {
    /// The frame in memory, or the place in swap: which page it is. Zero for who
    /// lacks CAP_SYS_ADMIN.
    pub const WHICH: u64 = (1 << 55) - 1;
    /// Written since /proc/PID/clear_refs took all these bits off.
    pub const SOFT_DIRTY: u64 = 1 << 55;
    /// Write-protected by a userfaultfd.
    pub const PROTECTED: u64 = 1 << 57;
    /// Belongs to a file (or to shared memory), not to the process.
    pub const FILE: u64 = 1 << 61;
    pub const SWAPPED: u64 = 1 << 62;
    pub const PRESENT: u64 = 1 << 63;
}

/// Reads the entries of the pages from `start` on, one for each of `entries`.
pub fn entries(pagemap: &File, start: u64, entries: &mut [u64]) -> io::Result<()> {
    let mut bytes = vec![0; entries.len() * 8];
    pagemap.read_exact_at(&mut bytes, start / PAGE * 8)?;
    for (entry, bytes) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
        *entry = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    Ok(())
}

/// Whether this kernel notes soft-dirty pages (CONFIG_MEM_SOFT_DIRTY), and
/// tells us which pages they are: looks at one just written.
pub fn has_soft_dirty() -> io::Result<bool> {
    let page = vec![1u8; 2 * PAGE as usize];
    let mut one = [0];
    let at = (page.as_ptr() as u64).next_multiple_of(PAGE);
    entries(&File::open("/proc/self/pagemap")?, at, &mut one)?;
    drop(page);
    Ok(one[0] & entry::SOFT_DIRTY != 0 && one[0] & entry::WHICH != 0)
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

/// Bytes of a page.
const PAGE: u64 = 4096;

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

/// Calls `found` for each run of pages in `start..end` that match. Before Linux
/// 6.7 the same is read from the entries, where nothing need be protected.
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
            match e.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::ENOTTY) if !query.protect && !query.followed => {
                    return scan_entries(pagemap, at, end, query, found);
                }
                _ => return Err(e),
            }
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

/// As [`scan`], by the entries. A page that the kernel cannot protect counts as
/// written, as there.
fn scan_entries(
    pagemap: &File,
    start: u64,
    end: u64,
    query: Query,
    mut found: impl FnMut(Region),
) -> io::Result<()> {
    let zero = match (query.tell | query.all | query.any) & category::PFNZERO {
        0 => None,
        _ => page_of_zeros()?,
    };
    let mut some = vec![0; 64 << 10];
    let mut last: Option<Region> = None;
    for at in (start..end).step_by(some.len() * PAGE as usize) {
        let n = ((end - at) / PAGE).min(some.len() as u64) as usize;
        entries(pagemap, at, &mut some[..n])?;
        for (page, entry) in (at..).step_by(PAGE as usize).zip(&some[..n]) {
            let what = categories(*entry, zero);
            let matches =
                what & query.all == query.all && (query.any == 0 || what & query.any != 0);
            let tell = what & query.tell;
            match &mut last {
                Some(r) if matches && r.end == page && r.categories == tell => r.end += PAGE,
                _ if matches => {
                    let new = Region {
                        start: page,
                        end: page + PAGE,
                        categories: tell,
                    };
                    last.replace(new).into_iter().for_each(&mut found);
                }
                _ => {}
            }
        }
    }
    last.into_iter().for_each(found);
    Ok(())
}

fn categories(entry: u64, zero: Option<u64>) -> u64 {
    let mut what = 0;
    for (bit, category) in [
        (entry::PRESENT, category::PRESENT),
        (entry::SWAPPED, category::SWAPPED),
        (entry::FILE, category::FILE),
    ] {
        if entry & bit != 0 {
            what |= category;
        }
    }
    if entry & entry::PROTECTED == 0 {
        what |= category::WRITTEN;
    }
    if entry & entry::PRESENT != 0 && Some(entry & entry::WHICH) == zero {
        what |= category::PFNZERO;
    }
    what
}

/// Which page the shared page of zeros is: what stands where a fresh mapping was
/// only read. None where the kernel does not say.
fn page_of_zeros() -> io::Result<Option<u64>> {
    // Fresh memory of the kernel's is zero, and so much is mapped anew.
    let fresh = vec![0u8; 4 << 20];
    let at = (fresh.as_ptr() as u64 + (1 << 20)).next_multiple_of(PAGE);
    std::hint::black_box(fresh[(at - fresh.as_ptr() as u64) as usize]);
    let mut one = [0];
    entries(&File::open("/proc/self/pagemap")?, at, &mut one)?;
    drop(fresh);
    let which = one[0] & entry::WHICH;
    Ok((one[0] & entry::PRESENT != 0 && which != 0).then_some(which))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_say_what_the_scan_says() {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut memory = vec![0u8; 64 * PAGE as usize];
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        for page in [1, 2, 3, 17, 40] {
            memory[page * PAGE as usize] = 1;
        }
        std::hint::black_box(memory[50 * PAGE as usize]);
        let query = Query {
            any: category::PRESENT | category::SWAPPED,
            tell: category::PRESENT | category::FILE | category::PFNZERO,
            ..Query::default()
        };
        let end = start + 60 * PAGE;
        let (mut by_entries, mut by_ioctl) = (Vec::new(), Vec::new());
        scan_entries(&pagemap, start, end, query, |r| by_entries.push(r)).unwrap();
        if let Err(e) = scan(&pagemap, start, end, query, |r| by_ioctl.push(r)) {
            eprintln!("skipped: entries_say_what_the_scan_says: {e}");
            return;
        }
        assert!(!by_entries.is_empty());
        assert_eq!(by_entries, by_ioctl);
    }
}
