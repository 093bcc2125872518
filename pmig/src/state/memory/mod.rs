//! Memory: the address space, which pages must travel, and how they get there.

mod counts;
mod delta;
mod kernel;
mod layout;
mod missing;
mod ranges;
#[cfg(test)]
mod tests;
mod track;
mod writes;

pub use delta::Delta;
pub use kernel::Kernel;
pub use layout::{
    apply, file_of, first_look, resident, steps, Backing, Layout, MappedFile, Step, Vma, BOTTOM,
    PAGE, TOP,
};
pub use missing::{page_of, Missing};
pub use ranges::Ranges;
pub use track::{Found, Tracker};
pub use writes::{Tracking, TrackingChoice};
