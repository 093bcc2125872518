//! Reading: what a target takes for its source.

use std::path::Path;
use std::time::Duration;

use super::file::Reader;
use super::{bad, Kept};
use crate::error::{printable, Error, Obstacle, Result};
use crate::id::{Id, Secret};
use crate::image::{Preview, Shipped};
use crate::journal::Order;
use crate::patience::patience;
use crate::protocol::fate::{Question, What};
use crate::protocol::message::{Hello, ToSource, ToTarget};
use crate::protocol::Wire;
use crate::state::clock::{Clock, Reading};
use crate::state::files::FileSet;
use crate::state::paths::FilePath;
use crate::state::pcb::PcbChoice;
use crate::transport::Link;

/// How long the target may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process that runs again.
#[derive(Debug)]
pub struct Played {
    pub pid: i32,
    pub comm: String,
    /// What is not exactly as it was, for people.
    pub notes: Vec<String>,
}

/// A file about to be restored, and what is needed to ask what became of that.
pub struct Player {
    file: Reader,
    preview: Preview,
    id: Id,
    secret: Secret,
}

impl Player {
    /// Opens a file, and looks whether it is as it was written.
    ///
    /// # Errors
    /// It is not; those of the file.
    pub fn open(path: &Path) -> Result<Player> {
        let mut file = Reader::open(path)?;
        let Some(ToTarget::Hello(hello)) = file.next(&mut Vec::new())? else {
            return Err(bad(path, "does not begin with a process"));
        };
        Ok(Player {
            file,
            preview: hello.preview,
            id: Id::random()?,
            secret: Secret::random()?,
        })
    }

    /// What will run, if it does.
    pub fn whom(&self) -> Played {
        Played {
            pid: self.preview.needs.pid,
            comm: self.preview.comm.clone(),
            notes: Vec::new(),
        }
    }

    /// By which the target's records decide, once and for all, whether it runs.
    pub fn question(&self) -> Question {
        Question {
            id: self.id,
            secret: self.secret.clone(),
            what: What::Abandon,
        }
    }

    /// Says to the target behind a connection what the file says; by `pcb` it is to
    /// restore registers and signals.
    ///
    /// # Errors
    /// The file makes no sense; what the target says; the connection breaks.
    /// After that the [`Player::question`] must be asked.
    pub fn play(self, link: Box<dyn Link>, pcb: PcbChoice) -> Result<Played> {
        let mut wire = Wire::new(link);
        wire.set_deadline(patience(PATIENCE))?;
        let played = play(self, &mut wire, pcb);
        if let Err(Error::Link { .. }) = &played {
            // It may have said why, before it closed.
            match answer(&mut wire) {
                Err(Error::Link { .. }) | Ok(_) => {}
                Err(why) => return Err(why),
            }
        }
        played
    }
}

fn play(player: Player, wire: &mut Wire, pcb: PcbChoice) -> Result<Played> {
    let whom = player.whom();
    let Player {
        mut file,
        preview,
        id,
        secret,
    } = player;
    let path = &file.path().to_owned();
    let mut raw = Vec::new();
    let mut files = Numbers::default();
    wire.send(&ToTarget::Hello(Box::new(Hello {
        id,
        secret: secret.clone(),
        ask_only: false,
        ship: true,
        pcb,
        preview: preview.clone(),
    })))?;
    let accepted = match answer(wire)? {
        ToSource::Accepted(accepted) => accepted,
        other => return Err(unexpected(&other)),
    };
    files.add(&preview.files, &accepted.ship)?;
    wire.send(&ToTarget::Build)?;
    expect_built(wire)?;
    let mut ready = false;
    let mut awaits_input = false;
    while let Some(message) = file.next(&mut raw)? {
        if ready {
            return Err(bad(path, "goes on after its end"));
        }
        match message {
            ToTarget::Files(set) => {
                wire.send(&ToTarget::Files(set.clone()))?;
                match answer(wire)? {
                    ToSource::Ship(wanted) => files.add(&set, &wanted)?,
                    other => return Err(unexpected(&other)),
                }
            }
            ToTarget::Block { file, offset, len } => {
                if let Some(file) = files.there(path, file)? {
                    wire.send_with(&ToTarget::Block { file, offset, len }, &raw)?;
                }
            }
            ToTarget::PassEnd { file, size } => {
                if let Some(file) = files.there(path, file)? {
                    wire.send(&ToTarget::PassEnd { file, size })?;
                }
            }
            ToTarget::RoundEnd => {
                wire.send(&ToTarget::RoundEnd)?;
                match answer(wire)? {
                    ToSource::RoundDone => {}
                    other => return Err(unexpected(&other)),
                }
            }
            ToTarget::Final(mut last) => {
                go_on(&mut last.clock);
                awaits_input = last.descriptors.awaits_input();
                wire.send(&ToTarget::Final(last))?;
            }
            ToTarget::Complete(shipped) => {
                wire.send(&ToTarget::Complete(files.in_order(path, &shipped)?))?;
                if !awaits_input {
                    expect_ready(wire)?;
                    ready = true;
                }
            }
            ToTarget::Typed(input) if awaits_input => {
                wire.send(&ToTarget::Typed(input))?;
                expect_ready(wire)?;
                ready = true;
            }
            ToTarget::Layout(_)
            | ToTarget::Pages(_)
            | ToTarget::Drops(_)
            | ToTarget::Pictures(_) => {
                wire.send_with(&message, &raw)?;
            }
            _ => return Err(bad(path, "says something out of turn")),
        }
    }
    if !ready {
        return Err(bad(path, "has no end"));
    }
    wire.send(&ToTarget::Commit(Order::of_a_file(id, secret)))?;
    match answer(wire)? {
        ToSource::Committed { .. } => {}
        other => return Err(unexpected(&other)),
    }
    // It runs. Nobody sent signals to a file.
    let _ = wire.send(&ToTarget::Late(0));
    Ok(Played {
        notes: accepted.notes,
        ..whom
    })
}

/// For the program no time passed: its clocks go on where they stood.
fn go_on(clock: &mut Clock) {
    clock.ahead = clock.at_stop.minus(Reading::now());
}

/// A file's number in the file, and at the target: each counts what it asked
/// for.
#[derive(Default)]
struct Numbers {
    kept: Kept,
    asked: Vec<FilePath>,
}

impl Numbers {
    fn add(&mut self, set: &FileSet, wanted: &[u32]) -> Result<()> {
        self.kept.add(set);
        let mut missing = Vec::new();
        for &n in wanted {
            let file = set.files.get(n as usize);
            let file =
                file.ok_or_else(|| Error::bad("target", "wants a file that there is not"))?;
            if !self.kept.0.contains(&file.path) {
                missing.push(Obstacle::new(
                    format!("file {}", file.path),
                    "is missing or another one here, and only read by the program, so its content \
                     was not kept",
                    "put it there",
                ));
            }
            self.asked.push(file.path.clone());
        }
        match missing.is_empty() {
            true => Ok(()),
            false => Err(Error::Refused(missing)),
        }
    }

    /// The target's number of a file; none where it wants none of it.
    fn there(&self, path: &Path, number: u32) -> Result<Option<u32>> {
        let kept = self.kept.0.get(number as usize);
        let kept = kept.ok_or_else(|| bad(path, "has content of a file that there is not"))?;
        Ok((0u32..)
            .zip(&self.asked)
            .find(|(_, p)| *p == kept)
            .map(|(n, _)| n))
    }

    fn in_order(&self, path: &Path, shipped: &[Shipped]) -> Result<Vec<Shipped>> {
        self.asked
            .iter()
            .map(|p| {
                let place = self.kept.0.iter().position(|k| k == p);
                place
                    .and_then(|n| shipped.get(n).copied())
                    .ok_or_else(|| bad(path, "does not say how a file ends"))
            })
            .collect()
    }
}

fn expect_built(wire: &mut Wire) -> Result<()> {
    match answer(wire)? {
        ToSource::Built => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn expect_ready(wire: &mut Wire) -> Result<()> {
    match answer(wire)? {
        ToSource::Ready(_) => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn answer(wire: &mut Wire) -> Result<ToSource> {
    match wire.recv()? {
        ToSource::Refused(obstacles) => Err(Error::Refused(obstacles)),
        ToSource::Failed(what) => Err(Error::bad("it could not be restored", printable(&what))),
        other => Ok(other),
    }
}

fn unexpected(message: &ToSource) -> Error {
    let text: String = format!("{message:?}").chars().take(40).collect();
    Error::bad("target", format!("answers out of turn: {text}"))
}
