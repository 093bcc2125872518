//! Several that die at once, and orders that come too late.

use super::cell::{Cell, Moving, Program, Said, LIMIT};
use super::proxy::{Act, Gate, Message, Proxy};
use anyhow::{ensure, Context, Result};
use lab::harness::Trial;
use lab::victim::hurry;
use lab::{Cmd, Host, Lab, Make};
use pmig::protocol::message::{Hello, ToTarget};
use pmig::state::pcb::PcbChoice;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

type Claim = (&'static str, fn(&Cell) -> Result<()>);

const CLAIMS: &[Claim] = &[
    ("a_migration_outlives_the_serve_that_took_it", serve_dies),
    (
        "a_commit_that_comes_after_the_abort_is_refused",
        late_commit,
    ),
    (
        "pmig_and_keeper_dead_before_ready_any_command_thaws",
        |cell| both_die(cell, "Ready", "check", "a"),
    ),
    (
        "pmig_and_keeper_dead_before_the_order_arrives_resolve_brings_it_back",
        |cell| both_die(cell, "Commit", "resolve", "a"),
    ),
    (
        "pmig_and_keeper_dead_before_the_answer_resolve_finds_it_moved",
        |cell| both_die(cell, "Committed", "resolve", "b"),
    ),
    (
        "a_guard_of_missing_memory_that_dies_is_replaced",
        guard_dies,
    ),
    (
        "a_filler_that_dies_is_replaced_while_the_program_stands_still",
        filler_dies,
    ),
    (
        "children_born_while_memory_is_missing_miss_it_too",
        |cell| forks(cell, |_| Ok(())),
    ),
    (
        "a_filler_that_dies_leaves_the_memory_of_children_to_another",
        |cell| forks(cell, |cell| cell.b.signal(session(cell)?, 9)),
    ),
    (
        "a_guard_that_dies_leaves_the_memory_of_children_to_another",
        |cell| {
            forks(cell, |cell| {
                let guard = workers(cell, "guard")?;
                cell.b
                    .signal(*guard.first().context("there is no guard")?, 9)
            })
        },
    ),
    (
        "memory_goes_on_following_by_any_command_when_pmig_and_keeper_are_dead",
        nobody_serves,
    ),
    (
        "missing_memory_that_nobody_holds_any_more_is_never_read",
        nobody_holds,
    ),
    (
        "what_was_likely_and_did_not_come_true_is_done_again",
        unlikely,
    ),
    ("another_vdso_is_refused_by_name", |cell| {
        misfit(cell, &["vdso"], |hello| {
            hello.preview.kernel.vdso[0] ^= 1;
            hello.preview.machine.vdso = "another".into();
        })
    }),
    (
        "a_module_that_the_target_lacks_is_refused_by_name",
        |cell| {
            misfit(cell, &["kernel module"], |hello| {
                hello.pcb = PcbChoice::Kmod;
            })
        },
    ),
    ("another_architecture_is_refused_by_name", |cell| {
        misfit(cell, &["riscv64"], |hello| {
            hello.preview.machine.arch = "riscv64".into();
        })
    }),
    ("a_cpu_that_can_less_is_refused_by_name", |cell| {
        misfit(cell, &["avx1024"], |hello| {
            hello.preview.machine.flags.insert("avx1024".into());
        })
    }),
];

pub fn trials() -> Vec<Trial> {
    let trial = |(name, body): &Claim| {
        let (name, body) = (*name, *body);
        let trial = Trial::new(Make::Netns, format!("faults::{name}"), move |lab: &Lab| {
            let cell = Cell::new(lab, name)?;
            body(&cell).with_context(|| format!("logs: {}", cell.log()))
        });
        trial.bare()
    };
    CLAIMS.iter().map(trial).collect()
}

/// A migration whose messages of one kind stop at a gate, by `act`.
pub fn held(
    cell: &Cell,
    kind: &'static str,
    gate: &Gate,
    act: fn(Gate) -> Act,
) -> Result<(Proxy, Program, Moving)> {
    let hook = {
        let gate = gate.clone();
        move |message: Message| match message.name() == kind {
            true => act(gate.clone()),
            false => Act::Pass,
        }
    };
    let proxy = cell.proxy(hook)?;
    let program = cell.start()?;
    let mode = if kind == "Piece" { "post" } else { "auto" };
    let address = format!("{} --mode {mode}", proxy.address());
    let moving = cell.migrate_to(program, &address, &[])?;
    gate.reached()?;
    Ok((proxy, program, moving))
}

/// A program that runs on b and waits for its memory, which stands at a gate.
fn filling(cell: &Cell, gate: &Gate) -> Result<(Proxy, Program, Moving)> {
    held(cell, "Piece", gate, Act::Wait)
}

/// The keeper of this cell's migration.
pub fn keeper(cell: &Cell) -> Result<Option<u32>> {
    let keeps = |words: &[String]| words.iter().any(|word| word == "keeper");
    let mut all = cell.a.ps()?.into_iter();
    Ok(all.find(|p| keeps(&p.cmdline)).map(|p| p.pid))
}

/// Kills the keeper and pmig, and waits until neither holds anything any more.
fn kill_both(cell: &Cell, moving: Moving) -> Result<()> {
    let both: Vec<u32> = keeper(cell)?.into_iter().chain([moving.pid]).collect();
    for pid in &both {
        cell.a.signal(*pid, 9)?;
    }
    for pid in both {
        cell.a.wait_for("its end", LIMIT, &mut || {
            Ok(cell.a.process(pid)?.is_none_or(|p| p.is_dead()))
        })?;
    }
    Ok(())
}

/// Processes of pmig's on b that do `what` for this cell's migration.
fn workers(cell: &Cell, what: &str) -> Result<Vec<u32>> {
    let ids = cell.b.sh(&format!("ls {}/target", cell.state()))?;
    let its = |words: &[String]| {
        let role = words.get(1).is_some_and(|word| word == what);
        role && (what != "guard" || words.get(2).is_some_and(|id| id == ids.trim()))
    };
    let all = cell.b.ps()?.into_iter();
    Ok(all.filter(|p| its(&p.cmdline)).map(|p| p.pid).collect())
}

fn guard_dies(cell: &Cell) -> Result<()> {
    let server = cell.serve_shared()?;
    let gate = Gate::default();
    let (_proxy, program, moving) = filling(cell, &gate)?;
    let first = workers(cell, "guard")?;
    ensure!(first.len() == 1, "{first:?}");
    cell.b.signal(first[0], 9)?;
    cell.b.wait_for("another guard", LIMIT, &mut || {
        let now = workers(cell, "guard")?;
        Ok(now.iter().any(|pid| *pid != first[0]))
    })?;
    gate.open();
    let said = ended(cell, moving)?;
    ensure!(said.code() == Some(0), "{said:?}");
    ensure!(cell.finish(program)?.name() == "b");
    cell.clean(LIMIT)?;
    cell.b.signal(server, 9)
}

/// The session of this cell's migration: the guard's parent.
fn session(cell: &Cell) -> Result<u32> {
    let guard = workers(cell, "guard")?;
    let guard = guard.first().context("there is no guard")?;
    let parent = cell
        .b
        .sh(&format!("awk '/^PPid/ {{print $2}}' /proc/{guard}/status"))?;
    Ok(parent.trim().parse()?)
}

fn filler_dies(cell: &Cell) -> Result<()> {
    let server = cell.serve_shared()?;
    let gate = Gate::default();
    let (_proxy, program, moving) = filling(cell, &gate)?;
    cell.b.signal(session(cell)?, 9)?;
    gate.open();
    let said = ended(cell, moving)?;
    ensure!(said.code() == Some(0), "{said:?}");
    ensure!(cell.finish(program)?.name() == "b");
    cell.clean(LIMIT)?;
    cell.b.signal(server, 9)
}

/// A program that forks while little of its memory is there; then something happens.
fn forks(cell: &Cell, harm: fn(&Cell) -> Result<()>) -> Result<()> {
    /// What a piece of memory takes: some seconds for all of it.
    const SLOW: Duration = Duration::from_millis(10);
    let server = cell.serve_shared()?;
    let proxy = cell.proxy(|message| {
        if message.name() == "Piece" {
            std::thread::sleep(SLOW);
        }
        Act::Pass
    })?;
    let when = format!("{}/forks", cell.directory());
    let pid = large(cell, &format!("when={when}"))?;
    let count = |host, what: &str| lines(cell, host, what);
    cell.b.write(&when, 0o644, b"")?;
    let address = format!("{} --mode post", proxy.address());
    let moving = cell.migrate_to(Program { pid }, &address, &[])?;
    cell.b.wait_for("three children", LIMIT, &mut || {
        Ok(count(cell.b, "3 children")? > 0)
    })?;
    cell.b
        .sh(&format!("ls {}/target/*/fill", cell.state()))
        .context("no memory was missing any more when it had forked")?;
    harm(cell)?;
    let said = ended(cell, moving)?;
    ensure!(said.code() == Some(0), "{said:?}");
    // More of them, when nothing is missing.
    let before = count(cell.b, "3 children")?;
    cell.b.wait_for("more children", LIMIT, &mut || {
        Ok(count(cell.b, "3 children")? > before + 3)
    })?;
    ends_well_on_b(cell, pid)?;
    cell.b.signal(server, 9)
}

/// Starts a program with much memory on a; its PID.
fn large(cell: &Cell, more: &str) -> Result<u32> {
    let line = format!("forking lines=1000000 pages=12000 {more}");
    let cmd = Cmd::new(line.split_whitespace()).cwd(&cell.directory());
    let pid = cell.a.spawn(&cmd, &format!("{}/out", cell.directory()))?;
    cell.a.wait_for("five lines", LIMIT, &mut || {
        Ok(lines(cell, cell.a, "0 children")? >= 5)
    })?;
    Ok(pid)
}

/// How many of its lines on that host end so.
fn lines(cell: &Cell, host: &dyn Host, end: &str) -> Result<usize> {
    let output = cell.output(host)?;
    ensure!(!output.contains("FAIL"), "{output}");
    Ok(output.lines().filter(|line| line.ends_with(end)).count())
}

fn ends_well_on_b(cell: &Cell, pid: u32) -> Result<()> {
    cell.b.write(&hurry(pid), 0o644, b"")?;
    cell.b.wait_for("its end", LIMIT, &mut || {
        lines(cell, cell.b, "")?;
        let output = cell.output(cell.b)?;
        Ok(output.lines().any(|line| line.starts_with("PASS")))
    })?;
    cell.clean(LIMIT)
}

fn nobody_serves(cell: &Cell) -> Result<()> {
    let server = cell.serve_shared()?;
    let gate = Gate::default();
    let (_proxy, program, moving) = filling(cell, &gate)?;
    kill_both(cell, moving)?;
    gate.open();
    cell.a.exec(&cell.pmig("check", &[]))?;
    ensure!(cell.finish(program)?.name() == "b");
    cell.clean(LIMIT)?;
    cell.b.signal(server, 9)
}

fn nobody_holds(cell: &Cell) -> Result<()> {
    let server = cell.serve_shared()?;
    let gate = Gate::default();
    let (_proxy, program, moving) = filling(cell, &gate)?;
    // Stopped, so that neither outlives the other long enough to act.
    let (guard, session) = (workers(cell, "guard")?, session(cell)?);
    for pid in guard.iter().chain([&session]) {
        cell.b.signal(*pid, 19)?;
    }
    // As the guard would do.
    let stop = format!(
        "for d in $(find /sys/fs/cgroup -name '*-target' -path '*pmig*'); do
             grep -q '^{}$' $d/cgroup.procs && echo 1 > $d/cgroup.freeze
         done; :",
        program.pid
    );
    cell.b.sh(&stop)?;
    for pid in guard.iter().chain([&session]) {
        cell.b.signal(*pid, 9)?;
    }
    gate.open();
    // Whatever is said and done on either machine, it does not run again.
    let said = ended(cell, moving)?;
    ensure!(said.code() == Some(1), "{said:?}");
    cell.b.exec(&cell.pmig("check", &[]))?;
    cell.a.exec(&cell.pmig("check", &[]))?;
    let before = cell.output(cell.b)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(
        cell.output(cell.b)? == before,
        "it went on without its memory"
    );
    cell.b.signal(program.pid, 9)?;
    cell.b.signal(server, 9)
}

fn unlikely(cell: &Cell) -> Result<()> {
    let server = cell.serve_shared()?;
    let said = Arc::new(AtomicU32::new(0));
    let proxy = cell.proxy({
        let said = said.clone();
        move |message| {
            if let Message::ToTarget(ToTarget::Likely { clock, .. }) = message {
                said.fetch_add(1, Ordering::Relaxed);
                clock.coarse -= 1;
            }
            Act::Pass
        }
    })?;
    let pid = large(cell, "")?;
    let moving = cell.migrate_to(Program { pid }, &proxy.address(), &[])?;
    let ended = ended(cell, moving)?;
    ensure!(ended.code() == Some(0), "{ended:?}");
    ensure!(said.load(Ordering::Relaxed) == 1, "it was not said");
    ends_well_on_b(cell, pid)?;
    cell.b.signal(server, 9)
}

pub fn ended(cell: &Cell, moving: Moving) -> Result<Said> {
    cell.said(moving, LIMIT)?.context("pmig does not end")
}

fn serve_dies(cell: &Cell) -> Result<()> {
    let server = cell.serve_shared()?;
    let gate = Gate::default();
    let (_proxy, program, moving) = held(cell, "RoundEnd", &gate, Act::Wait)?;
    cell.b.signal(server, 9)?;
    gate.open();
    let said = ended(cell, moving)?;
    ensure!(said.code() == Some(0), "{said:?}");
    ensure!(cell.finish(program)?.name() == "b");
    cell.clean(LIMIT)
}

fn late_commit(cell: &Cell) -> Result<()> {
    let server = cell.serve_shared()?;
    let gate = Gate::default();
    let (_proxy, program, moving) = held(cell, "Commit", &gate, Act::Late)?;
    let said = ended(cell, moving)?;
    ensure!(said.code() == Some(4), "{said:?}");
    // The target has said that it never ran there; now the order comes.
    gate.open();
    ensure!(cell.finish(program)?.name() == "a");
    ensure!(cell.log().contains("aborted"), "nobody refused the order");
    cell.clean(LIMIT)?;
    cell.b.signal(server, 9)
}

fn both_die(cell: &Cell, held_at: &'static str, command: &str, place: &str) -> Result<()> {
    let server = cell.serve_shared()?;
    let gate = Gate::default();
    let (_proxy, program, moving) = held(cell, held_at, &gate, Act::Wait)?;
    kill_both(cell, moving)?;
    let before = cell.output(cell.a)?;
    std::thread::sleep(Duration::from_millis(200));
    ensure!(cell.output(cell.a)? == before, "it was not held");
    let said = cell.a.exec(&cell.pmig(command, &[]))?;
    gate.open();
    ensure!(said.status.success(), "{said:?}");
    let at = cell.finish(program)?.name().to_owned();
    ensure!(at == place, "it ran on {at}: {said:?}");
    cell.clean(LIMIT)?;
    cell.b.signal(server, 9)
}

/// The target is told of another machine than the source is.
fn misfit(cell: &Cell, words: &[&str], change: fn(&mut Hello)) -> Result<()> {
    let server = cell.serve_shared()?;
    let proxy = cell.proxy(move |message| {
        if let Message::ToTarget(ToTarget::Hello(hello)) = message {
            change(hello);
        }
        Act::Pass
    })?;
    let program = cell.start()?;
    let moving = cell.migrate_to(program, &proxy.address(), &[])?;
    let said = ended(cell, moving)?;
    ensure!(said.code() == Some(3), "{said:?}");
    for word in words {
        ensure!(said.text.contains(word), "no {word} in {}", said.text);
    }
    ensure!(said.text.contains("never_stopped"), "{}", said.text);
    ensure!(cell.finish(program)?.name() == "a");
    cell.clean(LIMIT)?;
    cell.b.signal(server, 9)
}
