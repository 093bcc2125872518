//! Paths that come from a peer or from procfs, and files opened by them
//! without being led astray.

use std::ffi::{OsStr, OsString};
use std::fmt::{self, Display};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{open, openat2, OFlag, OpenHow, ResolveFlag, AT_FDCWD};
use nix::sys::stat::{fstat, FileStat, Mode};
use nix::sys::statfs::fstatfs;
use serde::{Deserialize, Serialize};

use crate::error::{printable, Context, Error, Result};

/// An absolute path without `.`, `..`, empty components or NUL, no longer than
/// the kernel takes. Checked when it is made, and so when it is decoded.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct FilePath(Vec<u8>);

impl FilePath {
    /// # Errors
    /// [`Error::Bad`] for anything but a plain absolute path.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<FilePath> {
        let bytes = bytes.into();
        let what = if bytes.len() >= libc::PATH_MAX as usize {
            "is longer than a path can be"
        } else if bytes.contains(&0) {
            "contains a zero byte"
        } else if bytes.first() != Some(&b'/') {
            "is not absolute"
        } else if bytes != b"/"
            && bytes[1..]
                .split(|&b| b == b'/')
                .any(|c| c.is_empty() || c == b"." || c == b".." || c.len() > 255)
        {
            "is not a plain path"
        } else {
            return Ok(FilePath(bytes));
        };
        let shown: String = String::from_utf8_lossy(&bytes).chars().take(200).collect();
        Err(Error::bad(format!("path {}", printable(&shown)), what))
    }

    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The directory it lies in; `/` lies in itself.
    pub fn parent(&self) -> FilePath {
        match self.0.iter().rposition(|&b| b == b'/') {
            None | Some(0) => FilePath(b"/".to_vec()),
            Some(n) => FilePath(self.0[..n].to_vec()),
        }
    }

    /// The last component; empty for `/`.
    pub fn name(&self) -> OsString {
        let at = self.0.iter().rposition(|&b| b == b'/').map_or(0, |n| n + 1);
        OsString::from_vec(self.0[at..].to_vec())
    }

    /// Another file in the same directory.
    ///
    /// # Errors
    /// [`Error::Bad`] where the result is no plain path.
    pub fn beside(&self, name: &str) -> Result<FilePath> {
        let mut bytes = self.parent().0;
        if bytes != b"/" {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name.as_bytes());
        FilePath::new(bytes)
    }

    /// Whether it is `root` or lies below it.
    pub fn is_within(&self, root: &FilePath) -> bool {
        root.0 == b"/"
            || self
                .0
                .strip_prefix(root.0.as_slice())
                .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }
}

impl TryFrom<Vec<u8>> for FilePath {
    type Error = Error;
    fn try_from(bytes: Vec<u8>) -> Result<FilePath> {
        FilePath::new(bytes)
    }
}

impl From<FilePath> for Vec<u8> {
    fn from(p: FilePath) -> Vec<u8> {
        p.0
    }
}

impl Display for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&String::from_utf8_lossy(&self.0)))
    }
}

/// openat2(2) by an absolute path in which no component may be a symbolic
/// link, of procfs or otherwise.
pub fn open_plain(path: &FilePath, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
    let mut flags = flags | OFlag::O_CLOEXEC;
    if !flags.contains(OFlag::O_PATH) {
        // With O_PATH this would be an error: openat2(2).
        flags |= OFlag::O_NOCTTY;
    }
    let how = OpenHow::new()
        .flags(flags)
        .mode(mode)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    loop {
        match openat2(AT_FDCWD, path.as_path(), how) {
            // A rename elsewhere in the tree raced with the walk: openat2(2).
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            other => return other,
        }
    }
}

/// One file, held by an `O_PATH` descriptor: looking at it has no side
/// effects, whatever it is, and what is opened later is that very file.
#[derive(Debug)]
pub struct Pinned {
    fd: OwnedFd,
    stat: FileStat,
    path: Option<FilePath>,
}

impl Pinned {
    /// Holds what a path leads to.
    ///
    /// # Errors
    /// As openat2(2): `ENOENT`, `ELOOP` where a symbolic link stands in the
    /// way.
    pub fn by_path(path: &FilePath) -> Result<Pinned> {
        let fd = open_plain(path, OFlag::O_PATH, Mode::empty()).context("open", path)?;
        let mut pinned = Pinned::new(fd, path)?;
        pinned.path = Some(path.clone());
        Ok(pinned)
    }

    /// Holds what a link of procfs (`/proc/PID/fd/N`, `exe`, `map_files/..`)
    /// leads to, without reading its text.
    pub fn by_link(link: &str) -> Result<Pinned> {
        let fd =
            open(link, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).context("open", link)?;
        Pinned::new(fd, link)
    }

    fn new(fd: OwnedFd, object: impl Display) -> Result<Pinned> {
        let stat = fstat(&fd).context("stat", object)?;
        Ok(Pinned {
            fd,
            stat,
            path: None,
        })
    }

    /// As it was when it was pinned.
    pub fn stat(&self) -> &FileStat {
        &self.stat
    }

    /// As it is now.
    pub fn stat_now(&self) -> nix::Result<FileStat> {
        fstat(&self.fd)
    }

    pub fn is_same_file(&self, other: &Pinned) -> bool {
        (self.stat.st_dev, self.stat.st_ino) == (other.stat.st_dev, other.stat.st_ino)
    }

    pub fn file_type(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }

    /// Whether its file system is made by the kernel and tells of this machine
    /// alone.
    pub fn is_special(&self) -> io::Result<bool> {
        Ok(is_special(fstatfs(&self.fd)?.filesystem_type().0))
    }

    /// Whether its file system's time stamps may come from another machine's
    /// clock: nfs, smb, fuse, 9p, ceph, afs.
    pub fn has_foreign_clock(&self) -> io::Result<bool> {
        const FOREIGN: [u32; 8] = [
            0x6969, 0x517b, 0xff534d42, 0xfe534d42, 0x65735546, 0x01021997, 0x00c36400, 0x5346414f,
        ];
        let magic = fstatfs(&self.fd)?.filesystem_type().0;
        Ok(FOREIGN.contains(&(magic as u32)))
    }

    /// The `O_PATH` descriptor itself.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Opens the very file that is held, with the given access and status
    /// flags. Nothing is created or truncated whatever they say.
    pub fn open(&self, flags: OFlag) -> nix::Result<OwnedFd> {
        let never = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_TRUNC | OFlag::O_NOFOLLOW;
        if let (Some(path), true) = (&self.path, flags.contains(OFlag::O_NOFOLLOW)) {
            // The flag stays visible in the description, but keeps open(2) from
            // following the link below. What is found under the name is
            // compared; it must not make us wait if it is something else now.
            let flags = flags.difference(never) | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
            let fd = open_plain(path, flags, Mode::empty())?;
            let stat = fstat(&fd)?;
            return if (stat.st_dev, stat.st_ino) == (self.stat.st_dev, self.stat.st_ino) {
                Ok(fd)
            } else {
                Err(Errno::ESTALE)
            };
        }
        open(
            format!("/proc/self/fd/{}", self.fd.as_raw_fd()).as_str(),
            flags.difference(never) | OFlag::O_CLOEXEC | OFlag::O_NOCTTY,
            Mode::empty(),
        )
    }
}

impl AsFd for Pinned {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Magic numbers of file systems whose files are not data: statfs(2) and
/// `include/uapi/linux/magic.h`.
pub fn is_special(magic: i64) -> bool {
    const SPECIAL: [u32; 26] = [
        0x9fa0,     // proc
        0x62656572, // sysfs
        0x27e0eb,   // cgroup
        0x63677270, // cgroup2
        0x64626720, // debugfs
        0x74726163, // tracefs
        0x73636673, // securityfs
        0xcafe4a11, // bpf
        0x62656570, // configfs
        0xf97cff8c, // selinux
        0xde5e81e4, // efivarfs
        0x42494e4d, // binfmt_misc
        0x6e736673, // nsfs
        0x50494445, // pipefs
        0x534f434b, // sockfs
        0x09041934, // anonymous inodes
        0x19800202, // mqueue
        0x958458f6, // hugetlbfs
        0x6165676c, // pstore
        0x1cd1,     // devpts
        0x50494446, // pidfs
        0x5345434d, // secretmem
        0x65735543, // fusectl
        0x67596969, // rpc_pipefs
        0x6e667364, // nfsd
        0x07655821, // resctrl
    ];
    SPECIAL.contains(&(magic as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_absolute_paths_are_taken() {
        for good in ["/", "/a", "/a/b c", "/a/..b", "/a/b (deleted)"] {
            assert!(FilePath::new(good).is_ok(), "{good}");
        }
        for bad in [
            "", "a", "/a/", "//a", "/a//b", "/a/./b", "/../a", "/a/..", "/a\0",
        ] {
            assert!(FilePath::new(bad).is_err(), "{bad}");
        }
        assert!(FilePath::new(format!("/{}", "a/".repeat(3000) + "b")).is_err());
        assert!(FilePath::new(format!("/{}", "a".repeat(256))).is_err());
    }

    #[test]
    fn what_is_decoded_is_checked() {
        let config = bincode::config::standard();
        let bytes = bincode::serde::encode_to_vec(b"/a/../b".to_vec(), config).unwrap();
        assert!(bincode::serde::decode_from_slice::<FilePath, _>(&bytes, config).is_err());
        let bytes = bincode::serde::encode_to_vec(FilePath::new("/a/b").unwrap(), config).unwrap();
        let (back, _): (FilePath, _) = bincode::serde::decode_from_slice(&bytes, config).unwrap();
        assert_eq!(back.as_bytes(), b"/a/b");
    }

    #[test]
    fn roots_end_at_a_component() {
        let p = |s: &str| FilePath::new(s).unwrap();
        assert!(p("/srv/a").is_within(&p("/srv")));
        assert!(p("/srv").is_within(&p("/srv")));
        assert!(p("/srv").is_within(&p("/")));
        assert!(!p("/srvx").is_within(&p("/srv")));
        assert_eq!(p("/a/b").parent(), p("/a"));
        assert_eq!(p("/a").parent(), p("/"));
        assert_eq!(p("/a/b").beside("c").unwrap(), p("/a/c"));
        assert_eq!(p("/a").beside("c").unwrap(), p("/c"));
        assert!(p("/a").beside("../c").is_err());
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |n: &str| FilePath::new(dir.path().join(n).into_os_string().into_vec()).unwrap();
        std::fs::create_dir(dir.path().join("real")).unwrap();
        std::fs::write(dir.path().join("real/file"), b"x").unwrap();
        std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
        std::os::unix::fs::symlink("real/file", dir.path().join("last")).unwrap();
        assert!(Pinned::by_path(&at("real/file")).is_ok());
        for astray in ["link/file", "last"] {
            let e = Pinned::by_path(&at(astray)).unwrap_err();
            assert_eq!(e.errno(), Some(libc::ELOOP), "{astray}");
        }
        let e = Pinned::by_path(&FilePath::new("/proc/self/exe").unwrap()).unwrap_err();
        assert_eq!(e.errno(), Some(libc::ELOOP));
    }

    #[test]
    fn a_file_of_procfs_is_special() {
        let status = Pinned::by_path(&FilePath::new("/proc/meminfo").unwrap()).unwrap();
        assert!(status.is_special().unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = FilePath::new(dir.path().as_os_str().as_bytes()).unwrap();
        assert!(!Pinned::by_path(&path).unwrap().is_special().unwrap());
    }
}
