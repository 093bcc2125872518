//! A host that is a machine of its own.
//!
//! The kernel starts this program from the initial filesystem, where it finds
//! the modules, the sample programs and the machine's identity. It goes over to
//! the root disk, mounts, connects, and reaps; the agent is its child.

use super::{agent_command, mount_new, number_from, open_to_all, reap, settle_in_cgroup, Identity};
use crate::agent::{Agent, PROGRAMS, WORK};
use crate::sys;
use anyhow::{bail, Context, Result};
use nix::kmod::{finit_module, ModuleInitFlags};
use nix::mount::{mount, MsFlags};
use nix::sys::reboot::{reboot, RebootMode};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{chdir, chroot, sethostname};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Where the initial filesystem holds the identity, as JSON.
pub const IDENTITY: &str = "identity.json";
/// Where the initial filesystem holds modules, named by their order.
pub const MODULES: &str = "modules";
/// Where the initial filesystem holds the sample programs.
pub const SAMPLES: &str = "samples";
/// Where the initial filesystem holds pmig.
pub const PMIG: &str = "pmig";
/// The kernel argument that asks for nothing but a sign of life.
pub const PROBE: &str = "lab.probe";
/// What the console says when the machine is up.
pub const READY: &str = "lab: ready";
/// What the names of the agent's serial ports begin with.
pub const PORT: &str = "lab.";
/// The root disk.
const DISK: &str = "/dev/vda";

/// The machine's first process.
///
/// # Errors
/// Whatever keeps the machine from coming up.
pub fn init() -> Result<()> {
    mount_new("proc", "/proc", "")?;
    let words = fs::read_to_string("/proc/cmdline").context("read /proc/cmdline")?;
    if words.split_whitespace().any(|word| word == PROBE) {
        println!("{READY}");
        end();
    }
    mount_new("sysfs", "/sys", "")?;
    mount_new("devtmpfs", "/dev", "mode=755")?;
    load_modules()?;
    let identity = fs::read(Path::new("/").join(IDENTITY)).context("read the identity")?;
    let identity: Identity = serde_json::from_slice(&identity).context("read the identity")?;
    enter_disk()?;
    settle(&identity)?;
    // Held until the machine ends.
    let _event = sys::hold_perf_event().context("hold a perf event")?;
    start_processors()?;
    number_from(identity.last_pid)?;
    console()?;
    println!("{READY}");
    reap(&mut agent_command("machine-agent"), end)
}

/// Starts the processors that the kernel was told to leave for later.
fn start_processors() -> Result<()> {
    let directory = "/sys/devices/system/cpu";
    for entry in fs::read_dir(directory).with_context(|| format!("read {directory}"))? {
        // The first has no such file.
        let online = entry?.path().join("online");
        if online.exists() && fs::read_to_string(&online)?.trim() == "0" {
            fs::write(&online, "1").with_context(|| format!("write {}", online.display()))?;
        }
    }
    Ok(())
}

/// Ends the machine at once, without syncing.
pub fn end() {
    let _ = reboot(RebootMode::RB_POWER_OFF);
}

fn load_modules() -> Result<()> {
    let directory = Path::new("/").join(MODULES);
    let mut paths = fs::read_dir(&directory)
        .context("read the modules")?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<Vec<PathBuf>>>()?;
    paths.sort();
    for path in paths {
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        finit_module(&file, c"", ModuleInitFlags::empty())
            .with_context(|| format!("load {}", path.display()))?;
    }
    Ok(())
}

/// Makes the disk the root of everything, sample programs included.
fn enter_disk() -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !Path::new(DISK).exists() {
        if Instant::now() > deadline {
            bail!("{DISK} does not appear");
        }
        thread::sleep(Duration::from_millis(5));
    }
    let root = Path::new("/disk");
    fs::create_dir_all(root).context("create the mount point")?;
    mount(
        Some(DISK),
        root,
        Some("ext4"),
        MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("mount {DISK}"))?;
    let inside = |path: &str| root.join(path.trim_start_matches('/'));
    for path in [PROGRAMS, WORK, "/usr/local/bin"] {
        let path = inside(path);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
    }
    for entry in fs::read_dir(Path::new("/").join(SAMPLES)).context("read the samples")? {
        let entry = entry?;
        install(&entry.path(), &inside(PROGRAMS).join(entry.file_name()))?;
    }
    install(
        &Path::new("/").join(PMIG),
        &inside("/usr/local/bin").join(PMIG),
    )?;
    chdir(root).context("enter the disk")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .context("move the disk to the root")?;
    chroot(".").context("enter the disk")?;
    chdir("/").context("enter the disk")
}

/// Copies a program, unless a machine that was up before already did.
fn install(from: &Path, to: &Path) -> Result<()> {
    let size = |path: &Path| fs::metadata(path).map(|meta| meta.len()).ok();
    if size(from) != size(to) {
        fs::copy(from, to).with_context(|| format!("install {}", to.display()))?;
        fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

fn settle(identity: &Identity) -> Result<()> {
    mount_new("proc", "/proc", "")?;
    mount_new("sysfs", "/sys", "")?;
    mount_new("devtmpfs", "/dev", "mode=755")?;
    mount_new("devpts", "/dev/pts", "ptmxmode=666")?;
    for at in ["/dev/shm", "/tmp"] {
        mount_new("tmpfs", at, "mode=1777")?;
    }
    mount_new("tmpfs", "/run", "mode=755")?;
    mount_new("cgroup2", "/sys/fs/cgroup", "")?;
    settle_in_cgroup("/sys/fs/cgroup")?;
    for (link, to) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(to, link);
    }
    open_to_all(WORK)?;
    fs::write("/etc/hosts", &identity.hosts).context("write /etc/hosts")?;
    sethostname(&identity.name).context("set the host name")?;
    fs::write("/etc/hostname", format!("{}\n", identity.name)).context("write /etc/hostname")?;
    let line = format!(
        "ip link set lo up && ip addr add {}/24 dev eth0 && ip link set eth0 up",
        identity.address
    );
    let status = Command::new("sh")
        .args(["-c", &line])
        .env("PATH", crate::agent::path())
        .status()
        .context("start sh")?;
    if !status.success() {
        bail!("configure the link: {status}");
    }
    Ok(())
}

/// Keeps a shell on the console.
fn console() -> Result<()> {
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/ttyS0")
        .context("open the console")?;
    let mut shell = Command::new("setsid");
    shell
        .args(["--ctty", "sh", "-c", "while :; do sh -i; sleep 0.2; done"])
        .env("PATH", crate::agent::path())
        .env("HOME", "/root")
        .env("PS1", "lab# ")
        .stdin(Stdio::from(port.try_clone()?))
        .stdout(Stdio::from(port.try_clone()?))
        .stderr(Stdio::from(port));
    shell.spawn().context("start a shell on the console")?;
    Ok(())
}

/// The agent: answers on the serial ports that the lab gave to the machine.
///
/// # Errors
/// There are none.
pub fn agent() -> Result<()> {
    // Reading from a port returns at once while nobody is connected to it, so
    // each thread sleeps until the kernel signals that somebody may be.
    let signals = SigSet::from(Signal::SIGIO);
    signals.thread_block().context("block SIGIO")?;
    let agent = Agent::new(end);
    let ports = ports()?;
    if ports.is_empty() {
        bail!("the machine has no port for the agent");
    }
    let bell = Arc::new((Mutex::new(0u64), Condvar::new()));
    for path in ports {
        let (agent, bell) = (agent.clone(), Arc::clone(&bell));
        thread::spawn(move || serve_port(&agent, &path, &bell));
    }
    loop {
        signals.wait().context("wait for SIGIO")?;
        let mut count = bell.0.lock().unwrap_or_else(PoisonError::into_inner);
        *count += 1;
        bell.1.notify_all();
    }
}

fn serve_port(agent: &Agent, path: &Path, bell: &(Mutex<u64>, Condvar)) {
    let mut heard = 0;
    loop {
        // Opened anew for each conversation: what is left unread of the last is
        // dropped by the kernel when the port is closed. Only an open port
        // signals that somebody has come.
        let port = OpenOptions::new().read(true).write(true).open(path);
        let port = port.and_then(|port| sys::signal_events(&port).map(|()| port));
        loop {
            let both = port.as_ref().ok();
            let both = both.and_then(|port| Some((port.try_clone().ok()?, port.try_clone().ok()?)));
            if both.is_some_and(|(port, out)| agent.serve(port, Box::new(out))) {
                break;
            }
            let count = bell.0.lock().unwrap_or_else(PoisonError::into_inner);
            let limit = Duration::from_secs(2);
            let wait = bell.1.wait_timeout_while(count, limit, |now| *now == heard);
            heard = *wait.unwrap_or_else(PoisonError::into_inner).0;
            if port.is_err() {
                break;
            }
        }
    }
}

fn ports() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let class = "/sys/class/virtio-ports";
    for entry in fs::read_dir(class).with_context(|| format!("read {class}"))? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.starts_with(PORT) {
            found.push(Path::new("/dev").join(entry.file_name()));
        }
    }
    found.sort();
    Ok(found)
}
