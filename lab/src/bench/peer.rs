//! The peer beside us: CRIU moves the same programs between the same hosts,
//! by each of its own means.
//!
//! All that can be done before is done before: what receives on the target
//! waits already, and nobody has to type six commands.

use super::moves::{Moved, Mover};
use super::CannotHere;
use crate::host::{clock_offset, Host, Make};
use crate::image::Image;
use crate::wire::{Cmd, Status};
use anyhow::{bail, ensure, Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How a program is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    Pmig,
    /// `criu dump`, a copy of the images, `criu restore`.
    Dump,
    /// A round of `criu pre-dump` before, both over a page server.
    PreDump,
    /// `criu dump --lazy-pages`: memory comes after the restore, as it is
    /// touched and in the background.
    LazyPages,
}

impl Means {
    pub const ALL: [Means; 4] = [Means::Pmig, Means::Dump, Means::PreDump, Means::LazyPages];

    pub fn name(self) -> &'static str {
        match self {
            Means::Pmig => "pmig",
            Means::Dump => "criu dump, copy, restore",
            Means::PreDump => "criu with a pre-dump round",
            Means::LazyPages => "criu with lazy pages",
        }
    }
}

/// Ports on the target for images and pages, on the source for lazy pages.
const IMAGES: u16 = 7800;
const PAGES: [u16; 2] = [7801, 7802];
const LAZY: u16 = 7803;

/// Where images lie: in memory.
const DIRECTORY: &str = "/dev/shm/peer";
/// Where a host with this machine's programs has CRIU, and what it runs with.
const OWN: &str = "/tmp/criu";
const LIBRARIES: &str = "x86_64-linux-gnu";
const LOADER: &str = "ld-linux-x86-64.so.2";
/// What the target says.
const LOG: &str = "/tmp/peer.log";
/// How long one move may take.
const LIMIT: Duration = Duration::from_secs(120);

/// What it says of machines that lack what it needs: soft-dirty tracking, and
/// rights that are kept from a container's root.
const LIMITS: [&str; 2] = [
    "Tracking memory is not available",
    "Operation not permitted",
];

/// Receives images, and unpacks them.
const TAKE: &str = "\
import socket, subprocess, sys
listener = socket.create_server(('0.0.0.0', int(sys.argv[1])))
print('waiting', flush=True)
stream, _ = listener.accept()
sys.exit(subprocess.run(['tar', '-x', '-C', sys.argv[2]], stdin=stream).returncode)
";

/// CRIU on two hosts.
pub struct Criu {
    /// The command.
    program: String,
    /// What it says of itself.
    pub version: String,
}

impl Criu {
    /// Finds it on both hosts. On this machine's own kernel the one of the
    /// machines' disk is used, so that there is one version.
    ///
    /// # Errors
    /// [`CannotHere`] where it is not there, or says that it cannot work.
    pub fn new(make: Make, hosts: [&dyn Host; 2]) -> Result<Self> {
        let program = match make {
            Make::Vm => "criu".to_owned(),
            Make::Netns => format!("{OWN}/{LOADER} --library-path {OWN} {OWN}/criu"),
        };
        for host in hosts {
            if make == Make::Netns {
                install(host)?;
            }
            let said = host.exec(&Cmd::shell(&format!("{program} check")))?;
            if !said.status.success() {
                let why = format!("criu check on {make}: {}{}", said.out(), said.err());
                return Err(CannotHere(why).into());
            }
            host.write("/tmp/take.py", 0o644, TAKE.as_bytes())?;
        }
        let said = hosts[0].sh(&format!("{program} --version"))?;
        let version = said.lines().next().unwrap_or_default();
        let version = version.trim_start_matches("Version: ").to_owned();
        Ok(Self { program, version })
    }

    /// Moves a program, and gives the time from the first command to the last
    /// page at the target.
    ///
    /// # Errors
    /// What CRIU says.
    pub fn go(&self, means: Means, mover: &mut Mover) -> Result<Duration> {
        let (from, to) = mover.hosts();
        let clean = format!("rm -rf {DIRECTORY} {LOG}; mkdir -p {DIRECTORY}/1 {DIRECTORY}/2");
        for host in [from, to] {
            host.sh(&clean)?;
        }
        let receiver = to.spawn(&Cmd::new(["bash", "-c", &self.receive(means, mover)]), LOG)?;
        let ports: &[u16] = match means {
            Means::PreDump => &[IMAGES, PAGES[0], PAGES[1]],
            _ => &[IMAGES],
        };
        let listening = ports
            .iter()
            .map(|port| format!("grep -q ':{port:04X} 00000000:0000 0A' /proc/net/tcp"))
            .collect::<Vec<_>>()
            .join(" && ");
        to.wait_for("the target to listen", LIMIT, &mut || {
            Ok(to.sh(&listening).is_ok())
        })?;
        let script = format!(
            "timeout {} bash -c '{}'",
            LIMIT.as_secs(),
            self.send(means, mover)
        );
        let sent = from.exec(&Cmd::shell(&script))?;
        let mut status = None;
        let ended = to.wait_for("the end of the move", LIMIT, &mut || {
            status = to.ended(receiver)?;
            Ok(status.is_some() || !sent.status.success())
        });
        let log = String::from_utf8_lossy(&to.read(LOG)?).into_owned();
        let went = ended.is_ok() && sent.status.success() && status == Some(Status::Code(0));
        if !went {
            let logs = format!(
                "tail -n 5 {DIRECTORY}/*.log 2>/dev/null; \
                 pkill -9 -f '[c]riu (dump|restore|page-server|lazy-pages)'; rm -rf {DIRECTORY}"
            );
            let logs = [from, to].map(|host| host.sh(&logs).unwrap_or_default());
            let words = format!("{}{log}{}", sent.err(), logs.concat());
            let limit = LIMITS.iter().find_map(|limit| {
                let mut lines = words.lines();
                lines.find(|line| line.contains(limit))
            });
            if let Some(line) = limit {
                return Err(CannotHere(format!("criu says: {line}")).into());
            }
            bail!("{}: {words}", means.name());
        }
        let stamp = |text: &str, word: &str| -> Result<i128> {
            let line = text.lines().find_map(|line| line.strip_prefix(word));
            let line = line.with_context(|| format!("no {word}in {text}"))?;
            Ok(line.trim().parse()?)
        };
        let (began, over) = (stamp(&sent.out(), "began ")?, stamp(&log, "over ")?);
        let ahead = match mover.make() {
            Make::Netns => 0,
            Make::Vm => clock_offset(from, to)?.0,
        };
        for host in [from, to] {
            host.sh(&format!("rm -rf {DIRECTORY}"))?;
        }
        ensure!(
            to.process(mover.pid())?.is_some(),
            "the program is not there: {log}"
        );
        mover.arrived();
        Ok(Duration::from_nanos(u64::try_from(over - ahead - began)?))
    }

    /// What the source does.
    fn send(&self, means: Means, mover: &Mover) -> String {
        let (_, to) = mover.hosts();
        let (criu, pid, to) = (&self.program, mover.pid(), to.name());
        let there = format!("$(getent hosts {to} | cut -d\" \" -f1)");
        let images = |which: &str| {
            let output = mover.output().trim_start_matches('/');
            format!("tar -c -C {DIRECTORY} {which} -C / {output} > /dev/tcp/{to}/{IMAGES}")
        };
        let dump = format!("{criu} dump -t {pid} -v1 -o {DIRECTORY}/dump.log");
        let pages = |n: usize| format!("--page-server --address $there --port {}", PAGES[n]);
        let steps = match means {
            Means::Pmig => String::new(),
            Means::Dump => format!("{dump} -D {DIRECTORY}/1; {}", images("1")),
            Means::PreDump => format!(
                "{criu} pre-dump -t {pid} -v1 -o {DIRECTORY}/pre.log -D {DIRECTORY}/1 --track-mem {}; \
                 {dump} -D {DIRECTORY}/2 --prev-images-dir ../1 --track-mem {}; {}",
                pages(0),
                pages(1),
                images("1 2"),
            ),
            Means::LazyPages => format!(
                "mkfifo {DIRECTORY}/ready; \
                 {dump} -D {DIRECTORY}/1 --lazy-pages --address 0.0.0.0 --port {LAZY} \
                     --status-fd 9 9>{DIRECTORY}/ready & \
                 head -c1 {DIRECTORY}/ready >/dev/null; {}; wait $!",
                images("1"),
            ),
        };
        format!("set -e; there={there}; echo began $(date +%s%N); {steps}")
    }

    /// What the target does.
    fn receive(&self, means: Means, mover: &Mover) -> String {
        let (from, _) = mover.hosts();
        let criu = &self.program;
        let output = mover.output();
        let take =
            format!("python3 /tmp/take.py {IMAGES} {DIRECTORY}; mv {DIRECTORY}{output} {output}");
        let restore = |n: u32, more: &str| {
            format!("{criu} restore -d -v1 -o {DIRECTORY}/restore.log -D {DIRECTORY}/{n} {more}")
        };
        let over = "echo over $(date +%s%N)";
        let steps = match means {
            Means::Pmig => String::new(),
            Means::Dump => format!("{take}; {}; {over}", restore(1, "")),
            Means::PreDump => {
                let server = |n: usize, more: &str| {
                    let (directory, port) = (n + 1, PAGES[n]);
                    format!(
                        "{criu} page-server -v1 -o {DIRECTORY}/pages{n}.log -D {DIRECTORY}/{directory} \
                         --port {port} {more} & "
                    )
                };
                format!(
                    "{}{}{take}; wait; {}; {over}",
                    server(0, ""),
                    server(1, "--prev-images-dir ../1"),
                    restore(2, "")
                )
            }
            Means::LazyPages => format!(
                "here=$(getent hosts {} | cut -d' ' -f1); {take}; \
                 {criu} lazy-pages --page-server --address $here --port {LAZY} -v1 \
                     -o {DIRECTORY}/lazy.log -D {DIRECTORY}/1 & \
                 while ! test -S {DIRECTORY}/1/lazy-pages.socket; do sleep 0.002; done; \
                 {}; wait; {over}",
                from.name(),
                restore(1, "--lazy-pages"),
            ),
        };
        format!("set -e; {steps}")
    }
}

/// One move of a ticking program by these means: the time until the last page
/// is there, and what it did to the program.
///
/// # Errors
/// The move failed.
pub fn tick(means: Means, criu: Option<&Criu>, mover: &mut Mover) -> Result<Moved<Duration>> {
    mover.tick_by(|mover| match (means, criu) {
        (Means::Pmig, _) => Ok(mover.go()?.summary.total),
        (_, Some(criu)) => criu.go(means, mover),
        (_, None) => bail!("there is no criu"),
    })
}

/// Puts the CRIU of the machines' disk on a host that has this machine's own
/// programs, with the libraries it is made for.
fn install(host: &dyn Host) -> Result<()> {
    if host.sh(&format!("test -e {OWN}/criu")).is_ok() {
        return Ok(());
    }
    host.sh(&format!("mkdir -p {OWN}"))?;
    let directory = unpacked()?;
    let libraries = directory.join(LIBRARIES);
    let listed = Command::new(libraries.join(LOADER))
        .arg("--library-path")
        .arg(&libraries)
        .arg("--list")
        .arg(directory.join("criu"))
        .output()
        .context("list the libraries of criu")?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let names = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    let mut needed: Vec<&str> = names.filter(|name| name.starts_with("lib")).collect();
    needed.push(LOADER);
    for name in needed {
        host.push(&libraries.join(name), &format!("{OWN}/{name}"))?;
    }
    host.push(&directory.join("criu"), &format!("{OWN}/criu"))
}

/// Where the CRIU of the machines' disk and its libraries lie on this machine.
fn unpacked() -> Result<PathBuf> {
    let say = |what: &str| eprintln!("{what}");
    let image = Image::get(&say)
        .map_err(|e| CannotHere(format!("the machines' disk, which has criu: {e:#}")))?;
    crate::tools::need(&["mke2fs"], &say)?;
    let directory = image.directory().join("peer");
    let program = directory.join("criu");
    if !program.exists() {
        fs::create_dir_all(&directory)
            .with_context(|| format!("create {}", directory.display()))?;
        let disk = image.directory().join("disk");
        let new = directory.join("criu.new");
        debugfs(
            &disk,
            &format!("rdump /usr/lib/{LIBRARIES} {}", directory.display()),
        )?;
        debugfs(&disk, &format!("dump /usr/sbin/criu {}", new.display()))?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
        fs::rename(&new, &program)?;
    }
    Ok(directory)
}

fn debugfs(disk: &Path, what: &str) -> Result<()> {
    let path = std::env::var("PATH").unwrap_or_default();
    let done = Command::new("debugfs")
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .args(["-R", what])
        .arg(disk)
        .output()
        .context("start debugfs")?;
    ensure!(
        done.status.success(),
        "debugfs {what}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(())
}
