//! Reading procfs and cgroupfs: bounded, and never trusted. The procfs crate
//! parses what it knows; here stands what it lacks, and what is read while a
//! program stands still and must not take long.

pub mod cgroup;

pub mod sched;
pub mod smaps;
pub mod stat;
pub mod status;
pub mod timers;

use std::fs::File;
use std::io::Read;

use crate::error::{Context, Error, Result};

/// No procfs file read here is longer; a longer one is not what it seems.
const LIMIT: u64 = 1 << 20;
/// The same for the lists of mappings.
const LIMIT_OF_MAPPINGS: u64 = 1 << 30;
/// Room for most files, so that they are read at once: the standard library
/// begins with pieces of 32 bytes where the size is not known.
const ROOM: usize = 8 << 10;
const ROOM_FOR_MAPPINGS: usize = 256 << 10;

/// Reads `/proc/PID/NAME`.
///
/// # Errors
/// [`Error::Gone`] when the process does not exist, [`Error::Os`] otherwise.
pub fn read(pid: i32, name: &str) -> Result<Vec<u8>> {
    read_into(pid, name, ROOM, LIMIT)
}

/// Reads `/proc/PID/maps` or `/proc/PID/smaps`.
///
/// # Errors
/// As [`read`].
pub fn mappings(pid: i32, name: &str) -> Result<Vec<u8>> {
    read_into(pid, name, ROOM_FOR_MAPPINGS, LIMIT_OF_MAPPINGS)
}

fn read_into(pid: i32, name: &str, room: usize, limit: u64) -> Result<Vec<u8>> {
    all_of(&open(pid, name)?, pid, name, room, limit)
}

/// Reads the rest of such a file.
fn all_of(file: &File, pid: i32, name: &str, room: usize, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(room);
    match file.take(limit).read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Err(Error::Gone(pid)),
        Err(e) => Err(e).context("read", format_args!("/proc/{pid}/{name}")),
    }
}

/// Opens `/proc/PID/NAME` for reading.
fn open(pid: i32, name: &str) -> Result<File> {
    let path = format!("/proc/{pid}/{name}");
    match File::open(&path) {
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Err(Error::Gone(pid)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) && !exists(pid) => Err(Error::Gone(pid)),
        file => file.context("open", path),
    }
}

/// Reads `/proc/PID/NAME` as text; bytes that are not UTF-8 (a program may
/// have put them in its name) are replaced.
///
/// # Errors
/// As [`read`].
pub fn text(pid: i32, name: &str) -> Result<String> {
    Ok(String::from_utf8_lossy(&read(pid, name)?).into_owned())
}

/// Reads a small file that may be missing, a kernel setting for instance.
pub fn setting(path: &str) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|f| f.take(LIMIT).read_to_end(&mut bytes))
        .ok()?;
    Some(String::from_utf8_lossy(&bytes).trim().to_string())
}

fn exists(pid: i32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

/// Parses a list of ranges such as `0-3,8,10-11` (cpulist(7) format).
/// `None` where it is none, or names numbers beyond `below`.
pub fn ranges(list: &str, below: u32) -> Option<Vec<u32>> {
    let mut all = Vec::new();
    for part in list.trim().split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= below {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_bounded() {
        assert_eq!(ranges("0-2,5,7-8\n", 64).unwrap(), vec![0, 1, 2, 5, 7, 8]);
        assert_eq!(ranges("", 64).unwrap(), Vec::<u32>::new());
        assert_eq!(ranges("0-4294967295", 1024), None);
        assert_eq!(ranges("3-1", 64), None);
        assert_eq!(ranges("x", 64), None);
    }

    #[test]
    fn a_process_that_does_not_exist_is_gone() {
        assert!(matches!(read(i32::MAX, "status"), Err(Error::Gone(_))));
        let me = std::process::id() as i32;
        assert!(matches!(read(me, "nothing"), Err(Error::Os { .. })));
    }
}
