//! The source's run: a list of phases, readable from top to bottom in
//! [`migrate`].
//!
//! Until `Run::commit` every way out leaves the program running here as if
//! nothing had happened: the guards that hold it ([`Stopped`], [`Hold`]) let it
//! go when they are dropped, and the keeper does it when this process dies.
//! From the commit on the records decide.

mod ahead;
mod commit;
mod files;
mod last;
mod later;
mod notes;
mod preflight;
mod rehearse;
mod send;
mod times;
mod undo;

use std::time::{Duration, Instant};

use crate::checkpoint;
use crate::claim::Claim;
use crate::error::{Context, Error, Obstacle, Result};
use crate::fault::{self, Role};
use crate::hold::{self, Frozen, Hold};
use crate::holder::Holder;
use crate::id::{Id, Secret};
use crate::image::{Final, Preview};
use crate::interrupt;
use crate::journal::{Armed, New};
use crate::keeper::Keeper;
use crate::laps::Laps;
use crate::lineage;
use crate::patience::patience;
use crate::phase::Phase;
use crate::proc::status::Pending;
use crate::proc::Kept;
use crate::protocol::message::{Accepted, Hello, ToSource, ToTarget};
use crate::protocol::{preface, Wire};
use crate::report::{Event, Facts, Failure, Freeze, Outcome, Progress, Summary};
use crate::state::bounds::Bounds;
use crate::state::clock::{self, Clock, Difference, Reading};
use crate::state::fd::{Beat, FdTable, Watch as FdWatch};
use crate::state::memory::{self, Delta, Found, Kernel, Tracker, Tracking, TrackingChoice, PAGE};
use crate::state::paths::FilePath;
use crate::state::pcb::{self, Backend, Captured, MachineFacts, PcbChoice, Questions};
use crate::state::restart::{ProgramClock, Watch as RestartWatch};
use crate::state::signals::Signals;
use crate::sys::memory::keep_in;
use crate::tracee::{open_mem, Ground, Stopped};
use crate::transport::Addr;
use ahead::Ahead;
use files::SourceFiles;
pub use notes::notes;
pub use preflight::preflight;
use preflight::First;
use undo::{abandon, never};

/// How long the target may take to answer while nothing stands still.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same while the program stands still, before the commit.
const FROZEN_PATIENCE: Duration = Duration::from_secs(8);
/// Bytes that are sent within a few milliseconds.
const LITTLE: u64 = 4 << 20;
/// How long a target may take to clear up what it has built in vain.
const PARTING: Duration = Duration::from_secs(1);
/// How long the fate is asked for before a person has to.
const FATE_PATIENCE: Duration = Duration::from_secs(30);

/// What the person who migrates can choose.
#[derive(Debug, Clone)]
pub struct Options {
    pub pcb: PcbChoice,
    pub tracking: TrackingChoice,
    /// Carry over files that are missing at the target or open for writing.
    pub ship: bool,
    /// How long the program may stand still for the last pages.
    pub max_freeze: Duration,
    pub mode: Mode,
    /// It runs on here: only to a file.
    pub stays: bool,
}

/// When memory travels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// Before the freeze; what the program writes faster than the link carries, after
    /// it.
    #[default]
    Auto,
    /// While the program stands still.
    Stop,
    /// Before the freeze, again and again.
    Pre,
    /// After it, when the program asks for it.
    Post,
    /// Once before, and what was written since after it.
    Hybrid,
}

/// Moves a process to the pmig at `addr`.
///
/// # Errors
///
/// [`Failure`] says what went wrong and where the program is now.
pub fn migrate(
    pid: i32,
    addr: &Addr,
    options: &Options,
    progress: &mut dyn Progress,
) -> std::result::Result<Summary, Failure> {
    let begun = Instant::now();
    // What goes into a file waits for nobody.
    let cautious = matches!(addr, Addr::File(_));
    let moved = attempt((pid, addr), options, progress, (begun, cautious));
    let (stopped, error) = match moved {
        Err(Failure {
            error: error @ Error::Changed { .. },
            outcome: Outcome::RunsOn { stopped },
        }) if !cautious => (stopped, error),
        moved => return moved,
    };
    let ms = stopped.as_secs_f64() * 1e3;
    progress.event(&Event::Note {
        text: format!("{error}; it stood still for {ms:.1} ms, and all of it begins again"),
    });
    attempt((pid, addr), options, progress, (begun, true)).map_err(|failure| Failure {
        outcome: match failure.outcome {
            Outcome::NeverStopped => Outcome::RunsOn { stopped },
            outcome => outcome,
        },
        ..failure
    })
}

/// `cautious`: nothing is taken for granted of the program at the freeze.
fn attempt(
    (pid, addr): (i32, &Addr),
    options: &Options,
    progress: &mut dyn Progress,
    (begun, cautious): (Instant, bool),
) -> std::result::Result<Summary, Failure> {
    let mut run =
        Run::hello(pid, addr, options, progress, false).map_err(|error| never(pid, error))?;
    run.cautious = cautious;
    let moved = run.through(begun);
    if let Err(failure) = &moved {
        // Whoever tries again at once shall not find the place taken by what
        // this attempt has built.
        match &failure.error {
            Error::Changed { .. } => run.wire.part(PATIENCE),
            _ if failure.outcome.is_decided_here() => run.wire.part(PARTING),
            _ => {}
        }
    }
    moved
}

/// Whether a process could move, and what stands in its way.
///
/// # Errors
///
/// The process or the target cannot be looked at.
pub fn ask(pid: i32, addr: &Addr, options: &Options) -> Result<Vec<Obstacle>> {
    match Run::hello(pid, addr, options, &mut crate::report::Silent, true) {
        Ok(_) => Ok(Vec::new()),
        Err(Error::Refused(obstacles)) => Ok(obstacles),
        Err(e) => Err(e),
    }
}

struct Run<'a> {
    pid: i32,
    addr: &'a Addr,
    options: &'a Options,
    progress: &'a mut dyn Progress,
    wire: Wire,
    id: Id,
    secret: Secret,
    backend: Backend,
    tracking: Vec<Tracking>,
    /// How long the program was stopped to be followed.
    attach: Duration,
    accepted: Accepted,
    preview: Preview,
    /// The process's files in `/proc`.
    entries: Kept,
    questions: Questions,
    files: SourceFiles,
    descriptors: FdWatch,
    difference: Difference,
    ahead: Ahead,
    rounds: u32,
    /// The last round was small but took its time, or memory follows later and the
    /// target is far: one more look right before the stop.
    slow: bool,
    freeze: Freeze,
    /// For the freeze's parts.
    lap: Instant,
    laps: Laps,
    /// For pages on their way.
    buf: Vec<u8>,
    delta: Delta,
    stopped_at: Option<Reading>,
    _claim: Option<Claim>,
    /// Nothing is taken for granted of the program at the freeze.
    cautious: bool,
    /// Who holds the program's terminals here, if somebody of ours does.
    holder: Option<Holder>,
    /// The table at the freeze, if what was typed is still to be taken.
    last_table: Option<FdTable>,
    /// As captured, and what is pending now.
    signals: Option<(Signals, Pending)>,
    /// Memory may stay behind at the freeze.
    postponed: bool,
    /// Bytes that did, and how long they took to follow.
    left_behind: u64,
    filled: Option<Duration>,
    /// The most memory that the target's pmig had, in bytes.
    peak_there: u64,
}

/// What exists from the build on, and must be undone.
struct Building {
    armed: Armed,
    keeper: Keeper,
    hold: Option<Hold>,
    tracker: Tracker,
    ground: Option<Ground>,
    restart: RestartWatch,
    last: Option<Stopped>,
}

impl<'a> Run<'a> {
    /// Looks at the process, and asks the target whether it would take it.
    fn hello(
        pid: i32,
        addr: &'a Addr,
        options: &'a Options,
        progress: &'a mut dyn Progress,
        ask_only: bool,
    ) -> Result<Run<'a>> {
        progress.event(&Event::Phase {
            phase: Phase::Hello,
        });
        let begun = Instant::now();
        let claim = if ask_only {
            None
        } else {
            Some(Claim::take(pid)?)
        };
        let First {
            descriptors,
            table,
            layout,
        } = First::look(pid)?;
        let backend = Backend::choose(options.pcb)?;
        let tracking = match options.mode {
            Mode::Stop => vec![Tracking::None],
            _ => options.tracking.candidates()?,
        };
        let exe = std::fs::read_link(format!("/proc/{pid}/exe"))
            .context("read the executable of", pid)?;
        let exe = FilePath::new(exe.into_os_string().into_encoded_bytes())?;
        let mut files = SourceFiles::new(pid)?;
        files.note(&exe, &layout, &table.files())?;
        let preview = Preview {
            machine: MachineFacts::here()?,
            kernel: Kernel::here()?,
            needs: pcb::needs(pid)?,
            comm: comm(pid)?,
            exe,
            bounds: Bounds::from_proc(pid)?,
            bytes: memory::resident(pid)?,
            layout,
            descriptors: table,
            files: files.describe()?,
            lineage: lineage::of(pid)?,
        };
        let mut link = checkpoint::connect(addr).map_err(|cause| Error::Link {
            peer: addr.to_string(),
            cause,
        })?;
        preface::open(&mut *link, preface::Kind::Migration)?;
        let mut wire = Wire::new(link);
        wire.set_deadline(patience(PATIENCE))?;
        wire.read_ahead();
        fault::point(Phase::Hello, Role::Source, || wire.link().cut());
        let (id, secret) = (Id::random()?, Secret::random()?);
        wire.send(&ToTarget::Hello(Box::new(Hello {
            id,
            secret: secret.clone(),
            ask_only,
            ship: options.ship,
            pcb: options.pcb,
            preview: preview.clone(),
        })))?;
        let accepted = match answer(&mut wire)? {
            ToSource::Accepted(accepted) => accepted,
            other => return Err(unexpected(&wire, &other)),
        };
        progress.event(&Event::Facts(Facts {
            id: id.to_string(),
            pid,
            comm: preview.comm.clone(),
            processes: 1,
            threads: 1,
            bytes: preview.bytes,
            files: preview.descriptors.holders.len() as u32,
            from: preview.machine.host.clone(),
            to: accepted.host.clone(),
            kernel_from: preview.machine.kernel.clone(),
            kernel_to: accepted.kernel.clone(),
            pcb: backend.name().into(),
            tracking: tracking[0].name().into(),
        }));
        let more = notes::of_terminals(pid, &preview.descriptors)?;
        let more = more
            .into_iter()
            .chain(notes::of_tracking(&tracking, &preview.descriptors));
        for text in accepted.notes.iter().cloned().chain(more) {
            progress.event(&Event::Note { text });
        }
        files.plan(&accepted.ship)?;
        let mut run = Run {
            pid,
            addr,
            options,
            progress,
            wire,
            id,
            secret,
            backend,
            tracking,
            attach: Duration::ZERO,
            accepted,
            preview,
            entries: Kept::of(pid),
            questions: Questions::new(),
            files,
            descriptors,
            difference: Difference::default(),
            ahead: Ahead::default(),
            rounds: 0,
            slow: false,
            freeze: Freeze::default(),
            lap: Instant::now(),
            laps: Laps::new(),
            buf: Vec::new(),
            delta: Delta::default(),
            stopped_at: None,
            _claim: claim,
            cautious: false,
            holder: None,
            last_table: None,
            signals: None,
            postponed: false,
            left_behind: 0,
            filled: None,
            peak_there: 0,
        };
        run.ended(Phase::Hello, "accepted".into(), begun);
        Ok(run)
    }

    /// All that comes after the target's consent.
    fn through(&mut self, begun: Instant) -> std::result::Result<Summary, Failure> {
        let mut building = self.build().map_err(|error| never(self.pid, error))?;
        if let Err(error) = self.copy(&mut building) {
            return Err(self.give_up(building, error));
        }
        let frozen = match self.freeze(&mut building) {
            Ok(frozen) => frozen,
            Err(error) => return Err(self.give_up(building, error)),
        };
        if let Err(error) = self.ready(&mut building, &frozen) {
            return Err(self.thaw(building, frozen, error));
        }
        if self.options.stays {
            return self.stay(building, frozen, begun);
        }
        let committing = match building.armed.commit() {
            Ok(committing) => committing,
            Err(lost) => return Err(self.thaw(building, frozen, lost.into())),
        };
        // The point of no return. What fails from here on is no longer undone by
        // anything but the target's own word.
        let resumed = self.commit(&mut building, &committing);
        self.release(building, frozen, committing, resumed, begun)
    }

    /// Has the husk built, and gets everything ready that may outlive us.
    fn build(&mut self) -> Result<Building> {
        let begun = self.begin(Phase::Build);
        fault::point(Phase::Build, Role::Source, || self.wire.link().cut());
        self.wire.send(&ToTarget::Build)?;
        let hold = Hold::beside(self.pid, self.id)?;
        let armed = Armed::arm(New {
            id: self.id,
            secret: self.secret.clone(),
            pid: self.pid,
            comm: self.preview.comm.clone(),
            peer: self.accepted.host.clone(),
            addr: Some(self.addr.clone()),
            place: hold.place().clone(),
        })?;
        // The kernel takes its time to move a process.
        let (taken, keeper) = std::thread::scope(|scope| {
            let taken = scope.spawn(|| hold.take(self.pid));
            let keeper = Keeper::start(&armed);
            (taken.join(), keeper)
        });
        let mut keeper = keeper?;
        let mut restart = self.backend.watch();
        let prepared = (|| {
            keeper.enter(Phase::Build)?;
            taken.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            let ground = Ground::survey(self.pid)?;
            keep_in();
            self.rehearse();
            restart.before(self.pid);
            keeper.stopped()?;
            let stopped_at = Instant::now();
            let mut stopped = Stopped::seize(self.pid)?.on(ground.clone())?;
            let clock = self.program_clock()?;
            restart.stopped(&stopped, clock)?;
            self.backend.first_stop(&mut stopped)?;
            self.know_ahead(&mut stopped, &restart, clock);
            let tracker = Tracker::attach(&mut stopped, &self.tracking)?;
            stopped.settle()?;
            restart.going_on(&mut stopped)?;
            stopped.detach()?;
            self.attach = stopped_at.elapsed();
            keeper.running()?;
            match answer(&mut self.wire)? {
                ToSource::Built => Ok((ground, tracker)),
                other => Err(unexpected(&self.wire, &other)),
            }
        })();
        let (ground, tracker) = match prepared {
            Ok(all) => all,
            Err(error) => {
                abandon(&armed, keeper, Some(hold), &error.to_string());
                return Err(error);
            }
        };
        self.built(tracker.tracking(), begun);
        Ok(Building {
            armed,
            keeper,
            hold: Some(hold),
            tracker,
            ground: Some(ground),
            restart,
            last: None,
        })
    }

    /// Stops the program and sends all that is left. It stands still from here
    /// on, held by its cgroup.
    fn freeze(&mut self, b: &mut Building) -> Result<Frozen> {
        self.begin(Phase::Freeze);
        interrupt::check()?;
        b.keeper.enter(Phase::Freeze)?;
        b.armed.not_lost()?;
        let ahead = clock::ahead(self.pid)?;
        let pending = Pending::of(self.pid)?;
        let clock = ProgramClock {
            offset: ahead.monotonic,
        };
        // What is typed now waits with the holder.
        self.holder.as_mut().map_or(Ok(()), Holder::hold)?;
        self.send_meanwhile(b)?;
        self.wire.set_deadline(patience(FROZEN_PATIENCE))?;
        self.foresee()?;
        b.keeper.stopped()?;
        let mem = open_mem(self.pid)?;
        b.restart.before(self.pid);
        let before = self.wire.sent;
        let mut stopped = Stopped::seize_with(self.pid, mem, || {
            self.lap = Instant::now();
            self.laps = Laps::new();
            self.stopped_at = Some(Reading::now());
        })?;
        if let Some(ground) = b.ground.take() {
            stopped = stopped.on(ground)?;
        }
        b.restart.stopped(&stopped, clock)?;
        let clock_there = Clock::capture(ahead, self.difference.least());
        self.part("stop");
        fault::point(Phase::Freeze, Role::Source, || self.wire.link().cut());

        // Where nothing but pages can have changed they are looked for while the
        // target restores the rest.
        if stopped.was_written_to() {
            b.tracker.doubt();
        }
        let early = match b.tracker.stands()? {
            true => None,
            false => Some(self.last_look(b, &stopped)?),
        };
        let only_pages = early.as_ref().is_none_or(Found::is_of_pages);
        stopped.stack_lies_at(b.tracker.stack());
        self.part("scan");
        let seen = (only_pages, clock_there);
        let Captured { pcb, answers } =
            self.capture(&mut stopped, &b.restart, clock, seen, b.tracker.heap())?;
        self.part("pcb");
        let beat = match self.cautious {
            true => Beat::Stopped,
            false => Beat::Brief,
        };
        let mut descriptors = self.descriptors.look(beat)?;
        self.descriptors.ask(&mut descriptors, &mut stopped)?;
        self.sync_files(&b.tracker.layout, &descriptors.files())?;
        self.part("descriptors");

        self.signals = Some((pcb.signals.clone(), pending));
        self.send_final(Final {
            pcb,
            descriptors: descriptors.clone(),
            clock: clock_there,
        })?;
        self.laps.add("sent");
        // The stack that was lent for calls is the program's own again.
        stopped.settle()?;
        let found = match early {
            Some(found) => found,
            None => self.last_look(b, &stopped)?,
        };
        self.part("scan");

        // The wire carries them while the target restores the rest.
        let (keeper, mut pages) = (&mut b.keeper, 0);
        self.send_pages(&mut b.tracker, &found, &mut |_, bytes| {
            pages += bytes / PAGE;
            keeper.alive()
        })?;
        b.tracker.owes()?;
        self.part("pages");
        let shipped = self.files.send(&mut self.wire, &mut || b.keeper.alive())?;
        if matches!(self.addr, Addr::File(_)) {
            self.send_pictures();
        }
        self.wire
            .send(&ToTarget::Complete(shipped))
            .map_err(|e| self.better(e))?;
        self.part("files");
        fault::point(Phase::Freeze, Role::Source, || self.wire.link().cut());
        // All is on its way: what stands still can be put in order and looked at
        // meanwhile.
        self.confirm(&mut stopped, answers.is_some())?;
        stopped.settle()?;
        self.files.check_unchanged()?;
        self.descriptors.look_again(&descriptors)?;
        let obstacles = pcb::look_again(&self.entries)?;
        if !obstacles.is_empty() {
            return Err(Error::Refused(obstacles));
        }
        self.part("check");

        let hold = b
            .hold
            .take()
            .ok_or_else(|| Error::bad("migration", "the program is held by nobody"))?;
        let frozen = hold.freeze(hold::PATIENCE)?;
        self.laps.add("held");
        fault::point(Phase::Freeze, Role::Source, || self.wire.link().cut());
        // From here on its cgroup holds it, whatever becomes of us.
        b.restart.going_on(&mut stopped)?;
        if let Err(e) = stopped.detach() {
            b.hold = Some(frozen.thaw()?);
            return Err(e);
        }
        self.part("hold");
        self.freeze.pages = pages;
        self.freeze.bytes = self.wire.sent - before;
        self.last_table = descriptors.awaits_input().then_some(descriptors);
        Ok(frozen)
    }

    /// The target may have said why, before it closed.
    fn better(&mut self, error: Error) -> Error {
        if !matches!(error, Error::Link { .. }) {
            return error;
        }
        let _ = self.wire.set_deadline(Duration::from_secs(1));
        for _ in 0..4 {
            match answer(&mut self.wire) {
                Err(e @ (Error::Peer { .. } | Error::Refused(_))) => return e,
                Err(_) => break,
                Ok(_) => {}
            }
        }
        error
    }
}

/// Hears an answer; a failure there is an error here.
fn answer(wire: &mut Wire) -> Result<ToSource> {
    match wire.recv()? {
        ToSource::Refused(obstacles) => Err(Error::Refused(obstacles)),
        ToSource::Failed(what) => Err(Error::Peer {
            host: wire.peer(),
            what: crate::error::printable(&what),
        }),
        other => Ok(other),
    }
}

fn unexpected(wire: &Wire, message: &ToSource) -> Error {
    let text: String = format!("{message:?}").chars().take(40).collect();
    Error::bad(wire.peer(), format!("answers out of turn: {text}"))
}

fn comm(pid: i32) -> Result<String> {
    let path = format!("/proc/{pid}/comm");
    let text = std::fs::read(&path).context("read", &path)?;
    Ok(String::from_utf8_lossy(&text).trim_end_matches('\n').into())
}
