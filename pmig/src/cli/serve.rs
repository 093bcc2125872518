use std::os::fd::BorrowedFd;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::stat::{umask, Mode};
use pmig::error::{printable, Context, Result};
use pmig::interrupt;
use pmig::journal::{run_dir, state_dir, Folder};
use pmig::protocol::fate;
use pmig::protocol::preface::{self, Kind};
use pmig::resolve;
use pmig::transport::{Link, Listener};

use super::output::error_line;
use super::session::What;
use super::{files, say, session, Exit, Serve, Verbose};

/// Connections looked after at once; more wait until one of them ends.
const MAX_GREETINGS: usize = 64;

/// Migrations on their way here at once.
const MAX_SESSIONS: usize = 32;

pub fn run(args: &Serve, verbose: Verbose) -> Exit {
    if let Err(exit) = args.insecure.allows(&args.listen) {
        return exit;
    }
    match serve(args, verbose) {
        Ok(()) => Exit::Done,
        Err(e) => {
            say(&e);
            Exit::Other
        }
    }
}

fn serve(args: &Serve, verbose: Verbose) -> Result<()> {
    interrupt::listen()?;
    umask(Mode::from_bits_truncate(0o077));
    Folder::at(&state_dir())?;
    Folder::at(&run_dir())?;
    let listener = Listener::bind(&args.listen).context("listen on", &args.listen)?;
    // May have to ask machines that are down.
    thread(|| resolve::sweep(&files::Shipped))?;
    error_line(&format!("pmig: listening on {}", args.listen));

    let greetings = Arc::new(AtomicUsize::new(0));
    let sessions = Arc::new(AtomicUsize::new(0));
    while !interrupt::requested() {
        if greetings.load(Ordering::Relaxed) >= MAX_GREETINGS || !readable(listener.fd()) {
            if greetings.load(Ordering::Relaxed) >= MAX_GREETINGS {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            continue;
        }
        let link = match listener.accept() {
            Ok(link) => link,
            Err(e) => {
                tracing::warn!("accept: {e}");
                std::thread::sleep(std::time::Duration::from_millis(20));
                continue;
            }
        };
        let greeting = Counted::new(&greetings);
        let sessions = sessions.clone();
        let begun = thread(move || {
            let peer = link.peer();
            if let Err(e) = greet(link, &sessions, greeting, verbose) {
                tracing::warn!("connection from {}: {e}", printable(&peer));
            }
        });
        if let Err(e) = begun {
            tracing::warn!("{e}");
        }
    }
    Ok(())
}

fn thread(work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .spawn(work)
        .map(drop)
        .context("start", "a thread")
}

/// Waits a moment for a connection.
fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::from(200u8)), Ok(n) if n > 0)
}

fn greet(
    mut link: Box<dyn Link>,
    sessions: &Arc<AtomicUsize>,
    greeting: Counted,
    verbose: Verbose,
) -> Result<()> {
    match preface::accept(&mut *link)? {
        Kind::Fate => fate::serve(&mut *link, |q| resolve::answer(q, &files::Shipped)),
        kind @ (Kind::Migration | Kind::Fill) => {
            drop(greeting);
            if sessions.load(Ordering::Relaxed) >= MAX_SESSIONS {
                tracing::warn!("{MAX_SESSIONS} migrations are on their way here; refusing another");
                return Ok(());
            }
            let _session = Counted::new(sessions);
            let what = match kind {
                Kind::Fill => What::Fill,
                _ => What::Migration,
            };
            receive(link, what, verbose)
        }
    }
}

/// Hands a connection to a process of its own, which lives on if this one dies,
/// and waits for its end.
fn receive(link: Box<dyn Link>, what: What<'_>, verbose: Verbose) -> Result<()> {
    let peer = link.peer();
    let mut child = session::start(link, what, verbose, Stdio::inherit())?;
    let status = child.wait().context("wait for", "a session")?;
    if !status.success() || matches!(what, What::Fill) {
        tracing::info!("the session with {} ended with {status}", printable(&peer));
        resolve::sweep_arrivals(&files::Shipped);
    }
    Ok(())
}

/// Counts itself for as long as it lives.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Counted {
        count.fetch_add(1, Ordering::Relaxed);
        Counted(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
