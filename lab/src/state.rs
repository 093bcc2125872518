//! The lab that stays up between commands.

use crate::build;
use crate::host::{Host, Make};
use crate::netns::Netns;
use crate::owner::Owner;
use crate::pair::{self, passage, Lab, Processors, NAMES};
use crate::vm::{Machine, Vm};
use anyhow::{bail, Context, Result};
use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::PathBuf;

/// What is up, as it stands in a file of the build directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    pub make: Make,
    /// Where the hosts' sockets lie.
    pub directory: PathBuf,
    /// What the names of passing things carry.
    pub tag: String,
    /// Each host's process on this machine, in the order of [`NAMES`].
    pub owners: Vec<Owner>,
}

fn path() -> Result<PathBuf> {
    let directory = build::directory()?.join("run");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    Ok(directory.join("up.json"))
}

/// Keeps other processes from raising or ending the lab meanwhile.
///
/// # Errors
/// Those of the lock's file.
pub fn change() -> Result<Flock<File>> {
    build::lock("up")
}

/// What a file says is up, whether it still runs or not.
///
/// # Errors
/// The file cannot be read.
pub fn recorded() -> Result<Option<State>> {
    let path = path()?;
    match fs::read(&path) {
        // What cannot be understood is another version's, and says nothing.
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("read {}", path.display())),
    }
}

impl State {
    /// True while all of its hosts run.
    pub fn runs(&self) -> bool {
        self.owners.len() == NAMES.len() && self.owners.iter().all(|owner| owner.alive())
    }

    /// Writes it down.
    ///
    /// # Errors
    /// Those of the file.
    pub fn record(&self) -> Result<()> {
        let path = path()?;
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(self)?)
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("write {}", path.display()))
    }

    /// The host of that name.
    ///
    /// # Errors
    /// No host has it.
    pub fn host(&self, name: &str) -> Result<Box<dyn Host>> {
        let index = NAMES.iter().position(|known| *known == name);
        let index = index.with_context(|| format!("no host is called {name}: try a or b"))?;
        let owner = *self.owners.get(index).context("the record is cut short")?;
        Ok(match self.make {
            Make::Netns => Box::new(Netns::attach(name, &self.directory, &self.tag, owner)?),
            Make::Vm => Box::new(Vm::attach(name, &self.directory, owner)?),
        })
    }

    /// How a machine of that name was started.
    ///
    /// # Errors
    /// The hosts are no machines, or none is called so.
    pub fn machine(&self, name: &str) -> Result<Machine> {
        let index = NAMES.iter().position(|known| *known == name);
        let owner = index.and_then(|index| self.owners.get(index));
        let owner = owner.with_context(|| format!("no host is called {name}: try a or b"))?;
        if self.make != Make::Vm {
            bail!("{name} is made of namespaces and has no console");
        }
        Ok(Vm::attach(name, &self.directory, *owner)?.machine().clone())
    }

    /// Both hosts.
    ///
    /// # Errors
    /// The record is cut short.
    pub fn lab(&self) -> Result<Lab> {
        Ok(Lab::of(self.host(NAMES[0])?, self.host(NAMES[1])?))
    }
}

/// The lab that is up.
///
/// # Errors
/// None is.
pub fn current() -> Result<State> {
    match recorded()? {
        Some(state) if state.runs() => Ok(state),
        _ => bail!("no lab is up; start one with: cargo lab up"),
    }
}

/// Ends what is up, and clears what a crash left of it.
///
/// # Errors
/// A process that cannot be ended.
pub fn down() -> Result<bool> {
    let Some(state) = recorded()? else {
        return Ok(false);
    };
    for name in NAMES {
        if let Ok(host) = state.host(name) {
            host.crash()?;
        }
    }
    let _ = fs::remove_dir_all(&state.directory);
    let _ = fs::remove_dir_all(pair::disks(&state.tag)?);
    fs::remove_file(path()?).context("remove the record")?;
    Ok(true)
}

/// Raises hosts that stay, in place of any that are up.
///
/// # Errors
/// Whatever keeps them from being built.
pub fn up(make: Make, say: &dyn Fn(&str)) -> Result<State> {
    down()?;
    let tag = format!("up.{}", &digest(&build::top().to_string_lossy())[..12]);
    let directory = passage(&tag)?;
    if make == Make::Netns {
        say("building pmig and the sample programs");
    }
    let (netns, vm) = match make {
        Make::Netns => (Some(Lab::netns_hosts(&directory, &tag)?), None),
        Make::Vm => {
            let hosts = Lab::vm_hosts(&directory, &tag, Processors::Own, say)?;
            (None, Some(hosts))
        }
    };
    let owners = match (&netns, &vm) {
        (Some(hosts), _) => hosts.iter().map(Netns::launcher).collect(),
        (_, Some(hosts)) => hosts.iter().map(Vm::owner).collect(),
        _ => Vec::new(),
    };
    let state = State {
        make,
        directory,
        tag,
        owners,
    };
    state.record()?;
    netns.iter().flatten().try_for_each(Netns::stay)?;
    vm.iter().flatten().try_for_each(Vm::stay)?;
    Ok(state)
}

/// A short name for a text.
pub fn digest(text: &str) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
