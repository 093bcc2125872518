//! Every phase of a dump, broken in every way: the program is in the file, or it
//! runs on, and never both.

use super::cell::{Cell, LIMIT};
use super::matrix::done_to;
use anyhow::{bail, ensure, Context, Result};
use lab::harness::Trial;
use lab::{Lab, Make, Status};
use pmig::fault::{Fault, Kind, Role};
use pmig::phase::Phase;
use std::time::Duration;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for phase in Phase::ALL {
        for (_, kind) in Kind::ALL {
            for (role_name, role) in Role::ALL {
                let fault = Fault::at(phase, kind, role);
                let text = fault.to_string();
                // What is written to has no process of its own; what is restored
                // has only that.
                if role == Role::Target {
                    let claim = format!(
                        "faults::{}_restore_at_{phase}_brings_it_back_once_or_not",
                        done_to(kind)
                    );
                    let body = move |lab: &Lab| {
                        let cell = Cell::new(lab, &format!("restore:{text}"))?;
                        come_back(&cell, &text).with_context(|| format!("logs: {}", cell.log()))
                    };
                    trials.push(Trial::new(Make::Netns, claim, body).bare());
                    continue;
                }
                let claim = format!(
                    "faults::{}_{role_name}_at_{phase}_of_a_dump_leaves_it_here_or_in_the_file",
                    done_to(kind)
                );
                let name = text.clone();
                let body = move |lab: &Lab| {
                    let cell = Cell::new(lab, &format!("dump:{name}"))?;
                    meet(&cell, &name, fault).with_context(|| format!("logs: {}", cell.log()))
                };
                trials.push(Trial::new(Make::Netns, claim, body).bare());
                if kind == Kind::Kill {
                    let claim = format!(
                        "faults::{}_{role_name}_at_{phase}_of_a_copy_leaves_it_running",
                        done_to(kind)
                    );
                    let body = move |lab: &Lab| {
                        let cell = Cell::new(lab, &format!("copy:{text}"))?;
                        stays(&cell, &text).with_context(|| format!("logs: {}", cell.log()))
                    };
                    trials.push(Trial::new(Make::Netns, claim, body).bare());
                }
            }
        }
    }
    trials
}

fn stays(cell: &Cell, name: &str) -> Result<()> {
    let program = cell.start()?;
    let dumping = cell.dump(program, "--leave-running", &[("PMIG_FAULT", name)])?;
    let said = cell
        .said(dumping, LIMIT)?
        .context("pmig dump does not end")?;
    if cell.a.sh(&format!("test -e {}", cell.file())).is_ok() {
        let words = format!("inspect {}", cell.file());
        cell.a.exec(&cell.pmig(&words, &[]))?.ok()?;
    } else {
        ensure!(said.status != Status::Code(0), "{}", said.text);
    }
    let place = cell.finish(program).context(said.text)?.name();
    ensure!(place == "a", "it runs on {place}");
    cell.clean(cell.patience(Duration::from_secs(150)) + Duration::from_secs(10))
}

fn meet(cell: &Cell, name: &str, fault: Fault) -> Result<()> {
    let program = cell.start()?;
    let dumping = cell.dump(program, "", &[("PMIG_FAULT", name)])?;
    let hangs = (fault.role, fault.kind) == (Role::Source, Kind::Stall);
    let person = hangs && fault.phase < Phase::Freeze;
    let within = match person {
        true => Duration::from_secs(2),
        false => LIMIT,
    };
    let said = match cell.said(dumping, within)? {
        Some(said) => said,
        None if person => {
            cell.a.signal(dumping.pid, 9)?;
            cell.said(dumping, LIMIT)?.context("it cannot be killed")?
        }
        None => bail!("pmig dump does not end"),
    };
    let context = || format!("{name}: {:?}\n{}", said.status, said.text);
    let whole = settled(cell, program.pid).with_context(context)?;
    match said.status {
        Status::Code(0) => ensure!(whole, "there is no file: {}", context()),
        Status::Code(3 | 4) => ensure!(!whole, "there is a file: {}", context()),
        _ => {}
    }
    if whole {
        cell.a
            .exec(&cell.pmig(&format!("inspect {}", cell.file()), &[]))?
            .ok()?;
        cell.a
            .exec(&cell.pmig(&format!("restore {}", cell.file()), &[]))?
            .ok()
            .with_context(context)?;
    }
    let place = cell.finish(program).with_context(context)?.name();
    ensure!(place == "a", "it runs on {place}");
    cell.clean(cell.patience(Duration::from_secs(150)) + Duration::from_secs(10))
}

fn come_back(cell: &Cell, name: &str) -> Result<()> {
    let program = cell.start()?;
    let dumping = cell.dump(program, "", &[])?;
    let dumped = cell
        .said(dumping, LIMIT)?
        .context("pmig dump does not end")?;
    ensure!(dumped.code() == Some(0), "{}", dumped.text);
    let words = format!("restore {}", cell.file());
    let said = cell.a.exec(&cell.pmig(&words, &[("PMIG_FAULT", name)]))?;
    let text = said.out() + &said.err();
    let runs = || -> Result<bool> {
        let before = cell.output(cell.a)?.len();
        std::thread::sleep(Duration::from_millis(200));
        Ok(cell.output(cell.a)?.len() > before)
    };
    match said.status {
        Status::Code(0) => ensure!(runs()?, "it does not run: {text}"),
        Status::Code(1) => {
            ensure!(text.contains("nothing was restored"), "{text}");
            ensure!(!runs()?, "it runs: {text}");
            cell.a
                .wait_for("the end of what was built", LIMIT, &mut || {
                    Ok(cell.a.process(program.pid)?.is_none())
                })
                .with_context(|| text.clone())?;
            cell.a.exec(&cell.pmig(&words, &[]))?.ok()?;
        }
        other => bail!("{other:?}: {text}"),
    }
    let place = cell.finish(program).context(text)?.name();
    ensure!(place == "a", "it runs on {place}");
    cell.clean(cell.patience(Duration::from_secs(150)) + Duration::from_secs(10))
}

/// Waits until the program runs here, or is in the file only; says whether that
/// is so.
fn settled(cell: &Cell, pid: u32) -> Result<bool> {
    let mut whole = false;
    cell.a.wait_for("one program", LIMIT, &mut || {
        let process = cell.a.process(pid)?;
        let here = process.is_some_and(|p| p.state != 'Z' && p.comm == "iterative");
        whole = cell.a.sh(&format!("test -e {}", cell.file())).is_ok();
        if here && !whole {
            let before = cell.output(cell.a)?.len();
            std::thread::sleep(Duration::from_millis(100));
            return Ok(cell.output(cell.a)?.len() > before);
        }
        ensure!(here || whole, "it is nowhere");
        Ok(here != whole)
    })?;
    Ok(whole)
}
