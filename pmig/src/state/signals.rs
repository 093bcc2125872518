//! Signals: what the program does about them, and those on their way to it.

use serde::{Deserialize, Serialize};

use super::words::{bytes_of, u32_at, u64_at};
use crate::error::{Error, Obstacle, Result};
use crate::proc::status::Status;
use crate::tracee::{Batch, Done, Slot, Stopped};

/// Signals are numbered from 1 to 64.
const COUNT: usize = 64;
/// Bytes of the kernel's signal set.
const SET: u64 = 8;
/// No queue that a kernel allows is longer than this many bytes of ours.
const MAX_QUEUED: usize = 1 << 20;

/// What rt_sigaction(2) sets for one signal, as the kernel keeps it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// 0: default, 1: ignore, else an address in the program.
    pub handler: u64,
    pub flags: u64,
    /// The C library's return path from handlers.
    pub restorer: u64,
    /// Blocked while the handler runs.
    pub mask: u64,
}

/// The alternate signal stack (sigaltstack(2)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AltStack {
    pub base: u64,
    /// SS_DISABLE (2) and SS_AUTODISARM (1 << 31); SS_ONSTACK is not state,
    /// the kernel derives it from the stack pointer.
    pub flags: u32,
    pub size: u64,
}

const SS_DISABLE: u32 = 2;
const SS_ONSTACK: u32 = 1;

/// A queued signal: the kernel's `siginfo_t`, all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigInfo([u64; 16]);

impl SigInfo {
    pub fn from_bytes(bytes: &[u8; 128]) -> SigInfo {
        SigInfo(std::array::from_fn(|i| u64_at(bytes, i * 8)))
    }

    pub fn bytes(&self) -> Vec<u8> {
        bytes_of(&self.0)
    }

    pub fn signal(&self) -> i32 {
        self.0[0] as u32 as i32
    }

    pub fn code(&self) -> i32 {
        self.0[1] as u32 as i32
    }

    /// What the kernel tells of a signal for which it had no memory to keep
    /// the sender: SI_USER from nobody.
    pub(super) fn bare(signal: u32) -> SigInfo {
        let mut words = [0; 16];
        words[0] = signal as u64;
        SigInfo(words)
    }
}

/// Everything about signals.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signals {
    /// Signals 1 to 64, in order.
    pub actions: Vec<Action>,
    /// Blocked signals: bit 0 is signal 1.
    pub mask: u64,
    pub altstack: AltStack,
    /// Sent to the thread, oldest first.
    pub private: Vec<SigInfo>,
    /// Sent to the process, oldest first.
    pub shared: Vec<SigInfo>,
}

/// Signals on their way, read without taking any off.
pub struct Queues {
    pub private: Vec<SigInfo>,
    pub shared: Vec<SigInfo>,
}

/// What a process does about signals at present.
#[derive(Clone, Copy)]
pub enum Now<'a> {
    /// Nobody knows, but it has no signal stack.
    Unknown,
    /// As a new one does.
    Defaults,
    Known(&'a Signals),
}

/// Questions that only the process can answer.
pub struct Asked {
    actions: Vec<Slot>,
    altstack: Slot,
}

impl Signals {
    pub fn ask(batch: &mut Batch) -> Asked {
        let actions = (1..=COUNT)
            .map(|signal| {
                let out = batch.space(32);
                batch.call(
                    "read a signal action",
                    libc::SYS_rt_sigaction,
                    &[signal.into(), 0u64.into(), out.into(), SET.into()],
                );
                out
            })
            .collect();
        let altstack = batch.space(24);
        batch.call(
            "read the signal stack",
            libc::SYS_sigaltstack,
            &[0u64.into(), altstack.into()],
        );
        Asked { actions, altstack }
    }

    /// Both queues. `status` was read at the same stop: it knows signals that
    /// are pending without an entry in a queue.
    ///
    /// # Errors
    /// ptrace's own.
    pub fn queues(stopped: &Stopped, status: &Status) -> Result<Queues> {
        let queue = |shared, pending| -> Result<_> {
            Ok(match pending {
                0 => Vec::new(),
                _ => complete(&stopped.pending(shared)?, pending),
            })
        };
        let [private, shared] = status.pending;
        Ok(Queues {
            private: queue(false, private)?,
            shared: queue(true, shared)?,
        })
    }

    pub fn capture(queues: Queues, mask: u64, asked: &Asked, done: &Done) -> Signals {
        let actions = asked
            .actions
            .iter()
            .map(|slot| {
                let b = done.bytes(*slot);
                Action {
                    handler: u64_at(b, 0),
                    flags: u64_at(b, 8),
                    restorer: u64_at(b, 16),
                    mask: u64_at(b, 24),
                }
            })
            .collect();
        let b = done.bytes(asked.altstack);
        Signals {
            actions,
            mask,
            altstack: AltStack {
                base: u64_at(b, 0),
                flags: u32_at(b, 8) & !SS_ONSTACK,
                size: u64_at(b, 16),
            },
            private: queues.private,
            shared: queues.shared,
        }
    }

    /// # Errors
    /// [`Error::Bad`] for what no kernel would have told.
    pub fn check(&self) -> Result<()> {
        if self.actions.len() != COUNT {
            return Err(Error::bad("signal actions", "not 64 of them"));
        }
        if (self.private.len() + self.shared.len()) * 128 > MAX_QUEUED {
            return Err(Error::bad("queued signals", "too many to be true"));
        }
        Ok(())
    }

    /// Without what comes at the end only.
    pub fn ahead(&self) -> Signals {
        Signals {
            private: Vec::new(),
            shared: Vec::new(),
            ..self.clone()
        }
    }

    /// Actions and signal stack, where they differ from `now`, what the process has
    /// at present, and queues, which it has none of; the mask goes last, with the
    /// registers. Handlers come before queues: a signal that is set to be ignored is
    /// thrown out of them.
    ///
    /// # Errors
    /// [`Error::Bad`] for what no kernel would have told, [`Error::Refused`]
    /// for a queued signal that cannot be sent from inside.
    pub fn restore(&self, batch: &mut Batch, pid: i32, now: Now<'_>) -> Result<()> {
        self.check()?;
        let stands = |i: usize, a: &Action| match now {
            Now::Unknown => false,
            Now::Defaults => *a == Action::default(),
            Now::Known(now) => now.actions.get(i) == Some(a),
        };
        for (i, a) in self.actions.iter().enumerate() {
            let signal = i as i32 + 1;
            let fixed = signal == libc::SIGKILL || signal == libc::SIGSTOP;
            if fixed || stands(i, a) {
                continue;
            }
            let words = batch.data(&bytes_of(&[a.handler, a.flags, a.restorer, a.mask]));
            batch.call(
                "set a signal action",
                libc::SYS_rt_sigaction,
                &[signal.into(), words.into(), 0u64.into(), SET.into()],
            );
        }
        let before = match now {
            Now::Known(now) => now.altstack,
            Now::Unknown | Now::Defaults => AltStack {
                flags: SS_DISABLE,
                ..AltStack::default()
            },
        };
        self.restore_altstack(batch, &before);
        for (queue, private) in [(&self.private, true), (&self.shared, false)] {
            for info in queue {
                send(batch, pid, info, private)?;
            }
        }
        Ok(())
    }

    fn restore_altstack(&self, batch: &mut Batch, now: &AltStack) {
        let s = &self.altstack;
        // The kernel takes no address with that.
        let disabled = |s: &AltStack| s.flags & SS_DISABLE != 0;
        if s == now || disabled(s) && disabled(now) {
            return;
        }
        let stack = batch.data(&bytes_of(&[s.base, s.flags as u64, s.size]));
        batch.call(
            "set the signal stack",
            libc::SYS_sigaltstack,
            &[stack.into(), 0u64.into()],
        );
    }

    /// Signals that are pending, for the thread or the process, and not among
    /// those captured: sent since. (A queued real-time signal that only lengthens its own queue is
    /// not seen by this.)
    pub fn arrived_since(&self, pending: [u64; 2]) -> u64 {
        let marks = |queue: &[SigInfo]| {
            queue
                .iter()
                .filter(|i| (1..=64).contains(&i.signal()))
                .fold(0u64, |m, i| m | 1 << (i.signal() - 1))
        };
        (pending[0] & !marks(&self.private)) | (pending[1] & !marks(&self.shared))
    }
}

/// Adds those that are marked pending and stand in no queue. They are few and
/// their order is lost in the kernel already.
fn complete(queued: &[[u8; 128]], marks: u64) -> Vec<SigInfo> {
    let mut all: Vec<SigInfo> = queued.iter().map(SigInfo::from_bytes).collect();
    for signal in (1..=COUNT as u32).filter(|s| marks >> (s - 1) & 1 == 1) {
        // SIGKILL ends the process whatever we do; it is nobody's to carry.
        if signal != libc::SIGKILL as u32 && !all.iter().any(|i| i.signal() == signal as i32) {
            all.push(SigInfo::bare(signal));
        }
    }
    all
}

/// A process may send itself a signal in anybody's name
/// (rt_sigqueueinfo(2): "if the signal is sent to oneself").
fn send(batch: &mut Batch, pid: i32, info: &SigInfo, private: bool) -> Result<()> {
    let signal = info.signal();
    if !(1..=64).contains(&signal) {
        return Err(Error::bad(
            "queued signals",
            format!("signal {signal} does not exist"),
        ));
    }
    if batch_needs(signal) {
        return Err(Error::Refused(vec![Obstacle::new(
            format!("pending {}", name(signal)),
            "it cannot be handed on without the kernel module",
            "wait until the program has taken it, or load pmig.ko on the target",
        )]));
    }
    let bytes = batch.data(&info.bytes());
    if private {
        batch.call(
            "queue a signal",
            libc::SYS_rt_tgsigqueueinfo,
            &[pid.into(), pid.into(), signal.into(), bytes.into()],
        );
    } else {
        batch.call(
            "queue a signal",
            libc::SYS_rt_sigqueueinfo,
            &[pid.into(), signal.into(), bytes.into()],
        );
    }
    Ok(())
}

/// Signals that end a batch, or that no mask holds back.
fn batch_needs(signal: i32) -> bool {
    matches!(
        signal,
        libc::SIGURG | libc::SIGTRAP | libc::SIGKILL | libc::SIGSTOP
    )
}

/// A signal's name, for people.
pub fn name(signal: i32) -> String {
    nix::sys::signal::Signal::try_from(signal)
        .map_or_else(|_| format!("signal {signal}"), |s| s.as_str().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(signal: i32, code: i32) -> SigInfo {
        let mut b = [0u8; 128];
        b[..4].copy_from_slice(&signal.to_le_bytes());
        b[8..12].copy_from_slice(&code.to_le_bytes());
        b[127] = 7;
        SigInfo::from_bytes(&b)
    }

    #[test]
    fn siginfo_keeps_all_bytes() {
        let i = info(34, -1);
        assert_eq!((i.signal(), i.code()), (34, -1));
        assert_eq!(i.bytes()[127], 7);
        assert_eq!(i.bytes().len(), 128);
    }

    #[test]
    fn marked_signals_without_an_entry_are_added() {
        let queued: [u8; 128] = info(10, 0).bytes().try_into().unwrap();
        let all = complete(&[queued], 1 << 9 | 1 << 11 | 1 << 8);
        assert_eq!(
            all.iter().map(SigInfo::signal).collect::<Vec<_>>(),
            vec![10, 12]
        );
        assert_eq!(all[1].code(), 0);
    }

    #[test]
    fn impossible_signals_are_refused() {
        let mut b = Batch::new();
        for signal in [0, -1, 65, i32::MAX] {
            assert!(send(&mut b, 1, &info(signal, 0), true).is_err(), "{signal}");
        }
        assert!(send(&mut b, 1, &info(libc::SIGSTOP, 0), false).is_err());
        assert!(Signals::default().restore(&mut b, 1, Now::Unknown).is_err());
    }
}
