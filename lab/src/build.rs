//! Builds what the hosts run: pmig, the sample programs and the agent.

use anyhow::{bail, Context, Result};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// The sample programs, by the names of their binaries.
pub const SAMPLES: &[&str] = &[
    "attributes",
    "clocks",
    "fickle",
    "files",
    "forking",
    "iterative",
    "memory",
    "random",
    "recursive",
    "roundtrip",
    "signals",
    "sleeper",
    "ticker",
];

/// The workspace's top directory.
pub fn top() -> &'static Path {
    static TOP: OnceLock<PathBuf> = OnceLock::new();
    TOP.get_or_init(|| {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        here.parent().unwrap_or(here).to_owned()
    })
}

/// The lab's own directory below the build directory.
///
/// # Errors
/// It cannot be made.
pub fn directory() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || top().join("target"),
        |directory| top().join(PathBuf::from(directory)),
    );
    let lab = target.join("lab");
    fs::create_dir_all(&lab).with_context(|| format!("create {}", lab.display()))?;
    Ok(lab)
}

/// Waits for the named lock of this build directory; it is let go when dropped.
///
/// # Errors
/// Those of the lock's file.
pub fn lock(name: &str) -> Result<Flock<File>> {
    let path = directory()?.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, e)| e)
        .with_context(|| format!("lock {}", path.display()))
}

/// What has been built.
#[derive(Clone, Debug)]
pub struct Built {
    directory: PathBuf,
}

impl Built {
    /// Copies without what only a debugger needs: they go into every machine's
    /// initial filesystem.
    ///
    /// # Errors
    /// Those of strip(1) and of the files.
    pub fn stripped(&self) -> Result<Self> {
        let _lock = lock("build")?;
        let directory = crate::build::directory()?.join("programs");
        fs::create_dir_all(&directory)
            .with_context(|| format!("create {}", directory.display()))?;
        for from in [self.samples(), vec![self.pmig(), self.agent()]].concat() {
            let to = directory.join(from.file_name().unwrap_or_default());
            let time = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified()).ok();
            if time(&to) > time(&from) {
                continue;
            }
            let mut strip = Command::new("strip");
            strip.arg("-o").arg(&to).arg(&from);
            crate::image::quietly(&mut strip, "strip")?;
        }
        Ok(Self { directory })
    }

    /// The engine, one static binary.
    pub fn pmig(&self) -> PathBuf {
        self.directory.join("pmig")
    }

    /// The lab's program inside a host.
    pub fn agent(&self) -> PathBuf {
        self.directory.join("lab-agent")
    }

    /// The sample programs, and what tries the kernel module and the tracking of
    /// writes.
    pub fn samples(&self) -> Vec<PathBuf> {
        let all = SAMPLES.iter().chain(&["kmod_hammer", "tracking"]);
        all.map(|name| self.directory.join(name)).collect()
    }
}

/// Builds everything once in this process, in release, under a lock.
///
/// # Errors
/// What cargo says.
pub fn build() -> Result<Built> {
    static BUILT: OnceLock<std::result::Result<Built, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| build_now().map_err(|e| format!("{e:#}")))
        .clone()
        .map_err(|e| anyhow::anyhow!(e))
}

fn build_now() -> Result<Built> {
    let _lock = lock("build")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--release", "--target", TRIPLE])
        .args(["--package", "pmig", "--package", "lab", "--bins"])
        .current_dir(top())
        .stdin(Stdio::null());
    // A build script's or test's own settings must not change this build.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text == "CARGO_MANIFEST_DIR" {
            command.env_remove(&name);
        }
    }
    let output = command.output().context("start cargo")?;
    if !output.status.success() {
        bail!("build: {}", String::from_utf8_lossy(&output.stderr));
    }
    let target = directory()?;
    let target = target.parent().context("no build directory")?;
    Ok(Built {
        directory: target.join(TRIPLE).join("release"),
    })
}
