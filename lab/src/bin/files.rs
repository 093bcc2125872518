//! Holds descriptors of every kind that stays within one process, uses them,
//! and checks flags, offsets, contents and who shares with whom.

use lab::victim::{run, Args, Mix, Pace};
use nix::fcntl::{fcntl, open, FcntlArg, FdFlag, OFlag};
use nix::sys::stat::{fstat, Mode};
use nix::unistd::{dup, dup2_raw, lseek, pipe2, read, write, Whence};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitCode;

const HIGH: i32 = 200;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn open_at(path: &str, flags: OFlag) -> Result<OwnedFd, String> {
    let mode = Mode::from_bits_truncate(0o640);
    open(path, flags, mode).map_err(|e| format!("open {path}: {e}"))
}

struct Descriptors {
    /// Two descriptors of one open file description, and one of another.
    shared: [OwnedFd; 2],
    high: OwnedFd,
    alone: OwnedFd,
    append: [OwnedFd; 2],
    read_only: OwnedFd,
    directory: OwnedFd,
    devices: Vec<OwnedFd>,
    pipe: (OwnedFd, OwnedFd),
    full: (OwnedFd, OwnedFd),
}

impl Descriptors {
    fn new(prefix: &str) -> Result<Self, String> {
        let fresh = OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_RDWR;
        let one = open_at(&format!("{prefix}.one"), fresh)?;
        let second = dup(&one).map_err(text)?;
        let high = high_copy(&one)?;
        let name = format!("{prefix}.append");
        let append = open_at(&name, fresh | OFlag::O_APPEND | OFlag::O_CLOEXEC)?;
        let again = open_at(&name, OFlag::O_WRONLY | OFlag::O_APPEND)?;
        let mut devices = Vec::new();
        for name in ["null", "zero", "full", "urandom"] {
            devices.push(open_at(&format!("/dev/{name}"), OFlag::O_RDWR)?);
        }
        let pipe = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).map_err(text)?;
        fcntl(&pipe.1, FcntlArg::F_SETPIPE_SZ(256 * 1024)).map_err(text)?;
        let full = pipe2(OFlag::O_NONBLOCK).map_err(text)?;
        while write(&full.1, &[7; 4096]).is_ok() {}
        write(&pipe.1, &[9; 100_000]).map_err(text)?;
        Ok(Self {
            shared: [one, second],
            high,
            alone: open_at(&format!("{prefix}.one"), OFlag::O_RDONLY)?,
            append: [append, again],
            read_only: open_at("/proc/self/exe", OFlag::O_RDONLY | OFlag::O_CLOEXEC)?,
            directory: open_at("/usr", OFlag::O_DIRECTORY)?,
            devices,
            pipe,
            full,
        })
    }

    fn all(&self) -> Vec<&OwnedFd> {
        let mut all = vec![
            &self.high,
            &self.alone,
            &self.read_only,
            &self.directory,
            &self.pipe.0,
            &self.pipe.1,
            &self.full.0,
            &self.full.1,
        ];
        all.extend(self.shared.iter().chain(&self.append).chain(&self.devices));
        all
    }

    /// Number, status flags, descriptor flags and kind of each.
    fn flags(&self) -> Result<Vec<(i32, i32, i32, u32)>, String> {
        let one = |fd: &OwnedFd| {
            Ok((
                fd.as_raw_fd(),
                fcntl(fd, FcntlArg::F_GETFL).map_err(text)?,
                fcntl(fd, FcntlArg::F_GETFD).map_err(text)?,
                fstat(fd).map_err(text)?.st_mode,
            ))
        };
        self.all().into_iter().map(one).collect()
    }

    fn use_all(&self, round: u64) -> Result<(), String> {
        let line = format!("{round:08}\n");
        let writer = [&self.shared[0], &self.high][(round % 2) as usize];
        write(writer, line.as_bytes()).map_err(text)?;
        for fd in self.shared.iter().chain([&self.high]) {
            expect("shared offset", position(fd)?, 9 * (round as i64 + 1))?;
        }
        let mut buffer = [0; 9];
        expect(
            "bytes read",
            read(&self.alone, &mut buffer).map_err(text)?,
            9,
        )?;
        expect("what was read", buffer.as_slice(), line.as_bytes())?;
        for fd in &self.append {
            // Wherever it stands, it writes at the end.
            write(fd, line.as_bytes()).map_err(text)?;
        }
        let end = 18 * (round as i64 + 1);
        expect("appended", position(&self.append[1])?, end)?;
        read(&self.read_only, &mut buffer).map_err(text)?;
        expect("read", position(&self.read_only)?, 9 * (round as i64 + 1))?;
        self.use_pipes()?;
        let [null, zero, full, _] = self.devices.as_slice() else {
            return Err("a device is missing".into());
        };
        expect("null", read(null, &mut buffer).map_err(text)?, 0)?;
        expect("zero", read(zero, &mut buffer).map_err(text)?, 9)?;
        expect("zeroes", buffer, [0; 9])?;
        expect("full", write(full, b"x"), Err(nix::errno::Errno::ENOSPC))?;
        let open = nix::fcntl::openat(
            &self.directory,
            "bin",
            OFlag::O_PATH | OFlag::O_DIRECTORY,
            Mode::empty(),
        );
        open.map(drop).map_err(|e| format!("bin in /usr: {e}"))
    }

    fn use_pipes(&self) -> Result<(), String> {
        let size = fcntl(&self.pipe.0, FcntlArg::F_GETPIPE_SZ).map_err(text)?;
        expect("pipe size", size, 256 * 1024)?;
        let mut buffer = vec![0; 1000];
        expect(
            "piped",
            read(&self.pipe.0, &mut buffer).map_err(text)?,
            1000,
        )?;
        expect("pipe's bytes", buffer.iter().all(|byte| *byte == 9), true)?;
        write(&self.pipe.1, &buffer).map_err(text)?;
        let more = write(&self.full.1, &[7; 4096]);
        expect("full pipe", more, Err(nix::errno::Errno::EAGAIN))
    }
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<(), String> {
    if found == expected {
        return Ok(());
    }
    Err(format!("{what}: {found:?} instead of {expected:?}"))
}

fn position(fd: impl AsFd) -> Result<i64, String> {
    lseek(fd, 0, Whence::SeekCur).map_err(text)
}

#[allow(unsafe_code)]
fn high_copy(fd: &OwnedFd) -> Result<OwnedFd, String> {
    // SAFETY: nothing of this program has a number that high.
    unsafe { dup2_raw(fd, HIGH) }.map_err(text)
}

fn main() -> ExitCode {
    run(|| {
        let args = Args::new(&["lines", "pace_us", "prefix"])?;
        let pace = Pace::new(&args, 10_000)?;
        let prefix = args.text("prefix").unwrap_or("/srv/work/files");
        let descriptors = Descriptors::new(prefix)?;
        let before = descriptors.flags()?;
        let closed = before.iter().filter(|(_, _, flags, _)| {
            FdFlag::from_bits_truncate(*flags).contains(FdFlag::FD_CLOEXEC)
        });
        expect("closed on exec", closed.count(), 4)?;
        let mut mix = Mix(1);
        let mut out = std::io::stdout();
        for round in 0..args.number("lines", 400)? {
            descriptors.use_all(round)?;
            expect("flags", descriptors.flags()?, before.clone())?;
            let line = format!("{round} {:016x}\n", mix.add(round));
            out.write_all(line.as_bytes()).map_err(text)?;
            pace.pass()?;
        }
        let mut drained = [0; 4096];
        let mut count = 0;
        while let Ok(n @ 1..) = read(&descriptors.full.0, &mut drained) {
            expect("drained", drained[..n].iter().all(|byte| *byte == 7), true)?;
            count += n;
        }
        expect("drained bytes", count, 65536)?;
        Ok(mix.0)
    })
}
