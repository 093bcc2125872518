//! The messages of a migration.
//!
//! ```text
//! source                               target
//!   Hello ------------------------------>      preflight
//!         <---------------- Accepted | Refused
//!   Ping  ------------------------------>      any time before Final
//!         <------------------------- Pong
//!   Build ------------------------------>      the husk, its files opened
//!         <------------------------ Built
//!   Files ------------------------------>      if there are new ones
//!         <------------------------- Ship
//!   Rehearse --------------------------->      at most once; no answer
//!   Layout, Pages, Drops, Block, PassEnd >     any number, then
//!   RoundEnd --------------------------->
//!         <-------------------- RoundDone
//!   Postpone --------------------------->      if memory is to follow later
//!         <-------------------- Postponed
//!   Ahead ------------------------------>      at most once, behind them; no answer
//!      (the program is stopped)
//!   Files, Layout, Drops, Later -------->      all but what was written last,
//!   Likely ---------------------------->      at most once, right before Since
//!   Final | Since ---------------------->      which comes meanwhile
//!   Drops, Later ----------------------->
//!   Pages, Block, Complete ------------->
//!   Typed ------------------------------>      if it has a terminal
//!         <------------------------ Ready      all is restored
//!      (COMMITTING is recorded)
//!   Commit ----------------------------->      COMMITTED is recorded, thaw
//!         <-------------------- Committed
//!   Pictures, Late --------------------->      what came meanwhile
//!         <------------------------- Want      if memory was left behind, until
//!   Piece ------------------------------>      nothing is missing
//!         <------------------------ Whole
//! ```
//!
//! What is left behind may also be asked for over another connection, which begins
//! with Resume.
//!
//! Instead of any answer the target may say Refused or Failed, and closes.

use serde::{Deserialize, Serialize};

use crate::error::Obstacle;
use crate::id::{Id, Secret};
use crate::image::{Final, Picture, Preview, Shipped, Since};
use crate::journal::Order;
use crate::state::clock::{Clock, Reading};
use crate::state::fd::Input;
use crate::state::files::FileSet;
use crate::state::memory::Layout;
use crate::state::pcb::{Moving, PcbChoice};

/// The most bytes of content that follow one message.
pub const MAX_RAW: usize = 1 << 20;

/// From the source.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToTarget {
    Hello(Box<Hello>),
    Ping,
    Build,
    Layout(Layout),
    /// Runs of memory, first address and bytes; their content follows. Whole pages,
    /// or of those that were sent before what has changed since.
    Pages(Vec<(u64, u32)>),
    /// Runs of pages that are gone.
    Drops(Vec<(u64, u64)>),
    /// A piece of a shipped file; its content follows.
    Block {
        file: u32,
        offset: u64,
        len: u32,
    },
    /// A pass over a file is over; it has this size.
    PassEnd {
        file: u32,
        size: u64,
    },
    /// The files of the program, when there are new ones.
    Files(FileSet),
    RoundEnd,
    /// As [`ToTarget::Final`], of a process that stands in for the program.
    Rehearse(Box<Final>),
    /// As [`ToTarget::Final`], as far as it is known while the program runs: from its
    /// first stop, and by what can be seen since.
    Ahead(Box<Final>),
    /// All but the memory written last, which follows in pages while the target
    /// restores this.
    Final(Box<Final>),
    /// The same, where little has changed since Ahead.
    Since(Box<Since>),
    /// What Since will say of this if nothing else is found to have changed, which
    /// takes longer to ask.
    Likely {
        moving: Box<Moving>,
        clock: Clock,
    },
    /// All of memory has come, and all of the shipped files, which are listed
    /// in the order in which they were asked for.
    Complete(Vec<Shipped>),
    Commit(Order),
    /// What was typed for the program and not read yet, behind Complete, if its
    /// terminal is said to have such.
    Typed(Input),
    /// What the program's terminals show: to a machine when it runs there, to a
    /// file before Complete.
    Pictures(Vec<Picture>),
    /// Signals that were sent to the copy at the source since it was captured,
    /// as a mask.
    Late(u64),
    /// Some of memory is to stay behind at the freeze and to follow when the program
    /// runs.
    Postpone,
    /// Runs of pages, first address and end, that follow later. The target has
    /// nothing of them.
    Later(Vec<(u64, u64)>),
    /// What was wanted; its content follows unless it is all zeros.
    Piece {
        start: u64,
        len: u32,
        zero: bool,
    },
    /// The first message of another connection for what stayed behind.
    Resume {
        id: Id,
        secret: Secret,
    },
    /// Instead of Commit, to a file only: it is to stay, though the program runs
    /// on at the source.
    Keep,
}

impl ToTarget {
    /// Bytes of content that follow it.
    pub fn content(&self) -> u64 {
        match self {
            ToTarget::Pages(runs) => runs.iter().map(|(_, len)| u64::from(*len)).sum(),
            ToTarget::Block { len, .. } => u64::from(*len),
            ToTarget::Piece {
                len, zero: false, ..
            } => u64::from(*len),
            _ => 0,
        }
    }
}

/// The first message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    pub id: Id,
    pub secret: Secret,
    /// Only to know whether it could move.
    pub ask_only: bool,
    /// Whether files may be carried over.
    pub ship: bool,
    /// By what registers and signals are to be restored.
    pub pcb: PcbChoice,
    pub preview: Preview,
}

/// From the target.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToSource {
    Accepted(Accepted),
    Refused(Vec<Obstacle>),
    Pong(Reading),
    /// Files that are to be sent, by their place in the list of files; each is
    /// known from then on by how many were asked for before it.
    Ship(Vec<u32>),
    Built,
    RoundDone,
    /// Times in nanoseconds.
    Ready(Ready),
    Committed {
        /// The target's clock right after the thaw.
        at: Reading,
    },
    /// Memory may stay behind.
    Postponed,
    /// Runs of pages that stayed behind, first address and bytes, to be sent one by
    /// one in this order. Before Ready: what was touched too early.
    Want(Vec<(u64, u32)>),
    /// Nothing is missing any more.
    Whole,
    /// What went wrong there, as text.
    Failed(String),
}

/// What the source learns of a target that takes the process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Accepted {
    pub host: String,
    pub kernel: String,
    /// How the PCB is restored there.
    pub pcb: String,
    /// As [`ToSource::Ship`].
    pub ship: Vec<u32>,
    /// What will not be exactly as it was, for people.
    pub notes: Vec<String>,
}

/// What it took at the target: times in nanoseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Ready {
    pub memory: u64,
    pub descriptors: u64,
    pub pcb: u64,
    /// The most memory that the target's pmig had resident, in bytes.
    pub peak: u64,
}
