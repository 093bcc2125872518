//! A file in memory whose first page is shared between processes: what is in it
//! outlives each of them.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};

/// Bytes of the shared page.
pub const PAGE: usize = 4096;

/// The file, with its first page mapped.
#[derive(Debug)]
pub struct Shared {
    file: File,
    page: NonNull<libc::c_void>,
}

impl Shared {
    /// Makes one, all zeros.
    pub fn new(name: &str) -> io::Result<Shared> {
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC)?;
        let file = File::from(fd);
        file.set_len(PAGE as u64)?;
        Shared::map(file)
    }

    /// Takes over what another process made.
    ///
    /// # Errors
    /// It is shorter than a page.
    pub fn open(fd: OwnedFd) -> io::Result<Shared> {
        let file = File::from(fd);
        if file.metadata()?.len() < PAGE as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Shared::map(file)
    }

    fn map(file: File) -> io::Result<Shared> {
        let len = NonZeroUsize::new(PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at a place of the kernel's choice; the file is at
        // least a page long and nobody makes it shorter.
        let page = unsafe {
            mmap(
                None,
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                file.as_fd(),
                0,
            )
        }?;
        Ok(Shared { file, page })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Reads once from `fd` into the page: what the kernel has handed over is there,
    /// whenever this process is killed.
    pub fn read(&mut self, fd: &OwnedFd) -> io::Result<usize> {
        // SAFETY: the page is mapped and writable for as long as `self` lives; no
        // reference to it exists.
        let n = unsafe { libc::read(fd.as_raw_fd(), self.page.as_ptr(), PAGE) };
        if n < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(n as usize)
    }

    /// What is in the page.
    pub fn bytes(&self) -> [u8; PAGE] {
        let mut copy = [0; PAGE];
        // SAFETY: both are a page long, and do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(self.page.as_ptr().cast(), copy.as_mut_ptr(), PAGE);
        }
        copy
    }

    /// Makes the page all zeros again.
    pub fn clear(&mut self) {
        // SAFETY: a page long and writable.
        unsafe { std::ptr::write_bytes(self.page.as_ptr().cast::<u8>(), 0, PAGE) };
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and used by nobody any more.
        let _ = unsafe { munmap(self.page, PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_process_reads_another_finds() {
        let mut one = Shared::new("test").unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&write, b"event").unwrap();
        assert_eq!(one.read(&read).unwrap(), 5);
        let mut other = Shared::open(one.file().as_fd().try_clone_to_owned().unwrap()).unwrap();
        drop(one);
        assert_eq!(&other.bytes()[..6], b"event\0");
        other.clear();
        assert_eq!(other.bytes(), [0; PAGE]);
    }
}
