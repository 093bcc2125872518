//! Mappings and descriptors in any number, with something to be known of each.

use super::area::Area;
use nix::fcntl::{fcntl, open, FcntlArg, FdFlag, OFlag};
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use nix::sys::stat::Mode;
use nix::unistd::{dup, lseek, pipe2, read, write, Whence};
use std::os::fd::OwnedFd;

/// Descriptors of a [`Group`].
const GROUP: usize = 6;

/// A crowd of mappings and descriptors.
#[derive(Debug)]
pub struct Crowd {
    area: Option<Area>,
    /// Pages of a mapping; the first holds something.
    each: usize,
    /// What that of each mapping was filled with last.
    seeds: Vec<u64>,
    groups: Vec<Group>,
    /// What is missing to the number wanted: duplicates of one.
    _more: Vec<OwnedFd>,
}

/// A file that is read, at an offset that a duplicate shares; a pipe that holds a
/// word; the file once more, and a device, which are closed by execve(2).
#[derive(Debug)]
struct Group {
    file: [OwnedFd; 2],
    offset: i64,
    pipe: (OwnedFd, OwnedFd),
    alone: OwnedFd,
    device: OwnedFd,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Group {
    fn new(number: i64) -> Result<Self, String> {
        let at = |path: &str, flags| {
            open(path, flags, Mode::empty()).map_err(|e| format!("open {path}: {e}"))
        };
        let own = "/proc/self/exe";
        let one = at(own, OFlag::O_RDONLY)?;
        lseek(&one, number, Whence::SeekSet).map_err(text)?;
        let pipe = pipe2(OFlag::O_NONBLOCK).map_err(text)?;
        write(&pipe.1, &number.to_le_bytes()).map_err(text)?;
        let alone = at(own, OFlag::O_RDONLY | OFlag::O_CLOEXEC)?;
        lseek(&alone, number + 7, Whence::SeekSet).map_err(text)?;
        Ok(Self {
            file: [dup(&one).map_err(text)?, one],
            offset: number,
            pipe,
            alone,
            device: at("/dev/null", OFlag::O_WRONLY | OFlag::O_CLOEXEC)?,
        })
    }

    /// Checks it, and reads on.
    fn use_it(&mut self, number: i64) -> Result<(), String> {
        let told = |fd| lseek(fd, 0, Whence::SeekCur).map_err(text);
        let offsets = [
            told(&self.file[0])?,
            told(&self.file[1])?,
            told(&self.alone)? - number - 7 + self.offset,
        ];
        if offsets != [self.offset; 3] {
            return Err(format!(
                "group {number} stands at {offsets:?} instead of {}",
                self.offset
            ));
        }
        let mut byte = [0];
        self.offset += read(&self.file[0], &mut byte).map_err(text)? as i64;
        let mut word = [0; 8];
        read(&self.pipe.0, &mut word).map_err(text)?;
        if i64::from_le_bytes(word) != number {
            return Err(format!("pipe {number} holds {word:?}"));
        }
        write(&self.pipe.1, &word).map_err(text)?;
        for (fd, expected) in [
            (&self.file[0], FdFlag::empty()),
            (&self.alone, FdFlag::FD_CLOEXEC),
            (&self.device, FdFlag::FD_CLOEXEC),
        ] {
            let flags = fcntl(fd, FcntlArg::F_GETFD).map_err(text)?;
            if flags != expected.bits() {
                return Err(format!("group {number}: flags {flags}"));
            }
        }
        write(&self.device, &byte).map_err(text)?;
        Ok(())
    }
}

impl Crowd {
    /// So many mappings of so many pages each, every other one writable, and so
    /// many descriptors.
    ///
    /// # Errors
    /// The limits of the kernel, and RLIMIT_NOFILE's hard one.
    pub fn new(mappings: u64, each: u64, descriptors: u64) -> Result<Self, String> {
        let each = each.max(1) as usize;
        let area = match mappings {
            0 => None,
            some => Some(Area::new(some as usize * each)?),
        };
        let seeds = (1..=mappings).collect::<Vec<_>>();
        for (n, area) in (0..seeds.len()).zip(area.iter().cycle()) {
            area.fill(n * each, seeds[n]);
            if n % 2 == 1 {
                area.protect(n * each, each, libc::PROT_READ)?;
            }
        }
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(text)?;
        if descriptors + 16 > soft {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(text)?;
        }
        let descriptors = descriptors as usize;
        let groups = (0..descriptors / GROUP).map(|n| Group::new(n as i64));
        let more = (0..descriptors % GROUP).map(|_| dup(std::io::stdin()).map_err(text));
        Ok(Self {
            groups: groups.collect::<Result<_, _>>()?,
            _more: more.collect::<Result<_, _>>()?,
            area,
            each,
            seeds,
        })
    }

    /// Checks and uses one of each.
    ///
    /// # Errors
    /// What is not as it was left.
    pub fn tick(&mut self, number: u64) -> Result<(), String> {
        if let Some(area) = &self.area {
            let n = (number % self.seeds.len() as u64) as usize;
            area.check(n * self.each, Some(self.seeds[n]))?;
            if n % 2 == 0 {
                self.seeds[n] = number;
                area.fill(n * self.each, number);
            }
        }
        if !self.groups.is_empty() {
            let n = (number % self.groups.len() as u64) as usize;
            self.groups[n].use_it(n as i64)?;
        }
        Ok(())
    }

    /// Checks all.
    ///
    /// # Errors
    /// As [`Crowd::tick`].
    pub fn check(&mut self) -> Result<(), String> {
        for (n, area) in (0..self.seeds.len()).zip(self.area.iter().cycle()) {
            area.check(n * self.each, Some(self.seeds[n]))?;
        }
        for (n, group) in self.groups.iter_mut().enumerate() {
            group.use_it(n as i64)?;
        }
        Ok(())
    }
}
