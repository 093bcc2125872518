//! Raw calls: the only place where `unsafe` is allowed.
#![allow(unsafe_code)]

pub mod across;
pub mod cpu;
pub mod fds;
pub mod inherit;
pub mod kmod;
pub mod limits;
pub mod memory;
pub mod pagemap;
pub mod pages;
pub mod pidfd;
pub mod ptrace;
pub mod runner;
pub mod sched;
pub mod shared;
pub mod spawn;
pub mod timens;
pub mod tty;
pub mod uffd;
