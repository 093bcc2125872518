//! What cannot move is refused by name, and runs on untouched.

use anyhow::{ensure, Result};
use lab::harness::Trial;
use lab::scenario::{gone, migrate, migrate_to, runs_on, same, unmoved, wait, Program, LIMIT};
use lab::{Cmd, Lab, Make};
use std::time::Duration;

type Claim = (&'static str, fn(&Lab) -> Result<()>);

const REFUSED: i32 = 3;
const FAILED: i32 = 4;
const QUICK: &[&str] = &["pace_us=0"];

const CLAIMS: &[Claim] = &[
    ("a_socket_is_refused_by_name", |lab| {
        python(lab, "s = socket.socket()", &["socket"])
    }),
    ("threads_are_refused_by_name", |lab| {
        let line = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()";
        python(lab, line, &["thread"])
    }),
    ("a_child_is_refused_by_name", |lab| {
        python(lab, "os.fork() or time.sleep(60)", &["child"])
    }),
    ("a_timer_is_refused_by_name", |lab| {
        let line = "signal.setitimer(signal.ITIMER_REAL, 50)";
        python(lab, line, &["timer"])
    }),
    ("an_epoll_descriptor_is_refused_by_name", |lab| {
        python(lab, "e = select.epoll()", &["eventpoll"])
    }),
    ("shared_memory_is_refused_by_name", |lab| {
        python(lab, "m = mmap.mmap(-1, 8192)", &["shared"])
    }),
    ("what_appears_during_the_copy_is_refused_by_name", |lab| {
        // os.fork() opens a file of /proc for a moment, and that may be seen as well.
        let spawns = "os.posix_spawn('/bin/sleep', ['sleep', '60'], {})";
        appears(lab, spawns, "child")?;
        appears(lab, "signal.setitimer(signal.ITIMER_REAL, 50)", "timer")
    }),
    ("a_pipe_to_another_process_is_refused_by_name", |lab| {
        let line = "sh -c 'python3 -c \"import time; time.sleep(60)\" | sleep 60' >/dev/null 2>&1 &
            sleep 1; pgrep -f time.sleep -n";
        let pid = lab.a().sh(line)?.trim().parse()?;
        refused(lab, pid, &["pipe"])
    }),
    ("a_missing_process_is_named", |lab| {
        let program = program(19_999);
        let moved = migrate(lab.a(), lab.b(), &program, "", &[])?;
        ensure!(!moved.status.success());
        moved.failed(moved.status.code(), &["19999"])
    }),
    ("a_different_file_at_the_target_is_refused_by_name", |lab| {
        lab.b().write("/srv/work/own", 0o644, b"somebody else's")?;
        let line = "iterative lines=1000 file=/srv/work/own";
        stays(lab, line, lab.b().address().as_str(), &["/srv/work/own"])?;
        ensure!(lab.b().read("/srv/work/own")? == b"somebody else's");
        Ok(())
    }),
    ("an_unreachable_target_is_named", |lab| {
        stays(
            lab,
            "iterative lines=1000",
            "tcp://10.77.44.200",
            &["10.77.44.200"],
        )
    }),
    ("a_target_where_nobody_listens_is_named", |lab| {
        stays(lab, "iterative lines=1000", "tcp://b:9999", &["refused"])
    }),
    ("garbage_instead_of_the_protocol_is_seen", garbage),
    ("a_pid_in_use_at_the_target_is_named", pid_taken),
    ("a_pid_of_one_just_dead_is_waited_for", pid_of_a_dead_one),
    ("a_second_migration_of_one_process_is_refused", twice),
    ("who_lacks_the_privileges_is_told_so", no_privilege),
    (
        "a_full_disk_at_the_target_leaves_the_program_where_it_is",
        full_disk,
    ),
    (
        "an_interrupt_before_the_commit_leaves_the_program_where_it_is",
        interrupt,
    ),
    ("check_names_what_is_in_the_way_and_only_then_fails", check),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for make in [Make::Netns, Make::Vm] {
        for (name, body) in CLAIMS {
            trials.push(Trial::new(make, format!("refusing::{name}"), body));
        }
    }
    trials.push(Trial::new(
        Make::Vm,
        "refusing::a_target_out_of_memory_leaves_the_program_where_it_is",
        |lab| {
            // More than the machine has, that is.
            let line = "ticker resident_mb=500 ticks=20000";
            lab.b().sh("mount -t tmpfs -o size=700m tmpfs /srv/work")?;
            lab.b().sh("head -c 600m /dev/zero > /srv/work/ballast")?;
            let program = Program::start(lab.a(), line)?;
            program.wait_lines(lab.a(), 5)?;
            let moved = migrate(lab.a(), lab.b(), &program, "--files ship", &[])?;
            // Seen beforehand, or when the memory is gone.
            let code = moved.status.code();
            ensure!([REFUSED, FAILED].contains(&code), "{}", moved.said());
            moved.failed(code, &["memory"])?;
            program.wait_lines(lab.a(), 5)?;
            wait("the end of what was built on b", LIMIT, || {
                Ok(lab.b().process(program.pid)?.is_none())
            })?;
            Ok(())
        },
    ));
    trials
}

fn program(pid: u32) -> Program {
    Program {
        pid,
        argv: Vec::new(),
        output: String::new(),
    }
}

fn refused(lab: &Lab, pid: u32, words: &[&str]) -> Result<()> {
    let moved = migrate(lab.a(), lab.b(), &program(pid), "--files ship", &[])?;
    moved.failed(REFUSED, words)?;
    let process = lab.a().process(pid)?;
    ensure!(process.is_some_and(|process| "SR".contains(process.state)));
    // Some of it is found only when a husk has been built there.
    wait("the end of what was built on b", LIMIT, || {
        Ok(lab.b().process(pid)?.is_none())
    })
}

/// Runs a line of Python that gives the program something which cannot move.
fn python(lab: &Lab, line: &str, words: &[&str]) -> Result<()> {
    let pid = start_python(
        lab,
        &format!("{line}\nprint('ready', flush=True)\ntime.sleep(60)\n"),
    )?;
    says(lab, "ready")?;
    refused(lab, pid, words)
}

/// The same, but the program does it when it sees that it is being copied.
fn appears(lab: &Lab, line: &str, word: &str) -> Result<()> {
    // A page whose next write is to be noticed faults once more.
    let script = format!(
        "ballast = bytearray(os.urandom(1 << 20)) * 100\n\
         def faults():\n    \
             before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n    \
             for at in range(0, 100 << 20, 1 << 20): ballast[at] ^= 1\n    \
             return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n\
         faults()\nprint('ready', flush=True)\nwhile faults() < 25: time.sleep(0.001)\n\
         {line}\nprint('done', flush=True)\nwhile True: time.sleep(0.01)\n"
    );
    let pid = start_python(lab, &script)?;
    says(lab, "ready")?;
    let moved = migrate(lab.a(), lab.b(), &program(pid), "--files ship", &[])?;
    // Whoever tries again at once finds no place taken.
    let left = lab.b().process(pid)?;
    ensure!(left.is_none(), "b still has {left:?}");
    moved.failed(REFUSED, &[word])?;
    let phase = moved.event("phase").map(|event| &event["phase"]);
    ensure!(phase.is_some_and(|phase| phase == "freeze"), "{phase:?}");
    says(lab, "done")?;
    let process = lab.a().process(pid)?;
    ensure!(process.is_some_and(|process| "SR".contains(process.state)));
    lab.a().signal(pid, 9)
}

const PYTHON: &str = "/srv/work/python";

fn start_python(lab: &Lab, script: &str) -> Result<u32> {
    let script =
        format!("import mmap, os, resource, select, signal, socket, threading, time\n{script}");
    lab.a().spawn(&Cmd::new(["python3", "-c", &script]), PYTHON)
}

fn says(lab: &Lab, word: &str) -> Result<()> {
    wait(&format!("python to say {word}"), LIMIT, || {
        let said = lab.a().read(PYTHON)?;
        let said = String::from_utf8_lossy(&said).into_owned();
        ensure!(!said.contains("Error"), "{said}");
        Ok(said.contains(word))
    })
}

/// A migration to that address does not come about, and the program runs on.
fn stays(lab: &Lab, line: &str, address: &str, words: &[&str]) -> Result<()> {
    let quick = [QUICK, &["file=/srv/work/unmoved/own"]].concat();
    let expected = unmoved(lab.a(), line, &quick)?;
    let program = Program::start(lab.a(), line)?;
    program.wait_lines(lab.a(), 3)?;
    let moved = migrate_to(lab.a(), address, &program, "--files ship", &[])?;
    ensure!(
        [REFUSED, FAILED].contains(&moved.status.code()),
        "{moved:?}"
    );
    moved.failed(moved.status.code(), words)?;
    runs_on(lab.a(), &program, &expected)
}

fn garbage(lab: &Lab) -> Result<()> {
    let script = "import socket\ns = socket.create_server(('0.0.0.0', 7645))\n\
        print('listening', flush=True)\nc, _ = s.accept()\n\
        c.sendall(bytes(i * 89 % 251 for i in range(100000)))\nc.recv(1)\n";
    let cmd = Cmd::new(["python3", "-c", script]);
    lab.b().spawn(&cmd, "/srv/work/garbage")?;
    wait("the garbage server", LIMIT, || {
        Ok(lab.b().read("/srv/work/garbage")?.starts_with(b"listening"))
    })?;
    stays(lab, "iterative lines=1000", "tcp://b:7645", &[])
}

fn pid_taken(lab: &Lab) -> Result<()> {
    let expected = unmoved(lab.a(), "iterative lines=200", QUICK)?;
    // Others start processes and threads there too, and may keep the PID: then it
    // is tried with another program.
    for _ in 0..10 {
        let program = Program::start(lab.a(), "iterative lines=200")?;
        let line = format!(
            "echo {} > /proc/sys/kernel/ns_last_pid; sleep 30 >/dev/null 2>&1 & p=$!
             echo 20500 > /proc/sys/kernel/ns_last_pid; [ $p = {pid} ] || kill $p; echo $p",
            program.pid - 1,
            pid = program.pid,
        );
        let taken = lab.b().sh(&line)?;
        if taken.trim() != program.pid.to_string() {
            lab.a().signal(program.pid, 9)?;
            continue;
        }
        let moved = migrate(lab.a(), lab.b(), &program, "--files ship", &[])?;
        ensure!(
            [REFUSED, FAILED].contains(&moved.status.code()),
            "{moved:?}"
        );
        moved.failed(moved.status.code(), &[&program.pid.to_string()])?;
        lab.b().signal(program.pid, 9)?;
        return runs_on(lab.a(), &program, &expected);
    }
    anyhow::bail!("no PID of a program of a's could be taken on b")
}

/// Its parent lets it wait, the first time too long.
fn pid_of_a_dead_one(lab: &Lab) -> Result<()> {
    let expected = unmoved(lab.a(), "iterative lines=400", QUICK)?;
    let program = Program::start(lab.a(), "iterative lines=400")?;
    let dead = |seconds: f64| {
        let script = format!(
            "import os, time\n\
             last = '/proc/sys/kernel/ns_last_pid'\n\
             for n in range(50):\n    \
                 open(last, 'w').write('{}')\n    \
                 pid = os.fork()\n    \
                 if pid == 0: os._exit(0)\n    \
                 if pid == {}: break\n    \
                 os.waitpid(pid, 0)\n\
             open(last, 'w').write('20500')\n\
             print(pid, flush=True)\n\
             time.sleep({seconds})\n\
             os.waitpid(pid, 0)\n\
             time.sleep(60)\n",
            program.pid - 1,
            program.pid
        );
        let parent = lab
            .b()
            .spawn(&Cmd::new(["python3", "-c", &script]), PYTHON)?;
        wait("somebody to die on b", LIMIT, || {
            let said = lab.b().read(PYTHON)?;
            Ok(said.trim_ascii() == program.pid.to_string().as_bytes())
        })?;
        Ok::<u32, anyhow::Error>(parent)
    };
    let parent = dead(60.0)?;
    let moved = migrate(lab.a(), lab.b(), &program, "--files ship", &[])?;
    moved.failed(REFUSED, &["a dead process"])?;
    lab.b().signal(parent, 9)?;
    dead(0.5)?;
    migrate(lab.a(), lab.b(), &program, "--files ship", &[])?.ok()?;
    same(&program.finish(lab.b())?, &expected)
}

fn twice(lab: &Lab) -> Result<()> {
    let program = Program::start(lab.a(), "ticker resident_mb=200 ticks=3000")?;
    program.wait_lines(lab.a(), 5)?;
    let all = std::thread::scope(|scope| {
        let threads = [0, 1]
            .map(|_| scope.spawn(|| migrate(lab.a(), lab.b(), &program, "--files ship", &[])));
        threads.map(|thread| thread.join().expect("no panic"))
    });
    let [one, other] = all;
    let (one, other) = (one?, other?);
    let went = [&one, &other].iter().filter(|m| m.status.success()).count();
    ensure!(went == 1, "{went} went: {} / {}", one.said(), other.said());
    gone(lab.a(), program.pid)?;
    program.finish(lab.b()).map(drop)
}

fn no_privilege(lab: &Lab) -> Result<()> {
    let expected = unmoved(lab.a(), "iterative lines=150", QUICK)?;
    let program = Program::start(lab.a(), "iterative lines=150")?;
    let line = format!(
        "PMIG_STATE_DIR=/tmp/s PMIG_RUN_DIR=/tmp/r setpriv --reuid 1000 --regid 1000 \
         --clear-groups pmig migrate {} tcp://b --insecure 2>&1",
        program.pid
    );
    let output = lab.a().exec(&Cmd::shell(&line))?;
    ensure!(!output.status.success());
    let said = output.out().to_lowercase();
    let told = ["privilege", "permi", "root", "cap_"];
    ensure!(told.iter().any(|word| said.contains(word)), "{said}");
    runs_on(lab.a(), &program, &expected)
}

fn full_disk(lab: &Lab) -> Result<()> {
    lab.b().sh("mount -t tmpfs -o size=64k tmpfs /srv/work")?;
    let line = "iterative lines=200 file=/srv/work/own";
    let quick = ["pace_us=0", "file=/srv/work/unmoved/own"];
    let expected = unmoved(lab.a(), line, &quick)?;
    let program = Program::start(lab.a(), line)?;
    lab.a()
        .sh("head -c 1000000 /dev/urandom >> /srv/work/own")?;
    program.wait_lines(lab.a(), 3)?;
    let moved = migrate(lab.a(), lab.b(), &program, "--files ship", &[])?;
    // Seen beforehand where it can be, when the disk is full where not.
    ensure!(
        [REFUSED, FAILED].contains(&moved.status.code()),
        "{moved:?}"
    );
    moved.failed(moved.status.code(), &["/srv/work"])?;
    runs_on(lab.a(), &program, &expected)
}

fn interrupt(lab: &Lab) -> Result<()> {
    let line = "iterative heap_kb=400000 lines=300";
    let expected = unmoved(lab.a(), line, QUICK)?;
    let program = Program::start(lab.a(), line)?;
    program.wait_lines(lab.a(), 3)?;
    let moved = std::thread::scope(|scope| -> Result<_> {
        let moving = scope.spawn(|| migrate(lab.a(), lab.b(), &program, "--files ship", &[]));
        std::thread::sleep(Duration::from_millis(150));
        for process in lab.a().ps()? {
            let words = process.cmdline.iter().map(String::as_str);
            if words.take(2).eq(["pmig", "migrate"]) {
                lab.a().signal(process.pid, libc::SIGINT)?;
            }
        }
        moving.join().expect("no panic")
    })?;
    if moved.status.success() {
        // It was quicker than the interrupt.
        return runs_on(lab.b(), &program, &expected);
    }
    // The source does not wait for the target's tidying up.
    wait("the end of what was built on b", LIMIT, || {
        Ok(lab.b().process(program.pid)?.is_none())
    })?;
    runs_on(lab.a(), &program, &expected)
}

fn check(lab: &Lab) -> Result<()> {
    let program = Program::start(lab.a(), "iterative lines=300")?;
    program.wait_lines(lab.a(), 3)?;
    let check = |more: &str| {
        let line = format!("pmig check {} tcp://b --insecure {more}", program.pid);
        lab.a().exec(&Cmd::shell(&line))
    };
    check("--files ship")?.ok()?;
    let output = check("--files check")?;
    ensure!(!output.status.success());
    let said = output.out() + &output.err();
    ensure!(said.contains(&program.output), "{said}");
    let json = check("--files check --json")?;
    serde_json::from_slice::<serde_json::Value>(&json.stdout)?;
    lab.a().sh("pmig check")?;
    program.finish(lab.a()).map(drop)
}
