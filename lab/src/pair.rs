//! Two hosts that know each other.

use crate::build;
use crate::host::{Host, Make};
use crate::inside::Identity;
use crate::netns::Netns;
use crate::owner::{clear, leftovers, Owner, PREFIX};
use crate::vm::{Parts, Vm};
use crate::wire::Cmd;
use anyhow::{bail, Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The names of the two hosts.
pub const NAMES: [&str; 2] = ["a", "b"];
/// Where pmig's log lies in a host that serves.
pub const SERVE_LOG: &str = "/run/pmig-serve.log";

/// How many processors each of two machines has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processors {
    /// Two, so that what can happen at once does.
    Two,
    /// As many, up to two, as this computer has for them at any time. With more
    /// it is this computer's scheduler that is measured: it puts aside a
    /// processor that holds a lock, for a tick of some milliseconds, while
    /// another spins for it.
    Own,
}

impl Processors {
    fn count(self) -> u32 {
        let here = std::thread::available_parallelism().map_or(1, usize::from);
        match self {
            Self::Own if here < 4 => 1,
            _ => 2,
        }
    }
}

/// Two hosts, a and b, that reach each other by these names.
pub struct Lab {
    make: Make,
    a: Box<dyn Host>,
    b: Box<dyn Host>,
    // Removed at the end.
    passing: Vec<PathBuf>,
}

/// What the host of that index knows of itself.
pub fn identity(index: usize) -> Identity {
    let hosts = NAMES.iter().enumerate().fold(
        String::from("127.0.0.1 localhost\n::1 localhost\n"),
        |text, (index, name)| text + &format!("{} {name}\n", address(index)),
    );
    Identity {
        name: NAMES[index].into(),
        address: address(index),
        hosts,
        last_pid: 10_000 * (index as u32 + 1),
    }
}

fn address(index: usize) -> String {
    format!("10.77.44.{}", index + 1)
}

/// A directory of passage under the system's temporary one: the path of a
/// socket has to be short.
///
/// # Errors
/// It cannot be made.
pub fn passage(tag: &str) -> Result<PathBuf> {
    let temporary = std::env::temp_dir();
    for leftover in leftovers(&temporary) {
        clear(&leftover);
    }
    let directory = temporary.join(format!("{PREFIX}{tag}"));
    clear(&directory);
    let mut builder = fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder
        .create(&directory)
        .with_context(|| format!("create {}", directory.display()))?;
    Ok(directory)
}

/// Where the machines of that tag have their disks.
///
/// # Errors
/// The build directory cannot be made.
pub fn disks(tag: &str) -> Result<PathBuf> {
    let run = build::directory()?.join("run");
    Ok(run.join(format!("{PREFIX}{tag}")))
}

/// A tag for things that pass with this process.
pub fn passing_tag() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{}.{count}", Owner::me())
}

impl Lab {
    /// Two hosts made of namespaces, which end with this value.
    ///
    /// # Errors
    /// Whatever keeps them from being built.
    pub fn netns() -> Result<Self> {
        let tag = passing_tag();
        let directory = passage(&tag)?;
        let [a, b] = Self::netns_hosts(&directory, &tag)?;
        Ok(Self {
            make: Make::Netns,
            a: Box::new(a),
            b: Box::new(b),
            passing: vec![directory],
        })
    }

    /// Two joined hosts made of namespaces.
    ///
    /// # Errors
    /// Whatever keeps them from being built.
    pub fn netns_hosts(directory: &Path, tag: &str) -> Result<[Netns; 2]> {
        let built = build::build()?;
        let start = |index| Netns::start(&built, directory, tag, identity(index));
        let (a, b) = std::thread::scope(|scope| {
            let a = scope.spawn(|| start(0));
            let b = start(1);
            (a.join(), b)
        });
        let (a, b) = match a {
            Ok(a) => (a?, b?),
            Err(_) => bail!("starting a host panicked"),
        };
        Netns::connect(&a, &b)?;
        a.configure(&address(0))?;
        b.configure(&address(1))?;
        Ok([a, b])
    }

    /// Two machines, which end with this value or with this process; `say` is
    /// told what takes long.
    ///
    /// # Errors
    /// Whatever keeps them from coming up.
    pub fn vm(processors: Processors, say: &dyn Fn(&str)) -> Result<Self> {
        let tag = passing_tag();
        let directory = passage(&tag)?;
        let [a, b] = Self::vm_hosts(&directory, &tag, processors, say)?;
        Ok(Self {
            make: Make::Vm,
            a: Box::new(a),
            b: Box::new(b),
            passing: vec![directory, disks(&tag)?],
        })
    }

    /// Two joined machines, up and prepared.
    ///
    /// # Errors
    /// Whatever keeps them from coming up.
    pub fn vm_hosts(
        directory: &Path,
        tag: &str,
        processors: Processors,
        say: &dyn Fn(&str),
    ) -> Result<[Vm; 2]> {
        let parts = Parts::get(say)?;
        let disks = disks(tag)?;
        for leftover in disks.parent().map(leftovers).unwrap_or_default() {
            let _ = fs::remove_dir_all(leftover);
        }
        fs::create_dir_all(&disks).with_context(|| format!("create {}", disks.display()))?;
        say("booting a and b");
        let start = |index| {
            let identity = identity(index);
            Vm::start(&parts, directory, &disks, &identity, processors.count())
        };
        let (a, b) = (start(0)?, start(1)?);
        let module = parts.module.as_deref();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| a.wait(module));
            b.wait(module)?;
            match first.join() {
                Ok(result) => result,
                Err(_) => bail!("waiting for a host panicked"),
            }
        })?;
        Ok([a, b])
    }

    /// A lab of hosts that are there already and outlive this value.
    pub fn of(a: Box<dyn Host>, b: Box<dyn Host>) -> Self {
        Self {
            make: a.make(),
            a,
            b,
            passing: Vec::new(),
        }
    }

    /// What its hosts are made of.
    pub fn make(&self) -> Make {
        self.make
    }

    /// The first host.
    pub fn a(&self) -> &dyn Host {
        &*self.a
    }

    /// The second host.
    pub fn b(&self) -> &dyn Host {
        &*self.b
    }

    /// The host of that name.
    ///
    /// # Errors
    /// No host has it.
    pub fn host(&self, name: &str) -> Result<&dyn Host> {
        match name {
            "a" => Ok(self.a()),
            "b" => Ok(self.b()),
            _ => bail!("no host is called {name}; there are a and b"),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for directory in &self.passing {
            let _ = fs::remove_dir_all(directory);
        }
    }
}

/// Starts `pmig serve` on a host, with more variables in its environment, and
/// waits until it listens; gives its PID.
///
/// # Errors
/// It ended, or did not listen in time.
pub fn serve(host: &dyn Host, env: &[(&str, &str)]) -> Result<u32> {
    let mut cmd = Cmd::new(["pmig", "serve", "--listen", "tcp://0.0.0.0:7644"]);
    cmd.argv.push("--insecure".into());
    for (name, value) in env {
        cmd = cmd.env(name, value);
    }
    let pid = host.spawn(&cmd, SERVE_LOG)?;
    host.wait_for("pmig serve listening", Duration::from_secs(20), &mut || {
        let said = host.read(SERVE_LOG)?;
        let said = String::from_utf8_lossy(&said);
        if said.contains("listening on") {
            return Ok(true);
        }
        match host.ended(pid)? {
            None => Ok(false),
            Some(status) => bail!("pmig serve ended with {status:?}: {said}"),
        }
    })?;
    Ok(pid)
}

/// Ends every program that trials start on a host, and removes their files and
/// pmig's records.
///
/// # Errors
/// The host is gone.
pub fn tidy(host: &dyn Host) -> Result<()> {
    let others = [
        "pmig",
        "python3",
        "perl",
        "kmod_hammer",
        "sleep",
        "vim.tiny",
        "less",
    ];
    for process in host.ps()? {
        let Some(program) = process.cmdline.first() else {
            continue;
        };
        let program = program.rsplit('/').next().unwrap_or_default();
        let ours = build::SAMPLES.contains(&program) || others.contains(&program);
        if ours || program.starts_with("plain-") {
            // It may end by itself meanwhile.
            let _ = host.signal(process.pid, 9);
        }
    }
    host.sh("umount -q /srv/work; ip link set eth0 up
        rm -rf /srv/work/* /srv/work/.[!.]* /var/lib/pmig/* /run/pmig/*")
        .map(drop)
}
