//! Receiving files at the target: under a temporary name beside the final one,
//! put in place when the program is let go on.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{openat, renameat2, AtFlags, OFlag, RenameFlags};
use nix::sys::stat::{fchmod, fstat, fstatat, futimens, Mode};
use nix::sys::time::TimeSpec;
use nix::unistd::{fchown, unlinkat, Gid, Uid, UnlinkatFlags};
use serde::{Deserialize, Serialize};

use super::{FileRef, Stamp, BLOCK};
use crate::error::{Context, Error, Result};
use crate::id::Id;
use crate::state::objects::Opener;
use crate::state::paths::{open_plain, FilePath};

/// A file that is there under a temporary name: what a journal must know to
/// put it in place, or to clear it away, after a crash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    pub path: FilePath,
    pub temporary: FilePath,
    pub dev: u64,
    pub ino: u64,
    /// What stands under the final name and may be replaced.
    pub replace: Option<Stamp>,
}

/// Files being received for one migration. Dropped without
/// [`Receiver::place`] or [`Receiver::keep`] it clears all of them away.
pub struct Receiver {
    id: Id,
    /// Bytes all files together may still take.
    left: u64,
    files: Vec<Incoming>,
    /// Where they are, as found when each was complete.
    dirs: BTreeMap<FilePath, OwnedFd>,
    keep: bool,
}

struct Incoming {
    pending: Pending,
    /// For writing until the file is complete, for syncing after.
    file: File,
    length: u64,
    complete: bool,
}

impl Receiver {
    /// A receiver that takes at most `limit` bytes.
    pub fn new(id: Id, limit: u64) -> Receiver {
        Receiver {
            id,
            left: limit,
            files: Vec::new(),
            dirs: BTreeMap::new(),
            keep: false,
        }
    }

    /// Makes the temporary file for one that will be sent, with the owner it
    /// has at the source and its permissions short of set-id bits, and lets the
    /// opener find it. Returns its index.
    ///
    /// # Errors
    /// Where it cannot be made, or the policy does not allow its path.
    pub fn create(
        &mut self,
        file: &FileRef,
        replace: Option<Stamp>,
        opener: &mut Opener,
    ) -> Result<usize> {
        opener.allow(&file.path)?;
        let n = self.files.len();
        let temporary = file.path.beside(&format!(".pmig-{}-{n}", self.id))?;
        let dir = directory_of(&temporary)?;
        let fd = make(&dir, &temporary)?;
        let stat = fstat(&fd).context("stat", &temporary)?;
        self.files.push(Incoming {
            pending: Pending {
                path: file.path.clone(),
                temporary: temporary.clone(),
                dev: stat.st_dev,
                ino: stat.st_ino,
                replace,
            },
            file: File::from(fd),
            length: 0,
            complete: false,
        });
        let fd = &self.files[n].file;
        fchown(
            fd,
            Some(Uid::from_raw(file.uid)),
            Some(Gid::from_raw(file.gid)),
        )
        .context("set the owner of", &temporary)?;
        fchmod(fd, Mode::from_bits_retain(file.mode & 0o777))
            .context("set the permissions of", &temporary)?;
        opener.admit(file.path.clone(), temporary, stat.st_dev, stat.st_ino);
        Ok(n)
    }

    fn incoming(&mut self, n: usize) -> Result<&mut Incoming> {
        self.files
            .get_mut(n)
            .filter(|f| !f.complete)
            .ok_or_else(|| not_received(n))
    }

    /// Writes a block as [`Shipment::pass`](super::Shipment::pass) gave it out.
    ///
    /// # Errors
    /// [`Error::Bad`] where the peer sends more than it may, `ENOSPC` where the
    /// file system is full.
    pub fn write(&mut self, n: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let left = self.left;
        let file = self.incoming(n)?;
        let path = &file.pending.path;
        let end = offset
            .checked_add(bytes.len() as u64)
            .filter(|&end| bytes.len() <= BLOCK && end <= i64::MAX as u64)
            .ok_or_else(|| Error::bad(path, "a block of it is impossible"))?;
        let more = end.saturating_sub(file.length);
        if more > left {
            return Err(Error::bad(
                path,
                "is larger than what may be shipped to here",
            ));
        }
        file.file
            .write_all_at(bytes, offset)
            .context("write", path)?;
        file.length += more;
        self.left -= more;
        Ok(())
    }

    /// Ends a pass: the file is as long as the pass says.
    ///
    /// # Errors
    /// As [`Receiver::write`].
    pub fn end_pass(&mut self, n: usize, size: u64) -> Result<()> {
        let left = self.left;
        let file = self.incoming(n)?;
        let path = &file.pending.path;
        if size.saturating_sub(file.length) > left || size > i64::MAX as u64 {
            return Err(Error::bad(
                path,
                "is larger than what may be shipped to here",
            ));
        }
        if size != file.length {
            file.file.set_len(size).context("set the size of", path)?;
        }
        let before = std::mem::replace(&mut file.length, size);
        self.left = left + before - size;
        Ok(())
    }

    /// Ends the last pass. The file is closed for writing, so that it can be
    /// executed.
    ///
    /// # Errors
    /// As [`Receiver::write`].
    pub fn finish(&mut self, n: usize, size: u64, mtime: (i64, u32)) -> Result<()> {
        self.end_pass(n, size)?;
        let dir = self.incoming(n)?.pending.path.parent();
        if !self.dirs.contains_key(&dir) {
            self.dirs.insert(dir.clone(), open_directory(&dir)?);
        }
        let file = self
            .files
            .get_mut(n)
            .filter(|f| !f.complete)
            .ok_or_else(|| not_received(n))?;
        let dir = &self.dirs[&dir];
        let path = &file.pending.path;
        if mtime.1 >= 1_000_000_000 {
            return Err(Error::bad(path, "its time of change is impossible"));
        }
        let mtime = TimeSpec::new(mtime.0, i64::from(mtime.1));
        futimens(&file.file, &TimeSpec::UTIME_OMIT, &mtime).context("set the times of", path)?;
        let name = file.pending.temporary.name();
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(dir, name.as_os_str(), flags, Mode::empty()).context("open", path)?;
        let stat = fstat(&fd).context("stat", path)?;
        if (stat.st_dev, stat.st_ino) != (file.pending.dev, file.pending.ino) {
            return Err(Error::bad(path, "was replaced while it was received"));
        }
        file.file = File::from(fd);
        file.complete = true;
        Ok(())
    }

    /// Writes what was received through to the disk: once before the freeze, so
    /// that little is left, and once after the program runs, before the source
    /// lets its own go; then the new names as well.
    ///
    /// # Errors
    /// As fdatasync(2).
    pub fn sync(&self) -> Result<()> {
        for f in &self.files {
            f.file.sync_data().context("sync", &f.pending.path)?;
            if self.keep {
                let dir = f.pending.path.parent();
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
                let fd = open_plain(&dir, flags, Mode::empty()).context("open", &dir)?;
                File::from(fd).sync_all().context("sync", &dir)?;
            }
        }
        Ok(())
    }

    /// For the journal: known as soon as the files are created.
    pub fn pending(&self) -> Vec<Pending> {
        self.files.iter().map(|f| f.pending.clone()).collect()
    }

    /// Makes sure, before the point of no return, that every file is complete
    /// and nothing has come to stand in its place since it was created.
    ///
    /// # Errors
    /// [`Error::Bad`] naming the file.
    pub fn check(&self) -> Result<()> {
        for f in &self.files {
            if !f.complete {
                return Err(Error::bad(&f.pending.path, "was not received whole"));
            }
            f.pending.check(self.dir(f)?)?;
        }
        Ok(())
    }

    fn dir(&self, file: &Incoming) -> Result<&OwnedFd> {
        let dir = file.pending.path.parent();
        let known = self.dirs.get(&dir);
        known.ok_or_else(|| Error::bad(&file.pending.path, "was not received whole"))
    }

    /// Puts every file in its place.
    ///
    /// # Errors
    /// Where one cannot be; [`Pending::commit`] may be tried again.
    pub fn place(&mut self) -> Result<()> {
        self.keep = true;
        let mut files = self.files.iter();
        files.try_for_each(|f| f.pending.place(self.dir(f)?))
    }

    /// Removes what they replaced, when nobody waits for it any more: to free
    /// the blocks of a large file takes longer than to rename it.
    ///
    /// # Errors
    /// Where one cannot be removed.
    pub fn clear(&self) -> Result<()> {
        self.files
            .iter()
            .try_for_each(|f| f.pending.clear().map(drop))
    }

    /// From now on the journal decides what becomes of the files: they stay
    /// even if this is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if !self.keep {
            for f in &self.files {
                if let Err(e) = f.pending.abort() {
                    tracing::warn!("{e}");
                }
            }
        }
    }
}

/// Makes a file that was not there, by the kind of rename that will put it in
/// its place: a file system that cannot do it (nfs) is better found out now.
fn make(dir: &OwnedFd, temporary: &FilePath) -> Result<OwnedFd> {
    let first = temporary.beside(&(temporary.name().to_string_lossy() + ".new"))?;
    let (from, to) = (first.name(), temporary.name());
    let flags =
        OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = openat(dir, from.as_os_str(), flags, Mode::from_bits_retain(0o600))
        .context("create", &first)?;
    let noreplace = RenameFlags::RENAME_NOREPLACE;
    if let Err(e) = renameat2(dir, from.as_os_str(), dir, to.as_os_str(), noreplace) {
        let _ = unlinkat(dir, from.as_os_str(), UnlinkatFlags::NoRemoveDir);
        return Err(e).context("rename without replacing anything to", temporary);
    }
    Ok(fd)
}

fn directory_of(path: &FilePath) -> Result<OwnedFd> {
    open_directory(&path.parent())
}

fn open_directory(dir: &FilePath) -> Result<OwnedFd> {
    open_plain(dir, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty()).context("open", dir)
}

fn not_received(n: usize) -> Error {
    Error::bad(format!("shipped file {n}"), "is not being received")
}

/// What stands under a name, not followed if it is a link.
fn stamp_at(dir: &OwnedFd, path: &FilePath) -> Result<Option<Stamp>> {
    match fstatat(
        dir.as_fd(),
        path.name().as_os_str(),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    ) {
        Ok(stat) => Ok(Some(Stamp::of(&stat))),
        Err(Errno::ENOENT) => Ok(None),
        Err(e) => Err(e).context("stat", path),
    }
}

impl Pending {
    fn is_ours(&self, found: &Option<Stamp>) -> bool {
        found.is_some_and(|s| (s.dev, s.ino) == (self.dev, self.ino))
    }

    fn rename(&self, dir: &OwnedFd, flags: RenameFlags) -> nix::Result<()> {
        let (from, to) = (self.temporary.name(), self.path.name());
        renameat2(dir, from.as_os_str(), dir, to.as_os_str(), flags)
    }

    fn unlink(&self, dir: &OwnedFd) -> Result<()> {
        match unlinkat(
            dir,
            self.temporary.name().as_os_str(),
            UnlinkatFlags::NoRemoveDir,
        ) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(e).context("remove", &self.temporary),
        }
    }

    /// Whether the file could be put in its place now.
    ///
    /// # Errors
    /// [`Error::Bad`] where something else stands there.
    fn check(&self, dir: &OwnedFd) -> Result<()> {
        let there = stamp_at(dir, &self.path)?;
        let own = stamp_at(dir, &self.temporary)?;
        if !self.is_ours(&own) {
            return Err(Error::bad(&self.temporary, "was removed or replaced"));
        }
        match there {
            None => Ok(()),
            some if some == self.replace => Ok(()),
            Some(_) => Err(Error::bad(
                &self.path,
                "another file has come to stand there meanwhile",
            )),
        }
    }

    /// Puts the file in its place and removes what it replaced; can be
    /// repeated, and after the program has moved it from there: what has no
    /// temporary name any more was in its place once.
    ///
    /// # Errors
    /// [`Error::Bad`] where something else stands there: nothing is lost, the
    /// file keeps its temporary name.
    pub fn commit(&self) -> Result<()> {
        if !self.clear()? && self.has_temporary()? {
            self.place(&directory_of(&self.path)?)?;
            self.clear()?;
        }
        Ok(())
    }

    fn has_temporary(&self) -> Result<bool> {
        match directory_of(&self.temporary) {
            Err(e) if e.errno() == Some(libc::ENOENT) => Ok(false),
            dir => Ok(stamp_at(&dir?, &self.temporary)?.is_some()),
        }
    }

    /// Removes what was replaced, if it still is there: then the file was in
    /// its place once, from where the program may have moved it since.
    fn clear(&self) -> Result<bool> {
        let dir = match directory_of(&self.temporary) {
            Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(false),
            other => other?,
        };
        match stamp_at(&dir, &self.temporary)? {
            Some(old) if self.replaces(&old) => self.unlink(&dir).map(|()| true),
            _ => Ok(false),
        }
    }

    /// Puts the file in its place; can be repeated. What is open through the
    /// temporary name has the final one from then on, and what was replaced has
    /// the temporary one.
    ///
    /// # Errors
    /// [`Error::Bad`] where something else stands there: nothing is lost, the
    /// file keeps its temporary name.
    fn place(&self, dir: &OwnedFd) -> Result<()> {
        let there = stamp_at(dir, &self.path)?;
        let temporary = stamp_at(dir, &self.temporary)?;
        if self.is_ours(&there) {
            return Ok(()); // done before
        }
        if !self.is_ours(&temporary) {
            return Err(Error::bad(&self.temporary, "was removed or replaced"));
        }
        let taken = || {
            Error::bad(
                &self.path,
                format!(
                    "another file has come to stand there; the program's own stays at {}",
                    self.temporary
                ),
            )
        };
        match there {
            None => match self.rename(dir, RenameFlags::RENAME_NOREPLACE) {
                Err(Errno::EEXIST) => Err(taken()),
                other => other.context("put in place", &self.path),
            },
            Some(old) if Some(old) == self.replace => {
                self.rename(dir, RenameFlags::RENAME_EXCHANGE)
                    .context("put in place", &self.path)?;
                match stamp_at(dir, &self.temporary)? {
                    Some(out) if self.replaces(&out) => Ok(()),
                    // Not what was approved came out: it goes back in.
                    _ => {
                        self.rename(dir, RenameFlags::RENAME_EXCHANGE)
                            .context("put back", &self.path)?;
                        Err(taken())
                    }
                }
            }
            Some(_) => Err(taken()),
        }
    }

    /// Whether a file is the one that may be replaced. Being renamed changes
    /// its ctime.
    fn replaces(&self, found: &Stamp) -> bool {
        self.replace.is_some_and(|old| {
            Stamp {
                ctime: old.ctime,
                ..*found
            } == old
        })
    }

    /// Clears the file away; can be repeated, and leaves alone what is not
    /// ours.
    ///
    /// # Errors
    /// Where it cannot be removed.
    pub fn abort(&self) -> Result<()> {
        let dir = match directory_of(&self.temporary) {
            Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(()),
            other => other?,
        };
        if self.is_ours(&stamp_at(&dir, &self.temporary)?) {
            self.unlink(&dir)?;
        }
        Ok(())
    }
}
