//! The hosts themselves do what a trial relies on.

use anyhow::{ensure, Result};
use lab::harness::Trial;
use lab::{Cmd, Lab, Make, Status};

type Claim = (&'static str, fn(&Lab) -> Result<()>);

const CLAIMS: &[Claim] = &[
    (
        "a_command_gives_back_both_outputs_and_its_status",
        outputs_and_status,
    ),
    ("hosts_know_each_other_by_name", names),
    ("hosts_hand_out_disjoint_pids", pids),
    ("orphans_are_reaped", orphans),
    ("files_go_in_and_out_unchanged", files),
    ("many_commands_run_at_once", at_once),
    ("a_host_has_cgroups_of_its_own", cgroups),
    ("sample_programs_end_well_by_themselves", samples),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for make in [Make::Netns, Make::Vm] {
        for (name, body) in CLAIMS {
            trials.push(Trial::new(make, format!("hosts::{name}"), body).bare());
        }
    }
    trials.push(Trial::new(Make::Vm, "hosts::the_console_answers", console).bare());
    trials
}

fn outputs_and_status(lab: &Lab) -> Result<()> {
    let output = lab
        .a()
        .exec(&Cmd::shell("echo out; echo err >&2; exit 17"))?;
    ensure!(output.out() == "out\n" && output.err() == "err\n");
    ensure!(output.status == Status::Code(17));
    let killed = lab.a().exec(&Cmd::shell("kill -9 $$"))?;
    ensure!(killed.status == Status::Signal(9));
    ensure!(lab.a().exec(&Cmd::new(["/no/such/program"])).is_err());
    Ok(())
}

fn names(lab: &Lab) -> Result<()> {
    for (host, other) in [(lab.a(), "b"), (lab.b(), "a")] {
        ensure!(host.sh("hostname || cat /etc/hostname")?.trim() == host.name());
        host.sh(&format!("getent hosts {other}"))?;
        // Whoever answers that nobody listens has been reached.
        let line = format!("exec 2>&1; echo > /dev/tcp/{other}/9");
        let said = host.exec(&Cmd::new(["bash", "-c", &line]))?.out();
        ensure!(said.contains("refused"), "{said}");
    }
    Ok(())
}

fn pids(lab: &Lab) -> Result<()> {
    for (host, range) in [(lab.a(), 10_000..20_000), (lab.b(), 20_000..30_000)] {
        let pid: u32 = host.sh("echo $$")?.trim().parse()?;
        ensure!(range.contains(&pid), "{pid} on {}", host.name());
    }
    Ok(())
}

fn orphans(lab: &Lab) -> Result<()> {
    let pid = lab.a().sh("(sleep 0.2 & echo $!) ; :")?.trim().parse()?;
    lab.a()
        .wait_for("the orphan's end", lab::scenario::LIMIT, &mut || {
            Ok(lab.a().process(pid)?.is_none())
        })
}

fn files(lab: &Lab) -> Result<()> {
    let contents = (0..9_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect::<Vec<_>>();
    lab.b().write("/srv/work/file", 0o640, &contents)?;
    ensure!(lab.b().read("/srv/work/file")? == contents);
    ensure!(lab.b().read_from("/srv/work/file", 8_999_990)? == contents[8_999_990..]);
    ensure!(lab.b().sh("stat -c %a /srv/work/file")?.trim() == "640");
    Ok(())
}

fn at_once(lab: &Lab) -> Result<()> {
    std::thread::scope(|scope| {
        let all = (0..6)
            .map(|number| {
                let line = format!("sleep 0.3; echo {number}");
                scope.spawn(move || lab.a().sh(&line))
            })
            .collect::<Vec<_>>();
        for (number, thread) in all.into_iter().enumerate() {
            let said = thread.join().expect("no panic")?;
            ensure!(said.trim() == number.to_string());
        }
        Ok(())
    })
}

fn cgroups(lab: &Lab) -> Result<()> {
    let line = "cd /sys/fs/cgroup; mkdir trial; sleep 100 & echo $! > trial/cgroup.procs
        echo 1 > trial/cgroup.freeze; sleep 0.1; cat trial/cgroup.events
        echo 1 > trial/cgroup.kill; sleep 0.1; rmdir trial";
    let said = lab.a().sh(line)?;
    ensure!(said.contains("frozen 1"), "{said}");
    ensure!(!lab.b().sh("ls /sys/fs/cgroup")?.contains("trial"));
    Ok(())
}

fn samples(lab: &Lab) -> Result<()> {
    let host = lab.b();
    lab::samples::install(host)?;
    for line in [
        "iterative lines=20 pace_us=0",
        "recursive lines=20 pace_us=0",
        "ticker ticks=20",
        "sleeper ms=50 slack_ms=2000",
        "clocks lines=20 pace_us=100",
        "signals lines=20 pace_us=0",
        "memory lines=60 pace_us=0",
        "attributes lines=5 pace_us=0",
        "attributes lines=5 pace_us=0 as=user",
        "fickle lines=20 pace_us=0",
        "files lines=20 pace_us=0",
        "generators.py 20 0",
        "closures.pl 20 0",
        "plain-static 20 0",
        "plain-static-pie 20 0",
        "plain-dynamic 20 0",
        "plain-fixed 20 0",
    ] {
        let output = host.exec(&Cmd::new(line.split(' ')))?;
        let out = output.out();
        let last = out.lines().last().unwrap_or_default();
        ensure!(last.starts_with("PASS"), "{line}: {out}{}", output.err());
    }
    Ok(())
}

fn console(lab: &Lab) -> Result<()> {
    let said = lab.a().console("echo $((6 * 7)) on $(cat /etc/hostname)")?;
    ensure!(said.contains("42 on a"), "{said}");
    Ok(())
}
