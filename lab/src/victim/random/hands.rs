//! What is done to memory, by this program and by the kernel for it.
#![allow(unsafe_code)]

use super::content::What;
use super::world::Access;
use crate::victim::area::PAGE;
use nix::errno::Errno;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;

/// How bytes come to be in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// The program writes them.
    Program,
    /// read(2) of a pipe.
    Pipe,
    /// pread(2) of the file.
    File,
    /// read(2) of `/dev/zero`.
    Zero,
    /// process_vm_writev(2) of this process.
    Process,
}

/// How bytes are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// The program reads them.
    Program,
    /// write(2) to a pipe.
    Pipe,
    /// process_vm_readv(2) of this process.
    Process,
}

/// So much fits into a pipe, however it is written.
pub const PIPE: usize = 15 * PAGE;

/// The descriptors by which the kernel is made to touch memory.
#[derive(Debug)]
pub struct Hands {
    reader: File,
    writer: File,
    zero: File,
    file: File,
}

fn named<T>(what: &str, result: nix::Result<T>) -> Result<T, String> {
    result.map_err(|e| format!("{what}: {e}"))
}

fn number(result: isize) -> nix::Result<usize> {
    Errno::result(result).map(|n| n as usize)
}

/// Does again what moves only some of the bytes at a time.
fn all(len: usize, mut some: impl FnMut(usize, usize) -> nix::Result<usize>) -> Result<(), String> {
    let mut done = 0;
    while done < len {
        match some(done, len - done) {
            Ok(0) => return Err(format!("only {done} bytes of {len}")),
            Ok(n) => done += n,
            Err(e) => return Err(format!("{e} after {done} bytes of {len}")),
        }
    }
    Ok(())
}

impl Hands {
    /// With that file for [`Writer::File`] and mappings.
    ///
    /// # Errors
    /// Those of pipe(2) and open(2).
    pub fn new(file: File) -> Result<Self, String> {
        let pipe = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC);
        let (reader, writer) = pipe.map_err(|e| format!("pipe: {e}"))?;
        Ok(Self {
            reader: reader.into(),
            writer: writer.into(),
            zero: File::open("/dev/zero").map_err(|e| format!("open /dev/zero: {e}"))?,
            file,
        })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes bytes, which are what `what` says, to memory of this program's own.
    ///
    /// # Errors
    /// What the kernel says, or it wrote too few.
    pub fn put(&mut self, by: Writer, at: usize, bytes: &[u8], what: What) -> Result<(), String> {
        let to = at as *mut u8;
        match (by, what) {
            (Writer::Program, _) => {
                // SAFETY: the model has these bytes as mapped and writable, and
                // no reference to them lives.
                unsafe { std::ptr::copy(bytes.as_ptr(), to, bytes.len()) };
                Ok(())
            }
            (Writer::File, What::File(page)) => {
                let from = page as usize * PAGE + at % PAGE;
                all(bytes.len(), |done, left| {
                    let from = (from + done) as i64;
                    // SAFETY: as above; the kernel writes them.
                    number(unsafe {
                        libc::pread(self.file.as_raw_fd(), to.add(done).cast(), left, from)
                    })
                })
            }
            (Writer::Zero, What::Zero) => all(bytes.len(), |done, left| {
                // SAFETY: as above.
                number(unsafe { libc::read(self.zero.as_raw_fd(), to.add(done).cast(), left) })
            }),
            (Writer::Process, _) => {
                all(bytes.len(), |done, left| {
                    let local = slice(bytes[done..].as_ptr() as usize, left);
                    let remote = slice(at + done, left);
                    // SAFETY: as above; the process is this one.
                    number(unsafe {
                        libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0)
                    })
                })
            }
            // A pipe carries anything.
            _ => {
                let sent = self.writer.write_all(bytes);
                sent.map_err(|e| format!("write the pipe: {e}"))?;
                all(bytes.len(), |done, left| {
                    // SAFETY: as above.
                    number(unsafe {
                        libc::read(self.reader.as_raw_fd(), to.add(done).cast(), left)
                    })
                })
            }
        }
        .map_err(|e| format!("{by:?} {} bytes to {at:#x}: {e}", bytes.len()))
    }

    /// Has the kernel fill up to sixteen bytes with anything, and gives them.
    ///
    /// # Errors
    /// Those of getrandom(2).
    pub fn put_any(&mut self, at: usize, len: usize) -> Result<[u8; 16], String> {
        let mut bytes = [0; 16];
        // SAFETY: the model has these bytes as mapped and writable.
        let got = number(unsafe { libc::getrandom(at as *mut libc::c_void, len, 0) });
        if named("getrandom", got)? != len {
            return Err(format!("getrandom gave too little at {at:#x}"));
        }
        self.get(Reader::Program, at, &mut bytes[..len])?;
        Ok(bytes)
    }

    /// Reads memory of this program's own.
    ///
    /// # Errors
    /// What the kernel says, or it read too little.
    pub fn get(&mut self, by: Reader, at: usize, bytes: &mut [u8]) -> Result<(), String> {
        let from = at as *const u8;
        let len = bytes.len();
        match by {
            Reader::Program => {
                // SAFETY: the model has these bytes as mapped and readable, and
                // nobody writes meanwhile.
                unsafe { std::ptr::copy(from, bytes.as_mut_ptr(), len) };
                Ok(())
            }
            Reader::Pipe => {
                let sent = all(len, |done, left| {
                    // SAFETY: as above; the kernel reads them.
                    number(unsafe {
                        libc::write(self.writer.as_raw_fd(), from.add(done).cast(), left)
                    })
                });
                sent.and_then(|()| {
                    let got = self.reader.read_exact(bytes);
                    got.map_err(|e| format!("read the pipe: {e}"))
                })
            }
            Reader::Process => all(len, |done, left| {
                let local = slice(bytes[done..].as_mut_ptr() as usize, left);
                let remote = slice(at + done, left);
                // SAFETY: as above; the process is this one.
                number(unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) })
            }),
        }
        .map_err(|e| format!("{by:?} {len} bytes at {at:#x}: {e}"))
    }

    /// Checks that the kernel neither reads nor writes where it may not, for
    /// whoever may do only that much.
    ///
    /// # Errors
    /// It did.
    pub fn refused(&mut self, at: usize, access: Access) -> Result<(), String> {
        let at = at as *mut libc::c_void;
        if !access.reads() {
            // SAFETY: the kernel reads one byte, or refuses to.
            let read = number(unsafe { libc::write(self.writer.as_raw_fd(), at, 1) });
            if read != Err(Errno::EFAULT) {
                return Err(format!("{at:?} is {access}, but could be read: {read:?}"));
            }
        }
        if !access.writes() {
            // SAFETY: the kernel refuses to write, or this program has failed.
            let written = number(unsafe { libc::read(self.zero.as_raw_fd(), at, 1) });
            if written != Err(Errno::EFAULT) {
                let what = format!("{at:?} is {access}, but could be written: {written:?}");
                return Err(what);
            }
        }
        Ok(())
    }

    /// Maps pages: where the kernel likes, or over whatever is at `at`.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn map(
        &self,
        at: Option<usize>,
        len: usize,
        access: Access,
        from: Option<u32>,
        more: i32,
    ) -> nix::Result<usize> {
        let place = at.map_or(0, |_| libc::MAP_FIXED);
        let (flags, fd, offset) = match from {
            Some(page) => (0, self.file.as_raw_fd(), i64::from(page) * PAGE as i64),
            None => (libc::MAP_ANONYMOUS, -1, 0),
        };
        let flags = libc::MAP_PRIVATE | place | flags | more;
        let at = at.unwrap_or(0) as *mut libc::c_void;
        // SAFETY: the kernel chooses a free place, or the place is the program's
        // own by the model.
        let got = unsafe { libc::mmap(at, len, access.0, flags, fd, offset) };
        if got == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(got as usize)
    }
}

fn slice(at: usize, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: at as *mut libc::c_void,
        iov_len: len,
    }
}

/// Checks that nothing is mapped in a place.
///
/// # Errors
/// Something is.
pub fn is_free(at: usize, len: usize) -> Result<(), String> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: nothing that is mapped is replaced.
    let got = unsafe { libc::mmap(at as *mut _, len, libc::PROT_NONE, flags, -1, 0) };
    if got == libc::MAP_FAILED {
        return Err(format!("{at:#x} is not free: {}", Errno::last()));
    }
    unmap(at, len)
}

/// munmap(2) of pages that are the program's own by the model.
///
/// # Errors
/// Those of munmap(2).
pub fn unmap(at: usize, len: usize) -> Result<(), String> {
    // SAFETY: nobody but the program's model knows of them.
    let result = Errno::result(unsafe { libc::munmap(at as *mut libc::c_void, len) });
    named(&format!("munmap {at:#x}"), result.map(drop))
}

/// mprotect(2), likewise.
///
/// # Errors
/// Those of mprotect(2).
pub fn protect(at: usize, len: usize, access: Access) -> Result<(), String> {
    // SAFETY: as above.
    let result = Errno::result(unsafe { libc::mprotect(at as *mut _, len, access.0) });
    named(&format!("mprotect {at:#x} {access}"), result.map(drop))
}

/// madvise(2), likewise.
///
/// # Errors
/// Those of madvise(2).
pub fn advise(at: usize, len: usize, advice: i32) -> nix::Result<()> {
    // SAFETY: as above.
    Errno::result(unsafe { libc::madvise(at as *mut _, len, advice) }).map(drop)
}

/// mremap(2), likewise; gives where it lies now.
///
/// # Errors
/// Those of mremap(2).
pub fn remap(at: usize, old: usize, new: usize, flags: i32, to: usize) -> nix::Result<usize> {
    // SAFETY: as above; the new place too is the program's own or free.
    let got = unsafe { libc::mremap(at as *mut _, old, new, flags, to) };
    if got == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    Ok(got as usize)
}

/// Whether anything is mapped there; mincore(2).
pub fn is_mapped(at: usize) -> bool {
    let mut there = 0u8;
    // SAFETY: one page is asked for, and one byte answers.
    unsafe { libc::mincore(at as *mut _, PAGE, &mut there) == 0 }
}

/// Moves the program break by so many bytes; gives where it was.
///
/// # Errors
/// Those of brk(2).
pub fn move_break(by: isize) -> Result<usize, String> {
    // SAFETY: the C library's allocator allows for a break moved by others, and
    // only what was added here is taken away.
    let was = unsafe { libc::sbrk(by) } as usize;
    if was == usize::MAX {
        return Err(format!("sbrk {by}: {}", Errno::last()));
    }
    Ok(was)
}

/// Has the C library take so much memory from below the program break that it
/// comes back for no more: the break is the program's own from then on.
pub fn settle_heap(bytes: usize) {
    const USUAL: i32 = 128 << 10;
    // SAFETY: these options change only how memory is taken from the kernel.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
    }
    drop(std::hint::black_box(Vec::<u8>::with_capacity(bytes)));
    // SAFETY: as above.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, USUAL) };
}
