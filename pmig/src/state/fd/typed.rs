//! What was typed for a program and not read yet.
//!
//! It lies in the kernel, and to read it is to take it: so it is taken at the
//! end, and all that is needed to give it back is known to somebody else too.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{tee, OFlag, SpliceFFlags};
use nix::unistd::{pipe2, read};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Obstacle, Result};
use crate::sys::fds::bytes_waiting;
use crate::sys::tty::{self, Modes, DISABLED};

/// As many bytes as a terminal holds unread: `N_TTY_BUF_SIZE`, less one.
const FULL: usize = 4095;

/// What input is called in messages.
const OBJECT: &str = "what was typed for the program";

/// What was typed and not read yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
    /// Where in `bytes` there is no byte but an end of file (Control-D),
    /// ascending.
    pub ends: Vec<u32>,
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
    pub(super) fn check(&self) -> Result<()> {
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
    pub(super) fn fill(&self, fd: &OwnedFd, modes: &Modes) -> std::io::Result<()> {
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

#[cfg(test)]
mod tests {
    use nix::fcntl::{fcntl, FcntlArg};

    use super::super::terminal::{look, Control, Made, Terminal};
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
            assert_eq!(tty::modes(made.slave().as_fd()).unwrap(), modes);
            let last = notes.last().unwrap();
            last.give_back(&slave, &mut unnoted).unwrap();

            let (plain_master, plain) = tty::pair().unwrap();
            nix::unistd::write(&plain_master, keys).unwrap();
            pause();
            let expected = read_all(&plain, &plain_master);
            assert!(!expected.is_empty());
            assert_eq!(read_all(&slave, &master), expected, "{keys:?} given back");
            let there = read_all(made.slave(), made.master.as_ref().unwrap());
            assert_eq!(there, expected, "{keys:?} moved");
        }
    }
}
