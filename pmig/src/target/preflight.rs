//! The first look at what a source says of a process: what stands in its way here.

use std::time::{Duration, Instant};

use super::files::TargetFiles;
use super::BURIAL;
use crate::error::{Context, Error, Obstacle, Result};
use crate::image::Preview;
use crate::proc::status::Status;
use crate::protocol::message::{Accepted, Hello};
use crate::state::memory::Kernel;
use crate::state::pcb::{self, Backend, MachineFacts};

/// Who has that PID here. What died a moment ago, the program itself perhaps, is
/// given time to be buried by its parent.
fn taken(pid: i32, host: &str) -> Result<Option<String>> {
    let until = Instant::now() + BURIAL;
    loop {
        let dead = match Status::read(pid) {
            Ok(status) => matches!(status.letter, 'Z' | 'X'),
            Err(Error::Gone(_)) => return Ok(None),
            Err(e) => return Err(e),
        };
        if !dead {
            return Ok(Some(format!("it is taken on {host}")));
        }
        if Instant::now() > until {
            return Ok(Some(format!(
                "it is taken on {host} by a dead process that its parent has not waited for"
            )));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether this machine can take the process: all reasons against it at once.
pub(super) fn consider(hello: &Hello, files: &mut TargetFiles) -> Result<(Accepted, Backend)> {
    let preview = &hello.preview;
    preview.layout.check()?;
    preview.descriptors.check()?;
    let here = MachineFacts::here()?;
    let mut obstacles = pcb::fits(&preview.machine, &here, &preview.needs);
    if Kernel::here()? != preview.kernel {
        obstacles.push(Obstacle::new(
            "vdso",
            format!(
                "the kernel of {} maps another one than that of {}",
                here.host, preview.machine.host
            ),
            "boot the same kernel on both",
        ));
    }
    let pid = preview.needs.pid;
    if let Some(why) = taken(pid, &here.host)? {
        obstacles.push(Obstacle::new(
            format!("pid {pid}"),
            why,
            "end that process there, or try again later",
        ));
    }
    obstacles.extend(short_of_memory(preview, &here.host)?);
    let backend = Backend::choose(hello.pcb);
    if let Err(e) = &backend {
        obstacles.push(Obstacle::new(
            "kernel module",
            format!("it was asked for, and on {}: {e}", here.host),
            "load it there, or leave the choice to pmig",
        ));
    }
    let ship = match files.compare(&preview.files) {
        Ok(ship) => ship,
        Err(Error::Refused(more)) => {
            obstacles.extend(more);
            Vec::new()
        }
        Err(e) => return Err(e),
    };
    if !obstacles.is_empty() {
        return Err(Error::Refused(obstacles));
    }
    let mut notes = Vec::new();
    if let Some(cpus) = preview.needs.scheduling.lost_affinity(&here.cpus) {
        notes.push(format!(
            "{} has none of the cpus the program is bound to; it may use {} there",
            here.host,
            cpus.len()
        ));
    }
    let backend = backend?;
    let accepted = Accepted {
        host: here.host,
        kernel: here.kernel,
        pcb: backend.name().into(),
        ship,
        notes,
    };
    Ok((accepted, backend))
}

/// Memory that is needed beside the program's own.
const SPARE: u64 = 16 << 20;

/// Bytes this machine can give out without trouble (proc_meminfo(5)).
pub(super) fn free_memory() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("read", "/proc/meminfo")?;
    let kb = text
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|v| v.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kb.map_or(u64::MAX, |kb| kb.saturating_mul(1024)))
}

/// Whether the program's memory would fit now.
fn short_of_memory(preview: &Preview, host: &str) -> Result<Option<Obstacle>> {
    let free = free_memory()?;
    Ok((preview.bytes.saturating_add(SPARE) > free).then(|| {
        Obstacle::new(
            "memory",
            format!(
                "the program has {} MB, and {host} has {} MB left",
                preview.bytes >> 20,
                free >> 20
            ),
            "free memory there",
        )
    }))
}
