//! Hosts that are QEMU machines.

use crate::build::{self, Built};
use crate::host::{Host, Make};
use crate::image::{self, Entry, Image};
use crate::inside::machine::{IDENTITY, MODULES, PMIG, PORT, PROBE, READY, SAMPLES};
use crate::inside::Identity;
use crate::owner::Owner;
use crate::session::Session;
use crate::sys;
use crate::wire::Request;
use anyhow::{bail, ensure, Context, Result};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
/// How many conversations a machine can have at once.
const PORTS: usize = 12;
/// How long a machine may take to come up.
const BOOT: Duration = Duration::from_secs(120);

/// How QEMU runs a guest on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accel {
    /// In hardware.
    Kvm,
    /// By translating its code.
    Tcg,
}

/// A machine as it is started, and started again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    pub name: String,
    /// Where its sockets, disk and console's log lie.
    pub directory: PathBuf,
    pub kernel: PathBuf,
    pub initial: PathBuf,
    pub disk: PathBuf,
    /// Whether it is the end of the link that the other connects to.
    pub listens: bool,
    pub accel: Accel,
    pub memory_mb: u32,
    pub cpus: u32,
}

/// A host that is a QEMU machine.
#[derive(Debug)]
pub struct Vm {
    machine: Machine,
    owner: Mutex<Owner>,
    // The host ends with this conversation; none if it is to outlive us.
    hold: Mutex<Option<Session>>,
    child: Mutex<Option<Child>>,
    stays: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn base(accel: Accel) -> Command {
    let mut command = Command::new(QEMU);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    // A kernel that panics ends its machine: one that came up again unasked
    // would leave every conversation with it waiting for ever.
    command.arg("-no-reboot");
    command.args(match accel {
        Accel::Kvm => ["-machine", "q35", "-accel", "kvm", "-cpu", "host"],
        Accel::Tcg => [
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            TCG_CPU,
        ],
    });
    command
}

/// Everything the emulator has, but without the feature for whose sake the
/// kernel and programs copy and clear memory by `rep movsb` and `rep stosb`:
/// a processor does that by lines of its cache, the emulator byte by byte. And
/// without a fifth level of page tables, which it would walk by itself after each
/// switch to another process.
const TCG_CPU: &str = "max,erms=off,la57=off";

/// For guests whose code is translated. That is done once for each address, so
/// that at random ones each start of a program would begin with cold code; a
/// processor's caches know code by where it lies in memory. And as long as
/// the kernel changes its own code, while it boots, one processor is enough: with
/// more the emulator now and then lets it fall over. Its first process starts
/// the others.
const TCG_ARGUMENTS: &str = "norandmaps maxcpus=1";

const ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nowatchdog \
    random.trust_cpu=on rdinit=/init net.ifnames=0";

impl Machine {
    fn file(&self, kind: &str) -> PathBuf {
        self.directory.join(format!("{}.{kind}", self.name))
    }

    /// Where QEMU keeps what the console said.
    pub fn console_log(&self) -> PathBuf {
        self.file("console.log")
    }

    /// The socket behind which the console is.
    pub fn console(&self) -> PathBuf {
        self.file("console")
    }

    fn link(&self) -> PathBuf {
        self.directory.join("link")
    }

    fn arguments(&self) -> String {
        match self.accel {
            Accel::Kvm => ARGUMENTS.into(),
            Accel::Tcg => format!("{ARGUMENTS} {TCG_ARGUMENTS}"),
        }
    }

    fn command(&self) -> Command {
        let mut command = base(self.accel);
        let text = |path: PathBuf| path.display().to_string();
        command
            .args(["-m", &self.memory_mb.to_string()])
            .args(["-smp", &self.cpus.to_string()])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initial)
            .args(["-append", &self.arguments()]);
        command.args([
            "-drive",
            &format!(
                "if=none,id=disk,format=raw,cache=unsafe,file={}",
                self.disk.display()
            ),
            "-device",
            "virtio-blk-pci,drive=disk",
            "-chardev",
            &format!(
                "socket,id=console,server=on,wait=off,path={},logfile={}",
                text(self.console()),
                text(self.console_log())
            ),
            "-serial",
            "chardev:console",
        ]);
        let last = self.name.bytes().last().unwrap_or(0);
        command.args([
            "-netdev",
            &format!(
                "stream,id=link,addr.type=unix,addr.path={},server={}",
                text(self.link()),
                if self.listens { "on" } else { "off" }
            ),
            "-device",
            &format!("virtio-net-pci,netdev=link,romfile=,mac=52:54:00:6c:62:{last:02x}"),
            "-device",
            "virtio-serial-pci,max_ports=16",
        ]);
        for port in 0..PORTS {
            command.args([
                "-chardev",
                &format!(
                    "socket,id=port{port},server=on,wait=off,path={}",
                    text(self.file(&port.to_string()))
                ),
                "-device",
                &format!("virtserialport,chardev=port{port},name={PORT}{port}"),
            ]);
        }
        command
    }

    fn start(&self) -> Result<(Child, Owner)> {
        let log = self.file("qemu.log");
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(&log).with_context(|| format!("create {}", log.display()))?);
        sys::in_new_session(&mut command);
        let child = command.spawn().with_context(|| format!("start {QEMU}"))?;
        let owner = Owner::of(child.id()).context("QEMU ended at once")?;
        owner.record(&self.directory, &self.name)?;
        if self.listens {
            let deadline = Instant::now() + Duration::from_secs(20);
            while !self.link().exists() && owner.alive() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(5));
            }
        }
        Ok((child, owner))
    }

    /// Why the machine does not answer, as far as its logs tell.
    fn trouble(&self) -> String {
        let tail = |path: PathBuf| {
            let text = fs::read(path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines = text.lines().collect::<Vec<_>>();
            lines[lines.len().saturating_sub(80)..].join("\n")
        };
        format!(
            "{}\n{}",
            tail(self.file("qemu.log")),
            tail(self.console_log())
        )
    }
}

/// How guests run here. That /dev/kvm opens is not enough: on some machines no
/// guest ever starts, so one is tried.
pub fn accel(image: &Image, initial: &Path) -> Accel {
    static FOUND: OnceLock<Accel> = OnceLock::new();
    *FOUND.get_or_init(|| {
        if kvm_boots(image, initial).unwrap_or(false) {
            Accel::Kvm
        } else {
            Accel::Tcg
        }
    })
}

fn kvm_boots(image: &Image, initial: &Path) -> Result<bool> {
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let hardware = cpus
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split(' ').any(|flag| flag == "vmx" || flag == "svm"));
    let opens = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if !hardware || opens.is_err() {
        return Ok(false);
    }
    let mut command = base(Accel::Kvm);
    command
        .args(["-m", "512", "-serial", "stdio", "-kernel"])
        .arg(image.kernel())
        .arg("-initrd")
        .arg(initial)
        .args(["-append", &format!("{ARGUMENTS} {PROBE}")]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(15);
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
        }
        thread::sleep(Duration::from_millis(50));
    }
    let mut said = String::new();
    if let Some(mut out) = child.stdout.take() {
        std::io::Read::read_to_string(&mut out, &mut said)?;
    }
    Ok(said.contains(READY))
}

/// Writes the initial filesystem of one machine.
fn write_initial(image: &Image, built: &Built, identity: &Identity, to: &Path) -> Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
    let mut entries = vec![
        Entry::file("init", 0o755, read(&built.agent())?),
        Entry::file(IDENTITY, 0o644, serde_json::to_vec(identity)?),
        Entry::file(PMIG, 0o755, read(&built.pmig())?),
        Entry::directory(MODULES),
        Entry::directory(SAMPLES),
        Entry::directory("dev"),
    ];
    for (index, path) in image.modules()?.iter().enumerate() {
        let name = format!("{MODULES}/{index:02}.ko");
        entries.push(Entry::file(&name, 0o644, read(path)?));
    }
    for path in built.samples() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{SAMPLES}/{name}");
        entries.push(Entry::file(&name, 0o755, read(&path)?));
    }
    image::write_initial(to, &entries)
}

/// Everything that machines are made from.
#[derive(Debug)]
pub struct Parts {
    pub image: Image,
    pub built: Built,
    pub module: Option<PathBuf>,
}

impl Parts {
    /// Builds or finds them; `say` is told what takes long.
    ///
    /// # Errors
    /// A tool that is missing or fails.
    pub fn get(say: &dyn Fn(&str)) -> Result<Self> {
        crate::tools::need(&[QEMU], say)?;
        say("building pmig and the sample programs");
        let built = build::build()?.stripped()?;
        let image = Image::get(say)?;
        let module = image::module(&image, say)?;
        Ok(Self {
            image,
            built,
            module,
        })
    }
}

impl Vm {
    /// Starts one machine with a disk of its own, and does not wait for it.
    ///
    /// # Errors
    /// QEMU does not start, or no room for the disk.
    pub fn start(
        parts: &Parts,
        directory: &Path,
        disks: &Path,
        identity: &Identity,
        cpus: u32,
    ) -> Result<Self> {
        let name = identity.name.clone();
        let disk = disks.join(format!("{name}.disk"));
        let _ = fs::remove_file(&disk);
        let mut copy = Command::new("cp");
        copy.args(["--sparse=always", "--reflink=auto"])
            .arg(parts.image.disk())
            .arg(&disk);
        image::quietly(&mut copy, "copy the disk")?;
        let initial = disks.join(format!("{name}.initial"));
        write_initial(&parts.image, &parts.built, identity, &initial)?;
        let machine = Machine {
            listens: name == crate::pair::NAMES[0],
            accel: accel(&parts.image, &initial),
            kernel: parts.image.kernel(),
            directory: directory.to_owned(),
            memory_mb: 1024,
            cpus,
            name,
            initial,
            disk,
        };
        let record = machine.file("json");
        fs::write(&record, serde_json::to_vec(&machine)?)
            .with_context(|| format!("write {}", record.display()))?;
        let (child, owner) = machine.start()?;
        Ok(Self {
            machine,
            owner: Mutex::new(owner),
            hold: Mutex::default(),
            child: Mutex::new(Some(child)),
            stays: AtomicBool::new(false),
        })
    }

    /// Waits until the machine is up and prepares it: the module is loaded if
    /// there is one. From then on it ends when this process does.
    ///
    /// # Errors
    /// It does not come up; with the end of what it said.
    pub fn wait(&self, module: Option<&Path>) -> Result<()> {
        let mut session = self
            .session(Instant::now() + BOOT)
            .with_context(|| self.machine.trouble())?;
        if !self.stays.load(Ordering::Relaxed) {
            session.tell(&Request::Hold)?;
            *lock(&self.hold) = Some(session);
        }
        if let Some(module) = module {
            self.push(module, "/run/pmig.ko")?;
            self.sh("insmod /run/pmig.ko")?;
        }
        Ok(())
    }

    /// A machine that another process started to stay.
    ///
    /// # Errors
    /// Its record cannot be read.
    pub fn attach(name: &str, directory: &Path, owner: Owner) -> Result<Self> {
        let record = directory.join(format!("{name}.json"));
        let text = fs::read(&record).with_context(|| format!("read {}", record.display()))?;
        Ok(Self {
            machine: serde_json::from_slice(&text).context("read the machine's record")?,
            owner: Mutex::new(owner),
            hold: Mutex::default(),
            child: Mutex::default(),
            stays: AtomicBool::new(true),
        })
    }

    /// Lets the machine outlive this value and this process.
    ///
    /// # Errors
    /// The machine is gone.
    pub fn stay(&self) -> Result<()> {
        if let Some(mut session) = lock(&self.hold).take() {
            session.tell(&Request::Free)?;
        }
        self.stays.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The QEMU process.
    pub fn owner(&self) -> Owner {
        *lock(&self.owner)
    }

    /// How it runs.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// A free port of the machine, from that number on, kept from others by a
    /// lock on a file.
    fn port(&self, from: usize) -> Option<(usize, Flock<File>)> {
        (from..from + PORTS).map(|n| n % PORTS).find_map(|port| {
            let path = self.machine.file(&format!("{port}.lock"));
            let file = File::create(path).ok()?;
            let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()?;
            Some((port, lock))
        })
    }
}

impl Host for Vm {
    fn name(&self) -> &str {
        &self.machine.name
    }

    fn make(&self) -> Make {
        Make::Vm
    }

    fn session(&self, deadline: Instant) -> Result<Session> {
        // Each time another: a port's last conversation ends inside a moment
        // later than here, and would take for its own what is said meanwhile.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let mut from = std::process::id() as usize + NEXT.fetch_add(1, Ordering::Relaxed);
        loop {
            ensure!(self.owner().alive(), "{} does not run", self.name());
            if let Some((port, lock)) = self.port(from) {
                let socket = self.machine.file(&port.to_string());
                let soon = (Instant::now() + Duration::from_secs(3)).min(deadline);
                match Session::open(&socket, Some(lock), soon) {
                    Ok(session) => return Ok(session),
                    Err(e) if Instant::now() >= deadline => return Err(e),
                    Err(_) => from = port + 1,
                }
            } else if Instant::now() >= deadline {
                bail!("all {PORTS} ports of {} are in use", self.name());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn trouble(&self) -> Option<String> {
        let said = || format!("\n{} has ended: {}", self.name(), self.machine.trouble());
        (!self.owner().alive()).then(said)
    }

    fn crash(&self) -> Result<()> {
        *lock(&self.hold) = None;
        let owner = self.owner();
        if owner.alive() {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(owner.pid)?);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)
                .with_context(|| format!("kill {}", self.name()))?;
        }
        if let Some(mut child) = lock(&self.child).take() {
            child.wait().context("wait for QEMU")?;
        }
        while owner.alive() {
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn console(&self, line: &str) -> Result<String> {
        const END: &str = "lab-console-end";
        let out = console(&self.machine)?;
        let mut session = rexpect::session::spawn_stream(out.try_clone()?, out, Some(20_000));
        session.send_line("")?;
        session.exp_string("lab# ")?;
        // The echo of the line must not be taken for its answer.
        session.send_line(&format!("{line}; echo {END} | tr a-z A-Z"))?;
        session.exp_string(END)?;
        Ok(session.exp_string(&END.to_uppercase())?)
    }

    fn restart(&self) -> Result<()> {
        // The other machine's end of the link connects once, when it starts.
        ensure!(
            !self.machine.listens,
            "{} holds the link's listening end and cannot start again alone",
            self.name()
        );
        self.crash()?;
        let (child, owner) = self.machine.start()?;
        *lock(&self.owner) = owner;
        *lock(&self.child) = Some(child);
        self.wait(None)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if !self.stays.load(Ordering::Relaxed) {
            let _ = self.crash();
            let _ = fs::remove_file(&self.machine.disk);
        }
    }
}

/// Connects to a machine's console.
///
/// # Errors
/// The machine is gone, or somebody else is connected.
pub fn console(machine: &Machine) -> Result<UnixStream> {
    let path = machine.console();
    UnixStream::connect(&path).with_context(|| format!("connect to {}", path.display()))
}
