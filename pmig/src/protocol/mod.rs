//! What crosses the wire: one copy for both sides.

mod frame;

pub use frame::{Wire, MAX_MESSAGE};
