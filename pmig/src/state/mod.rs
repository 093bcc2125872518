//! One room for each kind of state a process is made of.
pub mod memory;
