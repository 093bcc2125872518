//! Memory that is written to, discarded, mapped anew, moved and protected all
//! the time.
#![allow(unsafe_code)]

use super::Mix;
use std::io;

const PAGE: usize = 4096;
/// A page table's worth: so much is moved as a whole.
const BLOCK: usize = 2 << 20;
const BLOCKS: usize = 12;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// An arena at a place of its own, in blocks.
pub struct Arena {
    at: usize,
    mix: Mix,
    /// For direct I/O.
    file: Option<i32>,
}

fn done(what: &str, r: i32) -> Result<(), String> {
    match r {
        0 => Ok(()),
        _ => Err(format!("{what}: {}", io::Error::last_os_error())),
    }
}

/// Asks for huge pages, or for none.
///
/// # Errors
/// Those of madvise(2).
pub fn advise_huge(memory: &mut [u8], huge: bool) -> Result<(), String> {
    let advice = if huge {
        libc::MADV_HUGEPAGE
    } else {
        libc::MADV_NOHUGEPAGE
    };
    // SAFETY: the memory is ours, and this advice changes nothing in it.
    let r = unsafe { libc::madvise(memory.as_mut_ptr().cast(), memory.len(), advice) };
    done("madvise", r)
}

/// Gives memory back: it is zeros from then on.
///
/// # Errors
/// Those of madvise(2).
pub fn discard(memory: &mut [u8]) -> Result<(), String> {
    // SAFETY: the memory is ours, and any byte may be zero.
    let r = unsafe {
        libc::madvise(
            memory.as_mut_ptr().cast(),
            memory.len(),
            libc::MADV_DONTNEED,
        )
    };
    done("madvise", r)
}

impl Arena {
    /// One whose fate is that of the seed; `file`: what is read past the page
    /// cache.
    ///
    /// # Errors
    /// Those of mmap(2) and open(2).
    pub fn new(seed: u64, file: Option<&str>) -> Result<Self, String> {
        let len = (BLOCKS + 2) * BLOCK;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the kernel chooses a free place.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(format!("mmap: {}", io::Error::last_os_error()));
        }
        let file = match file {
            Some(path) => {
                let path = std::ffi::CString::new(path).map_err(|e| e.to_string())?;
                // SAFETY: a string and a flag.
                match unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_DIRECT) } {
                    -1 => return Err(format!("open: {}", io::Error::last_os_error())),
                    fd => Some(fd),
                }
            }
            None => None,
        };
        let arena = Self {
            at: (at as usize + BLOCK) & !(BLOCK - 1),
            mix: Mix(seed),
            file,
        };
        for block in 0..BLOCKS {
            arena.fresh(block * BLOCK, BLOCK)?;
            // SAFETY: advice on memory of ours.
            unsafe {
                let at = arena.at + block * BLOCK;
                let advice = [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE][block % 2];
                libc::madvise(at as *mut _, BLOCK, advice);
            }
            arena.write(block * BLOCK, BLOCK, seed);
        }
        Ok(arena)
    }

    fn fresh(&self, offset: usize, len: usize) -> Result<(), String> {
        // SAFETY: within the arena, in which nothing is kept that is referred to.
        let at = unsafe {
            let at = (self.at + offset) as *mut libc::c_void;
            libc::mmap(at, len, READ_WRITE, PRIVATE, -1, 0)
        };
        match at == libc::MAP_FAILED {
            true => Err(format!("mmap: {}", io::Error::last_os_error())),
            false => Ok(()),
        }
    }

    /// Writes something into each page of a range, wherever it may be written.
    fn write(&self, offset: usize, len: usize, value: u64) {
        for page in (offset..offset + len).step_by(PAGE) {
            // SAFETY: within the arena, which is writable now.
            unsafe {
                let word = (self.at + page) as *mut u64;
                word.add(value as usize % 512).write_volatile(value);
            }
        }
    }

    fn protect(&self, offset: usize, len: usize, access: i32) -> Result<(), String> {
        let at = (self.at + offset) as *mut libc::c_void;
        // SAFETY: nobody else looks at the arena.
        done("mprotect", unsafe { libc::mprotect(at, len, access) })
    }

    /// Moves a range to another place in the arena, and leaves fresh memory where
    /// it was.
    fn carry(&self, from: usize, to: usize, len: usize) -> Result<(), String> {
        // A range of several mappings cannot be moved.
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both places are the arena's.
        let moved = unsafe {
            let from = (self.at + from) as *mut libc::c_void;
            libc::mremap(from, len, len, flags, (self.at + to) as *mut libc::c_void)
        };
        // Where it fails it may have been done in part, or the place be cleared.
        if moved == libc::MAP_FAILED {
            self.fresh(to, len)?;
        }
        self.fresh(from, len)
    }

    /// Does one thing.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn step(&mut self) -> Result<(), String> {
        let n = self.mix.add(1);
        let pages = BLOCKS * BLOCK / PAGE;
        let few = 1 + (n >> 8) as usize % 64;
        let page = (n >> 16) as usize % (pages - few);
        let (offset, len) = (page * PAGE, few * PAGE);
        let block = (n >> 40) as usize % BLOCKS;
        let other = (n >> 48) as usize % BLOCKS;
        // It may have been closed before.
        let open = || self.protect(offset, len, READ_WRITE);
        match n % 16 {
            0..=5 => {
                open()?;
                self.write(offset, PAGE, n);
            }
            6 | 7 => {
                open()?;
                self.write(offset, len, n);
            }
            8 => {
                let at = (self.at + offset) as *mut libc::c_void;
                // SAFETY: the arena's contents may go at any time.
                done("madvise", unsafe {
                    libc::madvise(at, len, libc::MADV_DONTNEED)
                })?;
            }
            9 => self.fresh(offset, len)?,
            10 => {
                open()?;
                // SAFETY: readable now.
                unsafe { ((self.at + offset) as *const u64).read_volatile() };
            }
            11 => {
                open()?;
                self.write(offset, len, n);
                self.protect(offset, len, [libc::PROT_NONE, libc::PROT_READ][few % 2])?;
            }
            12 if block != other => self.carry(block * BLOCK, other * BLOCK, BLOCK)?,
            13 => {
                let to = (n >> 24) as usize % (pages - few) * PAGE;
                if to.abs_diff(offset) >= len {
                    self.carry(offset, to, len)?;
                }
            }
            14 => {
                if let Some(file) = self.file {
                    let whole = block * BLOCK;
                    self.protect(whole, BLOCK, READ_WRITE)?;
                    let at = (self.at + whole) as *mut libc::c_void;
                    let from = (n >> 20) as i64 % 64 * BLOCK as i64;
                    // SAFETY: the block is writable, and as long.
                    unsafe { libc::pread(file, at, BLOCK, from) };
                }
            }
            _ => {
                // A few neighbours again and again.
                self.protect(0, 8 * PAGE, READ_WRITE)?;
                self.write(0, 8 * PAGE, n);
            }
        }
        Ok(())
    }
}
