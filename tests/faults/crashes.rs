//! Several that die at once, and orders that come too late.

use super::cell::{Cell, Moving, Program, Said, LIMIT};
use super::proxy::{Act, Gate, Message, Proxy};
use anyhow::{ensure, Context, Result};
use lab::harness::Trial;
use lab::{Lab, Make};
use pmig::protocol::message::{Hello, ToTarget};
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
    ("another_vdso_is_refused_by_name", |cell| {
        misfit(cell, &["vdso"], |hello| {
            hello.preview.kernel.vdso[0] ^= 1;
            hello.preview.machine.vdso = "another".into();
        })
    }),
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
fn held(
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
    let moving = cell.migrate_to(program, &proxy.address(), &[])?;
    gate.reached()?;
    Ok((proxy, program, moving))
}

fn ended(cell: &Cell, moving: Moving) -> Result<Said> {
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
    for process in cell.a.ps()? {
        if process.cmdline.iter().any(|word| word == "keeper") {
            cell.a.signal(process.pid, 9)?;
        }
    }
    cell.a.signal(moving.pid, 9)?;
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
