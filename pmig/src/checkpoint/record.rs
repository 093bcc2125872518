//! Writing: what the source takes for its target.

use std::path::Path;
use std::time::Duration;

use nix::unistd::AccessFlags;

use super::file::Writer;
use super::{detach, written_since, Kept};
use crate::error::{Context, Error, Obstacle, Result};
use crate::protocol::message::{Accepted, Hello, Ready, ToSource, ToTarget, MAX_RAW};
use crate::protocol::Wire;
use crate::state::clock::Reading;
use crate::state::pcb::PcbChoice;

/// How long the source, which is this very process, may take for its next word.
const PATIENCE: Duration = Duration::from_secs(600);

/// Hears one migration and writes it down.
///
/// # Errors
/// What went wrong; the source was told.
pub fn record(path: &Path, mut wire: Wire) -> Result<()> {
    let r = hear(path, &mut wire);
    if let Err(e) = &r {
        let word = match e {
            Error::Refused(obstacles) => ToSource::Refused(obstacles.clone()),
            Error::Link { .. } => return r,
            e => ToSource::Failed(e.to_string()),
        };
        let _ = wire.send(&word);
    }
    r
}

fn hear(path: &Path, wire: &mut Wire) -> Result<()> {
    wire.set_deadline(PATIENCE)?;
    let hello = match wire.recv()? {
        ToTarget::Hello(hello) => hello,
        other => return Err(out_of_turn(&other)),
    };
    if std::fs::symlink_metadata(path).is_ok() {
        return Err(Error::Refused(vec![Obstacle::new(
            path.display(),
            "exists already",
            "choose another name, or remove it",
        )]));
    }
    let mut kept = Kept::default();
    let ship = kept.add(&hello.preview.files);
    let accepted = Accepted {
        host: path.display().to_string(),
        kernel: String::new(),
        pcb: String::new(),
        ship,
        notes: Vec::new(),
    };
    let directory = path.parent().unwrap_or(Path::new("/"));
    nix::unistd::access(directory, AccessFlags::W_OK).context("write to", directory.display())?;
    let mut files = hello.preview.files.clone();
    let mut hello = Some(hello);
    let mut writer = None;
    wire.send(&ToSource::Accepted(accepted))?;
    let mut raw = vec![0; MAX_RAW];
    let mut awaits_input = false;
    loop {
        let message: ToTarget = wire.recv()?;
        let content = message.content();
        let raw = raw
            .get_mut(..content as usize)
            .ok_or_else(|| Error::bad("content", format!("{content} bytes are too many")))?;
        wire.recv_raw(raw)?;
        match message {
            ToTarget::Ping => {
                wire.send(&ToSource::Pong(Reading::now()))?;
                continue;
            }
            ToTarget::Build => {
                wire.send(&ToSource::Built)?;
                continue;
            }
            // There is nothing that could be slow for the first time.
            ToTarget::Rehearse(_) => continue,
            _ => {}
        }
        // By now the source has a record of what it does: whoever reads that
        // clears away what is begun here.
        let writer = match (&mut writer, hello.take()) {
            (Some(writer), _) => writer,
            (none, Some(hello)) => none.insert(begin(path, *hello)?),
            (None, None) => return Err(out_of_turn(&message)),
        };
        match message {
            ToTarget::Files(mut set) => {
                let obstacles = written_since(&files, &set);
                if !obstacles.is_empty() {
                    return Err(Error::Refused(obstacles));
                }
                files = set.clone();
                wire.send(&ToSource::Ship(kept.add(&set)))?;
                set.boot.clear();
                writer.put(&ToTarget::Files(set), &[])?;
            }
            ToTarget::RoundEnd => {
                writer.put(&message, &[])?;
                writer.sync()?;
                wire.send(&ToSource::RoundDone)?;
            }
            ToTarget::Complete(_) => {
                writer.put(&message, &[])?;
                if !awaits_input {
                    writer.finish()?;
                    wire.send(&ToSource::Ready(Ready::default()))?;
                }
            }
            ToTarget::Typed(_) => {
                writer.put(&message, &[])?;
                writer.finish()?;
                wire.send(&ToSource::Ready(Ready::default()))?;
            }
            ToTarget::Commit(_) | ToTarget::Keep => {
                writer.publish()?;
                wire.send(&ToSource::Committed { at: Reading::now() })?;
            }
            ToTarget::Late(mask) => {
                if mask != 0 {
                    tracing::warn!(
                        "signals {mask:#x} came when the program was in the file already; they \
                         are lost"
                    );
                }
                return Ok(());
            }
            ToTarget::Layout(_)
            | ToTarget::Pages(_)
            | ToTarget::Drops(_)
            | ToTarget::Block { .. }
            | ToTarget::PassEnd { .. }
            | ToTarget::Pictures(_) => writer.put(&message, raw)?,
            ToTarget::Final(ref last) => {
                awaits_input = last.descriptors.awaits_input();
                writer.put(&message, raw)?;
            }
            ToTarget::Hello(_)
            | ToTarget::Ping
            | ToTarget::Build
            | ToTarget::Rehearse(_)
            | ToTarget::Ahead(_)
            | ToTarget::Since(_)
            | ToTarget::Likely { .. }
            | ToTarget::Postpone
            | ToTarget::Later(_)
            | ToTarget::Piece { .. }
            | ToTarget::Resume { .. } => return Err(out_of_turn(&message)),
        }
    }
}

fn begin(path: &Path, mut hello: Hello) -> Result<Writer> {
    let mut writer = Writer::create(path, hello.id)?;
    detach(&mut hello.preview);
    // Whoever reads the file decides for himself.
    hello.pcb = PcbChoice::Auto;
    hello.secret = crate::id::Secret::from_bytes([0; 32]);
    writer.put(&ToTarget::Hello(Box::new(hello)), &[])?;
    Ok(writer)
}

fn out_of_turn(message: &ToTarget) -> Error {
    let text: String = format!("{message:?}").chars().take(40).collect();
    Error::bad("source", format!("says out of turn: {text}"))
}
