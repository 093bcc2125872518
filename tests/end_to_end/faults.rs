//! Every phase, broken in every way at every place: the program's output is
//! whole every time, in exactly one place, and what pmig says is true.

use anyhow::{bail, ensure, Context, Result};
use lab::harness::Trial;
use lab::scenario::{migrate, same, unmoved, wait, Program, LIMIT};
use lab::{serve, Cmd, Host, Lab, Make, Status};
use pmig::phase::Phase;
use std::time::Duration;

const KINDS: [&str; 3] = ["kill", "cut", "stall"];
const ROLES: [&str; 3] = ["source", "target", "keeper"];
/// How long pmig may take to see that the other side says nothing any more.
const STALLED: Duration = Duration::from_secs(45);

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for make in [Make::Netns, Make::Vm] {
        for phase in Phase::ALL {
            // Before the freeze the two makes differ in nothing that counts.
            if make == Make::Vm && phase < Phase::Freeze {
                continue;
            }
            for kind in KINDS {
                for role in ROLES {
                    let fault = format!("{phase}:{kind}:{role}");
                    let name = format!("faults::{phase}_{kind}_{role}");
                    let trial = Trial::new(make, name, move |lab| with_fault(lab, &fault));
                    trials.push(trial.bare());
                }
            }
        }
    }
    trials
}

/// True if the program gets on there: its file grows.
fn gets_on(host: &dyn Host, program: &Program) -> Result<bool> {
    let Some(process) = host.process(program.pid)? else {
        return Ok(false);
    };
    if process.state == 'Z' {
        return Ok(false);
    }
    let before = program.written(host).unwrap_or_default().len();
    std::thread::sleep(Duration::from_millis(150));
    let after = program.written(host).unwrap_or_default();
    Ok(after.len() > before || after.contains("PASS"))
}

fn with_fault(lab: &Lab, fault: &str) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let env = [("PMIG_FAULT", fault)];
    serve(a, &[])?;
    let server = serve(b, &env)?;
    let expected = unmoved(b, "recursive lines=500 depth=20000", &["pace_us=0"])?;
    let program = Program::start(a, "recursive lines=500 depth=20000")?;
    program.wait_lines(a, 5)?;
    let said = move_with_fault(lab, &program, &env)?;
    let there = true_message(lab, &program, &said)?;
    // Whoever is left over must find a way out without the fault.
    if !there {
        let _ = b.signal(server, 9);
        kill_pmig(a)?;
        kill_pmig(b)?;
        serve(a, &[]).context("serve on a again")?;
        serve(b, &[]).context("serve on b again")?;
        wait("one running copy", LIMIT, || {
            let on = (gets_on(a, &program)?, gets_on(b, &program)?);
            ensure!(on != (true, true), "it runs twice");
            if on != (false, false) || finished(lab, &program)?.is_some() {
                return Ok(true);
            }
            for host in [a, b] {
                host.exec(&Cmd::shell("timeout 60 pmig resolve 2>&1"))?;
            }
            Ok(false)
        })?;
    }
    whole_in_one_place(lab, &program, &expected)
}

/// Ends every pmig of a host, as a person would who finds one stuck.
fn kill_pmig(host: &dyn Host) -> Result<()> {
    for process in host.ps()? {
        let first = process.cmdline.first().map(String::as_str);
        if first.is_some_and(|name| name.ends_with("pmig")) {
            let _ = host.signal(process.pid, 9);
        }
    }
    Ok(())
}

/// Migrates, and kills a pmig that the fault has made stall; none is given if
/// it had to be.
fn move_with_fault(
    lab: &Lab,
    program: &Program,
    env: &[(&str, &str)],
) -> Result<Option<lab::scenario::Moved>> {
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| migrate(lab.a(), lab.b(), program, "--files ship", env));
        let deadline = std::time::Instant::now() + STALLED;
        let mut killed = false;
        while !moving.is_finished() {
            std::thread::sleep(Duration::from_millis(30));
            if std::time::Instant::now() > deadline && !killed {
                kill_pmig(lab.a())?;
                killed = true;
            }
        }
        let moved = moving.join().expect("no panic")?;
        let by_signal = matches!(moved.status, Status::Signal(_) | Status::Code(137));
        Ok((!killed && !by_signal).then_some(moved))
    })
}

/// Compares what pmig said with what is the case; true if the program is known
/// to run.
fn true_message(lab: &Lab, program: &Program, said: &Option<lab::scenario::Moved>) -> Result<bool> {
    let Some(moved) = said else { return Ok(false) };
    let (a, b) = (lab.a(), lab.b());
    let outcome = moved.event("failed").map(|event| event["outcome"].clone());
    match moved.status.code() {
        0 => {
            wait("the program at the target", LIMIT, || {
                Ok(gets_on(b, program)? || finished(lab, program)? == Some("b"))
            })
            .with_context(|| format!("pmig said it moved: {}", moved.said()))?;
        }
        3 | 4 if outcome != Some("moved".into()) => {
            wait("the program at the source", LIMIT, || {
                Ok(gets_on(a, program)? || finished(lab, program)? == Some("a"))
            })
            .with_context(|| format!("pmig said it runs on: {}", moved.said()))?;
        }
        4 => ensure!(gets_on(b, program)?, "pmig said: {}", moved.said()),
        5 => {
            ensure!(!gets_on(a, program)?, "pmig said: {}", moved.said());
            return Ok(false);
        }
        code => bail!("exit {code}: {} {}", moved.said(), moved.output.err()),
    }
    Ok(true)
}

/// Where the program has come to its end, if it has.
fn finished(lab: &Lab, program: &Program) -> Result<Option<&'static str>> {
    for (name, host) in [("a", lab.a()), ("b", lab.b())] {
        let written = program.written(host).unwrap_or_default();
        if written.contains("PASS") {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn whole_in_one_place(lab: &Lab, program: &Program, expected: &str) -> Result<()> {
    wait("the program's end", LIMIT, || {
        Ok(finished(lab, program)?.is_some())
    })?;
    let place = finished(lab, program)?.context("it has ended nowhere")?;
    let (here, other) = match place {
        "a" => (lab.a(), lab.b()),
        _ => (lab.b(), lab.a()),
    };
    same(&program.written(here)?, expected).with_context(|| format!("on {place}"))?;
    // A copy at the other place may exist for a moment, but never writes again.
    let before = program.written(other).unwrap_or_default();
    std::thread::sleep(Duration::from_millis(300));
    let after = program.written(other).unwrap_or_default();
    ensure!(before == after, "it still writes on {}", other.name());
    ensure!(!after.contains("PASS"), "it ended on both hosts");
    ensure!(
        expected.starts_with(&after),
        "{} has other output",
        other.name()
    );
    wait("the end of the other copy", LIMIT, || {
        if other.process(program.pid)?.is_none() {
            return Ok(true);
        }
        other.exec(&Cmd::shell("timeout 60 pmig resolve 2>&1"))?;
        Ok(false)
    })
}
