//! What the children of the hammer do, and how to bring them into each state.

use crate::raw;
use pmig::sys::kmod::Kmod;
use pmig::sys::{pidfd, ptrace};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

pub const CGROUP: &str = "/sys/fs/cgroup";

/// A child, killed and reaped when dropped.
pub struct Victim {
    pub pid: i32,
    pub pidfd: OwnedFd,
    cgroup: Option<PathBuf>,
    freezer_v1: Option<PathBuf>,
}

impl Drop for Victim {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        // By the descriptor: the number may be another's by now.
        pidfd::kill(self.fd());
        if let Some(dir) = &self.cgroup {
            let _ = fs::write(dir.join("cgroup.kill"), "1");
            let _ = self.freeze(false);
        }
        if let Some(state) = &self.freezer_v1 {
            // It holds even the killed.
            let _ = fs::write(state, "THAWED");
        }
        let flags = nix::sys::wait::WaitPidFlag::__WALL;
        while let Ok(status) = nix::sys::wait::waitpid(pid, Some(flags)) {
            use nix::sys::wait::WaitStatus::{Exited, Signaled};
            if matches!(status, Exited(..) | Signaled(..)) {
                break;
            }
        }
        let Some(dir) = &self.cgroup else { return };
        // Descendants end too, and those that it made tracees of ours are ours
        // to reap.
        let group = nix::unistd::Pid::from_raw(-self.pid);
        let reap = nix::sys::wait::WaitPidFlag::WNOHANG | flags;
        let end = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(dir).is_err() && Instant::now() < end {
            let _ = nix::sys::wait::waitpid(group, Some(reap));
            let _ = fs::write(dir.join("cgroup.kill"), "1");
            sleep(Duration::from_millis(1));
        }
    }
}

/// The cgroup of all confined children; each has one of its own below.
fn pen() -> io::Result<PathBuf> {
    let pen = PathBuf::from(format!("{CGROUP}/hammer-pen"));
    if !pen.exists() {
        fs::create_dir(&pen)?;
        // Not memory.max: the kernel's log is not to tell of a lack of memory.
        for (file, value) in [("memory.high", "256M"), ("cgroup.subtree_control", "+pids")] {
            if let Err(e) = fs::write(pen.join(file), value) {
                println!("skipped: {file}: {e}");
            }
        }
    }
    Ok(pen)
}

fn new_cell() -> io::Result<(PathBuf, OwnedFd)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = pen()?.join(format!("{}-{count}", std::process::id()));
    fs::create_dir(&dir)?;
    let _ = fs::write(dir.join("pids.max"), "16");
    let open = fs::File::open(&dir)?;
    Ok((dir, open.into()))
}

impl Victim {
    pub fn new(body: impl FnOnce() -> i32) -> io::Result<Self> {
        let pid = raw::fork(body)?;
        Ok(Victim {
            pid,
            pidfd: pidfd::open(pid)?,
            cgroup: None,
            freezer_v1: None,
        })
    }

    /// One that may be made to do anything at all: see [`raw::fork_confined`].
    pub fn confined(body: impl FnOnce() -> i32) -> io::Result<Self> {
        let (cgroup, open) = new_cell().ok().unzip();
        let pid = raw::fork_confined(open.as_ref(), body)?;
        Ok(Victim {
            pid,
            pidfd: pidfd::open(pid)?,
            cgroup,
            freezer_v1: None,
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The kernel's letter for its state, and the call it is in (-1: none).
    pub fn state(&self) -> (char, i64) {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let letter = stat.rsplit(") ").next().and_then(|s| s.chars().next());
        let call = fs::read_to_string(format!("/proc/{}/syscall", self.pid)).unwrap_or_default();
        let nr = call.split_whitespace().next().and_then(|n| n.parse().ok());
        (letter.unwrap_or('?'), nr.unwrap_or(-1))
    }

    pub fn wait_state(&self, letter: char) -> io::Result<()> {
        let end = Instant::now() + Duration::from_secs(20);
        while self.state().0 != letter {
            if Instant::now() > end {
                let what = format!("{} is {:?}, not {letter}", self.pid, self.state());
                return Err(io::Error::other(what));
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Brings it into the ptrace stop of PTRACE_INTERRUPT.
    pub fn stop(&self) -> io::Result<()> {
        ptrace::seize(self.pid, 0)?;
        self.interrupt()
    }

    pub fn interrupt(&self) -> io::Result<()> {
        ptrace::interrupt(self.pid)?;
        match ptrace::wait(self.pid, Duration::from_secs(20))? {
            Some(_) => Ok(()),
            None => Err(io::Error::other("no stop within 20 s")),
        }
    }

    /// Moves it into a cgroup of its own, to be frozen there.
    pub fn enter_cgroup(&mut self) -> io::Result<()> {
        if self.cgroup.is_some() {
            return Ok(());
        }
        let dir = PathBuf::from(format!("{CGROUP}/hammer-{}", self.pid));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("cgroup.procs"), self.pid.to_string())?;
        self.cgroup = Some(dir);
        Ok(())
    }

    pub fn freeze(&self, on: bool) -> io::Result<()> {
        let dir = self.cgroup.as_ref().ok_or(io::ErrorKind::NotFound)?;
        fs::write(dir.join("cgroup.freeze"), if on { "1" } else { "0" })
    }

    pub fn wait_frozen(&self) -> io::Result<()> {
        let dir = self.cgroup.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let end = Instant::now() + Duration::from_secs(20);
        while !fs::read_to_string(dir.join("cgroup.events"))?.contains("frozen 1") {
            if Instant::now() > end {
                return Err(io::Error::other("not frozen after 20 s"));
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// Something the module must refuse, and the errno it must say.
pub struct Refused {
    pub name: &'static str,
    pub victim: Victim,
    pub errno: i32,
}

/// A child in every state in which its registers must not be touched.
pub fn refused() -> io::Result<Vec<Refused>> {
    let mut all = Vec::new();
    let mut add = |name, victim, errno| {
        all.push(Refused {
            name,
            victim,
            errno,
        })
    };
    // Awake most of the time, but without taking a whole processor.
    let spin = || loop {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(1) {
            std::hint::spin_loop();
        }
        sleep(Duration::from_millis(9));
    };
    let idle = || loop {
        raw::pause();
    };

    add("running", Victim::new(spin)?, libc::EBUSY);
    let asleep = Victim::new(idle)?;
    asleep.wait_state('S')?;
    add("asleep", asleep, libc::EBUSY);
    let zombie = Victim::new(|| 0)?;
    zombie.wait_state('Z')?;
    add("zombie", zombie, libc::ESRCH);
    let vfork = Victim::new(|| {
        raw::vfork_and_wait(1000);
        0
    })?;
    vfork.wait_state('D')?;
    add("vfork parent", vfork, libc::EINPROGRESS);
    let delivery = Victim::new(|| {
        raw::trace_me_and_stop();
        0
    })?;
    delivery.wait_state('t')?;
    add("signal-delivery-stop", delivery, libc::EPROTO);
    let syscall = Victim::new(idle)?;
    syscall.wait_state('S')?;
    syscall.stop()?;
    ptrace::cont_to_syscall(syscall.pid, 0)?;
    ptrace::wait(syscall.pid, Duration::from_secs(20))?;
    add("syscall-stop", syscall, libc::EPROTO);
    let forking = Victim::new(|| {
        // It may signal itself before it is traced.
        raw::handle(libc::SIGUSR1);
        loop {
            std::thread::sleep(Duration::from_millis(1));
            raw::exercise();
        }
    })?;
    ptrace::seize(forking.pid, libc::PTRACE_O_TRACEFORK as usize)?;
    loop {
        ptrace::wait(forking.pid, Duration::from_secs(20))?;
        if ptrace::siginfo(forking.pid)?[8..12] == (1i32 << 8 | libc::SIGTRAP).to_ne_bytes() {
            break;
        }
        ptrace::cont(forking.pid, 0)?;
    }
    add("fork event", forking, libc::EPROTO);
    let narrow = Victim::new(raw::exec_32bit)?;
    std::thread::sleep(Duration::from_millis(300));
    if narrow.state().0 == 'S' {
        narrow.stop()?;
        add("32-bit", narrow, libc::ENOEXEC);
    } else {
        println!("skipped: 32-bit: this kernel does not run such programs");
    }
    match frozen_v1() {
        Ok(victim) => add("version 1 freezer", victim, libc::EINPROGRESS),
        Err(e) => println!("skipped: version 1 freezer: {e}"),
    }
    if let Ok(vfork) = frozen_vfork() {
        add("frozen vfork parent", vfork, libc::EINPROGRESS);
    }
    Ok(all)
}

/// Frozen by cgroup version 1, which stops a task inside its system call.
fn frozen_v1() -> io::Result<Victim> {
    const DIR: &str = "/tmp/kmod-hammer-freezer";
    fs::create_dir_all(DIR)?;
    if !PathBuf::from(DIR).join("cgroup.procs").exists() {
        let none = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("none"), DIR, Some("cgroup"), none, Some("freezer"))?;
    }
    let dir = PathBuf::from(DIR).join("hammer");
    fs::create_dir_all(&dir)?;
    let mut victim = Victim::new(|| loop {
        raw::pause();
    })?;
    victim.freezer_v1 = Some(dir.join("freezer.state"));
    fs::write(dir.join("freezer.state"), "THAWED")?;
    fs::write(dir.join("cgroup.procs"), victim.pid.to_string())?;
    fs::write(dir.join("freezer.state"), "FROZEN")?;
    let end = Instant::now() + Duration::from_secs(20);
    while fs::read_to_string(dir.join("freezer.state"))?.trim() != "FROZEN" {
        if Instant::now() > end {
            return Err(io::Error::other("not frozen after 20 s"));
        }
        sleep(Duration::from_millis(1));
    }
    Ok(victim)
}

fn frozen_vfork() -> io::Result<Victim> {
    let mut victim = Victim::new(|| {
        std::thread::sleep(Duration::from_millis(200));
        raw::vfork_and_wait(1000);
        0
    })?;
    victim.enter_cgroup()?;
    victim.wait_state('D')?;
    victim.freeze(true)?;
    victim.wait_frozen()?;
    Ok(victim)
}

/// A child in each of the three stops in which it may be touched.
pub fn accepted() -> io::Result<Vec<(&'static str, Victim)>> {
    let idle = || loop {
        raw::pause();
    };
    let traced = Victim::confined(idle)?;
    traced.wait_state('S')?;
    traced.stop()?;
    let group = Victim::confined(idle)?;
    group.wait_state('S')?;
    let pid = nix::unistd::Pid::from_raw(group.pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)?;
    group.wait_state('T')?;
    let mut all = vec![("ptrace stop", traced), ("group stop", group)];
    let mut frozen = Victim::confined(idle)?;
    frozen.wait_state('S')?;
    if frozen.enter_cgroup().is_ok() {
        frozen.freeze(true)?;
        frozen.wait_frozen()?;
        all.push(("freezer", frozen));
    } else {
        println!("skipped: freezer: no cgroup version 2 at {CGROUP}");
    }
    Ok(all)
}

/// Opens the module, or says that there is none.
pub fn module() -> Result<Kmod, String> {
    Kmod::open()
        .map_err(|e| format!("open /dev/pmig: {e}"))?
        .ok_or_else(|| "no /dev/pmig: the module is not loaded".to_owned())
}
