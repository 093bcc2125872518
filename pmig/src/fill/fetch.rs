//! The filler: asks for missing pages, and puts them in their place.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use super::guard::{Guard, Program};
use super::log::{Change, Log};
use serde_json::Value;

use crate::error::{Context, Error, Obstacle, Result};
use crate::id::Id;
use crate::journal::{self, Fate, Found, Looked};
use crate::patience::patience;
use crate::protocol::message::{ToSource, ToTarget, MAX_RAW};
use crate::protocol::Wire;
use crate::state::memory::{page_of, Ranges, BOTTOM, PAGE, TOP};
use crate::sys::limits::raise_descriptors;
use crate::sys::uffd::{self, Message};

/// How long the source may take for its next word.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes asked for at once, the fewest and the most. A page that the program waits
/// for may come behind as many as are on their way.
const PIECE: Range<u64> = 64 << 10..MAX_RAW as u64;
/// A piece takes the link about this long.
const PIECE_TIME: Duration = Duration::from_millis(2);
/// The fewest and the most bytes on their way.
const WINDOW: Range<u64> = 4 * PIECE.start..16 << 20;
/// What else may be on its way, for the machines' own slowness.
const SLACK: Duration = Duration::from_millis(2);
/// How much more than that, to find out what the link carries.
const GAIN: f64 = 1.5;
/// A program that has waited for nothing for this long need not be spared as much:
/// each piece costs both machines the same, however small it is.
const CALM: Duration = Duration::from_millis(20);
/// By how much pieces, and what is on its way, are larger then.
const CALM_GAIN: u64 = 4;
/// Pages asked for before their turn, at most.
const MOST_URGENT: usize = 1024;

/// Fills the memory of a program that runs already.
pub struct Filler {
    /// By number: the program's, and its children's. None: it has ended.
    spaces: Vec<Option<OwnedFd>>,
    /// Where background goes on, by space.
    cursors: Vec<u64>,
    log: Log,
    guard: Guard,
    program: Program,
    /// On their way, as addresses at the source, in the order they were asked for.
    asked: VecDeque<(Range<u64>, Instant)>,
    asked_for: Ranges,
    /// Waited for by the program, as addresses at the source.
    urgent: VecDeque<u64>,
    /// To be made pages of zeros: space and address.
    zeros: Vec<(usize, u64)>,
    pace: Pace,
    buf: Vec<u8>,
}

impl Filler {
    /// With the guard that holds the same.
    pub fn new(log: Log, guard: Guard, spaces: Vec<Option<OwnedFd>>) -> Result<Filler> {
        Ok(Filler {
            cursors: vec![0; spaces.len()],
            spaces,
            program: Program::of(guard.id())?,
            log,
            guard,
            asked: VecDeque::new(),
            asked_for: Ranges::default(),
            urgent: VecDeque::new(),
            zeros: Vec::new(),
            pace: Pace::new(),
            buf: vec![0; PIECE.end as usize],
        })
    }

    /// What was left behind is needed at once, and sent in another way.
    pub fn is_there(&mut self, run: Range<u64>) -> Result<()> {
        self.log.note(0, &Change::Gone(run))
    }

    /// Bytes still missing.
    pub fn missing(&self) -> u64 {
        self.log.missing().iter().map(|m| m.len()).sum()
    }

    /// Notes what is missing, before anything of it is touched.
    pub fn leave_behind(&mut self, run: Range<u64>) -> Result<()> {
        self.log.note(0, &Change::Missing(run))
    }

    /// Where the program misses memory, in order.
    pub fn left_behind(&self) -> Vec<Range<u64>> {
        self.log
            .missing()
            .first()
            .map_or_else(Vec::new, |m| m.runs())
    }

    /// The program's own userfaultfd.
    pub fn uffd(&self) -> Result<&OwnedFd> {
        let own = self.spaces.first().and_then(Option::as_ref);
        own.ok_or_else(|| Error::bad("userfaultfd", "is gone"))
    }

    /// What the predecessor read counts, and whoever waits asks again.
    fn catch_up(&mut self) -> Result<()> {
        let (space, events) = self.log.unread();
        for (at, event) in events {
            match event {
                // The guard has the child's, if that is held at all.
                Message::Fork(_) if self.spaces.len() > self.log.missing().len() => {
                    self.log.note_event(space, at, &Change::Forked)?;
                }
                Message::Fork(_) => {
                    return Err(Error::bad(
                        "filling memory",
                        "its process died in the very moment of a fork: the child's memory \
                         cannot be known, so the program and its children stay frozen",
                    ))
                }
                event => self.act(space, at, event)?,
            }
        }
        self.log.acted()?;
        self.spaces.resize_with(self.log.missing().len(), || None);
        self.cursors.resize(self.spaces.len(), 0);
        for space in 0..self.spaces.len() {
            if self.spaces[space].is_none() && !self.log.missing()[space].is_empty() {
                self.ended(space)?;
            }
            self.events(space)?;
            if let Some(fd) = &self.spaces[space] {
                let _ = uffd::wake(fd, BOTTOM, TOP - BOTTOM);
            }
        }
        Ok(())
    }

    /// Fills until nothing is missing. `hear` gets what else the source says, `tick`
    /// is called at least every second.
    ///
    /// # Errors
    /// The connection broke, or the source speaks nonsense. The guard goes on holding
    /// the program's memory, and freezes it when this process ends.
    pub fn run(
        mut self,
        wire: &mut Wire,
        committed: &journal::Committed,
        hear: &mut dyn FnMut(ToTarget),
        tick: &mut dyn FnMut(&Wire),
    ) -> Result<()> {
        wire.set_deadline(patience(PATIENCE))?;
        let mut heard = Instant::now();
        while self.missing() > 0 {
            self.ask(wire)?;
            let (source, guard, spaces) = self.wait(wire)?;
            if guard {
                self.renew_guard();
            }
            for space in spaces {
                self.events(space)?;
            }
            self.make_zeros()?;
            if source {
                heard = Instant::now();
                match wire.recv()? {
                    ToTarget::Piece { start, len, zero } => {
                        self.piece(start, len, zero, wire)?;
                    }
                    other => hear(other),
                }
            } else if heard.elapsed() > patience(PATIENCE) && !self.asked.is_empty() {
                return Err(Error::Deadline {
                    what: format!("missing memory from {}", wire.peer()),
                    after: heard.elapsed(),
                });
            }
            tick(wire);
        }
        // In this order: whoever dies in between leaves a program that runs.
        committed.filled()?;
        self.guard.done();
        // Nobody watches the program any more who would keep it from moving on.
        drop(self.spaces);
        wire.send(&ToSource::Whole)
    }

    /// Asks for more: what is waited for first, and of the rest as much as may be on
    /// its way.
    fn ask(&mut self, wire: &mut Wire) -> Result<()> {
        let mut pieces = Vec::new();
        let now = Instant::now();
        let mut take = |piece: Range<u64>, asked: &mut VecDeque<_>, asked_for: &mut Ranges| {
            pieces.push((piece.start, (piece.end - piece.start) as u32));
            asked_for.insert(piece.clone());
            asked.push_back((piece, now));
        };
        while let Some(page) = self.urgent.pop_front() {
            if !self.asked_for.contains(page) {
                take(page..page + PAGE, &mut self.asked, &mut self.asked_for);
            }
        }
        for space in 0..self.spaces.len() {
            while self.asked_for.len() < self.pace.window() {
                let missing = &self.log.missing()[space];
                let Some((piece, on)) =
                    missing.next(self.cursors[space], self.pace.piece(), &self.asked_for)
                else {
                    break;
                };
                self.cursors[space] = on;
                take(piece, &mut self.asked, &mut self.asked_for);
            }
        }
        if pieces.is_empty() {
            return Ok(());
        }
        wire.send(&ToSource::Want(pieces))
    }

    /// Waits for the source, the guard's death, or events of a space.
    fn wait(&self, wire: &Wire) -> Result<(bool, bool, Vec<usize>)> {
        let mut fds = vec![
            PollFd::new(wire.link().fd(), PollFlags::POLLIN),
            PollFd::new(self.guard.line().link().fd(), PollFlags::POLLIN),
        ];
        let mut numbers = Vec::new();
        for (n, fd) in self.spaces.iter().enumerate() {
            if let Some(fd) = fd {
                fds.push(PollFd::new(fd.as_fd(), PollFlags::POLLIN));
                numbers.push(n);
            }
        }
        let said = wire.is_ahead();
        let within = if said { 0u8 } else { 200 };
        match poll(&mut fds, PollTimeout::from(within)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("wait for", "missing memory"),
        }
        let came = |n: usize| fds[n].any() == Some(true);
        let spaces = numbers.iter().enumerate();
        let spaces = spaces.filter(|(n, _)| came(n + 2)).map(|(_, s)| *s);
        Ok((said || came(0), came(1), spaces.collect()))
    }

    /// Acts on all that happened to a space.
    fn events(&mut self, space: usize) -> Result<()> {
        loop {
            let Some(fd) = &self.spaces[space] else {
                return Ok(());
            };
            let events = self.log.read(space, fd)?;
            if events.is_empty() {
                return Ok(());
            }
            for (at, event) in events {
                self.act(space, at, event)?;
            }
            self.log.acted()?;
        }
    }

    /// `at`: the place where the event was read.
    fn act(&mut self, space: usize, at: usize, event: Message) -> Result<()> {
        let wake = |fds: &[Option<OwnedFd>], r: Range<u64>| {
            if let Some(fd) = &fds[space] {
                let _ = uffd::wake(fd, r.start, r.end - r.start);
            }
        };
        match event {
            Message::Fault(page) => match self.log.missing()[space].source_of(page) {
                Some(source) => {
                    self.pace.waits();
                    // What it touches next is likely behind it.
                    self.cursors[space] = page + PAGE;
                    if self.urgent.len() < MOST_URGENT {
                        self.urgent.push_back(source);
                    }
                }
                None => self.zeros.push((space, page)),
            },
            Message::Gone(r) => {
                self.log.note_event(space, at, &Change::Gone(r.clone()))?;
                // Another thread may wait for what will not come.
                wake(&self.spaces, r);
            }
            Message::Moved { from, to, len } => {
                self.log
                    .note_event(space, at, &Change::Moved { from, to, len })?;
                wake(&self.spaces, from..from + len);
            }
            Message::Fork(fd) => {
                let child = uffd::adopt(fd);
                let told = self.guard.child(&child);
                self.log.note_event(space, at, &Change::Forked)?;
                self.spaces.push(Some(child));
                self.cursors.push(0);
                if told.is_err() {
                    self.renew_guard();
                }
            }
        }
        Ok(())
    }

    /// Pages that are touched and were never anything but zeros.
    fn make_zeros(&mut self) -> Result<()> {
        for (space, page) in std::mem::take(&mut self.zeros) {
            // Faults are told before what was moved there meanwhile.
            if let Some(source) = self.log.missing()[space].source_of(page) {
                self.urgent.push_back(source);
                continue;
            }
            let Some(fd) = &self.spaces[space] else {
                continue;
            };
            let done = uffd::zero(fd, page, PAGE);
            match done.map_err(|e| errno(&e)) {
                Ok(_) => {}
                Err(Errno::EAGAIN) => {
                    self.zeros.push((space, page));
                    self.events(space)?;
                }
                Err(Errno::ESRCH) => self.ended(space)?,
                // It is there, or no memory any more: who waits shall look again.
                Err(Errno::EEXIST | Errno::ENOENT) => {
                    let _ = uffd::wake(fd, page, PAGE);
                }
                Err(e) => return Err(e).context("fill memory at", format_args!("{page:#x}")),
            }
        }
        Ok(())
    }

    /// A piece has come.
    fn piece(&mut self, start: u64, len: u32, zero: bool, wire: &mut Wire) -> Result<()> {
        let range = start..start.saturating_add(len.into());
        let asked = match self.asked.pop_front() {
            Some((asked, at)) if asked == range => at,
            _ => {
                return Err(Error::bad(
                    wire.peer(),
                    "sends memory that nobody asked for",
                ))
            }
        };
        let mut buf = std::mem::take(&mut self.buf);
        let bytes = &mut buf[..len as usize];
        if zero {
            bytes.fill(0);
        } else {
            wire.recv_raw(bytes)?;
        }
        self.pace.came(asked, u64::from(len));
        let mut done = Ok(());
        for space in 0..self.spaces.len() {
            done = done.and_then(|()| self.fill(space, &range, bytes));
        }
        self.buf = buf;
        self.asked_for.remove(range);
        done
    }

    fn fill(&mut self, space: usize, range: &Range<u64>, bytes: &[u8]) -> Result<()> {
        let (mut most, mut absent) = (u64::MAX, None);
        loop {
            // Looked up anew each time: what is read meanwhile may change it.
            let places = self.log.missing()[space].places(range.clone());
            let (Some((place, offset)), Some(fd)) =
                (places.into_iter().next(), &self.spaces[space])
            else {
                return Ok(());
            };
            let len = (place.end - place.start).min(most);
            let bytes = &bytes[offset as usize..(offset + len) as usize];
            let first = page_of(place.start);
            match uffd::copy(fd, place.start, bytes).map_err(|e| errno(&e)) {
                Ok(n) => self
                    .log
                    .note(space, &Change::Gone(place.start..place.start + n))?,
                Err(Errno::EAGAIN) => self.events(space)?,
                // Copied by one who died before it could be noted.
                Err(Errno::EEXIST) => {
                    let _ = uffd::wake(fd, first.start, PAGE);
                    self.log.note(space, &Change::Gone(first))?;
                }
                // Part of it may be another mapping by now (mprotect(2)).
                Err(Errno::ENOENT) if len > PAGE => most = PAGE,
                // What happens to it may be told only now.
                Err(Errno::ENOENT) if absent.replace(first.start) != Some(first.start) => {
                    self.events(space)?;
                }
                Err(Errno::ENOENT) => {
                    let _ = uffd::wake(fd, first.start, PAGE);
                    self.events(space)?;
                    if self.log.missing()[space].source_of(first.start).is_some() {
                        self.log.note(space, &Change::Gone(first))?;
                    }
                }
                Err(Errno::ESRCH) => self.ended(space)?,
                Err(e) => {
                    return Err(e).context("fill memory at", format_args!("{:#x}", place.start))
                }
            }
        }
    }

    /// The process with that address space is no more.
    fn ended(&mut self, space: usize) -> Result<()> {
        self.spaces[space] = None;
        self.guard.ended(space);
        self.log.note(space, &Change::Gone(0..u64::MAX))
    }

    /// The guard died: the program stands still until there is another one.
    fn renew_guard(&mut self) {
        self.program.stop();
        loop {
            let spaces: Vec<Option<&OwnedFd>> = self.spaces.iter().map(Option::as_ref).collect();
            match Guard::start(self.guard.id(), &self.log, &spaces) {
                Ok(guard) => {
                    tracing::info!("the guard of missing memory died; there is another one");
                    self.guard = guard;
                    break;
                }
                // Ending would lose the memory for good.
                Err(e) => tracing::error!("the program stands still: {e}"),
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        self.program.go_on();
    }
}

fn errno(e: &io::Error) -> Errno {
    Errno::from_raw(e.raw_os_error().unwrap_or(0))
}

/// How much may be on its way: as much as the link carries within a round trip,
/// and little more, lest what the program waits for waits behind it.
struct Pace {
    round_trip: Duration,
    /// Bytes per second.
    rate: f64,
    bytes: u64,
    since: Instant,
    /// When the program last waited for a page.
    waited: Instant,
}

impl Pace {
    /// A rate is measured over this time.
    const SPAN: Duration = Duration::from_millis(50);

    fn new() -> Pace {
        Pace {
            round_trip: Duration::MAX,
            rate: 0.0,
            bytes: 0,
            since: Instant::now(),
            waited: Instant::now(),
        }
    }

    /// The program waits for a page.
    fn waits(&mut self) {
        self.waited = Instant::now();
    }

    fn gain(&self) -> u64 {
        if self.waited.elapsed() < CALM {
            1
        } else {
            CALM_GAIN
        }
    }

    fn came(&mut self, asked: Instant, bytes: u64) {
        self.round_trip = self.round_trip.min(asked.elapsed());
        self.bytes += bytes;
        let elapsed = self.since.elapsed();
        if elapsed >= Self::SPAN {
            let now = self.bytes as f64 / elapsed.as_secs_f64();
            // It rises at once and falls slowly: who is asked for little carries
            // little.
            self.rate = now.max(self.rate * 0.9);
            (self.bytes, self.since) = (0, Instant::now());
        }
    }

    fn piece(&self) -> u64 {
        let bytes = (self.rate * PIECE_TIME.as_secs_f64()) as u64 * self.gain();
        (bytes & !(PAGE - 1)).clamp(PIECE.start, PIECE.end)
    }

    fn window(&self) -> u64 {
        if self.rate == 0.0 {
            return WINDOW.start;
        }
        let time = self.round_trip.min(Duration::from_secs(1)) + SLACK;
        // More than was carried, or it could never be seen that more can be.
        let bytes = (self.rate * time.as_secs_f64() * GAIN) as u64 * self.gain();
        bytes.clamp(WINDOW.start, WINDOW.end)
    }
}

/// What a connection of a source is for that has to send memory still: its first
/// message says of which migration. `place` puts shipped files that were noted into
/// their places, as often as it is called.
///
/// # Errors
/// It cannot be gone on with; the source was told.
pub fn take_over(wire: &mut Wire, place: &dyn Fn(&Value) -> Result<()>) -> Result<()> {
    raise_descriptors();
    wire.set_deadline(patience(PATIENCE))?;
    let (id, secret) = match wire.recv()? {
        ToTarget::Resume { id, secret } => (id, secret),
        _ => return Err(Error::bad(wire.peer(), "speaks out of turn")),
    };
    let unknown = |why: &str| {
        Error::Refused(vec![Obstacle::new(
            format!("migration {id}"),
            why.to_owned(),
            "look there with pmig ps",
        )])
    };
    let r = match journal::look(id, &secret) {
        Ok(Looked::Decided(Fate::Committed(committed))) => match committed.filling() {
            // It ended, and needs nothing any more.
            Ok(true) if Program::of(id)?.has_ended() => {
                committed.filled()?;
                return wire.send(&ToSource::Whole);
            }
            Ok(true) => resume(id, &committed, wire, place),
            Ok(false) => return wire.send(&ToSource::Whole),
            Err(e) => Err(e),
        },
        Ok(Looked::Unknown(why)) => Err(unknown(&why)),
        Ok(Looked::Lost) => Err(unknown("what was decided there is lost")),
        Ok(_) => Err(unknown("was not committed here")),
        Err(e) => Err(e),
    };
    let _ = match &r {
        Ok(()) => Ok(()),
        Err(Error::Refused(why)) => wire.send(&ToSource::Refused(why.clone())),
        Err(e) => wire.send(&ToSource::Failed(e.to_string())),
    };
    r
}

fn resume(
    id: Id,
    committed: &journal::Committed,
    wire: &mut Wire,
    place: &dyn Fn(&Value) -> Result<()>,
) -> Result<()> {
    let (guard, log, spaces) = Guard::take_over(id).map_err(|e| lost_or(e, id))?;
    // Whoever was to do it may have died between the commit and that.
    if let Some(noted) = committed.files()? {
        place(&noted)?;
    }
    let mut filler = Filler::new(log, guard, spaces)?;
    filler.catch_up()?;
    filler.make_zeros()?;
    filler.guard.ready()?;
    filler.run(wire, committed, &mut |_| {}, &mut |_| {})
}

/// There is no guard: for good, where nobody holds the record either.
fn lost_or(e: Error, id: Id) -> Error {
    match journal::open_target(id) {
        Ok(Found::Mine(_)) => Error::Refused(vec![Obstacle::new(
            format!("memory of migration {id}"),
            "both processes that filled it are dead, and what it missed is lost there",
            "the program stays frozen there; end it",
        )]),
        _ => e,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_is_on_its_way_while_the_program_waits_for_pages() {
        let mut pace = Pace::new();
        pace.rate = 100e6;
        pace.round_trip = Duration::from_millis(1);
        let (piece, window) = (pace.piece(), pace.window());
        pace.waited = Instant::now() - CALM;
        assert!(pace.piece() > 2 * piece && pace.window() > 2 * window);
        pace.waits();
        assert_eq!((pace.piece(), pace.window()), (piece, window));
        pace.rate = 1e12;
        pace.waited = Instant::now() - CALM;
        assert_eq!((pace.piece(), pace.window()), (PIECE.end, WINDOW.end));
    }
}
