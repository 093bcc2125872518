//! What crosses the wire: one copy for both sides.

pub mod fate;
mod frame;
pub mod message;
pub mod preface;

pub use frame::{decode, encode, Wire, MAX_MESSAGE};
