//! What an admitted peer may have a machine do: it acts as root there, within
//! this.

use crate::error::Result;
use crate::state::paths::FilePath;

/// Bounds on what is restored here.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Directories below which files may be opened and made.
    pub roots: Vec<FilePath>,
    /// The most bytes of shipped files for one program.
    pub ship: u64,
}

impl Policy {
    /// All of the file system, and as much as it holds.
    pub fn open() -> Result<Policy> {
        Ok(Policy {
            roots: vec![FilePath::new("/")?],
            ship: 1 << 44,
        })
    }
}
