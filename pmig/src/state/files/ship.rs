//! Sending a file that may change meanwhile: whole at first, then what
//! changed, the last of it while the process stands still.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::unistd::{lseek, Whence};

use super::identity::open_quietly;
use super::still::Still;
use super::Stamp;
use crate::error::{Context, Error, Result};
use crate::state::paths::{FilePath, Pinned};

/// Bytes that are compared and sent together.
pub const BLOCK: usize = 1 << 16;

/// What is known of a block's content at the receiver.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Nothing but zeros, as in a hole.
    Zeros,
    /// The first half of its blake3 hash.
    Hash([u8; 16]),
    /// What [`Shipment::tail`] has: the file ended in it.
    Tail,
}

/// A file being sent.
pub struct Shipment {
    path: FilePath,
    file: File,
    blocks: Vec<Known>,
    /// The end of the file, less than a block: what is appended to it travels
    /// alone.
    tail: Vec<u8>,
    /// The file's state when the last pass began, and when that was.
    last: Option<(Stamp, SystemTime)>,
    /// Its time stamps cannot be compared with this machine's clock.
    foreign_clock: bool,
    still: Option<Still>,
    buffer: Vec<u8>,
}

/// What a pass came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Bytes given out.
    pub sent: u64,
    /// The file's size, in bytes: the receiver cuts or extends its copy to it.
    pub size: u64,
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (i64, u32),
}

impl Shipment {
    pub(super) fn open(pinned: &Pinned, path: &FilePath) -> Result<Shipment> {
        let file = open_quietly(pinned).context("open", path)?;
        Ok(Shipment {
            still: Still::of(&file),
            path: path.clone(),
            file,
            blocks: Vec::new(),
            tail: Vec::new(),
            last: None,
            foreign_clock: pinned.has_foreign_clock().context("look at", path)?,
            buffer: vec![0; BLOCK],
        })
    }

    pub fn path(&self) -> &FilePath {
        &self.path
    }

    /// Gives out every block that changed since the pass before, with its
    /// offset, and of the last one, if it only grew, what it grew by; at first,
    /// every block that is not all zeros.
    ///
    /// A pass over a file that visibly did not change costs one fstat(2). Any
    /// other reads all of it but what is known to have stood still: on ext4, a
    /// short while after the pass before and while the disk is quiet, that is
    /// all that was not written to. What is given out in a pass while the file
    /// is written to may be torn: the pass made when nobody writes sets it
    /// right. Writes through a shared mapping show in the time stamps only when
    /// the kernel writes the page back.
    ///
    /// # Errors
    /// Where the file cannot be read, and what `send` returns.
    pub fn pass(&mut self, mut send: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<Pass> {
        let began = SystemTime::now();
        let stat = fstat(&self.file).context("stat", &self.path)?;
        let stamp = Stamp::of(&stat);
        let mut pass = Pass {
            sent: 0,
            size: stamp.size,
            mtime: stamp.mtime,
        };
        if self.is_unchanged(&stamp) {
            return Ok(pass);
        }
        if let (None, Some(_)) = (&self.last, &self.still) {
            // Contents that are on the disk can be told from those written
            // later. Where this fails, so will the program's own.
            let _ = self.file.sync_data();
        }
        let count = usize::try_from(stamp.size.div_ceil(BLOCK as u64))
            .ok()
            .filter(|&n| n < 1 << 32)
            .ok_or_else(|| Error::bad(&self.path, "is too large to be sent"))?;
        self.blocks.resize(count, Known::Zeros);
        let unread = self.stood_still(stamp.size);
        let mut data_to = 0;
        let mut n = 0;
        while n < count {
            let at = (n * BLOCK) as u64;
            if self.blocks[n] == Known::Zeros && at >= data_to {
                // Known to be zero over there: holes need not be read.
                match self.next_data(at)? {
                    None => {
                        n = self.skip(n + 1, count);
                        continue;
                    }
                    Some((from, to)) => {
                        data_to = to;
                        let next = (from / BLOCK as u64) as usize;
                        if next > n {
                            n = self.skip(n + 1, next);
                            continue;
                        }
                    }
                }
            }
            if unread.get(n) == Some(&true) {
                n += 1;
                continue;
            }
            let want = (stamp.size - at).min(BLOCK as u64) as usize;
            let got = self.read(at, want)?;
            let block = &self.buffer[..got];
            let known = know(block);
            let same = match self.blocks[n] {
                Known::Tail if block.starts_with(&self.tail) => self.tail.len(),
                _ => 0,
            };
            if known != self.blocks[n] || (known == Known::Tail && block != self.tail) {
                send(at + same as u64, &block[same..])?;
                pass.sent += (got - same) as u64;
                self.blocks[n] = known;
            }
            if known == Known::Tail {
                self.tail.clear();
                self.tail.extend_from_slice(block);
            }
            if got < want {
                // Cut off meanwhile.
                pass.size = at + got as u64;
                self.blocks.truncate(n + usize::from(got > 0));
                if let Some(still) = &mut self.still {
                    still.forget();
                }
                break;
            }
            n += 1;
        }
        self.last = Some((stamp, began));
        Ok(pass)
    }

    /// The blocks that need not be read.
    fn stood_still(&mut self, size: u64) -> Vec<bool> {
        let Some(still) = &mut self.still else {
            return Vec::new();
        };
        let Some(parts) = still.since_last(&self.file, size) else {
            return Vec::new();
        };
        let len = BLOCK as u64;
        let whole = 0..(size / len) * len;
        let all: Vec<bool> = whole
            .step_by(BLOCK)
            .map(|at| parts.has(&self.file, at, len))
            .collect();
        if still.vouches_for(&parts) {
            all
        } else {
            Vec::new()
        }
    }

    /// The next block from `n` on, below `end`, of which the receiver knows
    /// something else than zeros.
    fn skip(&self, n: usize, end: usize) -> usize {
        (n..end)
            .find(|&n| self.blocks[n] != Known::Zeros)
            .unwrap_or(end)
    }

    /// Whether the file is as it was when the last pass began, and had been for
    /// longer than its clock may lag.
    fn is_unchanged(&self, now: &Stamp) -> bool {
        let Some((then, began)) = &self.last else {
            return false;
        };
        if self.foreign_clock {
            return false;
        }
        then == now && now.unsettled(*began).is_none()
    }

    /// Where the next data lies at or after an offset, as far as the file
    /// system tells.
    fn next_data(&self, at: u64) -> Result<Option<(u64, u64)>> {
        let seek = |to: u64, whence| lseek(self.file.as_fd(), to as i64, whence);
        let from = match seek(at, Whence::SeekData) {
            Ok(from) => from as u64,
            Err(Errno::ENXIO) => return Ok(None),
            Err(Errno::EINVAL) => return Ok(Some((at, u64::MAX))),
            Err(e) => return Err(e).context("seek in", &self.path),
        };
        let to = match seek(from, Whence::SeekHole) {
            Ok(to) => to as u64,
            Err(Errno::ENXIO) => u64::MAX,
            Err(e) => return Err(e).context("seek in", &self.path),
        };
        Ok(Some((from, to)))
    }

    fn read(&mut self, at: u64, want: usize) -> Result<usize> {
        let mut got = 0;
        while got < want {
            let n = self
                .file
                .read_at(&mut self.buffer[got..want], at + got as u64)
                .context("read", &self.path)?;
            if n == 0 {
                break;
            }
            got += n;
        }
        Ok(got)
    }
}

fn know(block: &[u8]) -> Known {
    if block.iter().all(|&b| b == 0) {
        return Known::Zeros;
    }
    if block.len() < BLOCK {
        return Known::Tail;
    }
    let mut half = [0; 16];
    half.copy_from_slice(&blake3::hash(block).as_bytes()[..16]);
    Known::Hash(half)
}
