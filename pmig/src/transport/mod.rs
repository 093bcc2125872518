//! How two pmigs reach each other. Everything above sees a [`Link`].

mod addr;
mod stream;

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::time::Duration;

pub use addr::{Addr, DEFAULT_PORT};
pub use stream::{adopt, connect, pair, Listener};

/// A reliable byte stream in both directions. ssh and TLS are further
/// implementations of this trait.
pub trait Link: Read + Write + Send {
    /// A second handle on the same connection, for a reader beside a writer.
    fn try_clone(&self) -> io::Result<Box<dyn Link>>;
    /// Reads and writes that wait longer fail with `WouldBlock` or `TimedOut`.
    fn set_deadline(&self, after: Option<Duration>) -> io::Result<()>;
    /// Tells the peer that nothing more will be written; it can still be heard.
    fn end(&self);
    /// Cuts the connection in both directions, for every handle on it.
    fn cut(&self);
    /// Whether somebody has.
    fn is_cut(&self) -> bool;
    /// The peer as a person would name it.
    fn peer(&self) -> String;
    /// For waiting on it beside other descriptors.
    fn fd(&self) -> BorrowedFd<'_>;
}
