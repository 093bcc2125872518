//! The holder's life.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{chdir, read, write};

use super::screen::Screen;
use super::setup::{self, Answer, Arrived, Setup};
use super::{make_folder, Ask, Ended, Line, Said, MAX_KEYS};
use crate::error::{Context, Error, Result};
use crate::id::Id;
use crate::image::Picture;
use crate::journal::{self, Fate};
use crate::sys::inherit::close_from;
use crate::sys::tty::{self, Size};
use crate::sys::{pidfd, spawn};

/// The longest message a client may say, in bytes.
const LONGEST_ASK: usize = MAX_KEYS + 256;
/// The longest message of whoever set it up.
const LONGEST_SETUP: usize = 12 << 20;
/// So many may look at once.
const MAX_CLIENTS: usize = 32;
/// Bytes that wait for somebody who looks and is slow; he is shown the screen
/// anew when he has taken them, instead of all that was written meanwhile.
const MAX_BEHIND: usize = 1 << 20;
/// Between the two changes of size that make a program draw itself anew.
const REDRAW: Duration = Duration::from_millis(60);
/// Between two looks at a process that is dead and traced.
const LINGERING: Duration = Duration::from_millis(20);
/// How long those who look may take to hear of the end.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// More than this is not shown behind what comes late.
const MOST_SINCE: usize = 256 << 10;
/// A terminal that no program has open is looked at again so often.
const DORMANT: Duration = Duration::from_millis(500);

/// A terminal that is held.
struct Shown {
    master: OwnedFd,
    screen: Screen,
    size: Size,
    /// Typed, and not taken by the terminal yet.
    keys: VecDeque<u8>,
    /// No program has it open.
    dormant: bool,
    /// Its size is another for a moment.
    redraw: Option<Instant>,
    /// What was written since the program came, as long as it may have to be
    /// shown behind what was written before.
    since: Option<Vec<u8>>,
}

struct Client {
    line: Line,
    sees: Option<usize>,
    holds: bool,
    /// It was shown less than all.
    behind: bool,
    /// It was told of the end.
    told: bool,
    gone: bool,
}

struct Holder {
    pid: i32,
    start: u64,
    process: OwnedFd,
    /// The migration it came by.
    id: Option<Id>,
    terminals: Vec<Shown>,
    clients: Vec<Client>,
    /// To whoever set it up.
    setup: Option<Line>,
    /// The program runs.
    runs: bool,
    /// Somebody is about to look, and must not come too late.
    watched: bool,
    /// What is typed from now on cannot go along any more.
    sealed: bool,
    door: Option<(UnixListener, PathBuf)>,
    ended: Option<Ended>,
}

/// The holder's life. Standard input is the line to whoever set it up.
///
/// # Errors
/// It could not begin.
pub fn run() -> Result<()> {
    close_from(3).context("close", "inherited descriptors")?;
    let mut deaf = SigSet::empty();
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTSTP,
    ] {
        deaf.add(signal);
    }
    deaf.thread_block().context("block", "signals")?;
    spawn::heed_children();
    let stream = setup::detach()?;
    let mut line = Line::new(stream.try_clone().context("take over", "the line")?);
    let first: Setup = line.hear()?;
    let begun = begin(first);
    let answer = match &begun {
        Ok(holder) => Answer::Done(holder.pid),
        Err(e) => Answer::Failed(e.to_string()),
    };
    // Whoever asked may be gone; what was begun goes on.
    let _ = line.say(&answer);
    let mut holder = begun?;
    // Where it was started may be unmounted.
    let _ = chdir("/");
    let _ = fs::write("/proc/self/oom_score_adj", "-500");
    if !holder.runs {
        holder.setup = Some(Line::patient(stream, LONGEST_SETUP)?);
    }
    holder.live();
    Ok(())
}

fn begin(first: Setup) -> Result<Holder> {
    match first {
        Setup::Adopt(arrived) => {
            let mut holder = Holder::of(arrived.pid, Some(arrived.id))?;
            holder.adopt(arrived)?;
            Ok(holder)
        }
        Setup::Start {
            argv,
            size,
            modes,
            watched,
        } => {
            let what = argv.first().map(setup::word).unwrap_or_default();
            let (pid, master) = setup::spawn(&argv, size, modes).context("start", what)?;
            let mut holder = Holder::of(pid, None)?;
            holder.terminals.push(Shown::new(master, size, true)?);
            holder.runs = true;
            holder.watched = watched;
            // Whoever asked for it may look at once.
            holder.open_door()?;
            Ok(holder)
        }
        Setup::Leave | Setup::Go | Setup::Show(_) => {
            Err(Error::bad("holder", "is told to hold nobody"))
        }
    }
}

impl Shown {
    fn new(master: OwnedFd, size: Size, blank: bool) -> Result<Shown> {
        fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("set up", "a terminal")?;
        Ok(Shown {
            master,
            screen: Screen::new(size, blank),
            size,
            keys: VecDeque::new(),
            dormant: false,
            redraw: None,
            since: (!blank).then(Vec::new),
        })
    }

    fn resize(&mut self, size: Size) {
        if size != self.size {
            let _ = tty::set_size(self.master.as_fd(), size);
            self.screen.resize(size);
            self.size = size;
        }
    }

    /// Has the program draw itself anew: what it shows is not known.
    fn ask_to_redraw(&mut self) {
        let other = Size {
            cols: self.size.cols.saturating_sub(1).max(1),
            ..self.size
        };
        let _ = tty::set_size(self.master.as_fd(), other);
        self.redraw = Some(Instant::now() + REDRAW);
    }

    /// What the program wrote, at most so much at a time.
    fn read(&mut self) -> Vec<u8> {
        let mut part = vec![0; 64 << 10];
        match read(&self.master, &mut part) {
            Ok(0) => self.dormant = true,
            Ok(n) => {
                self.dormant = false;
                part.truncate(n);
                self.screen.write(&part);
                if let Some(since) = &mut self.since {
                    since.extend_from_slice(&part);
                    if since.len() > MOST_SINCE {
                        self.since = None;
                    }
                }
                return part;
            }
            Err(Errno::EAGAIN) => self.dormant = false,
            Err(Errno::EINTR) => {}
            // EIO: no program has it open.
            Err(_) => self.dormant = true,
        }
        Vec::new()
    }

    fn type_in(&mut self) {
        while !self.keys.is_empty() {
            match write(&self.master, self.keys.make_contiguous()) {
                Ok(n) => drop(self.keys.drain(..n)),
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }
}

impl Holder {
    fn of(pid: i32, id: Option<Id>) -> Result<Holder> {
        Ok(Holder {
            pid,
            start: journal::start_of(pid)?,
            process: pidfd::open(pid).context("open a handle on", format!("process {pid}"))?,
            id,
            terminals: Vec::new(),
            clients: Vec::new(),
            setup: None,
            runs: false,
            watched: false,
            sealed: false,
            door: None,
            ended: None,
        })
    }

    /// Takes terminals over from the session that made them.
    fn adopt(&mut self, arrived: Arrived) -> Result<()> {
        let session = pidfd::open(arrived.session).context("open", "the session")?;
        let take = |(fd, size)| {
            let master = pidfd::get(session.as_fd(), fd).context("take over", "a terminal")?;
            Shown::new(master, size, false)
        };
        self.terminals = arrived
            .terminals
            .into_iter()
            .map(take)
            .collect::<Result<_>>()?;
        Ok(())
    }

    fn open_door(&mut self) -> Result<()> {
        let path = make_folder()?.join(format!("{}-{}.sock", self.pid, Id::random()?));
        let door = UnixListener::bind(&path).context("listen on", path.display())?;
        door.set_nonblocking(true)
            .context("listen on", path.display())?;
        self.door = Some((door, path));
        Ok(())
    }

    fn live(&mut self) {
        while self.ended.is_none() {
            self.wait();
            self.hear_setup();
            self.let_in();
            self.hear_clients();
            if self.runs {
                (0..self.terminals.len()).for_each(|n| self.pass(n));
            }
            self.look_at_process();
            self.catch_up();
            self.clients.retain(|c| !c.gone);
        }
        self.last_words();
        if let Some((_, path)) = &self.door {
            let _ = fs::remove_file(path);
        }
    }

    /// Waits until there is something to do.
    fn wait(&self) {
        let mut fds = vec![PollFd::new(self.process.as_fd(), PollFlags::POLLIN)];
        let mut timeout = None;
        let mut before = |at: Instant| {
            let left = at.saturating_duration_since(Instant::now());
            timeout = Some(timeout.map_or(left, |t: Duration| t.min(left)));
        };
        if let Some(setup) = &self.setup {
            fds.push(PollFd::new(setup.fd(), PollFlags::POLLIN));
        }
        if let Some((door, _)) = &self.door {
            fds.push(PollFd::new(door.as_fd(), PollFlags::POLLIN));
        }
        let held = self.is_held();
        for shown in self.terminals.iter().filter(|_| self.runs) {
            let mut events = PollFlags::POLLIN;
            if !held && !shown.keys.is_empty() {
                events |= PollFlags::POLLOUT;
            }
            match shown.dormant {
                true => before(Instant::now() + DORMANT),
                false => fds.push(PollFd::new(shown.master.as_fd(), events)),
            }
            shown.redraw.into_iter().for_each(&mut before);
        }
        for client in &self.clients {
            let mut events = PollFlags::empty();
            if self.may_speak(client) {
                events |= PollFlags::POLLIN;
            }
            if client.line.pending() > 0 {
                events |= PollFlags::POLLOUT;
            }
            // The end of one that is not listened to is heard later.
            if !events.is_empty() {
                fds.push(PollFd::new(client.line.fd(), events));
            }
        }
        let timeout = match timeout {
            None => PollTimeout::NONE,
            // Rounded up, or it would be waited for in a loop.
            Some(t) => {
                PollTimeout::try_from(t + Duration::from_millis(1)).unwrap_or(PollTimeout::ZERO)
            }
        };
        let _ = poll(&mut fds, timeout);
    }

    fn is_held(&self) -> bool {
        self.clients.iter().any(|c| c.holds)
    }

    /// Whoever types faster than the program reads has to wait, and whoever asks
    /// and does not listen.
    fn may_speak(&self, client: &Client) -> bool {
        let shown = client.sees.and_then(|n| self.terminals.get(n));
        let full = shown.is_some_and(|t| t.keys.len() + MAX_KEYS > Picture::MOST_KEPT);
        let late = self.sealed && !client.holds && self.is_held();
        !full && !late && client.line.pending() <= MAX_BEHIND
    }

    fn hear_setup(&mut self) {
        let Some(mut setup) = self.setup.take() else {
            return;
        };
        let over = match setup.read() {
            Ok(n) => n == 0,
            Err(e) => e.kind() != io::ErrorKind::WouldBlock,
        };
        match setup.heard() {
            Ok(None) if !over => self.setup = Some(setup),
            Ok(Some(Setup::Adopt(arrived))) => {
                let answer = match self.adopt(arrived) {
                    Ok(()) => Answer::Done(self.pid),
                    Err(e) => Answer::Failed(e.to_string()),
                };
                let _ = setup.queue(&answer).map(|()| setup.flush());
                self.setup = Some(setup);
            }
            Ok(Some(Setup::Leave)) => std::process::exit(0),
            Ok(Some(Setup::Go)) => {
                self.go();
                self.setup = Some(setup);
            }
            Ok(Some(Setup::Show(pictures))) => {
                self.go();
                self.show_before(&pictures);
            }
            // The session is gone; what it began may go on without it.
            Ok(None | Some(Setup::Start { .. })) | Err(_) => {
                self.go();
                self.show_before(&[]);
            }
        }
    }

    fn go(&mut self) {
        if std::mem::replace(&mut self.runs, true) {
            return;
        }
        for shown in &mut self.terminals {
            if let Ok(size) = tty::size(shown.master.as_fd()) {
                shown.size = size;
                shown.screen.resize(size);
            }
        }
        // A program that cannot be looked at is none that cannot run.
        let _ = self.open_door();
    }

    /// What was shown before the program came goes before what it wrote since.
    fn show_before(&mut self, pictures: &[Picture]) {
        for (n, shown) in self.terminals.iter_mut().enumerate() {
            let since = shown.since.take();
            let Some(picture) = pictures.get(n) else {
                continue;
            };
            for key in picture.keys.iter().rev() {
                shown.keys.push_front(*key);
            }
            if let (Some(since), false) = (since, picture.shows.is_empty()) {
                shown.screen = Screen::new(shown.size, true);
                shown.screen.write(&picture.shows);
                shown.screen.write(&since);
                let seeing = self.clients.iter_mut().filter(|c| c.sees == Some(n));
                seeing.for_each(|c| c.behind = true);
            }
        }
    }

    fn let_in(&mut self) {
        let Some((door, _)) = &self.door else { return };
        while let Ok((stream, _)) = door.accept() {
            if self.clients.len() >= MAX_CLIENTS {
                continue;
            }
            let hello = Said::Hello {
                pid: self.pid,
                start: self.start,
                terminals: self.terminals.len() as u32,
            };
            let client = greet(stream, &hello);
            self.clients.extend(client.ok());
        }
    }

    fn hear_clients(&mut self) {
        for n in 0..self.clients.len() {
            if !self.may_speak(&self.clients[n]) {
                continue;
            }
            let client = &mut self.clients[n];
            match client.line.read() {
                Ok(0) => client.gone = true,
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => client.gone = true,
                _ => {}
            }
            while self.may_speak(&self.clients[n]) {
                match self.clients[n].line.heard() {
                    Ok(None) => break,
                    Ok(Some(ask)) => self.answer(n, ask),
                    Err(_) => {
                        self.clients[n].gone = true;
                        break;
                    }
                }
            }
        }
    }

    fn answer(&mut self, n: usize, ask: Ask) {
        let client = &mut self.clients[n];
        let mut terminal = client.sees.and_then(|t| self.terminals.get_mut(t));
        match (ask, &mut terminal) {
            (Ask::Show { terminal, size }, _) => {
                let Some(shown) = self.terminals.get_mut(terminal as usize) else {
                    client.gone = true;
                    return;
                };
                client.sees = Some(terminal as usize);
                if let Some(size) = size {
                    shown.resize(size);
                }
                client.say(&Said::Shown(shown.screen.picture()));
                if !shown.screen.is_known() {
                    shown.ask_to_redraw();
                }
            }
            (Ask::Keys(keys), Some(shown)) => shown.keys.extend(keys),
            (Ask::Resize(size), Some(shown)) => shown.resize(size),
            (Ask::Keys(_) | Ask::Resize(_), None) => client.gone = true,
            (Ask::Wait, _) => {}
            (Ask::Hold, _) => {
                client.holds = true;
                client.say(&Said::Held);
                self.sealed = false;
            }
            (Ask::Pictures, _) => {
                self.sealed = true;
                (0..self.terminals.len()).for_each(|t| self.drain(t));
                let pictures = self.terminals.iter_mut().map(Shown::hand_over).collect();
                self.clients[n].say(&Said::Pictures(pictures));
            }
        }
    }

    /// What the program wrote goes to those who look, what they type to it.
    fn pass(&mut self, n: usize) {
        let held = self.is_held();
        let shown = &mut self.terminals[n];
        let written = shown.read();
        if !held {
            shown.type_in();
        }
        if shown.redraw.is_some_and(|at| Instant::now() >= at) {
            shown.redraw = None;
            let _ = tty::set_size(shown.master.as_fd(), shown.size);
        }
        self.show(n, written);
    }

    /// Reads all that was written.
    fn drain(&mut self, n: usize) {
        for _ in 0..64 {
            let written = self.terminals[n].read();
            if written.is_empty() {
                return;
            }
            self.show(n, written);
        }
    }

    fn show(&mut self, n: usize, written: Vec<u8>) {
        if written.is_empty() {
            return;
        }
        let said = Said::Shown(written);
        for client in self.clients.iter_mut().filter(|c| c.sees == Some(n)) {
            if client.behind || client.line.pending() > MAX_BEHIND {
                client.behind = true;
            } else {
                client.say(&said);
            }
        }
    }

    /// Sends what is taken; whoever has caught up is shown the screen anew.
    fn catch_up(&mut self) {
        for client in &mut self.clients {
            if client.line.flush().is_err() {
                client.gone = true;
            }
            let shown = client.sees.and_then(|n| self.terminals.get(n));
            if let (true, 0, Some(shown)) = (client.behind, client.line.pending(), shown) {
                client.behind = false;
                client.say(&Said::Shown(shown.screen.picture()));
            }
        }
    }

    fn look_at_process(&mut self) {
        match spawn::reap(self.pid) {
            Ok(None) => {
                // Dead, and not given to us yet by who traces it.
                let mut fds = [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)];
                if matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1)) {
                    std::thread::sleep(LINGERING);
                }
            }
            Ok(Some(status)) => self.ended = Some(Ended::of(status)),
            // Somebody made another its parent.
            Err(_) => self.ended = Some(Ended::Code(0)),
        }
    }

    /// Notes how it ended, and tells those who wait for it.
    fn last_words(&mut self) {
        let Some(ended) = self.ended else { return };
        (0..self.terminals.len()).for_each(|n| self.drain(n));
        let left = match ended {
            Ended::Signal(libc::SIGKILL) => journal::left(self.pid, self.start).ok().flatten(),
            _ => None,
        };
        if left.is_none() {
            let _ = self.note(ended);
        }
        let word = match left {
            Some(there) => Said::Left { there },
            None => Said::Ended(ended),
        };
        let until = Instant::now() + LAST_WORDS;
        while Instant::now() < until {
            self.let_in();
            self.hear_clients();
            for client in &mut self.clients {
                // Who is about to look is to see what was written.
                if !client.told && (!self.watched || client.sees.is_some()) {
                    client.told = true;
                    self.watched = false;
                    client.say(&word);
                }
                client.gone |= client.line.flush().is_err();
            }
            self.clients
                .retain(|c| !(c.gone || c.told && c.line.pending() == 0));
            if self.clients.is_empty() && !self.watched {
                break;
            }
            let mut fds: Vec<_> = self.doors().collect();
            let _ = poll(&mut fds, PollTimeout::from(100u8));
        }
    }

    /// What may bring news from those who look.
    fn doors(&self) -> impl Iterator<Item = PollFd<'_>> {
        let door = self.door.iter();
        let door = door.map(|(door, _)| PollFd::new(door.as_fd(), PollFlags::POLLIN));
        let clients = self.clients.iter().map(|c| {
            let going = c.line.pending() > 0;
            let events = if going {
                PollFlags::POLLOUT
            } else {
                PollFlags::POLLIN
            };
            PollFd::new(c.line.fd(), events)
        });
        door.chain(clients)
    }

    fn note(&self, ended: Ended) -> Result<()> {
        let Some(id) = self.id else { return Ok(()) };
        let Some(husk) = journal::see_target(id)? else {
            return Ok(());
        };
        // A husk that never ran did not end.
        if let Some(Fate::Committed(_)) = husk.fate()? {
            let how = serde_json::to_value(ended).map_err(|e| Error::bad("end", e))?;
            husk.note_end(&how)?;
        }
        Ok(())
    }
}

impl Shown {
    /// What it shows, for whoever holds it next, and what was typed.
    fn hand_over(&mut self) -> Picture {
        let mut shows = self.screen.picture();
        if shows.len() > Picture::MOST_SHOWN {
            shows.clear();
        }
        Picture {
            shows,
            keys: self.keys.iter().copied().collect(),
        }
    }
}

impl Client {
    fn say(&mut self, said: &Said) {
        if self.line.queue(said).is_err() || self.line.flush().is_err() {
            self.gone = true;
        }
    }
}

fn greet(stream: UnixStream, hello: &Said) -> Result<Client> {
    let mut client = Client {
        line: Line::patient(stream, LONGEST_ASK)?,
        sees: None,
        holds: false,
        behind: false,
        told: false,
        gone: false,
    };
    client.say(hello);
    Ok(client)
}
