//! The phases of the road, in order.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a migration stands. Up to and including [`Phase::Ready`] any failure
/// leaves the program running at the source; from [`Phase::Commit`] on the
/// records decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Hello,
    Build,
    Copy,
    Freeze,
    Ready,
    Commit,
    /// Memory that was left behind follows.
    Fill,
    Release,
}

impl Phase {
    /// In order.
    pub const ALL: [Phase; 8] = [
        Phase::Hello,
        Phase::Build,
        Phase::Copy,
        Phase::Freeze,
        Phase::Ready,
        Phase::Commit,
        Phase::Fill,
        Phase::Release,
    ];

    /// In lower case, as in `PMIG_FAULT`.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Hello => "hello",
            Phase::Build => "build",
            Phase::Copy => "copy",
            Phase::Freeze => "freeze",
            Phase::Ready => "ready",
            Phase::Commit => "commit",
            Phase::Fill => "fill",
            Phase::Release => "release",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(s: &str) -> Result<Phase, String> {
        Phase::ALL
            .into_iter()
            .find(|p| p.name() == s)
            .ok_or_else(|| format!("no phase is named {s}"))
    }
}
