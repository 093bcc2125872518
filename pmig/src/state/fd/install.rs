//! The way of open descriptions into the process being built: it pulls them
//! over itself, each straight to its number.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsRawFd;

use super::opened::Opened;
use super::Kind;
use crate::error::{Error, Result};
use crate::tracee::{Arg, Batch, Call, Done};

/// Who takes a table as its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    Program,
    /// A process with which that is rehearsed: a terminal that it controlled
    /// would hang up at its end, so it gets none.
    StandIn,
}

/// Calls whose results tell whether the installation went as planned.
#[derive(Debug)]
pub struct Installation {
    expected: Vec<(Call, i32)>,
}

/// The numbers in use in the process, as the plan goes on: the kernel always
/// gives the lowest free one.
struct Numbers {
    used: BTreeSet<i32>,
    /// Every number below is in use.
    low: i32,
}

impl Numbers {
    fn lowest_free(&mut self) -> i32 {
        while self.used.contains(&self.low) {
            self.low += 1;
        }
        self.low
    }

    fn close(&mut self, fd: i32) {
        self.used.remove(&fd);
        self.low = self.low.min(fd);
    }
}

struct Plan<'a> {
    batch: &'a mut Batch,
    numbers: Numbers,
    expected: Vec<(Call, i32)>,
}

impl Plan<'_> {
    /// A call that returns a new descriptor.
    fn opens(&mut self, what: &'static str, number: i64, args: &[Arg]) -> i32 {
        let fd = self.numbers.lowest_free();
        let call = self.batch.call(what, number, args);
        self.expected.push((call, fd));
        self.numbers.used.insert(fd);
        fd
    }

    fn dup(&mut self, from: i32, to: i32, cloexec: bool) {
        let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
        let args = [from.into(), to.into(), flags.into()];
        let call = self
            .batch
            .call("duplicate a descriptor", libc::SYS_dup3, &args);
        self.expected.push((call, to));
        self.numbers.used.insert(to);
    }

    fn close(&mut self, fd: i32) {
        self.batch
            .call("close a descriptor", libc::SYS_close, &[fd.into()]);
        self.numbers.close(fd);
    }
}

impl Opened {
    /// Adds the calls by which the process takes this table as its own, working
    /// and root directory included; whatever it has open is closed first.
    ///
    /// `session` is the process that holds this table. The process being built
    /// must still be allowed to copy its descriptors (pidfd_getfd(2): ptrace
    /// access), to call chroot(2), and have an `RLIMIT_NOFILE` above
    /// [`FdTable::highest`](super::FdTable::highest) + 1. Give what the batch
    /// returned to [`Installation::check`].
    pub fn install(&self, session: i32, batch: &mut Batch, whose: Whose) -> Installation {
        batch.call(
            "close all descriptors",
            libc::SYS_close_range,
            &[0u32.into(), u32::MAX.into(), 0.into()],
        );
        let mut plan = Plan {
            batch,
            numbers: Numbers {
                used: BTreeSet::new(),
                low: 0,
            },
            expected: Vec::new(),
        };
        let wanted: BTreeSet<i32> = self.table.holders.iter().map(|h| h.fd).collect();
        // The helper takes the first number nobody wants, out of everyone's way.
        let mut nobodys = (0..).filter(|n| !wanted.contains(n));
        let mut spare = || nobodys.next().unwrap_or(i32::MAX);
        let args = [session.into(), 0.into()];
        let mut helper = plan.opens("open a handle on pmig", libc::SYS_pidfd_open, &args);
        let place = spare();
        if helper != place {
            plan.dup(helper, place, true);
            plan.close(helper);
            helper = place;
        }
        let pull = |plan: &mut Plan<'_>, fd: i32| {
            let args = [helper.into(), fd.into(), 0.into()];
            plan.opens("take over a descriptor", libc::SYS_pidfd_getfd, &args)
        };

        // What has no terminal yet, and leads its session, can be given one.
        let real = whose == Whose::Program;
        let controlling = self.table.terminals.iter().position(|t| t.controls);
        if let Some(n) = controlling.filter(|_| real) {
            let fd = pull(&mut plan, self.terminals[n].slave().as_raw_fd());
            plan.batch.call(
                "take the terminal",
                libc::SYS_ioctl,
                &[fd.into(), libc::TIOCSCTTY.into(), 0.into()],
            );
            plan.close(fd);
        }
        // By that name, which may lead elsewhere below another root.
        let name = plan.batch.data(b"/dev/tty\0");
        let mut by_name = BTreeMap::new();
        for (n, d) in self.table.descriptions.iter().enumerate() {
            if !real || !matches!(&d.kind, Kind::Terminal(end) if end.by_name) {
                continue;
            }
            let args = [libc::AT_FDCWD.into(), name.into(), d.flags.into(), 0.into()];
            let fd = plan.opens("open /dev/tty", libc::SYS_openat, &args);
            let place = spare();
            if fd != place {
                plan.dup(fd, place, true);
                plan.close(fd);
            }
            by_name.insert(n, place);
        }

        let root = pull(&mut plan, self.root.as_raw_fd());
        let dot = plan.batch.data(b".\0");
        plan.batch
            .call("go to the root directory", libc::SYS_fchdir, &[root.into()]);
        plan.batch
            .call("set the root directory", libc::SYS_chroot, &[dot.into()]);
        plan.close(root);
        let cwd = pull(&mut plan, self.cwd.as_raw_fd());
        plan.batch.call(
            "go to the working directory",
            libc::SYS_fchdir,
            &[cwd.into()],
        );
        plan.close(cwd);

        let mut first: Vec<Option<i32>> = vec![None; self.descriptions.len()];
        for h in &self.table.holders {
            let n = h.description as usize;
            match first[n] {
                Some(from) => plan.dup(from, h.fd, h.cloexec),
                None => {
                    let got = match &self.descriptions[n] {
                        Some(fd) => pull(&mut plan, fd.as_raw_fd()),
                        None if real => by_name[&n],
                        None => pull(&mut plan, self.cwd.as_raw_fd()),
                    };
                    if got != h.fd {
                        plan.dup(got, h.fd, h.cloexec);
                        plan.close(got);
                    } else if !h.cloexec {
                        // pidfd_getfd(2) sets close-on-exec.
                        plan.batch.call(
                            "set the flags of a descriptor",
                            libc::SYS_fcntl,
                            &[h.fd.into(), libc::F_SETFD.into(), 0.into()],
                        );
                    }
                    first[n] = Some(h.fd);
                }
            }
        }
        plan.close(helper);
        Installation {
            expected: plan.expected,
        }
    }
}

impl Installation {
    /// Makes sure that every descriptor came to its number.
    ///
    /// # Errors
    /// [`Error::Bad`] where one did not: the process is of no use then.
    pub fn check(&self, done: &Done) -> Result<()> {
        for &(call, fd) in &self.expected {
            let got = done.result(call);
            if got != i64::from(fd) {
                return Err(Error::bad(
                    format!("fd {fd}"),
                    format!("came to number {got} in the process being built"),
                ));
            }
        }
        Ok(())
    }
}
