//! The target's run, the mirror of the source's: a list of phases, readable
//! from top to bottom in [`session`].
//!
//! A session is a process of its own, for one migration. Until COMMITTED is
//! recorded every way out ends the husk; after it the husk is the program, and
//! whoever comes later repeats the thaw.

mod ahead;
mod content;
mod files;
mod holder;
mod later;
mod preflight;
mod rehearse;

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::error::{Error, Obstacle, Result};
use crate::fault::{self, Role};
use crate::fill::Filler;
use crate::hold::{self, Frozen, Hold};
use crate::holder::Adopting;
use crate::husk::Husk;
use crate::image::{Final, Picture};
use crate::journal::{self, Fate, New};
use crate::laps::Laps;
use crate::lineage;
use crate::patience::patience;
use crate::phase::Phase;
use crate::policy::Policy;
use crate::protocol::message::{Hello, Ready, ToSource, ToTarget, MAX_RAW};
use crate::protocol::Wire;
use crate::state::clock::{own_time, Clock, Namespace, Reading};
use crate::state::fd::{FdTable, Opened, Shape};
use crate::state::pcb::{Backend, Present};
use crate::state::restart::ProgramClock;
use crate::sys::limits::raise_descriptors;
use crate::sys::memory::{keep_in, peak};
use crate::sys::pidfd;
use crate::sys::spawn::Parent;
use crate::tracee::Batch;
use crate::transport::Addr;
use ahead::{Ahead, Expected};
use files::TargetFiles;
use preflight::{consider, free_memory};

/// How long the source may take for its next word while its program runs.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a husk waits, ready, for the order to run.
const COMMIT_PATIENCE: Duration = Duration::from_secs(30);
/// How long the last word of a source is waited for.
const LATE: Duration = Duration::from_secs(2);
/// How long this process may do nothing beyond what it may wait for the source.
const GRACE: Duration = Duration::from_secs(10);
/// How long a source that was refused may go on sending before it is cut off.
const DRAIN: Duration = Duration::from_secs(2);
/// How long it may take until nothing is left of a husk, or of what died before.
const BURIAL: Duration = Duration::from_secs(1);

/// What the person who serves can choose.
#[derive(Debug, Clone)]
pub struct Options {
    pub policy: Policy,
    /// The file that stands for the source, if one does.
    pub file: Option<PathBuf>,
}

impl Options {
    /// All that this machine can and may do.
    pub fn open() -> Result<Options> {
        Ok(Options {
            policy: Policy::open()?,
            file: None,
        })
    }
}

/// Takes one process in. The caller has heard the connection's preface. Must
/// run in the main thread of a process of its own.
///
/// # Errors
///
/// What went wrong; the source was told, if it can be reached.
pub fn session(mut wire: Wire, options: &Options) -> Result<()> {
    let r = receive(&mut wire, options);
    if let Err(e) = &r {
        let word = match e {
            Error::Refused(obstacles) => ToSource::Refused(obstacles.clone()),
            Error::Link { .. } => return r,
            e => ToSource::Failed(e.to_string()),
        };
        // A source in the middle of sending hears it only if its bytes are
        // taken.
        if wire.send(&word).is_ok() {
            wire.drain(DRAIN);
        }
    }
    r
}

fn receive(wire: &mut Wire, options: &Options) -> Result<()> {
    allow(wire, PATIENCE)?;
    wire.read_ahead();
    let hello = match wire.recv()? {
        ToTarget::Hello(hello) => hello,
        other => return Err(out_of_turn(wire, &other)),
    };
    fault::point(Phase::Hello, Role::Target, || wire.link().cut());
    let mut files = TargetFiles::new(&hello, &options.policy)?;
    let (accepted, backend) = consider(&hello, &mut files)?;
    wire.send(&ToSource::Accepted(accepted))?;
    if hello.ask_only {
        return Ok(());
    }
    await_build(wire)?;
    let from = options.file.clone().map(Addr::File);
    let mut b = Building::build(&hello, files, from)?;
    fault::point(Phase::Build, Role::Target, || wire.link().cut());
    let r = b
        .copy(&backend, wire)
        .and_then(|last| b.restore(*last, &backend, wire))
        .and_then(|ready| b.ready(ready, wire))
        .and_then(|order| b.record.commit(&order));
    match r {
        Ok(Fate::Committed(committed)) => b.commit(&committed, &hello, wire),
        Ok(Fate::Aborted(_)) => {
            b.abort("somebody aborted it");
            Err(Error::bad(
                "migration",
                "was aborted before the commit came",
            ))
        }
        Err(e) => {
            b.abort(&e.to_string());
            Err(e)
        }
    }
}

/// What exists from the build on.
struct Building {
    husk: Option<Husk>,
    present: Present,
    /// What was restored to it before the program stopped.
    ahead: Option<Ahead>,
    /// What it was made since.
    expected: Option<Expected>,
    /// For the rehearsal.
    stand_in: Option<Husk>,
    time: Namespace,
    /// The program's, once it stands still.
    clock: Option<Clock>,
    hold: Option<Hold>,
    /// The same, once it holds.
    frozen: Option<Frozen>,
    record: journal::Husk,
    files: TargetFiles,
    descriptors: Opened,
    /// The husk's parent, which holds its terminals.
    holder: Option<Adopting>,
    mapped: BTreeMap<u32, OwnedFd>,
    /// For memory that follows later, if some does.
    filler: Option<Filler>,
    postponed_runs: usize,
    /// What of that was touched before the program runs, and its memory.
    touched: Option<(std::fs::File, Vec<Range<u64>>)>,
    /// The process, once its cgroup holds it.
    process: Option<OwnedFd>,
    /// What its terminals show.
    pictures: Vec<Picture>,
    /// For what is received.
    buf: Vec<u8>,
    laps: Laps,
}

impl Building {
    fn build(hello: &Hello, mut files: TargetFiles, from: Option<Addr>) -> Result<Building> {
        let preview = &hello.preview;
        raise_descriptors();
        let hold = Hold::husk(hello.id)?;
        // Where the controller is there, a husk that outgrows the machine dies
        // alone. Lifted when it becomes the program.
        if let Err(e) = hold.set_memory_max(Some(free_memory()?)) {
            tracing::warn!("the husk's memory has no limit: {e}");
        }
        let r =
            (|| {
                let pid = preview.needs.pid;
                let mut holder = Adopting::new()?;
                let its = Hold::holder(hello.id)?;
                let parent = holder.stdin().map(|stdin| Parent {
                    stdin,
                    cgroup: its.fd(),
                    role: "holder",
                });
                let mut husk = Husk::create(pid, Some(hold.fd()), parent, &preview.layout)
                    .map_err(|e| match e.errno() {
                        Some(libc::EEXIST) => Error::Refused(vec![Obstacle::new(
                            format!("pid {pid}"),
                            "it is taken at the target",
                            "end that process there, or try again later",
                        )]),
                        _ => e,
                    })?;
                its.leave();
                // The first to go when memory runs out, until it has its memory.
                let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "1000");
                let new = New {
                    id: hello.id,
                    secret: hello.secret.clone(),
                    pid,
                    comm: preview.comm.clone(),
                    peer: preview.machine.host.clone(),
                    addr: from,
                    place: hold.place().clone(),
                };
                // The disk takes its time.
                let (record, stand_in) = std::thread::scope(|scope| {
                    let arming = scope.spawn(|| journal::Husk::arm(new));
                    let stand_in = Building::stand_in(&preview.layout);
                    (arming.join(), stand_in)
                });
                let record = record.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                // From here on new children would be in it: there are none.
                let time = Namespace::make()?;
                files.create(&record)?;
                let mut mapped = BTreeMap::new();
                files.open_mapped(&preview.layout, &mut mapped)?;
                husk.adopt(&preview.layout, &mapped)?;
                let exe = files.open(&preview.exe)?;
                husk.run_from(exe.as_fd(), &preview.bounds)?;
                husk.stopped().find_way_out()?;
                let present = Present::fresh(pid)?;
                let descriptors = Opened::open(preview.descriptors.clone(), files.opener())?;
                holder.give(pid, hello.id, &descriptors.masters())?;
                Ok((
                    husk,
                    present,
                    stand_in,
                    time,
                    record,
                    descriptors,
                    holder,
                    mapped,
                ))
            })();
        match r {
            Ok((husk, present, stand_in, time, record, descriptors, holder, mapped)) => {
                Ok(Building {
                    husk: Some(husk),
                    present,
                    ahead: None,
                    expected: None,
                    stand_in,
                    time,
                    clock: None,
                    frozen: None,
                    hold: Some(hold),
                    record,
                    files,
                    descriptors,
                    holder: Some(holder),
                    mapped,
                    filler: None,
                    postponed_runs: 0,
                    touched: None,
                    process: None,
                    pictures: Vec::new(),
                    buf: Vec::new(),
                    laps: Laps::new(),
                })
            }
            Err(e) => {
                if let Err(e) = hold.kill() {
                    tracing::warn!("the husk stays: {e}");
                }
                Err(e)
            }
        }
    }

    /// Takes in what is sent, until the last word.
    fn copy(&mut self, backend: &Backend, wire: &mut Wire) -> Result<Box<Final>> {
        wire.send(&ToSource::Built)?;
        keep_in();
        self.buf = vec![0; MAX_RAW];
        // The bulk of the files comes in the first round.
        let mut synced = false;
        let last = loop {
            watch_over(PATIENCE);
            match wire.recv()? {
                ToTarget::Ping => wire.send(&ToSource::Pong(Reading::now()))?,
                ToTarget::Layout(layout) => self.adopt(&layout, backend)?,
                ToTarget::Pages(runs) => self.pages(&runs, wire)?,
                ToTarget::Drops(runs) => self.drop_pages(&runs, backend)?,
                ToTarget::Files(set) => {
                    let wanted = self.files.compare(&set)?;
                    self.files.create(&self.record)?;
                    wire.send(&ToSource::Ship(wanted))?;
                }
                ToTarget::Block { file, offset, len } => self.block(file, offset, len, wire)?,
                ToTarget::PassEnd { file, size } => self.files.end_pass(file, size)?,
                ToTarget::RoundEnd => {
                    fault::point(Phase::Copy, Role::Target, || wire.link().cut());
                    if !std::mem::replace(&mut synced, true) {
                        self.files.sync();
                    }
                    wire.send(&ToSource::RoundDone)?;
                }
                ToTarget::Postpone if self.ahead.is_none() => self.postpone(wire)?,
                ToTarget::Later(runs) => self.later(&runs)?,
                ToTarget::Rehearse(last) => self.rehearse(&last, backend),
                ToTarget::Ahead(known) => self.restore_ahead(*known, backend)?,
                ToTarget::Likely { moving, clock } => {
                    self.expect(*moving, clock, backend)?;
                    fault::point(Phase::Freeze, Role::Target, || wire.link().cut());
                }
                ToTarget::Final(last) => break last,
                ToTarget::Since(since) => break Box::new(self.put_together(*since)?),
                other => return Err(out_of_turn(wire, &other)),
            }
        };
        self.laps = Laps::new();
        fault::point(Phase::Freeze, Role::Target, || wire.link().cut());
        Ok(last)
    }

    /// Makes the husk the program, short of letting it run.
    fn restore(&mut self, last: Final, backend: &Backend, wire: &mut Wire) -> Result<Ready> {
        allow(wire, COMMIT_PATIENCE)?;
        let mut times = Ready::default();
        let mut lap = Instant::now();
        let mut part = |into: &mut u64| {
            let now = Instant::now();
            *into += now.duration_since(lap).as_nanos() as u64;
            lap = now;
        };
        let Final {
            pcb,
            descriptors,
            mut clock,
        } = last;
        let shape = self.open_descriptors(descriptors)?;
        self.find_parent(&pcb)?;
        self.laps.add("files opened");
        let came_true = self.expected.take().filter(|e| {
            let ahead = self.ahead.as_ref();
            let installed = ahead.is_some_and(Ahead::has_descriptors) && shape == Shape::Same;
            installed && e.pcb == pcb && e.clock == clock
        });
        let mut batch = Batch::new();
        let installation = match came_true {
            Some(_) => None,
            None => self.what_differs(&mut clock, shape, &mut batch)?,
        };
        self.clock = Some(clock);
        self.laps.add("descriptors and time");
        part(&mut times.descriptors);

        let clock = ProgramClock {
            offset: clock.ahead.monotonic,
        };
        let keeps_room = self.present.keeps_room_in(&pcb);
        if came_true.is_some() {
            self.present.complete(&pcb)?;
        } else {
            let husk = self.husk.as_mut().ok_or_else(no_husk)?;
            let done = backend.restore(husk.stopped(), batch, &pcb, &mut self.present)?;
            installation.map_or(Ok(()), |i| i.check(&done))?;
        }
        self.laps.add("pcb");
        part(&mut times.pcb);

        let prepare = |husk: &mut Husk| backend.prepare(husk.stopped(), &pcb, clock);
        // Mostly nothing more is to be done inside it, and if so, all of this again.
        let is_prepared = came_true.is_some() || {
            let repeatable = keeps_room && !pcb.moving().has_signals();
            let early = repeatable && self.filler.is_none();
            if early {
                prepare(self.husk()?)?;
                self.laps.add("registers");
            }
            early
        };
        self.rest(wire, is_prepared, prepare)?;
        self.laps.add("last pages");
        part(&mut times.memory);

        let husk = self.husk.as_mut().ok_or_else(no_husk)?;
        backend.finish(husk.stopped(), &pcb, clock)?;
        self.laps.add("scheduling");
        part(&mut times.pcb);

        self.watch_missing()?;
        self.laps.add("missing pages");
        part(&mut times.memory);

        Ok(times)
    }

    fn open_descriptors(&mut self, table: FdTable) -> Result<Shape> {
        let shape = self.descriptors.finish(table, self.files.opener())?;
        let (terminals, record) = (self.descriptors.masters(), self.record.record());
        if let (Some(holder), Shape::Changed) = (&mut self.holder, shape) {
            if !terminals.is_empty() {
                holder.give(record.pid, record.id, &terminals)?;
            }
        }
        Ok(shape)
    }

    /// Says that all is ready, has its cgroup hold it, and waits for the order.
    fn ready(&mut self, times: Ready, wire: &mut Wire) -> Result<journal::Order> {
        if self.descriptors.table().awaits_input() {
            match wire.recv()? {
                ToTarget::Typed(input) => self.descriptors.type_in(&input)?,
                other => return Err(out_of_turn(wire, &other)),
            }
        }
        self.fetch_touched(wire)?;
        self.files.check()?;
        self.holder_lives()?;
        let peak = peak();
        wire.send(&ToSource::Ready(Ready { peak, ..times }))?;
        fault::point(Phase::Ready, Role::Target, || wire.link().cut());
        // While the source hears it. Should it fail, the order is refused.
        self.let_cgroup_hold()?;
        self.descriptors.close();
        fault::point(Phase::Ready, Role::Target, || wire.link().cut());
        match wire.recv()? {
            ToTarget::Commit(order) => {
                self.laps.add("order came");
                self.holder_lives()?;
                Ok(order)
            }
            other => Err(out_of_turn(wire, &other)),
        }
    }

    /// From here on its life hangs on no process of ours.
    fn let_cgroup_hold(&mut self) -> Result<()> {
        let hold = self.hold.take().ok_or_else(no_husk)?;
        self.frozen = Some(hold.freeze(hold::PATIENCE)?);
        let husk = self.husk.take().ok_or_else(no_husk)?;
        self.process = Some(husk.let_go()?);
        self.laps.add("held");
        Ok(())
    }

    /// COMMITTED is recorded: it runs here from now on.
    fn commit(self, committed: &journal::Committed, hello: &Hello, wire: &mut Wire) -> Result<()> {
        fault::point(Phase::Commit, Role::Target, || wire.link().cut());
        let Building {
            mut files,
            descriptors,
            process,
            frozen,
            holder,
            filler,
            mut pictures,
            mut laps,
            clock,
            ..
        } = self;
        laps.add("recorded");
        let placed = files.place();
        laps.add("files in place");
        let held = frozen.ok_or_else(no_husk)?;
        if let Some(Err(e)) = clock.map(|clock| clock.await_it()) {
            tracing::warn!("the program may see a time twice: {e}");
        }
        laps.add("time came");
        let (at, spent) = (Reading::now(), own_time());
        let running = committed.thaw(held)?;
        // Where it shares our processor it goes on at once, and we only after it: the
        // thaw took as long as we have worked for it.
        let at = at.after(own_time() - spent);
        drop(descriptors);
        laps.add("thawed");
        // Before anybody hears that it is here, and has it move on.
        if let Err(e) = lineage::note(hello.preview.needs.pid, &hello.preview.lineage) {
            tracing::warn!("where the program came from is not noted: {e}");
        }
        let told = wire.send(&ToSource::Committed { at });
        fault::point(Phase::Release, Role::Target, || wire.link().cut());
        committed.let_live(running);
        if let Err(e) = committed.keep() {
            tracing::warn!("{e}");
        }
        let mut holder = holder;
        if let Some(Err(e)) = holder.as_mut().map(Adopting::go) {
            tracing::warn!("the program's holder: {e}");
        }
        laps.log("target");
        match filler {
            None => hear_last(wire, process.as_ref(), &mut pictures),
            Some(filler) => later::fill(filler, wire, committed, &mut pictures, &mut |mask| {
                send_late(process.as_ref(), mask);
            })?,
        }
        // Writing files through to the disk takes its time.
        watch_over(PATIENCE);
        files.forget_leftovers();
        if let Some(Err(e)) = holder.map(|h| h.show(pictures)) {
            tracing::warn!("what the program's terminals showed is lost: {e}");
        }
        let placed = placed.and_then(|()| files.clear());
        files.sync();
        placed?;
        committed.settle()?;
        // The source finds out by itself if it was not told.
        told
    }

    /// Ends the husk and clears away what was received.
    fn abort(mut self, why: &str) {
        watch_over(COMMIT_PATIENCE);
        tracing::info!("migration ends without a commit: {why}");
        let ended = self.record.withdraw(why).and_then(|fate| match fate {
            Fate::Aborted(aborted) => {
                aborted.bury()?;
                Ok(Some(aborted))
            }
            Fate::Committed(committed) => {
                // Somebody let it run by hand.
                self.files.keep();
                committed.thaw_again()?;
                Ok(None)
            }
        });
        match (&ended, self.husk.take()) {
            // Who tries again may have its PID.
            (Ok(Some(_)), Some(husk)) => husk.end(BURIAL),
            (_, husk) => drop(husk),
        }
        if let Some(hold) = self.hold.take() {
            if let Err(e) = hold.kill() {
                tracing::debug!("the husk's cgroup: {e}");
            }
        }
        drop(self.files);
        match ended {
            Ok(Some(aborted)) => {
                if let Err(e) = aborted.settle() {
                    tracing::warn!("the record stays open: {e}");
                }
            }
            Ok(None) => {}
            Err(e) => tracing::warn!("the husk may still be held: {e}"),
        }
    }

    fn husk(&mut self) -> Result<&mut Husk> {
        self.husk.as_mut().ok_or_else(no_husk)
    }
}

/// The source may take this long for its next word.
fn allow(wire: &Wire, usual: Duration) -> Result<()> {
    watch_over(usual);
    wire.set_deadline(patience(usual))
}

/// The kernel ends this process unless there is progress within this time
/// (alarm(2)). A session that hangs would hold its husk for good; of one that
/// is dead the records say what to do.
fn watch_over(usual: Duration) {
    let seconds = patience(usual + GRACE).as_secs_f64().ceil();
    nix::unistd::alarm::set(seconds as u32);
}

fn no_husk() -> Error {
    Error::bad("husk", "there is none any more")
}

fn await_build(wire: &mut Wire) -> Result<()> {
    loop {
        match wire.recv()? {
            ToTarget::Ping => wire.send(&ToSource::Pong(Reading::now()))?,
            ToTarget::Build => return Ok(()),
            other => return Err(out_of_turn(wire, &other)),
        }
    }
}

/// Hears what its terminals show, and what was sent to the copy at the source
/// after it was captured.
fn hear_last(wire: &mut Wire, process: Option<&OwnedFd>, pictures: &mut Vec<Picture>) {
    let mut heard = wire.set_deadline(LATE).and_then(|()| wire.recv());
    if let Ok(ToTarget::Pictures(last)) = heard {
        match Picture::check(&last) {
            Ok(()) => *pictures = last,
            Err(e) => tracing::warn!("{e}"),
        }
        heard = wire.recv();
    }
    if let Ok(ToTarget::Late(mask)) = heard {
        send_late(process, mask);
    }
}

fn send_late(process: Option<&OwnedFd>, mask: u64) {
    let Some(process) = process else { return };
    for signal in (1..=64).filter(|s| mask >> (s - 1) & 1 == 1) {
        pidfd::send_signal(process.as_fd(), signal);
    }
}

fn out_of_turn(wire: &Wire, message: &ToTarget) -> Error {
    let text: String = format!("{message:?}").chars().take(40).collect();
    Error::bad(wire.peer(), format!("says out of turn: {text}"))
}
