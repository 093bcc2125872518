//! Holding a process: frozen in a cgroup of pmig's own, so that it stays where
//! it is whoever dies.
//!
//! A ptrace stop ends with the tracer, and anyone's SIGCONT breaks a group
//! stop. The cgroup v2 freezer (cgroups(7), "cgroup.freeze") is neither: it
//! lasts until somebody writes 0, is invisible to waitid(2), and SIGKILL still
//! works. A process is moved into its cgroup while it runs, which it doesn't
//! notice, and frozen in the ptrace stop, before the tracer lets go.
//!
//! At the source the cgroup is made *below* the one the process is in, so every
//! limit that held for it goes on holding. At the target it is made in
//! `pmig/`, at the top of the tree or, where that may not be written, below
//! pmig's own cgroup.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{openat, Flock, FlockArg, OFlag, AT_FDCWD};
use nix::sys::stat::Mode;
use nix::sys::statfs::{fstatfs, CGROUP2_SUPER_MAGIC};
use nix::unistd;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Obstacle, Result, Within};
use crate::id::Id;
use crate::proc::cgroup::{of_process, Events, Mount};

/// How long a cgroup may take to be frozen, or to be empty after a kill.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// The kernel freezes within some 80 µs natively; only after that is it worth
/// to sleep.
const SPIN: Duration = Duration::from_micros(200);

/// The shortest sleep between two looks.
const NAP: Duration = Duration::from_micros(50);

/// Where a held process is, as records keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The directory of pmig's cgroup.
    pub cgroup: PathBuf,
    /// The directory of the cgroup the process came from and goes back to; none
    /// for a husk.
    pub home: Option<PathBuf>,
}

/// A cgroup of pmig's own whose processes may run. Dropped, it sends them back
/// to where they came from (a husk stays) and removes itself if it is empty.
#[derive(Debug)]
pub struct Hold(Option<Cgroup>);

/// A cgroup that was seen frozen with its process in it. Dropped, it stays
/// frozen: then the records decide.
#[derive(Debug)]
pub struct Frozen(Cgroup);

#[derive(Debug)]
struct Cgroup {
    /// Locked shared, so that [`sweep_empty`] leaves it alone.
    dir: Flock<OwnedFd>,
    /// `cgroup.freeze` and `cgroup.events`, open for when there is haste.
    freezer: OwnedFd,
    events: OwnedFd,
    place: Place,
}

impl Hold {
    /// Makes a cgroup for a process that runs here, below the one it is in.
    /// Nothing moves until [`Hold::take`].
    ///
    /// # Errors
    /// Refused where the process is held already, where its cgroup is frozen or
    /// cannot be seen from here, and where there is no cgroup v2.
    pub fn beside(pid: i32, id: Id) -> Result<Hold> {
        let home = refusable(pid)?;
        let place = Place {
            cgroup: home.join(format!("pmig-{id}-source")),
            home: Some(home),
        };
        Cgroup::create(place).map(|c| Hold(Some(c)))
    }

    /// Makes a cgroup for a husk.
    pub fn husk(id: Id) -> Result<Hold> {
        let place = Place {
            cgroup: base()?.join(format!("{id}-target")),
            home: None,
        };
        Cgroup::create(place).map(|c| Hold(Some(c)))
    }

    /// Makes a cgroup for the guard of a program's missing memory, as
    /// [`Hold::holder`] does.
    pub fn guard(id: Id) -> Result<Hold> {
        let place = Place {
            cgroup: base()?.join(format!("{id}-guard")),
            home: None,
        };
        match Frozen::open(&place)? {
            Some(there) => Ok(Hold(Some(there.0))),
            None => Cgroup::create(place).map(|c| Hold(Some(c))),
        }
    }

    /// Makes a cgroup for the holder of the program that a husk becomes: what
    /// ends `pmig serve` and all that it started leaves it alone.
    pub fn holder(id: Id) -> Result<Hold> {
        let place = Place {
            cgroup: base()?.join(format!("{id}-holder")),
            home: None,
        };
        Cgroup::create(place).map(|c| Hold(Some(c)))
    }

    /// Moves a process in, running or stopped. It doesn't notice.
    pub fn take(&self, pid: i32) -> Result<()> {
        self.cgroup().write("cgroup.procs", &pid.to_string())
    }

    pub fn place(&self) -> &Place {
        &self.cgroup().place
    }

    /// For `CLONE_INTO_CGROUP` (clone(2)).
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.cgroup().fd()
    }

    /// Limits the memory of what is inside, in bytes, or lifts the limit. Past
    /// it the whole cgroup is killed at once. `false`: the memory controller
    /// isn't there (cgroup v1 has it, or it isn't delegated), nothing is
    /// limited.
    pub fn set_memory_max(&self, bytes: Option<u64>) -> Result<bool> {
        let cgroup = self.cgroup();
        if !cgroup.has("memory.max")? {
            return Ok(false);
        }
        match bytes {
            Some(bytes) => {
                cgroup.write("memory.max", &bytes.to_string())?;
                cgroup.write("memory.oom.group", "1")?;
            }
            None => {
                cgroup.write("memory.max", "max")?;
                cgroup.write("memory.oom.group", "0")?;
            }
        }
        Ok(true)
    }

    /// Freezes and waits until the kernel says that it is so. On failure
    /// everything runs again.
    pub fn freeze(mut self, within: Duration) -> Result<Frozen> {
        let cgroup = self.0.take().expect("only taken on the way out");
        let frozen = cgroup
            .set_frozen(true)
            .and_then(|()| cgroup.wait("freezing", within, |e| e.frozen && e.populated));
        match frozen {
            Ok(()) => Ok(Frozen(cgroup)),
            Err(e) => {
                let _ = cgroup.set_frozen(false);
                self.0 = Some(cgroup);
                Err(e)
            }
        }
    }

    /// Sends the processes back to where they came from and removes the cgroup.
    pub fn release(mut self) -> Result<()> {
        let cgroup = self.0.take().expect("only taken on the way out");
        cgroup.send_home()?;
        cgroup.remove()
    }

    /// Kills all that is inside, sees that it is gone and removes the cgroup.
    pub fn kill(mut self) -> Result<()> {
        let cgroup = self.0.take().expect("only taken on the way out");
        cgroup.kill()
    }

    /// Leaves the processes where they are, for good.
    pub fn leave(mut self) {
        self.0 = None;
    }

    fn cgroup(&self) -> &Cgroup {
        self.0.as_ref().expect("only taken on the way out")
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let Some(cgroup) = self.0.take() else { return };
        if !cgroup.place.cgroup.exists() {
            // Somebody finished or undid the migration by its records.
            return;
        }
        if let Err(e) = cgroup.send_home() {
            tracing::warn!("{e}");
        } else if let Err(e) = cgroup.remove_now() {
            tracing::debug!("{e}");
        }
    }
}

impl Frozen {
    /// Opens what a record names, frozen or not. None: the cgroup is gone, and
    /// with it whatever was held.
    pub fn open(place: &Place) -> Result<Option<Frozen>> {
        Cgroup::open(place.clone()).map(|c| c.map(Frozen))
    }

    pub fn place(&self) -> &Place {
        &self.0.place
    }

    /// Whether a live process is inside.
    pub fn populated(&self) -> Result<bool> {
        self.0.events().map(|e| e.populated)
    }

    /// Whether a live process is inside and held there.
    pub fn holds(&self) -> Result<bool> {
        self.0.events().map(|e| e.populated && e.frozen)
    }

    /// The process inside, if there is one.
    pub fn pid(&self) -> Result<Option<i32>> {
        self.0.pids().map(|p| p.first().copied())
    }

    /// Freezes it, whatever it was, without waiting until it is so.
    pub fn stop(&self) -> Result<()> {
        self.0.set_frozen(true)
    }

    /// Lets it run on, and keeps it open.
    pub fn go_on(&self) -> Result<()> {
        self.0.set_frozen(false)
    }

    /// Lets it run on.
    pub fn thaw(self) -> Result<Hold> {
        self.0.set_frozen(false)?;
        Ok(Hold(Some(self.0)))
    }

    /// Kills what is held, sees that it is gone and removes the cgroup.
    pub fn kill(self) -> Result<()> {
        self.0.kill()
    }
}

impl Cgroup {
    fn create(place: Place) -> Result<Cgroup> {
        for _ in 0..10 {
            match fs::create_dir(&place.cgroup) {
                // What is there may be a program that came here before.
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists || place.home.is_none() => {
                    return Err(e).context("create cgroup", place.cgroup.display());
                }
                _ => {}
            }
            // A sweep may remove it before it is locked.
            if let Some(cgroup) = Cgroup::open(place.clone())? {
                let locked = nix::sys::stat::fstat(cgroup.fd())
                    .context("look at cgroup", place.cgroup.display())?;
                let named = nix::sys::stat::lstat(&place.cgroup);
                if named.is_ok_and(|n| n.st_ino == locked.st_ino) {
                    return Ok(cgroup);
                }
            }
        }
        Err(Error::bad(
            format!("cgroup {}", place.cgroup.display()),
            "it is removed as soon as it is made",
        ))
    }

    fn open(place: Place) -> Result<Option<Cgroup>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let dir = match openat(AT_FDCWD, &place.cgroup, flags, Mode::empty()) {
            Err(Errno::ENOENT | Errno::ENODEV) => return Ok(None),
            dir => dir.context("open cgroup", place.cgroup.display())?,
        };
        let fs = fstatfs(&dir).context("look at cgroup", place.cgroup.display())?;
        if fs.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Err(Error::bad(place.cgroup.display(), "not a cgroup"));
        }
        // Waits for a sweep at most, which is over at once.
        let dir = Flock::lock(dir, FlockArg::LockShared)
            .map_err(|(_, e)| e)
            .context("lock cgroup", place.cgroup.display())?;
        let file = |name, flags| match openat(&*dir, name, flags | OFlag::O_CLOEXEC, Mode::empty())
        {
            Err(Errno::ENOENT | Errno::ENODEV) => Ok(None),
            file => file.map(Some).context("open", Within(&place.cgroup, name)),
        };
        let (Some(freezer), Some(events)) = (
            file("cgroup.freeze", OFlag::O_WRONLY)?,
            file("cgroup.events", OFlag::O_RDONLY)?,
        ) else {
            return Ok(None);
        };
        Ok(Some(Cgroup {
            dir,
            freezer,
            events,
            place,
        }))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    fn object<'a>(&'a self, name: &'a str) -> Within<'a> {
        Within(&self.place.cgroup, name)
    }

    fn has(&self, name: &str) -> Result<bool> {
        match nix::sys::stat::fstatat(self.fd(), name, nix::fcntl::AtFlags::empty()) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(e) => Err(e).context("look at", self.object(name)),
        }
    }

    fn file(&self, name: &str, flags: OFlag) -> Result<OwnedFd> {
        openat(self.fd(), name, flags | OFlag::O_CLOEXEC, Mode::empty())
            .context("open", self.object(name))
    }

    fn write(&self, name: &str, value: &str) -> Result<()> {
        let file = self.file(name, OFlag::O_WRONLY)?;
        unistd::write(&file, value.as_bytes())
            .map(drop)
            .context("write", self.object(name))
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        let value: &[u8] = if frozen { b"1" } else { b"0" };
        nix::sys::uio::pwrite(&self.freezer, value, 0)
            .map(drop)
            .context("write", self.object("cgroup.freeze"))
    }

    fn events(&self) -> Result<Events> {
        let mut text = [0; 256];
        let got = nix::sys::uio::pread(&self.events, &mut text, 0)
            .context("read", self.object("cgroup.events"))?;
        std::str::from_utf8(&text[..got])
            .ok()
            .and_then(Events::parse)
            .ok_or_else(|| Error::bad(self.object("cgroup.events"), "not understood"))
    }

    fn pids(&self) -> Result<Vec<i32>> {
        let path = self.place.cgroup.join("cgroup.procs");
        let text = fs::read_to_string(&path).context("read", path.display())?;
        Ok(text.lines().filter_map(|l| l.parse().ok()).collect())
    }

    fn wait(&self, what: &str, within: Duration, is: impl Fn(Events) -> bool) -> Result<()> {
        let start = Instant::now();
        loop {
            if is(self.events()?) {
                return Ok(());
            }
            let spent = start.elapsed();
            if spent > within {
                return Err(Error::Deadline {
                    what: format!("{what} {}", self.place.cgroup.display()),
                    after: within,
                });
            }
            if spent > SPIN {
                // The kernel notifies of changes at most every 10 ms
                // (CGROUP_FILE_NOTIFY_MIN_INTV), which is too long for a freeze.
                std::thread::sleep((spent / 8).clamp(NAP, 20 * NAP));
            } else {
                std::thread::yield_now();
            }
        }
    }

    fn send_home(&self) -> Result<()> {
        let Some(home) = &self.place.home else {
            return Ok(());
        };
        let to = home.join("cgroup.procs");
        // What forks while it is moved is found by looking again.
        for _ in 0..100 {
            let pids = self.pids()?;
            if pids.is_empty() {
                break;
            }
            for pid in pids {
                match fs::write(&to, pid.to_string()) {
                    Err(e) if e.raw_os_error() == Some(Errno::ESRCH as i32) => {}
                    other => other.context("move process back by writing", to.display())?,
                }
            }
            if !self.events()?.populated {
                break;
            }
        }
        Ok(())
    }

    fn kill(self) -> Result<()> {
        self.write("cgroup.kill", "1")?;
        match self.wait("killing what is held in", PATIENCE, |e| !e.populated) {
            // Empty, it was removed by a sweep or by whoever else ended it.
            Err(e) if e.errno() == Some(Errno::ENODEV as i32) => Ok(()),
            other => other.and_then(|()| self.remove()),
        }
    }

    fn remove_now(&self) -> Result<()> {
        match fs::remove_dir(&self.place.cgroup) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.context("remove cgroup", self.place.cgroup.display()),
        }
    }

    fn remove(self) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.remove_now() {
                // A process that is just dying keeps it busy for a moment.
                Err(e) if e.errno() == Some(Errno::EBUSY as i32) && start.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => return other,
            }
        }
    }
}

/// What stands in the way of holding this process.
pub fn preflight(pid: i32) -> Result<Vec<Obstacle>> {
    match refusable(pid) {
        Ok(_) => Ok(Vec::new()),
        Err(Error::Refused(obstacles)) => Ok(obstacles),
        Err(e) => Err(e),
    }
}

/// The directory of the cgroup a process is in, unless it cannot be held there.
fn refusable(pid: i32) -> Result<PathBuf> {
    let object = format!("process {pid}");
    let refuse =
        |why: String, remedy: &str| Err(Error::Refused(vec![Obstacle::new(&object, why, remedy)]));
    let mount = mount()?;
    let path = format!("/proc/{pid}/cgroup");
    let text = match fs::read_to_string(&path) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            return Err(Error::Gone(pid))
        }
        text => text.context("read", &path)?,
    };
    let Some(cgroup) = of_process(&text) else {
        return refuse(
            "is in no v2 cgroup".into(),
            "start it where cgroup v2 is mounted",
        );
    };
    if let Some(id) = source_id(&cgroup) {
        return refuse(
            format!("migration {id} holds it already"),
            "let that migration end, or see pmig resolve",
        );
    }
    let Some(dir) = mount.dir(&cgroup) else {
        return refuse(
            format!("its cgroup {} cannot be seen from here", cgroup.display()),
            "run pmig in the same container as the program",
        );
    };
    let kind = fs::read_to_string(dir.join("cgroup.type")).unwrap_or_default();
    if kind.trim() == "threaded" {
        return refuse(
            format!("its cgroup {} is threaded", cgroup.display()),
            "move it into a cgroup of type domain",
        );
    }
    let events = fs::read_to_string(dir.join("cgroup.events")).unwrap_or_default();
    if Events::parse(&events).is_some_and(|e| e.frozen) {
        return refuse(
            format!("its cgroup {} is frozen", cgroup.display()),
            "thaw it: write 0 into its cgroup.freeze",
        );
    }
    Ok(dir)
}

/// The migration whose source cgroup this is.
fn source_id(cgroup: &Path) -> Option<Id> {
    let name = cgroup.file_name()?.to_str()?;
    name.strip_prefix("pmig-")?
        .strip_suffix("-source")?
        .parse()
        .ok()
}

fn mount() -> Result<Mount> {
    let path = "/proc/self/mountinfo";
    let text = fs::read_to_string(path).context("read", path)?;
    Mount::find(&text).ok_or_else(|| {
        Error::Refused(vec![Obstacle::new(
            "cgroup v2",
            "is not mounted, so nothing can be held",
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
        )])
    })
}

/// Where cgroups for husks are made; makes it if need be.
fn base() -> Result<PathBuf> {
    let mount = mount()?;
    let own = fs::read_to_string("/proc/self/cgroup").context("read", "/proc/self/cgroup")?;
    let own = of_process(&own).and_then(|cgroup| mount.dir(&cgroup));
    let mut last = None;
    for parent in [Some(mount.at), own].into_iter().flatten() {
        let base = parent.join("pmig");
        match fs::create_dir(&base) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                last = Some(Err(e).context("create cgroup", base.display()));
            }
            _ => {
                // A limit for husks is wished for, not needed.
                for dir in [&parent, &base] {
                    if let Err(e) = fs::write(dir.join("cgroup.subtree_control"), "+memory") {
                        tracing::debug!("no memory controller below {}: {e}", dir.display());
                    }
                }
                return Ok(base);
            }
        }
    }
    last.unwrap_or_else(|| Err(Error::bad("cgroup v2", "no place to make a cgroup in")))
}

/// Tries whether husks can be held here; says where.
pub fn probe() -> Result<String> {
    let hold = Hold::husk(Id::random()?)?;
    for file in ["cgroup.freeze", "cgroup.kill"] {
        if !hold.cgroup().has(file)? {
            return Err(Error::bad(hold.cgroup().object(file), "is not there"));
        }
    }
    let parent = hold.place().cgroup.parent();
    Ok(parent.map_or_else(String::new, |p| p.display().to_string()))
}

/// Removes the empty cgroups of programs that came here and have ended since.
pub fn sweep_empty() -> Result<()> {
    let base = base()?;
    for entry in fs::read_dir(&base)
        .context("list", base.display())?
        .flatten()
    {
        let name = entry.file_name();
        let ours = name
            .to_str()
            .and_then(|n| {
                let ours = ["-target", "-holder", "-guard"];
                ours.iter().find_map(|role| n.strip_suffix(role))
            })
            .is_some_and(|id| id.parse::<Id>().is_ok());
        if !ours {
            continue;
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let Ok(dir) = openat(AT_FDCWD, &entry.path(), flags, Mode::empty()) else {
            continue;
        };
        if let Ok(_locked) = Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            // Busy with a process: the kernel refuses.
            let _ = fs::remove_dir(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// A program of the tests' own, gone when the test is.
    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Sleeper {
            Sleeper(Command::new("sleep").arg("1000").spawn().unwrap())
        }

        fn pid(&self) -> i32 {
            self.0.id() as i32
        }

        fn cgroup(&self) -> PathBuf {
            let text = fs::read_to_string(format!("/proc/{}/cgroup", self.pid())).unwrap();
            of_process(&text).unwrap()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Holding needs root and cgroup v2.
    fn can_hold() -> bool {
        let can = nix::unistd::geteuid().is_root() && mount().is_ok();
        if !can {
            eprintln!("SKIPPED: no cgroup v2 that may be written");
        }
        can
    }

    #[test]
    fn a_process_is_held_thawed_and_sent_home() {
        if !can_hold() {
            return;
        }
        let sleeper = Sleeper::start();
        let home = sleeper.cgroup();
        let hold = Hold::beside(sleeper.pid(), Id::random().unwrap()).unwrap();
        assert_eq!(sleeper.cgroup(), home, "nothing moves before it is taken");
        hold.take(sleeper.pid()).unwrap();
        assert_ne!(sleeper.cgroup(), home);

        let again = Hold::beside(sleeper.pid(), Id::random().unwrap()).unwrap_err();
        assert!(again.to_string().contains("holds it already"), "{again}");

        let frozen = hold.freeze(PATIENCE).unwrap();
        let place = frozen.place().clone();
        drop(frozen);
        let frozen = Frozen::open(&place).unwrap().unwrap();
        assert!(frozen.0.events().unwrap().frozen, "dropping doesn't thaw");
        assert_eq!(frozen.pid().unwrap(), Some(sleeper.pid()));
        frozen.thaw().unwrap().release().unwrap();
        assert_eq!(sleeper.cgroup(), home);
        assert!(Frozen::open(&place).unwrap().is_none());
    }

    #[test]
    fn a_dropped_hold_sends_its_process_home() {
        if !can_hold() {
            return;
        }
        let sleeper = Sleeper::start();
        let home = sleeper.cgroup();
        let hold = Hold::beside(sleeper.pid(), Id::random().unwrap()).unwrap();
        hold.take(sleeper.pid()).unwrap();
        let at = hold.place().cgroup.clone();
        drop(hold);
        assert_eq!(sleeper.cgroup(), home);
        assert!(!at.exists());
    }

    #[test]
    fn a_frozen_process_is_killed_and_its_cgroup_removed() {
        if !can_hold() {
            return;
        }
        let mut sleeper = Sleeper::start();
        let hold = Hold::beside(sleeper.pid(), Id::random().unwrap()).unwrap();
        hold.take(sleeper.pid()).unwrap();
        let at = hold.place().cgroup.clone();
        hold.freeze(PATIENCE).unwrap().kill().unwrap();
        assert!(!at.exists());
        assert!(!sleeper.0.wait().unwrap().success());
    }

    #[test]
    fn an_empty_hold_cannot_be_frozen_and_a_sweep_spares_what_is_used() {
        if !can_hold() {
            return;
        }
        let hold = Hold::husk(Id::random().unwrap()).unwrap();
        let at = hold.place().cgroup.clone();
        sweep_empty().unwrap();
        assert!(at.exists(), "locked by its hold");
        let _ = hold.set_memory_max(Some(64 << 20)).unwrap();
        assert!(hold.freeze(Duration::from_millis(30)).is_err());
        assert!(!at.exists(), "the failure dropped the hold");
    }
}
