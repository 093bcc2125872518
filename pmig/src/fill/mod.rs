//! Post-copy: memory that follows when the program runs at the target already.
//!
//! The source's copy stays frozen, and whoever serves it ([`serve_until_whole`]) only answers
//! what it is asked: a page is what it was when the program stopped. At the target
//! the *filler* ([`Filler`]) asks, for what the program touches first, and copies
//! what comes into place (userfaultfd(2)).
//!
//! When the last who holds a userfaultfd closes it, whoever waits for a page gets
//! zeros. So there are two who hold it: the filler, and the *guard*
//! ([`run_guard`]), which does nothing else. If the filler dies, or its connection
//! breaks, the guard freezes the program until another filler has taken over; if
//! the guard dies, the filler freezes it and starts another one. What the filler
//! knows is in a file that both share ([`Log`]), so that a successor knows the same.
//!
//! ```text
//!   source                         target
//!   program's copy, frozen         program, running
//!      ^                              ^ faults, discards, moves
//!   pmig, or its keeper  <-- Want --  filler --- holds --+
//!                        -- Piece ->                     userfaultfd, log
//!                                     guard  --- holds --+
//! ```

mod fetch;
mod guard;
mod log;
mod serve;

pub use fetch::{take_over, Filler};
pub use guard::{run as run_guard, Guard};
pub use log::Log;
pub use serve::{send_pieces, serve_in_background, serve_until_whole, Told};
