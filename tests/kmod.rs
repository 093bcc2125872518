//! The kernel module on live processes of a machine, by `kmod_hammer`, and what
//! the kernel's log says of it.

use anyhow::{bail, ensure, Context, Result};
use lab::harness::{main as run, Trial};
use lab::{Cmd, Host, Lab, Make};
use std::process::ExitCode;

/// What a healthy kernel never says.
const ALARMS: [&str; 11] = [
    "WARNING:",
    "BUG:",
    "Oops",
    "kernel BUG",
    "Call Trace",
    "unable to handle",
    "refcount_t:",
    "corruption",
    "Bad page",
    "stall",
    "lockup",
];

/// Each claim and the hammer's words that try it.
const CLAIMS: [(&str, &[&str]); 4] = [
    ("a_restored_process_goes_on_where_it_was", &["roundtrip"]),
    ("every_field_at_its_edges_does_no_harm", &["edges"]),
    (
        "ten_thousand_mutations_do_no_harm",
        &["mutate", "10000", "20241"],
    ),
    (
        "a_minute_of_freeze_stop_kill_and_respawn_does_no_harm",
        &["stress", "60"],
    ),
];

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for (name, words) in CLAIMS {
        let body = move |lab: &Lab| watched(lab.a(), || hammer(lab.a(), words));
        trials.push(Trial::new(Make::Vm, format!("kmod::{name}"), body).bare());
    }
    let name = "kmod::the_module_goes_and_comes_again";
    trials.push(Trial::new(Make::Vm, name, |lab| reload(lab.a())).bare());
    run(trials)
}

/// Bits of the kernel's taint that say something has gone wrong: D for an
/// oops, W for a warning.
fn tainted(host: &dyn Host) -> Result<u64> {
    let taint: u64 = host.sh("cat /proc/sys/kernel/tainted")?.trim().parse()?;
    Ok(taint & (1 << 7 | 1 << 9))
}

/// Runs `work`, and fails if the kernel complained meanwhile.
fn watched(host: &dyn Host, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let mark = format!("kmod test {}", std::process::id());
    ensure!(tainted(host)? == 0, "the kernel was tainted before");
    host.sh(&format!("echo '{mark}' > /dev/kmsg"))?;
    let result = work();
    let log = host.sh("dmesg").context("read the kernel's log")?;
    let since = log.rsplit_once(&mark).map_or(&log[..], |(_, since)| since);
    for line in since.lines() {
        if ALARMS.iter().any(|alarm| line.contains(alarm)) {
            bail!("the kernel said: {line}\n{since}");
        }
    }
    ensure!(tainted(host)? == 0, "the kernel is tainted");
    result
}

fn hammer(host: &dyn Host, words: &[&str]) -> Result<()> {
    let mut line = vec!["kmod_hammer"];
    line.extend(words);
    host.exec(&Cmd::new(line))?.ok().map(drop)
}

/// Nothing it did keeps the module in.
fn reload(host: &dyn Host) -> Result<()> {
    watched(host, || {
        hammer(host, &["roundtrip"])?;
        host.sh("rmmod pmig && test ! -e /dev/pmig && insmod /run/pmig.ko")?;
        host.sh("stat -c %A /dev/pmig | grep -qx crw-------")?;
        hammer(host, &["roundtrip"])
    })
}
