//! What a filler has done and has still to do, where its death does not touch it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use crate::error::{Context, Error, Result};
use crate::state::memory::Missing;
use crate::sys::shared::{self, Shared};
use crate::sys::uffd::{Message, MESSAGE};

/// Bytes of an entry: four numbers.
const ENTRY: usize = 32;

/// What happened to the missing pages of one address space. They are numbered: the
/// program's is 0, those of its children follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Was left behind at the source.
    Missing(Range<u64>),
    /// Was filled, discarded or unmapped.
    Gone(Range<u64>),
    Moved {
        from: u64,
        to: u64,
        len: u64,
    },
    /// A child has all of it too, under the next number.
    Forked,
    /// Events of this space are read from here on.
    Reading,
    /// All events that were read before count.
    Acted,
}

/// All changes, in order, behind a page for events that were read and perhaps not
/// acted on.
#[derive(Debug)]
pub struct Log {
    shared: Shared,
    end: u64,
    reading: usize,
    /// Of the events that were read, the places of those before this count already.
    counted: usize,
    missing: Vec<Missing>,
}

impl Log {
    /// A new one, of a program that misses nothing yet.
    pub fn new() -> Result<Log> {
        Ok(Log {
            shared: Shared::new("pmig-fill").context("make", "a log of missing memory")?,
            end: shared::PAGE as u64,
            reading: 0,
            counted: 0,
            missing: vec![Missing::default()],
        })
    }

    /// Goes on with what another process began.
    pub fn open(fd: OwnedFd) -> Result<Log> {
        let shared = Shared::open(fd).context("open", "the log of missing memory")?;
        let mut log = Log {
            shared,
            ..Log::new()?
        };
        let mut entries = vec![0; 1024 * ENTRY];
        loop {
            let got = read(log.shared.file(), &mut entries, log.end)
                .context("read", "the log of missing memory")?;
            // An entry is written at once, or not at all.
            for entry in entries[..got].chunks_exact(ENTRY) {
                let (space, event, change) = decode(entry)?;
                log.apply(space, event, &change)?;
                log.end += ENTRY as u64;
            }
            if got < ENTRY {
                return Ok(log);
            }
        }
    }

    pub fn file(&self) -> &File {
        self.shared.file()
    }

    /// What each address space misses.
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }

    /// Writes a change down; from then on it counts.
    pub fn note(&mut self, space: usize, change: &Change) -> Result<()> {
        self.write(space, None, change)
    }

    /// The same for what an event brought that was read at this place: no successor
    /// acts on it again.
    pub fn note_event(&mut self, space: usize, event: usize, change: &Change) -> Result<()> {
        self.write(space, Some(event), change)
    }

    fn write(&mut self, space: usize, event: Option<usize>, change: &Change) -> Result<()> {
        self.shared
            .file()
            .write_all_at(&encode(space, event, change), self.end)
            .context("write", "the log of missing memory")?;
        self.end += ENTRY as u64;
        self.apply(space, event, change)
    }

    fn apply(&mut self, space: usize, event: Option<usize>, change: &Change) -> Result<()> {
        self.counted = event.map_or(self.counted, |event| event + 1);
        let bad = || Error::bad("log of missing memory", "makes no sense");
        let missing = self.missing.get_mut(space).ok_or_else(bad)?;
        match change {
            Change::Missing(r) => missing.insert(r.clone()),
            Change::Gone(r) => missing.remove(r.clone()),
            Change::Moved { from, to, len } => missing.moved(*from, *to, *len),
            Change::Forked => {
                let child = missing.clone();
                self.missing.push(child);
            }
            Change::Reading => self.reading = space,
            Change::Acted => self.counted = 0,
        }
        Ok(())
    }

    /// Reads events of a space. They are to be acted on, and then
    /// [`Log::acted`] is to be called.
    ///
    /// # Errors
    /// EAGAIN: there are none.
    pub fn read(&mut self, space: usize, uffd: &OwnedFd) -> Result<Vec<(usize, Message)>> {
        if self.reading != space {
            self.note(space, &Change::Reading)?;
        }
        match self.shared.read(uffd) {
            Ok(_) => Ok(self.unread().1),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Vec::new()),
            Err(e) => Err(e).context("read", "what happens to the program's memory"),
        }
    }

    /// Events that were read and do not count yet, at their places, with their space.
    pub fn unread(&self) -> (usize, Vec<(usize, Message)>) {
        let bytes = self.shared.bytes();
        let events = bytes.chunks_exact(MESSAGE).enumerate();
        let events = events.skip(self.counted).filter_map(|(n, raw)| {
            let raw: &[u8; MESSAGE] = raw.try_into().ok()?;
            Some((n, Message::parse(raw)?))
        });
        (self.reading, events.collect())
    }

    /// All events that were read count now.
    pub fn acted(&mut self) -> Result<()> {
        // First this: what is left of a page half cleared does not count.
        self.shared.clear();
        match self.counted {
            0 => Ok(()),
            _ => self.note(self.reading, &Change::Acted),
        }
    }
}

fn read(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < into.len() {
        match file.read_at(&mut into[got..], at + got as u64)? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

fn encode(space: usize, event: Option<usize>, change: &Change) -> [u8; ENTRY] {
    let (kind, a, b, c) = match change {
        Change::Missing(r) => (1, r.start, r.end, 0),
        Change::Gone(r) => (2, r.start, r.end, 0),
        Change::Moved { from, to, len } => (3, *from, *to, *len),
        Change::Forked => (4, 0, 0, 0),
        Change::Reading => (5, 0, 0, 0),
        Change::Acted => (6, 0, 0, 0),
    };
    let mut entry = [0; ENTRY];
    let event = event.map_or(0, |n| n as u64 + 1);
    let words = [kind | event << 8 | (space as u64) << 24, a, b, c];
    for (to, word) in entry.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    entry
}

fn decode(entry: &[u8]) -> Result<(usize, Option<usize>, Change)> {
    let word = |n: usize| {
        let bytes = entry.get(8 * n..8 * n + 8);
        bytes
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_le_bytes)
    };
    let (head, a, b, c) = (word(0), word(1), word(2), word(3));
    let change = match head & 0xff {
        1 => Change::Missing(a..b),
        2 => Change::Gone(a..b),
        3 => Change::Moved {
            from: a,
            to: b,
            len: c,
        },
        4 => Change::Forked,
        5 => Change::Reading,
        6 => Change::Acted,
        _ => return Err(Error::bad("log of missing memory", "makes no sense")),
    };
    let event = (head >> 8 & 0xffff).checked_sub(1);
    Ok(((head >> 24) as usize, event.map(|n| n as usize), change))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_successor_knows_what_its_predecessor_knew() {
        let mut log = Log::new().unwrap();
        for (space, change) in [
            (0, Change::Missing(0x1000..0x9000)),
            (0, Change::Gone(0x2000..0x3000)),
            (0, Change::Forked),
            (
                0,
                Change::Moved {
                    from: 0x4000,
                    to: 0x20000,
                    len: 0x2000,
                },
            ),
            (1, Change::Gone(0x5000..0x6000)),
            (1, Change::Reading),
        ] {
            log.note(space, &change).unwrap();
        }
        let fd = log.file().as_fd().try_clone_to_owned().unwrap();
        let next = Log::open(fd).unwrap();
        assert_eq!(next.missing(), log.missing());
        assert_eq!((next.end, next.reading), (log.end, 1));
        assert_eq!(next.missing()[0].len(), 0x7000);
        assert_eq!(next.missing()[1].len(), 0x6000);
        assert_eq!(next.missing()[0].source_of(0x21000), Some(0x5000));
    }

    #[test]
    fn no_successor_acts_again_on_an_event_that_counts() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let message = |kind: u8, words: [u64; 3]| {
            let mut raw = [0; MESSAGE];
            raw[0] = kind;
            for (to, word) in raw[8..].chunks_exact_mut(8).zip(words) {
                to.copy_from_slice(&word.to_ne_bytes());
            }
            raw
        };
        let moved = message(0x14, [0x1000, 0x8000, 0x2000]);
        let gone = message(0x15, [0x8000, 0x9000, 0]);
        nix::unistd::write(&write, &[moved, gone].concat()).unwrap();
        let mut log = Log::new().unwrap();
        log.note(0, &Change::Missing(0x1000..0x3000)).unwrap();
        let events = log.read(0, &read).unwrap();
        assert_eq!(events.len(), 2);
        let change = Change::Moved {
            from: 0x1000,
            to: 0x8000,
            len: 0x2000,
        };
        log.note_event(0, events[0].0, &change).unwrap();
        let open = |log: &Log| Log::open(log.file().as_fd().try_clone_to_owned().unwrap()).unwrap();
        let next = open(&log);
        assert_eq!(next.missing()[0].len(), 0x2000);
        assert_eq!(next.unread().1, events[1..]);
        log.note_event(0, events[1].0, &Change::Gone(0x8000..0x9000))
            .unwrap();
        assert_eq!(open(&log).unread().1, []);
        log.acted().unwrap();
        nix::unistd::write(&write, &gone).unwrap();
        assert_eq!(log.read(0, &read).unwrap().len(), 1);
        assert_eq!(open(&log).unread().1.len(), 1);
    }

    #[test]
    fn a_log_of_nonsense_is_refused() {
        let log = Log::new().unwrap();
        for entry in [[0xff; ENTRY], encode(7, None, &Change::Forked)] {
            log.file().write_all_at(&entry, 4096).unwrap();
            let fd = log.file().as_fd().try_clone_to_owned().unwrap();
            assert!(Log::open(fd).is_err());
        }
    }
}
