//! What a program is made of goes with it.

use anyhow::{ensure, Context, Result};
use lab::harness::{CannotHere, Trial};
use lab::samples;
use lab::scenario::{migrate, moves, same, unmoved, wait, Program, LIMIT};
use lab::{Lab, Make};
use std::time::Duration;

type Claim = (&'static str, fn(&Lab, &str) -> Result<()>);

const QUICK: &[&str] = &["pace_us=0"];

const CLAIMS: &[Claim] = &[
    (
        "a_recursive_program_moves_while_running_and_its_output_goes_on",
        |lab, pcb| run(lab, pcb, "recursive lines=150"),
    ),
    (
        "an_iterative_program_moves_while_running_and_its_output_goes_on",
        |lab, pcb| {
            let quick = &["pace_us=0", "file=/srv/work/unmoved/own"];
            let line = "iterative lines=200 file=/srv/work/own";
            moves(lab, line, pcb, quick)?;
            let lines = lab.b().read("/srv/work/own")?;
            ensure!(lines.iter().filter(|byte| **byte == b'\n').count() == 200);
            Ok(())
        },
    ),
    ("python_moves_amid_its_generators", |lab, pcb| {
        samples::install(lab.a())?;
        samples::install(lab.b())?;
        moves(lab, "generators.py 150 0.01", pcb, &["2=0"]).map(drop)
    }),
    ("perl_moves_amid_its_closures", |lab, pcb| {
        samples::install(lab.a())?;
        samples::install(lab.b())?;
        moves(lab, "closures.pl 150 0.01", pcb, &["2=0"]).map(drop)
    }),
    ("a_program_at_random_addresses_moves", at_random_addresses),
    (
        "static_dynamic_pie_and_fixed_programs_move",
        every_kind_of_linking,
    ),
    (
        "interrupted_waits_end_when_due_and_with_their_own_result",
        |lab, pcb| {
            let line = "sleeper ms=700 rounds=4";
            waits(lab, pcb, line, &["ms=1", "slack_ms=5000"])
        },
    ),
    (
        "a_read_of_an_empty_pipe_goes_on_waiting_after_the_move",
        empty_pipe,
    ),
    (
        "discarded_protected_and_punched_memory_stays_what_it_was",
        |lab, pcb| run(lab, pcb, "memory lines=200"),
    ),
    ("handlers_masks_and_queued_signals_move", |lab, pcb| {
        run(lab, pcb, "signals lines=200")
    }),
    ("what_a_process_is_and_may_do_moves", |lab, pcb| {
        run(lab, pcb, "attributes lines=150")
    }),
    ("what_an_ordinary_user_is_and_may_do_moves", |lab, pcb| {
        run(lab, pcb, "attributes lines=150 as=user")
    }),
    (
        "descriptors_keep_their_offsets_flags_and_sharing",
        |lab, pcb| {
            let quick = &["pace_us=0", "prefix=/srv/work/unmoved/files"];
            moves(lab, "files lines=150", pcb, quick).map(drop)
        },
    ),
    ("clocks_neither_step_back_nor_leap", |lab, pcb| {
        run(lab, pcb, "clocks lines=150")
    }),
    ("a_file_opened_during_the_copy_goes_along", |lab, pcb| {
        let line = "iterative lines=400 heap_kb=120000 late=/srv/work/late";
        moves(
            lab,
            line,
            pcb,
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
        for (name, body) in CLAIMS {
            trials.push(Trial::new(make, format!("{pcb}::{name}"), move |lab| {
                if pcb == "kmod" && lab.a().sh("test -e /dev/pmig").is_err() {
                    return Err(CannotHere("the kernel module is not there".into()).into());
                }
                body(lab, &format!("--pcb {pcb}"))
            }));
        }
    }
    trials
}

fn run(lab: &Lab, more: &str, line: &str) -> Result<()> {
    moves(lab, line, more, QUICK).map(drop)
}

/// Emulated machines give out the same addresses again and again, for speed.
fn at_random_addresses(lab: &Lab, more: &str) -> Result<()> {
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
        true => run(lab, more, "recursive lines=150"),
        false => Err(CannotHere("this machine gives out no random addresses".into()).into()),
    };
    set(usual.trim())?;
    moved
}

fn every_kind_of_linking(lab: &Lab, more: &str) -> Result<()> {
    samples::install(lab.a())?;
    samples::install(lab.b())?;
    for (name, _) in samples::LINKED {
        moves(lab, &format!("{name} 120 10000"), more, &["2=0"])?;
    }
    Ok(())
}

/// Moves a program that waits nearly always, in the middle of each of its
/// waits: to and fro, for as long as it runs.
fn waits(lab: &Lab, more: &str, line: &str, quick: &[&str]) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    // What its clock may add beside the time asked for: the freezes.
    let line = format!("{line} slack_ms=1500");
    let expected = unmoved(b, &line, quick)?;
    let program = Program::start(a, &line)?;
    let (mut here, mut there) = (a, b);
    let (mut moved, mut refused) = (0, 0);
    while here.process(program.pid)?.is_some() && moved < 12 {
        std::thread::sleep(Duration::from_millis(150));
        let more = format!("--files ship {more}");
        let result = migrate(here, there, &program, &more, &[])?;
        if !result.status.success() && here.process(program.pid)?.is_none() {
            break;
        }
        // Without the module a wait that was moved once is let end first.
        let later = result
            .said()
            .contains("try again when the program is elsewhere");
        if later && more.contains("ptrace") && refused < 60 {
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

fn empty_pipe(lab: &Lab, more: &str) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let program = Program::start(a, "sleeper call=read")?;
    wait("reading", LIMIT, || {
        Ok(program.written(a)?.contains("reading"))
    })?;
    std::thread::sleep(Duration::from_millis(100));
    migrate(a, b, &program, &format!("--files ship {more}"), &[])?.ok()?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(
        b.process(program.pid)?.is_some(),
        "the read has ended: {}",
        program.written(b)?
    );
    b.signal(program.pid, libc::SIGUSR1)?;
    program.finish(b).map(drop)
}

fn there_and_back(lab: &Lab, more: &str) -> Result<()> {
    let (mut here, mut there) = (lab.a(), lab.b());
    let expected = unmoved(there, "recursive lines=1500", QUICK)?;
    let program = Program::start(here, "recursive lines=1500")?;
    for number in 0..20 {
        program.wait_lines(here, 10)?;
        let more = format!("--files ship {more}");
        migrate(here, there, &program, &more, &[])?
            .ok()
            .with_context(|| format!("move {number} from {} to {}", here.name(), there.name()))?;
        (here, there) = (there, here);
    }
    let written = program.finish(here)?;
    same(&written, &expected)
}
