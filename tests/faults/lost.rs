//! Somebody clears the place where it is decided, in the middle of a move.

use super::cell::{Cell, Moving, Program, Said, LIMIT};
use super::crashes::{ended, held, keeper};
use super::proxy::{Act, Gate, Proxy};
use anyhow::{ensure, Context, Result};
use lab::harness::Trial;
use lab::{Host, Lab, Make};

/// What moves when, whose place is cleared, and where the program runs in the end.
const CLAIMS: &[(&str, &str, Side, &str)] = &[
    (
        "lost_at_the_source_during_the_copy_it_never_stops",
        "RoundEnd",
        Side::Source,
        "a",
    ),
    (
        "lost_at_the_target_during_the_copy_it_runs_on_at_the_source",
        "RoundEnd",
        Side::Target,
        "a",
    ),
    (
        "lost_at_the_source_before_the_order_it_runs_on_at_the_source",
        "Ready",
        Side::Source,
        "a",
    ),
    (
        "lost_at_the_source_after_the_order_it_moves",
        "Commit",
        Side::Source,
        "b",
    ),
    (
        "lost_at_the_target_before_the_order_arrives_it_runs_on_at_the_source",
        "Commit",
        Side::Target,
        "a",
    ),
    (
        "lost_at_both_before_the_order_arrives_it_runs_on_at_the_source",
        "Commit",
        Side::Both,
        "a",
    ),
    (
        "lost_at_both_after_the_target_obeyed_it_has_moved",
        "Committed",
        Side::Both,
        "b",
    ),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Target,
    Both,
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, kind, side, place) in CLAIMS {
        trials.push(trial(name, move |cell| alive(cell, kind, *side, place)));
    }
    let name = "lost_at_the_source_with_pmig_dead_before_the_order_arrives_the_keeper_thaws";
    trials.push(trial(name, |cell| pmig_dies(cell, "Commit", "a")));
    let name = "lost_at_the_source_with_pmig_dead_before_the_answer_the_keeper_finds_it_moved";
    trials.push(trial(name, |cell| pmig_dies(cell, "Committed", "b")));
    trials
}

fn trial(name: &'static str, body: impl Fn(&Cell) -> Result<()> + Send + Sync + 'static) -> Trial {
    let whole = format!("faults::{name}");
    let trial = Trial::new(Make::Netns, whole, move |lab: &Lab| {
        let cell = Cell::new(lab, name)?;
        body(&cell).with_context(|| format!("logs: {}", cell.log()))
    });
    trial.bare()
}

fn lose(cell: &Cell, host: &dyn Host) -> Result<()> {
    host.sh(&format!("rm -r {}", cell.run())).map(drop)
}

fn at(
    cell: &Cell,
    kind: &'static str,
    side: Side,
    gate: &Gate,
) -> Result<(Proxy, Program, Moving)> {
    let held = held(cell, kind, gate, Act::Wait)?;
    if side != Side::Target {
        lose(cell, cell.a)?;
    }
    if side != Side::Source {
        lose(cell, cell.b)?;
    }
    Ok(held)
}

fn alive(cell: &Cell, kind: &'static str, side: Side, place: &str) -> Result<()> {
    let server = cell.serve_shared()?;
    let gate = Gate::default();
    let (_proxy, program, moving) = at(cell, kind, side, &gate)?;
    gate.open();
    let said: Said = ended(cell, moving)?;
    ensure!((said.code() == Some(0)) == (place == "b"), "{said:?}");
    if place == "a" {
        ensure!(said.text.contains("is gone from it"), "{said:?}");
        let stopped = !said.text.contains("never_stopped");
        ensure!(
            stopped == (kind != "RoundEnd" || side == Side::Target),
            "{said:?}"
        );
    }
    // Whoever asks afterwards changes nothing.
    for host in [cell.a, cell.b] {
        host.exec(&cell.pmig("resolve", &[]))?;
    }
    runs_at(cell, program, place)?;
    cell.b.signal(server, 9)
}

fn pmig_dies(cell: &Cell, kind: &'static str, place: &str) -> Result<()> {
    let server = cell.serve_shared()?;
    let gate = Gate::default();
    let (_proxy, program, moving) = at(cell, kind, Side::Source, &gate)?;
    ensure!(keeper(cell)?.is_some(), "nobody keeps it");
    cell.a.signal(moving.pid, 9)?;
    let settled = format!("ls {}/source/*/settled", cell.state());
    cell.a.wait_for("the keeper to settle it", LIMIT, &mut || {
        Ok(cell.a.sh(&settled).is_ok())
    })?;
    gate.open();
    runs_at(cell, program, place)?;
    cell.b.signal(server, 9)
}

fn runs_at(cell: &Cell, program: Program, place: &str) -> Result<()> {
    let at = cell.finish(program)?.name().to_owned();
    ensure!(at == place, "it ran on {at}");
    cell.clean(LIMIT)
}
