//! What travels of a process, as plain data.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::state::bounds::Bounds;
use crate::state::clock::Clock;
use crate::state::fd::FdTable;
use crate::state::files::FileSet;
use crate::state::memory::{Kernel, Layout};
use crate::state::paths::FilePath;
use crate::state::pcb::{MachineFacts, Moving, Needs, Pcb};

/// What is known of a process while it runs: enough for a target to say
/// whether it can take it, and to build the husk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Preview {
    pub machine: MachineFacts,
    pub kernel: Kernel,
    pub needs: Needs,
    pub comm: String,
    pub exe: FilePath,
    /// As they are now.
    pub bounds: Bounds,
    pub layout: Layout,
    pub descriptors: FdTable,
    /// Every file that is open, mapped or executed.
    pub files: FileSet,
    /// Resident memory that must travel, in bytes.
    pub bytes: u64,
    /// Names the program across its moves.
    pub lineage: String,
}

/// All that memory and file contents leave to be said, captured while the
/// process stands still.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Final {
    pub pcb: Pcb,
    pub descriptors: FdTable,
    pub clock: Clock,
}

impl Final {
    /// Itself, by what has changed since `known`; none where that is more than what
    /// always does.
    pub fn since(&self, known: &Final) -> Option<Since> {
        let moving = self.pcb.moving();
        (known.pcb.moved_on(moving.clone()) == self.pcb).then(|| Since {
            moving,
            descriptors: self.descriptors.clone(),
            clock: self.clock,
        })
    }
}

/// A [`Final`] by what has changed since one that is known.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Since {
    pub moving: Moving,
    pub descriptors: FdTable,
    pub clock: Clock,
}

/// How a shipped file is to be at the end.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Shipped {
    /// Bytes sent in the last pass.
    pub sent: u64,
    pub size: u64,
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (i64, u32),
}

/// What a terminal shows, and what was typed for it and kept: not of the
/// program's own state, but of who looks at it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Picture {
    /// Bytes that make an empty terminal show the same.
    #[serde(with = "serde_bytes")]
    pub shows: Vec<u8>,
    #[serde(with = "serde_bytes")]
    pub keys: Vec<u8>,
}

impl Picture {
    /// The longest picture, in bytes.
    pub const MOST_SHOWN: usize = 512 << 10;
    /// The most bytes that are kept of what is typed and that the program does
    /// not take.
    pub const MOST_KEPT: usize = 64 << 10;
    /// The most pictures of one program.
    const MOST: usize = 16;

    /// Checks what came from a peer.
    ///
    /// # Errors
    /// There is more of it than there can be.
    pub fn check(all: &[Picture]) -> Result<()> {
        let long = |p: &Picture| p.shows.len() > Self::MOST_SHOWN || p.keys.len() > Self::MOST_KEPT;
        if all.len() > Self::MOST || all.iter().any(long) {
            return Err(Error::bad("terminals from peer", "show more than they can"));
        }
        Ok(())
    }
}
