//! A host made of namespaces on this machine's own kernel.
//!
//! Three processes: the launcher, which enters the namespaces and tidies up
//! after them; their first process, which mounts and reaps; and the agent.

use super::{
    agent_command, bind, mount_new, number_from, open_to_all, reap, settle_in_cgroup, Identity,
};
use crate::agent::{Agent, PROGRAMS, WORK};
use crate::sys;
use anyhow::{bail, Context, Result};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::unistd::sethostname;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{exit, Command};
use std::thread;

/// How the launcher is told what to build: JSON in its one argument.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    pub identity: Identity,
    /// The host's cgroup, a directory of a cgroup v2 mount, not yet made.
    pub cgroup: PathBuf,
    /// Where that cgroup v2 is mounted.
    pub cgroup_mount: PathBuf,
    /// Programs to show in [`PROGRAMS`].
    pub programs: Vec<PathBuf>,
}

/// Where the host finds its cgroups.
const CGROUP: &str = "/sys/fs/cgroup";

/// Enters new namespaces and waits until their first process has ended.
///
/// # Errors
/// Whatever keeps the host from being built.
pub fn launch(spec: &str) -> Result<()> {
    sys::hand_on_nothing().context("close what was inherited")?;
    let parsed: Spec = serde_json::from_str(spec).context("read the host's description")?;
    let home = own_cgroup(&parsed.cgroup_mount)?;
    fs::create_dir_all(&parsed.cgroup)
        .with_context(|| format!("create {}", parsed.cgroup.display()))?;
    enter(&parsed.cgroup)?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWCGROUP
            | CloneFlags::CLONE_NEWPID,
    )
    .context("enter new namespaces")?;
    let mut first = Command::new("/proc/self/exe");
    first.args(["namespace-init", spec]);
    sys::dies_with_parent(&mut first);
    let status = first.status().context("start the first process")?;
    let _ = enter(&home);
    remove_cgroup(&parsed.cgroup);
    exit(status.code().unwrap_or(1));
}

fn enter(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0")
        .with_context(|| format!("enter {}", cgroup.display()))
}

fn own_cgroup(mounted: &Path) -> Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").context("read /proc/self/cgroup")?;
    let path = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .context("this process is in no cgroup v2")?;
    Ok(mounted.join(path))
}

/// Removes a cgroup and those below it, which must hold no process any more.
pub fn remove_cgroup(path: &Path) {
    let Ok(entries) = fs::read_dir(path) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    // A killed process leaves its cgroup a moment after it is gone from sight.
    for _ in 0..50 {
        if fs::remove_dir(path).is_ok() || !path.exists() {
            return;
        }
        thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// The first process: mounts what is the host's own, then reaps.
///
/// # Errors
/// Whatever keeps the host from being built.
pub fn init(spec: &str) -> Result<()> {
    let spec: Spec = serde_json::from_str(spec).context("read the host's description")?;
    unshare(CloneFlags::CLONE_NEWNS).context("enter a mount namespace")?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_PRIVATE | MsFlags::MS_REC,
        None::<&str>,
    )
    .context("make mounts private")?;
    // What is about to be hidden by the host's own mounts stays reachable here.
    let programs = spec
        .programs
        .iter()
        .map(|path| File::open(path).with_context(|| format!("open {}", path.display())))
        .collect::<Result<Vec<_>>>()?;
    for at in ["/srv", "/run"] {
        mount_new("tmpfs", at, "mode=755")?;
    }
    for at in ["/tmp", "/dev/shm"] {
        mount_new("tmpfs", at, "mode=1777")?;
    }
    mount_new("tmpfs", "/var/lib/pmig", "mode=700")?;
    mount_new("proc", "/proc", "")?;
    while umount2(CGROUP, MntFlags::MNT_DETACH).is_ok() {}
    mount_new("cgroup2", CGROUP, "")?;
    settle_in_cgroup(CGROUP)?;
    for directory in [WORK, PROGRAMS] {
        fs::create_dir_all(directory).with_context(|| format!("create {directory}"))?;
    }
    open_to_all(WORK)?;
    for (path, file) in spec.programs.iter().zip(&programs) {
        let name = path.file_name().context("a program without a name")?;
        let at = Path::new(PROGRAMS).join(name);
        File::create(&at).with_context(|| format!("create {}", at.display()))?;
        let open = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        bind(&open, &at)?;
    }
    fs::write("/run/hosts", &spec.identity.hosts).context("write the hosts file")?;
    bind(Path::new("/run/hosts"), Path::new("/etc/hosts"))?;
    sethostname(&spec.identity.name).context("set the host name")?;
    number_from(spec.identity.last_pid)?;
    reap(&mut agent_command("namespace-agent"), || {})
}

/// The agent: answers on the listening socket that is its standard input.
///
/// # Errors
/// A standard input that is no listening socket.
pub fn agent() -> Result<()> {
    let listener = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("take the socket")?;
    let listener = UnixListener::from(listener);
    let agent = Agent::new(|| exit(0));
    for stream in listener.incoming() {
        let stream = stream.context("accept")?;
        let agent = agent.clone();
        thread::spawn(move || {
            if let Ok(out) = stream.try_clone() {
                agent.serve(stream, Box::new(out));
            }
        });
    }
    bail!("the socket ended")
}
