//! The lab: hosts to move programs between, and programs to move.
//!
//! A [`Lab`] is two hosts, a and b, which know each other by these names. What
//! they are made of ([`Make`]) is hidden behind [`Host`], so that a scenario is
//! written once. A host's agent carries out what is asked of it; the lab only
//! drives the built `pmig` binary, as a user does.

pub mod agent;
pub mod bench;
pub mod browser;
pub mod build;
pub mod console;
pub mod demo;
pub mod harness;
pub mod host;
pub mod image;
pub mod inside;
pub mod netns;
pub mod owner;
pub mod pair;
pub mod recording;
pub mod samples;
pub mod scenario;
pub mod session;
pub mod state;
pub mod steps;
pub mod sys;
pub mod terminal;
pub mod tools;
pub mod victim;
pub mod vm;
pub mod wire;

pub use host::{Host, Make, Output};
pub use pair::{serve, Lab};
pub use wire::{Cmd, Status};
