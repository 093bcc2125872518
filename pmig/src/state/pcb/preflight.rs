//! What stands in the way, seen from outside and without stopping anything.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::sync::OnceLock;

use nix::errno::Errno;
use procfs::process::{LimitValue, Limits as LimitsText};
use procfs::FromBufRead;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Obstacle, Result};
use crate::proc::status::Status;
use crate::proc::{self, Kept};
use crate::state::credentials::Credentials;
use crate::state::limits::{Limit, Limits};
use crate::state::scheduling::Scheduling;
use crate::sys::ptrace;
use crate::tracee::Stopped;

/// Namespaces a process shares with pmig, or is not moved; the time namespace
/// is carried.
const NAMESPACES: [&str; 8] = [
    "mnt",
    "net",
    "ipc",
    "uts",
    "user",
    "pid",
    "pid_for_children",
    "cgroup",
];
/// The code segment of 64-bit programs (`__USER_CS`).
const USER_CS: u64 = 0x33;

/// What the process needs of a target, known before anything stops.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    pub pid: i32,
    pub credentials: Credentials,
    pub limits: Limits,
    pub scheduling: Scheduling,
    pub oom_score_adj: i32,
}

/// # Errors
/// [`Error::Gone`]; those of procfs.
pub fn needs(pid: i32) -> Result<Needs> {
    let oom_score_adj = proc::text(pid, "oom_score_adj")?;
    Ok(Needs {
        pid,
        credentials: Credentials::from_status(&Status::read(pid)?),
        limits: limits_of(pid)?,
        scheduling: Scheduling::capture(pid)?,
        oom_score_adj: oom_score_adj
            .trim()
            .parse()
            .map_err(|e| Error::bad(format!("/proc/{pid}/oom_score_adj"), e))?,
    })
}

/// Every reason why the process control block of `pid` cannot be carried that
/// shows without stopping it.
///
/// # Errors
/// [`Error::Gone`]; those of procfs.
pub fn preflight(pid: i32) -> Result<Vec<Obstacle>> {
    let status = Status::read(pid)?;
    let mut all = states(&status);
    if !all.is_empty() {
        // The rest cannot be asked of what has no memory.
        return Ok(all);
    }
    if status.tracer != 0 {
        all.push(Obstacle::new(
            "tracer",
            format!("process {} traces it", status.tracer),
            "end the debugger or strace first",
        ));
    }
    if status.letter == 'T' {
        all.push(Obstacle::new(
            "job control",
            "the process is stopped",
            format!("let it go on: kill -CONT {pid}"),
        ));
    }
    if is_32_bit(pid)? {
        all.push(Obstacle::new(
            "executable",
            "a 32-bit program",
            "only 64-bit programs are carried",
        ));
    }
    all.extend(in_status(&status));
    all.extend(beside(&Kept::of(pid), status.threads)?);
    all.extend(Scheduling::capture(pid)?.obstacles());
    all.extend(memory_nodes(pid)?);
    Ok(all)
}

/// The same at the freeze, where a tracer is pmig itself: what may have
/// appeared since, and what only a tracer sees. All that a capture relies on;
/// the rest is left to [`look_again`].
pub fn recheck(stopped: &Stopped, status: &Status) -> Vec<Obstacle> {
    let pid = stopped.pid();
    let mut all = states(status);
    if !all.is_empty() {
        return all;
    }
    if stopped.regs().cs != USER_CS {
        all.push(Obstacle::new(
            "registers",
            "the program executes 32-bit code",
            "only 64-bit programs are carried",
        ));
    }
    // Kernels older than 6.4 answer EIO: they have the feature and hide it, and
    // no program but an emulator uses it.
    if ptrace::syscall_user_dispatch(pid).unwrap_or(false) {
        all.push(Obstacle::new(
            "system call user dispatch",
            "the program catches its own system calls (PR_SET_SYSCALL_USER_DISPATCH)",
            "",
        ));
    }
    all.extend(in_status(status));
    all
}

/// What else may have appeared until the process was stopped. It stays as it is
/// while that stands still, so this can wait until nobody waits for it.
///
/// # Errors
/// [`Error::Gone`]; those of procfs.
pub fn look_again(files: &Kept) -> Result<Vec<Obstacle>> {
    beside(files, 1)
}

fn states(status: &Status) -> Vec<Obstacle> {
    let s = status;
    let mut all = Vec::new();
    if matches!(status.letter, 'Z' | 'X') {
        all.push(Obstacle::new("process", "has ended already", ""));
    } else if !s.memory {
        all.push(Obstacle::new("process", "is a thread of the kernel", ""));
    } else if s.tgid != s.pid {
        all.push(Obstacle::new(
            "process",
            format!("is a thread of process {}", s.tgid),
            "name that one",
        ));
    } else if s.pid == 1 {
        all.push(Obstacle::new("process", "is the init of its machine", ""));
    }
    all
}

/// What its status tells.
fn in_status(status: &Status) -> Vec<Obstacle> {
    let mut all = Vec::new();
    if status.threads != 1 {
        all.push(Obstacle::new(
            "threads",
            format!(
                "the process has {}, only one can be carried",
                status.threads
            ),
            "",
        ));
    }
    if status.seccomp != 0 {
        all.push(Obstacle::new(
            "seccomp",
            "the process is confined by a seccomp filter, which is not carried",
            "start it without (systemd: SystemCallFilter=)",
        ));
    }
    if status.shadow_stack {
        all.push(Obstacle::new(
            "shadow stack",
            "is on and cannot be carried",
            "start the program with GLIBC_TUNABLES=glibc.cpu.hwcaps=-SHSTK",
        ));
    }
    if status.tagged_addresses {
        all.push(Obstacle::new(
            "tagged addresses",
            "linear address masking is on and is not carried",
            "",
        ));
    }
    all
}

/// What other files tell of it.
fn beside(files: &Kept, threads: u64) -> Result<Vec<Obstacle>> {
    let mut all = Vec::new();
    let children = match threads {
        1 => children_of(files, files.pid())?,
        _ => children(files)?,
    };
    if !children.is_empty() {
        let list: Vec<String> = children.iter().take(8).map(i32::to_string).collect();
        let more = if children.len() > 8 { ", ..." } else { "" };
        all.push(Obstacle::new(
            "children",
            format!("the process has children: {}{more}", list.join(", ")),
            "wait until they have ended and were waited for",
        ));
    }
    all.extend(timers(files)?);
    all.extend(namespaces(files)?);
    all.extend(label(files));
    Ok(all)
}

/// Children of any thread, dead ones that nobody waited for included.
fn children(files: &Kept) -> Result<Vec<i32>> {
    let tasks = format!("/proc/{}/task", files.pid());
    let mut all = Vec::new();
    for task in fs::read_dir(&tasks).context("list", &tasks)?.flatten() {
        if let Some(thread) = task.file_name().to_str().and_then(|n| n.parse().ok()) {
            all.extend(children_of(files, thread)?);
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

fn children_of(files: &Kept, thread: i32) -> Result<Vec<i32>> {
    match files.text(format!("task/{thread}/children")) {
        Ok(text) => Ok(text
            .split_whitespace()
            .filter_map(|w| w.parse::<i32>().ok())
            .collect()),
        // A kernel without CONFIG_PROC_CHILDREN, or a thread that ended.
        Err(Error::Os { cause, .. }) if cause.raw_os_error() == Some(libc::ENOENT) => {
            children_by_parent(files.pid())
        }
        Err(e) => Err(e),
    }
}

fn children_by_parent(pid: i32) -> Result<Vec<i32>> {
    Ok(fs::read_dir("/proc")
        .context("list", "/proc")?
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
        .filter(|p| Status::read(*p).is_ok_and(|s| s.ppid == pid))
        .collect())
}

fn timers(files: &Kept) -> Result<Vec<Obstacle>> {
    let text = match files.text("timers") {
        // Kernels without CONFIG_POSIX_TIMERS have none to show.
        Err(Error::Os { cause, .. }) if cause.raw_os_error() == Some(libc::ENOENT) => {
            return Ok(Vec::new())
        }
        other => other?,
    };
    Ok(text
        .lines()
        .filter_map(|l| l.strip_prefix("ID:"))
        .map(|id| {
            Obstacle::new(
                format!("timer {}", id.trim()),
                "made by timer_create; timers are not carried",
                "",
            )
        })
        .collect())
}

fn namespaces(files: &Kept) -> Result<Vec<Obstacle>> {
    let mut all = Vec::new();
    // pmig stays where it is.
    static OWN: OnceLock<[Option<OsString>; NAMESPACES.len()]> = OnceLock::new();
    let own = OWN.get_or_init(|| {
        let own = Kept::of(std::process::id() as i32);
        NAMESPACES.map(|name| own.namespace(name).ok())
    });
    for (i, name) in NAMESPACES.into_iter().enumerate() {
        let Some(own) = own[i].as_ref() else {
            continue; // not in this kernel
        };
        let theirs = match files.namespace(name) {
            Ok(l) => l,
            // Before the first child there is no namespace for children.
            Err(Errno::ENOENT) if name == "pid_for_children" => continue,
            Err(e) => {
                let object = format!("/proc/{}/ns/{name}", files.pid());
                return Err(e).context("read", object);
            }
        };
        if *own != theirs {
            all.push(Obstacle::new(
                format!("{name} namespace"),
                "is not the one pmig runs in",
                "run pmig inside the container, if that is what it is",
            ));
        }
    }
    Ok(all)
}

/// A label of AppArmor or SELinux confines what the target would not.
fn label(files: &Kept) -> Option<Obstacle> {
    let read = |of: &Kept| of.text("attr/current").ok();
    let clean = |l: String| l.trim_matches(['\0', '\n', ' ']).to_string();
    static OWN: OnceLock<Option<String>> = OnceLock::new();
    // Where pmig itself has none to read, no security module labels anything.
    let own = OWN
        .get_or_init(|| read(&Kept::of(std::process::id() as i32)).map(clean))
        .as_ref()?;
    let theirs = clean(read(files)?);
    let free = theirs.is_empty() || theirs == "unconfined" || theirs == "kernel";
    if free || *own == theirs {
        return None;
    }
    Some(Obstacle::new(
        format!("security label {theirs}"),
        "the process is confined by it, and the target would not be",
        "start the program unconfined",
    ))
}

fn is_32_bit(pid: i32) -> Result<bool> {
    let path = format!("/proc/{pid}/exe");
    let mut head = [0u8; 5];
    let read = File::open(&path).and_then(|mut f| f.read_exact(&mut head));
    match read {
        // EI_CLASS of elf(5): 1 is 32-bit.
        Ok(()) => Ok(head[4] == 1),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Err(Error::Gone(pid)),
        Err(e) => Err(e).context("read", path),
    }
}

/// Mappings bound to memory nodes by mbind(2).
fn memory_nodes(pid: i32) -> Result<Vec<Obstacle>> {
    let nodes = proc::setting("/sys/devices/system/node/online")
        .and_then(|l| proc::ranges(&l, 1024))
        .unwrap_or_default();
    if nodes.len() < 2 {
        // A single node is what any policy comes to, and walking all memory
        // for the answer is dear.
        return Ok(Vec::new());
    }
    let Ok(maps) = proc::text(pid, "numa_maps") else {
        return Ok(Vec::new());
    };
    Ok(maps
        .lines()
        .filter_map(|l| {
            let mut words = l.split_whitespace();
            let (at, policy) = (words.next()?, words.next()?);
            (policy != "default").then(|| {
                Obstacle::new(
                    format!("mapping {at}"),
                    format!("has the memory policy {policy}"),
                    "start the program without numactl",
                )
            })
        })
        .take(8)
        .collect())
}

/// Limits of any process: by the call where it is permitted.
///
/// # Errors
/// [`Error::Gone`]; those of procfs.
pub fn limits_of(pid: i32) -> Result<Limits> {
    Limits::of(pid).or_else(|_| limits_text(pid))
}

fn limits_text(pid: i32) -> Result<Limits> {
    let text = proc::text(pid, "limits")?;
    let l = LimitsText::from_buf_read(text.as_bytes())
        .map_err(|e| Error::bad(format!("/proc/{pid}/limits"), e))?;
    let number = |v: LimitValue| match v {
        LimitValue::Unlimited => u64::MAX,
        LimitValue::Value(v) => v,
    };
    let all = [
        l.max_cpu_time,
        l.max_file_size,
        l.max_data_size,
        l.max_stack_size,
        l.max_core_file_size,
        l.max_resident_set,
        l.max_processes,
        l.max_open_files,
        l.max_locked_memory,
        l.max_address_space,
        l.max_file_locks,
        l.max_pending_signals,
        l.max_msgqueue_size,
        l.max_nice_priority,
        l.max_realtime_priority,
        l.max_realtime_timeout,
    ];
    Ok(Limits(
        all.into_iter()
            .map(|l| Limit {
                soft: number(l.soft_limit),
                hard: number(l.hard_limit),
            })
            .collect(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    struct Kill(Child);

    impl Drop for Kill {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn run(program: &str, args: &[&str]) -> Kill {
        Kill(Command::new(program).args(args).spawn().unwrap())
    }

    #[test]
    fn a_plain_program_may_move() {
        let child = run("/bin/sleep", &["60"]);
        assert_eq!(preflight(child.0.id() as i32).unwrap(), vec![]);
        let needs = needs(child.0.id() as i32).unwrap();
        assert_eq!(needs.limits, Limits::own().unwrap());
    }

    #[test]
    fn limits_read_as_text_are_the_same() {
        let me = std::process::id() as i32;
        assert_eq!(limits_text(me).unwrap(), Limits::own().unwrap());
    }

    #[test]
    fn threads_and_children_are_named() {
        let me = std::process::id() as i32;
        let child = run("/bin/sleep", &["60"]);
        let all = preflight(me).unwrap();
        assert!(all.iter().any(|o| o.object == "threads"), "{all:?}");
        let id = child.0.id().to_string();
        assert!(
            all.iter()
                .any(|o| o.object == "children" && o.why.contains(&id)),
            "{all:?}"
        );
    }

    #[test]
    fn init_and_the_kernel_are_not_moved() {
        assert_eq!(preflight(1).unwrap().len(), 1);
        if proc::text(2, "comm").is_ok_and(|c| c == "kthreadd\n") {
            assert!(preflight(2).unwrap()[0].why.contains("kernel"));
        }
    }

    #[test]
    fn a_stopped_process_is_named() {
        let child = run("/bin/sleep", &["60"]);
        let pid = child.0.id() as i32;
        let stop = nix::sys::signal::Signal::SIGSTOP;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), stop).unwrap();
        for _ in 0..100 {
            if Status::read(pid).unwrap().letter == 'T' {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let all = preflight(pid).unwrap();
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(all[0].object, "job control");
    }
}
