//! Raw calls: the only place where `unsafe` is allowed.
#![allow(unsafe_code)]

pub mod fds;
pub mod inherit;
pub mod pagemap;
pub mod pidfd;
pub mod ptrace;
pub mod runner;
pub mod spawn;
pub mod timens;
pub mod uffd;
