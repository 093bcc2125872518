//! One room for each kind of state a process is made of.
pub mod clock;
pub mod memory;

pub mod fd;
pub mod objects;
pub mod paths;
