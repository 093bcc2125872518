//! The machines' disk, kernel and modules, built once and kept.

use crate::build;
use crate::tools;
use anyhow::{bail, ensure, Context, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const SUITE: &str = "trixie";
const DISK: &str = "3G";
/// Modules that the machines need to reach their disk, link and agent, those
/// they depend on left out.
const MODULES: [&str; 4] = ["virtio_blk", "virtio_net", "virtio_console", "virtio_rng"];

/// What has been built for the machines.
#[derive(Clone, Debug)]
pub struct Image {
    directory: PathBuf,
}

/// The name of what these files' contents make.
///
/// # Errors
/// A file cannot be read.
pub fn key(files: &[PathBuf]) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        let contents = fs::read(file).with_context(|| format!("read {}", file.display()))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        hasher.update(format!("{name} {}\n", contents.len()).as_bytes());
        hasher.update(&contents);
    }
    Ok(hasher.finalize().to_hex().as_str()[..16].to_owned())
}

/// The files of a directory, by name.
///
/// # Errors
/// It cannot be read.
pub fn files_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries =
        fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

fn recipe(name: &str) -> PathBuf {
    build::top().join("vm-images").join(name)
}

fn packages(name: &str) -> Result<String> {
    let path = recipe(name);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let names = text.lines().filter(|line| !line.starts_with('#'));
    Ok(names.collect::<Vec<_>>().join(","))
}

/// A command that sees itself as root, which it must be to make files of
/// root's.
pub fn as_root(script: &str, arguments: &[&Path]) -> Command {
    let mut command = if nix::unistd::geteuid().is_root() {
        Command::new("sh")
    } else {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--map-auto", "--mount", "--", "sh"]);
        command
    };
    command.args(["-eu", "-c", script, "lab"]);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Runs a command to its end, its output kept for the case that it fails.
///
/// # Errors
/// It cannot be started or it fails; with the end of what it said.
pub fn quietly(command: &mut Command, what: &str) -> Result<()> {
    let output = command.output().with_context(|| what.to_owned())?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let lines = said.lines().collect::<Vec<_>>();
    let end = lines[lines.len().saturating_sub(30)..].join("\n");
    bail!("{what}: {}\n{end}", output.status);
}

fn cache() -> Result<PathBuf> {
    let cache = build::directory()?.join("cache");
    fs::create_dir_all(&cache).with_context(|| format!("create {}", cache.display()))?;
    Ok(cache)
}

/// Makes a directory once and for all: `make` fills another, which gets the
/// name only when it is whole.
fn once(directory: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if directory.exists() {
        return Ok(());
    }
    let new = directory.with_extension("new");
    if new.exists() {
        quietly(&mut as_root("rm -rf -- \"$1\"", &[&new]), "clear leftovers")?;
    }
    fs::create_dir_all(&new).with_context(|| format!("create {}", new.display()))?;
    make(&new)?;
    fs::rename(&new, directory).with_context(|| format!("create {}", directory.display()))
}

fn bootstrap(include: &str, tar: &Path, hook: Option<&Path>) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--quiet", "--variant=apt", "--format=tar"])
        .arg(format!("--include={include}"))
        .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
        .arg("--dpkgopt=path-exclude=/usr/share/man/*")
        .arg("--dpkgopt=path-exclude=/usr/share/locale/*")
        .arg("--aptopt=Acquire::Languages \"none\"");
    if let Some(hook) = hook {
        command.arg(format!("--customize-hook={}", hook.display()));
    }
    command.arg(SUITE).arg(tar).stdin(Stdio::null());
    quietly(&mut command, "mmdebstrap")
}

impl Image {
    /// The image of the recipes as they stand, built if it is not there;
    /// `say` is told what takes long.
    ///
    /// # Errors
    /// A tool that is missing or fails.
    pub fn get(say: &dyn Fn(&str)) -> Result<Self> {
        let _lock = build::lock("image")?;
        let recipe_files = [recipe("root.packages"), recipe("root.sh")];
        let directory = cache()?.join(format!("root-{}", key(&recipe_files)?));
        once(&directory, |new| {
            tools::need(&["mmdebstrap", "mke2fs", "xz"], say)?;
            say("building the machines' disk from Debian packages");
            let tar = new.join("root.tar");
            let hook = recipe("root.sh");
            bootstrap(&packages("root.packages")?, &tar, Some(&hook))?;
            let script = format!(
                "cd \"$1\"; mkdir tree; tar -C tree -xf root.tar; rm root.tar
                release=$(cat tree/boot/release); cp tree/boot/release tree/boot/vmlinuz .
                cp tree/lib/modules/$release/modules.dep tree/lib/modules/$release/modules.builtin .
                mkdir modules; for name in $(cut -d: -f1 modules.dep); do case $name in
                {patterns}) cp tree/lib/modules/$release/$name modules/;; esac; done
                xz -dq modules/*.xz || true
                mke2fs -q -t ext4 -L root -d tree disk {DISK}; rm -rf tree; chmod -R a+rX .",
                patterns = wanted_patterns()
            );
            quietly(&mut as_root(&script, &[new]), "make the disk")
        })?;
        Ok(Self { directory })
    }

    /// Where it lies, and what is made from it.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The kernel's release, such as 6.12.48+deb13-cloud-amd64.
    ///
    /// # Errors
    /// The image is incomplete.
    pub fn release(&self) -> Result<String> {
        let path = self.directory.join("release");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Ok(text.trim().to_owned())
    }

    /// The kernel.
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// The root filesystem, to be copied and not written to.
    pub fn disk(&self) -> PathBuf {
        self.directory.join("disk")
    }

    /// Modules in the order in which they must be loaded.
    ///
    /// # Errors
    /// The image is incomplete.
    pub fn modules(&self) -> Result<Vec<PathBuf>> {
        let path = self.directory.join("modules.dep");
        let all = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let mut order = Vec::new();
        for name in MODULES {
            load_after_its_own(&all, name, &mut order, 0)?;
        }
        Ok(order
            .iter()
            .map(|name| self.directory.join("modules").join(format!("{name}.ko")))
            .filter(|path| path.exists())
            .collect())
    }
}

fn wanted_patterns() -> String {
    // What they depend on is found in the same places.
    let more = [
        "failover",
        "net_failover",
        "virtio",
        "virtio_ring",
        "virtio_pci",
    ];
    let more = ["rng-core", "virtio_pci_modern_dev", "virtio_pci_legacy_dev"]
        .iter()
        .chain(&more);
    MODULES
        .iter()
        .chain(more)
        .map(|name| format!("*/{name}.ko*"))
        .collect::<Vec<_>>()
        .join("|")
}

fn stem(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split(".ko").next().unwrap_or(name)
}

/// Adds a module behind those it needs; one that is built in has no line.
fn load_after_its_own(all: &str, name: &str, order: &mut Vec<String>, depth: u32) -> Result<()> {
    ensure!(depth < 16, "modules.dep goes round in a circle at {name}");
    if order.iter().any(|known| known == name) {
        return Ok(());
    }
    let line = all.lines().find_map(|line| {
        let (path, needs) = line.split_once(':')?;
        (stem(path) == name).then_some(needs)
    });
    let Some(needs) = line else { return Ok(()) };
    for need in needs.split_whitespace() {
        load_after_its_own(all, stem(need), order, depth + 1)?;
    }
    order.push(name.to_owned());
    Ok(())
}

/// The tree in which the module for a kernel's release and the C samples are
/// built.
///
/// # Errors
/// A tool that is missing or fails.
pub fn build_root(release: &str, say: &dyn Fn(&str)) -> Result<PathBuf> {
    let _lock = build::lock("image")?;
    let directory = cache()?.join(format!("build-{}", key(&[recipe("build.packages")])?));
    // Debian may have moved on between the making of the two trees.
    let headers = directory.join("tree/usr/lib/modules").join(release);
    if directory.exists() && !headers.exists() {
        quietly(
            &mut as_root("rm -rf -- \"$1\"", &[&directory]),
            "clear the build root",
        )?;
    }
    once(&directory, |new| {
        tools::need(&["mmdebstrap"], say)?;
        say("building the tree with the kernel's headers");
        let tar = new.join("tree.tar");
        bootstrap(&packages("build.packages")?, &tar, None)?;
        let script = "cd \"$1\"; mkdir tree; tar -C tree -xf tree.tar; rm tree.tar";
        quietly(&mut as_root(script, &[new]), "unpack the build root")
    })?;
    Ok(directory.join("tree"))
}

/// Builds the kernel module for the image's kernel; `None` if this source tree
/// has none.
///
/// # Errors
/// What the compiler says, or headers of another release than the image.
pub fn module(image: &Image, say: &dyn Fn(&str)) -> Result<Option<PathBuf>> {
    let source = build::top().join("kmod");
    if !source.join("Kbuild").exists() && !source.join("Makefile").exists() {
        return Ok(None);
    }
    let release = image.release()?;
    let files = files_in(&source)?
        .into_iter()
        .filter(|file| {
            let extension = file.extension().and_then(|e| e.to_str());
            let name = file.file_name().and_then(|name| name.to_str());
            matches!(extension, Some("c" | "h" | "S")) && !file.ends_with("pmig.mod.c")
                || matches!(name, Some("Kbuild" | "Makefile"))
        })
        .collect::<Vec<_>>();
    let directory = cache()?.join(format!("module-{}-{release}", key(&files)?));
    let root = build_root(&release, say)?;
    let _lock = build::lock("module")?;
    once(&directory, |new| {
        say("building the kernel module");
        for file in &files {
            fs::copy(file, new.join(file.file_name().unwrap_or_default()))
                .with_context(|| format!("copy {}", file.display()))?;
        }
        let script = "rm -rf \"$1/tmp/kmod\"; cp -r \"$2\" \"$1/tmp/kmod\"
            chroot \"$1\" make -s -C \"/lib/modules/$3/build\" M=/tmp/kmod modules
            chroot \"$1\" strip --strip-debug /tmp/kmod/pmig.ko
            cp \"$1/tmp/kmod/pmig.ko\" \"$2/pmig.ko\"";
        let arguments = [root.as_path(), new, Path::new(&release)];
        quietly(&mut as_root(script, &arguments), "build the module")
    })?;
    Ok(Some(directory.join("pmig.ko")))
}

/// One file of an initial filesystem.
#[derive(Debug)]
pub struct Entry {
    pub name: String,
    pub mode: u32,
    pub contents: Vec<u8>,
}

impl Entry {
    /// A directory.
    pub fn directory(name: &str) -> Self {
        Self {
            name: name.into(),
            mode: 0o040_755,
            contents: Vec::new(),
        }
    }

    /// A file with these contents.
    pub fn file(name: &str, mode: u32, contents: Vec<u8>) -> Self {
        Self {
            name: name.into(),
            mode: 0o100_000 | mode,
            contents,
        }
    }
}

/// Writes an initial filesystem in the kernel's "newc" format; see
/// Documentation/driver-api/early-userspace/buffer-format.rst.
///
/// # Errors
/// Those of the file, or contents of 4 GB and more.
pub fn write_initial(path: &Path, entries: &[Entry]) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    let last = Entry {
        name: "TRAILER!!!".into(),
        mode: 0,
        contents: Vec::new(),
    };
    for (index, entry) in entries.iter().chain([&last]).enumerate() {
        let size = u32::try_from(entry.contents.len()).context("a file too large")?;
        let name = entry.name.len() + 1;
        let mut head = String::from("070701");
        let fields = [
            index as u32 + 1,
            entry.mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            name as u32,
            0,
        ];
        for field in fields {
            head.push_str(&format!("{field:08x}"));
        }
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(entry.name.as_bytes());
        bytes.push(0);
        pad(&mut bytes);
        bytes.extend_from_slice(&entry.contents);
        pad(&mut bytes);
        file.write_all(&bytes)
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}
