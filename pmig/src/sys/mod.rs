//! Raw calls: the only place where `unsafe` is allowed.
#![allow(unsafe_code)]

pub mod ptrace;
pub mod raw;
pub mod runner;
