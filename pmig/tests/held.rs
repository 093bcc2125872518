//! What becomes of a held program when pmig, its keeper or the target dies or
//! stalls, with real processes, cgroups, keepers and a real `pmig serve`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pmig::hold::{Frozen, Hold, Place, PATIENCE};
use pmig::id::{Id, Secret};
use pmig::journal::{Armed, Fate, Husk, New};
use pmig::keeper::Keeper;
use pmig::phase::Phase;

const PMIG: &str = env!("CARGO_BIN_EXE_pmig");

/// A child that goes when the test does.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Guard {
    fn sleeper() -> Guard {
        let sleep = Command::new("sleep").arg("1000").spawn().unwrap();
        Guard(sleep)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    fn cgroup(&self) -> String {
        fs::read_to_string(format!("/proc/{}/cgroup", self.pid())).unwrap()
    }
}

/// Two machines' worth of records, in one directory.
struct World {
    dir: tempfile::TempDir,
    id: String,
    secret: String,
}

impl World {
    fn new() -> Option<World> {
        if !nix::unistd::geteuid().is_root() || pmig::hold::probe().is_err() {
            eprintln!("SKIPPED: no cgroup v2 that may be written");
            return None;
        }
        Some(World {
            dir: tempfile::tempdir().unwrap(),
            id: Id::random().unwrap().to_string(),
            secret: Secret::random().unwrap().into(),
        })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    fn command(&self, exe: &Path, side: &str) -> Command {
        let mut command = Command::new(exe);
        command
            .env("PMIG_STATE_DIR", self.dir.path().join(side).join("state"))
            .env("PMIG_RUN_DIR", self.dir.path().join(side).join("run"))
            .env("PMIG_PATIENCE_MS", "400");
        command
    }

    /// Runs [`actor`] in a process of its own, until it has done its part.
    fn act(&self, side: &str, process: &Guard, how: &str) -> Guard {
        let mut command = self.command(&std::env::current_exe().unwrap(), side);
        command
            .args(["--exact", "actor", "--ignored", "--nocapture"])
            .env("ACT", format!("{side} {how}"))
            .env("ACT_PID", process.pid().to_string())
            .env("ACT_ID", &self.id)
            .env("ACT_SECRET", &self.secret)
            .env("ACT_ADDR", format!("unix:{}", self.socket().display()))
            .stdout(Stdio::piped());
        let mut actor = Guard(command.spawn().unwrap());
        let mut lines = BufReader::new(actor.0.stdout.take().unwrap()).lines();
        assert!(
            lines.any(|l| l.unwrap().contains("played")),
            "the actor failed"
        );
        std::thread::spawn(move || lines.for_each(drop));
        actor
    }

    fn serve(&self) -> Guard {
        let mut command = self.command(Path::new(PMIG), "target");
        command.args(["serve", "--listen"]);
        command.arg(format!("unix:{}", self.socket().display()));
        let serve = Guard(command.spawn().unwrap());
        eventually("serve listens", || self.socket().exists());
        serve
    }

    /// The exit code and output of a pmig command.
    fn pmig(&self, side: &str, args: &[&str]) -> (i32, String) {
        let out = self
            .command(Path::new(PMIG), side)
            .args(args)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        (out.status.code().unwrap(), text.into_owned())
    }

    /// Somebody clears the directory for what need not outlive a boot.
    fn lose_run(&self, side: &str) {
        fs::remove_dir_all(self.dir.path().join(side).join("run")).unwrap();
    }

    fn record(&self, side: &str, name: &str) -> Option<String> {
        let dir = self.dir.path().join(side).join("state").join(side);
        fs::read_to_string(dir.join(&self.id).join(name)).ok()
    }

    fn settled(&self, side: &str) -> bool {
        self.record(side, "settled").is_some()
    }
}

/// Whether nothing is left of a killed process but an entry that its parent may read.
fn is_dead(pid: nix::unistd::Pid) -> bool {
    let state = |stat: String| stat.rsplit(") ").next().map(|rest| rest.starts_with('Z'));
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| state(stat) == Some(true))
}

fn eventually(what: &str, is: impl Fn() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether its cgroup holds it.
fn frozen(process: &Guard) -> bool {
    let cgroup = process.cgroup();
    let path = cgroup.trim().rsplit("::").next().unwrap();
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mut mounts = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = mounts.find(|words| words[2] == "cgroup2").unwrap()[1].to_owned();
    let events = fs::read_to_string(format!("{mount}{path}/cgroup.events"));
    events.is_ok_and(|text| text.contains("frozen 1"))
}

/// Not a test: pmig's part in the others, in a process that may die for it.
#[test]
#[ignore = "played by the other tests"]
fn actor() {
    let var = |name: &str| std::env::var(name).unwrap();
    let act = var("ACT");
    let id: Id = var("ACT_ID").parse().unwrap();
    let pid: i32 = var("ACT_PID").parse().unwrap();
    let new = |place: &Place| New {
        id,
        secret: Secret::try_from(var("ACT_SECRET")).unwrap(),
        pid,
        comm: "sleep".into(),
        peer: "the other".into(),
        addr: var("ACT_ADDR").parse().ok(),
        place: place.clone(),
    };
    if act.starts_with("source") {
        let hold = Hold::beside(pid, id).unwrap();
        let armed = Armed::arm(new(hold.place())).unwrap();
        let mut keeper = Keeper::start_from(Path::new(PMIG), &armed).unwrap();
        hold.take(pid).unwrap();
        keeper.enter(Phase::Freeze).unwrap();
        keeper.stopped().unwrap();
        let held = hold.freeze(PATIENCE).unwrap();
        if act.contains("commit") {
            armed.commit().unwrap();
        }
        println!("played");
        if act.contains("moved") {
            armed.commit().unwrap().release(held).unwrap();
            keeper.done();
            return;
        }
        std::thread::sleep(Duration::from_secs(1000));
    } else {
        let hold = Hold::husk(id).unwrap();
        hold.take(pid).unwrap();
        let husk = Husk::arm(new(hold.place())).unwrap();
        let held = hold.freeze(PATIENCE).unwrap();
        if act.contains("commit") {
            let Fate::Committed(committed) = husk.commit_by_hand().unwrap() else {
                panic!("nobody aborted it")
            };
            if act.contains("run") {
                committed.let_live(committed.thaw(held).unwrap());
                committed.keep().unwrap();
                println!("played");
                return;
            }
        }
        drop::<Frozen>(held);
        println!("played");
    }
}

#[test]
fn when_pmig_dies_before_the_commit_the_program_runs_on_in_its_own_cgroup() {
    let Some(world) = World::new() else { return };
    let mut program = Guard::sleeper();
    let home = program.cgroup();
    let pmig = world.act("source", &program, "");
    assert!(frozen(&program));
    drop(pmig);
    eventually("it goes home", || program.cgroup() == home);
    eventually("settled", || world.settled("source"));
    assert!(program.runs());
    let fate = world.record("source", "fate").unwrap();
    assert!(
        fate.contains("ABORTED") && fate.contains("freeze"),
        "{fate}"
    );
}

#[test]
fn when_pmig_stalls_its_keeper_ends_it() {
    let Some(world) = World::new() else { return };
    let mut program = Guard::sleeper();
    let home = program.cgroup();
    let mut pmig = world.act("source", &program, "");
    assert!(!pmig.0.wait().unwrap().success());
    eventually("it goes home", || program.cgroup() == home);
    assert!(program.runs());
}

#[test]
fn after_the_commit_the_target_is_asked_and_what_moved_is_gone_here() {
    let Some(world) = World::new() else { return };
    let (mut here, mut there) = (Guard::sleeper(), Guard::sleeper());
    let _serve = world.serve();
    drop(world.act("target", &there, "commit"));
    drop(world.act("source", &here, "commit"));
    eventually("settled", || world.settled("source"));
    assert!(!here.runs(), "two running");
    eventually("settled there", || world.settled("target"));
    assert!(there.runs());
}

#[test]
fn after_the_commit_an_undecided_husk_is_ended_before_the_program_goes_on() {
    let Some(world) = World::new() else { return };
    let (mut here, mut there) = (Guard::sleeper(), Guard::sleeper());
    let _serve = world.serve();
    drop(world.act("target", &there, ""));
    assert!(frozen(&there));
    let (code, text) = world.pmig("target", &["resolve"]);
    assert_eq!(code, 5, "{text}");
    assert!(text.contains("is held here, frozen"), "{text}");
    assert!(there.runs(), "looking changes nothing");
    drop(world.act("source", &here, "commit"));
    eventually("settled", || world.settled("source"));
    assert!(here.runs());
    assert!(!there.runs(), "the husk must be dead by then");
    assert!(world.record("target", "fate").unwrap().contains("ABORTED"));
    assert!(world
        .record("source", "verdict")
        .unwrap()
        .contains("RUNS_HERE"));
}

#[test]
fn a_target_that_knows_nothing_leaves_it_to_a_person() {
    let Some(world) = World::new() else { return };
    let mut program = Guard::sleeper();
    let home = program.cgroup();
    let _serve = world.serve();
    drop(world.act("source", &program, "commit"));
    // The keeper is told "unknown", and ends.
    let keeper_ended = || world.pmig("source", &["resolve", &world.id]).0 == 5;
    eventually("it is left to a person", keeper_ended);
    assert!(program.runs() && frozen(&program));
    let (_, text) = world.pmig("source", &["resolve"]);
    assert!(
        text.contains("--run-here") && text.contains("no record"),
        "{text}"
    );
    let (code, text) = world.pmig("source", &["check", &program.pid().to_string()]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("holds it already"), "{text}");

    let (code, text) = world.pmig("source", &["resolve", &world.id, "--run-here"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("runs on here"), "{text}");
    assert_eq!(program.cgroup(), home);
    assert!(program.runs());
    let (code, text) = world.pmig("source", &["resolve"]);
    assert_eq!((code, text.trim()), (0, "nothing is held on this machine"));
}

#[test]
fn when_the_keeper_dies_too_the_next_command_thaws() {
    let Some(world) = World::new() else { return };
    let mut program = Guard::sleeper();
    let home = program.cgroup();
    let mut pmig = world.act("source", &program, "");
    for keeper in keepers(pmig.pid()) {
        nix::sys::signal::kill(keeper, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    pmig.0.kill().unwrap();
    pmig.0.wait().unwrap();
    std::thread::sleep(Duration::from_millis(600));
    assert!(frozen(&program), "nobody is left to thaw it");
    world.pmig("source", &["check"]);
    assert_eq!(program.cgroup(), home);
    assert!(program.runs() && world.settled("source"));
}

#[test]
fn a_husk_whose_source_is_gone_waits_for_a_person() {
    let Some(world) = World::new() else { return };
    let mut there = Guard::sleeper();
    drop(world.act("target", &there, ""));
    let serve = world.serve();
    drop(serve);
    assert!(
        there.runs() && frozen(&there),
        "a restart of serve changes nothing"
    );
    let (code, text) = world.pmig("target", &["resolve", &world.id, "--drop"]);
    assert_eq!(code, 0, "{text}");
    assert!(!there.runs());
}

#[test]
fn a_lost_decision_does_not_keep_the_program_stopped_when_pmig_dies() {
    for keeper_lives in [true, false] {
        let Some(world) = World::new() else { return };
        let (mut here, mut there) = (Guard::sleeper(), Guard::sleeper());
        let home = here.cgroup();
        let _serve = world.serve();
        drop(world.act("target", &there, ""));
        let pmig = world.act("source", &here, "");
        world.lose_run("source");
        let mut killed = Vec::new();
        if !keeper_lives {
            for keeper in keepers(pmig.pid()) {
                nix::sys::signal::kill(keeper, nix::sys::signal::Signal::SIGKILL).unwrap();
                killed.push(keeper);
            }
        }
        drop(pmig);
        if !keeper_lives {
            // Until then they hold what the next command wants.
            eventually("dead", || killed.iter().all(|keeper| is_dead(*keeper)));
            world.pmig("source", &["check"]);
        }
        eventually("settled", || world.settled("source"));
        assert!(!there.runs(), "the husk must be dead by then");
        assert!(here.runs());
        assert_eq!(here.cgroup(), home);
    }
}

#[test]
fn a_lost_decision_is_taken_for_the_order_where_it_was_given() {
    let Some(world) = World::new() else { return };
    let (mut here, mut there) = (Guard::sleeper(), Guard::sleeper());
    let _serve = world.serve();
    drop(world.act("target", &there, "commit"));
    let pmig = world.act("source", &here, "commit");
    world.lose_run("source");
    drop(pmig);
    eventually("settled", || world.settled("source"));
    assert!(!here.runs(), "two running");
    assert!(there.runs() && !frozen(&there));
}

#[test]
fn a_decision_lost_while_pmig_stalls_does_not_stop_its_keeper() {
    let Some(world) = World::new() else { return };
    let (mut here, there) = (Guard::sleeper(), Guard::sleeper());
    let home = here.cgroup();
    let _serve = world.serve();
    drop(world.act("target", &there, ""));
    let mut pmig = world.act("source", &here, "");
    world.lose_run("source");
    assert!(!pmig.0.wait().unwrap().success());
    eventually("it goes home", || here.cgroup() == home);
    assert!(here.runs());
}

#[test]
fn what_came_here_is_left_alone_when_its_decision_is_lost() {
    let Some(world) = World::new() else { return };
    let mut there = Guard::sleeper();
    let _serve = world.serve();
    drop(world.act("target", &there, "commit run"));
    world.lose_run("target");
    let (_, text) = world.pmig("target", &["resolve", &world.id]);
    assert!(text.contains("was committed here"), "{text}");
    for what in ["--drop", "--run-here"] {
        let (_, text) = world.pmig("target", &["resolve", &world.id, what]);
        assert!(there.runs() && !frozen(&there), "{text}");
    }
    let (_, text) = world.pmig("target", &["ps", "--json"]);
    assert!(text.contains("\"here\""), "{text}");
}

#[test]
fn a_decision_lost_at_the_target_leaves_both_copies_to_a_person() {
    for runs in [true, false] {
        let Some(world) = World::new() else { return };
        let (mut here, mut there) = (Guard::sleeper(), Guard::sleeper());
        let _serve = world.serve();
        drop(world.act("target", &there, "commit"));
        world.lose_run("target");
        drop(world.act("source", &here, "commit"));
        let held = || world.pmig("source", &["resolve", &world.id]);
        eventually("it is left to a person", || held().0 == 5);
        let (_, text) = held();
        assert!(
            text.contains("lost") && text.contains("--run-here"),
            "{text}"
        );
        let (code, text) = world.pmig("target", &["resolve"]);
        assert_eq!(code, 5, "{text}");
        assert!(
            text.contains("held here, frozen: what was decided"),
            "{text}"
        );
        let (code, text) = world.pmig("target", &["resolve", &world.id]);
        assert_eq!(code, 5, "{text}");
        assert!(text.contains("--drop") && text.contains("fates"), "{text}");
        assert!(here.runs() && there.runs() && frozen(&here) && frozen(&there));

        let what = if runs { "--run-here" } else { "--drop" };
        let (code, text) = world.pmig("target", &["resolve", &world.id, what]);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("because you said so"), "{text}");
        assert_eq!(there.runs(), runs);
        assert!(!runs || !frozen(&there));
        // What the person said is the target's word from now on.
        let (code, text) = held();
        assert_eq!(code, 0, "{text}");
        assert_eq!(here.runs(), !runs, "{text}");
        assert!(runs || !frozen(&here));
        assert!(world.settled("source") && world.settled("target"));
    }
}

#[test]
fn of_a_copy_that_is_gone_with_its_decision_nothing_is_said() {
    let Some(world) = World::new() else { return };
    let (mut here, there) = (Guard::sleeper(), Guard::sleeper());
    let _serve = world.serve();
    drop(world.act("target", &there, ""));
    world.lose_run("target");
    drop(there);
    world.pmig("target", &["check"]);
    assert!(world.settled("target"), "nothing is left to be decided");
    for _ in 0..2 {
        let (code, text) = world.pmig("target", &["resolve", &world.id]);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("is not known"), "{text}");
    }
    drop(world.act("source", &here, "commit"));
    let held = || world.pmig("source", &["resolve", &world.id]);
    eventually("it is left to a person", || held().0 == 5);
    assert!(here.runs() && frozen(&here), "it may have run there");
    let (_, text) = world.pmig("target", &["ps", "--json"]);
    assert!(text.contains("unknown"), "{text}");
    let (code, text) = world.pmig("source", &["resolve", &world.id, "--run-here"]);
    assert_eq!(code, 0, "{text}");
}

#[test]
fn where_no_file_can_be_made_any_more_the_program_goes_on_all_the_same() {
    let Some(world) = World::new() else { return };
    let mut program = Guard::sleeper();
    let home = program.cgroup();
    let run = world.dir.path().join("source/run");
    fs::create_dir_all(&run).unwrap();
    let mount = |args: &[&str]| Command::new("mount").args(args).arg(&run).status();
    let few = ["-t", "tmpfs", "-o", "nr_inodes=40,mode=700", "tmpfs"];
    assert!(mount(&few).unwrap().success());
    let _mounted = Mounted(run.clone());
    let pmig = world.act("source", &program, "");
    let full = (0..).map(|n| fs::File::create(run.join(format!("fill{n}"))));
    let why = full.take(50).find_map(Result::err).unwrap();
    assert_eq!(why.raw_os_error(), Some(nix::libc::ENOSPC));
    drop(pmig);
    eventually("it goes home", || program.cgroup() == home);
    eventually("settled", || world.settled("source"));
    assert!(program.runs());
    assert!(world.record("source", "fate").unwrap().contains("ABORTED"));
}

/// Goes when the test does.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn when_all_goes_well_the_copy_and_the_keeper_are_gone() {
    let Some(world) = World::new() else { return };
    let mut program = Guard::sleeper();
    let mut pmig = world.act("source", &program, "moved");
    assert!(pmig.0.wait().unwrap().success());
    assert!(!program.runs());
    assert!(world.settled("source"));
    let run = world.dir.path().join("source/run");
    eventually("a clean end leaves no log", || {
        let mut left = fs::read_dir(&run).unwrap().flatten();
        left.all(|entry| entry.file_name() == "fates")
    });
}

/// The children of a process.
fn keepers(pid: i32) -> Vec<nix::unistd::Pid> {
    let path = format!("/proc/{pid}/task");
    let mut all = Vec::new();
    for task in fs::read_dir(path).unwrap().flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap();
        let pids = children.split_whitespace().map(|p| p.parse().unwrap());
        all.extend(pids.map(nix::unistd::Pid::from_raw));
    }
    assert!(!all.is_empty());
    all
}
