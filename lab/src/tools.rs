//! Programs of this machine that the lab needs.

use crate::harness::CannotHere;
use crate::image::quietly;
use anyhow::Result;
use std::process::Command;

/// A program and the Debian package that brings it.
const PACKAGES: [(&str, &str); 10] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("xz", "xz-utils"),
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("newuidmap", "uidmap"),
    ("iperf3", "iperf3"),
    ("vim.tiny", "vim-tiny"),
    ("less", "less"),
];

/// True if the program is on the search path, or where root's programs lie.
pub fn there(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut places = path.split(':').chain(["/usr/sbin", "/sbin"]);
    places.any(|place| std::path::Path::new(place).join(program).is_file())
}

/// Gets programs that are missing: root has them installed by apt-get, anybody
/// else is told the command.
///
/// # Errors
/// They are missing and cannot be installed.
pub fn need(programs: &[&str], say: &dyn Fn(&str)) -> Result<()> {
    let root = nix::unistd::geteuid().is_root();
    let mut packages = programs
        .iter()
        .chain((!root).then_some(&"newuidmap"))
        .filter(|program| !there(program))
        .map(|program| {
            let known = PACKAGES.iter().find(|(name, _)| name == program);
            known.map_or(*program, |(_, package)| package)
        })
        .collect::<Vec<_>>();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    // Ubuntu does not have the keys of Debian's archive by itself.
    if packages.contains(&"mmdebstrap") {
        packages.push("debian-archive-keyring");
    }
    let list = packages.join(" ");
    let command = format!("apt-get install --yes --no-install-recommends {list}");
    if !root || !there("apt-get") {
        let why = format!("this machine lacks {list}; install with: sudo {command}");
        return Err(CannotHere(why).into());
    }
    say(&format!("installing {list}"));
    let mut update = Command::new("apt-get");
    quietly(update.args(["--quiet", "update"]), "apt-get update")?;
    let mut install = Command::new("sh");
    install
        .args(["-c", &command])
        .env("DEBIAN_FRONTEND", "noninteractive");
    quietly(&mut install, &command)
}
