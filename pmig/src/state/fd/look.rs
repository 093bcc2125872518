//! Looking at descriptors from outside, through procfs: proc_pid_fdinfo(5).
//! Nothing is opened and nothing copied, so a running process notices nothing.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{openat, readlinkat, AtFlags, OFlag};
use nix::sys::stat::{fstatat, FileStat, Mode};
use nix::sys::statfs::statfs;
use nix::sys::uio::pread;

use super::terminal::Control;
use super::MAX_FDS;
use crate::error::{Context, Error, Obstacle, Result};
use crate::state::paths::{FilePath, Pinned};

/// What can be seen of a descriptor at little cost. `ino`, `mount` and `link`
/// together tell whether it is still of the same file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Glance {
    /// As fdinfo shows them: `O_CLOEXEC` is the descriptor's.
    pub flags: i32,
    pub position: u64,
    pub mount: u64,
    pub ino: u64,
    /// A lock or lease hangs on it.
    pub locked: bool,
    pub link: Vec<u8>,
}

impl Glance {
    pub fn is_of_same_file(&self, other: &Glance) -> bool {
        let key = |g: &Glance| (g.ino, g.mount, g.flags & libc::O_ACCMODE);
        key(self) == key(other) && self.link == other.link
    }
}

/// What takes more calls to find out, and stays as it is.
#[derive(Debug, Clone)]
pub(super) struct Nature {
    pub mode: u32,
    pub dev: u64,
    pub ino: u64,
    pub rdev: u64,
    /// The file system's magic number, statfs(2).
    pub magic: i64,
    pub name: Name,
}

impl Nature {
    pub fn file_type(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
}

/// Whether a descriptor's path leads to its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Name {
    Leads(FilePath),
    Elsewhere,
    Deleted,
    /// The link's text is no path.
    None,
}

/// A descriptor put before the rooms.
pub(super) struct Subject<'a> {
    pub fd: i32,
    pub link: &'a [u8],
    pub flags: i32,
    pub position: u64,
    pub locked: bool,
    pub control: Control,
    pub nature: &'a Nature,
}

impl Subject<'_> {
    /// Whether the link's text is a path, if perhaps one that leads nowhere.
    pub fn has_path(&self) -> bool {
        let no_file = [
            &b"/memfd:"[..],
            b"/dmabuf:",
            b"/anon_hugepage",
            b"/secretmem",
        ];
        self.link.starts_with(b"/")
            && (matches!(self.nature.name, Name::Leads(_))
                || !no_file.iter().any(|p| self.link.starts_with(p)))
    }

    pub fn obstacle(
        &self,
        why: impl std::fmt::Display,
        remedy: impl std::fmt::Display,
    ) -> Obstacle {
        Obstacle::new(object(self.fd, self.link), why, remedy)
    }
}

pub(super) fn object(fd: i32, link: &[u8]) -> String {
    format!("fd {fd} {}", String::from_utf8_lossy(link))
}

/// `/proc/PID`, held: never another process's.
pub(super) struct ProcDir {
    pid: i32,
    dir: OwnedFd,
    /// Its `fd` and `fdinfo`: what lies in them is found in half the time.
    links: OwnedFd,
    infos: OwnedFd,
    /// What lies in `fdinfo`, of the first that were looked at.
    kept: RefCell<BTreeMap<i32, OwnedFd>>,
    /// `cwd` and `root`, as they were found.
    places: RefCell<BTreeMap<&'static str, Place>>,
}

/// Where a directory was found to be.
struct Place {
    link: Vec<u8>,
    /// Device and inode.
    node: (u64, u64),
    path: FilePath,
}

/// Descriptors whose `fdinfo` is kept open, at most.
const MOST_KEPT: usize = 128;

impl ProcDir {
    pub fn open(pid: i32) -> Result<ProcDir> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
        let of = format!("/proc/{pid}");
        let opened = nix::fcntl::open(of.as_str(), flags, Mode::empty()).and_then(|dir| {
            let [links, infos] =
                ["fd", "fdinfo"].map(|name| openat(&dir, name, flags, Mode::empty()));
            Ok(ProcDir {
                pid,
                links: links?,
                infos: infos?,
                dir,
                kept: RefCell::default(),
                places: RefCell::default(),
            })
        });
        match opened {
            Err(Errno::ENOENT | Errno::ESRCH) => Err(Error::Gone(pid)),
            other => other.context("open", of),
        }
    }

    fn failed(&self, e: Errno, op: &'static str, name: &str) -> Error {
        match e {
            Errno::ESRCH => Error::Gone(self.pid),
            e => Error::Os {
                op,
                object: format!("/proc/{}/{name}", self.pid),
                cause: e.into(),
            },
        }
    }

    /// How many descriptors it has, where the kernel tells (since 6.2, as the size of
    /// the directory); else 0.
    pub fn count(&self) -> Result<usize> {
        match fstatat(&self.links, "", AtFlags::AT_EMPTY_PATH) {
            Ok(stat) => Ok(stat.st_size as usize),
            // It has ended.
            Err(Errno::ENOENT) => Ok(0),
            Err(e) => Err(self.failed(e, "look at", "fd")),
        }
    }

    /// The numbers of all descriptors, ascending.
    pub fn numbers(&self) -> Result<Vec<i32>> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let mut dir = Dir::openat(&self.dir, "fd", flags, Mode::empty())
            .map_err(|e| self.failed(e, "open", "fd"))?;
        let mut found = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(|e| self.failed(e, "read", "fd"))?;
            let name = entry.file_name().to_str();
            found.extend(name.ok().and_then(|n| n.parse::<i32>().ok()));
            if found.len() > MAX_FDS {
                return Err(Error::Refused(vec![Obstacle::new(
                    format!("process {}", self.pid),
                    format!("has more than {MAX_FDS} descriptors open"),
                    "let it close some first",
                )]));
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn link(&self, name: &str) -> nix::Result<Vec<u8>> {
        Ok(readlinkat(&self.dir, name)?.into_vec())
    }

    /// Looks at a descriptor; none where it is closed by now, or the process has
    /// ended.
    pub fn glance(&self, fd: i32) -> Result<Option<Glance>> {
        let name = fd.to_string();
        let mut text = [0u8; 1024];
        let info = self.info(fd, &name, &mut text);
        let link = match &info {
            Ok(_) => readlinkat(&self.links, name.as_str()).map(OsString::into_vec),
            Err(e) => Err(*e),
        };
        let (n, link) = match (info, link) {
            (Ok(n), Ok(link)) => (n, link),
            (Err(Errno::ENOENT), _) | (_, Err(Errno::ENOENT)) => return Ok(None),
            (Err(e), _) | (_, Err(e)) => {
                return Err(self.failed(e, "read", &format!("fdinfo/{name}")))
            }
        };
        parse_fdinfo(&text[..n], link)
            .map(Some)
            .map_err(|what| Error::bad(format!("/proc/{}/fdinfo/{name}", self.pid), what))
    }

    /// The same where it still is of the same file, whose name is not looked up again;
    /// none where it is not.
    pub fn glance_again(&self, fd: i32, before: &Glance) -> Result<Option<Glance>> {
        let mut text = [0u8; 1024];
        let Ok(n) = self.info(fd, &fd.to_string(), &mut text) else {
            return Ok(None);
        };
        let glance = parse_fdinfo(&text[..n], before.link.clone());
        Ok(glance.ok().filter(|g| g.is_of_same_file(before)))
    }

    /// What a descriptor leads to; nothing where it is closed.
    pub fn link_of(&self, fd: i32) -> Result<Vec<u8>> {
        let name = fd.to_string();
        match readlinkat(&self.links, name.as_str()) {
            Ok(link) => Ok(link.into_vec()),
            Err(Errno::ENOENT) => Ok(Vec::new()),
            Err(e) => Err(self.failed(e, "read", &format!("fd/{name}"))),
        }
    }

    fn info(&self, fd: i32, name: &str, text: &mut [u8]) -> nix::Result<usize> {
        let mut kept = self.kept.borrow_mut();
        if let Some(info) = kept.get(&fd) {
            // By its number: of whatever has that now.
            let read = pread(info, text, 0);
            if read.is_err() {
                kept.remove(&fd);
            }
            return read;
        }
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let info = openat(&self.infos, name, flags, Mode::empty())?;
        let read = pread(&info, text, 0)?;
        if kept.len() < MOST_KEPT {
            kept.insert(fd, info);
        }
        Ok(read)
    }

    /// Finds out what a descriptor is of; none where it is closed by now, or of
    /// another file than at the glance.
    pub fn nature(&self, fd: i32, glance: &Glance) -> Result<Option<Nature>> {
        let name = format!("fd/{fd}");
        let look = || -> nix::Result<(FileStat, i64)> {
            let stat = fstatat(&self.dir, name.as_str(), AtFlags::empty())?;
            let magic = statfs(format!("/proc/{}/{name}", self.pid).as_str())?;
            Ok((stat, magic.filesystem_type().0))
        };
        let (stat, magic) = match look() {
            Ok(found) => found,
            Err(Errno::ENOENT) => return Ok(None),
            Err(e) => return Err(self.failed(e, "look at", &name)),
        };
        // fdinfo's inode number is the kernel's own, and stat(2) may show
        // another: overlayfs. So the glance is repeated instead of compared.
        if !self
            .glance(fd)?
            .is_some_and(|again| again.is_of_same_file(glance))
        {
            return Ok(None);
        }
        Ok(Some(Nature {
            mode: stat.st_mode,
            dev: stat.st_dev,
            ino: stat.st_ino,
            rdev: stat.st_rdev,
            magic,
            name: name_of(&glance.link, &stat),
        }))
    }

    /// Where `cwd` or `root` leads.
    pub fn directory(
        &self,
        which: &'static str,
    ) -> Result<std::result::Result<FilePath, Obstacle>> {
        let (link, stat) = self.place(which)?;
        let node = (stat.st_dev, stat.st_ino);
        if let Some(place) = self.places.borrow().get(which) {
            // Of a directory that went another way the link would say so.
            if (&place.link, place.node) == (&link, node) {
                return Ok(Ok(place.path.clone()));
            }
        }
        let shown = String::from_utf8_lossy(&link);
        Ok(match name_of(&link, &stat) {
            Name::Leads(path) => {
                let place = Place {
                    link,
                    node,
                    path: path.clone(),
                };
                self.places.borrow_mut().insert(which, place);
                Ok(path)
            }
            Name::Deleted => Err(Obstacle::new(
                format!("{which} {shown}"),
                "is a deleted directory",
                "let the program change to another one first",
            )),
            Name::Elsewhere | Name::None => Err(Obstacle::new(
                format!("{which} {shown}"),
                "no path leads to it from here",
                "let the program change to a directory of this mount namespace first",
            )),
        })
    }

    /// Where `cwd` or `root` led when it was looked up last, if it was.
    pub fn known_directory(&self, which: &str) -> Option<FilePath> {
        let places = self.places.borrow();
        places.get(which).map(|place| place.path.clone())
    }

    /// Whether it still leads there.
    pub fn stays_in(&self, which: &'static str) -> Result<bool> {
        let (link, stat) = self.place(which)?;
        let node = (stat.st_dev, stat.st_ino);
        let places = self.places.borrow();
        Ok(places
            .get(which)
            .is_some_and(|place| (&place.link, place.node) == (&link, node)))
    }

    /// What `cwd` or `root` is called, and what that is.
    fn place(&self, which: &'static str) -> Result<(Vec<u8>, FileStat)> {
        let link = self
            .link(which)
            .map_err(|e| self.failed(e, "read", which))?;
        let stat = fstatat(&self.dir, which, AtFlags::empty())
            .map_err(|e| self.failed(e, "look at", which))?;
        Ok((link, stat))
    }

    pub fn as_fd(&self) -> impl AsFd + '_ {
        self.dir.as_fd()
    }
}

fn name_of(link: &[u8], stat: &FileStat) -> Name {
    if !link.starts_with(b"/") {
        return Name::None;
    }
    let leads = FilePath::new(link).ok().filter(|path| {
        Pinned::by_path(path).is_ok_and(|found| {
            (found.stat().st_dev, found.stat().st_ino) == (stat.st_dev, stat.st_ino)
        })
    });
    match leads {
        Some(path) => Name::Leads(path),
        None if stat.st_nlink == 0 || link.ends_with(b" (deleted)") => Name::Deleted,
        None => Name::Elsewhere,
    }
}

fn parse_fdinfo(text: &[u8], link: Vec<u8>) -> std::result::Result<Glance, &'static str> {
    let text = String::from_utf8_lossy(text);
    let (mut flags, mut position, mut mount, mut ino) = (None, None, None, None);
    let mut locked = false;
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        match key {
            "pos" => position = position.or(value.parse().ok()),
            "flags" => flags = flags.or(i32::from_str_radix(value, 8).ok()),
            "mnt_id" => mount = mount.or(value.parse().ok()),
            "ino" => ino = ino.or(value.parse().ok()),
            "lock" => locked = true,
            _ => {}
        }
    }
    Ok(Glance {
        flags: flags.ok_or("shows no flags")?,
        position: position.ok_or("shows no position")?,
        mount: mount.ok_or("shows no mount")?,
        ino: ino.ok_or("shows no inode: linux 5.14 or later is needed")?,
        locked,
        link,
    })
}

/// A process that went away answers `ESRCH` on everything below its held
/// directory.
pub(super) fn still_there(proc: &ProcDir) -> io::Result<bool> {
    match fstatat(proc.as_fd(), "fd", AtFlags::empty()) {
        Ok(_) => Ok(true),
        Err(Errno::ESRCH | Errno::ENOENT) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_is_read() {
        let text = b"pos:\t12\nflags:\t02102001\nmnt_id:\t29\nino:\t77\nlock:\t1: FLOCK  ADVISORY  WRITE 1 fe:00:77 0 EOF\n";
        let g = parse_fdinfo(text, b"/a".to_vec()).unwrap();
        assert_eq!(
            (g.position, g.flags, g.mount, g.ino),
            (12, 0o2102001, 29, 77)
        );
        assert!(g.locked);
    }

    #[test]
    fn fdinfo_that_lacks_something_is_refused() {
        for text in [
            &b""[..],
            b"pos:\t1\n",
            b"pos:\t-1\nflags:\t0\nmnt_id:\t1\nino:\t1\n",
            b"\xff\xfe",
        ] {
            assert!(parse_fdinfo(text, Vec::new()).is_err());
        }
    }
}
