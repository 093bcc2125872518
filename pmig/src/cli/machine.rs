//! What this machine can do of what a migration needs.

use std::fs::{self, File};

use nix::sys::utsname::uname;
use pmig::hold;
use pmig::journal::{run_dir, state_dir, Folder};
use pmig::state::memory::Tracking;
use pmig::sys::{kmod, pidfd};
use serde::Serialize;

/// One thing a migration needs or profits from.
#[derive(Debug, Clone, Serialize)]
pub struct Capability {
    pub name: &'static str,
    pub have: bool,
    /// Nothing can be moved without it.
    pub needed: bool,
    /// What was found, or what is wrong.
    pub detail: String,
    /// What to do about it; empty where it is there.
    pub remedy: String,
}

/// All of them, in the order a person would put them right.
pub fn capabilities() -> Vec<Capability> {
    vec![
        kernel(),
        privileges(),
        tool(
            "cgroup v2 freezer",
            true,
            hold::probe().map_err(|e| e.to_string()),
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified, and run pmig where it may make cgroups",
        ),
        tool(
            "pidfd_getfd",
            true,
            getfd(),
            "needs Linux 5.6, and a seccomp filter that lets it through",
        ),
        tool(
            "time namespaces",
            true,
            found("/proc/self/ns/time"),
            "needs a kernel with CONFIG_TIME_NS",
        ),
        tool(
            "chosen PIDs",
            true,
            capability(40, "CAP_CHECKPOINT_RESTORE").or_else(|_| capability(21, "CAP_SYS_ADMIN")),
            "run pmig as root",
        ),
        tool(
            "records",
            true,
            folder(&state_dir()).and_then(|s| Ok(format!("{s}, {}", folder(&run_dir())?))),
            "make these directories writable for pmig alone (mode 0700), or set PMIG_STATE_DIR and PMIG_RUN_DIR",
        ),
        tool(
            "dirty tracking",
            false,
            tracking(),
            "without it the program stands still while all of its memory is copied; needs Linux 6.7 with CONFIG_USERFAULTFD, or CONFIG_MEM_SOFT_DIRTY",
        ),
        tool(
            "kernel module",
            false,
            module(),
            "without it ptrace reads the process control block, more slowly, and a few rare settings go unseen; to have it, load pmig.ko",
        ),
    ]
}

fn tool(
    name: &'static str,
    needed: bool,
    found: Result<String, String>,
    remedy: &str,
) -> Capability {
    Capability {
        name,
        have: found.is_ok(),
        needed,
        remedy: if found.is_ok() {
            String::new()
        } else {
            remedy.into()
        },
        detail: found.unwrap_or_else(|e| e),
    }
}

fn kernel() -> Capability {
    let release = release();
    let new_enough = release_of(&release).is_some_and(|r| r >= (5, 14));
    let found = match (cfg!(target_arch = "x86_64"), new_enough) {
        (true, true) => Ok(release),
        (true, false) => Err(format!("Linux {release}")),
        (false, _) => Err("not an x86-64 machine".into()),
    };
    tool(
        "kernel",
        true,
        found,
        "needs Linux 5.14 (cgroup.kill) on x86-64, better 6.7 (dirty tracking)",
    )
}

/// The kernel's release, as uname(2) gives it.
pub fn release() -> String {
    uname().map_or_else(
        |e| e.to_string(),
        |u| u.release().to_string_lossy().into_owned(),
    )
}

/// This machine's name.
pub fn hostname() -> String {
    uname().map_or_else(
        |_| "this machine".into(),
        |u| u.nodename().to_string_lossy().into_owned(),
    )
}

fn release_of(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The capabilities(7) a migration uses at one end or the other.
const NEEDED: [(u32, &str); 7] = [
    (1, "CAP_DAC_OVERRIDE"),
    (5, "CAP_KILL"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
    (25, "CAP_SYS_TIME"),
];

fn privileges() -> Capability {
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(bit, name)| capability(*bit, name).is_err())
        .map(|(_, name)| *name)
        .collect();
    let found = if missing.is_empty() {
        Ok("all that are used".into())
    } else {
        Err(format!("{} missing", missing.join(", ")))
    };
    tool("privileges", true, found, "run pmig as root")
}

fn capability(bit: u32, name: &str) -> Result<String, String> {
    let status = fs::read_to_string("/proc/self/status").map_err(|e| e.to_string())?;
    let have = status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
        .is_some_and(|set| set & (1 << bit) != 0);
    if have {
        Ok(name.into())
    } else {
        Err(format!("{name} missing"))
    }
}

fn found(path: &str) -> Result<String, String> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(path.into()),
        Err(_) => Err(format!("no {path}")),
    }
}

fn module() -> Result<String, String> {
    match kmod::Kmod::open() {
        Ok(Some(module)) => Ok(format!("{}, version {}", kmod::DEVICE, module.version())),
        Ok(None) => Err(format!("no {}", kmod::DEVICE)),
        Err(e) => Err(format!("{} cannot be used: {e}", kmod::DEVICE)),
    }
}

fn folder(path: &std::path::Path) -> Result<String, String> {
    Folder::at(path)
        .map(|f| f.path().display().to_string())
        .map_err(|e| e.to_string())
}

fn getfd() -> Result<String, String> {
    use std::os::fd::{AsFd, AsRawFd};
    let file = File::open("/dev/null").map_err(|e| e.to_string())?;
    pidfd::open(std::process::id() as i32)
        .and_then(|me| pidfd::get(me.as_fd(), file.as_raw_fd()))
        .map(|_| "works".into())
        .map_err(|e| e.to_string())
}

/// All means that are there; without any but stop-and-copy, why.
fn tracking() -> Result<String, String> {
    let all = Tracking::ALL.into_iter().filter(|t| *t != Tracking::None);
    let (mut there, mut why) = (Vec::new(), Vec::new());
    for tracking in all {
        match tracking.probe() {
            Ok(()) => there.push(tracking.name()),
            Err(obstacle) => why.push(obstacle.why),
        }
    }
    match there.is_empty() {
        true => Err(why.join("; ")),
        false => Ok(there.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_as_numbers() {
        assert_eq!(release_of("6.12.117+deb13-cloud-amd64"), Some((6, 12)));
        assert_eq!(release_of("5.4"), Some((5, 4)));
        assert_eq!(release_of("Plan 9"), None);
    }

    #[test]
    fn every_lack_comes_with_a_remedy() {
        for c in capabilities() {
            assert_eq!(c.have, c.remedy.is_empty(), "{c:?}");
            assert!(!c.detail.is_empty(), "{c:?}");
        }
    }
}
