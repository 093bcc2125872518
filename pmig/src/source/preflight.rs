//! The first look at a process: what stands in its way here.

use crate::error::{Error, Obstacle, Result};
use crate::hold;
use crate::state::fd::{Beat, FdTable, Watch};
use crate::state::memory::{self, Layout};
use crate::state::pcb;

/// What is seen of a process before anybody else is asked.
pub(super) struct First {
    pub descriptors: Watch,
    pub table: FdTable,
    pub layout: Layout,
}

impl First {
    /// # Errors
    ///
    /// [`Error::Refused`] with all that stands in its way.
    pub fn look(pid: i32) -> Result<First> {
        let mut obstacles = pcb::preflight(pid)?;
        if nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(pid))).is_err() {
            return Err(Error::Gone(pid));
        }
        let layout = note(memory::first_look(pid), &mut obstacles)?;
        let open = Watch::new(pid).and_then(|mut watch| {
            let table = watch.look(Beat::Running)?;
            Ok((watch, table))
        });
        let open = note(open, &mut obstacles)?;
        let held = note(hold::preflight(pid), &mut obstacles)?;
        obstacles.extend(held.unwrap_or_default());
        match (layout, open) {
            (Some(layout), Some((descriptors, table))) if obstacles.is_empty() => Ok(First {
                descriptors,
                table,
                layout,
            }),
            _ => Err(Error::Refused(obstacles)),
        }
    }
}

/// Notes what is refused. What has other obstacles may not let itself be looked at.
fn note<T>(seen: Result<T>, obstacles: &mut Vec<Obstacle>) -> Result<Option<T>> {
    match seen {
        Ok(seen) => Ok(Some(seen)),
        Err(Error::Refused(more)) => {
            obstacles.extend(more);
            Ok(None)
        }
        Err(e) if obstacles.is_empty() => Err(e),
        Err(_) => Ok(None),
    }
}

/// Everything that can be said without a target.
///
/// # Errors
///
/// The process cannot be looked at.
pub fn preflight(pid: i32) -> Result<Vec<Obstacle>> {
    match First::look(pid) {
        Ok(_) => Ok(Vec::new()),
        Err(Error::Refused(obstacles)) => Ok(obstacles),
        Err(e) => Err(e),
    }
}
