//! Directories that only pmig writes, and files in them that come to be whole
//! or not at all.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{openat, renameat, AtFlags, Flock, FlockArg, OFlag, AT_FDCWD};
use nix::sys::stat::{fstat, fstatat, mkdirat, Mode, SFlag};
use nix::unistd::{fsync, geteuid, linkat, unlinkat, UnlinkatFlags};

use crate::error::{Context, Error, Result, Within};

/// The most that is read of any file here, in bytes.
const MAX: u64 = 16 << 20;

/// A directory of mode 0700 that belongs to us.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

const DIR: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

impl Folder {
    /// Opens a directory by its path, made if it isn't there. This one others
    /// may read, though not what pmig makes inside.
    pub fn at(path: &Path) -> Result<Folder> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).context("create directory", parent.display())?;
        }
        Folder::open(AT_FDCWD, path, path.to_owned(), true, 0o022)?
            .ok_or_else(|| Error::bad(path.display(), "removed while it was opened"))
    }

    /// Opens or makes a directory inside this one.
    pub fn sub(&self, name: &str) -> Result<Folder> {
        let path = self.path.join(name);
        Folder::open(self.fd(), Path::new(name), path.clone(), true, 0o077)?
            .ok_or_else(|| Error::bad(path.display(), "removed while it was opened"))
    }

    /// Opens a directory inside this one, if it is there.
    pub fn find(&self, name: &str) -> Result<Option<Folder>> {
        Folder::open(
            self.fd(),
            Path::new(name),
            self.path.join(name),
            false,
            0o077,
        )
    }

    /// Makes a directory that wasn't there. `None`: it was.
    pub fn make(&self, name: &str) -> Result<Option<Folder>> {
        match mkdirat(self.fd(), name, Mode::S_IRWXU) {
            Err(Errno::EEXIST) => return Ok(None),
            made => made.context("create directory", self.path.join(name).display())?,
        }
        self.find(name)
    }

    fn open(
        at: impl AsFd,
        name: &Path,
        path: PathBuf,
        make: bool,
        closed: u32,
    ) -> Result<Option<Folder>> {
        if make {
            match mkdirat(&at, name, Mode::S_IRWXU) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(e).context("create directory", path.display()),
            }
        }
        let fd = match openat(at, name, DIR, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(None),
            fd => fd.context("open directory", path.display())?,
        };
        let stat = fstat(&fd).context("look at", path.display())?;
        if stat.st_uid != geteuid().as_raw() || stat.st_mode & closed != 0 {
            return Err(Error::bad(
                path.display(),
                format!(
                    "must belong to the user pmig runs as, with mode {:04o} at most",
                    0o777 & !closed
                ),
            ));
        }
        Ok(Some(Folder { fd, path }))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn object<'a>(&'a self, name: &'a str) -> Within<'a> {
        Within(&self.path, name)
    }

    /// The content of a file, if it is there.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let fd = match openat(self.fd(), name, flags, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(None),
            fd => fd.context("open", self.object(name))?,
        };
        let stat = fstat(&fd).context("look at", self.object(name))?;
        if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
            return Err(Error::bad(self.object(name), "not a regular file"));
        }
        let mut bytes = Vec::new();
        std::fs::File::from(fd)
            .take(MAX + 1)
            .read_to_end(&mut bytes)
            .context("read", self.object(name))?;
        if bytes.len() as u64 > MAX {
            return Err(Error::bad(self.object(name), "too large"));
        }
        Ok(Some(bytes))
    }

    pub fn has(&self, name: &str) -> Result<bool> {
        match fstatat(self.fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(e) => Err(e).context("look at", self.object(name)),
        }
    }

    /// When a file or directory was last changed, in seconds since 1970.
    pub fn changed(&self, name: &str) -> Result<Option<i64>> {
        match fstatat(self.fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat.st_mtime)),
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e).context("look at", self.object(name)),
        }
    }

    /// Writes a file under a name no one else uses.
    fn temporary(&self, bytes: &[u8], sync: bool) -> Result<String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            ".{}.{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let fd = match openat(self.fd(), name.as_str(), flags, mode) {
            // The leaving of a dead process that had the same number.
            Err(Errno::EEXIST) => {
                self.delete(&name)?;
                openat(self.fd(), name.as_str(), flags, mode)
            }
            fd => fd,
        }
        .context("create", self.object(&name))?;
        let mut file = std::fs::File::from(fd);
        let written = file
            .write_all(bytes)
            .and_then(|()| if sync { file.sync_all() } else { Ok(()) });
        if written.is_err() {
            let _ = self.delete(&name);
        }
        written.context("write", self.object(&name))?;
        Ok(name)
    }

    /// Puts a file in place of whatever had the name.
    pub fn replace(&self, name: &str, bytes: &[u8], sync: bool) -> Result<()> {
        let temporary = self.temporary(bytes, sync)?;
        renameat(self.fd(), temporary.as_str(), self.fd(), name)
            .context("rename into", self.object(name))?;
        if sync {
            self.sync()?;
        }
        Ok(())
    }

    /// Gives a file another name, which takes no room: of many who try, one does.
    /// `false`: it is not there.
    pub fn rename(&self, from: &str, to: &str) -> Result<bool> {
        match renameat(self.fd(), from, self.fd(), to) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(e) => Err(e).context("rename into", self.object(to)),
        }
    }

    /// Deletes a file, if it is there.
    pub fn forget(&self, name: &str) -> Result<()> {
        self.delete(name)
    }

    /// Puts a file there if nothing has the name: of many who try, one wins,
    /// and nobody ever sees it half written. `false`: lost.
    pub fn decide(&self, name: &str, bytes: &[u8]) -> Result<bool> {
        let temporary = self.temporary(bytes, false)?;
        let (fd, from) = (self.fd(), temporary.as_str());
        let put = linkat(fd, from, fd, name, AtFlags::empty());
        let _ = self.delete(&temporary);
        match put {
            Ok(()) => Ok(true),
            Err(Errno::EEXIST) => Ok(false),
            Err(e) => Err(e).context("link", self.object(name)),
        }
    }

    /// Makes the names in it survive the machine.
    pub fn sync(&self) -> Result<()> {
        fsync(&self.fd).context("sync", self.path.display())
    }

    fn delete(&self, name: &str) -> Result<()> {
        match unlinkat(self.fd(), name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(e).context("delete", self.object(name)),
        }
    }

    /// Locks the file `lock` in it, made if need be.
    pub fn lock(&self, how: FlockArg) -> Result<Option<Flock<OwnedFd>>> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(self.fd(), "lock", flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .context("open", self.object("lock"))?;
        match Flock::lock(fd, how) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, e)) => Err(e).context("lock", self.object("lock")),
        }
    }

    /// The names in it, in no order.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut dir =
            Dir::openat(self.fd(), ".", DIR, Mode::empty()).context("list", self.path.display())?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.context("list", self.path.display())?;
            if let Ok(name) = entry.file_name().to_str() {
                if name != "." && name != ".." {
                    names.push(name.to_owned());
                }
            }
        }
        Ok(names)
    }

    /// Deletes a directory in it that holds files only.
    pub fn remove(&self, name: &str) -> Result<()> {
        if let Some(sub) = self.find(name)? {
            for file in sub.names()? {
                sub.delete(&file)?;
            }
        }
        match unlinkat(self.fd(), name, UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(e).context("delete", self.object(name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{symlink, PermissionsExt};

    use super::*;

    fn folder() -> (tempfile::TempDir, Folder) {
        let temp = tempfile::tempdir().unwrap();
        let folder = Folder::at(&temp.path().join("state")).unwrap();
        (temp, folder)
    }

    #[test]
    fn of_many_deciders_one_wins_and_all_read_its_words() {
        let (_temp, folder) = folder();
        let wins: Vec<usize> = std::thread::scope(|s| {
            let folder = &folder;
            let threads: Vec<_> = (0..16)
                .map(|n| {
                    s.spawn(move || {
                        let words = format!("{n}").repeat(5000);
                        let won = folder.decide("fate", words.as_bytes()).unwrap();
                        let read = folder.read("fate").unwrap().unwrap();
                        assert!(read.len() >= 5000, "seen half written");
                        if won {
                            assert_eq!(read, words.as_bytes());
                        }
                        won as usize
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(wins.iter().sum::<usize>(), 1);
        assert_eq!(folder.names().unwrap(), ["fate"], "no temporary stays");
    }

    #[test]
    fn of_many_renamers_one_wins() {
        let (_temp, folder) = folder();
        folder.replace("undecided", b"", false).unwrap();
        let names: Vec<String> = (0..16).map(|n| format!("name{n}")).collect();
        let won = std::thread::scope(|s| {
            let rename = |to| folder.rename("undecided", to).unwrap();
            let threads: Vec<_> = names.iter().map(|to| s.spawn(move || rename(to))).collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap())
                .filter(|won| *won)
                .count()
        });
        assert_eq!((won, folder.names().unwrap().len()), (1, 1));
    }

    #[test]
    fn links_and_open_modes_are_refused() {
        let (temp, folder) = folder();
        symlink("/etc/passwd", folder.path().join("fate")).unwrap();
        assert!(folder.read("fate").is_err());
        symlink("/etc", folder.path().join("sub")).unwrap();
        assert!(folder.find("sub").is_err());
        let open = temp.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o775)).unwrap();
        assert!(Folder::at(&open).is_err());
    }
}
