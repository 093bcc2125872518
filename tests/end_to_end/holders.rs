//! What holds programs: those who look and type, and those who wait.

use super::terminals::{gone_soon, run};
use anyhow::{ensure, Context, Result};
use lab::harness::Trial;
use lab::scenario::{gone, migrate, wait, Program, LIMIT};
use lab::terminal::Terminal;
use lab::{Cmd, Lab, Make, Status};
use std::time::Duration;

type Claim = (&'static str, fn(&Lab) -> Result<()>);

const CLAIMS: &[Claim] = &[
    ("a_slow_watcher_stops_nobody", slow),
    ("several_watch_and_one_types", several),
    ("whatever_ends_at_once_says_how", at_once),
    (
        "a_holder_killed_on_the_way_leaves_the_program_where_it_is",
        holder_dies,
    ),
    ("a_terminal_outlives_pmig_serve", serve_killed),
    ("whoever_waits_learns_how_it_ended", waited_for),
    (
        "a_program_without_terminal_outlives_its_holder",
        holder_killed,
    ),
    (
        "a_restored_program_is_shown_where_there_is_a_terminal",
        restored,
    ),
    ("what_cannot_be_attached_is_said", refused),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for make in [Make::Netns, Make::Vm] {
        for (name, body) in CLAIMS {
            trials.push(Trial::new(make, format!("holders::{name}"), body));
        }
    }
    trials
}

fn several(lab: &Lab) -> Result<()> {
    let a = lab.a();
    let program = run(a, &["bash", "--norc"])?;
    let pid = program.pid.to_string();
    let mut one = Terminal::attach(a, program.pid)?;
    let mut two = Terminal::open(a, &["pmig", "attach", "--watch", &pid])?;
    let mut three = Terminal::open(a, &["pmig", "attach", "--key", "^a", &pid])?;
    // Only watches.
    two.resize(10, 40)?;
    two.types("echo nobody typed $((6*7))\n")?;
    one.types("stty size; echo seen by $((1+1))\n")?;
    let before = one.sees("seen by 2")?;
    ensure!(
        before.contains("24 80") && !before.contains("nobody"),
        "{before}"
    );
    two.sees("seen by 2")?;
    three.sees("seen by 2")?;
    three.types("echo also \x1dtyped\n\x01")?;
    three.sees("[detached")?;
    three.ends()?;
    one.sees("also")?;
    one.types("exit\n")?;
    one.sees("ended]")?;
    two.sees("ended]")?;
    two.ends()?;
    one.ends().map(drop)
}

fn slow(lab: &Lab) -> Result<()> {
    let a = lab.a();
    let program = run(a, &["bash", "--norc"])?;
    let mut one = Terminal::attach(a, program.pid)?;
    // Which of the two begins later must be known.
    one.sees("bash-")?;
    // Stopped, it reads nothing.
    let mut two = Terminal::attach(a, program.pid)?;
    one.types("echo both $((1+1))\n")?;
    one.sees("both 2")?;
    two.sees("both 2")?;
    let attached: Vec<u32> = a
        .ps()?
        .into_iter()
        .filter(|p| p.cmdline.iter().any(|word| word == "attach"))
        .map(|p| p.pid)
        .collect();
    let last = attached.iter().max().context("nobody is attached")?;
    a.signal(*last, 19)?;
    one.types("seq 1 400000 | tail -c 2500000; echo all of $((5+5))\n")?;
    one.sees("all of 10")?;
    a.signal(*last, 18)?;
    two.sees("all of 10")?;
    one.types("exit\n")?;
    one.ends()?;
    two.ends().map(drop)
}

fn serve_killed(lab: &Lab) -> Result<()> {
    let program = run(lab.a(), &["bash", "--norc"])?;
    migrate(lab.a(), lab.b(), &program, "", &[])?.ok()?;
    let mut there = Terminal::attach(lab.b(), program.pid)?;
    for process in lab.b().ps()? {
        if process.cmdline.iter().any(|word| word == "serve") {
            lab.b().signal(process.pid, 9)?;
        }
    }
    there.types("echo still $((40+2))\n")?;
    there.sees("still 42")?;
    lab::serve(lab.b(), &[])?;
    there.types("echo and $((40+3))\n")?;
    there.sees("and 43")?;
    there.types("exit\n")?;
    there.ends().map(drop)
}

fn waited_for(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let script = |n: &str| {
        format!("import time\nwhile not __import__('os').path.exists('/srv/work/go'): time.sleep(0.05)\n{n}")
    };
    for (how, code) in [
        ("exit(7)", 7),
        ("__import__('os').kill(__import__('os').getpid(), 15)", 143),
    ] {
        let pid = a.spawn(&Cmd::new(["python3", "-c", &script(how)]), "/srv/work/out")?;
        let program = Program {
            pid,
            argv: Vec::new(),
            output: String::new(),
        };
        std::thread::sleep(Duration::from_millis(500));
        // Who is not there at all, or has another parent.
        let said = a.exec(&Cmd::new(["pmig", "wait", &pid.to_string()]))?;
        ensure!(
            said.status == Status::Code(1) && said.err().contains("parent"),
            "{said:?}"
        );
        migrate(a, b, &program, "--files ship", &[])?.ok()?;
        let session = b.spawn(
            &Cmd::shell(&format!("pmig wait {pid}; echo it was $?")),
            "/srv/work/waited",
        )?;
        std::thread::sleep(Duration::from_millis(300));
        b.write("/srv/work/go", 0o644, b"")?;
        gone_soon(b, session)?;
        let said = b.sh("cat /srv/work/waited")?;
        ensure!(said == format!("it was {code}\n"), "{said:?}");
        // And whoever asks later.
        let said = b.exec(&Cmd::new(["pmig", "wait", &pid.to_string(), "--json"]))?;
        ensure!(said.status == Status::Code(code), "{said:?}");
        b.sh("rm /srv/work/go /srv/work/out")?;
        a.sh("rm -f /srv/work/out")?;
    }
    // One that leaves while it is waited for.
    let pid = a.spawn(
        &Cmd::new(["python3", "-c", &script("exit(0)")]),
        "/srv/work/out",
    )?;
    let program = Program {
        pid,
        argv: Vec::new(),
        output: String::new(),
    };
    std::thread::sleep(Duration::from_millis(500));
    migrate(a, b, &program, "--files ship", &[])?.ok()?;
    let line = format!("pmig wait {pid}; echo it was $?");
    let session = b.spawn(&Cmd::shell(&line), "/srv/work/waited")?;
    std::thread::sleep(Duration::from_millis(300));
    migrate(b, a, &program, "--files ship", &[])?.ok()?;
    gone_soon(b, session)?;
    let said = b.sh("cat /srv/work/waited")?;
    ensure!(
        said.contains("runs on a now") && said.contains("it was 1"),
        "{said:?}"
    );
    Ok(())
}

fn holder_killed(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let dies = "import ctypes; ctypes.CDLL(None).prctl(1, 9)\n";
    for (before, orphan) in [("", false), (dies, true)] {
        let code = format!("{before}import time\nwhile True: time.sleep(0.05)");
        let pid = a.spawn(&Cmd::new(["python3", "-c", &code]), "/dev/null")?;
        let program = Program {
            pid,
            argv: Vec::new(),
            output: String::new(),
        };
        std::thread::sleep(Duration::from_millis(500));
        migrate(a, b, &program, "--files ship", &[])?.ok()?;
        let parent = b.process(pid)?.context("it is not there")?.ppid;
        ensure!((parent == 1) == orphan, "its parent is {parent}");
        if !orphan {
            b.signal(parent, 9)?;
        }
        wait("it to be an orphan", LIMIT, || {
            Ok(b.process(pid)?.is_some_and(|p| p.ppid == 1))
        })?;
        // It can be moved nevertheless.
        migrate(b, a, &program, "--files ship", &[])?.ok()?;
        ensure!(a.process(pid)?.is_some_and(|p| p.state != 'Z'));
        a.signal(pid, 9)?;
        gone_soon(a, pid)?;
    }
    Ok(())
}

/// Kills the holder that waits on b for a program that is on its way.
fn holder_dies(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let code = "\
import os
x = os.urandom(300 << 20)
print('ready', flush=True)
while True: print('read', input(), flush=True)
";
    let program = run(a, &["python3", "-c", code])?;
    let mut here = Terminal::attach(a, program.pid)?;
    here.sees("ready")?;
    let moved = std::thread::scope(|scope| -> Result<_> {
        let moving = scope.spawn(|| migrate(a, b, &program, "", &[]));
        wait("a holder on b", LIMIT, || {
            let all = b.ps()?;
            let holder = all
                .iter()
                .find(|p| p.cmdline.iter().any(|word| word == "holder"));
            holder.map_or(Ok(false), |p| b.signal(p.pid, 9).map(|()| true))
        })?;
        moving.join().expect("no panic")
    })?;
    moved.failed(4, &["holder"])?;
    here.types("still here\n")?;
    here.sees("read still here")?;
    gone(b, program.pid)?;
    a.signal(program.pid, 9)
}

fn at_once(lab: &Lab) -> Result<()> {
    for _ in 0..10 {
        let words = ["pmig", "run", "--", "sh", "-c", "echo hello; exit 3"];
        let mut here = Terminal::open(lab.a(), &words)?;
        here.sees("hello")?;
        here.sees("ended with exit code 3]")?;
        ensure!(here.ends()? == Status::Code(3));
    }
    Ok(())
}

fn restored(lab: &Lab) -> Result<()> {
    let a = lab.a();
    let program = run(a, &["bash", "--norc"])?;
    let mut here = Terminal::attach(a, program.pid)?;
    here.types("n=6; echo before\n")?;
    here.sees("before\n")?;
    here.detach()?;
    a.sh(&format!("pmig dump {} -o /srv/work/x", program.pid))?;
    let mut here = Terminal::open(a, &["pmig", "restore", "/srv/work/x"])?;
    here.sees("runs, ")?;
    here.sees("before")?;
    here.types("echo $((n*7))\n")?;
    here.sees("42")?;
    here.types("exit 5\n")?;
    here.sees("ended with exit code 5]")?;
    ensure!(here.ends()? == Status::Code(5));
    let mut here = Terminal::open(a, &["pmig", "restore", "--detach", "/srv/work/x"])?;
    here.sees("runs, ")?;
    ensure!(here.ends()? == Status::Code(0));
    let mut here = Terminal::attach(a, program.pid)?;
    here.types("exit\n")?;
    here.ends().map(drop)
}

fn refused(lab: &Lab) -> Result<()> {
    let a = lab.a();
    let says = |words: &[&str], expected: &str| -> Result<()> {
        let said = a.exec(&Cmd::new(words.iter().copied()))?;
        ensure!(said.status == Status::Code(1), "{said:?}");
        ensure!(said.err().contains(expected), "{said:?}");
        Ok(())
    };
    says(&["pmig", "attach", "999999"], "is not there")?;
    says(
        &["pmig", "attach", "1"],
        "neither started by pmig run nor moved here",
    )?;
    says(&["pmig", "wait", "999999"], "is not there")?;
    says(&["pmig", "run", "--", "/nowhere/at/all"], "/nowhere/at/all")?;
    Ok(())
}
