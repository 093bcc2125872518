//! Reading procfs and cgroupfs: bounded, and never trusted. The procfs crate
//! parses what it knows; here stands what it lacks, and what is read while a
//! program stands still and must not take long.

pub mod cgroup;

pub mod sched;
pub mod smaps;
pub mod stat;
pub mod status;
pub mod timers;

use std::borrow::Cow;
use std::cell::{OnceCell, RefCell};
use std::collections::btree_map::Entry;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

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

/// `/proc/PID/maps`, kept open: of the address space that there was then.
#[derive(Debug)]
pub struct Maps {
    pid: i32,
    file: File,
}

impl Maps {
    /// # Errors
    /// As [`read`].
    pub fn open(pid: i32) -> Result<Maps> {
        let file = open(pid, "maps")?;
        Ok(Maps { pid, file })
    }

    /// # Errors
    /// As [`read`].
    pub fn read(&self) -> Result<Vec<u8>> {
        let mut file = &self.file;
        file.rewind().map_err(|e| failed(e, self.pid, "maps"))?;
        all_of(file, self.pid, "maps", ROOM_FOR_MAPPINGS, LIMIT_OF_MAPPINGS)
    }
}

fn read_into(pid: i32, name: &str, room: usize, limit: u64) -> Result<Vec<u8>> {
    all_of(&open(pid, name)?, pid, name, room, limit)
}

/// Reads the rest of such a file.
fn all_of(file: &File, pid: i32, name: &str, room: usize, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(room);
    match file.take(limit).read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(e) => Err(failed(e, pid, name)),
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

/// Files of `/proc/PID` that are read again and again: each is opened when it is first
/// read, and kept open, which takes most of the time. Only for those that the kernel
/// hands out at once. `auxv` goes on telling of what was executed when it was first
/// read, all others of the process.
#[derive(Debug)]
pub struct Kept {
    pid: i32,
    files: RefCell<BTreeMap<Cow<'static, str>, File>>,
    /// Where the names of its namespaces are.
    namespaces: OnceCell<OwnedFd>,
}

impl Kept {
    pub fn of(pid: i32) -> Kept {
        Kept {
            pid,
            files: RefCell::default(),
            namespaces: OnceCell::new(),
        }
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Reads `/proc/PID/NAME` as it is now.
    ///
    /// # Errors
    /// As [`read`].
    pub fn read(&self, name: impl Into<Cow<'static, str>>) -> Result<Vec<u8>> {
        let name = name.into();
        let mut files = self.files.borrow_mut();
        let file = match files.entry(name.clone()) {
            Entry::Occupied(file) => file.into_mut(),
            Entry::Vacant(place) => place.insert(open(self.pid, &name)?),
        };
        let (mut bytes, mut len) = (vec![0; ROOM], 0);
        loop {
            let got = file.read_at(&mut bytes[len..], len as u64);
            len += got.map_err(|e| failed(e, self.pid, &name))?;
            if len < bytes.len() || len as u64 >= LIMIT {
                bytes.truncate(len);
                return Ok(bytes);
            }
            bytes.resize(2 * len, 0);
        }
    }

    /// The same as text, as [`text`] does.
    ///
    /// # Errors
    /// As [`read`].
    pub fn text(&self, name: impl Into<Cow<'static, str>>) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.read(name)?).into_owned())
    }

    /// What `/proc/PID/ns/NAME` says.
    ///
    /// # Errors
    /// Those of open(2) and readlink(2).
    pub fn namespace(&self, name: &str) -> nix::Result<OsString> {
        let namespaces = match self.namespaces.get() {
            Some(namespaces) => namespaces,
            None => {
                let path = format!("/proc/{}/ns", self.pid);
                let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
                let opened = nix::fcntl::open(path.as_str(), flags, Mode::empty())?;
                self.namespaces.get_or_init(|| opened)
            }
        };
        nix::fcntl::readlinkat(namespaces, name)
    }
}

fn failed(e: std::io::Error, pid: i32, name: &str) -> Error {
    match e.raw_os_error() {
        Some(libc::ESRCH) => Error::Gone(pid),
        _ => Error::Os {
            op: "read",
            object: format!("/proc/{pid}/{name}"),
            cause: e,
        },
    }
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
    fn what_is_kept_open_tells_what_is_now() {
        let me = Kept::of(std::process::id() as i32);
        let before = me.text("coredump_filter").unwrap();
        let other = if before.trim() == "00000033" {
            "31"
        } else {
            "33"
        };
        std::fs::write("/proc/self/coredump_filter", format!("0x{other}")).unwrap();
        let after = me.text("coredump_filter").unwrap();
        std::fs::write("/proc/self/coredump_filter", format!("0x{}", before.trim())).unwrap();
        assert_eq!(after, format!("000000{other}\n"));
        assert_eq!(
            text(me.pid(), "coredump_filter").unwrap(),
            me.text("coredump_filter").unwrap()
        );
        assert_eq!(me.read("auxv").unwrap(), read(me.pid(), "auxv").unwrap());
        assert!(matches!(
            Kept::of(i32::MAX).read("stat"),
            Err(Error::Gone(_))
        ));
    }

    #[test]
    fn a_process_that_does_not_exist_is_gone() {
        assert!(matches!(read(i32::MAX, "status"), Err(Error::Gone(_))));
        let me = std::process::id() as i32;
        assert!(matches!(read(me, "nothing"), Err(Error::Os { .. })));
    }
}
