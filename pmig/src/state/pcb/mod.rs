//! The process control block: all that the kernel keeps of a single-threaded
//! process but its memory, descriptors and place in the tree.
//!
//! Each part has a room of its own beside this module; here they are put
//! together, in an order that works. Two backends fill the same [`Pcb`].

mod inside;
mod kmod;
mod machine;
mod preflight;

use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use machine::{fits, MachineFacts};
pub use preflight::{limits_of, look_again, needs, preflight, recheck, Needs};

use super::attributes::Attributes;
use super::bounds::Bounds;
use super::credentials::Credentials;
use super::limits::Limits;
use super::registers::{Registers, UserAreas};
use super::restart::{ProgramClock, Restart, Watch};
use super::scheduling::Scheduling;
use super::signals::Signals;
use crate::error::{Context, Error, Result};
use crate::proc::status::Status;
use crate::sys::kmod::{Kmod, DEVICE};
use crate::sys::limits::securebits;
use crate::tracee::{Batch, Done, Stopped};

/// Everything of the process control block that travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pcb {
    pub registers: Registers,
    pub areas: UserAreas,
    pub restart: Restart,
    pub signals: Signals,
    pub credentials: Credentials,
    pub limits: Limits,
    pub scheduling: Scheduling,
    pub attributes: Attributes,
    pub bounds: Bounds,
}

/// What `--pcb` says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PcbChoice {
    /// The module where it is loaded, else ptrace.
    #[default]
    Auto,
    Ptrace,
    Kmod,
}

impl FromStr for PcbChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<PcbChoice, String> {
        match s {
            "auto" => Ok(PcbChoice::Auto),
            "ptrace" => Ok(PcbChoice::Ptrace),
            "kmod" => Ok(PcbChoice::Kmod),
            _ => Err(format!("{s} is none of auto, ptrace, kmod")),
        }
    }
}

/// What a capture needs to know beyond the process.
pub struct CaptureContext<'a> {
    /// What was seen of the process before this stop; its
    /// [`Watch::stopped`] was called at it.
    pub watch: &'a Watch,
    /// The program's clock at the source.
    pub clock: ProgramClock,
}

/// What the target supplies to a restore: what the husk is before, looked up
/// ahead of time.
#[derive(Debug, Clone)]
pub struct Fresh {
    status: Status,
    limits: Limits,
}

impl Fresh {
    /// # Errors
    /// [`Error::Gone`]; those of procfs.
    pub fn of(pid: i32) -> Result<Fresh> {
        Ok(Fresh {
            status: Status::read(pid)?,
            limits: Limits::of(pid)?,
        })
    }
}

/// The way to a process control block.
#[derive(Debug)]
pub enum Backend {
    /// A stock kernel: procfs, ptrace and one batch.
    Ptrace,
    /// The kernel module.
    Kmod(Kmod),
}

impl Backend {
    /// # Errors
    /// [`Error::Bad`] when what was asked for is not there.
    pub fn choose(choice: PcbChoice) -> Result<Backend> {
        let module = || Kmod::open().context("open", DEVICE);
        match choice {
            PcbChoice::Ptrace => Ok(Backend::Ptrace),
            // One that cannot be used is as good as none.
            PcbChoice::Auto => Ok(module()
                .ok()
                .flatten()
                .map_or(Backend::Ptrace, Backend::Kmod)),
            PcbChoice::Kmod => module()?
                .map(Backend::Kmod)
                .ok_or_else(|| Error::bad(DEVICE, "the kernel module is not loaded")),
        }
    }

    /// What follows a process through its stops for this backend.
    pub fn watch(&self) -> Watch {
        match self {
            Backend::Ptrace => Watch::new(),
            Backend::Kmod(_) => Watch::idle(),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Backend::Ptrace => "ptrace",
            Backend::Kmod(_) => "kmod",
        }
    }

    /// At the first stop: asks what stands in the way and only the process
    /// itself can tell, which the module would not see at the freeze.
    ///
    /// # Errors
    /// [`Error::Refused`]; those of a batch.
    pub fn first_stop(&self, stopped: &mut Stopped) -> Result<()> {
        if let Backend::Ptrace = self {
            return Ok(());
        }
        let mut batch = Batch::new();
        let asked = inside::ask(&mut batch);
        let done = stopped.run(batch)?;
        match asked.obstacles(&done) {
            o if o.is_empty() => Ok(()),
            o => Err(Error::Refused(o)),
        }
    }

    /// Captures a stopped process. What cannot be carried and has appeared
    /// since the preflight is found here, or by [`look_again`].
    ///
    /// # Errors
    /// [`Error::Refused`] with every obstacle; [`Error::Gone`]; those of
    /// ptrace and procfs.
    pub fn capture(&self, stopped: &mut Stopped, context: &CaptureContext) -> Result<Pcb> {
        match self {
            Backend::Ptrace => capture_by_ptrace(stopped, context),
            Backend::Kmod(k) => kmod::capture(k, stopped, context),
        }
    }

    /// The first beat: all that needs nothing of the program's memory, while
    /// that is on its way. The husk's mappings, descriptors and time namespace
    /// are complete after the calls of `batch`, and it is still root then.
    /// Returns what became of `batch`.
    ///
    /// The parent-death signal is set here: it is sent when the husk's parent
    /// ends, so a husk that shall outlive the session must have been handed to
    /// another parent before.
    ///
    /// # Errors
    /// The failing call by name; [`Error::Bad`] for a hostile `pcb`.
    pub fn restore(
        &self,
        husk: &mut Stopped,
        batch: Batch,
        pcb: &Pcb,
        fresh: &Fresh,
    ) -> Result<Done> {
        let done = match self {
            Backend::Ptrace => restore_by_ptrace(husk, batch, pcb, fresh)?,
            Backend::Kmod(_) => kmod::restore(husk, batch, pcb, fresh)?,
        };
        pcb.registers.restore_xstate(husk)?;
        Ok(done)
    }

    /// The second beat, as soon as nothing more is to be done inside the husk; its
    /// memory may still come. `clock` is the program's at the target.
    ///
    /// # Errors
    /// As [`Backend::restore`].
    pub fn prepare(&self, husk: &mut Stopped, pcb: &Pcb, clock: ProgramClock) -> Result<()> {
        if !self.needs_memory(pcb) {
            self.set_going(husk, pcb, clock)?;
        }
        Ok(())
    }

    /// The third beat, when its memory is complete: all that is left.
    /// Afterwards only [`Stopped::detach`] may follow.
    ///
    /// # Errors
    /// As [`Backend::restore`].
    pub fn finish(&self, husk: &mut Stopped, pcb: &Pcb, clock: ProgramClock) -> Result<()> {
        if self.needs_memory(pcb) {
            self.set_going(husk, pcb, clock)?;
        }
        pcb.scheduling.restore(husk.pid())
    }

    /// Whether the call that the program is in has to be made anew for it, with
    /// arguments that lie in its memory.
    fn needs_memory(&self, pcb: &Pcb) -> bool {
        matches!(self, Backend::Ptrace) && pcb.restart.reads_memory()
    }

    /// What the program goes on from: the last thing done inside it.
    fn set_going(&self, husk: &mut Stopped, pcb: &Pcb, clock: ProgramClock) -> Result<()> {
        let regs = match self {
            Backend::Ptrace => pcb.restart.restore(husk, &pcb.registers.general, clock)?,
            Backend::Kmod(_) => pcb.restart.with(&pcb.registers.general)?.0,
        };
        husk.set_sigmask(pcb.signals.mask)?;
        husk.set_regs(&regs)?;
        husk.settle()?;
        match self {
            Backend::Ptrace => Ok(()),
            Backend::Kmod(k) => kmod::finish(k, husk.pid(), pcb, clock),
        }
    }
}

fn capture_by_ptrace(stopped: &mut Stopped, context: &CaptureContext) -> Result<Pcb> {
    let pid = stopped.pid();
    let status = Status::read(pid)?;
    let mut obstacles = recheck(stopped, &status);

    let mut batch = Batch::new();
    let refusals = inside::ask(&mut batch);
    let signals = Signals::ask(&mut batch);
    let securebits = Credentials::ask(&mut batch);
    let limits = Limits::ask(&mut batch);
    let attributes = Attributes::ask(&mut batch);
    let brk = Bounds::ask(&mut batch);
    // Queues and registers are read before anything of ours has run.
    let restart = Restart::capture(stopped, context.watch);
    let registers = Registers::capture(stopped)?;
    let queues = Signals::queues(stopped, &status)?;
    let done = stopped.run(batch)?;

    obstacles.extend(refusals.obstacles(&done));
    obstacles.extend(Attributes::obstacles(&attributes, &done));
    let scheduling = Scheduling::capture(pid)?;
    obstacles.extend(scheduling.obstacles());
    let restart = match restart {
        Err(Error::Refused(more)) => {
            obstacles.extend(more);
            Restart::Registers
        }
        other => other?,
    };
    if !obstacles.is_empty() {
        return Err(Error::Refused(obstacles));
    }
    Ok(Pcb {
        registers,
        areas: UserAreas::capture(stopped, attributes.tid_address(&done))?,
        restart,
        signals: Signals::capture(queues, stopped.sigmask(), &signals, &done),
        credentials: Credentials::capture(&status, securebits, &done),
        limits: Limits::capture(&limits, &done),
        scheduling,
        attributes: Attributes::capture(pid, &status, &attributes, &done)?,
        bounds: Bounds::capture(pid, brk, &done)?,
    })
}

fn restore_by_ptrace(
    husk: &mut Stopped,
    mut batch: Batch,
    pcb: &Pcb,
    fresh: &Fresh,
) -> Result<Done> {
    let Fresh { status, limits } = fresh;
    pcb.bounds.restore(&mut batch, None)?;
    pcb.attributes.restore(&mut batch)?;
    pcb.areas.restore(&mut batch)?;
    pcb.signals.restore(&mut batch, status)?;
    // Not before the queues: one limit is theirs.
    pcb.limits.restore(&mut batch, limits)?;
    pcb.credentials
        .restore(&mut batch, &husk_credentials(status))?;
    pcb.attributes.restore_late(&mut batch);
    let done = husk.run(batch)?;
    pcb.attributes.restore_outside(husk.pid())?;
    Ok(done)
}

fn husk_credentials(status: &Status) -> Credentials {
    Credentials {
        // Inherited from here, all but one that exec clears.
        securebits: securebits() & !SECBIT_KEEP_CAPS,
        ..Credentials::from_status(status)
    }
}

const SECBIT_KEEP_CAPS: u32 = 1 << 4;

#[cfg(test)]
mod tests;
