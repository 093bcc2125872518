use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::transport::Link;

/// The longest serialised message either side accepts, in bytes. Page and file
/// contents do not count: they follow their message raw.
pub const MAX_MESSAGE: usize = 16 << 20;
/// Most are shorter than this, in bytes, and read at once.
const USUAL_MESSAGE: usize = 64 << 10;

/// No more than this waits for what leaves with it, in bytes.
const MOST_QUEUED: usize = 64 << 10;

/// No more than this is read beyond what is asked for, in bytes: the last words of a
/// source and what little memory goes with them.
const MOST_EARLY: usize = 16 << 10;

/// How often somebody who only waits for an end looks at the clock.
const SILENT: Duration = Duration::from_millis(200);

const CONFIG: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<MAX_MESSAGE>,
> = bincode::config::standard().with_limit::<MAX_MESSAGE>();

/// Serialises a message; fails where it is larger than [`MAX_MESSAGE`].
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>> {
    let body = bincode::serde::encode_to_vec(message, CONFIG)
        .map_err(|e| Error::bad("message to send", e))?;
    if body.len() > MAX_MESSAGE {
        return Err(Error::bad(
            "message to send",
            format!("{} bytes are too many", body.len()),
        ));
    }
    Ok(body)
}

/// Reads a message back; every byte must be used.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    let (message, used) = bincode::serde::decode_from_slice(body, CONFIG)
        .map_err(|e| Error::bad("message from peer", e))?;
    if used != body.len() {
        return Err(Error::bad(
            "message from peer",
            format!("{} bytes too long", body.len() - used),
        ));
    }
    Ok(message)
}

/// What was read beyond what was asked for.
#[derive(Default)]
struct Early {
    room: Box<[u8]>,
    /// What of it was not asked for yet.
    left: Range<usize>,
}

impl Early {
    /// Moves what is there into `buf`; returns how many bytes that are.
    fn take(&mut self, buf: &mut [u8]) -> usize {
        let n = buf.len().min(self.left.len());
        let from = self.left.start;
        buf[..n].copy_from_slice(&self.room[from..from + n]);
        self.left.start += n;
        n
    }
}

/// A connection that carries messages (length, then bincode) and raw bytes.
pub struct Wire {
    link: Box<dyn Link>,
    /// Frames that leave with the next one.
    queued: Vec<u8>,
    early: Early,
    /// Bytes sent, frames included.
    pub sent: u64,
    /// Bytes received, frames included.
    pub received: u64,
}

impl Wire {
    pub fn new(link: Box<dyn Link>) -> Wire {
        Wire {
            link,
            queued: Vec::new(),
            early: Early::default(),
            sent: 0,
            received: 0,
        }
    }

    /// The other side, for people.
    pub fn peer(&self) -> String {
        self.link.peer()
    }

    pub fn link(&self) -> &dyn Link {
        &*self.link
    }

    /// Every later read or write that waits longer than this fails.
    pub fn set_deadline(&self, after: Duration) -> Result<()> {
        self.link
            .set_deadline(Some(after))
            .map_err(|e| self.broken(e))
    }

    /// Sends a message that nothing belongs to.
    pub fn send(&mut self, message: &impl Serialize) -> Result<()> {
        self.send_with(message, &[])
    }

    /// Sends a message and the raw bytes that belong to it.
    pub fn send_with(&mut self, message: &impl Serialize, raw: &[u8]) -> Result<()> {
        let mut head = std::mem::take(&mut self.queued);
        add_frame(&mut head, message)?;
        let all = (head.len() + raw.len()) as u64;
        write_all_pair(&mut *self.link, &head, raw).map_err(|e| self.broken(e))?;
        self.sent += all;
        Ok(())
    }

    /// The same of something small behind which more will be sent at once: it leaves
    /// with that.
    pub fn queue_with(&mut self, message: &impl Serialize, raw: &[u8]) -> Result<()> {
        if self.queued.len() + raw.len() > MOST_QUEUED {
            return self.send_with(message, raw);
        }
        add_frame(&mut self.queued, message)?;
        self.queued.extend_from_slice(raw);
        Ok(())
    }

    /// The next message; fails where it is too long or makes no sense.
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut len = [0; 4];
        self.recv_raw(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len > MAX_MESSAGE {
            return Err(Error::bad(
                format!("message from {}", self.peer()),
                format!("{len} bytes are announced, at most {MAX_MESSAGE} are taken"),
            ));
        }
        // Beyond that grown as bytes arrive: an announced length alone costs no
        // memory.
        let mut body = Vec::new();
        while body.len() < len {
            let have = body.len();
            body.resize(len.min(USUAL_MESSAGE.max(2 * have)), 0);
            self.recv_raw(&mut body[have..])?;
        }
        decode(&body)
    }

    /// Reads raw bytes that were announced by a message.
    pub fn recv_raw(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut have = 0;
        while have < buf.len() {
            have += match self.read_some(&mut buf[have..])? {
                0 => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                n => n,
            };
        }
        self.received += buf.len() as u64;
        Ok(())
    }

    fn read_some(&mut self, buf: &mut [u8]) -> Result<usize> {
        if self.is_ahead() {
            return Ok(self.early.take(buf));
        }
        let len = buf.len();
        let read = loop {
            let mut both = [
                io::IoSliceMut::new(buf),
                io::IoSliceMut::new(&mut self.early.room),
            ];
            match self.link.read_vectored(&mut both) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                read => break read.map_err(|e| self.broken(e))?,
            }
        };
        self.early.left = 0..read.saturating_sub(len);
        Ok(read.min(len))
    }

    /// From now on what has come already is read with what is waited for. Whoever waits
    /// for the connection has to ask [`Wire::is_ahead`] first, and descriptors
    /// (SCM_RIGHTS) must not come with it.
    pub fn read_ahead(&mut self) {
        if self.early.room.is_empty() {
            self.early.room = vec![0; MOST_EARLY].into();
        }
    }

    /// Whether something has been read already that nobody has asked for yet.
    pub fn is_ahead(&self) -> bool {
        !self.early.left.is_empty() && !self.link.is_cut()
    }

    /// Says that nothing more comes, and waits until the other side has cleared
    /// up and closed too, but no longer than `within`.
    pub fn part(&mut self, within: Duration) {
        self.link.end();
        self.drain(within);
    }

    /// Takes whatever comes until the other side closes, but no longer than
    /// `within`.
    pub fn drain(&mut self, within: Duration) {
        let until = Instant::now() + within;
        let _ = self.set_deadline(within.min(SILENT));
        let mut sink = [0; 16 << 10];
        while Instant::now() < until {
            match self.link.read(&mut sink) {
                Ok(0) => return,
                Err(e) if !is_timeout(&e) => return,
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn broken(&self, cause: io::Error) -> Error {
        let cause = match cause.kind() {
            _ if is_timeout(&cause) => {
                io::Error::new(io::ErrorKind::TimedOut, "no answer within the time allowed")
            }
            io::ErrorKind::UnexpectedEof => {
                io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the other side")
            }
            _ => cause,
        };
        Error::Link {
            peer: self.peer(),
            cause,
        }
    }
}

fn add_frame(to: &mut Vec<u8>, message: &impl Serialize) -> Result<()> {
    let body = encode(message)?;
    to.extend_from_slice(&(body.len() as u32).to_le_bytes());
    to.extend_from_slice(&body);
    Ok(())
}

fn is_timeout(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

fn write_all_pair(to: &mut dyn Link, mut a: &[u8], mut b: &[u8]) -> io::Result<()> {
    while !a.is_empty() || !b.is_empty() {
        let n = match to.write_vectored(&[io::IoSlice::new(a), io::IoSlice::new(b)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        let from_a = n.min(a.len());
        a = &a[from_a..];
        b = &b[n - from_a..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_with_bytes_left_over_is_refused() {
        let mut body = encode(&7u32).unwrap();
        assert_eq!(decode::<u32>(&body).unwrap(), 7);
        body.push(0);
        assert!(decode::<u32>(&body).is_err());
    }

    #[test]
    fn what_is_read_ahead_comes_in_order_and_goes_with_a_cut() {
        let (a, b) = crate::transport::pair("a", "b").unwrap();
        let (mut from, mut to) = (Wire::new(a), Wire::new(b));
        to.read_ahead();
        let raw: Vec<u8> = (0..3 * MOST_EARLY).map(|n| (n % 251) as u8).collect();
        for (n, len) in [(1u64, 0), (2, 10), (3, raw.len()), (4, MOST_EARLY + 1)] {
            from.queue_with(&n, &raw[..len]).unwrap();
        }
        from.send(&5u64).unwrap();
        for (n, len) in [(1u64, 0), (2, 10), (3, raw.len()), (4, MOST_EARLY + 1)] {
            assert_eq!(to.recv::<u64>().unwrap(), n);
            let mut got = vec![0; len];
            to.recv_raw(&mut got).unwrap();
            assert_eq!(got, raw[..len], "behind {n}");
        }
        assert!(to.is_ahead());
        assert_eq!(to.recv::<u64>().unwrap(), 5);
        assert!(!to.is_ahead());
        assert_eq!(to.received, from.sent);

        from.queue_with(&6u64, &[]).unwrap();
        from.send(&7u64).unwrap();
        assert_eq!(to.recv::<u64>().unwrap(), 6);
        to.link().cut();
        assert!(to.recv::<u64>().is_err());
    }

    #[test]
    fn a_hostile_length_inside_a_message_allocates_nothing() {
        // A vector that claims 2^60 elements.
        let body = [253, 0, 0, 0, 0, 0, 0, 0, 16];
        assert!(decode::<Vec<u64>>(&body).is_err());
    }
}
