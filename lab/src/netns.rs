//! Hosts made of namespaces on this machine's own kernel.

use crate::build::Built;
use crate::host::{Host, Make};
use crate::inside::namespace::{remove_cgroup, Spec};
use crate::inside::Identity;
use crate::owner::{leftovers, Owner, PREFIX};
use crate::session::Session;
use crate::wire::Request;
use anyhow::{bail, ensure, Context, Result};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A host made of namespaces.
#[derive(Debug)]
pub struct Netns {
    name: String,
    socket: PathBuf,
    cgroup: PathBuf,
    launcher: Owner,
    // The host ends with this conversation; none if it is to outlive us.
    hold: Mutex<Option<Session>>,
    child: Mutex<Option<Child>>,
}

/// Where cgroup v2 is mounted on this machine; mounts it where it is not.
///
/// # Errors
/// It is not mounted and cannot be.
fn cgroup_mount(directory: &Path) -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    let mounted = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let at = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(at))
    });
    if let Some(at) = mounted {
        return Ok(at);
    }
    let at = directory.join("cgroup");
    fs::create_dir_all(&at).with_context(|| format!("create {}", at.display()))?;
    nix::mount::mount(
        Some("cgroup2"),
        &at,
        Some("cgroup2"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("mount cgroup2 at {}", at.display()))?;
    Ok(at)
}

impl Netns {
    /// Starts one host; its files of passage go to `directory`.
    ///
    /// # Errors
    /// This process is not root, or the host cannot be built.
    pub fn start(built: &Built, directory: &Path, tag: &str, identity: Identity) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "namespaces with devices and cgroups of their own need root"
        );
        let mounted = cgroup_mount(&crate::build::directory()?)?;
        for leftover in leftovers(&mounted) {
            remove_cgroup(&leftover);
        }
        let name = identity.name.clone();
        let cgroup = mounted.join(format!("{PREFIX}{tag}.{name}"));
        remove_cgroup(&cgroup);
        let socket = directory.join(format!("{name}.sock"));
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("listen at {}", socket.display()))?;
        let log = directory.join(format!("{name}.log"));
        let mut programs = built.samples();
        programs.push(built.pmig());
        let spec = Spec {
            identity,
            cgroup: cgroup.clone(),
            cgroup_mount: mounted,
            programs,
        };
        let mut launcher = Command::new(built.agent());
        launcher
            .arg("namespace")
            .arg(serde_json::to_string(&spec)?)
            .stdin(OwnedFd::from(listener))
            .stdout(Stdio::null())
            .stderr(File::create(&log).with_context(|| format!("create {}", log.display()))?);
        crate::sys::in_new_session(&mut launcher);
        let child = launcher.spawn().context("start a host")?;
        let launcher = Owner::of(child.id()).context("the host ended at once")?;
        launcher.record(directory, &name)?;
        let host = Self {
            name,
            socket,
            cgroup,
            launcher,
            hold: Mutex::default(),
            child: Mutex::new(Some(child)),
        };
        let mut session = host
            .session(Instant::now() + Duration::from_secs(10))
            .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
        session.tell(&Request::Hold)?;
        host.lock_hold(Some(session));
        Ok(host)
    }

    /// A host that another process started to stay.
    ///
    /// # Errors
    /// No cgroup v2 is mounted.
    pub fn attach(name: &str, directory: &Path, tag: &str, launcher: Owner) -> Result<Self> {
        let mounted = cgroup_mount(&crate::build::directory()?)?;
        Ok(Self {
            name: name.into(),
            socket: directory.join(format!("{name}.sock")),
            cgroup: mounted.join(format!("{PREFIX}{tag}.{name}")),
            launcher,
            hold: Mutex::default(),
            child: Mutex::default(),
        })
    }

    /// Lets the host outlive this value and this process.
    ///
    /// # Errors
    /// The host is gone.
    pub fn stay(&self) -> Result<()> {
        if let Some(mut session) = self.lock_hold(None) {
            session.tell(&Request::Free)?;
        }
        Ok(())
    }

    /// The process at the outside of the host.
    pub fn launcher(&self) -> Owner {
        self.launcher
    }

    fn lock_hold(&self, new: Option<Session>) -> Option<Session> {
        let mut hold = self.hold.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut hold, new)
    }

    fn join(&self) {
        let child = self.child.lock().map(|mut child| child.take());
        if let Ok(Some(mut child)) = child {
            let _ = child.wait();
        }
    }

    /// Joins two hosts by a pair of virtual network devices.
    ///
    /// # Errors
    /// Those of ip(8).
    pub fn connect(a: &Self, b: &Self) -> Result<()> {
        let output = Command::new("nsenter")
            .arg(format!("--net=/proc/{}/ns/net", a.launcher.pid))
            .args(["ip", "link", "add", "eth0", "type", "veth"])
            .args(["peer", "name", "eth0", "netns"])
            .arg(b.launcher.pid.to_string())
            .output()
            .context("start nsenter")?;
        ensure!(
            output.status.success(),
            "join the hosts: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Gives the host's side of the link its address.
    ///
    /// # Errors
    /// Those of ip(8).
    pub fn configure(&self, address: &str) -> Result<()> {
        self.sh(&format!(
            "ip link set lo up && ip addr add {address}/24 dev eth0 && ip link set eth0 up"
        ))
        .map(drop)
    }
}

impl Host for Netns {
    fn name(&self) -> &str {
        &self.name
    }

    fn make(&self) -> Make {
        Make::Netns
    }

    fn session(&self, deadline: Instant) -> Result<Session> {
        Session::open(&self.socket, None, deadline)
    }

    fn crash(&self) -> Result<()> {
        if self.launcher.alive() {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(self.launcher.pid)?);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)
                .with_context(|| format!("kill {}", self.name))?;
        }
        self.join();
        remove_cgroup(&self.cgroup);
        Ok(())
    }

    fn restart(&self) -> Result<()> {
        bail!("a host made of namespaces leaves no disk to start from")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Some(session) = self.lock_hold(None) {
            drop(session);
            self.join();
        }
    }
}
