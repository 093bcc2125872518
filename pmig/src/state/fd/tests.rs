//! Descriptors of real processes: captured from a child, opened here, pulled
//! over by another child.

mod names;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{fcntl, open, FcntlArg, FdFlag, OFlag};
use nix::sys::stat::Mode;
use nix::unistd::{dup, lseek, pipe2, read, write, Whence};

use super::*;
use crate::state::objects::Opener;
use crate::state::paths::Pinned;
use crate::tracee::{Batch, Stopped};

/// What stands in the way of moving a process as far as its descriptors go.
fn preflight(pid: i32) -> Result<Vec<Obstacle>> {
    match Watch::new(pid)?.look(Beat::Running) {
        Ok(_) => Ok(Vec::new()),
        Err(Error::Refused(obstacles)) => Ok(obstacles),
        Err(e) => Err(e),
    }
}

/// A child of this test program that has opened what its scene tells, and
/// waits.
struct Actor {
    child: Child,
    dir: tempfile::TempDir,
}

impl Actor {
    fn play(scene: &str) -> Actor {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "state::fd::tests::stage"])
            .env("PMIG_TEST_SCENE", scene)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let actor = Actor { child, dir };
        let end = Instant::now() + Duration::from_secs(20);
        while !actor.path("ready").exists() {
            assert!(Instant::now() < end, "the scene {scene} did not come up");
            std::thread::sleep(Duration::from_millis(5));
        }
        actor
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str) -> FilePath {
        FilePath::new(self.path(name).as_os_str().as_bytes()).unwrap()
    }

    fn look(&self) -> FdTable {
        Watch::new(self.pid()).unwrap().look(Beat::Stopped).unwrap()
    }

    fn obstacles(&self) -> Vec<Obstacle> {
        preflight(self.pid()).unwrap()
    }

    fn opener(&self) -> Opener {
        let mut opener = Opener::new(vec![FilePath::new("/").unwrap()]);
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let path = self.file(entry.unwrap().file_name().to_str().unwrap());
            let stat = *Pinned::by_path(&path).unwrap().stat();
            opener.admit(path.clone(), path, stat.st_dev, stat.st_ino);
        }
        opener
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn touch(path: &str, flags: OFlag) -> OwnedFd {
    open(path, flags | OFlag::O_CREAT, Mode::from_bits_retain(0o600)).unwrap()
}

fn cloexec(fd: &OwnedFd, on: bool) {
    let flags = if on {
        FdFlag::FD_CLOEXEC
    } else {
        FdFlag::empty()
    };
    fcntl(fd, FcntlArg::F_SETFD(flags)).unwrap();
}

/// What a child of [`Actor::play`] does; nothing where nobody plays.
#[test]
fn stage() {
    let Ok(scene) = std::env::var("PMIG_TEST_SCENE") else {
        return;
    };
    // What was handed down to the test program is no part of the scene.
    let inherited: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().to_str().unwrap().parse().ok())
        .filter(|&fd| fd > 2)
        .collect();
    for fd in inherited {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
        if info
            .lines()
            .any(|l| l.starts_with("flags:") && !l.contains("\t02"))
        {
            let _ = nix::unistd::close(fd);
        }
    }
    let mut held: Vec<OwnedFd> = Vec::new();
    match scene.as_str() {
        "files" => {
            let log = touch("log", OFlag::O_WRONLY | OFlag::O_APPEND);
            write(&log, b"0123456789").unwrap();
            let second = dup(&log).unwrap();
            cloexec(&second, true);
            let own = touch(
                "log",
                OFlag::O_RDONLY | OFlag::O_NOATIME | OFlag::O_NOFOLLOW,
            );
            lseek(&own, 4, Whence::SeekSet).unwrap();
            std::fs::create_dir("sub").unwrap();
            let dir = open("sub", OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty()).unwrap();
            let zero = open(
                "/dev/zero",
                OFlag::O_RDWR | OFlag::O_NONBLOCK,
                Mode::empty(),
            )
            .unwrap();
            let far = fcntl(&log, FcntlArg::F_DUPFD(200)).unwrap();
            assert!(far >= 200);
            held.extend([log, second, own, dir, zero]);
        }
        "pipes" => {
            let (r, w) = pipe2(OFlag::O_NONBLOCK).unwrap();
            fcntl(&w, FcntlArg::F_SETPIPE_SZ(8192)).unwrap();
            write(&w, b"left in the pipe").unwrap();
            let (r2, w2) = pipe2(OFlag::O_CLOEXEC).unwrap();
            write(&w2, &[7; 5000]).unwrap();
            drop(w2);
            let (r3, w3) = pipe2(OFlag::empty()).unwrap();
            write(&w3, b"nobody reads").unwrap();
            drop(r3);
            let both = open(
                format!("/proc/self/fd/{}", r.as_raw_fd()).as_str(),
                OFlag::O_RDWR,
                Mode::empty(),
            )
            .unwrap();
            held.extend([dup(&w).unwrap(), r, w, r2, w3, both]);
        }
        "packets" | "packets, cleared" => {
            let (r, w) = pipe2(OFlag::O_DIRECT).unwrap();
            write(&w, b"one").unwrap();
            write(&w, b"two").unwrap();
            if scene != "packets" {
                fcntl(&w, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
            }
            held.extend([r, w]);
        }
        "strange" => {
            let gone = touch("gone", OFlag::O_RDWR);
            std::fs::remove_file("gone").unwrap();
            let other = touch("other", OFlag::O_RDWR);
            std::fs::rename("other", "elsewhere").unwrap();
            std::fs::write("other", b"").unwrap();
            let replaced = touch("replaced", OFlag::O_RDWR);
            std::fs::write("new", b"").unwrap();
            std::fs::rename("new", "replaced").unwrap();
            let tmp = open(
                ".",
                OFlag::O_TMPFILE | OFlag::O_RDWR,
                Mode::from_bits_retain(0o600),
            );
            let path = open(".", OFlag::O_PATH, Mode::empty()).unwrap();
            let proc = open("/proc/self/status", OFlag::O_RDONLY, Mode::empty()).unwrap();
            nix::unistd::mkfifo("fifo", Mode::from_bits_retain(0o600)).unwrap();
            let fifo = open("fifo", OFlag::O_RDWR, Mode::empty()).unwrap();
            let locked = File::create("locked").unwrap();
            locked.lock().unwrap();
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            let event = nix::sys::eventfd::EventFd::new().unwrap();
            let epoll =
                nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap();
            let terminal =
                open("/dev/ptmx", OFlag::O_RDWR | OFlag::O_NOCTTY, Mode::empty()).unwrap();
            std::mem::forget((socket, event, epoll));
            held.extend([
                gone,
                other,
                replaced,
                path,
                proc,
                fifo,
                locked.into(),
                terminal,
            ]);
            held.extend(tmp);
        }
        "many" => {
            std::fs::write("data", b"x").unwrap();
            let first = File::open("data").unwrap();
            for n in 0..900 {
                held.push(match n % 3 {
                    0 => first.try_clone().unwrap().into(),
                    1 => File::open("data").unwrap().into(),
                    _ => File::open("/dev/null").unwrap().into(),
                });
            }
        }
        "chroot" => {
            std::fs::create_dir_all("jail/inside").unwrap();
            std::fs::write("jail/inside/odd (deleted)", b"x").unwrap();
            held.push(File::open("jail/inside/odd (deleted)").unwrap().into());
            std::fs::write("ready", b"").unwrap();
            nix::unistd::chroot("jail").unwrap();
            std::env::set_current_dir("/inside").unwrap();
            std::fs::write("here", b"").unwrap();
        }
        "bare" => {}
        other => panic!("no scene {other}"),
    }
    std::fs::write("ready", b"").unwrap();
    std::thread::sleep(Duration::from_secs(60));
    drop(held);
}

fn kinds(table: &FdTable, wanted: impl Fn(&Kind) -> bool) -> Vec<&Description> {
    table
        .descriptions
        .iter()
        .filter(|d| wanted(&d.kind))
        .collect()
}

#[test]
fn files_directories_and_devices_are_captured() {
    let actor = Actor::play("files");
    let table = actor.look();
    table.check().unwrap();
    let log = actor.file("log");
    let files = kinds(&table, |k| matches!(k, Kind::Regular(r) if r.path == log));
    assert_eq!(files.len(), 2);
    assert_eq!(files[0].flags & libc::O_ACCMODE, libc::O_WRONLY);
    assert!(files[0].flags & libc::O_APPEND != 0);
    assert!(matches!(&files[0].kind, Kind::Regular(r) if r.offset == 10));
    assert!(files[1].flags & libc::O_NOATIME != 0);
    assert!(matches!(&files[1].kind, Kind::Regular(r) if r.offset == 4));
    let holders: Vec<&Holder> = table
        .holders
        .iter()
        .filter(|h| table.descriptions[h.description as usize] == *files[0])
        .collect();
    assert_eq!(holders.len(), 3);
    assert_eq!(holders.iter().filter(|h| h.cloexec).count(), 1);
    assert!(table.highest() >= 200);
    assert_eq!(kinds(&table, |k| matches!(k, Kind::Directory(_))).len(), 1);
    let devices = kinds(
        &table,
        |k| matches!(k, Kind::Device(d) if d.which == Which::Zero),
    );
    assert_eq!(devices[0].flags & libc::O_ACCMODE, libc::O_RDWR);
    assert_eq!(table.files().len(), 2);
    assert_eq!(table.cwd.as_path(), actor.dir.path());
    assert!(actor.obstacles().is_empty());
}

#[test]
fn pipes_keep_their_content_where_it_is() {
    let actor = Actor::play("pipes");
    for _ in 0..2 {
        let table = actor.look();
        table.check().unwrap();
        assert_eq!(table.pipes.len(), 3);
        assert_eq!(table.pipes[0].capacity, Some(8192));
        let contents: Vec<&[u8]> = table.pipes.iter().map(|p| p.content.as_slice()).collect();
        assert!(contents.contains(&&b"left in the pipe"[..]));
        assert!(contents.contains(&&[7; 5000][..]));
        assert!(contents.contains(&&b"nobody reads"[..]));
        let ends = kinds(&table, |k| matches!(k, Kind::Pipe(_)));
        assert_eq!(ends.len(), 5, "two ends, one reopened, two widowed");
    }
}

#[test]
fn packets_in_a_pipe_are_refused() {
    let actor = Actor::play("packets");
    let found = actor.obstacles();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].why.contains("packet mode"));
    // The flag can be turned off while packets lie in the pipe.
    let actor = Actor::play("packets, cleared");
    assert!(actor.obstacles().is_empty());
    match Watch::new(actor.pid()).unwrap().look(Beat::Stopped) {
        Err(Error::Refused(found)) => assert!(found[0].why.contains("packets"), "{found:?}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pipe_shared_with_another_process_is_refused() {
    let mut child = Command::new("sleep")
        .arg("60")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let found = preflight(child.id() as i32).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let found: Vec<_> = found
        .iter()
        .filter(|o| o.object.starts_with("fd 0 pipe:["))
        .collect();
    assert_eq!(found.len(), 1);
    assert!(found[0]
        .why
        .contains(&format!("process {}", std::process::id())));
}

#[test]
fn a_pipe_that_leads_out_of_sight_is_refused() {
    let (r, w) = pipe2(OFlag::O_CLOEXEC).unwrap();
    assert!(!pipe::is_widowed(&r).unwrap());
    assert!(!pipe::is_widowed(&w).unwrap());
    write(&w, b"x").unwrap();
    drop(w);
    assert!(pipe::is_widowed(&r).unwrap());
    let (r, w) = pipe2(OFlag::O_CLOEXEC).unwrap();
    drop(r);
    assert!(pipe::is_widowed(&w).unwrap());
}

#[test]
fn what_sends_signals_is_refused_at_the_freeze() {
    const F_SETOWN: i32 = 8;
    let child = Command::new("perl")
        .args([
            "-e",
            &format!("use POSIX; POSIX::close($_) for 3..999; open F, '<', '/dev/null'; fcntl(F, {F_SETOWN}, $$+0); sleep 60"),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let perl = Sleeper::when_asleep(child);
    let mut watch = Watch::new(perl.pid()).unwrap();
    let table = watch.look(Beat::Stopped).unwrap();
    match watch.look_again(&table) {
        Err(Error::Refused(found)) => {
            assert!(
                found.iter().any(|o| o.why.contains("F_SETOWN")),
                "{found:?}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_cannot_be_carried_is_named() {
    let actor = Actor::play("strange");
    let found = actor.obstacles();
    let has = |object: &str, why: &str| {
        assert!(
            found
                .iter()
                .any(|o| o.object.contains(object) && o.why.contains(why)),
            "{object} {why}: {found:#?}"
        );
    };
    has("/gone (deleted)", "deleted file");
    has("/replaced (deleted)", "deleted file");
    has("fd ", "O_PATH");
    has("/status", "kernel makes");
    has("/fifo", "named pipe");
    has("/locked", "lock");
    has("socket:[", "socket");
    has("[eventfd]", "an eventfd");
    has("[eventpoll]", "an epoll");
    has("/dev/ptmx", "terminal");
    assert!(!found.iter().any(|o| o.object.contains("/elsewhere")));
    assert!(found
        .iter()
        .all(|o| !o.remedy.is_empty() && o.object.starts_with("fd ")));
}

#[test]
fn a_terminal_and_a_device_are_told_apart() {
    let actor = Actor::play("strange");
    assert!(!actor
        .obstacles()
        .iter()
        .any(|o| o.why.contains("only on this machine")));
}

#[test]
fn nine_hundred_descriptors_are_few() {
    let actor = Actor::play("many");
    let mut watch = Watch::new(actor.pid()).unwrap();
    watch.look(Beat::Running).unwrap();
    let start = Instant::now();
    let table = watch.look(Beat::Stopped).unwrap();
    let took = start.elapsed();
    assert_eq!(table.holders.len(), 903);
    assert!(took < Duration::from_secs(2), "{took:?}");
    eprintln!("second look at 903 descriptors: {took:?}");
}

#[test]
fn a_table_comes_out_at_the_other_end_as_it_went_in() {
    for scene in ["files", "pipes", "many", "bare"] {
        let actor = Actor::play(scene);
        let husk = Sleeper::new();
        let table = actor.look();
        let opened = Opened::open(table.clone(), &actor.opener()).unwrap();
        husk.install(&opened);
        drop(opened);
        // The pipes are nobody's but the new process's: the look says so.
        assert_eq!(husk.look(), table, "{scene}");
    }
}

/// A single-threaded process to install tables into.
struct Sleeper(Child);

impl Sleeper {
    fn new() -> Sleeper {
        let child = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Sleeper::when_asleep(child)
    }

    fn when_asleep(child: Child) -> Sleeper {
        let end = Instant::now() + Duration::from_secs(20);
        // Asleep, not merely started: its loader opens and closes files.
        let call = format!("/proc/{}/syscall", child.id());
        let asleep = format!("{} ", libc::SYS_clock_nanosleep);
        while !std::fs::read_to_string(&call).unwrap().starts_with(&asleep) {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
        Sleeper(child)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    fn look(&self) -> FdTable {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            match Watch::new(self.pid()).unwrap().look(Beat::Stopped) {
                Ok(table) => return table,
                // A child another test is just starting has a copy of all that
                // is open in this process until it executes its program.
                Err(Error::Refused(_)) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(e) => panic!("{e}"),
            }
        }
    }

    fn install(&self, opened: &Opened) {
        let mut stopped = Stopped::seize(self.pid()).unwrap();
        let mut batch = Batch::new();
        let plan = opened.install(std::process::id() as i32, &mut batch, Whose::Program);
        let done = stopped.run(batch).unwrap();
        plan.check(&done).unwrap();
        stopped.detach().unwrap();
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_root_of_its_own_is_carried() {
    let actor = Actor::play("chroot");
    let end = Instant::now() + Duration::from_secs(5);
    while !actor.path("jail/inside/here").exists() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
    let table = actor.look();
    assert_eq!(table.root, actor.file("jail"));
    assert_eq!(table.cwd, actor.file("jail/inside"));
    let mut opener = actor.opener();
    let odd = actor.file("jail/inside/odd (deleted)");
    let stat = *Pinned::by_path(&odd).unwrap().stat();
    opener.admit(odd.clone(), odd, stat.st_dev, stat.st_ino);
    let husk = Sleeper::new();
    husk.install(&Opened::open(table.clone(), &opener).unwrap());
    assert_eq!(husk.look(), table);
}

#[test]
fn the_final_table_changes_what_is_open_already() {
    let actor = Actor::play("pipes");
    let husk = Sleeper::new();
    let mut watch = Watch::new(actor.pid()).unwrap();
    let early = watch.look(Beat::Running).unwrap();
    assert!(early
        .pipes
        .iter()
        .all(|p| p.content.is_empty() && p.capacity.is_none()));
    let mut opened = Opened::open(early, &actor.opener()).unwrap();
    husk.install(&opened);
    let last = watch.look(Beat::Stopped).unwrap();
    assert_eq!(
        opened.finish(last.clone(), &actor.opener()).unwrap(),
        Shape::Same
    );
    drop(opened);
    assert_eq!(husk.look(), last);
}

#[test]
fn a_table_of_another_shape_is_opened_anew() {
    let files = Actor::play("files");
    let bare = Actor::play("bare");
    let husk = Sleeper::new();
    let mut opened = Opened::open(bare.look(), &bare.opener()).unwrap();
    husk.install(&opened);
    assert_eq!(
        opened.finish(files.look(), &files.opener()).unwrap(),
        Shape::Changed
    );
    husk.install(&opened);
    drop(opened);
    assert_eq!(husk.look(), files.look());
}

#[test]
fn offsets_and_flags_arrive_on_shared_descriptions() {
    let dir = tempfile::tempdir().unwrap();
    let path = FilePath::new(dir.path().join("f").as_os_str().as_bytes()).unwrap();
    std::fs::write(path.as_path(), b"0123456789").unwrap();
    let stat = *Pinned::by_path(&path).unwrap().stat();
    let mut opener = Opener::new(vec![FilePath::new("/").unwrap()]);
    opener.admit(path.clone(), path.clone(), stat.st_dev, stat.st_ino);
    let table = |offset, flags| FdTable {
        descriptions: vec![Description {
            flags: libc::O_RDWR | LARGEFILE | flags,
            kind: Kind::Regular(Regular {
                path: path.clone(),
                ino: stat.st_ino,
                offset,
            }),
        }],
        holders: vec![Holder {
            fd: 5,
            description: 0,
            cloexec: false,
        }],
        terminals: Vec::new(),
        pipes: Vec::new(),
        cwd: FilePath::new("/").unwrap(),
        root: FilePath::new("/").unwrap(),
    };
    let mut opened = Opened::open(table(2, 0), &opener).unwrap();
    let shared = opened.descriptions[0]
        .as_ref()
        .unwrap()
        .try_clone()
        .unwrap();
    assert_eq!(
        opened.finish(table(7, libc::O_APPEND), &opener).unwrap(),
        Shape::Same
    );
    let mut two = [0; 2];
    read(&shared, &mut two).unwrap();
    assert_eq!(&two, b"78");
    let flags = fcntl(shared.as_fd(), FcntlArg::F_GETFL).unwrap();
    assert!(flags & libc::O_APPEND != 0);
    // A flag that fcntl cannot change takes a new description.
    let shape = opened.finish(table(7, libc::O_DSYNC), &opener).unwrap();
    assert_eq!(shape, Shape::Changed);
    assert!(Opened::open(table(7, libc::O_PATH), &opener).is_err());
}

#[test]
fn impossible_tables_are_refused() {
    let actor = Actor::play("pipes");
    let good = actor.look();
    let refused = |change: fn(&mut FdTable)| {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(bad.check().is_err(), "{bad:?}");
    };
    refused(|t| t.holders[1].fd = 0);
    refused(|t| t.holders[0].fd = -1);
    refused(|t| t.holders[0].description = 4000);
    refused(|t| t.holders.swap(0, 3));
    refused(|t| {
        t.descriptions.pop();
    });
    refused(|t| t.pipes.push(Pipe::default()));
    refused(|t| {
        t.pipes.pop();
    });
    refused(|t| t.pipes[0].capacity = None);
    refused(|t| t.pipes[0].content = vec![0; 8193]);
    refused(|t| t.descriptions[0].flags = -1);
}

#[test]
fn a_pipe_is_as_large_as_it_was() {
    let (r, w) = pipe2(OFlag::O_CLOEXEC).unwrap();
    for (capacity, content) in [(4096, 4096), (1 << 20, 1 << 20), (65536, 1)] {
        let pipe = Pipe {
            capacity: Some(capacity),
            content: vec![3; content],
        };
        pipe.fill(&w).unwrap();
        assert!(pipe.fill(&w).is_err(), "filled twice");
        let mut back = vec![0; content];
        File::from(r.try_clone().unwrap())
            .read_exact(&mut back)
            .unwrap();
        assert_eq!(back, pipe.content);
    }
}
