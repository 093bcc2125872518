//! What is in a file.

use std::path::Path;

use serde::Serialize;

use super::bad;
use super::file::Reader;
use crate::error::Result;
use crate::image::{Final, Preview, Shipped};
use crate::protocol::message::ToTarget;
use crate::state::memory::Layout;

/// A file's content but for memory and files, which are only counted.
#[derive(Debug, Serialize)]
pub struct Looked {
    /// Of the dump.
    pub id: String,
    /// Bytes of the file.
    pub size: u64,
    /// As it was when the dump began, but for files: those are all.
    pub preview: Preview,
    /// Its mappings at the end.
    pub layout: Layout,
    /// How it stood still.
    pub last: Final,
    /// Bytes of memory in all rounds.
    pub memory: u64,
    pub rounds: u32,
    /// The kept files' ends, in the order in which they were asked for.
    pub shipped: Vec<Shipped>,
}

/// Reads a file through.
///
/// # Errors
/// As [`super::Player::open`]; it makes no sense.
pub fn look(path: &Path) -> Result<Looked> {
    let mut file = Reader::open(path)?;
    let mut raw = Vec::new();
    let Some(ToTarget::Hello(hello)) = file.next(&mut raw)? else {
        return Err(bad(path, "does not begin with a process"));
    };
    let (mut memory, mut rounds) = (0, 0);
    let mut preview = hello.preview;
    let mut layout = preview.layout.clone();
    let (mut last, mut shipped) = (None, None);
    while let Some(message) = file.next(&mut raw)? {
        match message {
            ToTarget::Layout(now) => layout = now,
            ToTarget::Files(now) => preview.files = now,
            ToTarget::Pages(_) => memory += raw.len() as u64,
            ToTarget::RoundEnd => rounds += 1,
            ToTarget::Final(end) => last = Some(*end),
            ToTarget::Complete(ends) => shipped = Some(ends),
            _ => {}
        }
    }
    let no_end = || bad(path, "has no end");
    Ok(Looked {
        id: file.id.to_string(),
        size: file.size,
        preview,
        layout,
        last: last.ok_or_else(no_end)?,
        memory,
        rounds,
        shipped: shipped.ok_or_else(no_end)?,
    })
}
