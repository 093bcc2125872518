//! Faults injected by name, so that every phase can be broken on purpose:
//! `PMIG_FAULT=<phase>:<kill|cut|stall>:<source|target|keeper>[:<n>]`.
//!
//! A phase may have several points; the fault is met at the nth that is reached, the
//! first where none is named. The variable is read once. Without it every point is a
//! load of a static.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
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
    /// At which point that is reached, from 1.
    pub nth: u32,
}

impl Fault {
    /// At the first point of a phase.
    pub fn at(phase: Phase, kind: Kind, role: Role) -> Fault {
        Fault {
            phase,
            kind,
            role,
            nth: 1,
        }
    }
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
        let (phase, kind, role) = (next(), next(), next());
        Ok(Fault {
            phase: phase.parse()?,
            kind: pick(&Kind::ALL, kind)?,
            role: pick(&Role::ALL, role)?,
            nth: match parts.next() {
                None => 1,
                Some(n) => n.parse().map_err(|_| format!("{n:?} is no number"))?,
            },
        })
    }
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn name<T: PartialEq>(all: &[(&'static str, T)], wanted: &T) -> &'static str {
            let named = all.iter().find(|(_, t)| t == wanted);
            named.map_or("", |(name, _)| name)
        }
        let (kind, role) = (name(&Kind::ALL, &self.kind), name(&Role::ALL, &self.role));
        write!(f, "{}:{kind}:{role}", self.phase)?;
        match self.nth {
            1 => Ok(()),
            n => write!(f, ":{n}"),
        }
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
    static REACHED: AtomicU32 = AtomicU32::new(0);
    if fault.phase != phase || fault.role != role {
        return;
    }
    if REACHED.fetch_add(1, Ordering::Relaxed) + 1 != fault.nth {
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
