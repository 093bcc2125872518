//! Faults injected by name, so that every phase can be broken on purpose:
//! `PMIG_FAULT=<phase>:<kill|cut|stall>:<source|target|keeper>`.
//!
//! The variable is read once. Without it every point is a load of a static.

use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

use crate::phase::Phase;

/// What happens at a fault point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The pmig process dies as by `kill -9`.
    Kill,
    /// The connection is cut in both directions.
    Cut,
    /// The pmig process stops doing anything but stays alive.
    Stall,
}

/// Which pmig process meets the fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Source,
    Target,
    Keeper,
}

impl Kind {
    /// By name.
    pub const ALL: [(&'static str, Kind); 3] = [
        ("kill", Kind::Kill),
        ("cut", Kind::Cut),
        ("stall", Kind::Stall),
    ];
}

impl Role {
    /// By name.
    pub const ALL: [(&'static str, Role); 3] = [
        ("source", Role::Source),
        ("target", Role::Target),
        ("keeper", Role::Keeper),
    ];
}

/// A fault to be met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    pub phase: Phase,
    pub kind: Kind,
    pub role: Role,
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(s: &str) -> Result<Fault, String> {
        fn pick<T: Copy>(all: &[(&str, T)], name: &str) -> Result<T, String> {
            all.iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| *v)
                .ok_or_else(|| format!("{name:?} is not one of the names of a fault"))
        }
        let mut parts = s.split(':');
        let mut next = || parts.next().unwrap_or("");
        Ok(Fault {
            phase: next().parse()?,
            kind: pick(&Kind::ALL, next())?,
            role: pick(&Role::ALL, next())?,
        })
    }
}

fn wanted() -> Option<Fault> {
    static WANTED: OnceLock<Option<Fault>> = OnceLock::new();
    *WANTED.get_or_init(|| {
        let text = std::env::var("PMIG_FAULT").ok()?;
        match text.parse() {
            Ok(fault) => Some(fault),
            Err(why) => {
                tracing::warn!("PMIG_FAULT={text} is ignored: {why}");
                None
            }
        }
    })
}

/// A place where a fault may strike. `cut` is called for [`Kind::Cut`] and must
/// break the connection in both directions.
pub fn point(phase: Phase, role: Role, cut: impl FnOnce()) {
    let Some(fault) = wanted() else { return };
    if fault.phase != phase || fault.role != role {
        return;
    }
    tracing::warn!("meeting the fault that was asked for: {fault:?}");
    match fault.kind {
        Kind::Kill => {
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
        Kind::Cut => cut(),
        Kind::Stall => loop {
            std::thread::sleep(Duration::from_secs(3600));
        },
    }
}
