//! A table of system calls to be made by another process.

use super::RemoteAddr;
use crate::error::{Error, Result};
use crate::sys::runner::{entry, header, ENTRY_WORDS, HEADER_WORDS};

/// One call of a [`Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call(usize);

/// A piece of scratch memory of a [`Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    at: usize,
    len: usize,
}

/// An argument of a call.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// A number, or an address in the process.
    Val(u64),
    /// What an earlier call of the same batch returned.
    Result(Call),
    /// The address of a piece of scratch memory.
    At(Slot),
}

macro_rules! arg_from {
    ($($t:ty => $e:expr),* $(,)?) => {
        $(impl From<$t> for Arg {
            fn from(v: $t) -> Arg {
                #[allow(clippy::redundant_closure_call)]
                ($e)(v)
            }
        })*
    };
}

arg_from! {
    u64 => Arg::Val,
    i64 => |v| Arg::Val(v as u64),
    u32 => |v| Arg::Val(v as u64),
    i32 => |v| Arg::Val(v as i64 as u64),
    usize => |v| Arg::Val(v as u64),
    RemoteAddr => |v: RemoteAddr| Arg::Val(v.0),
    Call => Arg::Result,
    Slot => Arg::At,
}

#[derive(Clone)]
struct Entry {
    what: &'static str,
    number: i64,
    args: [Arg; 6],
    may_fail: bool,
}

/// System calls to be made inside a stopped process, in order, in one round
/// trip. The first call that fails ends the batch, unless it may fail.
#[derive(Clone, Default)]
pub struct Batch {
    entries: Vec<Entry>,
    data: Vec<u8>,
    pointers: Vec<(usize, Slot)>,
}

impl Batch {
    pub fn new() -> Batch {
        Batch::default()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds a call whose error ends the batch; `what` names it in the error.
    pub fn call(&mut self, what: &'static str, number: i64, args: &[Arg]) -> Call {
        self.push(what, number, args, false)
    }

    /// Adds a call whose error is a result like any other.
    pub fn may_fail(&mut self, what: &'static str, number: i64, args: &[Arg]) -> Call {
        self.push(what, number, args, true)
    }

    fn push(&mut self, what: &'static str, number: i64, args: &[Arg], may_fail: bool) -> Call {
        assert!(args.len() <= 6, "a system call has six arguments");
        self.entries.push(Entry {
            what,
            number,
            args: std::array::from_fn(|i| args.get(i).copied().unwrap_or(Arg::Val(0))),
            may_fail,
        });
        Call(self.entries.len() - 1)
    }

    /// Bytes for calls to read (and write), aligned to 16.
    pub fn data(&mut self, bytes: &[u8]) -> Slot {
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        let at = self.data.len();
        self.data.extend_from_slice(bytes);
        Slot {
            at,
            len: bytes.len(),
        }
    }

    /// Bytes in which the addresses of other pieces stand at the given
    /// offsets.
    pub fn data_with_pointers(&mut self, bytes: &[u8], pointers: &[(usize, Slot)]) -> Slot {
        let slot = self.data(bytes);
        for &(offset, to) in pointers {
            assert!(offset + 8 <= bytes.len(), "a pointer lies within its bytes");
            self.pointers.push((slot.at + offset, to));
        }
        slot
    }

    /// Zeroed room for calls to write to, aligned to 16.
    pub fn space(&mut self, len: usize) -> Slot {
        let at = self.data.len().next_multiple_of(16);
        self.data.resize(at + len, 0);
        Slot { at, len }
    }

    fn data_at(&self) -> usize {
        ((HEADER_WORDS + ENTRY_WORDS * self.entries.len()) * 8).next_multiple_of(16)
    }

    /// Bytes of scratch memory the table takes.
    pub(super) fn len(&self) -> usize {
        self.data_at() + self.data.len()
    }

    /// The table as the runner wants it at `base`.
    pub(super) fn table(&self, base: u64, head: &Head) -> Vec<u8> {
        let mut words = [0u64; HEADER_WORDS];
        words[header::COUNT] = self.entries.len() as u64;
        words[header::TGID] = head.pid as u64;
        words[header::TID] = head.pid as u64;
        words[header::SIGNAL] = head.signal as u64;
        words[header::SCRATCH] = head.scratch;
        words[header::SCRATCH_LEN] = head.scratch_len;
        words[header::HOME_SP] = head.home_sp;
        words[header::HOME_BP] = head.home_bp;
        words[header::HOME_IP] = head.home_ip;
        let mut bytes = Vec::with_capacity(self.len());
        let add = |bytes: &mut Vec<u8>, words: &[u64]| {
            for word in words {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
        };
        add(&mut bytes, &words);
        for e in &self.entries {
            let mut w = [0u64; ENTRY_WORDS];
            w[entry::NUMBER] = e.number as u64;
            for (i, arg) in e.args.iter().enumerate() {
                w[entry::ARGS + i] = match *arg {
                    Arg::Val(v) => v,
                    Arg::Result(Call(n)) => {
                        w[entry::FLAGS] |= 1 << i;
                        base + ((HEADER_WORDS + n * ENTRY_WORDS + entry::RESULT) * 8) as u64
                    }
                    Arg::At(slot) => base + (self.data_at() + slot.at) as u64,
                };
            }
            if e.may_fail {
                w[entry::FLAGS] |= entry::MAY_FAIL;
            }
            add(&mut bytes, &w);
        }
        bytes.resize(self.data_at(), 0);
        bytes.extend_from_slice(&self.data);
        for &(at, slot) in &self.pointers {
            let at = self.data_at() + at;
            let to = base + (self.data_at() + slot.at) as u64;
            bytes[at..at + 8].copy_from_slice(&to.to_le_bytes());
        }
        bytes
    }

    /// Reads what became of a table; the process may have scribbled on it.
    pub(super) fn done(self, pid: i32, table: Vec<u8>) -> Result<Done> {
        let word = |i: usize| {
            table
                .get(i * 8..i * 8 + 8)
                .and_then(|b| b.try_into().ok())
                .map_or(0, u64::from_le_bytes)
        };
        let made = word(header::MADE) as usize;
        if made > self.entries.len() {
            return Err(Error::bad(
                format!("batch in process {pid}"),
                "the count of calls made is impossible",
            ));
        }
        let results: Vec<i64> = (0..made)
            .map(|n| word(HEADER_WORDS + n * ENTRY_WORDS + entry::RESULT) as i64)
            .collect();
        for (e, &r) in self.entries.iter().zip(&results) {
            if !e.may_fail && (-4095..0).contains(&r) {
                return Err(Error::Os {
                    op: e.what,
                    object: format!("in process {pid}"),
                    cause: std::io::Error::from_raw_os_error(-r as i32),
                });
            }
        }
        if made < self.entries.len() {
            return Err(Error::bad(
                format!("batch in process {pid}"),
                format!("ended after {made} of {} calls", self.entries.len()),
            ));
        }
        Ok(Done {
            results,
            data: table[self.data_at()..].to_vec(),
        })
    }
}

/// What the end of a table tells the runner.
pub(super) struct Head {
    pub pid: i32,
    pub signal: i32,
    pub scratch: u64,
    pub scratch_len: u64,
    pub home_sp: u64,
    pub home_bp: u64,
    pub home_ip: u64,
}

/// What a batch returned.
#[derive(Debug, Clone)]
pub struct Done {
    results: Vec<i64>,
    data: Vec<u8>,
}

impl Done {
    /// Of a batch without calls.
    pub(super) fn of_nothing(batch: Batch) -> Done {
        Done {
            results: Vec::new(),
            data: batch.data,
        }
    }

    /// The kernel's answer: a value, or `-errno`.
    pub fn result(&self, call: Call) -> i64 {
        self.results[call.0]
    }

    /// Whether the same batch had the same answers before, but for these calls'.
    pub fn is_like(&self, before: &Done, but_for: &[Call]) -> bool {
        let results = |done: &Done| {
            let all = done.results.iter().enumerate();
            all.filter(|(n, _)| !but_for.contains(&Call(*n)))
                .map(|(_, r)| *r)
                .collect::<Vec<_>>()
        };
        self.data == before.data && results(self) == results(before)
    }

    /// The bytes of a piece of scratch memory after the last call.
    pub fn bytes(&self, slot: Slot) -> &[u8] {
        &self.data[slot.at..slot.at + slot.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scribbled_table_is_refused() {
        let mut b = Batch::new();
        b.call("getpid", 39, &[]);
        let head = Head {
            pid: 1,
            signal: 0,
            scratch: 0,
            scratch_len: 0,
            home_sp: 0,
            home_bp: 0,
            home_ip: 0,
        };
        let mut table = b.table(0x1000, &head);
        table[8] = 200;
        assert!(b.done(1, table).is_err());
    }
}
