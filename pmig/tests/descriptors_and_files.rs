//! A program's descriptors and files moved into another process, in another
//! mount namespace: the rooms as source and target use them together.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{channel, Receiver as Inbox, Sender};
use std::time::{Duration, Instant};

use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use pmig::id::Id;
use pmig::state::fd::{Beat, FdTable, Opened, Shape, Watch, Whose};
use pmig::state::files::{compare, FileSet, Ledger, Leftover, Plan, Receiver, Sources};
use pmig::state::objects::Opener;
use pmig::state::paths::FilePath;
use pmig::tracee::{Batch, Stopped};

/// What crosses the wire between the two halves of these tests.
enum Message {
    Hello(FdTable, FileSet),
    Block(u64, Vec<u8>),
    PassEnds(u64),
    Last(FdTable, u64, (i64, u32)),
}

/// Closes what was handed down to this test program: its children shall have
/// nothing open but what they are given.
fn tidy() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let inherited: Vec<i32> = fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|e| e.unwrap().file_name().to_str().unwrap().parse().ok())
            .filter(|&fd| fd > 2)
            .collect();
        for fd in inherited {
            // What is our own closes on exec: flags 02000000.
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
            if info
                .lines()
                .any(|l| l.starts_with("flags:") && !l.contains("\t02"))
            {
                let _ = nix::unistd::close(fd);
            }
        }
    });
}

struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Program {
        tidy();
        Program(command.spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that sleeps and has nothing to do with its descriptors.
fn husk() -> Program {
    let mut sleep = Command::new("sleep");
    sleep
        .arg("60")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let husk = Program::start(&mut sleep);
    let end = Instant::now() + Duration::from_secs(10);
    let call = format!("/proc/{}/syscall", husk.pid());
    while !fs::read_to_string(&call).unwrap().starts_with("230 ") {
        assert!(Instant::now() < end, "sleep does not sleep");
        std::thread::sleep(Duration::from_millis(1));
    }
    husk
}

fn install(opened: &Opened, husk: &Program) {
    let mut stopped = Stopped::seize(husk.pid()).unwrap();
    let mut batch = Batch::new();
    let plan = opened.install(std::process::id() as i32, &mut batch, Whose::Program);
    let done = stopped.run(batch).unwrap();
    plan.check(&done).unwrap();
    stopped.detach().unwrap();
}

/// The target: another mount namespace, in which `dir` is empty. Gives back
/// the log's content there, and what descriptor 1 of the husk is called.
fn target(dir: &Path, inbox: &Inbox<Message>) -> (Vec<u8>, String) {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    fs::write(dir.join("input"), b"line 1\nline 2\n").unwrap();

    let Message::Hello(table, mut files) = inbox.recv().unwrap() else {
        panic!("no hello");
    };
    files.boot = "of another kernel".into();
    let mut opener = Opener::new(vec![FilePath::new(dir.as_os_str().as_bytes()).unwrap()]);
    let plans = compare(&files, &mut opener, true, None).unwrap();
    let mut receiver = Receiver::new(Id::random().unwrap(), 1 << 30);
    let mut shipped = 0;
    for (file, plan) in files.files.iter().zip(plans) {
        if let Plan::Ship { replace } = plan {
            receiver.create(file, replace, &mut opener).unwrap();
            shipped += 1;
        }
    }
    assert_eq!(shipped, 1, "the input is there already");

    let husk = husk();
    let mut opened = Opened::open(table, &opener).unwrap();
    install(&opened, &husk);
    let last = loop {
        match inbox.recv().unwrap() {
            Message::Block(at, bytes) => receiver.write(0, at, &bytes).unwrap(),
            Message::PassEnds(size) => receiver.end_pass(0, size).unwrap(),
            Message::Last(table, size, mtime) => {
                receiver.finish(0, size, mtime).unwrap();
                break table;
            }
            Message::Hello(..) => panic!("a second hello"),
        }
    };
    assert_eq!(opened.finish(last.clone(), &opener).unwrap(), Shape::Same);
    receiver.check().unwrap();
    drop(opened);
    receiver.place().unwrap();
    receiver.sync().unwrap();

    let mut arrived = Watch::new(husk.pid()).unwrap().look(Beat::Stopped).unwrap();
    // Inode numbers are the only thing that may differ.
    for (d, wanted) in arrived.descriptions.iter_mut().zip(&last.descriptions) {
        use pmig::state::fd::Kind;
        if let (Kind::Regular(a), Kind::Regular(b)) = (&mut d.kind, &wanted.kind) {
            a.ino = b.ino;
        }
    }
    assert_eq!(arrived, last);
    let name = fs::read_link(format!("/proc/{}/fd/1", husk.pid())).unwrap();
    (
        fs::read(dir.join("log")).unwrap(),
        name.to_str().unwrap().to_owned(),
    )
}

/// The source: a program that never stops writing.
fn source(dir: &Path, outbox: &Sender<Message>) -> Vec<u8> {
    fs::write(dir.join("input"), b"line 1\nline 2\n").unwrap();
    let mut input = File::open(dir.join("input")).unwrap();
    input.seek(std::io::SeekFrom::Start(7)).unwrap();
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .open(dir.join("log"))
        .unwrap();
    let mut writer = Command::new("sh");
    writer
        .args(["-c", "n=0; while :; do n=$((n+1)); echo tick $n; done"])
        .current_dir(dir)
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(log.try_clone().unwrap()))
        .stderr(Stdio::from(log));
    let program = Program::start(&mut writer);
    let end = Instant::now() + Duration::from_secs(10);
    while fs::metadata(dir.join("log")).unwrap().len() < 300_000 {
        assert!(Instant::now() < end, "the program does not write");
        std::thread::sleep(Duration::from_millis(1));
    }

    let mut watch = Watch::new(program.pid()).unwrap();
    let table = watch.look(Beat::Running).unwrap();
    let mut sources = Sources::new(program.pid()).unwrap();
    assert!(sources.add_open(&table.files()).unwrap());
    let log = FilePath::new(dir.join("log").as_os_str().as_bytes()).unwrap();
    let mut shipment = sources.shipment(&log).unwrap();
    outbox
        .send(Message::Hello(table, sources.describe().unwrap()))
        .unwrap();
    let mut sent = Vec::new();
    let mut pass = || {
        let pass = shipment
            .pass(|at, block| {
                outbox.send(Message::Block(at, block.to_vec())).unwrap();
                Ok(())
            })
            .unwrap();
        sent.push(pass.sent);
        pass
    };
    for _ in 0..2 {
        let end = pass();
        outbox.send(Message::PassEnds(end.size)).unwrap();
    }
    let stopped = Stopped::seize(program.pid()).unwrap();
    let table = watch.look(Beat::Stopped).unwrap();
    assert!(!sources.add_open(&table.files()).unwrap(), "nothing new");
    assert!(sources.changed().unwrap().is_empty());
    let last = pass();
    outbox
        .send(Message::Last(table, last.size, last.mtime))
        .unwrap();
    assert!(
        sent[2] < sent[0],
        "only what changed goes over again: {sent:?}"
    );
    let content = fs::read(dir.join("log")).unwrap();

    // The program is gone from here; what it left is remembered.
    drop(program);
    drop(stopped);
    let ledger = Ledger::open(&dir.join("ledger")).unwrap();
    let left = Leftover {
        stamp: sources.stamp(&log).unwrap(),
        path: log.clone(),
    };
    ledger.record("feed", std::slice::from_ref(&left)).unwrap();
    assert!(ledger.read("feed").unwrap().contains(&left));
    content
}

#[test]
fn a_writing_program_loses_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_owned();
    let (outbox, inbox) = channel();
    // A thread of its own: its mount namespace stays its own.
    let there = std::thread::spawn(move || target(&at, &inbox));
    let content = source(dir.path(), &outbox);
    let (arrived, name) = there.join().unwrap();
    assert!(
        content == arrived,
        "{} bytes here, {} there",
        content.len(),
        arrived.len()
    );
    assert_eq!(Path::new(&name), dir.path().join("log"));
    let text = String::from_utf8(arrived).unwrap();
    for (n, line) in text.lines().enumerate().take(1000) {
        assert_eq!(line, format!("tick {}", n + 1));
    }
}

/// The installed descriptors are not merely there: the program reads and
/// writes on where it was.
#[test]
fn a_reader_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("input");
    fs::write(&path, b"first second third").unwrap();
    let mut input = File::open(&path).unwrap();
    let mut word = [0; 6];
    input.read_exact(&mut word).unwrap();
    let mut sleep = Command::new("sleep");
    sleep
        .arg("60")
        .stdin(Stdio::from(input))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let program = Program::start(&mut sleep);

    let mut watch = Watch::new(program.pid()).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    let table = loop {
        match watch.look(Beat::Running) {
            Ok(table) if !table.files().is_empty() => break table,
            other => assert!(Instant::now() < end, "{other:?}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let mut sources = Sources::new(program.pid()).unwrap();
    sources.add_open(&table.files()).unwrap();
    let mut opener = Opener::new(vec![FilePath::new("/").unwrap()]);
    let plans = compare(&sources.describe().unwrap(), &mut opener, false, None).unwrap();
    assert!(plans.iter().all(|p| *p == Plan::Use));
    let opened = Opened::open(table, &opener).unwrap();
    let husk = husk();
    install(&opened, &husk);
    drop(opened);

    let pidfd = pmig::sys::pidfd::open(husk.pid()).unwrap();
    let copy = pmig::sys::pidfd::get(pidfd.as_fd(), 0).unwrap();
    let mut rest = String::new();
    File::from(copy).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "second third");
    let mut null = File::from(pmig::sys::pidfd::get(pidfd.as_fd(), 1).unwrap());
    null.write_all(b"nobody reads this").unwrap();
}
