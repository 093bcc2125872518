//! Mappings under a program's own control, with contents that can be checked.
#![allow(unsafe_code)]

use std::io;

/// Size of a page in bytes.
pub const PAGE: usize = 4096;

/// Pages mapped one after another.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    at: usize,
    pages: usize,
}

fn failed(what: &str) -> String {
    format!("{what}: {}", io::Error::last_os_error())
}

fn word(seed: u64, page: usize, index: usize) -> u64 {
    (seed ^ page as u64)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(index as u64)
        | 1
}

impl Area {
    /// Fresh private memory.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn new(pages: usize) -> Result<Self, String> {
        Self::map(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// A private mapping of a file's first pages.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn of_file(fd: i32, pages: usize) -> Result<Self, String> {
        Self::map(pages, libc::MAP_PRIVATE, fd)
    }

    fn map(pages: usize, flags: i32, fd: i32) -> Result<Self, String> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses a free place.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, access, flags, fd, 0) };
        if at == libc::MAP_FAILED {
            return Err(failed("mmap"));
        }
        Ok(Self {
            at: at as usize,
            pages,
        })
    }

    /// Maps pages anew where there is a hole; false if something else has come
    /// to lie there.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn renew(&self, first: usize, pages: usize) -> Result<bool, String> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: the place lies within this area.
        let at = unsafe { libc::mmap(self.page(first), pages * PAGE, access, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            if io::Error::last_os_error().raw_os_error() == Some(libc::EEXIST) {
                return Ok(false);
            }
            return Err(failed("mmap"));
        }
        Ok(true)
    }

    fn page(&self, page: usize) -> *mut libc::c_void {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        (self.at + page * PAGE) as *mut libc::c_void
    }

    /// The address of a page.
    pub fn address(&self, page: usize) -> usize {
        self.page(page) as usize
    }

    /// How many pages it has.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Fills a page with what the seed gives.
    pub fn fill(&self, page: usize, seed: u64) {
        let words = self.page(page).cast::<u64>();
        for index in 0..PAGE / 8 {
            // SAFETY: the word lies within the page, which is mapped writable.
            unsafe { words.add(index).write_volatile(word(seed, page, index)) };
        }
    }

    /// Checks a page: filled from the seed, or zero where there is none.
    ///
    /// # Errors
    /// The first word that is another.
    pub fn check(&self, page: usize, seed: Option<u64>) -> Result<(), String> {
        let words = self.page(page).cast::<u64>();
        for index in 0..PAGE / 8 {
            // SAFETY: the word lies within the page, which is mapped readable.
            let found = unsafe { words.add(index).read_volatile() };
            let expected = seed.map_or(0, |seed| word(seed, page, index));
            if found != expected {
                let at = self.address(page) + index * 8;
                return Err(format!("{at:x} holds {found:x} instead of {expected:x}"));
            }
        }
        Ok(())
    }

    /// Copies a page's bytes out.
    pub fn bytes(&self, page: usize) -> Vec<u8> {
        // SAFETY: the page is mapped readable and nobody writes meanwhile.
        unsafe { std::slice::from_raw_parts(self.page(page).cast::<u8>(), PAGE) }.to_vec()
    }

    /// Changes what may be done with pages.
    ///
    /// # Errors
    /// Those of mprotect(2).
    pub fn protect(&self, first: usize, pages: usize, access: i32) -> Result<(), String> {
        // SAFETY: nothing but this area's own users looks at these pages.
        match unsafe { libc::mprotect(self.page(first), pages * PAGE, access) } {
            0 => Ok(()),
            _ => Err(failed("mprotect")),
        }
    }

    /// Gives the kernel advice about pages.
    ///
    /// # Errors
    /// Those of madvise(2).
    pub fn advise(&self, first: usize, pages: usize, advice: i32) -> Result<(), String> {
        // SAFETY: as for protect.
        match unsafe { libc::madvise(self.page(first), pages * PAGE, advice) } {
            0 => Ok(()),
            _ => Err(failed(&format!("madvise {advice}"))),
        }
    }

    /// Leaves a hole in place of pages.
    ///
    /// # Errors
    /// Those of munmap(2).
    pub fn punch(&self, first: usize, pages: usize) -> Result<(), String> {
        // SAFETY: as for protect.
        match unsafe { libc::munmap(self.page(first), pages * PAGE) } {
            0 => Ok(()),
            _ => Err(failed("munmap")),
        }
    }

    /// Writes a function that returns a number, and makes it executable.
    ///
    /// # Errors
    /// Those of mprotect(2).
    pub fn generate(&self, page: usize, number: u32) -> Result<(), String> {
        self.protect(page, 1, libc::PROT_READ | libc::PROT_WRITE)?;
        // mov eax, number; ret
        let mut code = vec![0xb8];
        code.extend_from_slice(&number.to_le_bytes());
        code.push(0xc3);
        // SAFETY: the page is writable and longer than the code.
        unsafe { std::ptr::copy(code.as_ptr(), self.page(page).cast(), code.len()) };
        self.protect(page, 1, libc::PROT_READ | libc::PROT_EXEC)
    }

    /// Calls what [`Area::generate`] wrote.
    pub fn call(&self, page: usize) -> u32 {
        // SAFETY: the page holds a function without arguments.
        let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(self.page(page)) };
        function()
    }
}

/// Moves the program break up by whole pages, and gives those pages.
///
/// # Errors
/// Those of brk(2).
pub fn grow_break(pages: usize) -> Result<Area, String> {
    // SAFETY: the C library's allocator allows for a break moved by others.
    let at = unsafe { libc::sbrk(0) } as usize;
    let start = at.next_multiple_of(PAGE);
    let more = (start - at + pages * PAGE) as isize;
    // SAFETY: as above.
    if unsafe { libc::sbrk(more) } as isize == -1 {
        return Err(failed("sbrk"));
    }
    Ok(Area { at: start, pages })
}
