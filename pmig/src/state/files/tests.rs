//! Files of this very test program, as if it were to be moved.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::state::objects::Opener;

pub(super) struct Place(pub(super) tempfile::TempDir);

impl Place {
    pub(super) fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    pub(super) fn on(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn path(&self, name: &str) -> FilePath {
        FilePath::new(self.on(name).as_os_str().as_bytes()).unwrap()
    }

    pub(super) fn opener(&self) -> Opener {
        Opener::new(vec![
            FilePath::new(self.0.path().as_os_str().as_bytes()).unwrap()
        ])
    }

    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

pub(super) fn me() -> Sources {
    Sources::new(std::process::id() as i32).unwrap()
}

/// Describes files open in this program, as another kernel's.
pub(super) fn described(files: &[(&File, &FilePath, Use)]) -> FileSet {
    let mut sources = me();
    for (file, path, how) in files {
        assert!(sources.add(Link::Fd(file.as_raw_fd()), path, *how).unwrap());
    }
    let mut set = sources.describe().unwrap();
    set.boot = "another".into();
    set
}

pub(super) fn refused(result: Result<Vec<Plan>>) -> Vec<String> {
    match result {
        Err(Error::Refused(o)) => o.iter().map(|o| o.to_string()).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_same_file_is_used() {
    let p = Place::new();
    fs::write(p.on("data"), b"hello").unwrap();
    let file = File::open(p.on("data")).unwrap();
    let set = described(&[(&file, &p.path("data"), Use::Read)]);
    assert!(matches!(set.files[0].identity, Identity::Hash(_)));
    let mut opener = p.opener();
    assert_eq!(
        compare(&set, &mut opener, false, None).unwrap(),
        [Plan::Use]
    );
    assert!(opener.regular(&p.path("data")).is_ok());
}

#[test]
fn a_file_is_read_once_as_long_as_it_stays() {
    let p = Place::new();
    fs::write(p.on("data"), vec![1; 50 << 20]).unwrap();
    let file = File::open(p.on("data")).unwrap();
    let set = described(&[(&file, &p.path("data"), Use::Read)]);
    let mut opener = p.opener();
    let mut took = || {
        let start = std::time::Instant::now();
        assert_eq!(
            compare(&set, &mut opener, false, None).unwrap(),
            [Plan::Use]
        );
        start.elapsed()
    };
    let (first, again) = (took(), took());
    assert!(again * 5 < first, "{first:?}, then {again:?}");
    std::thread::sleep(Duration::from_millis(20));
    fs::write(p.on("data"), vec![2; 50 << 20]).unwrap();
    refused(compare(&set, &mut opener, false, None));
}

#[test]
fn a_missing_file_is_shipped_or_refused() {
    let p = Place::new();
    fs::write(p.on("data"), b"hello").unwrap();
    let file = File::open(p.on("data")).unwrap();
    let set = described(&[(&file, &p.path("data"), Use::Read)]);
    fs::remove_file(p.on("data")).unwrap();
    let why = refused(compare(&set, &mut p.opener(), false, None));
    assert!(
        why[0].contains("does not exist") && why[0].contains("--files ship"),
        "{why:?}"
    );
    let plans = compare(&set, &mut p.opener(), true, None).unwrap();
    assert_eq!(plans, [Plan::Ship { replace: None }]);
}

#[test]
fn another_file_is_refused_by_name() {
    let p = Place::new();
    fs::write(p.on("data"), b"hello").unwrap();
    let file = File::open(p.on("data")).unwrap();
    let set = described(&[(&file, &p.path("data"), Use::Read)]);
    fs::write(p.on("data"), b"jello").unwrap();
    let why = refused(compare(&set, &mut p.opener(), true, None));
    assert!(why[0].contains("another file there (hash "), "{why:?}");
    fs::write(p.on("data"), b"hello!").unwrap();
    let why = refused(compare(&set, &mut p.opener(), true, None));
    assert!(why[0].contains("5 bytes here, 6 there"), "{why:?}");
}

#[test]
fn all_obstacles_are_told_at_once() {
    let p = Place::new();
    let names = ["gone", "log", "linked", "pipe", "sub"];
    let files: Vec<File> = names
        .iter()
        .map(|n| {
            fs::write(p.on(n), n).unwrap();
            File::open(p.on(n)).unwrap()
        })
        .collect();
    fs::create_dir(p.on("dir")).unwrap();
    fs::write(p.on("dir/inner"), b"x").unwrap();
    let inner = File::open(p.on("dir/inner")).unwrap();
    let paths: Vec<FilePath> = names.iter().map(|n| p.path(n)).collect();
    let mut all: Vec<(&File, &FilePath, Use)> = files
        .iter()
        .zip(&paths)
        .map(|(f, p)| (f, p, Use::Read))
        .collect();
    all[1].2 = Use::Written;
    let inner_path = p.path("dir/inner");
    all.push((&inner, &inner_path, Use::Read));
    let set = described(&all);
    for name in ["gone", "linked", "pipe", "sub"] {
        fs::remove_file(p.on(name)).unwrap();
    }
    symlink("log", p.on("linked")).unwrap();
    nix::unistd::mkfifo(&p.on("pipe"), nix::sys::stat::Mode::from_bits_retain(0o600)).unwrap();
    fs::create_dir(p.on("sub")).unwrap();
    fs::remove_dir_all(p.on("dir")).unwrap();
    let why = refused(compare(&set, &mut p.opener(), false, None)).join("\n");
    for part in [
        "gone: does not exist",
        "log: is open for writing, and the target has a file of its own",
        "linked: a symbolic link stands in its way",
        "pipe: the target has something else there",
        "sub: the target has something else there",
        "inner: the directory",
    ] {
        assert!(why.contains(part), "{part} is not in\n{why}");
    }
}

#[test]
fn one_kernel_knows_its_own_files() {
    let p = Place::new();
    fs::write(p.on("log"), b"x").unwrap();
    let file = File::open(p.on("log")).unwrap();
    let mut set = described(&[(&file, &p.path("log"), Use::Written)]);
    set.boot = boot_id().unwrap();
    assert_eq!(
        compare(&set, &mut p.opener(), false, None).unwrap(),
        [Plan::Use]
    );
}

#[test]
fn paths_outside_the_roots_are_refused() {
    let p = Place::new();
    fs::write(p.on("data"), b"x").unwrap();
    let file = File::open(p.on("data")).unwrap();
    let set = described(&[(&file, &p.path("data"), Use::Read)]);
    let mut elsewhere = Opener::new(vec![FilePath::new("/srv/allowed").unwrap()]);
    let why = refused(compare(&set, &mut elsewhere, true, None));
    assert!(why[0].contains("lies outside"), "{why:?}");
}

#[test]
fn programs_are_known_by_their_build_id() {
    let mut sources = me();
    let exe = fs::read_link("/proc/self/exe").unwrap();
    let exe = FilePath::new(exe.as_os_str().as_bytes()).unwrap();
    sources.add(Link::Exe, &exe, Use::Exe).unwrap();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps
        .lines()
        .find(|l| l.ends_with(&exe.to_string()))
        .unwrap();
    let (start, end) = line
        .split_whitespace()
        .next()
        .unwrap()
        .split_once('-')
        .unwrap();
    let hex = |s| u64::from_str_radix(s, 16).unwrap();
    let link = Link::Map {
        start: hex(start),
        end: hex(end),
    };
    sources.add(link, &exe, Use::Mapped).unwrap();
    let mut set = sources.describe().unwrap();
    assert_eq!(set.files.len(), 1);
    assert!(
        matches!(set.files[0].identity, Identity::BuildId(_)),
        "{:?}",
        set.files[0]
    );
    set.boot = "another".into();
    let mut opener = Opener::new(vec![FilePath::new("/").unwrap()]);
    assert_eq!(
        compare(&set, &mut opener, false, None).unwrap(),
        [Plan::Use]
    );
    if let Identity::BuildId(id) = &mut set.files[0].identity {
        id[0] ^= 1;
    }
    let why = refused(compare(&set, &mut opener, false, None));
    assert!(why[0].contains("(build-id "), "{why:?}");
}

#[test]
fn a_file_whose_name_was_taken_is_refused() {
    let p = Place::new();
    fs::write(p.on("data"), b"x").unwrap();
    let file = File::open(p.on("data")).unwrap();
    fs::rename(p.on("data"), p.on("elsewhere")).unwrap();
    fs::write(p.on("data"), b"y").unwrap();
    let e = me()
        .add(Link::Fd(file.as_raw_fd()), &p.path("data"), Use::Read)
        .unwrap_err();
    assert!(e.to_string().contains("leads to another file now"), "{e}");
    let null = File::open("/dev/null").unwrap();
    let path = FilePath::new("/dev/null").unwrap();
    assert!(me()
        .add(Link::Fd(null.as_raw_fd()), &path, Use::Read)
        .is_err());
    let proc = File::open("/proc/meminfo").unwrap();
    let path = FilePath::new("/proc/meminfo").unwrap();
    assert!(me()
        .add(Link::Fd(proc.as_raw_fd()), &path, Use::Read)
        .is_err());
}

#[test]
fn a_file_changed_behind_the_programs_back_is_noticed() {
    let p = Place::new();
    fs::write(p.on("data"), b"x").unwrap();
    let file = File::open(p.on("data")).unwrap();
    let mut sources = me();
    sources
        .add(Link::Fd(file.as_raw_fd()), &p.path("data"), Use::Read)
        .unwrap();
    sources.describe().unwrap();
    assert!(sources.changed().unwrap().is_empty());
    std::thread::sleep(Duration::from_millis(20));
    OpenOptions::new()
        .append(true)
        .open(p.on("data"))
        .unwrap()
        .write_all(b"y")
        .unwrap();
    assert_eq!(sources.changed().unwrap(), [&p.path("data")]);
}

#[test]
fn the_ledger_is_bounded_and_believes_nothing() {
    let p = Place::new();
    let ledger = Ledger::open(&p.on("ledger")).unwrap();
    for bad in ["", "..", "a/b", "ABC", "x"] {
        assert!(ledger.record(bad, &[]).is_err(), "{bad}");
        assert!(ledger.read(bad).is_err(), "{bad}");
    }
    for n in 0..300 {
        ledger.record(&format!("{n:x}"), &[]).unwrap();
    }
    assert_eq!(fs::read_dir(p.on("ledger")).unwrap().count(), 256);
    fs::write(p.on("ledger/ab"), b"[{\"path\":[47,46,46],\"stamp\":0}]").unwrap();
    assert!(ledger.read("ab").is_err());
}

#[test]
fn impossible_lists_of_files_are_refused() {
    let p = Place::new();
    fs::write(p.on("data"), b"x").unwrap();
    let file = File::open(p.on("data")).unwrap();
    let good = described(&[(&file, &p.path("data"), Use::Read)]);
    good.check().unwrap();
    let bad = |change: fn(&mut FileSet)| {
        let mut set = good.clone();
        change(&mut set);
        assert!(set.check().is_err(), "{set:?}");
    };
    bad(|s| s.files.push(s.files[0].clone()));
    bad(|s| s.files[0].stamp.size = u64::MAX);
    bad(|s| s.files[0].mode = 0o100644);
    bad(|s| s.files[0].identity = Identity::Written);
    bad(|s| s.files[0].identity = Identity::BuildId(vec![0; 1000]));
    bad(|s| s.boot = "x".repeat(100));
}
