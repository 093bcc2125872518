//! Every phase, broken in every way at every place.

use super::cell::{Cell, Said, LIMIT};
use anyhow::{bail, ensure, Context, Result};
use lab::harness::Trial;
use lab::{Lab, Make};
use pmig::fault::{Fault, Kind, Role};
use pmig::phase::Phase;
use std::sync::Mutex;
use std::time::Duration;

/// Cells that share two machines at once.
const AT_ONCE: usize = 3;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    let mut add = |fault: Fault, role: &str, mode: &'static str| {
        let how = if mode == POST { "_of_post_copy" } else { "" };
        let point = match fault.nth {
            1 => String::new(),
            n => format!("_point_{n}"),
        };
        let claim = format!(
            "faults::{}_{role}_at_{}{point}{how}_leaves_the_program_whole_in_one_place",
            done_to(fault.kind),
            fault.phase,
        );
        let body = move |lab: &Lab| try_fault(lab, fault, mode);
        trials.push(Trial::new(Make::Netns, claim, body).bare());
    };
    let before = Phase::ALL.map(|phase| (phase, MODE));
    let after = [Phase::Ready, Phase::Commit].map(|phase| (phase, POST));
    for (phase, mode) in before.into_iter().chain(after) {
        for (kind, role) in kinds_and_roles() {
            add(Fault::at(phase, kind.1, role.1), role.0, mode);
        }
    }
    for (phase, role, nth) in FURTHER {
        for (_, kind) in Kind::ALL {
            let fault = Fault::at(phase, kind, role.1);
            add(Fault { nth, ..fault }, role.0, MODE);
        }
    }
    // Before the freeze the two makes differ in nothing that counts.
    for phase in Phase::ALL.into_iter().filter(|p| *p >= Phase::Freeze) {
        let claim = format!("faults::any_fault_at_{phase}_leaves_the_program_whole_in_one_place");
        trials.push(Trial::new(Make::Vm, claim, move |lab| all_faults(lab, phase)).bare());
    }
    trials
}

type Named<T> = (&'static str, T);

/// How memory travels, where the phase does not say so.
const MODE: &str = "auto";
const POST: &str = "post";

fn kinds_and_roles() -> impl Iterator<Item = (Named<Kind>, Named<Role>)> {
    let kinds = Kind::ALL.into_iter();
    kinds.flat_map(|kind| Role::ALL.into_iter().map(move |role| (kind, role)))
}

/// Points that are not the first of their phase: all is on its way but nothing
/// confirmed; the cgroup holds the program and pmig as well; what was likely is
/// restored, and comes true; the cgroup holds the husk.
const FURTHER: [(Phase, Named<Role>, u32); 4] = [
    (Phase::Freeze, ("source", Role::Source), 2),
    (Phase::Freeze, ("source", Role::Source), 3),
    (Phase::Freeze, ("target", Role::Target), 2),
    (Phase::Ready, ("target", Role::Target), 2),
];

pub fn done_to(kind: Kind) -> &'static str {
    match kind {
        Kind::Kill => "a_killed",
        Kind::Cut => "a_cut",
        Kind::Stall => "a_stalled",
    }
}

/// Every fault of a phase, some at a time.
fn all_faults(lab: &Lab, phase: Phase) -> Result<()> {
    let cells = Mutex::new(kinds_and_roles().collect::<Vec<_>>());
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| loop {
                let next = cells.lock().map(|mut cells| cells.pop());
                let Ok(Some((kind, role))) = next else { return };
                let fault = Fault::at(phase, kind.1, role.1);
                if let Err(e) = try_fault(lab, fault, MODE) {
                    if let Ok(mut wrong) = wrong.lock() {
                        wrong.push(format!("{e:#}"));
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap_or_default();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    Ok(())
}

fn try_fault(lab: &Lab, fault: Fault, mode: &str) -> Result<()> {
    let name = &fault.to_string();
    let mode = if fault.phase == Phase::Fill {
        POST
    } else {
        mode
    };
    let cell = Cell::new(lab, &format!("{name}-{mode}"))?;
    let mut context = String::new();
    let tried = meet(&cell, (name, mode), fault, &mut context);
    tried.with_context(|| format!("{name}: {context}\nlogs: {}", cell.log()))
}

fn meet(cell: &Cell, (name, mode): (&str, &str), fault: Fault, context: &mut String) -> Result<()> {
    let env = [("PMIG_FAULT", name)];
    let server = cell.serve(&env)?;
    let program = cell.start()?;
    let address = format!("{} --mode {mode}", cell.address());
    let moving = cell.migrate_to(program, &address, &env)?;
    // Nothing stands still for a source that hangs before the freeze, or when
    // it runs at the target: a person sees it, and ends it.
    let hangs = (fault.role, fault.kind) == (Role::Source, Kind::Stall);
    let person = hangs && fault.phase < Phase::Freeze;
    let within = if person {
        Duration::from_secs(2)
    } else {
        LIMIT
    };
    let said = match cell.said(moving, within)? {
        Some(said) => said,
        None if person => {
            cell.a.signal(moving.pid, 9)?;
            cell.said(moving, LIMIT)?.context("it cannot be killed")?
        }
        None => bail!("pmig migrate does not end"),
    };
    *context = format!("{:?}\n{}", said.status, said.text);
    if said.code() == Some(5) {
        // The keeper goes on by itself, and so does whoever is asked.
        let ended = cell.finish_within(program, cell.patience(Duration::from_secs(5)))?;
        if ended.is_none() {
            for host in [cell.a, cell.b] {
                let resolved = host.exec(&cell.pmig("resolve", &[]))?;
                *context += &format!("resolve on {}: {}", host.name(), resolved.out());
            }
        }
    }
    let place = cell.finish(program)?.name();
    if fault.role != Role::Keeper {
        // A keeper's log goes with it.
        let words = format!("{}{}", said.text, cell.log());
        ensure!(words.contains("meeting the fault"), "it was never met");
    }
    true_words(&said, place)?;
    if let Some(expected) = where_it_must_run(fault) {
        ensure!(place == expected, "it runs on {place}");
    }
    // Whoever waited for a peer in vain has given up by then.
    cell.clean(cell.patience(Duration::from_secs(150)) + Duration::from_secs(10))?;
    cell.b.signal(server, 9)
}

/// What pmig said is what is the case.
fn true_words(said: &Said, place: &str) -> Result<()> {
    let Some(code) = said.code() else {
        // Whoever was killed says nothing.
        return Ok(());
    };
    let failed = said.event("failed");
    let outcome = failed.as_ref().and_then(|event| event["outcome"].as_str());
    match (code, place) {
        (0, "b") => ensure!(failed.is_none() && said.event("done").is_some(), "{said:?}"),
        (4, "a") => ensure!(
            matches!(outcome, Some("never_stopped" | "runs_on"))
                && said.text.contains("runs on here"),
            "{said:?}"
        ),
        (5, _) => ensure!(
            outcome == Some("unresolved") && said.text.contains("pmig resolve"),
            "{said:?}"
        ),
        _ => bail!("it runs on {place}, and pmig ended with {code}"),
    }
    Ok(())
}

/// Where it must run, whichever of two that meet is faster.
fn where_it_must_run(fault: Fault) -> Option<&'static str> {
    match (fault.role, fault.kind) {
        // A keeper's end is noticed with the next word to it.
        (Role::Keeper, Kind::Stall) => Some("b"),
        (Role::Keeper, _) => match fault.phase {
            Phase::Hello | Phase::Release => Some("b"),
            Phase::Build | Phase::Copy => Some("a"),
            _ => None,
        },
        // The question of the fate may come before the order.
        (Role::Source, Kind::Cut) if fault.phase == Phase::Commit => None,
        _ if fault.phase < Phase::Commit => Some("a"),
        _ => Some("b"),
    }
}
