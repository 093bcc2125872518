//! One room for each kind of state a process is made of.

pub mod attributes;
pub mod bounds;
pub mod clock;
pub mod credentials;
pub mod fd;
pub mod files;
pub mod limits;
pub mod memory;
pub mod objects;
pub mod paths;
pub mod pcb;
pub mod registers;
pub mod restart;
pub mod scheduling;
pub mod signals;
mod words;
