//! What makes a file the same file on another machine.

use std::fmt::{self, Display};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::state::files::{Stamp, Uses};
use crate::state::paths::{FilePath, Pinned};

/// By what a file is recognised at the target, besides its path and size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Identity {
    /// The build-id the linker gave an ELF file, and its size.
    BuildId(Vec<u8>),
    /// The blake3 hash of its content.
    Hash([u8; 32]),
    /// It is being written to: no other file can be the same.
    Written,
}

impl Identity {
    /// Checks what came from a peer.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Identity::BuildId(id) if !BUILD_ID.contains(&id.len()) => Err(Error::bad(
                "list of files",
                "a build-id has an impossible length",
            )),
            _ => Ok(()),
        }
    }

    /// Finds out what the content of a file is, without touching its access
    /// time.
    ///
    /// # Errors
    /// Where it cannot be read, or changes while it is.
    pub(super) fn of(pinned: &Pinned, uses: Uses, path: &FilePath) -> Result<Identity> {
        if uses.written {
            return Ok(Identity::Written);
        }
        let file = open_quietly(pinned).context("open", path)?;
        if (uses.mapped || uses.exe) && !uses.read {
            if let Some(id) = build_id(&file).context("read", path)? {
                return Ok(Identity::BuildId(id));
            }
        }
        Ok(Identity::Hash(hash(&file, pinned, path)?))
    }

    /// Whether the file that is held has this identity; the answer says what it
    /// is instead.
    ///
    /// # Errors
    /// Where it cannot be read, or changes while it is.
    pub(super) fn differs(&self, pinned: &Pinned, path: &FilePath) -> Result<Option<String>> {
        let file = open_quietly(pinned).context("open", path)?;
        let other = match self {
            Identity::Written => return Ok(Some("being written to".into())),
            Identity::BuildId(_) => match build_id(&file).context("read", path)? {
                Some(id) => Identity::BuildId(id),
                None => return Ok(Some(format!("{self} here, none there"))),
            },
            Identity::Hash(_) => Identity::Hash(hash(&file, pinned, path)?),
        };
        Ok((*self != other).then(|| format!("{self} here, {} there", other.short())))
    }

    fn short(&self) -> String {
        let id: &[u8] = match self {
            Identity::BuildId(id) => id,
            Identity::Hash(hash) => hash,
            Identity::Written => &[],
        };
        let start: String = id.iter().take(4).map(|b| format!("{b:02x}")).collect();
        start + ".."
    }
}

impl Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::BuildId(_) => write!(f, "build-id {}", self.short()),
            Identity::Hash(_) => write!(f, "hash {}", self.short()),
            Identity::Written => f.write_str("being written to"),
        }
    }
}

/// Opens a regular file for reading only, leaving its access time alone where
/// that is allowed, and never waiting.
pub(super) fn open_quietly(pinned: &Pinned) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
    let fd = match pinned.open(flags | OFlag::O_NOATIME) {
        Err(nix::errno::Errno::EPERM) => pinned.open(flags)?,
        other => other?,
    };
    Ok(File::from(fd))
}

fn hash(file: &File, pinned: &Pinned, path: &FilePath) -> Result<[u8; 32]> {
    let before = Stamp::of(&pinned.stat_now().context("stat", path)?);
    // A change made within the same tick of the file system's clock would not
    // show in the time stamps: those must lie back a little.
    if let Some(wait) = before.unsettled(SystemTime::now()) {
        std::thread::sleep(wait);
    }
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 18];
    let mut at = 0u64;
    loop {
        let n = file.read_at(&mut buffer, at).context("read", path)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        at += n as u64;
        if at > before.size {
            break;
        }
    }
    let after = Stamp::of(&pinned.stat_now().context("stat", path)?);
    if at != before.size || before != after {
        return Err(Error::bad(path, "is being changed while it is read"));
    }
    Ok(*hasher.finalize().as_bytes())
}

/// Lengths of build-ids that linkers make: ld(1), `--build-id`.
const BUILD_ID: std::ops::RangeInclusive<usize> = 4..=64;

/// Reads the build-id out of a 64-bit ELF file's notes: elf(5). None where it
/// is no such file, or has none, or is malformed.
pub(super) fn build_id(file: &File) -> io::Result<Option<Vec<u8>>> {
    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;
    const NOTES: u64 = 4;
    let mut header = [0; HEADER];
    if !fill(file, &mut header, 0)? || &header[..6] != b"\x7fELF\x02\x01" {
        return Ok(None);
    }
    let offset = word(&header, 32, 8);
    let size = word(&header, 54, 2) as usize;
    let count = word(&header, 56, 2).min(128) as usize;
    if size != PROGRAM_HEADER {
        return Ok(None);
    }
    let mut table = vec![0; count * PROGRAM_HEADER];
    if !fill(file, &mut table, offset)? {
        return Ok(None);
    }
    for h in table.chunks_exact(PROGRAM_HEADER) {
        let (at, len, align) = (word(h, 8, 8), word(h, 32, 8), word(h, 48, 8));
        if word(h, 0, 4) != NOTES || len > 1 << 16 {
            continue;
        }
        let mut notes = vec![0; len as usize];
        if !fill(file, &mut notes, at)? {
            continue;
        }
        if let Some(id) = note(&notes, if align == 8 { 8 } else { 4 }) {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

/// Finds the note named GNU of type `NT_GNU_BUILD_ID`.
fn note(mut rest: &[u8], align: usize) -> Option<Vec<u8>> {
    while rest.len() >= 12 {
        let (name, desc) = (word(rest, 0, 4) as usize, word(rest, 4, 4) as usize);
        let desc_at = 12usize.checked_add(name)?.checked_next_multiple_of(align)?;
        let end = desc_at.checked_add(desc)?;
        if end > rest.len() {
            return None;
        }
        if word(rest, 8, 4) == 3 && rest.get(12..12 + name)? == b"GNU\0" && BUILD_ID.contains(&desc)
        {
            return Some(rest[desc_at..end].to_vec());
        }
        rest = rest.get(end.checked_next_multiple_of(align)?..)?;
    }
    None
}

/// A little-endian number in bytes known to be long enough.
fn word(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len]
        .iter()
        .rev()
        .fold(0, |n, &b| n << 8 | u64::from(b))
}

/// Reads the whole buffer; false where the file ends before.
fn fill(file: &File, buffer: &mut [u8], at: u64) -> io::Result<bool> {
    if at > i64::MAX as u64 {
        return Ok(false);
    }
    match file.read_exact_at(buffer, at) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf_file(path: &str) -> Vec<u8> {
        std::fs::read(path).unwrap()
    }

    fn id_of(bytes: &[u8]) -> Option<Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, bytes).unwrap();
        build_id(&File::open(path).unwrap()).unwrap()
    }

    #[test]
    fn a_distribution_gives_its_programs_build_ids() {
        let id = id_of(&elf_file("/bin/sh")).expect("/bin/sh has a build-id");
        assert_eq!(id.len(), 20);
    }

    #[test]
    fn mutilated_programs_do_no_harm() {
        let good = elf_file("/bin/sh");
        let head = &good[..good.len().min(4096)];
        for n in [0, 5, 63, 64, 100, 700] {
            id_of(&head[..n.min(head.len())]);
        }
        let mut seed = 7u64;
        for _ in 0..2000 {
            let mut bad = head.to_vec();
            for _ in 0..4 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                let at = (seed >> 33) as usize % 800.min(bad.len());
                bad[at] = (seed >> 24) as u8;
            }
            id_of(&bad);
        }
        assert!(note(&[0xff; 64], 4).is_none());
        assert!(note(&[0; 64], 8).is_none());
    }
}
