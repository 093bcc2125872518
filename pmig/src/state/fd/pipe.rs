//! Pipes whose ends are all held by the process itself: content, size and
//! flags of each end.
//!
//! The content is duplicated by tee(2), so the process still finds it where it
//! was if the migration ends here.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::fcntl::{fcntl, open, tee, FcntlArg, OFlag, SpliceFFlags};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::stat::Mode;
use nix::unistd::{pipe2, read, write};
use serde::{Deserialize, Serialize};

use super::look::Subject;
use super::{only_flags, Claim, Description, Kind, LARGEFILE};
use crate::error::{Context, Error, Obstacle, Result};
use crate::sys::fds::bytes_waiting;

/// Linux never makes a pipe larger than this many bytes by fcntl(2).
const MAX_CAPACITY: u32 = 1 << 31;

/// What a target takes in a pipe's content, in bytes.
const MAX_CONTENT: usize = 64 << 20;

/// A pipe.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pipe {
    /// Size in bytes, fcntl(2) `F_GETPIPE_SZ`; not asked for while the process
    /// runs.
    pub capacity: Option<u32>,
    /// Bytes written and not read yet; looked at only when the process stands
    /// still.
    #[serde(with = "serde_bytes")]
    pub content: Vec<u8>,
}

/// An end of a pipe that is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeEnd {
    /// Index into [`super::FdTable::pipes`].
    pub pipe: u32,
}

const SETTABLE: i32 = libc::O_NONBLOCK | libc::O_APPEND | libc::O_NOATIME;
const KNOWN: i32 = libc::O_ACCMODE | SETTABLE | LARGEFILE;

pub(super) fn claim(s: &Subject<'_>) -> Claim {
    if s.nature.file_type() != libc::S_IFIFO || !s.link.starts_with(b"pipe:[") {
        return Claim::NotMine;
    }
    if s.flags & libc::O_DIRECT != 0 {
        return Claim::Refused(s.obstacle(
            "is a pipe in packet mode (O_DIRECT)",
            "let the program close it first",
        ));
    }
    match only_flags(s, KNOWN) {
        Ok(()) => Claim::Mine(Kind::Pipe(PipeEnd { pipe: 0 })),
        Err(obstacle) => Claim::Refused(obstacle),
    }
}

/// Opens another end of the pipe behind a descriptor.
fn reopen(end: &OwnedFd, flags: i32) -> nix::Result<OwnedFd> {
    open(
        format!("/proc/self/fd/{}", end.as_raw_fd()).as_str(),
        OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
}

/// Whether the ends of the other kind than this one are all closed, wherever
/// they were: poll(2). A reader opened after the last writer had gone is told
/// nothing, so that the answer errs on the safe side.
pub(super) fn is_widowed(end: &OwnedFd) -> nix::Result<bool> {
    let gone = PollFlags::POLLERR | PollFlags::POLLHUP;
    let mut fds = [PollFd::new(end.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().is_some_and(|r| r.intersects(gone)))
}

/// A pipe of pmig's own, which is empty: what others hold is duplicated into it.
#[derive(Default)]
pub(super) struct Passage(Option<Own>);

struct Own {
    capacity: i32,
    out: OwnedFd,
    into: OwnedFd,
}

impl Passage {
    /// Takes one out that has room for so many bytes.
    fn of_size(&mut self, capacity: i32) -> Result<Own> {
        if let Some(own) = self.0.take().filter(|own| own.capacity == capacity) {
            return Ok(own);
        }
        let (out, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).context("make", "a pipe")?;
        fcntl(&into, FcntlArg::F_SETPIPE_SZ(capacity))
            .context("make room in", format_args!("a pipe for {capacity} bytes"))?;
        Ok(Own {
            capacity,
            out,
            into,
        })
    }
}

/// Looks into a pipe through a copy of any of its ends. The process must not
/// run meanwhile.
pub(super) fn capture(
    end: &OwnedFd,
    flags: i32,
    passage: &mut Passage,
    object: impl Display + Copy,
) -> Result<Pipe> {
    let capacity =
        fcntl(end.as_fd(), FcntlArg::F_GETPIPE_SZ).context("ask for the size of", object)?;
    let mut pipe = Pipe {
        capacity: Some(capacity as u32),
        content: Vec::new(),
    };
    let waiting = bytes_waiting(end.as_fd()).context("look into", object)?;
    if waiting == 0 {
        return Ok(pipe);
    }
    let refuse = |why: &str| {
        Error::Refused(vec![Obstacle::new(
            object,
            why,
            "let the program read the pipe empty first",
        )])
    };
    if waiting > capacity as usize {
        return Err(refuse("holds more than a pipe of its size can be given"));
    }
    let reader;
    let from = if flags & libc::O_ACCMODE == libc::O_WRONLY {
        reader = reopen(end, libc::O_RDONLY | libc::O_NONBLOCK).context("open", object)?;
        &reader
    } else {
        end
    };
    let own = passage.of_size(capacity)?;
    let copied = tee(from, &own.into, waiting, SpliceFFlags::SPLICE_F_NONBLOCK)
        .context("duplicate the content of", object)?;
    if copied != waiting {
        return Err(refuse("its content could not be duplicated whole"));
    }
    pipe.content = vec![0; waiting];
    let got = read(&own.out, &mut pipe.content).context("read the content of", object)?;
    if got != waiting {
        // A read ends early only at the end of a packet: pipe(2), O_DIRECT.
        return Err(refuse("holds packets, whose bounds would be lost"));
    }
    // Only now is it known to be empty.
    passage.0 = Some(own);
    Ok(pipe)
}

impl Pipe {
    /// Bytes it can hold.
    pub(super) fn size(&self) -> u64 {
        // What pipe(7) gives unasked.
        const DEFAULT: u32 = 1 << 16;
        u64::from(self.capacity.unwrap_or(DEFAULT))
    }

    /// Checks what came from a peer.
    pub(super) fn check(&self) -> Result<()> {
        if self.content.len() > MAX_CONTENT
            || self.capacity.is_some_and(|c| c == 0 || c > MAX_CAPACITY)
            || self.content.len() > self.capacity.unwrap_or(0) as usize
        {
            return Err(Error::bad(
                "descriptor table",
                "a pipe has an impossible size",
            ));
        }
        Ok(())
    }

    /// Gives a pipe, empty until now, its size and content. `end` is any of
    /// its ends.
    pub(super) fn fill(&self, end: &OwnedFd) -> Result<()> {
        if let Some(wanted) = self.capacity {
            let now =
                fcntl(end, FcntlArg::F_GETPIPE_SZ).context("ask for the size of", "a pipe")?;
            if now as u32 != wanted {
                let got = fcntl(end, FcntlArg::F_SETPIPE_SZ(wanted as i32))
                    .context("set the size of", format!("a pipe to {wanted} bytes"))?;
                if got as u32 != wanted {
                    return Err(Error::bad(
                        "pipe",
                        format!("gets a size of {got} here instead of {wanted} bytes"),
                    ));
                }
            }
        }
        if self.content.is_empty() {
            return Ok(());
        }
        // Read and write: a pipe none of whose readers is left can be filled,
        // and no signal comes of it.
        let filler = reopen(end, libc::O_RDWR | libc::O_NONBLOCK).context("open", "a pipe")?;
        if bytes_waiting(filler.as_fd()).context("look into", "a pipe")? != 0 {
            return Err(Error::bad("pipe", "is to be filled twice"));
        }
        let mut rest = self.content.as_slice();
        while !rest.is_empty() {
            match write(&filler, rest) {
                Ok(n) => rest = &rest[n..],
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => {
                    return Err(Error::bad("pipe", "its content does not fit in here"))
                }
                Err(e) => return Err(io::Error::from(e)).context("fill", "a pipe"),
            }
        }
        Ok(())
    }
}

/// Makes a pipe and every end the table has of it, in the order of the given
/// descriptions.
pub(super) fn open_ends(pipe: &Pipe, ends: &[&Description]) -> Result<Vec<OwnedFd>> {
    if ends.iter().any(|d| d.flags & !KNOWN != 0) {
        return Err(Error::bad("pipe", "is to be opened with impossible flags"));
    }
    let (r, w) = pipe2(OFlag::O_CLOEXEC).context("make", "a pipe")?;
    pipe.fill(&w)?;
    let (mut r, mut w) = (Some(r), Some(w));
    let mut made: Vec<OwnedFd> = Vec::with_capacity(ends.len());
    for d in ends {
        // The ends pipe(2) made lack O_LARGEFILE; what was opened later
        // through procfs has it.
        let first = match d.flags & (libc::O_ACCMODE | LARGEFILE) {
            libc::O_RDONLY => r.take(),
            libc::O_WRONLY => w.take(),
            _ => None,
        };
        let end = match (first, [&r, &w], made.first()) {
            (Some(end), _, _) => end,
            (None, [Some(by), _] | [_, Some(by)], _) | (None, _, Some(by)) => {
                // Without O_NONBLOCK an end waits for its counterpart: fifo(7).
                let access = d.flags & libc::O_ACCMODE;
                match reopen(by, access | libc::O_NONBLOCK) {
                    // No reader is left, and there is none in the table either.
                    Err(nix::errno::Errno::ENXIO) => {
                        let _reader = reopen(by, libc::O_RDONLY | libc::O_NONBLOCK)
                            .context("open", "a pipe")?;
                        reopen(by, access | libc::O_NONBLOCK)
                    }
                    other => other,
                }
                .context("open", "an end of a pipe")?
            }
            (None, _, None) => return Err(Error::bad("pipe", "has no end")),
        };
        set_flags(&end, d)?;
        made.push(end);
    }
    Ok(made)
}

pub(super) fn set_flags(end: &OwnedFd, d: &Description) -> Result<()> {
    let flags = OFlag::from_bits_retain(d.flags & SETTABLE);
    fcntl(end, FcntlArg::F_SETFL(flags)).context("set the flags of", "a pipe")?;
    let now = fcntl(end, FcntlArg::F_GETFL).context("read the flags of", "a pipe")?;
    if (now ^ d.flags) & !(libc::O_CLOEXEC | LARGEFILE) != 0 {
        return Err(Error::bad(
            "pipe",
            format!("has flags {now:#o} here instead of {:#o}", d.flags),
        ));
    }
    Ok(())
}
