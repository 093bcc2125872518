//! Shipping, from a file of this program to another name beside it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{symlink, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

use super::tests::{described, me, refused, Place};
use super::*;
use crate::id::Id;
use crate::state::paths::Pinned;

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % below
    }
}

/// Sends a file of `p` into another name of `p`, pass by pass.
struct Move {
    sources: Sources,
    shipment: Shipment,
    receiver: Receiver,
    temporary: PathBuf,
}

impl Move {
    fn begin(p: &Place, file: &File, limit: u64) -> Move {
        let path = p.path("data");
        let mut sources = me();
        sources
            .add(Link::Fd(file.as_raw_fd()), &path, Use::Written)
            .unwrap();
        let mut facts = sources.describe().unwrap().files.remove(0);
        facts.path = p.path("copy");
        let shipment = sources.shipment(&path).unwrap();
        let mut receiver = Receiver::new(Id::random().unwrap(), limit);
        receiver.create(&facts, None, &mut p.opener()).unwrap();
        let temporary = receiver.pending()[0].temporary.as_path().to_owned();
        Move {
            sources,
            shipment,
            receiver,
            temporary,
        }
    }

    fn pass(&mut self) -> Pass {
        let receiver = &mut self.receiver;
        let pass = self
            .shipment
            .pass(|at, block| receiver.write(0, at, block))
            .unwrap();
        receiver.end_pass(0, pass.size).unwrap();
        pass
    }
}

#[test]
fn random_changes_arrive() {
    for seed in 1..=12 {
        let p = Place::new();
        let mut dice = Dice(seed);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(p.on("data"))
            .unwrap();
        file.set_len(dice.roll(700_000)).unwrap();
        let mut m = Move::begin(&p, &file, 1 << 30);
        for _ in 0..8 {
            for _ in 0..dice.roll(6) {
                let at = dice.roll(900_000);
                match dice.roll(8) {
                    0 => file.set_len(at).unwrap(),
                    1 => file
                        .write_all_at(&vec![0; dice.roll(200_000) as usize], at)
                        .unwrap(),
                    n => {
                        let bytes = vec![n as u8; 1 + dice.roll(70_000) as usize];
                        file.write_all_at(&bytes, at).unwrap();
                    }
                }
            }
            m.pass();
            assert!(
                fs::read(p.on("data")).unwrap() == fs::read(&m.temporary).unwrap(),
                "seed {seed}"
            );
        }
        assert_eq!(m.pass().sent, 0);
    }
}

#[test]
fn only_what_changed_is_sent_and_holes_are_not() {
    let p = Place::new();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(p.on("data"))
        .unwrap();
    file.set_len(1 << 34).unwrap();
    file.write_all_at(b"far out", 1 << 33).unwrap();
    let mut m = Move::begin(&p, &file, 1 << 35);
    assert_eq!(m.pass().sent, BLOCK as u64);
    let copy = fs::metadata(&m.temporary).unwrap();
    assert_eq!(copy.len(), 1 << 34);
    assert!(copy.blocks() * 512 <= 4 * BLOCK as u64, "holes stay holes");
    assert_eq!(m.pass().sent, 0);
    file.write_all_at(b"x", 5).unwrap();
    assert_eq!(m.pass().sent, BLOCK as u64);
    std::thread::sleep(Duration::from_millis(60));
    m.pass();
    // Nothing has happened since before that pass: the file is not even read.
    assert_eq!(m.pass().sent, 0);
    file.write_all_at(b"y", 5).unwrap();
    assert_eq!(m.pass().sent, BLOCK as u64);
}

#[test]
fn what_is_appended_travels_alone() {
    let p = Place::new();
    let mut file = OpenOptions::new()
        .read(true)
        .append(true)
        .create_new(true)
        .open(p.on("data"))
        .unwrap();
    let mut m = Move::begin(&p, &file, 1 << 30);
    // The last two go on over the end of a block; the first would be zeros.
    for (n, len) in [0, 1, 100, BLOCK - 200, 200, BLOCK].into_iter().enumerate() {
        file.write_all(&vec![n as u8; len]).unwrap();
        assert!(m.pass().sent <= 2 * len as u64, "{len}");
        assert!(fs::read(p.on("data")).unwrap() == fs::read(&m.temporary).unwrap());
    }
    // What was there has changed besides.
    let other = File::options().write(true).open(p.on("data")).unwrap();
    other.write_all_at(b"!", BLOCK as u64 + 7).unwrap();
    file.write_all(b"?").unwrap();
    m.pass();
    assert!(fs::read(p.on("data")).unwrap() == fs::read(&m.temporary).unwrap());
}

#[test]
fn a_shipped_file_comes_into_place() {
    let p = Place::new();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o4751)
        .open(p.on("data"))
        .unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o4751))
        .unwrap();
    (&file).write_all(b"state").unwrap();
    let mut m = Move::begin(&p, &file, 1 << 20);
    assert!(m.receiver.check().is_err(), "not whole yet");
    let pass = m.pass();
    m.receiver.finish(0, pass.size, pass.mtime).unwrap();
    assert!(m.receiver.write(0, 0, b"late").is_err());
    m.receiver.sync().unwrap();
    m.receiver.check().unwrap();
    let open = File::open(&m.temporary).unwrap();
    let pending = m.receiver.pending();
    m.receiver.place().unwrap();
    m.receiver.place().unwrap();
    drop(m.receiver);
    let there = fs::metadata(p.on("copy")).unwrap();
    assert_eq!(fs::read(p.on("copy")).unwrap(), b"state");
    assert_eq!(there.permissions().mode() & 0o7777, 0o751, "no set-id bit");
    assert_eq!((there.mtime(), there.mtime_nsec() as u32), pass.mtime);
    let name = fs::read_link(format!("/proc/self/fd/{}", open.as_raw_fd())).unwrap();
    assert_eq!(name, p.on("copy"));
    // Recovery may come late and repeat either.
    pending[0].commit().unwrap();
    pending[0].abort().unwrap();
    assert_eq!(p.names(), ["copy", "data"]);
    m.sources.stamp(&p.path("data")).unwrap();
}

#[test]
fn an_aborted_receiver_leaves_nothing() {
    let p = Place::new();
    fs::write(p.on("data"), b"state").unwrap();
    let file = File::open(p.on("data")).unwrap();
    let mut m = Move::begin(&p, &file, 1 << 20);
    m.pass();
    let pending = m.receiver.pending();
    assert_eq!(p.names().len(), 2);
    // Held, so that its inode number is not given to another file below.
    let _held = File::open(&m.temporary).unwrap();
    drop(m.receiver);
    assert_eq!(p.names(), ["data"]);
    pending[0].abort().unwrap();
    // What took the temporary name meanwhile is not ours.
    fs::write(pending[0].temporary.as_path(), b"other").unwrap();
    pending[0].abort().unwrap();
    assert!(pending[0].commit().is_err());
    assert_eq!(p.names().len(), 2);
}

/// A file that has come whole, and has no place yet.
fn received(p: &Place) -> Move {
    fs::write(p.on("data"), b"state").unwrap();
    let file = File::open(p.on("data")).unwrap();
    let mut m = Move::begin(p, &file, 1 << 20);
    let pass = m.pass();
    m.receiver.finish(0, pass.size, pass.mtime).unwrap();
    m
}

#[test]
fn a_file_that_appeared_meanwhile_is_not_overwritten() {
    let p = Place::new();
    let mut m = received(&p);
    fs::write(p.on("copy"), b"somebody's").unwrap();
    assert!(m.receiver.check().is_err());
    let e = m.receiver.place().unwrap_err().to_string();
    assert!(e.contains(".pmig-"), "{e}");
    assert_eq!(fs::read(p.on("copy")).unwrap(), b"somebody's");
    assert_eq!(fs::read(&m.temporary).unwrap(), b"state");
    m.receiver.pending()[0].abort().unwrap();
}

#[test]
fn a_peer_cannot_send_more_than_it_may() {
    let p = Place::new();
    fs::write(p.on("data"), b"state").unwrap();
    let file = File::open(p.on("data")).unwrap();
    let mut m = Move::begin(&p, &file, 1000);
    let r = &mut m.receiver;
    r.write(0, 0, &[1; 900]).unwrap();
    r.write(0, 100, &[2; 800]).unwrap();
    assert!(r.write(0, 900, &[1; 200]).is_err());
    assert!(r.write(0, u64::MAX - 1, &[1; 200]).is_err());
    assert!(r.write(0, 0, &vec![0; BLOCK + 1]).is_err());
    assert!(r.write(1, 0, b"x").is_err());
    assert!(r.end_pass(0, 1001).is_err());
    assert!(r.end_pass(0, u64::MAX).is_err());
    r.end_pass(0, 10).unwrap();
    r.write(0, 10, &[1; 990]).unwrap();
    assert!(r.finish(0, 1000, (0, 1_000_000_000)).is_err());
}

#[test]
fn links_do_not_lead_a_shipped_file_astray() {
    let p = Place::new();
    let outside = Place::new();
    fs::write(p.on("data"), b"x").unwrap();
    symlink(outside.0.path(), p.on("link")).unwrap();
    let file = File::open(p.on("data")).unwrap();
    let set = described(&[(&file, &p.path("data"), Use::Written)]);
    let mut facts = set.files[0].clone();
    facts.path = p.path("link/file");
    let mut receiver = Receiver::new(Id::random().unwrap(), 1 << 20);
    let e = receiver.create(&facts, None, &mut p.opener()).unwrap_err();
    assert_eq!(e.errno(), Some(libc::ELOOP));
    facts.path = outside.path("file");
    assert!(receiver.create(&facts, None, &mut p.opener()).is_err());
    drop(receiver);
    assert!(outside.names().is_empty());
    let mut set = set.clone();
    set.files[0].path = p.path("link/file");
    assert!(compare(&set, &mut p.opener(), true, None).is_err());
}

#[test]
fn there_and_back_again() {
    let p = Place::new();
    let ledger = Ledger::open(&p.on("ledger")).unwrap();
    fs::write(p.on("data"), b"old state").unwrap();
    let left = Stamp::of(Pinned::by_path(&p.path("data")).unwrap().stat());
    let entry = Leftover {
        path: p.path("data"),
        stamp: left,
    };
    ledger.record("abc", &[entry]).unwrap();

    // The file as the program has it elsewhere by now.
    let other = Place::new();
    fs::write(other.on("data"), b"new state").unwrap();
    let file = File::open(other.on("data")).unwrap();
    let mut set = described(&[(&file, &other.path("data"), Use::Written)]);
    set.files[0].path = p.path("data");

    for lineage in [None, Some((&ledger, "def"))] {
        let why = refused(compare(&set, &mut p.opener(), true, lineage));
        assert!(why[0].contains("a file of its own"), "{why:?}");
    }
    let home = Some((&ledger, "abc"));
    let why = refused(compare(&set, &mut p.opener(), false, home));
    assert!(why[0].contains("--files ship"), "{why:?}");
    let plans = compare(&set, &mut p.opener(), true, home).unwrap();
    assert_eq!(
        plans,
        [Plan::Ship {
            replace: Some(left)
        }]
    );

    let mut receiver = Receiver::new(Id::random().unwrap(), 1 << 20);
    receiver
        .create(&set.files[0], Some(left), &mut p.opener())
        .unwrap();
    receiver.write(0, 0, b"new state").unwrap();
    receiver.finish(0, 9, (1, 2)).unwrap();
    receiver.check().unwrap();
    let pending = receiver.pending();
    receiver.place().unwrap();
    pending[0].commit().unwrap();
    assert_eq!(fs::read(p.on("data")).unwrap(), b"new state");
    assert_eq!(p.names(), ["data", "ledger"]);

    // What was left then is no longer what stands there.
    assert!(refused(compare(&set, &mut p.opener(), true, home))[0].contains("of its own"));
    ledger.forget("abc").unwrap();
    ledger.forget("abc").unwrap();
    assert!(ledger.read("abc").unwrap().is_empty());
}

/// A receiver of a file that will replace `data`.
fn replacing(p: &Place) -> Receiver {
    fs::write(p.on("data"), b"old state").unwrap();
    let left = Stamp::of(Pinned::by_path(&p.path("data")).unwrap().stat());
    let file = File::open(p.on("data")).unwrap();
    let set = described(&[(&file, &p.path("data"), Use::Written)]);
    let mut receiver = Receiver::new(Id::random().unwrap(), 1 << 20);
    receiver
        .create(&set.files[0], Some(left), &mut p.opener())
        .unwrap();
    receiver
}

#[test]
fn a_leftover_somebody_changed_is_kept() {
    let p = Place::new();
    let mut receiver = replacing(&p);
    receiver.finish(0, 0, (1, 2)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    fs::write(p.on("data"), b"my  notes").unwrap();
    assert!(receiver.check().is_err());
    assert!(receiver.place().is_err());
    assert_eq!(fs::read(p.on("data")).unwrap(), b"my  notes");
    receiver.pending()[0].abort().unwrap();
    assert_eq!(p.names(), ["data"]);
}

#[test]
fn an_interrupted_exchange_is_finished() {
    let p = Place::new();
    let mut receiver = replacing(&p);
    receiver.write(0, 0, b"new").unwrap();
    receiver.finish(0, 3, (1, 2)).unwrap();
    receiver.keep();
    let pending = receiver.pending().remove(0);
    drop(receiver);
    nix::fcntl::renameat2(
        nix::fcntl::AT_FDCWD,
        pending.temporary.as_path(),
        nix::fcntl::AT_FDCWD,
        pending.path.as_path(),
        nix::fcntl::RenameFlags::RENAME_EXCHANGE,
    )
    .unwrap();
    pending.commit().unwrap();
    assert_eq!(fs::read(p.on("data")).unwrap(), b"new");
    assert_eq!(p.names(), ["data"]);
}

#[test]
fn what_was_replaced_goes_though_the_program_moved_its_file() {
    let p = Place::new();
    let mut receiver = replacing(&p);
    receiver.write(0, 0, b"new state").unwrap();
    receiver.finish(0, 9, (1, 2)).unwrap();
    receiver.place().unwrap();
    // It runs from here on, and whoever held the receiver dies.
    fs::rename(p.on("data"), p.on("data.1")).unwrap();
    let pending = receiver.pending();
    drop(receiver);
    pending[0].commit().unwrap();
    assert_eq!(p.names(), ["data.1"]);
    assert_eq!(fs::read(p.on("data.1")).unwrap(), b"new state");
}

#[test]
fn a_file_that_the_program_moved_away_is_not_missed() {
    let p = Place::new();
    let mut m = received(&p);
    m.receiver.place().unwrap();
    fs::rename(p.on("copy"), p.on("copy.1")).unwrap();
    m.receiver.pending()[0].commit().unwrap();
    assert_eq!(p.names(), ["copy.1", "data"]);
}
