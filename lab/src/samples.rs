//! Sample programs that are not Rust: scripts, and C in every kind of linking.

use crate::build;
use crate::host::{Host, Make};
use crate::image::{self, as_root, quietly, Image};
use crate::tools;
use anyhow::{bail, Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The ways in which `plain.c` is linked: name and options.
pub const LINKED: [(&str, &str); 4] = [
    ("plain-static", "-static"),
    ("plain-static-pie", "-static-pie"),
    ("plain-dynamic", "-pie -fPIE"),
    ("plain-fixed", "-no-pie -fno-pie"),
];
/// The scripts.
pub const SCRIPTS: [&str; 2] = ["generators.py", "closures.pl"];

fn source(name: &str) -> PathBuf {
    build::top().join("lab/samples").join(name)
}

/// Builds `plain.c` against the C library that hosts of this make have.
///
/// # Errors
/// No compiler, or what it says.
fn linked(make: Make) -> Result<PathBuf> {
    let _lock = build::lock("samples")?;
    let key = image::key(&[source("plain.c")])?;
    let directory = build::directory()?.join(format!("samples-{make}-{key}"));
    let last = directory.join(LINKED[LINKED.len() - 1].0);
    if last.exists() {
        return Ok(directory);
    }
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    fs::copy(source("plain.c"), directory.join("plain.c")).context("copy plain.c")?;
    for (name, options) in LINKED {
        let compile = format!("gcc -O2 {options} -o {name} plain.c -lm");
        match make {
            Make::Netns => {
                if !tools::there("gcc") {
                    bail!("there is no C compiler");
                }
                let mut command = Command::new("sh");
                command.args(["-c", &compile]).current_dir(&directory);
                quietly(&mut command, &compile)?;
            }
            Make::Vm => {
                let release = Image::get(&|_| ())?.release()?;
                let root = image::build_root(&release, &|_| ())?;
                let script = format!(
                    "mkdir -p \"$1/tmp/samples\"; cp \"$2/plain.c\" \"$1/tmp/samples\"
                    chroot \"$1\" sh -euc 'cd /tmp/samples; {compile}'
                    cp \"$1/tmp/samples/{name}\" \"$2/{name}\""
                );
                let arguments: [&Path; 2] = [&root, &directory];
                quietly(&mut as_root(&script, &arguments), &compile)?;
            }
        }
    }
    Ok(directory)
}

/// Puts the scripts and the C programs on a host.
///
/// # Errors
/// No compiler, what it says, or no room.
pub fn install(host: &dyn Host) -> Result<()> {
    let directory = linked(host.make())?;
    let programs = crate::agent::PROGRAMS;
    for (name, _) in LINKED {
        host.push(&directory.join(name), &format!("{programs}/{name}"))?;
    }
    for name in SCRIPTS {
        let contents = fs::read(source(name)).with_context(|| format!("read {name}"))?;
        host.write(&format!("{programs}/{name}"), 0o755, &contents)?;
    }
    Ok(())
}
