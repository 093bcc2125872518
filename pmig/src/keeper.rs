//! The keeper: a small process that outlives pmig and sees to it that the
//! program is never left stopped.
//!
//! It is started before anything is stopped, in a session of its own, and hears
//! from pmig over a socket. When pmig dies, or stays silent while the program
//! stands still, the keeper aborts the migration if nothing was committed, and
//! otherwise asks the target. It competes with pmig for the record (see
//! [`crate::journal`]), so whichever is first, both act on the same decision.
//! If it dies too, the next pmig command does its work ([`crate::resolve`]).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{kill, SigSet, Signal};
use nix::unistd::{dup2_stdin, dup2_stdout, getppid, setsid, Pid};

use crate::error::{Context, Error, Result};
use crate::fault::{self, Role};
use crate::fill;
use crate::id::Id;
use crate::journal::{self, run_dir, Armed, Folder, Found, Stage};
use crate::patience::{patience, KEEPER};
use crate::phase::Phase;
use crate::resolve::{self, Now};
use crate::state::fd::Passage;
use crate::sys::inherit::close_from;
use crate::sys::pidfd;
use crate::sys::sched::{self, SchedAttr};

/// pmig may be silent so many times longer after COMMITTING, when nothing can
/// be undone and it is asking the target itself.
const COMMIT_FACTOR: u32 = 3;

/// How long the target is asked after pmig's death, before a later command or a
/// person has to.
const ASK_FOR: Duration = Duration::from_secs(60);

/// How long a keeper may take to start.
const START: Duration = Duration::from_secs(10);

/// How long it may take to let go when all is settled.
const END: Duration = Duration::from_secs(2);

/// More often than this it need not hear that there is progress.
const EVERY: Duration = Duration::from_millis(200);

const READY: u8 = b'k';
const STOPPED: u8 = b's';
const RUNNING: u8 = b'r';
const ALIVE: u8 = b'.';
const DONE: u8 = b'd';

/// pmig's end of the line to its keeper. Dropped without [`Keeper::done`], the
/// keeper does by the records what is left to do.
#[derive(Debug)]
pub struct Keeper {
    line: UnixStream,
    child: Option<Child>,
    /// The keeper has it too.
    passage: Passage,
    log: PathBuf,
    /// When it last heard from us.
    said: Instant,
}

impl Keeper {
    /// Starts a keeper for an armed migration and waits until it watches.
    /// Before anything is stopped.
    pub fn start(armed: &Armed) -> Result<Keeper> {
        Keeper::start_from(Path::new("/proc/self/exe"), armed)
    }

    /// The same with another executable than our own.
    pub fn start_from(exe: &Path, armed: &Armed) -> Result<Keeper> {
        let id = armed.record().id;
        Folder::at(&run_dir())?;
        let log = log_of(id);
        let out = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&log)
            .context("open", log.display())?;
        let (line, theirs) = UnixStream::pair().context("make", "a socket for the keeper")?;
        let passage = Passage::new()?;
        let [read, write] = [&passage.read, &passage.write].map(|fd| fd.as_raw_fd().to_string());
        let child = Command::new(exe)
            .arg0("pmig")
            .args(["keeper", &id.to_string(), &read, &write])
            .stdin(OwnedFd::from(theirs))
            // Where it says what became of the program if pmig no longer can.
            .stdout(
                io::stderr()
                    .as_fd()
                    .try_clone_to_owned()
                    .map_or_else(|_| Stdio::null(), Stdio::from),
            )
            .stderr(out)
            .current_dir("/")
            .spawn()
            .context("start", "the keeper")?;
        let mut keeper = Keeper {
            line,
            child: Some(child),
            passage,
            log,
            said: Instant::now(),
        };
        let mut word = [0];
        keeper
            .line
            .set_read_timeout(Some(START))
            .and_then(|()| keeper.line.read_exact(&mut word))
            .context("wait for the keeper, whose log is", keeper.log.display())?;
        keeper
            .line
            .set_nonblocking(true)
            .context("set up", "the line to the keeper")?;
        Ok(keeper)
    }

    /// Where typed input passes, so that it is never in pmig alone.
    pub fn passage(&self) -> &Passage {
        &self.passage
    }

    /// A phase begins.
    ///
    /// # Errors
    /// The keeper is dead. Up to [`Phase::Ready`] the migration must then be
    /// aborted; later it goes on without.
    pub fn enter(&mut self, phase: Phase) -> Result<()> {
        let number = Phase::ALL.iter().position(|p| *p == phase).unwrap_or(0);
        self.say(b'0' + number as u8)
    }

    /// From now on the program stands still: if pmig is silent for too long,
    /// it dies and the program goes on.
    pub fn stopped(&mut self) -> Result<()> {
        self.say(STOPPED)
    }

    /// The program runs again.
    pub fn running(&mut self) -> Result<()> {
        self.say(RUNNING)
    }

    /// There is progress. Wanted at least every second while the program stands
    /// still; cheap enough to be called for every message sent.
    ///
    /// # Errors
    /// The keeper is dead.
    pub fn alive(&mut self) -> Result<()> {
        if self.said.elapsed() < EVERY {
            return Ok(());
        }
        self.say(ALIVE)
    }

    /// All is settled. Waits until the keeper has let go; it may live on for a
    /// while to tell the target.
    pub fn done(mut self) {
        let _ = self.say(DONE);
        let let_go = self
            .line
            .set_nonblocking(false)
            .and_then(|()| self.line.set_read_timeout(Some(END)))
            .and_then(|()| self.line.read(&mut [0]));
        let Some(mut child) = self.child.take() else {
            return;
        };
        if let_go.is_err() {
            tracing::debug!("the keeper does not end by itself");
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn say(&mut self, word: u8) -> Result<()> {
        self.said = Instant::now();
        match self.line.write(&[word]) {
            Ok(_) => Ok(()),
            // It doesn't listen just now; that is its matter.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(_) => Err(Error::bad(
                "keeper",
                format!("it cannot be reached any more; see {}", self.log.display()),
            )),
        }
    }
}

fn log_of(id: Id) -> PathBuf {
    run_dir().join(format!("keeper-{id}.log"))
}

/// Why the keeper must act.
enum Call {
    /// pmig said that all is settled.
    Done,
    /// Its end of the line is closed.
    Silent,
    /// It is there and does nothing.
    Stalled,
}

/// The keeper's life. Standard input is the line to pmig.
///
/// # Errors
/// The program stays held, or could not be let go; the log says why.
pub fn run(id: Id, passage: [i32; 2]) -> Result<()> {
    close_from(3).context("close", "inherited descriptors")?;
    let mut deaf = SigSet::empty();
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGQUIT,
        Signal::SIGTSTP,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ] {
        deaf.add(signal);
    }
    deaf.thread_block().context("block", "signals")?;
    let _ = setsid();
    // Not killed for memory it doesn't use, where that may be asked.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    // Woken by pmig it waits its turn: pmig has more urgent things to do.
    if let Ok(attr) = sched::getattr(0) {
        if attr.policy == libc::SCHED_OTHER as u32 {
            let policy = libc::SCHED_BATCH as u32;
            let _ = sched::setattr(0, &SchedAttr { policy, ..attr });
        }
    }

    let pmig = getppid();
    let line = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("take over", "the line to pmig")?;
    let mut line = UnixStream::from(line);
    let passage = share(pmig, passage)?;
    let mut armed = Armed::join(id)?;
    line.write_all(&[READY]).context("answer", "pmig")?;

    let mut watch = Watch {
        armed: &armed,
        phase: Phase::Hello,
        stopped: false,
        heard: Instant::now(),
    };
    let call = watch.listen(&mut line)?;
    let phase = watch.phase;
    let settled =
        matches!(call, Call::Done) && armed.settled()? || end_of_pmig(&armed, pmig, &call, phase)?;
    drop(line);
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("open", "/dev/null")?;
    dup2_stdin(&null).context("close", "the line to pmig")?;
    let held = if settled {
        None
    } else {
        if let Err(e) = resolve::complete_input(&armed, &passage) {
            tracing::warn!("what was typed for the program is lost: {e}");
        }
        let now = match unless_lost(&armed, || finish(&armed, &call, phase))? {
            Some(now) => now,
            // Only who is alone with the records may decide in them.
            None => {
                drop(armed);
                armed = take_over(id)?;
                finish(&armed, &call, phase)?
            }
        };
        Some(now)
    };
    // Whoever reads pmig's output need not wait for what follows.
    dup2_stdout(&null).context("close", "the output")?;
    let ended = match held {
        Some(Now::Serving) => serve(&armed),
        None | Some(Now::RunsHere | Now::Moved | Now::Ended | Now::Rebooted) => tell(&armed),
        Some(Now::Held { why }) => Err(Error::bad(
            format!("process {}", armed.record().pid),
            format!("stays held: {why}"),
        )),
    };
    if ended.is_ok() {
        let _ = std::fs::remove_file(log_of(id));
    }
    ended
}

/// What pmig has under these numbers.
fn share(pmig: Pid, [read, write]: [i32; 2]) -> Result<Passage> {
    let process = pidfd::open(pmig.as_raw()).context("open", "pmig")?;
    let get = |fd| pidfd::get(process.as_fd(), fd).context("share", "the passage of pmig");
    Ok(Passage {
        read: get(read)?,
        write: get(write)?,
    })
}

/// pmig said nothing, or not that all is settled: decides what can be decided,
/// and returns once pmig is dead. `true`: it lived to settle everything itself.
fn end_of_pmig(armed: &Armed, pmig: Pid, call: &Call, phase: Phase) -> Result<bool> {
    let why = match call {
        Call::Done | Call::Silent => format!("pmig ended in {phase}"),
        Call::Stalled => format!("pmig made no progress in {phase}"),
    };
    tracing::info!("migration {}: {why}", armed.record().id);
    // First the decision, then the end of pmig: it may be about to commit.
    let stage = unless_lost(armed, || armed.abort(&why))?;
    let longest = match stage {
        _ if matches!(call, Call::Stalled) => Duration::ZERO,
        Some(Stage::Aborted(..) | Stage::Armed(_)) => patience(KEEPER),
        // Where nobody can decide any more, pmig may have.
        Some(Stage::Committing(_) | Stage::Decided(..)) | None => patience(KEEPER) * COMMIT_FACTOR,
    };
    Ok(outlive(pmig, longest, armed))
}

/// `None`: it fails, and the place of decision is lost.
fn unless_lost<T>(armed: &Armed, what: impl Fn() -> Result<T>) -> Result<Option<T>> {
    match what() {
        Err(e) if armed.lost()? => {
            tracing::warn!("{e}");
            Ok(None)
        }
        // pmig may have decided in the records in between.
        Err(_) => what().map(Some),
        r => r.map(Some),
    }
}

/// Takes over a migration from whoever may just be looking at it.
fn take_over(id: Id) -> Result<Armed> {
    let begun = Instant::now();
    loop {
        match journal::open_source(id)? {
            Found::Mine(armed) => return Ok(armed),
            Found::Busy if begun.elapsed() < START => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Found::Busy | Found::Missing => {
                return Err(Error::bad(
                    format!("migration {id}"),
                    "is not to be had: somebody is at work on it, or nothing is known",
                ))
            }
        }
    }
}

/// pmig is dead: ends the migration, and says in its place what became of the
/// program.
fn finish(armed: &Armed, call: &Call, phase: Phase) -> Result<Now> {
    let record = armed.record();
    let (pid, there) = (record.pid, record.there());
    let what = match call {
        Call::Stalled => format!("made no progress in {phase}, so its keeper ended it"),
        Call::Done | Call::Silent => format!("died in {phase}"),
    };
    let now = resolve::finish(armed, &format!("pmig {what}"), patience(ASK_FOR), || {})?;
    tracing::info!("migration {}: {now:?}", record.id);
    let place = match &now {
        Now::RunsHere => format!("{pid} runs on here"),
        Now::Moved => format!("{pid} {there}"),
        Now::Serving => {
            format!("{pid} {there}; the part of its memory that is here still goes on being sent")
        }
        Now::Ended => format!("{pid} has ended"),
        Now::Held { why } => format!(
            "{pid} is held here, frozen and intact: {why}; see pmig resolve {}",
            record.id
        ),
        Now::Rebooted => format!("{pid} is of another boot"),
    };
    // Nobody may be there to read it.
    let _ = writeln!(io::stdout(), "pmig: {what}\n{place}");
    Ok(now)
}

/// It runs at the target, and misses memory that is here still.
fn serve(armed: &Armed) -> Result<()> {
    fill::serve_until_whole(armed, None, &mut |_| Ok(()))?;
    resolve::finish(armed, "it is served", patience(ASK_FOR), || {}).map(drop)
}

/// The same for a migration whose pmig and keeper died: a process that does nothing
/// else.
///
/// # Errors
/// There is nothing to send, or nobody to send it to.
pub fn serve_memory(id: Id) -> Result<()> {
    let _ = setsid();
    serve(&take_over(id)?)
}

/// If it was aborted, no husk shall stay held at the target.
fn tell(armed: &Armed) -> Result<()> {
    match armed.stage()? {
        Stage::Aborted(..) => resolve::abandon(armed.record(), patience(ASK_FOR)),
        _ => Ok(()),
    }
}

struct Watch<'a> {
    armed: &'a Armed,
    phase: Phase,
    /// The program stands still.
    stopped: bool,
    heard: Instant,
}

impl Watch<'_> {
    fn listen(&mut self, line: &mut UnixStream) -> Result<Call> {
        loop {
            let timeout = if self.stopped {
                match self.left()? {
                    Some(left) => PollTimeout::try_from(left + Duration::from_millis(1))
                        .unwrap_or(PollTimeout::MAX),
                    None => return Ok(Call::Stalled),
                }
            } else {
                PollTimeout::NONE
            };
            let mut fds = [PollFd::new(line.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(e).context("wait for", "pmig"),
            }
            let mut words = [0; 64];
            let got = match line.read(&mut words) {
                Ok(0) => return Ok(Call::Silent),
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Ok(Call::Silent),
            };
            self.heard = Instant::now();
            for word in &words[..got] {
                match *word {
                    DONE => return Ok(Call::Done),
                    STOPPED => self.stopped = true,
                    RUNNING => self.stopped = false,
                    ALIVE => {}
                    word => {
                        let at = usize::from(word.wrapping_sub(b'0'));
                        let Some(phase) = Phase::ALL.get(at) else {
                            continue;
                        };
                        self.phase = *phase;
                        fault::point(*phase, Role::Keeper, || {
                            let _ = line.shutdown(std::net::Shutdown::Both);
                        });
                    }
                }
            }
        }
    }

    /// How long pmig may stay silent yet.
    fn left(&self) -> Result<Option<Duration>> {
        let silent = self.heard.elapsed();
        if let Some(left) = patience(KEEPER).checked_sub(silent) {
            return Ok(Some(left));
        }
        Ok(match unless_lost(self.armed, || self.armed.stage())? {
            Some(Stage::Armed(_) | Stage::Aborted(..)) => None,
            Some(Stage::Committing(_) | Stage::Decided(..)) | None => {
                let limit = patience(KEEPER) * COMMIT_FACTOR;
                limit.checked_sub(silent).filter(|left| !left.is_zero())
            }
        })
    }
}

/// Returns once pmig is dead, which lets go of all that it traced; kills it if
/// it lives longer than `patience`. `true`: it lived to settle everything
/// itself.
fn outlive(pmig: Pid, patience: Duration, armed: &Armed) -> bool {
    let start = Instant::now();
    let mut killed = false;
    // While it is our parent, nobody else can have its number.
    while getppid() == pmig {
        if armed.settled().unwrap_or(false) {
            return true;
        }
        if !killed && start.elapsed() >= patience {
            tracing::warn!("killing pmig {pmig}");
            let _ = kill(pmig, Signal::SIGKILL);
            killed = true;
        }
        if start.elapsed() > patience + START {
            tracing::warn!("pmig {pmig} does not die");
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    armed.settled().unwrap_or(false)
}
