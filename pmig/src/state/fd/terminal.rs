//! Terminals, as programs see them: modes, size, and the input that was typed
//! and not read yet. At the target each is a new one, whose other end somebody
//! there holds.
//!
//! A descriptor opened as `/dev/tty` is of the terminal that controls the
//! process, and of that name at the target too.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{fcntl, tee, FcntlArg, OFlag, SpliceFFlags};
use nix::sys::stat::{fchmod, fstat, major, makedev, Mode};
use nix::unistd::{fchown, pipe2, read, Gid, Uid};
use serde::{Deserialize, Serialize};

use super::look::{Name, Subject};
use super::{only_flags, Claim, Description, Kind, LARGEFILE, SETTABLE};
use crate::error::{Context, Error, Obstacle, Result};
use crate::proc::stat::Stat;
use crate::sys::fds::bytes_waiting;
use crate::sys::tty::{self, Modes, Size, DISABLED};

/// As many bytes as a terminal holds unread: `N_TTY_BUF_SIZE`, less one.
const FULL: usize = 4095;

/// What input is called in messages.
const OBJECT: &str = "what was typed for the program";

/// The place of `tty_nr` in proc_pid_stat(5); the foreground group follows.
const TTY_NR: usize = 7;

/// `/dev/tty`, and the end of a terminal that shows it.
const BY_NAME: (u64, u64) = (5, 0);
const PTMX: (u64, u64) = (5, 2);
/// Majors of the ends for programs: Unix98 pseudo-terminals.
const PTS: std::ops::RangeInclusive<u64> = 136..=143;

const KNOWN: i32 = libc::O_ACCMODE | SETTABLE | libc::O_SYNC | libc::O_NOFOLLOW | LARGEFILE;

/// A terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// It controls the process: credentials(7), "Sessions".
    pub controls: bool,
    /// Its other end is gone: it can be read and written no more.
    pub hung_up: bool,
    /// Looked at only when the process stands still; none for a terminal that
    /// was hung up.
    pub now: Option<Now>,
}

/// How a terminal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Now {
    /// None for a process in its background: they are whoever's is in front.
    pub modes: Option<Modes>,
    pub size: Size,
    /// `TIOCEXCL`.
    pub exclusive: bool,
    /// Who may open it.
    pub owner: Owner,
    /// What was typed for the process goes with it, as [`Input`].
    pub typed: bool,
}

/// Owner and permissions of a terminal's node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
}

/// What was typed and not read yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
    /// Where in `bytes` there is no byte but an end of file (Control-D),
    /// ascending.
    pub ends: Vec<u32>,
}

/// A terminal that is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalEnd {
    /// Index into [`super::FdTable::terminals`].
    pub terminal: u32,
    /// Opened as `/dev/tty`.
    pub by_name: bool,
}

/// What controls a process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Control {
    /// The terminal's device number; none for a process without one.
    pub device: Option<u64>,
    /// The process is in its foreground: what is typed is for it.
    pub foreground: bool,
}

impl Control {
    /// Of a process that has no terminal open.
    pub const NONE: Control = Control {
        device: None,
        foreground: false,
    };

    pub fn of(pid: i32) -> Result<Control> {
        // pgrp, session, tty_nr, tpgid.
        let [group, _, device, foreground] = Stat::read(pid)?.fields(TTY_NR - 2)?;
        Ok(Control {
            device: (device != 0).then(|| tty::decode(device as u32)),
            foreground: group == foreground,
        })
    }
}

impl Control {
    /// Whether nobody else is in the process's group, if a terminal controls it.
    pub fn is_alone(pid: i32) -> Result<bool> {
        let group = |pid: i32| Stat::read(pid)?.fields::<3>(TTY_NR - 2);
        let [own, _, device] = group(pid)?;
        if device == 0 {
            return Ok(false);
        }
        for entry in std::fs::read_dir("/proc")
            .context("list", "/proc")?
            .flatten()
        {
            let other = entry.file_name().to_str().and_then(|n| n.parse().ok());
            // Those that end meanwhile are in no group.
            if let Some(Ok([theirs, ..])) = other.filter(|n| *n != pid).map(group) {
                if theirs == own {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

/// Whether a device number may be that of a terminal.
pub(super) fn may_be(rdev: u64) -> bool {
    let (major, minor) = numbers(rdev);
    (major, minor) != PTMX && ([4, 5, 204, 229].contains(&major) || PTS.contains(&major))
}

fn numbers(rdev: u64) -> (u64, u64) {
    (major(rdev), nix::sys::stat::minor(rdev))
}

pub(super) fn claim(s: &Subject<'_>) -> Claim {
    let rdev = s.nature.rdev;
    if s.nature.file_type() != libc::S_IFCHR || !may_be(rdev) {
        return Claim::NotMine;
    }
    let by_name = rdev == makedev(BY_NAME.0, BY_NAME.1);
    let controls = s.control.device;
    let ours = by_name && controls.is_some() || controls == Some(rdev);
    if !ours && !PTS.contains(&major(rdev)) {
        // A line to some device, for all that is known.
        return Claim::Refused(s.obstacle(
            "is a terminal of this machine that does not control the program",
            "let the program close it first",
        ));
    }
    match only_flags(s, KNOWN) {
        Ok(()) => Claim::Mine(Kind::Terminal(TerminalEnd {
            terminal: 0,
            by_name,
        })),
        Err(obstacle) => Claim::Refused(obstacle),
    }
}

/// The terminal a claimed descriptor is of.
pub(super) fn device(s: &Subject<'_>) -> u64 {
    match s.nature.rdev == makedev(BY_NAME.0, BY_NAME.1) {
        true => s.control.device.unwrap_or(s.nature.rdev),
        false => s.nature.rdev,
    }
}

/// What is known of it while the process runs.
pub(super) fn glance(s: &Subject<'_>) -> Terminal {
    let device = device(s);
    Terminal {
        controls: s.control.device == Some(device),
        hung_up: PTS.contains(&major(device)) && s.nature.name == Name::Deleted,
        now: None,
    }
}

/// Looks at a terminal through a copy of a descriptor of it; `typed`: whether what
/// is typed there is for the process alone.
pub(super) fn look(
    fd: &OwnedFd,
    terminal: &mut Terminal,
    control: Control,
    typed: bool,
    object: &str,
) -> Result<()> {
    let refuse =
        |why: &str, remedy: &str| Err(Error::Refused(vec![Obstacle::new(object, why, remedy)]));
    let modes = match tty::modes(fd.as_fd()) {
        Err(e) if e.raw_os_error() == Some(libc::EIO) => {
            terminal.hung_up = true;
            return Ok(());
        }
        other => other.context("read the modes of", object)?,
    };
    terminal.hung_up = false;
    if modes.line != 0 {
        return refuse(
            "is a terminal with a line discipline of its own",
            "let the program set it back first",
        );
    }
    if tty::has_locked_modes(fd.as_fd()).context("read the locked modes of", object)? {
        return refuse(
            "is a terminal whose modes are locked (TIOCSLCKTRMIOS)",
            "unlock them first",
        );
    }
    let node = fstat(fd).context("look at", object)?;
    let behind = terminal.controls && !control.foreground;
    terminal.now = Some(Now {
        modes: (!behind).then_some(modes),
        size: tty::size(fd.as_fd()).context("read the size of", object)?,
        exclusive: tty::is_exclusive(fd.as_fd()).context("look at", object)?,
        owner: Owner {
            uid: node.st_uid,
            gid: node.st_gid,
            mode: node.st_mode & 0o777,
        },
        typed: typed && terminal.controls && !behind,
    });
    Ok(())
}

/// What was done to a terminal to get at its input, and how it is undone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Taken {
    /// A descriptor of the process's that is of it.
    pub fd: i32,
    modes: Modes,
    /// Bytes that could be read before, `TIOCINQ`: in lines, without their ends
    /// of file.
    readable: u32,
    /// What was taken; none as long as it may lie in the pipe.
    bytes: Option<Vec<u8>>,
    /// Somebody has begun to give it back.
    giving: bool,
}

/// Where input goes on its way, so that it is never in one process alone:
/// whoever holds it too can give it back if that one dies.
#[derive(Debug)]
pub struct Passage {
    pub read: OwnedFd,
    pub write: OwnedFd,
}

impl Passage {
    pub fn new() -> Result<Passage> {
        let (read, write) =
            pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).context("make", "a pipe for input")?;
        Ok(Passage { read, write })
    }

    /// What is in it; it stays there.
    fn peek(&self) -> Result<Vec<u8>> {
        let waiting = bytes_waiting(self.read.as_fd()).context("look into", "the pipe")?;
        if waiting == 0 {
            return Ok(Vec::new());
        }
        let (out, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).context("make", "a pipe")?;
        tee(&self.read, &into, waiting, SpliceFFlags::SPLICE_F_NONBLOCK)
            .context("duplicate", "typed input")?;
        take_all(&out)
    }
}

fn take_all(pipe: &OwnedFd) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut part = [0; 4096];
    loop {
        match read(pipe, &mut part) {
            Ok(0) | Err(Errno::EAGAIN) => return Ok(all),
            Ok(n) => all.extend_from_slice(&part[..n]),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("read", "typed input"),
        }
    }
}

/// Takes the input of a terminal whose process is frozen. `note` is called with
/// what has to be undone, before it is done and after.
pub(super) fn take(
    copy: &OwnedFd,
    fd: i32,
    passage: &Passage,
    note: &mut dyn FnMut(&Taken) -> Result<()>,
) -> Result<Input> {
    tty::leave_if_background(copy.as_fd());
    let modes = tty::modes(copy.as_fd()).context("read the modes of", "the terminal")?;
    let readable = bytes_waiting(copy.as_fd()).context("look into", OBJECT)?;
    if readable >= FULL {
        return Err(Error::Refused(vec![Obstacle::new(
            OBJECT,
            "is as much as a terminal holds, and there may be more behind it",
            "let the program read it first",
        )]));
    }
    let mut taken = Taken {
        fd,
        modes,
        readable: readable as u32,
        bytes: None,
        giving: false,
    };
    note(&taken)?;
    drain(copy, &modes, passage)?;
    let bytes = passage.peek()?;
    taken.bytes = Some(bytes.clone());
    note(&taken)?;
    take_all(&passage.read)?;
    Ok(Input::decode(bytes, readable, &modes))
}

/// Moves what is typed into the passage, and leaves the terminal with these
/// modes.
fn drain(copy: &OwnedFd, modes: &Modes, passage: &Passage) -> Result<()> {
    // By lines the last, unfinished one cannot be seen.
    let mut raw = *modes;
    raw.local &= !libc::ICANON;
    raw.chars[libc::VMIN] = 0;
    raw.chars[libc::VTIME] = 0;
    tty::set_modes(copy.as_fd(), &raw).context("set the modes of", "the terminal")?;
    // More may wait behind what the terminal holds: only reading shows it. But
    // no more is taken than can be given back.
    let mut room = FULL;
    while room > 0 {
        match tty::take_input(copy.as_fd(), passage.write.as_fd(), room) {
            Ok(0) => break,
            Ok(n) => room = room.saturating_sub(n),
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => break,
            Err(e) => return Err(e).context("take", OBJECT),
        }
    }
    tty::set_modes(copy.as_fd(), modes).context("set the modes of", "the terminal")
}

impl Taken {
    /// If what was taken was not noted any more: it is in the pipe. Whether
    /// that was so.
    ///
    /// # Errors
    /// Those of the pipe.
    pub fn complete(&mut self, passage: &Passage) -> Result<bool> {
        if self.bytes.is_some() {
            return Ok(false);
        }
        self.bytes = Some(take_all(&passage.read)?);
        Ok(true)
    }

    /// Gives a terminal its modes and its input back, through a copy of the
    /// descriptor, before what was typed since. The process must be frozen.
    /// `note` is called before anything is done.
    ///
    /// # Errors
    /// Those of the terminal; one that was hung up meanwhile needs nothing.
    pub fn give_back(
        &self,
        copy: &OwnedFd,
        note: &mut dyn FnMut(&Taken) -> Result<()>,
    ) -> Result<()> {
        if tty::modes(copy.as_fd()).is_err_and(|e| e.raw_os_error() == Some(libc::EIO)) {
            return Ok(());
        }
        tty::leave_if_background(copy.as_fd());
        let since_readable = bytes_waiting(copy.as_fd()).context("look into", OBJECT)?;
        let passage = Passage::new()?;
        drain(copy, &self.modes, &passage)?;
        let since = take_all(&passage.read)?;
        let old = self.bytes.clone().unwrap_or_default();
        let mut all = Input::decode(old.clone(), self.readable as usize, &self.modes);
        let since = if self.giving && since.starts_with(&old) {
            // Whoever began it was done with it.
            since[old.len()..].to_vec()
        } else if self.giving && old.starts_with(&since) {
            Vec::new()
        } else {
            since
        };
        all.append(Input::decode(since, since_readable, &self.modes));
        // On a full disk it is done all the same.
        let _ = note(&Taken {
            giving: true,
            ..self.clone()
        });
        all.fill(copy, &self.modes)
            .context("give its input back to", "the terminal")
    }
}

impl Input {
    /// Finds out what was an end of file, which reads as a byte of zero without
    /// lines; `readable` bytes of whole lines could be read before.
    fn decode(bytes: Vec<u8>, readable: usize, modes: &Modes) -> Input {
        let lines = modes.local & libc::ICANON != 0;
        if !lines || !bytes.contains(&DISABLED) {
            return Input {
                bytes,
                ends: Vec::new(),
            };
        }
        let eol = [modes.chars[libc::VEOL], modes.chars[libc::VEOL2]];
        let ends_line = |b: u8| b == b'\n' || b == DISABLED || eol.contains(&b);
        // Whole lines up to there are what could be read, but for the ends of
        // file among them.
        let fits = |end: usize| {
            let marks = bytes[..end].iter().filter(|b| **b == DISABLED).count();
            end - marks == readable && (end == 0 || ends_line(bytes[end - 1]))
        };
        let ends = match (0..=bytes.len()).rev().find(|&end| fits(end)) {
            Some(end) => (0u32..)
                .zip(&bytes[..end])
                .filter(|(_, b)| **b == DISABLED)
                .map(|(n, _)| n)
                .collect(),
            // Then they were typed as such.
            None => Vec::new(),
        };
        Input { bytes, ends }
    }

    fn append(&mut self, more: Input) {
        let before = self.bytes.len() as u32;
        self.ends.extend(more.ends.iter().map(|end| end + before));
        self.bytes.extend(more.bytes);
    }

    /// Checks what came from a peer.
    fn check(&self) -> Result<()> {
        let ascending = self.ends.windows(2).all(|w| w[0] < w[1]);
        let inside = self
            .ends
            .last()
            .is_none_or(|&n| (n as usize) < self.bytes.len());
        if self.bytes.len() > FULL || !ascending || !inside {
            return Err(Error::bad("terminal", "has impossible input"));
        }
        Ok(())
    }

    /// Types it all in, and leaves the terminal with these modes.
    fn fill(&self, fd: &OwnedFd, modes: &Modes) -> std::io::Result<()> {
        if !self.bytes.is_empty() {
            // Nothing is special but what ends a line.
            let mut plain = *modes;
            plain.input = 0;
            plain.local &= libc::ICANON | libc::IEXTEN;
            plain.chars = [DISABLED; 19];
            for eol in [libc::VEOL, libc::VEOL2] {
                plain.chars[eol] = modes.chars[eol];
            }
            let end = (1..=255u8)
                .find(|b| !self.bytes.contains(b) && *b != b'\n' && !plain.chars.contains(b));
            let end = end.unwrap_or(DISABLED);
            plain.chars[libc::VEOF] = end;
            tty::set_modes(fd.as_fd(), &plain)?;
            let mut ends = self.ends.iter().peekable();
            for (n, byte) in (0u32..).zip(&self.bytes) {
                let byte = match ends.next_if(|at| **at == n) {
                    Some(_) => end,
                    None => *byte,
                };
                tty::type_in(fd.as_fd(), byte)?;
            }
        }
        tty::set_modes(fd.as_fd(), modes)
    }
}

impl Terminal {
    /// Checks what came from a peer.
    pub(super) fn check(&self) -> Result<()> {
        match &self.now {
            Some(now) if now.modes.is_some_and(|m| m.line != 0) => {
                Err(Error::bad("terminal", "has a line discipline of its own"))
            }
            Some(now) if now.typed && !self.controls || now.owner.mode > 0o777 => {
                Err(Error::bad("terminal", "is as none can be"))
            }
            _ => Ok(()),
        }
    }
}

/// A terminal at the target.
#[derive(Debug)]
pub struct Made {
    /// The end that shows it; none for one that was hung up.
    pub master: Option<OwnedFd>,
    /// An end for programs, which keeps it alive.
    slave: OwnedFd,
}

impl Made {
    pub(super) fn new(terminal: &Terminal) -> Result<Made> {
        let (master, slave) = tty::pair().context("make", "a terminal")?;
        let made = Made {
            master: Some(master),
            slave,
        };
        made.set(terminal)?;
        Ok(made)
    }

    /// An open description of it.
    pub(super) fn open(&self, d: &Description) -> Result<OwnedFd> {
        if d.flags & !KNOWN != 0 {
            return Err(Error::bad(
                "terminal",
                "is to be opened with impossible flags",
            ));
        }
        let master = self.master.as_ref();
        let master = master.ok_or_else(|| Error::bad("terminal", "was hung up before"))?;
        let fd = tty::peer(master.as_fd(), d.flags).context("open", "a terminal")?;
        set_flags(&fd, d)?;
        Ok(fd)
    }

    /// Makes it what it was, but for what was typed.
    pub(super) fn set(&self, terminal: &Terminal) -> Result<()> {
        let Some(now) = &terminal.now else {
            return Ok(());
        };
        let fd = self.slave.as_fd();
        tty::set_size(fd, now.size).context("set the size of", "a terminal")?;
        if let Some(modes) = &now.modes {
            tty::set_modes(fd, modes).context("set the modes of", "a terminal")?;
        }
        let owner = now.owner;
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        fchown(fd, Some(uid), Some(gid)).context("give away", "a terminal")?;
        fchmod(fd, Mode::from_bits_truncate(owner.mode)).context("give away", "a terminal")?;
        if now.exclusive {
            tty::set_exclusive(fd).context("set up", "a terminal")?;
        }
        Ok(())
    }

    /// Types in what was typed, into an empty one.
    pub(super) fn type_in(&self, input: &Input) -> Result<()> {
        input.check()?;
        let modes = tty::modes(self.slave.as_fd()).context("read the modes of", "a terminal")?;
        input
            .fill(&self.slave, &modes)
            .context("type into", "a terminal")
    }

    /// It is complete, and every description is open.
    pub(super) fn finish(&mut self, terminal: &Terminal) {
        if terminal.hung_up {
            self.master = None;
        }
    }

    pub(super) fn slave(&self) -> &OwnedFd {
        &self.slave
    }
}

pub(super) fn set_flags(fd: &OwnedFd, d: &Description) -> Result<()> {
    let flags = OFlag::from_bits_retain(d.flags & SETTABLE);
    fcntl(fd, FcntlArg::F_SETFL(flags)).context("set the flags of", "a terminal")?;
    let now = fcntl(fd, FcntlArg::F_GETFL).context("read the flags of", "a terminal")?;
    let kept = libc::O_CLOEXEC | LARGEFILE | libc::O_NOFOLLOW;
    if (now ^ d.flags) & !kept != 0 {
        return Err(Error::bad(
            "terminal",
            format!("has flags {now:#o} here instead of {:#o}", d.flags),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line_modes() -> Modes {
        let (_master, slave) = tty::pair().unwrap();
        tty::modes(slave.as_fd()).unwrap()
    }

    #[test]
    fn ends_of_file_are_told_from_bytes() {
        let m = line_modes();
        let ends = |bytes: &[u8], readable| Input::decode(bytes.to_vec(), readable, &m).ends;
        assert_eq!(ends(b"ab\n", 3), [0u32; 0]);
        assert_eq!(ends(b"ab\0par", 2), [2]);
        assert_eq!(ends(b"\0", 0), [0]);
        assert_eq!(ends(b"x\n\0\0y", 2), [2, 3]);
        // A line not finished yet, with a zero in it.
        assert_eq!(ends(b"a\n\0y", 4), [0u32; 0]);
    }

    fn pause() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }

    fn unnoted(_: &Taken) -> Result<()> {
        Ok(())
    }

    fn looked_at(slave: &OwnedFd) -> Terminal {
        let mut terminal = Terminal {
            controls: true,
            hung_up: false,
            now: None,
        };
        let front = Control {
            device: None,
            foreground: true,
        };
        look(slave, &mut terminal, front, true, "it").unwrap();
        terminal
    }

    /// Finishes the line, and reads all there is.
    fn read_all(fd: &OwnedFd, master: &OwnedFd) -> Vec<Vec<u8>> {
        fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        nix::unistd::write(master, b"!\n").unwrap();
        pause();
        let mut reads = Vec::new();
        let mut part = [0; 4096];
        while let Ok(n) = read(fd, &mut part) {
            reads.push(part[..n].to_vec());
        }
        reads
    }

    #[test]
    fn whoever_holds_the_passage_gives_back_what_was_not_noted() {
        let (master, slave) = tty::pair().unwrap();
        nix::unistd::write(&master, b"one\ntw").unwrap();
        pause();
        let passage = Passage::new().unwrap();
        let mut noted = None;
        let mut note = |t: &Taken| match t.bytes {
            None => {
                noted = Some(t.clone());
                Ok(())
            }
            // As if it died here.
            Some(_) => Err(Error::Interrupted),
        };
        take(&slave, 0, &passage, &mut note).unwrap_err();
        let mut noted = noted.unwrap();
        assert!(noted.complete(&passage).unwrap());
        assert!(!noted.complete(&passage).unwrap());
        noted.give_back(&slave, &mut unnoted).unwrap();
        assert_eq!(read_all(&slave, &master), [&b"one\n"[..], b"tw!\n"]);
    }

    #[test]
    fn what_was_typed_since_comes_behind_and_nothing_comes_twice() {
        let (master, slave) = tty::pair().unwrap();
        nix::unistd::write(&master, b"first\nsec").unwrap();
        pause();
        let passage = Passage::new().unwrap();
        let mut noted = None;
        let mut note = |t: &Taken| {
            noted = Some(t.clone());
            Ok(())
        };
        take(&slave, 0, &passage, &mut note).unwrap();
        let taken = noted.clone().unwrap();
        nix::unistd::write(&master, b"ond\nthi").unwrap();
        pause();
        let mut giving = None;
        let mut note = |t: &Taken| {
            giving = Some(t.clone());
            Ok(())
        };
        taken.give_back(&slave, &mut note).unwrap();
        // Whoever did so died before it was noted.
        giving.unwrap().give_back(&slave, &mut unnoted).unwrap();
        let expected = [&b"first\n"[..], b"second\n", b"thi!\n"];
        assert_eq!(read_all(&slave, &master), expected);
    }

    #[test]
    fn no_more_is_taken_than_can_be_given_back() {
        let (master, slave) = tty::pair().unwrap();
        let mut modes = tty::modes(slave.as_fd()).unwrap();
        modes.local &= !(libc::ICANON | libc::ECHO);
        tty::set_modes(slave.as_fd(), &modes).unwrap();
        nix::unistd::write(&master, &[b'x'; 6000]).unwrap();
        pause();
        let passage = Passage::new().unwrap();
        let refused = take(&slave, 0, &passage, &mut unnoted);
        assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
        let read: usize = read_all(&slave, &master).iter().map(Vec::len).sum();
        assert_eq!(read, 6002);
    }

    #[test]
    fn input_comes_through_a_move_and_can_be_given_back() {
        let mut keys: Vec<&[u8]> = vec![b"", b"one\ntwo", b"\x04", b"a\x04b\nc", b"\x16\x03x\n"];
        let all: Vec<u8> = (32..127).collect();
        keys.push(&all);
        for keys in keys {
            let (master, slave) = tty::pair().unwrap();
            let modes = tty::modes(slave.as_fd()).unwrap();
            nix::unistd::write(&master, keys).unwrap();
            pause();
            let terminal = looked_at(&slave);
            let passage = Passage::new().unwrap();
            let mut notes = Vec::new();
            let mut note = |t: &Taken| {
                notes.push(t.clone());
                Ok(())
            };
            let input = take(&slave, 0, &passage, &mut note).unwrap();
            assert_eq!(bytes_waiting(slave.as_fd()).unwrap(), 0);
            let made = Made::new(&terminal).unwrap();
            made.type_in(&input).unwrap();
            assert_eq!(tty::modes(made.slave.as_fd()).unwrap(), modes);
            let last = notes.last().unwrap();
            last.give_back(&slave, &mut unnoted).unwrap();

            let (plain_master, plain) = tty::pair().unwrap();
            nix::unistd::write(&plain_master, keys).unwrap();
            pause();
            let expected = read_all(&plain, &plain_master);
            assert!(!expected.is_empty());
            assert_eq!(read_all(&slave, &master), expected, "{keys:?} given back");
            let there = read_all(&made.slave, made.master.as_ref().unwrap());
            assert_eq!(there, expected, "{keys:?} moved");
        }
    }
}
