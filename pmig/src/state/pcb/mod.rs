//! The process control block: all that the kernel keeps of a single-threaded
//! process but its memory, descriptors and place in the tree.
//!
//! Each part has a room of its own beside this module; here they are put
//! together, in an order that works. Two backends fill the same [`Pcb`].

mod foreseen;
mod inside;
mod kmod;
mod machine;
mod preflight;

use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use foreseen::{Answers, Foreseen};
pub use machine::{fits, MachineFacts};
pub use preflight::{limits_of, look_again, needs, preflight, recheck, Needs};

use super::attributes::{self, Attributes, Told};
use super::bounds::Bounds;
use super::credentials::{Credentials, Ids};
use super::limits::{self, Limits};
use super::registers::{Registers, UserAreas};
use super::restart::{ProgramClock, Restart, Watch};
use super::scheduling::Scheduling;
use super::signals::{self, SigInfo, Signals};
use crate::error::{Context, Error, Obstacle, Result};
use crate::proc::status::Status;
use crate::proc::Kept;
use crate::sys::kmod::{Kmod, DEVICE};
use crate::sys::limits::securebits;
use crate::sys::ptrace::Regs;
use crate::tracee::{Batch, Call, Done, Stopped};

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

/// What a capture needs to know beyond the process.
pub struct CaptureContext<'a> {
    /// What was seen of the process before this stop; its
    /// [`Watch::stopped`] was called at it.
    pub watch: &'a Watch,
    /// The program's clock at the source.
    pub clock: ProgramClock,
    /// Its files in `/proc`, open perhaps from a capture before.
    pub files: &'a Kept,
    pub questions: &'a Questions,
    /// Known before it was stopped; to be confirmed when nobody waits for it.
    pub foreseen: Option<&'a Foreseen>,
    /// Where its heap lies, as of a look at its mappings at this stop.
    pub heap: Option<Range<u64>>,
}

/// What a capture finds.
pub struct Captured {
    pub pcb: Pcb,
    /// What the process said of itself, if it was asked at this stop.
    pub answers: Option<Answers>,
}

/// What a process is asked that only itself can tell: put together before it stops.
pub struct Questions {
    batch: Batch,
    refusals: inside::Asked,
    signals: signals::Asked,
    securebits: Call,
    limits: limits::Asked,
    attributes: attributes::Asked,
    brk: Call,
}

impl Questions {
    pub fn new() -> Questions {
        let mut batch = Batch::new();
        Questions {
            refusals: inside::ask(&mut batch),
            signals: Signals::ask(&mut batch),
            securebits: Credentials::ask(&mut batch),
            limits: Limits::ask(&mut batch),
            attributes: Attributes::ask(&mut batch),
            brk: Bounds::ask(&mut batch),
            batch,
        }
    }

    /// # Errors
    /// Those of a batch.
    fn ask(&self, stopped: &mut Stopped) -> Result<Done> {
        stopped.run(self.batch.clone())
    }

    /// What stands in the way by the answers.
    fn obstacles(&self, done: &Done) -> Vec<Obstacle> {
        let mut all = self.refusals.obstacles(done);
        all.extend(Attributes::obstacles(&self.attributes, done));
        all
    }
}

impl Default for Questions {
    fn default() -> Questions {
        Questions::new()
    }
}

/// What of it changes at every step of the program. The rest mostly stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moving {
    general: Regs,
    #[serde(with = "serde_bytes")]
    xstate: Vec<u8>,
    restart: Restart,
    mask: u64,
    private: Vec<SigInfo>,
    shared: Vec<SigInfo>,
}

impl Moving {
    /// Whether some wait for it.
    pub fn has_signals(&self) -> bool {
        !self.private.is_empty() || !self.shared.is_empty()
    }
}

impl Pcb {
    /// Whether it is root's, in full.
    pub fn is_of_root(&self) -> bool {
        self.credentials.uid == Ids::default()
    }

    pub fn moving(&self) -> Moving {
        Moving {
            general: self.registers.general,
            xstate: self.registers.xstate.clone(),
            restart: self.restart,
            mask: self.signals.mask,
            private: self.signals.private.clone(),
            shared: self.signals.shared.clone(),
        }
    }

    /// What it has become where nothing else has changed.
    #[must_use]
    pub fn moved_on(&self, moving: Moving) -> Pcb {
        let mut pcb = self.clone();
        pcb.registers.general = moving.general;
        pcb.registers.xstate = moving.xstate;
        pcb.restart = moving.restart;
        pcb.signals.mask = moving.mask;
        pcb.signals.private = moving.private;
        pcb.signals.shared = moving.shared;
        pcb
    }

    /// What of it can be restored while the program still runs at the source, and
    /// memory and descriptors of the husk may still change: for that it stays root,
    /// under the limits that it has.
    fn ahead(&self, husk: &Present) -> Pcb {
        Pcb {
            signals: self.signals.ahead(),
            credentials: husk.credentials.clone(),
            limits: husk.limits.clone(),
            attributes: self.attributes.ahead(),
            ..self.clone()
        }
    }
}

/// What a husk is at present: a restore does only what differs from it.
#[derive(Debug, Clone)]
pub struct Present {
    pid: i32,
    credentials: Credentials,
    limits: Limits,
    /// Its signals have their default actions, all of them.
    untouched: bool,
    /// What was restored before.
    restored: Option<Box<Pcb>>,
}

impl Present {
    /// A husk to which nothing was restored yet, looked up ahead of time.
    ///
    /// # Errors
    /// [`Error::Gone`]; those of procfs.
    pub fn fresh(pid: i32) -> Result<Present> {
        let status = Status::read(pid)?;
        Ok(Present {
            pid,
            credentials: husk_credentials(&status),
            limits: Limits::of(pid)?,
            untouched: status.ignored | status.caught == 0,
            restored: None,
        })
    }

    /// Before its address space changes: the kernel writes to the rseq area whenever
    /// the husk executes something, and ends it where nothing is there.
    ///
    /// # Errors
    /// Those of a batch.
    pub fn leave_rseq(&mut self, husk: &mut Stopped) -> Result<()> {
        let Some(restored) = &mut self.restored else {
            return Ok(());
        };
        let without = UserAreas {
            rseq: None,
            ..restored.areas.clone()
        };
        let mut batch = Batch::new();
        without.restore(&mut batch, Some(&restored.areas))?;
        husk.run(batch)?;
        restored.areas = without;
        Ok(())
    }

    /// Whether a husk that was made this can be made something else: it stays root, may
    /// map what it likes, and no signal waits for it.
    fn is_left_free_by(&self, pcb: &Pcb) -> bool {
        pcb.credentials == self.credentials
            && pcb.attributes == pcb.attributes.ahead()
            && self.keeps_room_in(pcb)
            && pcb.signals == pcb.signals.ahead()
    }

    /// Whether calls of ours are still given the memory that they need when all of this
    /// is in force.
    pub fn keeps_room_in(&self, pcb: &Pcb) -> bool {
        !pcb.limits.differ_in_memory(&self.limits)
    }

    /// What [`Backend::restore_likely`] leaves, when nothing more is to be done inside
    /// the husk.
    ///
    /// # Errors
    /// Those of prlimit(2).
    pub fn complete(&mut self, pcb: &Pcb) -> Result<()> {
        pcb.limits.restore_outside(self.pid, &self.limits)?;
        self.limits = pcb.limits.clone();
        Ok(())
    }

    /// Adds what differs, of what is set first.
    fn differs_by(&self, backend: &Backend, pcb: &Pcb, batch: &mut Batch) -> Result<()> {
        let now = self.restored.as_deref();
        pcb.bounds.restore(batch, now.map(|n| &n.bounds))?;
        pcb.attributes.restore(batch, now.map(|n| &n.attributes))?;
        pcb.areas.restore(batch, now.map(|n| &n.areas))?;
        match backend {
            Backend::Ptrace => pcb.signals.restore(batch, self.pid, self.signals()),
            // It sets them by itself.
            Backend::Kmod(_) => Ok(()),
        }
    }

    fn signals(&self) -> signals::Now<'_> {
        match &self.restored {
            Some(pcb) => signals::Now::Known(&pcb.signals),
            None if self.untouched => signals::Now::Defaults,
            None => signals::Now::Unknown,
        }
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

    /// What [`Backend::capture`] need not find out any more, if it is confirmed later;
    /// `answers` are of a stop before.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Bad`].
    pub fn foresee(&self, files: &Kept, answers: Option<Answers>) -> Result<Option<Foreseen>> {
        match self {
            Backend::Ptrace => Foreseen::by(files, answers).map(Some),
            Backend::Kmod(_) => Ok(None),
        }
    }

    /// Captures a stopped process. What cannot be carried and has appeared
    /// since the preflight is found here, or by [`look_again`]. `early` hears what
    /// changes at every step of a program where the rest takes long to ask.
    ///
    /// # Errors
    /// [`Error::Refused`] with every obstacle; [`Error::Gone`]; those of
    /// ptrace and procfs.
    pub fn capture(
        &self,
        stopped: &mut Stopped,
        context: &CaptureContext,
        early: &mut dyn FnMut(Moving) -> Result<()>,
    ) -> Result<Captured> {
        match self {
            Backend::Ptrace => capture_by_ptrace(stopped, context, early),
            Backend::Kmod(k) => Ok(Captured {
                pcb: kmod::capture(k, stopped, context)?,
                answers: None,
            }),
        }
    }

    /// Restores what may be known before the program stops, from what was captured
    /// of it at an earlier stop; [`Backend::restore`] then does what differs. The husk
    /// stays root, and all of it may still change. Returns what became of `batch`.
    ///
    /// # Errors
    /// As [`Backend::restore`].
    pub fn restore_ahead(
        &self,
        husk: &mut Stopped,
        batch: Batch,
        pcb: &Pcb,
        present: &mut Present,
    ) -> Result<Done> {
        let done = self.set(husk, batch, pcb.ahead(present), present)?;
        self.clear_out(husk)?;
        Ok(done)
    }

    /// After something was done inside a husk to which all was restored: what this
    /// backend does not need in there goes, while nobody waits for it.
    ///
    /// # Errors
    /// Those of ptrace.
    pub fn clear_out(&self, husk: &mut Stopped) -> Result<()> {
        match self {
            Backend::Ptrace => Ok(()),
            Backend::Kmod(_) => husk.settle(),
        }
    }

    /// The first beat: all that needs nothing of the program's memory, while
    /// that is on its way. The husk's mappings, descriptors and time namespace
    /// are complete after the calls of `batch`, and it is still root then.
    /// Returns what became of `batch`. Where nothing is left to be done nothing is
    /// executed in the husk.
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
        present: &mut Present,
    ) -> Result<Done> {
        let done = self.set(husk, batch, pcb.clone(), present)?;
        pcb.registers.restore_xstate(husk)?;
        Ok(done)
    }

    /// Makes all of the husk that the process itself and files can set like `pcb`.
    fn set(
        &self,
        husk: &mut Stopped,
        mut batch: Batch,
        pcb: Pcb,
        present: &mut Present,
    ) -> Result<Done> {
        present.differs_by(self, &pcb, &mut batch)?;
        let attributes = present.restored.as_deref().map(|n| &n.attributes);
        let late = |batch: &mut Batch| -> Result<()> {
            let same = pcb.credentials == present.credentials;
            pcb.credentials.restore(batch, &present.credentials)?;
            pcb.attributes
                .restore_late(batch, attributes.filter(|_| same));
            Ok(())
        };
        let mut rest = Batch::new();
        late(&mut rest)?;
        // Limits hold for queues, descriptors and memory of ours too: where any of
        // that is left to be done, they come behind it.
        let nothing_else = batch.is_empty() && rest.is_empty();
        if nothing_else && !pcb.limits.differ_in_memory(&present.limits) {
            pcb.limits.restore_outside(husk.pid(), &present.limits)?;
        } else {
            pcb.limits.restore(&mut batch, &present.limits)?;
            late(&mut batch)?;
        }
        let done = husk.run(batch)?;
        pcb.attributes.restore_outside(husk.pid(), attributes)?;
        present.credentials = pcb.credentials.clone();
        present.limits = pcb.limits.clone();
        present.restored = Some(Box::new(pcb));
        Ok(done)
    }

    /// The first and the second beat of what a husk to which all was restored ahead is
    /// likely to become, but for its limits. If that comes true,
    /// [`Present::complete`] follows, and the third beat; otherwise all three are to be
    /// done. `false`: nothing was done, for it could not be done again.
    ///
    /// # Errors
    /// As [`Backend::restore`].
    pub fn restore_likely(
        &self,
        husk: &mut Stopped,
        pcb: &Pcb,
        clock: ProgramClock,
        present: &mut Present,
    ) -> Result<bool> {
        // The module adds to what is pending.
        if !matches!(self, Backend::Ptrace) || !present.is_left_free_by(pcb) {
            return Ok(false);
        }
        let pcb = Pcb {
            limits: present.limits.clone(),
            ..pcb.clone()
        };
        self.restore(husk, Batch::new(), &pcb, present)?;
        self.prepare(husk, &pcb, clock)?;
        Ok(true)
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

fn capture_by_ptrace(
    stopped: &mut Stopped,
    context: &CaptureContext,
    early: &mut dyn FnMut(Moving) -> Result<()>,
) -> Result<Captured> {
    let pid = stopped.pid();
    let status = Status::again(context.files)?;
    stopped.signals_known(&status);
    let mut obstacles = recheck(stopped, &status);

    // Queues and registers are read before anything of ours has run.
    let restart = Restart::capture(stopped, context.watch);
    let registers = Registers::capture(stopped)?;
    let queues = Signals::queues(stopped, &status)?;
    if let Ok(restart) = &restart {
        early(Moving {
            general: registers.general,
            xstate: registers.xstate.clone(),
            restart: *restart,
            mask: stopped.sigmask(),
            private: queues.private.clone(),
            shared: queues.shared.clone(),
        })?;
    }
    let asked = context.questions;
    let granted = context
        .foreseen
        .and_then(|f| f.answers(&status, context.heap.as_ref()));
    let asked_now = match granted {
        Some(_) => None,
        None => Some(asked.ask(stopped)?),
    };
    let done = granted.or(asked_now.as_ref()).expect("one of them is");

    obstacles.extend(asked.obstacles(done));
    let scheduling = Scheduling::capture(pid)?;
    obstacles.extend(scheduling.obstacles());
    let (bounds, told) = match context.foreseen {
        Some(foreseen) => (foreseen.bounds.clone(), foreseen.told),
        None => (Bounds::from_files(context.files)?, Told::by(context.files)?),
    };
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
    let pcb = Pcb {
        registers,
        areas: UserAreas::capture(stopped, asked.attributes.tid_address(done))?,
        restart,
        signals: Signals::capture(queues, stopped.sigmask(), &asked.signals, done),
        credentials: Credentials::capture(&status, asked.securebits, done),
        limits: Limits::capture(&asked.limits, done),
        scheduling,
        attributes: Attributes::capture(told, &status, &asked.attributes, done),
        bounds: bounds.capture(asked.brk, done),
    };
    let answers = asked_now.map(|done| Answers::new(done, status, pcb.bounds.brk));
    Ok(Captured { pcb, answers })
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
