//! What a move does to what stays behind, for people.

use crate::error::Result;
use crate::holder;
use crate::proc;
use crate::proc::stat::Stat;
use crate::state::fd::{Beat, FdTable, Watch};
use crate::state::memory::Tracking;

/// What will not be as it was, of a process that can move.
///
/// # Errors
/// It cannot be looked at.
pub fn notes(pid: i32) -> Result<Vec<String>> {
    of_terminals(pid, &Watch::new(pid)?.look(Beat::Running)?)
}

pub(super) fn of_terminals(pid: i32, table: &FdTable) -> Result<Vec<String>> {
    if table.terminals.iter().all(|t| t.hung_up) {
        return Ok(Vec::new());
    }
    if holder::find(pid)?.is_some_and(|h| h.terminals > 0) {
        return Ok(vec![format!(
            "its terminal goes along, with what it shows: pmig attach {pid} there"
        )]);
    }
    // Who leads the session that the terminal belongs to.
    let [leader] = Stat::read(pid)?.fields(6)?;
    let whose = match proc::text(leader as i32, "comm") {
        Ok(comm) if leader != pid as u64 => format!("with {} ({leader})", comm.trim_end()),
        _ => "here".to_owned(),
    };
    Ok(vec![format!(
        "its terminal stays {whose}, and it gets a new one: pmig attach {pid} there"
    )])
}

/// What the means by which the program's writes are told cannot see.
pub(super) fn of_tracking(candidates: &[Tracking], table: &FdTable) -> Vec<String> {
    let mut notes = Vec::new();
    if !candidates[0].sees_other_writers() {
        notes.push(format!(
            "where another process writes into the program's memory (process_vm_writev) \
             writes may be lost: --dirty-tracking {} does not see it",
            candidates[0]
        ));
    }
    if candidates[0] != Tracking::None && table.reads_past_the_cache() {
        notes.push(
            "it reads a file past the page cache (O_DIRECT): all memory is copied once more \
             while it stands still"
                .into(),
        );
    }
    notes
}
