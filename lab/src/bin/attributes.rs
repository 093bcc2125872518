//! Sets what a process can set about itself to something unusual, writes all of
//! it down, and compares again and again.

use lab::victim::{raw, run, Args, Mix, Pace};
use nix::sys::stat::{umask, Mode};
use nix::unistd::{setgroups, setresgid, setresuid, Gid, Uid};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::process::ExitCode;

type Facts = BTreeMap<String, String>;

/// Lines of /proc/self/status that must not change.
const STATUS: [&str; 15] = [
    "Name",
    "Umask",
    "Uid",
    "Gid",
    "Groups",
    "Kthread",
    "NoNewPrivs",
    "Seccomp",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "Cpus_allowed",
    "THP_enabled",
];
/// prctl(2) options that are read as their result.
const READ: [(&str, i32); 7] = [
    ("dumpable", libc::PR_GET_DUMPABLE),
    ("keep capabilities", libc::PR_GET_KEEPCAPS),
    ("timer slack", libc::PR_GET_TIMERSLACK),
    ("securebits", libc::PR_GET_SECUREBITS),
    ("no new privileges", libc::PR_GET_NO_NEW_PRIVS),
    ("transparent huge pages off", libc::PR_GET_THP_DISABLE),
    ("machine check policy", libc::PR_MCE_KILL_GET),
];

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn arrange(user: bool) -> Result<(), String> {
    umask(Mode::from_bits_truncate(0o037));
    fs::write("/proc/self/comm", "odd name (1) R").map_err(text)?;
    fs::write("/proc/self/oom_score_adj", "321").map_err(text)?;
    raw::set_limit(libc::RLIMIT_NOFILE, 333, 777).map_err(text)?;
    raw::set_limit(libc::RLIMIT_CORE, 0, 4096).map_err(text)?;
    raw::set_limit(libc::RLIMIT_RTTIME, 5_000_000, 6_000_000).map_err(text)?;
    raw::set_nice(7).map_err(text)?;
    raw::set_policy(libc::SCHED_BATCH).map_err(text)?;
    raw::prctl(libc::PR_SET_TIMERSLACK, 77_777).map_err(text)?;
    raw::prctl(libc::PR_SET_CHILD_SUBREAPER, 1).map_err(text)?;
    raw::prctl(libc::PR_SET_THP_DISABLE, 1).map_err(text)?;
    raw::personality(Some(libc::ADDR_NO_RANDOMIZE as u32)).map_err(text)?;
    raw::prctl(libc::PR_CAPBSET_DROP, 22).map_err(text)?;
    // No setuid fixup, and locked that way; see capabilities(7).
    raw::prctl(libc::PR_SET_SECUREBITS, 0b1100).map_err(text)?;
    if user {
        raw::prctl(libc::PR_SET_KEEPCAPS, 1).map_err(text)?;
        setgroups(&[Gid::from_raw(4242), Gid::from_raw(7)]).map_err(text)?;
        let gid = Gid::from_raw;
        setresgid(gid(1001), gid(1002), gid(1003)).map_err(text)?;
        let uid = Uid::from_raw;
        setresuid(uid(1001), uid(1001), uid(1003)).map_err(text)?;
    }
    raw::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map_err(text)?;
    raw::prctl(libc::PR_SET_PDEATHSIG, libc::SIGWINCH as u64).map_err(text)?;
    raw::prctl(libc::PR_SET_DUMPABLE, 1).map_err(text)?;
    Ok(())
}

fn facts() -> Result<Facts, String> {
    let mut facts = Facts::new();
    let mut know = |name: &str, value: String| facts.insert(name.to_owned(), value);
    let status = fs::read_to_string("/proc/self/status").map_err(text)?;
    for line in status.lines() {
        if let Some((name, value)) = line.split_once(':') {
            if STATUS.contains(&name) {
                know(name, value.trim().to_owned());
            }
        }
    }
    for number in 0..16 {
        let limit = raw::limit(number).map_err(text)?;
        know(&format!("limit {number}"), format!("{limit:?}"));
    }
    for (name, option) in READ {
        know(name, format!("{:?}", raw::prctl(option, 0).map_err(text)?));
    }
    for (name, option) in [
        ("parent-death signal", libc::PR_GET_PDEATHSIG),
        ("subreaper", libc::PR_GET_CHILD_SUBREAPER),
    ] {
        know(name, format!("{}", raw::prctl_read(option).map_err(text)?));
    }
    for name in ["cmdline", "environ", "auxv", "comm", "oom_score_adj"] {
        let bytes = fs::read(format!("/proc/self/{name}")).map_err(text)?;
        let bytes = bytes.iter().map(|byte| format!("{byte:02x}"));
        know(name, bytes.collect());
    }
    for name in ["exe", "cwd", "root"] {
        let link = fs::read_link(format!("/proc/self/{name}")).map_err(text)?;
        know(name, link.display().to_string());
    }
    let stat = fs::read_to_string("/proc/self/stat").map_err(text)?;
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let fields = fields.split_whitespace().collect::<Vec<_>>();
    // Fields of proc_pid_stat(5), the first behind the name being number 3:
    // bounds of code, data, break, arguments and environment.
    for (name, number) in [("code", 26), ("data", 45), ("arguments", 48)] {
        let two = fields.get(number - 3..number - 1).unwrap_or_default();
        know(name, two.join("-"));
    }
    know("nice", format!("{:?}", raw::nice().map_err(text)?));
    know("policy", format!("{:?}", raw::policy().map_err(text)?));
    let personality = raw::personality(None).map_err(text)?;
    know("personality", format!("{personality:x}"));
    let robust = raw::robust_list().map_err(text)?;
    know("robust list", format!("{robust:x?}"));
    Ok(facts)
}

fn main() -> ExitCode {
    run(|| {
        let args = Args::new(&["lines", "pace_us", "as"])?;
        let pace = Pace::new(&args, 10_000)?;
        arrange(args.text("as") == Some("user"))?;
        let before = facts()?;
        let mut mix = Mix(1);
        let mut out = std::io::stdout();
        for number in 0..args.number("lines", 400)? {
            let now = facts()?;
            if now != before {
                let changed = before
                    .iter()
                    .filter(|(name, value)| now.get(*name).is_none_or(|found| found != *value));
                let changed = changed
                    .map(|(name, value)| format!("{name}: {value} -> {:?}; ", now.get(name)));
                return Err(changed.collect());
            }
            let line = format!("{number} {:016x}\n", mix.add(number));
            out.write_all(line.as_bytes()).map_err(text)?;
            pace.pass()?;
        }
        Ok(mix.0)
    })
}
