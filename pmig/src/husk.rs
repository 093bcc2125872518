//! The husk: the real process, with its PID and its address space, built while
//! the program still runs at the source.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::state::bounds::Bounds;
use crate::state::memory::{apply, steps, Backing, Layout, Vma, BOTTOM, PAGE, TOP};
use crate::sys::across;
use crate::sys::pagemap::{category, scan, Query};
use crate::sys::ptrace::{self, Change};
use crate::sys::spawn::Parent;
use crate::sys::{pidfd, spawn};
use crate::tracee::{Arg, Batch, RemoteAddr, Stopped};

/// Memory of ours in the husk: the runner and its tables.
const SCRATCH: u64 = 1 << 20;
/// Steps to a batch.
const CHUNK: usize = 2048;

/// A process that is nobody yet. Dropping it kills it.
pub struct Husk {
    stopped: Stopped,
    process: OwnedFd,
    vmas: Vec<Vma>,
}

fn not_there(run: &Range<u64>) -> Error {
    Error::bad(
        format!("memory {:x}-{:x}", run.start, run.end),
        "the program has none there",
    )
}

impl Husk {
    /// Makes the process, with the given PID (0: any), in the given cgroup,
    /// with nothing in its address space but what `layout` leaves free.
    ///
    /// # Errors
    ///
    /// EEXIST (in [`Error::Os`]) where the PID is taken.
    pub fn create(
        pid: i32,
        cgroup: Option<BorrowedFd<'_>>,
        parent: Option<Parent<'_>>,
        layout: &Layout,
    ) -> Result<Husk> {
        let image = spawn::husk_image().context("make", "the husk's image")?;
        let (gate, opener) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .context("make", "a pipe to the husk")?;
        let pid = spawn::husk(image.as_fd(), gate.as_fd(), cgroup, pid, parent)
            .context("make a process with pid", pid)?;
        let process = pidfd::open(pid).context("open the husk", pid)?;
        let killer = KillOnDrop(&process);
        ptrace::seize(pid, ptrace::EXITKILL | ptrace::TRACESYSGOOD)
            .context("attach to the husk", pid)?;
        nix::unistd::write(&opener, &[1]).context("start the husk", pid)?;
        match ptrace::wait(pid, Duration::from_secs(10)).context("wait for the husk", pid)? {
            Some(Change::Signal(libc::SIGTRAP)) => {}
            other => {
                return Err(Error::bad(
                    format!("husk {pid}"),
                    format!("it did not come to its trap: {other:?}"),
                ))
            }
        }
        let mut stopped =
            Stopped::husk(pid, RemoteAddr(spawn::HUSK_BASE), PAGE + spawn::HUSK_TABLE)?;
        let at = hole(&layout.vmas, SCRATCH)?;
        stopped.relocate_scratch(at, SCRATCH)?;
        let mut b = Batch::new();
        clear(&mut b, BOTTOM..at);
        clear(&mut b, at + SCRATCH..TOP);
        stopped.run(b)?;
        std::mem::forget(killer);
        Ok(Husk {
            stopped,
            process,
            vmas: Vec::new(),
        })
    }

    /// Makes a process that stands in for a program of that address space where
    /// something is rehearsed: with any PID, and nothing mapped but the vdso.
    pub fn stand_in(layout: &Layout) -> Result<Husk> {
        let layout = layout.of_the_kernel();
        let mut husk = Husk::create(0, None, None, &layout)?;
        husk.adopt(&layout, &BTreeMap::new())?;
        Ok(husk)
    }

    pub fn pid(&self) -> i32 {
        self.stopped.pid()
    }

    /// For what is done inside it.
    pub fn stopped(&mut self) -> &mut Stopped {
        &mut self.stopped
    }

    /// Ends it, and waits no longer than `within` until its PID is free.
    pub fn end(self, within: Duration) {
        pidfd::kill(self.process.as_fd());
        self.stopped.await_end(within);
    }

    /// Gives it another address space. `files` holds the mapped files by their
    /// numbers, open in this process. The husk must have no descriptors of the
    /// program's yet.
    pub fn adopt(&mut self, layout: &Layout, files: &BTreeMap<u32, OwnedFd>) -> Result<()> {
        let steps = steps(&self.vmas, &layout.vmas);
        if steps.is_empty() {
            return Ok(());
        }
        let lies_well = self.stopped.scratch().is_some_and(|(start, len)| {
            let in_the_way = |v: &Vma| v.start < start + len && start < v.end;
            !layout.vmas.iter().any(in_the_way)
        });
        if !lies_well {
            let mut both = layout.vmas.clone();
            both.extend(self.vmas.iter().cloned());
            both.sort_by_key(|v| v.start);
            self.stopped
                .relocate_scratch(hole(&both, SCRATCH)?, SCRATCH)?;
        }
        for chunk in steps.chunks(CHUNK) {
            let mut b = Batch::new();
            let mut here: BTreeMap<u32, Arg> = BTreeMap::new();
            let us = std::process::id();
            let process = b.call(
                "look at pmig",
                libc::SYS_pidfd_open,
                &[us.into(), 0u64.into()],
            );
            for step in chunk {
                let Some(n) = crate::state::memory::file_of(step) else {
                    continue;
                };
                let fd = files
                    .get(&n)
                    .ok_or_else(|| Error::bad("mapping", "its file is not open"))?;
                here.entry(n).or_insert_with(|| {
                    b.call(
                        "fetch a mapped file",
                        libc::SYS_pidfd_getfd,
                        &[process.into(), fd.as_raw_fd().into(), 0u64.into()],
                    )
                    .into()
                });
            }
            apply(chunk, &mut b, |n| here.get(&n).copied())?;
            b.call(
                "close the mapped files",
                libc::SYS_close_range,
                &[0u64.into(), (u32::MAX as u64).into(), 0u64.into()],
            );
            self.stopped.run(b)?;
        }
        self.vmas = layout.vmas.clone();
        Ok(())
    }

    /// Makes `exe` its executable, as `/proc/PID/exe` shows it. The husk must
    /// have no descriptors of the program's yet.
    ///
    /// # Errors
    /// [`Error::Bad`] for bounds that no kernel takes.
    pub fn run_from(&mut self, exe: BorrowedFd<'_>, bounds: &Bounds) -> Result<()> {
        let mut b = Batch::new();
        b.call(
            "close all descriptors",
            libc::SYS_close_range,
            &[0u64.into(), (u32::MAX as u64).into(), 0u64.into()],
        );
        b.call(
            "look at pmig",
            libc::SYS_pidfd_open,
            &[std::process::id().into(), 0u64.into()],
        );
        b.call(
            "fetch the executable",
            libc::SYS_pidfd_getfd,
            &[0u64.into(), exe.as_raw_fd().into(), 0u64.into()],
        );
        // The two above got the lowest numbers.
        bounds.set(&mut b, Some(1))?;
        b.call(
            "close the executable",
            libc::SYS_close_range,
            &[0u64.into(), (u32::MAX as u64).into(), 0u64.into()],
        );
        self.stopped.run(b).map(drop)
    }

    /// Writes runs of pages, wherever they lie in the program's own mappings; `bytes`
    /// holds them one behind the other.
    ///
    /// # Errors
    /// A run lies elsewhere, or cannot be written to; then some of them may have been.
    pub fn write(&self, runs: &[Range<u64>], bytes: &[u8]) -> Result<()> {
        for run in runs {
            self.has(run)?;
        }
        let (mut rest, mut bytes) = (runs, bytes);
        while !rest.is_empty() {
            let mut done = across::write(self.pid(), rest, bytes);
            while let [run, more @ ..] = rest {
                let len = (run.end - run.start) as usize;
                if done < len {
                    break;
                }
                (done, rest, bytes) = (done - len, more, &bytes[len..]);
            }
            // What the program may not write to itself is written like that only.
            let [run, more @ ..] = rest else { break };
            let (first, others) = bytes.split_at((run.end - run.start) as usize);
            self.stopped.mem().write_all_at(first, run.start).context(
                "fill the husk's memory at",
                format_args!("{:#x}", run.start),
            )?;
            (rest, bytes) = (more, others);
        }
        Ok(())
    }

    /// Takes pages away.
    pub fn discard(&mut self, runs: &[Range<u64>]) -> Result<()> {
        for run in runs {
            self.own(run)?;
        }
        for chunk in runs.chunks(CHUNK) {
            let mut b = Batch::new();
            for r in chunk {
                b.call(
                    "discard memory",
                    libc::SYS_madvise,
                    &[
                        RemoteAddr(r.start).into(),
                        (r.end - r.start).into(),
                        libc::MADV_DONTNEED.into(),
                    ],
                );
            }
            self.stopped.run(b)?;
        }
        Ok(())
    }

    /// The anonymous mappings that a run which a peer names lies in.
    ///
    /// # Errors
    /// There are others, or none, at a part of it.
    pub fn anonymous(&self, run: &Range<u64>) -> Result<Vec<Range<u64>>> {
        self.own(run)?;
        let first = self.vmas.partition_point(|v| v.end <= run.start);
        let within = self.vmas[first..].iter().take_while(|v| v.start < run.end);
        within
            .map(|v| match v.backing {
                Backing::Anonymous => Ok(v.range()),
                _ => Err(Error::bad(
                    format!("memory {:x}-{:x}", run.start, run.end),
                    "is not anonymous, and cannot follow later",
                )),
            })
            .collect()
    }

    /// The parts of these runs that are there, be it only as zeros: whoever reads its
    /// command line brings that in.
    pub fn present(&self, runs: &[Range<u64>]) -> Result<Vec<Range<u64>>> {
        let path = format!("/proc/{}/pagemap", self.pid());
        let pagemap = std::fs::File::open(&path).context("open", &path)?;
        let there = category::PRESENT | category::SWAPPED;
        let query = Query {
            any: there,
            tell: there,
            ..Query::default()
        };
        let mut present = Vec::new();
        for run in runs {
            scan(&pagemap, run.start, run.end, query, |r| {
                present.push(r.start..r.end)
            })
            .context("scan the pages of", self.pid())?;
        }
        Ok(present)
    }

    /// Whether pages that a peer names lie in private mappings of the program.
    fn own(&self, run: &Range<u64>) -> Result<()> {
        match run.start % PAGE == 0 && run.end % PAGE == 0 {
            true => self.has(run),
            false => Err(not_there(run)),
        }
    }

    /// The same of any bytes.
    fn has(&self, run: &Range<u64>) -> Result<()> {
        if run.start >= run.end {
            return Err(not_there(run));
        }
        let mut at = run.start;
        let first = self.vmas.partition_point(|v| v.end <= at);
        for v in &self.vmas[first..] {
            if v.start > at || !v.is_private() {
                return Err(not_there(run));
            }
            at = v.end;
            if at >= run.end {
                return Ok(());
            }
        }
        Err(not_there(run))
    }

    /// Adds to a batch what lets it enter a time namespace. It must be
    /// single-threaded, and root.
    pub fn enter_time(b: &mut Batch, namespace: BorrowedFd<'_>) {
        let us = b.call(
            "look at pmig",
            libc::SYS_pidfd_open,
            &[std::process::id().into(), 0u64.into()],
        );
        let ns = b.call(
            "fetch the time namespace",
            libc::SYS_pidfd_getfd,
            &[us.into(), namespace.as_raw_fd().into(), 0u64.into()],
        );
        b.call(
            "enter the time namespace",
            libc::SYS_setns,
            &[ns.into(), libc::CLONE_NEWTIME.into()],
        );
        for fd in [us, ns] {
            b.call("close", libc::SYS_close, &[fd.into()]);
        }
    }

    /// Takes our memory out of it; then it stands as the program will go on.
    pub fn settle(&mut self) -> Result<()> {
        self.stopped.settle()
    }

    /// Lets it go: its cgroup must have been frozen before. From here on its
    /// life hangs on nobody's.
    pub fn let_go(self) -> Result<OwnedFd> {
        let Husk {
            stopped, process, ..
        } = self;
        stopped.detach()?;
        Ok(process)
    }
}

struct KillOnDrop<'a>(&'a OwnedFd);

impl Drop for KillOnDrop<'_> {
    fn drop(&mut self) {
        pidfd::kill(self.0.as_fd());
    }
}

fn clear(b: &mut Batch, r: Range<u64>) {
    b.call(
        "empty the husk",
        libc::SYS_munmap,
        &[RemoteAddr(r.start).into(), (r.end - r.start).into()],
    );
}

/// The middle of the largest hole between mappings.
fn hole(vmas: &[Vma], len: u64) -> Result<u64> {
    let mut at = 1 << 24;
    let mut best = 0..0u64;
    for next in vmas
        .iter()
        .map(|v| v.range())
        .chain(std::iter::once(TOP..TOP))
    {
        if next.start > at && next.start - at > best.end - best.start {
            best = at..next.start;
        }
        at = at.max(next.end);
    }
    if best.end - best.start < 4 * len {
        return Err(Error::bad(
            "address space",
            "there is no hole in it for pmig",
        ));
    }
    Ok((best.start + (best.end - best.start) / 2) & !(PAGE - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_husk_has_the_address_space_of_the_program() {
        let mut child = Command::new("python3")
            .args(["-c", "import time; x=[1]*100000; time.sleep(100)"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let layout = Layout::capture(child.id() as i32, &[]).unwrap();
        let files: BTreeMap<u32, OwnedFd> = layout
            .files
            .iter()
            .enumerate()
            .map(|(n, f)| (n as u32, std::fs::File::open(&f.path).unwrap().into()))
            .collect();
        let mut husk = Husk::create(0, None, None, &layout).unwrap();
        husk.adopt(&layout, &files).unwrap();
        let data = layout
            .vmas
            .iter()
            .find(|v| v.is_private() && v.prot == 3)
            .unwrap();
        let run = data.start..data.start + PAGE;
        husk.write(std::slice::from_ref(&run), &[7; PAGE as usize])
            .unwrap();
        husk.discard(std::slice::from_ref(&run)).unwrap();
        let beyond = run.start..TOP - PAGE;
        husk.write(std::slice::from_ref(&beyond), &[]).unwrap_err();
        husk.settle().unwrap();
        let there = Layout::capture(husk.pid(), &layout.files).unwrap();
        assert_eq!(steps(&layout.vmas, &there.vmas).len(), {
            // Mappings without a watcher always count as fresh.
            let fresh = there.vmas.iter().filter(|v| v.fresh).count();
            let maps = |s: &[crate::state::memory::Step]| {
                s.iter()
                    .filter(|s| matches!(s, crate::state::memory::Step::Map(_)))
                    .count()
            };
            let s = steps(&layout.vmas, &there.vmas);
            assert_eq!(maps(&s), fresh);
            s.len()
        });
        let mut same = there.vmas.clone();
        same.iter_mut().for_each(|v| v.fresh = false);
        let mut was = layout.vmas.clone();
        was.iter_mut().for_each(|v| v.fresh = false);
        assert_eq!(steps(&was, &same), []);
        let pid = husk.pid();
        drop(husk);
        child.kill().unwrap();
        child.wait().unwrap();
        // Whether dead or a zombie that nobody has reaped yet.
        let state = || std::fs::read_to_string(format!("/proc/{pid}/stat"));
        while state().is_ok_and(|s| !s.contains(") Z ")) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
