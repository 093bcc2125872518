//! What a program is made of goes with it.

use anyhow::{ensure, Context, Result};
use lab::harness::{CannotHere, Trial};
use lab::samples;
use lab::scenario::{moves, same, unmoved, wait, Program, Through, Way, LIMIT};
use lab::{Lab, Make};
use std::time::Duration;

type Claim = (&'static str, fn(&Lab, Way) -> Result<()>);

const QUICK: &[&str] = &["pace_us=0"];

const CLAIMS: &[Claim] = &[
    (
        "a_recursive_program_moves_while_running_and_its_output_goes_on",
        |lab, way| run(lab, way, "recursive lines=150"),
    ),
    (
        "an_iterative_program_moves_while_running_and_its_output_goes_on",
        |lab, way| {
            let quick = &["pace_us=0", "file=/srv/work/unmoved/own"];
            let line = "iterative lines=200 file=/srv/work/own";
            moves(lab, line, way, quick)?;
            let lines = lab.b().read("/srv/work/own")?;
            ensure!(lines.iter().filter(|byte| **byte == b'\n').count() == 200);
            Ok(())
        },
    ),
    ("python_moves_amid_its_generators", |lab, way| {
        samples::install(lab.a())?;
        samples::install(lab.b())?;
        moves(lab, "generators.py 150 0.01", way, &["2=0"]).map(drop)
    }),
    ("perl_moves_amid_its_closures", |lab, way| {
        samples::install(lab.a())?;
        samples::install(lab.b())?;
        moves(lab, "closures.pl 150 0.01", way, &["2=0"]).map(drop)
    }),
    ("a_program_at_random_addresses_moves", at_random_addresses),
    (
        "static_dynamic_pie_and_fixed_programs_move",
        every_kind_of_linking,
    ),
    (
        "interrupted_waits_end_when_due_and_with_their_own_result",
        |lab, way| {
            let line = "sleeper ms=700 rounds=4";
            waits(lab, way, line, &["ms=1", "slack_ms=5000"])
        },
    ),
    (
        "a_read_of_an_empty_pipe_goes_on_waiting_after_the_move",
        empty_pipe,
    ),
    (
        "discarded_protected_and_punched_memory_stays_what_it_was",
        |lab, way| run(lab, way, "memory lines=200"),
    ),
    ("handlers_masks_and_queued_signals_move", |lab, way| {
        run(lab, way, "signals lines=200")
    }),
    ("what_a_process_is_and_may_do_moves", |lab, way| {
        run(lab, way, "attributes lines=150")
    }),
    ("what_an_ordinary_user_is_and_may_do_moves", |lab, way| {
        run(lab, way, "attributes lines=150 as=user")
    }),
    (
        "a_program_that_changes_its_settings_all_the_time_moves_with_the_last_of_them",
        fickle,
    ),
    (
        "descriptors_keep_their_offsets_flags_and_sharing",
        |lab, way| {
            let quick = &["pace_us=0", "prefix=/srv/work/unmoved/files"];
            moves(lab, "files lines=150", way, quick).map(drop)
        },
    ),
    ("clocks_neither_step_back_nor_leap", |lab, way| {
        run(lab, way, "clocks lines=150")
    }),
    ("a_file_opened_during_the_copy_goes_along", |lab, way| {
        let line = "iterative lines=400 heap_kb=120000 late=/srv/work/late";
        moves(
            lab,
            line,
            way,
            &["pace_us=0", "late=/srv/work/unmoved/late"],
        )
        .map(drop)
    }),
    ("a_program_goes_there_and_back_ten_times", there_and_back),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (make, pcb) in [
        (Make::Netns, "ptrace"),
        (Make::Vm, "ptrace"),
        (Make::Vm, "kmod"),
    ] {
        for through in [Through::Wire, Through::File] {
            for (name, body) in CLAIMS {
                let name = match through {
                    Through::Wire => format!("{pcb}::{name}"),
                    Through::File => format!("{pcb}::file::{name}"),
                };
                trials.push(Trial::new(make, name, move |lab| {
                    if pcb == "kmod" && lab.a().sh("test -e /dev/pmig").is_err() {
                        return Err(CannotHere("the kernel module is not there".into()).into());
                    }
                    body(lab, Way::new(pcb, through))
                }));
            }
        }
    }
    trials
}

fn run(lab: &Lab, way: Way, line: &str) -> Result<()> {
    moves(lab, line, way, QUICK).map(drop)
}

fn fickle(lab: &Lab, way: Way) -> Result<()> {
    // Long enough on its way for more than one line.
    let mb = if lab.make() == Make::Vm { 48 } else { 200 };
    let line = format!("fickle lines=250 resident_mb={mb}");
    let moved = moves(lab, &line, way, QUICK)?;
    // The module reads them when it stands still, and a file is not in a hurry.
    if way.pcb == "ptrace" && way.through == Through::Wire {
        let again = "and all of it begins again";
        let told = moved.output.out();
        ensure!(told.contains(again), "{told}");
    }
    Ok(())
}

/// Emulated machines give out the same addresses again and again, for speed.
fn at_random_addresses(lab: &Lab, way: Way) -> Result<()> {
    const SETTING: &str = "/proc/sys/kernel/randomize_va_space";
    let set = |value: &str| -> Result<()> {
        if lab.make() == Make::Vm {
            lab.a().sh(&format!("echo {value} > {SETTING}"))?;
            lab.b().sh(&format!("echo {value} > {SETTING}"))?;
        }
        Ok(())
    };
    let usual = lab.a().sh(&format!("cat {SETTING}"))?;
    set("2")?;
    let stack = || lab.a().sh("grep -F '[stack]' /proc/self/maps");
    let random = stack()? != stack()?;
    let moved = match random {
        true => run(lab, way, "recursive lines=150"),
        false => Err(CannotHere("this machine gives out no random addresses".into()).into()),
    };
    set(usual.trim())?;
    moved
}

fn every_kind_of_linking(lab: &Lab, way: Way) -> Result<()> {
    samples::install(lab.a())?;
    samples::install(lab.b())?;
    for (name, _) in samples::LINKED {
        moves(lab, &format!("{name} 120 10000"), way, &["2=0"])?;
    }
    Ok(())
}

/// Moves a program that waits nearly always, in the middle of each of its
/// waits: to and fro, for as long as it runs.
fn waits(lab: &Lab, way: Way, line: &str, quick: &[&str]) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    // What its clock may add beside the time asked for: the freezes.
    let line = format!("{line} slack_ms=1500");
    let expected = unmoved(b, &line, quick)?;
    let program = Program::start(a, &line)?;
    let (mut here, mut there) = (a, b);
    let (mut moved, mut refused) = (0, 0);
    while here.process(program.pid)?.is_some() && moved < 12 {
        std::thread::sleep(Duration::from_millis(150));
        let result = way.bring(here, there, &program)?;
        if !result.status.success() && here.process(program.pid)?.is_none() {
            break;
        }
        // Without the module a wait that was moved once is let end first.
        let later = result
            .said()
            .contains("try again when the program is elsewhere");
        if later && way.pcb == "ptrace" && refused < 60 {
            refused += 1;
            continue;
        }
        result.ok()?;
        moved += 1;
        (here, there) = (there, here);
    }
    ensure!(moved >= 6, "it moved only {moved} times");
    let written = program.finish(here)?;
    same(&written, &expected)
}

fn empty_pipe(lab: &Lab, way: Way) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let program = Program::start(a, "sleeper call=read")?;
    wait("reading", LIMIT, || {
        Ok(program.written(a)?.contains("reading"))
    })?;
    std::thread::sleep(Duration::from_millis(100));
    way.bring(a, b, &program)?.ok()?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(
        b.process(program.pid)?.is_some(),
        "the read has ended: {}",
        program.written(b)?
    );
    b.signal(program.pid, libc::SIGUSR1)?;
    program.finish(b).map(drop)
}

fn there_and_back(lab: &Lab, way: Way) -> Result<()> {
    let (mut here, mut there) = (lab.a(), lab.b());
    let expected = unmoved(there, "recursive lines=1500", QUICK)?;
    let program = Program::start(here, "recursive lines=1500")?;
    for number in 0..20 {
        program.wait_lines(here, 10)?;
        way.bring(here, there, &program)?
            .ok()
            .with_context(|| format!("move {number} from {} to {}", here.name(), there.name()))?;
        (here, there) = (there, here);
    }
    let written = program.finish(here)?;
    same(&written, &expected)
}
