//! Errors for the person who reads them at 3 a.m.: what failed, on which
//! object, and why. Lower case, no full stop.

use std::fmt::{self, Display};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What fails with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong while a process is looked at or moved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{op} {object}: {cause}")]
    Os {
        op: &'static str,
        object: String,
        cause: io::Error,
    },
    /// Something was read (from procfs, a peer, a batch, a file) that does not
    /// fit what must be there.
    #[error("{object}: {what}")]
    Bad { object: String, what: String },
    /// The process cannot be carried; nothing was stopped for it, or it was
    /// let go on.
    #[error("{}", Obstacle::list(.0))]
    Refused(Vec<Obstacle>),
    /// What was taken for granted of a process is not so any more. It goes on, and may
    /// be moved by asking it while it stands still.
    #[error("process {pid}: {what} changed in the moment of the move")]
    Changed { pid: i32, what: &'static str },
    /// The process went away while it was being handled.
    #[error("process {0} is not there, or has ended")]
    Gone(i32),
    /// The other side reported a failure of its own.
    #[error("{host}: {what}")]
    Peer { host: String, what: String },
    /// The connection broke or fell silent.
    #[error("connection to {peer}: {cause}")]
    Link { peer: String, cause: io::Error },
    /// A wait took longer than its deadline.
    #[error("{what} took longer than {after:?}")]
    Deadline {
        what: String,
        after: std::time::Duration,
    },
    /// A person asked for the migration to end.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// [`Error::Bad`], from whatever can be shown.
    pub fn bad(object: impl Display, what: impl Display) -> Error {
        Error::Bad {
            object: object.to_string(),
            what: what.to_string(),
        }
    }

    /// The error number of the system call that failed, where one did.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Os { cause, .. } | Error::Link { cause, .. } => cause.raw_os_error(),
            _ => None,
        }
    }
}

/// Adds operation and object to a failed system call.
pub trait Context<T> {
    fn context(self, op: &'static str, object: impl Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, op: &'static str, object: impl Display) -> Result<T> {
        self.map_err(|e| Error::Os {
            op,
            object: object.to_string(),
            cause: e.into(),
        })
    }
}

/// A name in a directory, put together only when it has to be said.
#[derive(Debug, Clone, Copy)]
pub struct Within<'a>(pub &'a Path, pub &'a str);

impl Display for Within<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.join(self.1).display())
    }
}

/// One reason why a process cannot move, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Obstacle {
    /// What stands in the way: `fd 7 /dev/nvidia0`, `mapping /usr/lib/x.so`.
    pub object: String,
    /// Why.
    pub why: String,
    /// What a person can do.
    pub remedy: String,
}

impl Obstacle {
    pub fn new(object: impl Display, why: impl Display, remedy: impl Display) -> Obstacle {
        Obstacle {
            object: object.to_string(),
            why: why.to_string(),
            remedy: remedy.to_string(),
        }
    }

    fn list(all: &[Obstacle]) -> String {
        all.iter()
            .map(|o| o.to_string())
            .collect::<Vec<_>>()
            .join("\n")
    }
}

impl Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (o, w, r) = (
            printable(&self.object),
            printable(&self.why),
            printable(&self.remedy),
        );
        if r.is_empty() {
            write!(f, "{o}: {w}")
        } else {
            write!(f, "{o}: {w}; {r}")
        }
    }
}

/// Names and paths come from programs: control characters are escaped before
/// they reach a terminal.
pub fn printable(s: &str) -> String {
    s.chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect::<Vec<_>>()
            } else {
                vec![c]
            }
        })
        .collect()
}
