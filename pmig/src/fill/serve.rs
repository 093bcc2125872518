//! The source's part: saying what its frozen copy holds, as often as it takes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::uio::{process_vm_readv, RemoteIoVec};
use nix::unistd::Pid;

use crate::error::{Context, Error, Result};
use crate::id::Id;
use crate::journal::{start_of, Armed, Record};
use crate::patience::patience;
use crate::protocol::message::{ToSource, ToTarget, MAX_RAW};
use crate::protocol::{preface, Wire};
use crate::transport;

/// How long the target may be silent: it always wants something.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two attempts to reach it again, at first and at last.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Between two looks at what else there is to do.
const LOOK: u16 = 200;

/// What is told while memory is sent.
pub enum Told<'a> {
    /// So many bytes more, over this connection.
    Sent(u64, &'a Wire),
    /// Nothing is wanted just now.
    Waiting,
    /// The connection is lost, and tried again.
    Lost(&'a Error),
    /// There is one again.
    Back,
}

/// Serves until the target misses nothing, over a connection that there is, if
/// any, and over as many others as it takes.
///
/// # Errors
/// The copy here is gone, the target says that it cannot go on, or what `told`
/// says.
pub fn serve_until_whole(
    armed: &Armed,
    first: Option<&mut Wire>,
    told: &mut dyn FnMut(Told<'_>) -> Result<()>,
) -> Result<()> {
    let record = armed.record();
    let mut copy = Copy::of(record)?;
    let mut lost = match first.map(|wire| copy.serve(wire, told)) {
        Some(Ok(())) => return armed.served(),
        Some(Err(e)) => Some(e),
        None => None,
    };
    let mut pause = PAUSE;
    loop {
        match lost.take() {
            // What failed there may not fail again.
            Some(e @ (Error::Link { .. } | Error::Deadline { .. } | Error::Peer { .. })) => {
                if matches!(e, Error::Peer { .. }) {
                    pause = LONGEST_PAUSE;
                }
                told(Told::Lost(&e))?;
                let until = Instant::now() + pause;
                while Instant::now() < until {
                    std::thread::sleep(pause.min(PAUSE));
                    told(Told::Waiting)?;
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            Some(e) => return Err(e),
            None => {}
        }
        let again = reach(record).and_then(|mut wire| {
            told(Told::Back)?;
            copy.serve(&mut wire, &mut |t| {
                if matches!(t, Told::Sent(..)) {
                    pause = PAUSE;
                }
                told(t)
            })
        });
        match again {
            Ok(()) => return armed.served(),
            Err(e) => lost = Some(e),
        }
    }
}

/// Sends pieces of a program that stands still here.
///
/// # Errors
/// It cannot be read, or the connection breaks.
pub fn send_pieces(record: &Record, pieces: &[(u64, u32)], wire: &mut Wire) -> Result<()> {
    let mut copy = Copy::of(record)?;
    pieces
        .iter()
        .try_for_each(|(start, len)| copy.send(*start, *len, wire))
}

/// Has another process do it, which outlives this one.
///
/// # Errors
/// It cannot be started.
pub fn serve_in_background(id: Id) -> Result<()> {
    Command::new("/proc/self/exe")
        .arg0("pmig")
        .args(["serve-memory", &id.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()
        .map(drop)
        .context("start", "who sends the memory that is left")
}

fn reach(record: &Record) -> Result<Wire> {
    let addr = record
        .addr
        .as_ref()
        .ok_or_else(|| Error::bad(format!("migration {}", record.id), "has no address"))?;
    let mut link = transport::connect(addr).map_err(|cause| Error::Link {
        peer: addr.host(),
        cause,
    })?;
    preface::open(&mut *link, preface::Kind::Fill)?;
    let mut wire = Wire::new(link);
    wire.set_deadline(patience(PATIENCE))?;
    wire.send(&ToTarget::Resume {
        id: record.id,
        secret: record.secret.clone(),
    })?;
    Ok(wire)
}

/// The program as it was when it stopped.
struct Copy {
    pid: i32,
    start: u64,
    mem: File,
    buf: Vec<u8>,
}

impl Copy {
    fn of(record: &Record) -> Result<Copy> {
        let path = format!("/proc/{}/mem", record.pid);
        let copy = Copy {
            pid: record.pid,
            start: record.start,
            mem: File::open(&path).context("open", &path)?,
            buf: vec![0; MAX_RAW],
        };
        copy.is_there()?;
        Ok(copy)
    }

    fn is_there(&self) -> Result<()> {
        match start_of(self.pid) {
            Ok(start) if start == self.start => Ok(()),
            _ => Err(Error::Gone(self.pid)),
        }
    }

    fn serve(
        &mut self,
        wire: &mut Wire,
        told: &mut dyn FnMut(Told<'_>) -> Result<()>,
    ) -> Result<()> {
        wire.set_deadline(patience(PATIENCE))?;
        let mut heard = Instant::now();
        loop {
            let mut fds = [PollFd::new(wire.link().fd(), PollFlags::POLLIN)];
            let mut comes = || matches!(poll(&mut fds, PollTimeout::from(LOOK)), Ok(n) if n > 0);
            if !wire.is_ahead() && !comes() {
                told(Told::Waiting)?;
                if heard.elapsed() > patience(PATIENCE) {
                    return Err(Error::Deadline {
                        what: format!("a word of {}", wire.peer()),
                        after: heard.elapsed(),
                    });
                }
                continue;
            }
            heard = Instant::now();
            match wire.recv()? {
                ToSource::Want(pieces) => {
                    for (start, len) in pieces {
                        self.send(start, len, wire)?;
                        told(Told::Sent(len.into(), wire))?;
                    }
                }
                ToSource::Whole => return Ok(()),
                ToSource::Refused(why) => return Err(Error::Refused(why)),
                ToSource::Failed(what) => {
                    return Err(Error::Peer {
                        host: wire.peer(),
                        what: crate::error::printable(&what),
                    })
                }
                other => {
                    let text: String = format!("{other:?}").chars().take(40).collect();
                    return Err(Error::bad(
                        wire.peer(),
                        format!("answers out of turn: {text}"),
                    ));
                }
            }
        }
    }

    fn send(&mut self, start: u64, len: u32, wire: &mut Wire) -> Result<()> {
        let peer = || format!("pages that {} wants", wire.peer());
        let buf = self
            .buf
            .get_mut(..len as usize)
            .ok_or_else(|| Error::bad(peer(), format!("{len} bytes are too many")))?;
        let remote = [RemoteIoVec {
            base: start as usize,
            len: len as usize,
        }];
        let got = process_vm_readv(
            Pid::from_raw(self.pid),
            &mut [std::io::IoSliceMut::new(buf)],
            &remote,
        );
        // What the program may not read itself is read like that only.
        if got != Ok(len as usize) && self.mem.read_exact_at(buf, start).is_err() {
            self.is_there()?;
            return Err(Error::bad(
                format!(
                    "memory {start:x}-{:x} of {}",
                    start + u64::from(len),
                    self.pid
                ),
                "it cannot be read",
            ));
        }
        // The number may be another process's by now; this never is.
        if self.mem.read_at(&mut [0], start).is_ok_and(|n| n == 0) {
            return Err(Error::Gone(self.pid));
        }
        let zero = buf.iter().all(|b| *b == 0);
        let piece = ToTarget::Piece { start, len, zero };
        wire.send_with(&piece, if zero { &[] } else { buf })
    }
}
