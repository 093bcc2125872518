//! What a machine knows of programs that came and went.

use anyhow::{ensure, Result};
use lab::harness::Trial;
use lab::scenario::{dump, migrate, wait, Program, LIMIT};
use lab::{Host, Lab, Make};
use serde_json::Value;

pub fn trials() -> Vec<Trial> {
    let name = "listing::programs_that_came_and_went_are_listed_where_they_are";
    let trial = |make| Trial::new(make, name, listed);
    [Make::Netns, Make::Vm].map(trial).into()
}

/// Where a host says that a program is; in an order of our own, for records
/// know no less than a second.
fn places(host: &dyn Host, pid: u32) -> Result<Vec<String>> {
    let known: Value = serde_json::from_str(&host.sh("pmig ps --json")?)?;
    ensure!(
        known["open"].as_array().is_some_and(Vec::is_empty),
        "{known}"
    );
    let past = known["past"].as_array().cloned().unwrap_or_default();
    let of = past.iter().filter(|one| one["pid"] == pid);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut all: Vec<String> = of
        .map(|one| format!("{} {}", text(&one["whereabouts"]), text(&one["peer"])))
        .collect();
    all.sort();
    Ok(all)
}

fn listed(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let says = |host: &dyn Host, pid: u32, expected: &[&str]| -> Result<()> {
        let said = places(host, pid)?;
        ensure!(said == expected, "{} says {said:?}", host.name());
        Ok(())
    };
    ensure!(a.sh("pmig ps")?.contains("nothing came here"));
    let program = Program::start(a, "iterative lines=1000")?;
    program.wait_lines(a, 3)?;
    migrate(a, b, &program, "--files ship", &[])?.ok()?;
    says(a, program.pid, &["left b"])?;
    // Its session tidies up behind it.
    wait("it to be settled on b", LIMIT, || {
        Ok(!places(b, program.pid).unwrap_or_default().is_empty())
    })?;
    says(b, program.pid, &["here a"])?;
    let screen = b.sh("pmig ps")?;
    ensure!(
        screen.contains("iterative") && screen.contains("runs here, from a"),
        "{screen}"
    );
    migrate(b, a, &program, "--files ship", &[])?.ok()?;
    says(b, program.pid, &["left a"])?;
    wait("it to be settled on a", LIMIT, || {
        Ok(places(a, program.pid).is_ok_and(|all| all.len() == 2))
    })?;
    says(a, program.pid, &["here b", "left b"])?;
    dump(a, &program, "/srv/work/x", "", &[])?.ok()?;
    says(a, program.pid, &["in_file /srv/work/x", "left b"])?;
    let screen = a.sh("pmig ps")?;
    ensure!(screen.contains("was written to /srv/work/x"), "{screen}");
    a.sh("pmig restore /srv/work/x")?;
    a.signal(program.pid, 9)?;
    wait("its end", LIMIT, || {
        Ok(places(a, program.pid).is_ok_and(|all| all.iter().any(|one| one.starts_with("ended "))))
    })
}
