//! What tells the written pages: each means that there is, forced.

use anyhow::{bail, ensure, Result};
use lab::harness::{CannotHere, Trial};
use lab::scenario::{migrate, moves, runs_on, unmoved, Program, Through, Way};
use lab::{Cmd, Host, Lab, Make, Status};

type Claim = (&'static str, fn(&Lab, &str) -> Result<()>);

const QUICK: &[&str] = &["pace_us=0"];
const REFUSED: i32 = 3;

const CLAIMS: &[Claim] = &[
    (
        "a_copy_kept_by_its_looks_is_what_a_restless_program_has",
        mirror,
    ),
    (
        "a_large_piece_discarded_before_the_freeze_is_gone",
        |lab, how| {
            let tried = Cmd::new(["tracking", "discarded", how]);
            lab.a().exec(&tried)?.ok().map(drop)
        },
    ),
    (
        "discarded_protected_and_punched_memory_stays_what_it_was",
        |lab, how| {
            let more = way(how);
            let moved = moves(lab, "memory lines=200", more, QUICK)?;
            let told = &moved.ok()?["tracking"];
            ensure!(told == how, "{told} was used");
            Ok(())
        },
    ),
    ("a_large_program_moves_amid_its_writes", |lab, how| {
        let line = "ticker mode=roaming resident_mb=24 ticks=3000";
        let (a, b) = (lab.a(), lab.b());
        let program = Program::start(a, line)?;
        program.wait_lines(a, 10)?;
        way(how).bring(a, b, &program)?.ok()?;
        program.finish(b).map(drop)
    }),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for make in [Make::Netns, Make::Vm] {
        for how in ["uffd", "soft-dirty", "faults", "kmod", "none"] {
            for (name, body) in CLAIMS {
                trials.push(Trial::new(
                    make,
                    format!("tracking::{how}::{name}"),
                    move |lab| {
                        there(lab.a(), how)?;
                        body(lab, how)
                    },
                ));
            }
        }
        trials.push(Trial::new(
            make,
            "tracking::faults::a_program_with_few_hot_pages_is_not_looked_through",
            not_looked_through,
        ));
        trials.push(Trial::new(
            make,
            "tracking::what_is_not_there_is_refused_by_name",
            refused,
        ));
        trials.push(Trial::new(
            make,
            "tracking::what_another_process_writes_is_found_by_what_may_be_chosen_by_itself",
            foreign,
        ));
    }
    trials
}

/// With few pages written again and again the faults tell which they are, sooner or
/// later: one that is written for the first time in the last moment they do not.
fn not_looked_through(lab: &Lab) -> Result<()> {
    there(lab.a(), "faults")?;
    let line = "ticker mode=hot resident_mb=64 ticks=20000";
    let program = Program::start(lab.a(), line)?;
    program.wait_lines(lab.a(), 10)?;
    let more = "--files ship --dirty-tracking faults -vv";
    let mut hosts = (lab.a(), lab.b());
    for _ in 0..6 {
        let moved = migrate(hosts.0, hosts.1, &program, more, &[])?;
        moved.ok()?;
        hosts = (hosts.1, hosts.0);
        if moved.output.err().contains("all told: true") {
            return hosts.0.signal(program.pid, libc::SIGKILL);
        }
    }
    bail!("in none of six moves did the faults tell all")
}

fn way(how: &str) -> Way {
    let tracking = match how {
        "uffd" => "uffd",
        "soft-dirty" => "soft-dirty",
        "faults" => "faults",
        "kmod" => "kmod",
        _ => "none",
    };
    Way {
        pcb: "auto",
        tracking,
        through: Through::Wire,
    }
}

fn there(host: &dyn Host, how: &str) -> Result<()> {
    let tried = host.exec(&Cmd::new(["tracking", "have", how]))?;
    match tried.status {
        Status::Code(0) => Ok(()),
        _ => Err(CannotHere(tried.err().trim().to_owned()).into()),
    }
}

fn mirror(lab: &Lab, how: &str) -> Result<()> {
    for seed in ["1", "2"] {
        let line = ["tracking", "mirror", how, "5", seed];
        lab.a().exec(&Cmd::new(line))?.ok()?;
    }
    if lab.make() == Make::Netns {
        // Past the page cache: pages are written to after a look has seen them.
        let host = lab.a();
        host.sh("dd if=/dev/urandom of=direct bs=1M count=8 status=none")?;
        let line = ["tracking", "mirror", how, "3", "3", "direct"];
        host.exec(&Cmd::new(line).cwd(lab::agent::WORK))?.ok()?;
    }
    Ok(())
}

/// Asks for what this machine has not: nothing is done.
fn refused(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let missing = ["uffd", "soft-dirty", "faults", "kmod"];
    let missing = missing.iter().find(|how| there(a, how).is_err());
    let Some(how) = missing else {
        return Err(CannotHere("this machine has all of them".into()).into());
    };
    let expected = unmoved(b, "recursive lines=150", QUICK)?;
    let program = Program::start(a, "recursive lines=150")?;
    program.wait_lines(a, 10)?;
    let moved = migrate(a, b, &program, &format!("--dirty-tracking {how}"), &[])?;
    moved.failed(
        REFUSED,
        &[&format!("dirty tracking by {how}"), "never", "auto"],
    )?;
    runs_on(a, &program, &expected)
}

fn foreign(lab: &Lab) -> Result<()> {
    for how in ["uffd", "soft-dirty"] {
        if there(lab.a(), how).is_ok() {
            let said = lab
                .a()
                .exec(&Cmd::new(["tracking", "foreign", how]))?
                .ok()?;
            ensure!(said.out().trim() == "seen", "by {how} it is {}", said.out());
        }
    }
    Ok(())
}
