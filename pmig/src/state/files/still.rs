//! Which parts of a file stood still since it was last read, told without
//! reading it again.
//!
//! What a program writes makes pages dirty, and they stay so until they are
//! written to the disk. So a part of a file is what it was if none of its pages
//! is dirty or on the way, nothing was written to the disk since, and it still
//! lies at the same place there. That holds for ext4, where files have one disk
//! that counts what is written to it, and contents don't go through the
//! journal; everywhere else nothing is known, and files are read again. (What
//! another process writes through a shared mapping makes no page dirty before
//! the kernel looks; nothing else shows it either.)

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::sys::statfs::{fstatfs, EXT4_SUPER_MAGIC};

use crate::sys::pages::{attributes, cached, extents, Extent};

/// `FS_JOURNAL_DATA_FL` (ioctl_iflags(2)).
const JOURNALS_DATA: u32 = 0x4000;

/// Pages are first looked for in pieces of this many bytes.
const PIECE: u64 = 4 << 20;

/// A file of which can be told what stood still.
pub(super) struct Still {
    /// The disk's counters, `/sys/dev/block/M:N/stat`.
    disk: File,
    /// When all of it was read last; none before.
    last: Option<Moment>,
}

struct Moment {
    /// Writes that the disk had completed.
    writes: u64,
    extents: Vec<Extent>,
    size: u64,
}

/// Parts of which it is known that they are as they were.
pub(super) struct Parts {
    before: Moment,
    now: Vec<Extent>,
    /// Where there are dirty pages: starts of pieces.
    dirty: Vec<u64>,
    size: u64,
}

impl Still {
    /// `None`: nothing can be told of this file.
    pub fn of(file: &File) -> Option<Still> {
        let fs = fstatfs(file.as_fd()).ok()?;
        if fs.filesystem_type() != EXT4_SUPER_MAGIC || attributes(file).ok()? & JOURNALS_DATA != 0 {
            return None;
        }
        let dev = file.metadata().ok()?.dev();
        let name = format!("{}:{}", libc::major(dev), libc::minor(dev));
        if journals_all(&fs::read_to_string("/proc/self/mountinfo").ok()?, &name) {
            return None;
        }
        let disk = Path::new("/sys/dev/block").join(name);
        // A partition counts if its disk does.
        let counts = [disk.join("queue/iostats"), disk.join("../queue/iostats")];
        let counts = counts.iter().find_map(|p| fs::read_to_string(p).ok())?;
        (counts.trim() == "1").then_some(())?;
        let disk = File::open(disk.join("stat")).ok()?;
        counters(&disk)?;
        cached(file, 0, 1).ok()?;
        Some(Still { disk, last: None })
    }

    /// What stood still since the last call, of a file whose size is `size`.
    /// All else must be read after it, and by whoever reads it be remembered.
    pub fn since_last(&mut self, file: &File, size: u64) -> Option<Parts> {
        let before = self.last.take();
        // Before anything is read: what is written from now on counts.
        let (writes, _) = counters(&self.disk)?;
        let now = extents(file).ok()?;
        self.last = Some(Moment {
            writes,
            extents: now.clone(),
            size,
        });
        let before = before?;
        let mut dirty = Vec::new();
        for at in (0..size).step_by(PIECE as usize) {
            let pages = cached(file, at, PIECE.min(size - at)).ok()?;
            if pages.dirty + pages.writeback > 0 {
                dirty.push(at);
            }
        }
        Some(Parts {
            before,
            now,
            dirty,
            size,
        })
    }

    /// Not all of it was read after all.
    pub fn forget(&mut self) {
        self.last = None;
    }

    /// Whether the disk has written nothing since those parts were looked at
    /// before: only then does what they say hold.
    pub fn vouches_for(&self, parts: &Parts) -> bool {
        // A write that is just being completed is still in flight.
        counters(&self.disk) == Some((parts.before.writes, 0))
    }
}

impl Parts {
    /// Whether a range is as it was.
    pub fn has(&self, file: &File, at: u64, len: u64) -> bool {
        let end = at.saturating_add(len);
        if end > self.size.min(self.before.size) {
            return false;
        }
        let place = |all: &[Extent]| {
            let after = all.partition_point(|e| e.logical <= at);
            let e = all.get(after.checked_sub(1)?)?;
            (e.is_written() && end <= e.end()).then(|| e.physical + (at - e.logical))
        };
        let there = place(&self.now);
        if there.is_none() || there != place(&self.before.extents) {
            return false;
        }
        let piece = at / PIECE * PIECE;
        self.dirty.binary_search(&piece).is_err()
            || cached(file, at, len).is_ok_and(|pages| pages.dirty + pages.writeback == 0)
    }
}

/// Writes completed, and requests on the way
/// (Documentation/block/stat.rst).
fn counters(disk: &File) -> Option<(u64, u64)> {
    let mut text = [0; 512];
    let got = disk.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(&text[..got]).ok()?;
    let mut words = text.split_ascii_whitespace();
    let writes = words.nth(4)?.parse().ok()?;
    let in_flight = words.nth(3)?.parse().ok()?;
    Some((writes, in_flight))
}

/// Whether any mount of that device has contents go through the journal
/// (proc_pid_mountinfo(5)).
fn journals_all(mounts: &str, device: &str) -> bool {
    mounts.lines().any(|line| {
        line.split(' ').nth(2) == Some(device)
            && line
                .split(' ')
                .next_back()
                .is_some_and(|options| options.split(',').any(|o| o == "data=journal"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const BLOCK: u64 = 1 << 16;

    /// A file of so many blocks on the workspace's disk, all of it written there.
    fn file(blocks: u64) -> Option<(tempfile::TempDir, File)> {
        let dir = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).ok()?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("data"))
            .ok()?;
        // What is written at once may be dirty as one.
        for _ in 0..blocks {
            file.write_all(&[7; BLOCK as usize]).ok()?;
        }
        file.sync_all().ok()?;
        Some((dir, file))
    }

    fn told(still: &mut Still, file: &File, blocks: u64) -> Option<Vec<bool>> {
        let size = file.metadata().unwrap().len();
        let parts = still.since_last(file, size)?;
        let all = (0..blocks).map(|n| parts.has(file, n * BLOCK, BLOCK));
        let all = all.collect();
        still.vouches_for(&parts).then_some(all)
    }

    /// Runs a change until the disk was quiet meanwhile, on a file and its
    /// watch; what was told of its four blocks.
    fn after(change: impl Fn(&File)) -> Option<Vec<bool>> {
        for _ in 0..50 {
            let (_dir, file) = file(4)?;
            let Some(mut still) = Still::of(&file) else {
                eprintln!("skipped: nothing can be told of files here");
                return None;
            };
            assert!(told(&mut still, &file, 4).is_none());
            change(&file);
            if let Some(all) = told(&mut still, &file, 4) {
                return Some(all);
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        eprintln!("skipped: the disk is never quiet");
        None
    }

    #[test]
    fn what_nobody_touched_stood_still() {
        let Some(told) = after(|_| {}) else { return };
        assert_eq!(told, [true; 4]);
    }

    #[test]
    fn what_was_written_did_not() {
        let Some(told) = after(|file| {
            file.write_all_at(b"x", BLOCK + 5).unwrap();
            file.write_all_at(b"y", 4 * BLOCK).unwrap();
        }) else {
            return;
        };
        assert_eq!(told, [true, false, true, true]);
    }

    #[test]
    fn what_was_written_through_to_the_disk_did_not() {
        let told = after(|file| {
            file.write_all_at(b"x", BLOCK + 5).unwrap();
            file.sync_all().unwrap();
        });
        assert!(told.is_none_or(|told| !told[1]));
    }

    #[test]
    fn what_was_cut_off_punched_or_moved_did_not() {
        for (mode, zeroed) in [
            (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, true),
            (libc::FALLOC_FL_ZERO_RANGE, true),
            (libc::FALLOC_FL_COLLAPSE_RANGE, false),
        ] {
            let Some(told) = after(|file| {
                let mode = nix::fcntl::FallocateFlags::from_bits_retain(mode);
                nix::fcntl::fallocate(file, mode, BLOCK as i64, BLOCK as i64).unwrap();
                if !zeroed {
                    file.set_len(4 * BLOCK).unwrap();
                }
                // What is read is in memory again, and clean.
                let mut byte = [0];
                file.read_at(&mut byte, BLOCK + 5).unwrap();
            }) else {
                continue;
            };
            assert!(!told[1], "{mode}: {told:?}");
            assert!(zeroed || !told[2], "{mode}: {told:?}");
        }
        let Some(told) = after(|file| {
            file.set_len(BLOCK).unwrap();
            file.set_len(4 * BLOCK).unwrap();
            let mut byte = [0];
            file.read_at(&mut byte, BLOCK + 5).unwrap();
        }) else {
            return;
        };
        assert_eq!(told, [true, false, false, false]);
    }

    #[test]
    fn journalled_contents_are_known_by_the_mount() {
        let mounts = "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw,data=journal\n\
                      23 1 0:5 / /proc rw - proc proc rw\n";
        assert!(journals_all(mounts, "254:0"));
        assert!(!journals_all(mounts, "0:5"));
    }
}
