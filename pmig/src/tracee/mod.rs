//! Hands inside another process.
//!
//! Everything that must happen inside a stopped process goes through one door:
//! [`Stopped::run`] executes a [`Batch`] of system calls there. Remote
//! addresses are a type of their own, and a process can only be handled by who
//! holds its [`Stopped`].

mod batch;
mod excursion;
mod ground;
mod home;
mod outside;
mod rseq;
mod scratch;
mod stopped;

pub use batch::{Arg, Batch, Call, Done, Slot};
pub use excursion::{Primed, DATA};
pub use ground::Ground;
pub use outside::open_mem;
pub use stopped::Stopped;

#[cfg(test)]
mod tests;

use std::fmt;

/// An address in another process; never a local pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RemoteAddr(pub u64);

impl fmt::Display for RemoteAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
