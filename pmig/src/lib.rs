//! Live migration of running Linux processes.
//!
//! Imports go one way: `sys, proc <- tracee <- state <- image <- protocol <-
//! source, target <- cli`. `ARCHITECTURE.md` at the top of the repository
//! explains the road a migration takes and the invariants each module keeps.

pub mod checkpoint;
pub mod claim;
pub mod error;
pub mod fault;
pub mod fill;
pub mod hold;
pub mod holder;
pub mod husk;
pub mod id;
pub mod image;
pub mod interrupt;
pub mod journal;
pub mod keeper;
pub mod laps;
pub mod lineage;
pub mod patience;
pub mod phase;
pub mod policy;
pub mod proc;
pub mod protocol;
pub mod report;
pub mod resolve;
pub mod source;
pub mod state;
pub mod sys;
pub mod target;
pub mod tracee;
pub mod transport;

pub use error::{Error, Obstacle, Result};
