//! The commands as a person or a hostile peer meets them: exit codes, messages,
//! and a server that nothing brings down.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pmig::id::{Id, Secret};
use pmig::protocol::fate::{self, Answer, Question, What};
use pmig::protocol::preface::{self, Kind};
use pmig::transport::{connect, Addr};

struct World(tempfile::TempDir);

impl World {
    fn new() -> World {
        World(tempfile::tempdir().unwrap())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pmig"));
        command
            .args(args)
            .env("PMIG_STATE_DIR", self.0.path().join("state"))
            .env("PMIG_RUN_DIR", self.0.path().join("run"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> (i32, String) {
        let Output {
            status,
            stdout,
            stderr,
        } = self.command(args).output().unwrap();
        let text = String::from_utf8_lossy(&stdout) + String::from_utf8_lossy(&stderr);
        (status.code().unwrap(), text.into_owned())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("sock")
    }

    fn addr(&self) -> Addr {
        Addr::Unix(self.socket())
    }

    fn serve(&self) -> Serve {
        let addr = self.addr().to_string();
        let child = self
            .command(&["serve", "--listen", &addr])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            assert!(start.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(5));
        }
        Serve(child)
    }
}

struct Serve(Child);

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_plain_network_has_to_be_asked_for_on_both_sides() {
    let world = World::new();
    for args in [
        &["serve", "--listen", "tcp://127.0.0.1:1"][..],
        &["migrate", "1", "tcp://127.0.0.1:1"],
        &["check", "1", "tcp://127.0.0.1:1"],
    ] {
        let (code, text) = world.run(args);
        assert_eq!(code, 2, "{text}");
        assert!(
            text.contains("--insecure") && text.contains("neither encrypts"),
            "{text}"
        );
    }
}

#[test]
fn exit_codes_tell_what_happened() {
    let world = World::new();
    let (code, text) = world.run(&["migrate", "frog", "unix:/x"]);
    assert_eq!(code, 2, "{text}");
    let (code, text) = world.run(&["check", "4194305"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no such process"), "{text}");
    let (code, text) = world.run(&["resolve", &Id::random().unwrap().to_string()]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no record"), "{text}");

    let nobody = format!("unix:{}", world.0.path().join("nobody").display());
    let me = std::process::id().to_string();
    let (code, text) = world.run(&["migrate", &me, &nobody]);
    assert!(code == 3 || code == 4, "{code}: {text}");
    assert!(text.contains("runs on here"), "{text}");
}

#[test]
fn a_report_is_written_of_a_failure_too_and_its_place_is_tried_first() {
    let world = World::new();
    let nobody = format!("unix:{}", world.0.path().join("nobody").display());
    let me = std::process::id().to_string();
    let page = world.0.path().join("page.html");
    let migrate = |page: &str| world.run(&["migrate", &me, &nobody, "--report", page]);
    let (code, text) = migrate(page.to_str().unwrap());
    assert!(code == 3 || code == 4, "{code}: {text}");
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("runs on here") && page.ends_with("</html>\n"));
    let (code, text) = migrate("/nowhere/page.html");
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("/nowhere/page.html: No such file"), "{text}");
    assert!(!text.contains("runs on here"), "{text}");
}

#[test]
fn machines_are_described_for_people_and_for_programs() {
    let world = World::new();
    let (code, text) = world.run(&["check"]);
    let able = text.lines().next().unwrap().contains("can move processes");
    assert_eq!(code == 0, able, "{text}");
    let (_, json) = world.run(&["check", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["able"], able);
    assert!(json["capabilities"].as_array().unwrap().len() > 5);
}

#[test]
fn no_bytes_bring_serve_down() {
    let world = World::new();
    let serve = world.serve();
    let preface = |kind: u8| {
        let mut words = b"PMIG".to_vec();
        words.extend_from_slice(&preface::VERSION.to_le_bytes());
        words.push(kind);
        words
    };
    let mut attacks: Vec<Vec<u8>> = vec![
        Vec::new(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 100_000],
        preface(0),
        preface(200),
        preface(2),
    ];
    for tail in [
        &[0xff; 49][..],
        &[0; 49],
        &[0; 3],
        &[0xff; 4],
        &[1, 0, 0, 0, 9],
    ] {
        for kind in [1, 2] {
            let mut bytes = preface(kind);
            bytes.extend_from_slice(tail);
            attacks.push(bytes);
        }
    }
    // A message that claims to be as long as it may be, and one longer.
    for len in [16u32 << 20, u32::MAX] {
        let mut bytes = preface(1);
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&[7; 1000]);
        attacks.push(bytes);
    }
    for attack in &attacks {
        let mut stream = UnixStream::connect(world.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let _ = stream.write_all(attack);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
    }
    let mut link = connect(&world.addr()).unwrap();
    preface::open(&mut *link, Kind::Fate).unwrap();
    let question = Question {
        id: Id::random().unwrap(),
        secret: Secret::random().unwrap(),
        what: What::Abandon,
    };
    let answer = fate::ask(&mut *link, &question).unwrap();
    let Answer::Unknown(why) = answer else {
        panic!("what is not recorded never reads as never ran: {answer:?}")
    };
    assert!(why.contains("no record"), "{why}");
    drop(serve);
}

#[test]
fn serve_ends_when_it_is_told_to() {
    let world = World::new();
    let mut serve = world.serve();
    let pid = nix::unistd::Pid::from_raw(serve.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(serve.0.wait().unwrap().success());
}
