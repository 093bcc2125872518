//! What travels of a process, as plain data.

use serde::{Deserialize, Serialize};

use crate::state::bounds::Bounds;
use crate::state::clock::Clock;
use crate::state::fd::FdTable;
use crate::state::files::FileSet;
use crate::state::memory::{Kernel, Layout};
use crate::state::paths::FilePath;
use crate::state::pcb::{MachineFacts, Needs, Pcb};

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

/// How a shipped file is to be at the end.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Shipped {
    /// Bytes sent in the last pass.
    pub sent: u64,
    pub size: u64,
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (i64, u32),
}
