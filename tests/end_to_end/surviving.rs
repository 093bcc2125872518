//! What goes down after the program has come to the target: its machine, or
//! only pmig.

use anyhow::{ensure, Result};
use lab::harness::Trial;
use lab::scenario::{dump, gone, migrate, same, unmoved, wait, Program, LIMIT};
use lab::{serve, Cmd, Lab, Make};
use std::time::Duration;

pub fn trials() -> Vec<Trial> {
    let names = [
        (
            "ready:stall:target",
            "a_reboot_of_the_target_after_ready_brings_the_program_back",
        ),
        (
            "commit:stall:target",
            "a_reboot_of_the_target_after_commit_leaves_it_to_a_person",
        ),
    ];
    let trial = |(fault, name): (&'static str, &str)| {
        let name = format!("surviving::{name}");
        Trial::new(Make::Vm, name, move |lab| reboot(lab, fault)).bare()
    };
    let mut trials: Vec<Trial> = names.map(trial).into();
    for make in [Make::Netns, Make::Vm] {
        let name = "surviving::records_without_room_let_it_run_on";
        trials.push(Trial::new(make, name, no_room));
        let name = "surviving::a_restore_killed_with_its_session_leaves_nothing_but_the_file";
        trials.push(Trial::new(make, name, restore_killed).bare());
        let name = "surviving::what_a_killed_target_left_of_a_replaced_file_is_cleared_away";
        trials.push(Trial::new(make, name, replaced).bare());
    }
    trials
}

/// Somebody fills the disk of the records while the program stands still, and
/// then pmig falls silent.
fn no_room(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let expected = unmoved(a, "iterative lines=150", &["pace_us=0"])?;
    let program = Program::start(a, "iterative lines=150")?;
    program.wait_lines(a, 5)?;
    a.sh("for d in /var/lib/pmig /run/pmig; do
              mkdir -p $d && mount -t tmpfs -o size=256k,mode=700 tmpfs $d
          done")?;
    let env = [
        ("PMIG_FAULT", "freeze:stall:source"),
        ("PMIG_PATIENCE_MS", "5000"),
    ];
    std::thread::scope(|scope| -> Result<()> {
        let moving = scope.spawn(|| migrate(a, b, &program, "--files ship", &env));
        wait("the migration to be armed", LIMIT, || {
            Ok(a.sh("ls /var/lib/pmig/source/*/record").is_ok())
        })?;
        // It ends when there is no room.
        a.sh(
            "for d in /var/lib/pmig /run/pmig; do cat /dev/zero > $d/fill; done 2>/dev/null; true",
        )?;
        moving.join().expect("no panic")?;
        Ok(())
    })?;
    program.wait_lines(a, 3)?;
    a.sh("umount -l /var/lib/pmig /run/pmig")?;
    same(&program.finish(a)?, &expected)
}

fn restore_killed(lab: &Lab) -> Result<()> {
    let a = lab.a();
    let expected = unmoved(a, "iterative lines=150", &["pace_us=0"])?;
    let program = Program::start(a, "iterative lines=150")?;
    program.wait_lines(a, 5)?;
    dump(a, &program, "/srv/work/x", "", &[])?.ok()?;
    let cmd =
        Cmd::new(["pmig", "restore", "/srv/work/x"]).env("PMIG_FAULT", "ready:stall:target:2");
    let restore = a.spawn(&cmd, "/tmp/restore")?;
    wait("a husk that is ready", LIMIT, || {
        Ok(
            a.sh("grep -l 1 $(find /sys/fs/cgroup -name cgroup.freeze -path '*-target*')")
                .is_ok(),
        )
    })?;
    a.signal(restore, 9)?;
    for process in a.ps()? {
        if process.cmdline.iter().any(|word| word == "session") {
            a.signal(process.pid, 9)?;
        }
    }
    wait("the husk to be cleared away", LIMIT, || {
        a.sh("pmig ps")?;
        Ok(a.process(program.pid)?.is_none())
    })?;
    ensure!(
        a.sh("pmig resolve")?.contains("nothing"),
        "something is left"
    );
    a.sh("pmig restore /srv/work/x")?;
    same(&program.finish(a)?, &expected)
}

/// On its way back a program's file replaces what it left behind; the target is
/// killed when the program runs and what was replaced still has a name.
fn replaced(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    serve(a, &[("PMIG_FAULT", "release:kill:target")])?;
    serve(b, &[])?;
    let line = "iterative lines=150 file=/srv/work/own";
    let quick = ["pace_us=0", "file=/srv/work/unmoved/own"];
    let expected = unmoved(b, line, &quick)?;
    let program = Program::start(a, line)?;
    program.wait_lines(a, 5)?;
    migrate(a, b, &program, "--files ship", &[])?.ok()?;
    program.wait_lines(b, 5)?;
    migrate(b, a, &program, "--files ship", &[])?;
    program.wait_lines(a, 5)?;
    a.sh("pmig resolve")?;
    let names = a.sh("ls -A /srv/work")?;
    ensure!(!names.contains(".pmig"), "{names}");
    same(&program.finish(a)?, &expected)?;
    gone(b, program.pid)
}

/// Stalls the target at a phase, cuts its power, and looks for the program.
fn reboot(lab: &Lab, fault: &'static str) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    serve(a, &[])?;
    serve(b, &[("PMIG_FAULT", fault)])?;
    let expected = unmoved(b, "recursive lines=400 depth=20000", &["pace_us=0"])?;
    let program = Program::start(a, "recursive lines=400 depth=20000")?;
    program.wait_lines(a, 5)?;
    let moved = std::thread::scope(|scope| -> Result<_> {
        let moving = scope.spawn(|| migrate(a, b, &program, "--files ship", &[]));
        std::thread::sleep(Duration::from_secs(3));
        b.restart()?;
        serve(b, &[])?;
        moving.join().expect("no panic")
    })?;
    ensure!(b.process(program.pid)?.is_none(), "it outlived a reboot");
    // Whatever the records say, the source has the program whole. Where they
    // cannot know whether it ran at the target, a person decides.
    let held = a.exec(&Cmd::shell("timeout 60 pmig resolve --json 2>&1"))?;
    let mut runs = false;
    let _ = wait("the program on a", Duration::from_secs(5), || {
        let before = program.written(a)?.len();
        std::thread::sleep(Duration::from_millis(200));
        runs = program.written(a)?.len() > before;
        Ok(runs)
    });
    if !runs {
        ensure!(
            a.process(program.pid)?.is_some(),
            "lost: {} {}",
            moved.said(),
            held.out()
        );
        let id = moved.event("facts").map(|facts| facts["id"].clone());
        let id = id.and_then(|id| id.as_str().map(str::to_owned));
        let id = id.unwrap_or_default();
        a.sh(&format!("pmig resolve {id} --run-here"))?;
    }
    wait("the program's end", LIMIT, || {
        Ok(program.written(a)?.contains("PASS"))
    })?;
    same(&program.written(a)?, &expected)
}
