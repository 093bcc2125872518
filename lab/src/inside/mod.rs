//! What runs as a host's first process, in a namespace or in a machine.

pub mod machine;
pub mod namespace;

use crate::sys;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{mount, MsFlags};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{exit, Command};

/// What a host must know of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// Its name.
    pub name: String,
    /// Its address on the link between the hosts.
    pub address: String,
    /// Contents of its /etc/hosts.
    pub hosts: String,
    /// The PID after which its own begin.
    pub last_pid: u32,
}

fn mount_new(kind: &str, at: &str, options: &str) -> Result<()> {
    fs::create_dir_all(at).with_context(|| format!("create {at}"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let flags = if kind == "tmpfs" || kind == "devtmpfs" || kind == "devpts" {
        MsFlags::MS_NOSUID
    } else {
        flags
    };
    mount(Some(kind), at, Some(kind), flags, Some(options))
        .with_context(|| format!("mount {kind} at {at}"))
}

fn bind(from: &Path, at: &Path) -> Result<()> {
    mount(Some(from), at, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("bind {} at {}", from.display(), at.display()))
}

/// Lets programs of every user write to a directory.
fn open_to_all(path: &str) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o1777))
        .with_context(|| format!("open {path} to all"))
}

/// Lets the next processes have PIDs above `last`, so that two hosts do not
/// hand out the same ones.
fn number_from(last: u32) -> Result<()> {
    let path = "/proc/sys/kernel/ns_last_pid";
    fs::write(path, last.to_string()).with_context(|| format!("write {last} to {path}"))
}

/// Puts this process into a leaf below the cgroup root and opens every
/// controller to the root's other children: a cgroup with controllers open to
/// its children may hold no process itself, see cgroups(7).
fn settle_in_cgroup(root: &str) -> Result<()> {
    let leaf = format!("{root}/lab");
    fs::create_dir_all(&leaf).with_context(|| format!("create {leaf}"))?;
    fs::write(format!("{leaf}/cgroup.procs"), "0").with_context(|| format!("enter {leaf}"))?;
    let offered = fs::read_to_string(format!("{root}/cgroup.controllers")).unwrap_or_default();
    for controller in offered.split_whitespace() {
        // A controller in use by cgroup v1 cannot be opened; nor need it be.
        let _ = fs::write(
            format!("{root}/cgroup.subtree_control"),
            format!("+{controller}"),
        );
    }
    Ok(())
}

/// Starts the agent and reaps whatever ends, for ever; ends the host by `end`
/// when the agent is gone.
fn reap(agent: &mut Command, end: impl Fn()) -> Result<()> {
    let agent = agent.spawn().context("start the agent")?;
    let agent = Pid::from_raw(agent.id() as i32);
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) if pid == agent => {
                end();
                exit(0);
            }
            // EINVAL: it was reaped, but a real-time signal ended it, which nix
            // has no word for.
            Ok(_) | Err(Errno::EINTR | Errno::EINVAL) => {}
            Err(e) => return Err(e).context("wait for children"),
        }
    }
}

/// The agent's own arguments, as its first process starts it.
fn agent_command(role: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(role);
    sys::in_new_session(&mut command);
    command
}
