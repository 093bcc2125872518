//! The table opened again at the target, in pmig's own process: one descriptor
//! for each description, which the process being built then pulls over.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use nix::sys::resource::{getrlimit, setrlimit, Resource};

use super::terminal::{self, Made};
use super::typed::Input;
use super::{device, directory, pipe, regular, Description, FdTable, Kind};
use crate::error::{Context, Error, Result};
use crate::state::objects::Opener;
use crate::sys::tty::Size;

/// What became of a table when the final one arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Everything was changed on descriptions the process may hold already.
    Same,
    /// Opened anew: the process must pull all of it (again).
    Changed,
}

/// A table and everything in it, open.
#[derive(Debug)]
pub struct Opened {
    pub(super) table: FdTable,
    /// None where only the process itself can open it: `/dev/tty`.
    pub(super) descriptions: Vec<Option<OwnedFd>>,
    pub(super) terminals: Vec<Made>,
    pub(super) cwd: OwnedFd,
    pub(super) root: OwnedFd,
}

impl Opened {
    /// Opens everything in a table that came from a peer.
    ///
    /// # Errors
    /// Naming the file and what is wrong with it here.
    pub fn open(table: FdTable, opener: &Opener) -> Result<Opened> {
        table.check()?;
        make_room(table.descriptions.len())?;
        let mut ends: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        let mut fds: Vec<Option<OwnedFd>> = Vec::with_capacity(table.descriptions.len());
        let mut terminals = table
            .terminals
            .iter()
            .map(Made::new)
            .collect::<Result<Vec<_>>>()?;
        for (n, d) in table.descriptions.iter().enumerate() {
            fds.push(match &d.kind {
                Kind::Regular(r) => Some(regular::open(d, r, opener)?),
                Kind::Directory(dir) => Some(directory::open(d, dir, opener)?),
                Kind::Device(dev) => Some(device::open(d, dev, opener)?),
                Kind::Pipe(end) => {
                    ends.entry(end.pipe).or_default().push(n);
                    None
                }
                Kind::Terminal(end) if end.by_name => None,
                Kind::Terminal(end) => Some(terminals[end.terminal as usize].open(d)?),
            });
        }
        for (pipe, ends) in ends {
            let of: Vec<&Description> = ends.iter().map(|&n| &table.descriptions[n]).collect();
            let made = pipe::open_ends(&table.pipes[pipe as usize], &of)?;
            for (n, fd) in ends.into_iter().zip(made) {
                fds[n] = Some(fd);
            }
        }
        let cwd = opener.place(&table.cwd)?.into_fd();
        let root = opener.place(&table.root)?.into_fd();
        for (made, terminal) in terminals.iter_mut().zip(&table.terminals) {
            made.finish(terminal);
        }
        Ok(Opened {
            table,
            descriptions: fds,
            terminals,
            cwd,
            root,
        })
    }

    /// Takes the final table: changes what differs on the descriptions that
    /// are open, or, where that is not enough, opens everything anew.
    ///
    /// # Errors
    /// As [`Opened::open`].
    pub fn finish(&mut self, table: FdTable, opener: &Opener) -> Result<Shape> {
        table.check()?;
        if !self.table.is_same_shape(&table) {
            *self = Opened::open(table, opener)?;
            return Ok(Shape::Changed);
        }
        let before = &self.table.descriptions;
        for ((d, old), fd) in table
            .descriptions
            .iter()
            .zip(before)
            .zip(&self.descriptions)
        {
            let Some(fd) = fd else { continue };
            if let Kind::Pipe(end) = &d.kind {
                pipe::set_flags(fd, d)?;
                let n = end.pipe as usize;
                // A pipe is filled once, through the first of its ends.
                if self.table.pipes[n] != table.pipes[n] {
                    table.pipes[n].fill(fd)?;
                    self.table.pipes[n] = table.pipes[n].clone();
                }
            } else if d != old {
                match &d.kind {
                    Kind::Regular(r) => regular::adjust(fd, d, r)?,
                    Kind::Directory(dir) => directory::adjust(fd, d, dir)?,
                    Kind::Device(dev) => device::adjust(fd, d, dev)?,
                    Kind::Terminal(_) => terminal::set_flags(fd, d)?,
                    Kind::Pipe(_) => {}
                }
            }
        }
        for (made, terminal) in self.terminals.iter().zip(&table.terminals) {
            made.set(terminal)?;
        }
        self.table = table;
        Ok(Shape::Same)
    }

    /// The ends that show the terminals, and their sizes, for whoever is to
    /// hold them: the one that controls the process first. Those that nobody
    /// holds hang up when this is dropped.
    pub fn masters(&self) -> Vec<(&OwnedFd, Size)> {
        let made = self.terminals.iter().zip(&self.table.terminals);
        let mut all: Vec<_> = made
            .filter_map(|(made, t)| Some((!t.controls, made.master.as_ref()?, t)))
            .collect();
        all.sort_by_key(|(other, ..)| *other);
        all.into_iter()
            .map(|(_, master, t)| (master, t.now.as_ref().map_or(Size::default(), |n| n.size)))
            .collect()
    }

    /// Closes what the process has taken over. Before it goes on: while it is open
    /// here, so are both ends of every pipe.
    pub fn close(&mut self) {
        self.descriptions.clear();
    }

    /// Types into the controlling terminal what was typed for the process.
    ///
    /// # Errors
    /// [`Error::Bad`] for what cannot have been typed; those of the terminal.
    pub fn type_in(&self, input: &Input) -> Result<()> {
        let n = self.table.terminals.iter().position(|t| t.controls);
        let made = n.and_then(|n| self.terminals.get(n));
        let made = made.ok_or_else(|| Error::bad("input from peer", "is for no terminal"))?;
        made.type_in(input)
    }

    pub fn table(&self) -> &FdTable {
        &self.table
    }
}

/// Raises this process's soft limit on descriptors where the table needs it.
fn make_room(descriptions: usize) -> Result<()> {
    // What pmig has open itself is far less than this.
    const OWN: u64 = 256;
    let what = "the limit on descriptors";
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("read", what)?;
    let needed = descriptions as u64 + OWN;
    if needed > hard {
        return Err(Error::bad(
            "descriptor table",
            format!("{descriptions} files are more than pmig may open here ({hard})"),
        ));
    }
    if needed > soft {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise", what)?;
    }
    Ok(())
}
