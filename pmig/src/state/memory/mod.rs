//! Memory: the address space, which pages must travel, and how they get there.

mod layout;
mod ranges;
#[cfg(test)]
mod tests;
mod track;

pub use layout::{
    apply, file_of, preflight, resident, steps, Backing, Kernel, Layout, MappedFile, Step, Vma,
    BOTTOM, PAGE, TOP,
};
pub use ranges::Ranges;
pub use track::{Found, Tracker};
