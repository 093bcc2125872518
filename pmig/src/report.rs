//! What a migration tells the person who asked for it while it goes on, and
//! how it ends. Says nothing about how that is shown: terminal, plain lines
//! and JSON are the command line's.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Obstacle};
use crate::phase::Phase;

/// Hears of every step as it happens. Called from the migrating thread, during
/// the freeze too, so an implementation must not wait for anything: it may put
/// events aside until [`Event::Phase`] of [`Phase::Release`].
pub trait Progress {
    fn event(&mut self, event: &Event);
}

/// Shows nothing.
pub struct Silent;

impl Progress for Silent {
    fn event(&mut self, _: &Event) {}
}

/// One step. As JSON: one object a line, told apart by `event`; durations are
/// milliseconds in fields that end in `_ms`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Known once the target has accepted. Of a migration that begins again, which a
    /// note says, they come again, under another id, and all phases from
    /// [`Phase::Hello`] on.
    Facts(Facts),
    /// A phase begins.
    Phase { phase: Phase },
    /// A phase has ended. `what` is short: `41 mappings, 9 descriptors`.
    Ended {
        phase: Phase,
        what: String,
        #[serde(rename = "elapsed_ms", with = "millis")]
        elapsed: Duration,
    },
    /// Inside a round of the copy, a few times a second.
    Round(Round),
    /// A round of the copy is over.
    RoundEnded(Round),
    /// It runs at the target, and memory that stayed behind is about to follow; where
    /// none did, [`Event::Done`] says so.
    Resumed(Freeze),
    /// While memory follows that stayed behind, a few times a second.
    Fill(Filling),
    /// Something a person should know that does not end the migration: a value
    /// that cannot be carried exactly, a slower backend than there might be.
    Note { text: String },
    /// The process runs at the target.
    Done(Summary),
    /// It does not. Written by the command line from [`Failure`].
    Failed {
        error: String,
        /// What stood in the way, where that is why.
        obstacles: Vec<Obstacle>,
        /// One of the names of [`Outcome`].
        outcome: String,
        exit_code: u8,
        /// How long it stood still, where it runs on here and was stopped.
        #[serde(rename = "stopped_ms", with = "millis::option", default)]
        stopped: Option<Duration>,
    },
}

/// What is being moved, and between which machines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// The migration's id, 32 hex digits; the same in records and in `pmig
    /// resolve`.
    pub id: String,
    pub pid: i32,
    /// Unescaped, as the program set it.
    pub comm: String,
    pub processes: u32,
    pub threads: u32,
    /// Resident memory that must travel, in bytes, as known now.
    pub bytes: u64,
    /// Descriptors.
    pub files: u32,
    /// Host names.
    pub from: String,
    pub to: String,
    /// Kernel releases; a file has none.
    pub kernel_from: String,
    pub kernel_to: String,
    /// How the PCB is read here: `kmod` or `ptrace`.
    pub pcb: String,
    /// By what it is to be told which pages are written: `uffd`, `soft-dirty`,
    /// `faults`, `kmod` or `none`.
    pub tracking: String,
}

/// Where a round of the copy stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// From 1.
    pub round: u32,
    pub pages: u64,
    /// Bytes of this round that were sent, and that there are to send.
    pub bytes: u64,
    pub of: u64,
    #[serde(rename = "elapsed_ms", with = "millis")]
    pub elapsed: Duration,
    /// Bytes per second over this round so far.
    pub rate: u64,
    /// Bytes per second that the program dirties; none before it was measured.
    pub dirty_rate: Option<u64>,
    /// Until the end of this round.
    #[serde(rename = "eta_ms", with = "millis::option")]
    pub eta: Option<Duration>,
}

/// Where memory stands that stayed behind at the freeze.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Filling {
    /// Bytes that followed, and that there were.
    pub bytes: u64,
    pub of: u64,
    #[serde(rename = "elapsed_ms", with = "millis")]
    pub elapsed: Duration,
    /// Bytes per second so far.
    pub rate: u64,
    /// Until nothing is missing.
    #[serde(rename = "eta_ms", with = "millis::option")]
    pub eta: Option<Duration>,
}

/// The freeze in its parts.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Freeze {
    /// When it began, from the command on.
    #[serde(rename = "at_ms", with = "millis", default)]
    pub at: Duration,
    /// First thread stopped at the source to the target's word that it resumed
    /// the last, by the source's clock.
    #[serde(rename = "total_ms", with = "millis")]
    pub total: Duration,
    /// How wrong the total may be: as far as the two machines' clocks could not
    /// be compared.
    #[serde(rename = "clock_error_ms", with = "millis::option", default)]
    pub clock_error: Option<Duration>,
    pub pages: u64,
    /// Bytes that crossed the wire within it.
    pub bytes: u64,
    /// In the order they happened; they add up to the total.
    pub parts: Vec<Part>,
}

impl Freeze {
    /// Adds a part: `stop`, `scan`, `pages`, `pcb`, `descriptors`, `wire`,
    /// `resume`. A name used twice is one part.
    pub fn add(&mut self, name: &'static str, time: Duration) {
        match self.parts.iter_mut().find(|p| p.name == name) {
            Some(part) => part.time += time,
            None => self.parts.push(Part {
                name: name.into(),
                time,
            }),
        }
    }
}

/// One part of the freeze.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    pub name: Cow<'static, str>,
    #[serde(rename = "ms", with = "millis")]
    pub time: Duration,
}

/// A migration that went well.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub id: String,
    pub pid: i32,
    pub comm: String,
    /// Where it runs now, or the file it is in.
    pub to: String,
    pub end: End,
    /// From the command to the resume.
    #[serde(rename = "total_ms", with = "millis")]
    pub total: Duration,
    /// Over the wire, frames included.
    pub bytes_sent: u64,
    pub rounds: u32,
    /// How long the program was stopped in the build to be followed.
    #[serde(rename = "attach_ms", with = "millis")]
    pub attach: Duration,
    /// By what it was told which pages are written, as of [`Facts`].
    pub tracking: String,
    /// Bytes that stayed behind at the freeze, and how long after the resume the
    /// last of them followed.
    #[serde(default)]
    pub left_behind: u64,
    #[serde(rename = "filled_ms", with = "millis::option", default)]
    pub filled: Option<Duration>,
    /// The most memory that pmig itself had resident, in bytes: here, and at the
    /// target before the program ran there. 0: nobody told.
    #[serde(default)]
    pub peak: [u64; 2],
    pub freeze: Freeze,
}

/// What became of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It runs on another machine.
    Moved,
    /// It is in a file, and runs no more.
    InFile,
    /// The same, but runs on here too.
    Copied,
}

/// A migration that did not go through, and where the program is now.
#[derive(Debug)]
pub struct Failure {
    pub error: Error,
    pub outcome: Outcome,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// Where the program is after a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It runs here; nothing ever stopped it.
    NeverStopped,
    /// It was stopped for this long and runs on here.
    RunsOn { stopped: Duration },
    /// It stays frozen here until both sides agree.
    Unresolved { id: String },
    /// It runs at the target, but something after that failed (the copy here
    /// could not be removed, a file could not be put in its place).
    Moved { id: String },
    /// It ended by itself, or somebody killed it.
    Ended,
}

impl Outcome {
    /// Whether nothing of the program is at the target, or will be.
    pub fn is_decided_here(&self) -> bool {
        match self {
            Outcome::NeverStopped | Outcome::RunsOn { .. } | Outcome::Ended => true,
            Outcome::Unresolved { .. } | Outcome::Moved { .. } => false,
        }
    }

    /// As it stands in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::NeverStopped => "never_stopped",
            Outcome::RunsOn { .. } => "runs_on",
            Outcome::Unresolved { .. } => "unresolved",
            Outcome::Moved { .. } => "moved",
            Outcome::Ended => "ended",
        }
    }
}

/// Durations as milliseconds, with the fraction kept to the microsecond.
mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_f64(d.as_micros() as f64 / 1000.0)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        let ms = f64::deserialize(d)?;
        Duration::try_from_secs_f64(ms / 1000.0).map_err(serde::de::Error::custom)
    }

    pub mod option {
        use super::*;

        pub fn serialize<S: Serializer>(d: &Option<Duration>, s: S) -> Result<S::Ok, S::Error> {
            match d {
                Some(d) => super::serialize(d, s),
                None => s.serialize_none(),
            }
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Duration>, D::Error> {
            Option::<f64>::deserialize(d)?
                .map(|ms| Duration::try_from_secs_f64(ms / 1000.0))
                .transpose()
                .map_err(serde::de::Error::custom)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_flat_line_of_json_with_milliseconds() {
        let mut freeze = Freeze {
            total: Duration::from_micros(12_400),
            pages: 48,
            ..Freeze::default()
        };
        freeze.add("stop", Duration::from_micros(150));
        freeze.add("stop", Duration::from_micros(50));
        let event = Event::Done(Summary {
            id: "00".repeat(16),
            pid: 4242,
            comm: "sim\nulate".into(),
            to: "b".into(),
            end: End::Moved,
            total: Duration::from_secs(13),
            bytes_sent: 361_000_000,
            rounds: 2,
            attach: Duration::from_micros(300),
            tracking: "uffd".into(),
            left_behind: 0,
            filled: None,
            peak: [0; 2],
            freeze,
        });
        let line = serde_json::to_string(&event).unwrap();
        assert!(!line.contains('\n'));
        assert!(line.contains(r#""event":"done""#), "{line}");
        assert!(line.contains(r#"{"name":"stop","ms":0.2}"#), "{line}");
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
    }
}
