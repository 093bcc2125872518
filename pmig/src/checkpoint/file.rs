//! The file itself.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{renameat2, RenameFlags, AT_FDCWD};

use super::{bad, never, temporary};
use crate::error::{Context, Error, Result};
use crate::id::Id;
use crate::protocol::message::{ToTarget, MAX_RAW};
use crate::protocol::{decode, encode, preface, MAX_MESSAGE};

const MAGIC: [u8; 8] = *b"PMIGFILE";
const END: [u8; 8] = *b"PMIGEND.";
/// Magic, version, and the id of the migration that wrote it.
const HEAD: usize = 8 + 2 + 16;
/// Magic, length of all before, and its hash.
const TAIL: usize = 8 + 8 + 32;
/// Bytes written between two syncs, so that the last does not take long.
const SYNC: u64 = 64 << 20;

/// A file being written.
pub struct Writer {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    hash: blake3::Hasher,
    length: u64,
    unsynced: u64,
    whole: bool,
}

impl Drop for Writer {
    /// What is not whole nobody will ask for, and it takes room.
    fn drop(&mut self) {
        if !self.whole {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

impl Writer {
    /// # Errors
    /// The name is taken, or the file cannot be made.
    pub fn create(path: &Path, id: Id) -> Result<Writer> {
        let temporary = temporary(path, id);
        let first = never(path, id);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&first)
            .context("create", first.display())?;
        // By the kind of rename that will give it its name: better found out now.
        if let Err(e) = rename(&first, &temporary) {
            let _ = std::fs::remove_file(&first);
            return Err(e).context("rename without replacing anything to", temporary.display());
        }
        let mut writer = Writer {
            path: path.to_owned(),
            temporary,
            file,
            hash: blake3::Hasher::new(),
            length: 0,
            unsynced: 0,
            whole: false,
        };
        let head = [&MAGIC[..], &preface::VERSION.to_le_bytes(), id.bytes()].concat();
        writer.write(&head)?;
        Ok(writer)
    }

    /// Adds a message and the content that belongs to it.
    pub fn put(&mut self, message: &ToTarget, raw: &[u8]) -> Result<()> {
        let body = encode(message)?;
        self.write(&(body.len() as u32).to_le_bytes())?;
        self.write(&body)?;
        self.write(raw)?;
        if self.unsynced >= SYNC {
            self.sync()?;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .context("write", self.temporary.display())?;
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        self.unsynced += bytes.len() as u64;
        Ok(())
    }

    /// Writes it through to the disk.
    pub fn sync(&mut self) -> Result<()> {
        self.unsynced = 0;
        self.file
            .sync_data()
            .context("sync", self.temporary.display())
    }

    /// Adds the tail: it is whole.
    pub fn finish(&mut self) -> Result<()> {
        let hash = self.hash.finalize();
        let tail = [&END[..], &self.length.to_le_bytes(), hash.as_bytes()].concat();
        self.write(&tail)?;
        self.sync()?;
        self.sync_names()?;
        self.whole = true;
        Ok(())
    }

    /// Whichever of its names it has now survives the machine.
    fn sync_names(&self) -> Result<()> {
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        File::open(directory)
            .and_then(|d| d.sync_all())
            .context("sync", directory.display())
    }

    /// Gives it its name, for good.
    ///
    /// # Errors
    /// The name is taken by now; those of rename(2).
    pub fn publish(&self) -> Result<()> {
        rename(&self.temporary, &self.path).context("give its name to", self.path.display())?;
        self.sync_names()
    }
}

/// Gives a file another name that nobody has.
fn rename(from: &Path, to: &Path) -> nix::Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE)
}

/// Of which migration a file is; none where it is no such file, or not whole.
///
/// # Errors
/// It cannot be read.
pub fn id_of(path: &Path) -> io::Result<Option<Id>> {
    let mut file = match quietly(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut head = [0; HEAD];
    match file.read_exact(&mut head) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let (magic, rest) = head.split_at(10);
    let id: [u8; 16] = rest.try_into().unwrap_or_default();
    Ok((magic[..8] == MAGIC).then(|| Id::from_bytes(id)))
}

/// Opens what may be anything, and does not wait for it.
fn quietly(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// A whole file being read.
pub struct Reader {
    path: PathBuf,
    file: io::Take<BufReader<File>>,
    /// Of the migration that wrote it.
    pub id: Id,
    /// Bytes in all.
    pub size: u64,
}

impl Reader {
    /// Opens it, and reads all of it once to see that it is as it was written.
    ///
    /// # Errors
    /// [`Error::Bad`] where it is not one, of another version, cut, or altered.
    pub fn open(path: &Path) -> Result<Reader> {
        let object = path.display();
        let mut file = quietly(path).context("open", object)?;
        let meta = file.metadata().context("look at", path.display())?;
        if !meta.is_file() {
            return Err(bad(path, "is not a regular file"));
        }
        let size = meta.len();
        let mut head = [0; HEAD];
        let read = file.read_exact(&mut head);
        if read.is_err() || head[..8] != MAGIC {
            return Err(bad(path, "is no file that pmig dump wrote"));
        }
        let version = u16::from_le_bytes([head[8], head[9]]);
        if version != preface::VERSION {
            return Err(bad(
                path,
                format!(
                    "was written in version {version}, this pmig reads version {}",
                    preface::VERSION
                ),
            ));
        }
        let cut = || bad(path, "is cut off: its end is missing");
        let body = size
            .checked_sub((HEAD + TAIL) as u64)
            .map(|n| n + HEAD as u64)
            .ok_or_else(cut)?;
        let mut tail = [0; TAIL];
        let at = file.seek(SeekFrom::Start(body));
        at.and_then(|_| file.read_exact(&mut tail))
            .context("read", path.display())?;
        let (magic, rest) = tail.split_at(8);
        let (length, hash) = rest.split_at(8);
        if magic != END || length != body.to_le_bytes() {
            return Err(cut());
        }
        file.rewind().context("read", path.display())?;
        let mut hasher = blake3::Hasher::new();
        hasher
            .update_reader((&mut file).take(body))
            .context("read", path.display())?;
        if hasher.finalize().as_bytes() != hash {
            return Err(bad(path, "was altered since it was written"));
        }
        file.seek(SeekFrom::Start(HEAD as u64))
            .context("read", path.display())?;
        let id: [u8; 16] = head[10..].try_into().unwrap_or_default();
        Ok(Reader {
            path: path.to_owned(),
            file: BufReader::with_capacity(1 << 16, file).take(body - HEAD as u64),
            id: Id::from_bytes(id),
            size,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next message, its content in `raw`; none at the end.
    ///
    /// # Errors
    /// [`Error::Bad`] where it makes no sense.
    pub fn next(&mut self, raw: &mut Vec<u8>) -> Result<Option<ToTarget>> {
        if self.file.limit() == 0 {
            return Ok(None);
        }
        let mut len = [0; 4];
        self.fill(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len > MAX_MESSAGE || len as u64 > self.file.limit() {
            return Err(bad(
                &self.path,
                format!("a message of {len} bytes in it is too long"),
            ));
        }
        let mut body = vec![0; len];
        self.fill(&mut body)?;
        let message: ToTarget = decode(&body).map_err(|e| bad(&self.path, e))?;
        let content = message.content();
        if content > MAX_RAW as u64 || content > self.file.limit() {
            return Err(bad(
                &self.path,
                format!("{content} bytes of content in it are too many"),
            ));
        }
        raw.resize(content as usize, 0);
        self.fill(raw)?;
        Ok(Some(message))
    }

    fn fill(&mut self, into: &mut [u8]) -> Result<()> {
        self.file.read_exact(into).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => bad(&self.path, "ends in the middle of a message"),
            _ => Error::Os {
                op: "read",
                object: self.path.display().to_string(),
                cause: e,
            },
        })
    }
}
