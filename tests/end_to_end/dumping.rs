//! Programs in files.

use anyhow::{bail, ensure, Context, Result};
use lab::harness::Trial;
use lab::scenario::{dump, gone, runs_on, same, unmoved, wait, Program, LIMIT};
use lab::{Cmd, Host, Lab, Make, Output, Status};
use pmig::protocol::{decode, message::ToTarget};
use std::cell::Cell;
use std::ops::Range;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

type Claim = (&'static str, fn(&Lab) -> Result<()>);

const FILE: &str = "/srv/work/program.pmig";
const QUICK: &[&str] = &["pace_us=0"];

const CLAIMS: &[Claim] = &[
    ("a_program_left_running_has_a_copy_in_the_file", copy),
    ("a_program_comes_back_where_it_was", back),
    ("a_taken_name_is_refused_and_keeps_its_file", taken_name),
    ("a_full_disk_leaves_the_program_where_it_is", full_disk),
    ("a_pid_in_use_is_named_and_the_file_stays", pid_taken),
    ("what_is_in_a_file_can_be_read", inspected),
    ("a_cut_or_altered_file_restores_nothing", altered),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for make in [Make::Netns, Make::Vm] {
        for (name, body) in CLAIMS {
            trials.push(Trial::new(make, format!("dumping::{name}"), body).bare());
        }
    }
    let name = "dumping::no_file_however_hostile_gets_out_of_hand";
    trials.push(Trial::new(Make::Netns, name, hostile).bare());
    trials
}

fn restore(host: &dyn Host) -> Result<Output> {
    host.exec(&Cmd::new(["timeout", "60", "pmig", "restore", FILE]))
}

fn started(lab: &Lab, line: &str) -> Result<Program> {
    let program = Program::start(lab.a(), line)?;
    program.wait_lines(lab.a(), 5)?;
    Ok(program)
}

fn copy(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let expected = unmoved(b, "recursive lines=150", QUICK)?;
    let program = started(lab, "recursive lines=150")?;
    dump(a, &program, FILE, "--leave-running", &[])?.ok()?;
    program.wait_lines(a, 5)?;
    b.write(FILE, 0o600, &a.read(FILE)?)?;
    restore(b)?.ok()?;
    for host in [a, b] {
        same(&program.finish(host)?, &expected).with_context(|| host.name().to_owned())?;
    }
    Ok(())
}

fn back(lab: &Lab) -> Result<()> {
    let a = lab.a();
    let line = "iterative lines=150 file=/srv/work/own";
    let quick = ["pace_us=0", "file=/srv/work/unmoved/own"];
    let expected = unmoved(lab.b(), line, &quick)?;
    let program = started(lab, line)?;
    for _ in 0..3 {
        dump(a, &program, FILE, "", &[])?.ok()?;
        gone(a, program.pid)?;
        restore(a)?.ok()?;
        a.sh(&format!("rm {FILE}"))?;
        program.wait_lines(a, 5)?;
    }
    same(&program.finish(a)?, &expected)?;
    let names = a.sh("ls -A /srv/work")?;
    ensure!(!names.contains("pmig"), "{names}");
    Ok(())
}

fn taken_name(lab: &Lab) -> Result<()> {
    let a = lab.a();
    let expected = unmoved(a, "iterative lines=150", QUICK)?;
    let program = started(lab, "iterative lines=150")?;
    a.write(FILE, 0o600, b"somebody's")?;
    dump(a, &program, FILE, "", &[])?.failed(3, &[FILE, "exists already"])?;
    ensure!(a.read(FILE)? == b"somebody's");
    dump(a, &program, "/srv/nowhere/x", "", &[])?.failed(4, &["/srv/nowhere"])?;
    runs_on(a, &program, &expected)
}

fn full_disk(lab: &Lab) -> Result<()> {
    let a = lab.a();
    let expected = unmoved(a, "iterative lines=150 heap_kb=2000", QUICK)?;
    let program = started(lab, "iterative lines=150 heap_kb=2000")?;
    a.sh("mkdir /srv/work/full; mount -t tmpfs -o size=64k tmpfs /srv/work/full")?;
    let moved = dump(a, &program, "/srv/work/full/x", "", &[])?;
    let names = a.sh("ls -A /srv/work/full; umount /srv/work/full")?;
    moved.failed(4, &["No space"])?;
    ensure!(names.is_empty(), "{names}");
    runs_on(a, &program, &expected)
}

fn pid_taken(lab: &Lab) -> Result<()> {
    let a = lab.a();
    let expected = unmoved(a, "iterative lines=150", QUICK)?;
    let program = started(lab, "iterative lines=150")?;
    dump(a, &program, FILE, "--leave-running", &[])?.ok()?;
    let before = a.read(FILE)?;
    let said = restore(a)?;
    ensure!(said.status == Status::Code(3), "{:?}", said.status);
    let text = said.err();
    ensure!(text.contains(&format!("pid {}", program.pid)), "{text}");
    ensure!(a.read(FILE)? == before);
    runs_on(a, &program, &expected)
}

fn inspected(lab: &Lab) -> Result<()> {
    let a = lab.a();
    let program = started(lab, "iterative lines=150 file=/srv/work/own")?;
    dump(a, &program, FILE, "", &[])?.ok()?;
    let text = a.sh(&format!("pmig inspect {FILE}"))?;
    for word in [
        &format!("{} iterative", program.pid),
        "[stack]",
        "/srv/work/own (its content is here)",
        "bin/iterative (must be there already)",
    ] {
        ensure!(text.contains(word), "no {word:?} in {text}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&a.sh(&format!("pmig inspect {FILE} --json"))?)?;
    ensure!(json["preview"]["comm"] == "iterative", "{json}");
    Ok(())
}

/// A file with a small program in it that writes nowhere.
fn written(lab: &Lab) -> Result<(u32, Vec<u8>)> {
    let cmd = Cmd::new(["iterative", "lines=100000", "pace_us=100000"]);
    let pid = lab.a().spawn(&cmd, "/dev/null")?;
    std::thread::sleep(Duration::from_millis(300));
    let program = Program {
        pid,
        argv: cmd.argv,
        output: String::new(),
    };
    dump(lab.a(), &program, FILE, "", &[])?.ok()?;
    Ok((pid, lab.a().read(FILE)?))
}

/// Numbers that look random and are the same each time.
fn dice(state: &mut u64, below: usize) -> usize {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize % below
}

fn altered(lab: &Lab) -> Result<()> {
    let (pid, whole) = written(lab)?;
    let b = lab.b();
    let mut state = 7;
    let mut wrong: Vec<Vec<u8>> = [0, 1, 8, 10, 25, 26, 27, 74, whole.len() - 1]
        .iter()
        .map(|&length| whole[..length].to_vec())
        .collect();
    wrong.push([&whole[..], b"x"].concat());
    wrong.push(b"garbage".repeat(1000));
    for _ in 0..8 {
        let mut bytes = whole.clone();
        let at = dice(&mut state, bytes.len());
        bytes[at] ^= 1 << dice(&mut state, 8);
        wrong.push(bytes);
        wrong.push(whole[..dice(&mut state, whole.len())].to_vec());
    }
    for bytes in wrong {
        b.write(FILE, 0o600, &bytes)?;
        let said = restore(b)?;
        let text = said.err();
        ensure!(said.status == Status::Code(1), "{:?}: {text}", said.status);
        ensure!(
            text.contains(FILE) && text.contains("nothing was restored"),
            "{text}"
        );
        ensure!(b.process(pid)?.is_none(), "it runs: {text}");
        let inspected = b.exec(&Cmd::new(["pmig", "inspect", FILE]))?;
        ensure!(inspected.status == Status::Code(1), "{:?}", inspected.out());
    }
    b.write(FILE, 0o600, &whole)?;
    restore(b)?.ok()?;
    b.signal(pid, 9)
}

/// Files that are whole by their hash, and say anything: other ones each time,
/// for a minute. `PMIG_FUZZ_SEED` tries those of a run that failed again.
fn hostile(lab: &Lab) -> Result<()> {
    const FOR: Duration = Duration::from_secs(60);
    let seed = match std::env::var("PMIG_FUZZ_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => {
            u64::from(std::process::id())
                ^ u64::from(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos()) << 20
        }
    };
    let round = Cell::new(0);
    try_hostile(lab, seed, FOR, &round)
        .with_context(|| format!("PMIG_FUZZ_SEED={seed}, round {}", round.get()))
}

/// Where the messages lie, without what belongs to them: memory and files.
fn messages(body: &[u8]) -> Result<Vec<Range<usize>>> {
    const HEAD: usize = 26;
    let (mut at, mut all) = (HEAD, Vec::new());
    while at < body.len() {
        let length = u32::from_le_bytes(body[at..at + 4].try_into()?) as usize;
        let message = at + 4..at + 4 + length;
        let said: ToTarget = decode(&body[message.clone()])?;
        at = message.end + usize::try_from(said.content())?;
        all.push(message);
    }
    Ok(all)
}

fn try_hostile(lab: &Lab, seed: u64, time: Duration, round: &Cell<u32>) -> Result<()> {
    const TAIL: usize = 48;
    let (pid, whole) = written(lab)?;
    let b = lab.b();
    let mut state = seed;
    let mut restored = 0;
    let messages = messages(&whole[..whole.len() - TAIL])?;
    let start = Instant::now();
    while start.elapsed() < time {
        round.set(round.get() + 1);
        let mut bytes = whole[..whole.len() - TAIL].to_vec();
        for _ in 0..=dice(&mut state, 3) {
            let said = &messages[dice(&mut state, messages.len())];
            let at = said.start + dice(&mut state, said.len());
            match dice(&mut state, 4) {
                0 => bytes[at] = 0xff,
                1 => bytes[at] = bytes[at].wrapping_add(1),
                2 => bytes[at] ^= 1 << dice(&mut state, 8),
                _ => bytes[at] = 251 + dice(&mut state, 4) as u8,
            }
        }
        let length = (bytes.len() as u64).to_le_bytes();
        let hash = blake3::hash(&bytes);
        bytes.extend(b"PMIGEND.");
        bytes.extend(length);
        bytes.extend(hash.as_bytes());
        b.write(FILE, 0o600, &bytes)?;
        let said = restore(b)?;
        match said.status {
            Status::Code(0) => restored += 1,
            Status::Code(1 | 3) => {}
            other => bail!("{other:?}: {}", said.err()),
        }
        for process in b.ps()? {
            let ours = process.comm == "iterative" || process.pid == pid;
            if ours && said.status != Status::Code(0) && process.state != 'Z' {
                bail!("{process:?} is left: {}", said.err());
            }
            if ours {
                // It may have ended by itself: its memory makes no sense.
                let _ = b.signal(process.pid, 9);
            }
        }
        wait("its end", LIMIT, || Ok(b.process(pid)?.is_none()))?;
    }
    println!(
        "{} hostile files, {restored} of them with a program",
        round.get()
    );
    ensure!(restored < round.get(), "no change was ever noticed");
    b.write(FILE, 0o600, &whole)?;
    restore(b)?.ok()?;
    b.signal(pid, 9)
}
