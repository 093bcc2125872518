//! `/proc/PID/status`.

use super::Kept;
use crate::error::{Error, Result};

/// `/proc/PID/status` (proc_pid_status(5)): what pmig wants of it. Read while
/// programs stand still, so it is taken apart in one go, which the procfs crate
/// does not do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// As the kernel escapes it.
    pub name: String,
    /// The state's letter: R, S, D, T, t, Z, X, ...
    pub letter: char,
    pub pid: i32,
    pub tgid: i32,
    pub ppid: i32,
    pub tracer: i32,
    pub threads: u64,
    /// Real, effective, saved and filesystem user.
    pub uids: [u32; 4],
    /// The same of the group.
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    /// Since Linux 4.7.
    pub umask: Option<u32>,
    /// None: a thread of the kernel, or a process that has ended.
    pub memory: bool,
    /// Signals pending for the thread and for the process.
    pub pending: [u64; 2],
    pub ignored: u64,
    pub caught: u64,
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    /// All where the kernel has no such set.
    pub bounding: u64,
    pub ambient: u64,
    pub no_new_privs: bool,
    /// 0: none, 1: strict, 2: filter.
    pub seccomp: u32,
    /// `x86_Thread_features: shstk ...`: a shadow stack is on.
    pub shadow_stack: bool,
    /// `untag_mask`: not all ones where addresses carry tags (LAM).
    pub tagged_addresses: bool,
}

/// What a process holds of memory, by kinds, in kB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    pub anonymous: u64,
    pub of_files: u64,
    pub shared: u64,
    pub swapped: u64,
}

impl Held {
    /// Of a process whose files are kept open.
    ///
    /// # Errors
    /// [`Error::Gone`], or [`Error::Bad`] where the text is not a status.
    pub fn again(files: &Kept) -> Result<Held> {
        let text = files.text("status")?;
        if !text.contains("\nRssAnon:") {
            // A process that has ended holds nothing.
            return Err(Error::Gone(files.pid()));
        }
        let of = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let kb = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
            kb.and_then(|kb| kb.trim_end().parse().ok())
                .ok_or_else(|| Error::bad(format!("{name} of {}", files.pid()), "is no number"))
        };
        Ok(Held {
            anonymous: of("RssAnon:")?,
            of_files: of("RssFile:")?,
            shared: of("RssShmem:")?,
            swapped: of("VmSwap:")?,
        })
    }
}

impl Status {
    /// # Errors
    /// [`Error::Gone`], or [`Error::Bad`] where the text is not a status.
    pub fn read(pid: i32) -> Result<Status> {
        Status::again(&Kept::of(pid))
    }

    /// The same of a process whose files are kept open.
    ///
    /// # Errors
    /// As [`Status::read`].
    pub fn again(files: &Kept) -> Result<Status> {
        Status::parse(files.pid(), &files.text("status")?)
    }

    /// Whether it tells of the same as `before`, but for what changes by itself.
    pub fn is_of_same_settings(&self, before: &Status) -> bool {
        let now = Status {
            letter: before.letter,
            tracer: before.tracer,
            pending: before.pending,
            ..self.clone()
        };
        now == *before
    }

    fn parse(pid: i32, text: &str) -> Result<Status> {
        let mut status = Status {
            bounding: u64::MAX,
            ..Status::default()
        };
        let bad = |line: &str| {
            Error::bad(
                format!("/proc/{pid}/status"),
                format!("not understood: {}", crate::error::printable(line)),
            )
        };
        for line in text.lines() {
            let (name, value) = line.split_once(':').ok_or_else(|| bad(line))?;
            status
                .take(name, value.trim_ascii())
                .ok_or_else(|| bad(line))?;
        }
        if status.pid <= 0 || status.letter == '\0' || status.threads == 0 {
            return Err(bad("lines are missing"));
        }
        Ok(status)
    }

    fn take(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "Name" => self.name = value.into(),
            "State" => self.letter = value.chars().next()?,
            "Umask" => self.umask = Some(u32::from_str_radix(value, 8).ok()?),
            "Tgid" => self.tgid = value.parse().ok()?,
            "Pid" => self.pid = value.parse().ok()?,
            "PPid" => self.ppid = value.parse().ok()?,
            "TracerPid" => self.tracer = value.parse().ok()?,
            "Threads" => self.threads = value.parse().ok()?,
            "Uid" => self.uids = four(value)?,
            "Gid" => self.gids = four(value)?,
            "Groups" => {
                let all = value.split_ascii_whitespace().map(str::parse);
                self.groups = all.collect::<std::result::Result<_, _>>().ok()?;
            }
            "VmSize" => self.memory = true,
            "SigPnd" => self.pending[0] = mask(value)?,
            "ShdPnd" => self.pending[1] = mask(value)?,
            "SigIgn" => self.ignored = mask(value)?,
            "SigCgt" => self.caught = mask(value)?,
            "CapInh" => self.inheritable = mask(value)?,
            "CapPrm" => self.permitted = mask(value)?,
            "CapEff" => self.effective = mask(value)?,
            "CapBnd" => self.bounding = mask(value)?,
            "CapAmb" => self.ambient = mask(value)?,
            "NoNewPrivs" => self.no_new_privs = value == "1",
            "Seccomp" => self.seccomp = value.parse().ok()?,
            "x86_Thread_features" => {
                self.shadow_stack = value.split_ascii_whitespace().any(|f| f == "shstk");
            }
            "untag_mask" => self.tagged_addresses = value != "0xffffffffffffffff",
            _ => {}
        }
        Some(())
    }
}

/// The signals pending for a process, asked for again and again.
#[derive(Debug)]
pub struct Pending(Kept);

impl Pending {
    /// # Errors
    /// [`Error::Gone`] where there is no such process; those of open(2).
    pub fn of(pid: i32) -> Result<Pending> {
        let files = Kept::of(pid);
        files.read("status")?;
        Ok(Pending(files))
    }

    /// The sets of the thread and of the process now.
    ///
    /// # Errors
    /// [`Error::Gone`] where the process has been reaped; [`Error::Bad`] where
    /// the text is not a status.
    pub fn now(&self) -> Result<[u64; 2]> {
        let text = self.0.read("status")?;
        pending_in(&text).ok_or_else(|| {
            Error::bad(
                format!("/proc/{}/status", self.0.pid()),
                "it names no pending signals",
            )
        })
    }
}

/// Only these two lines, and none that the program could have put into its
/// name: the kernel escapes the ends of lines there.
fn pending_in(text: &[u8]) -> Option<[u64; 2]> {
    let value = |name: &[u8]| {
        let mut lines = text.split(|b| *b == b'\n');
        let value = lines.find_map(|l| l.strip_prefix(name))?;
        mask(std::str::from_utf8(value).ok()?.trim_ascii())
    };
    Some([value(b"SigPnd:")?, value(b"ShdPnd:")?])
}

fn mask(value: &str) -> Option<u64> {
    u64::from_str_radix(value, 16).ok()
}

fn four(value: &str) -> Option<[u32; 4]> {
    let mut all = value.split_ascii_whitespace().map(str::parse);
    let mut next = || all.next()?.ok();
    Some([next()?, next()?, next()?, next()?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use procfs::process::Process;
    use std::io::Read as _;
    use std::process::{Command, Stdio};

    #[test]
    fn it_says_what_the_procfs_crate_says() {
        let mut seen = 0;
        for process in procfs::process::all_processes().unwrap().flatten() {
            let (Ok(s), Ok(theirs)) = (Status::read(process.pid), process.status()) else {
                continue;
            };
            if process.pid == std::process::id() as i32 {
                // Its threads come and go.
                continue;
            }
            seen += 1;
            assert_eq!(
                (s.pid, s.tgid, s.ppid),
                (theirs.pid, theirs.tgid, theirs.ppid)
            );
            assert_eq!(s.tracer, theirs.tracerpid);
            assert_eq!(s.uids, [theirs.ruid, theirs.euid, theirs.suid, theirs.fuid]);
            assert_eq!(s.gids, [theirs.rgid, theirs.egid, theirs.sgid, theirs.fgid]);
            assert_eq!((&s.groups, s.umask), (&theirs.groups, theirs.umask));
            assert_eq!(s.memory, theirs.vmsize.is_some());
            assert_eq!((s.ignored, s.caught), (theirs.sigign, theirs.sigcgt));
            assert_eq!(
                [
                    s.inheritable,
                    s.permitted,
                    s.effective,
                    s.bounding,
                    s.ambient
                ],
                [
                    theirs.capinh,
                    theirs.capprm,
                    theirs.capeff,
                    theirs.capbnd.unwrap(),
                    theirs.capamb.unwrap()
                ]
            );
            assert_eq!(Some(u64::from(s.no_new_privs)), theirs.nonewprivs);
            assert_eq!(Some(s.seccomp), theirs.seccomp);
        }
        assert!(seen > 0);
    }

    #[test]
    fn reads_its_own() {
        let own = Process::myself().unwrap();
        let s = Status::read(own.pid).unwrap();
        assert_eq!(s.pid, own.pid);
        assert!(!s.tagged_addresses && s.memory && "RSD".contains(s.letter));
    }

    #[test]
    fn pending_signals_are_those_of_the_whole_status() {
        let own = std::process::id() as i32;
        let pending = Pending::of(own).unwrap();
        assert_eq!(pending.now().unwrap(), Status::read(own).unwrap().pending);
        assert_eq!(
            pending_in(b"Name:\tx\nSigPnd:\t0000000000000400\nShdPnd:\t8000000000000000\n"),
            Some([0x400, 1 << 63])
        );
        assert_eq!(pending_in(b"Name:\tSigPnd:\t1\nShdPnd:\t1\n"), None);
        let gone = Pending::of(i32::MAX);
        assert!(matches!(gone, Err(Error::Gone(_))), "{gone:?}");
    }

    #[test]
    fn pending_signals_are_found_behind_many_groups() {
        let program = "import os, signal, time; os.setgroups(range(70000, 72000)); \
                       signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); \
                       print(flush=True); time.sleep(60)";
        let mut child = Command::new("python3")
            .args(["-c", program])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = child.stdout.as_mut().unwrap().read(&mut [0]).unwrap();
        let pending = Pending::of(child.id() as i32).unwrap();
        let before = pending.now();
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1).unwrap();
        let after = pending.now();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(said, 1, "it needs the right to set its groups");
        assert_eq!(before.unwrap(), [0, 0]);
        assert_eq!(after.unwrap(), [0, 1 << (libc::SIGUSR1 - 1)]);
    }

    #[test]
    fn sees_shadow_stacks_and_tagged_addresses() {
        let own = crate::proc::text(std::process::id() as i32, "status").unwrap();
        let own: String = own
            .lines()
            .filter(|l| !l.starts_with("untag_mask") && !l.starts_with("x86_Thread_features"))
            .map(|l| format!("{l}\n"))
            .collect();
        let s = Status::parse(
            1,
            &(own.clone() + "untag_mask:\t0x7fffffffffff\nx86_Thread_features:\tshstk wrss\n"),
        )
        .unwrap();
        assert!(s.shadow_stack && s.tagged_addresses);
        let s = Status::parse(1, &own).unwrap();
        assert!(!s.shadow_stack && !s.tagged_addresses);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Status::parse(1, "").is_err());
        assert!(Status::parse(1, "Name\nUid:\t1\n").is_err());
        assert!(Status::parse(1, "Uid:\t1 2 3\n").is_err());
    }
}
