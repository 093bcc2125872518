//! The same by the kernel module: one call instead of a batch, and no code run
//! inside the process.

use std::os::fd::AsFd;

use super::{inside, limits_of, recheck, CaptureContext, Pcb};
use crate::error::{Context, Error, Obstacle, Result};
use crate::proc::stat::Stat;
use crate::proc::status::Status;
use crate::proc::Kept;
use crate::state::attributes::{Attributes, Told};
use crate::state::bounds::Bounds;
use crate::state::credentials::Credentials;
use crate::state::registers::{Registers, Rseq, UserAreas};
use crate::state::restart::{self, ProgramClock, Restart, Timed, Wait};
use crate::state::scheduling::Scheduling;
use crate::state::signals::{Action, AltStack, SigInfo, Signals};
use crate::sys::cpu::xstate_layout;
use crate::sys::kmod::{abi, section_name, Kmod, RawPcb, RestoreError};
use crate::sys::pidfd;
use crate::sys::ptrace::Regs;
use crate::tracee::{Batch, Stopped};

const CAPTURED: u64 = abi::SEC_XSTATE
    | abi::SEC_SIGMASK
    | abi::SEC_ALTSTACK
    | abi::SEC_PENDING
    | abi::SEC_SHARED_PENDING
    | abi::SEC_RESTART
    | abi::SEC_SCHED
    | abi::SEC_COMM
    | abi::SEC_TIDS
    | abi::SEC_RSEQ
    | abi::SEC_PRCTL
    | abi::SEC_SIGACTIONS
    | abi::SEC_MM
    | abi::SEC_OOM
    | abi::SEC_ITIMERS
    | abi::SEC_OWN
    | abi::SEC_INFO;

const RESTORED: u64 =
    abi::SEC_ALTSTACK | abi::SEC_SIGACTIONS | abi::SEC_PENDING | abi::SEC_SHARED_PENDING;

/// What the module sees and nobody carries.
const REFUSED: [(u64, &str, &str); 12] = [
    (abi::HAS_IO_PORTS, "io ports", "opened by ioperm or iopl"),
    (
        abi::HAS_LDT | abi::HAS_TLS_DESC,
        "segment descriptors",
        "the program has segments of its own (set_thread_area or modify_ldt)",
    ),
    (
        abi::HAS_BREAKPOINTS,
        "hardware breakpoints",
        "a debugger left them behind",
    ),
    (
        abi::HAS_POSIX_TIMERS,
        "timers",
        "made by timer_create; timers are not carried",
    ),
    (abi::HAS_IO_URING, "io_uring", "is in use"),
    (
        abi::HAS_SEM_UNDO,
        "semaphores",
        "the program has undo values (SEM_UNDO) for this machine's semaphores",
    ),
    (abi::HAS_AIO, "asynchronous io", "has a context (io_setup)"),
    (
        abi::HAS_UPROBES,
        "probes",
        "somebody traces its code with uprobes",
    ),
    (
        abi::HAS_PI_FUTEX,
        "futex",
        "the program holds one with priority inheritance",
    ),
    (
        abi::HAS_SHARED_MM | abi::HAS_SHARED_SIGHAND,
        "address space",
        "is shared with another process",
    ),
    (
        abi::HAS_IO_FLUSHER,
        "io flusher state (PR_SET_IO_FLUSHER)",
        "the process serves a block device of this machine",
    ),
    (
        abi::HAS_DISPATCH,
        "system call user dispatch",
        "the program catches its own system calls",
    ),
];

/// Settings whose values the module leaves to the process to tell.
const ASKED: u64 =
    abi::HAS_NO_TSC | abi::HAS_NO_CPUID | abi::HAS_MDWE | abi::HAS_KSM | abi::HAS_SPECULATION;
/// AMX tiles need a permission that only the process can tell.
const XTILE_DATA: u64 = 1 << 18;

/// `PF_*` of the kernel's `sched.h`, in the flags of `/proc/PID/stat`.
const PF_MCE_PROCESS: u32 = 0x80;
const PF_MCE_EARLY: u32 = 0x0800_0000;

pub fn capture(kmod: &Kmod, stopped: &mut Stopped, context: &CaptureContext) -> Result<Pcb> {
    let pid = stopped.pid();
    let raw = raw_capture(kmod, stopped)?;
    let status = Status::again(context.files)?;
    let mut obstacles = recheck(stopped, &status);
    obstacles.extend(refusals(&raw));
    let scheduling = Scheduling::capture(pid)?;
    obstacles.extend(scheduling.obstacles());
    let regs = stopped.regs();
    let restart = restart_of(&raw.pcb, &regs, context.clock);
    if restart.is_none() {
        obstacles.push(Restart::unknown(&regs, "try again when it is elsewhere"));
    }
    if !obstacles.is_empty() {
        return Err(Error::Refused(obstacles));
    }
    let attributes = attributes(stopped, context.files, &status, &raw.pcb)?;
    let p = &raw.pcb;
    Ok(Pcb {
        registers: Registers {
            general: regs,
            xstate: raw.xstate.clone(),
            layout: xstate_layout().clone(),
        },
        areas: UserAreas {
            rseq: (p.rseq.ptr != 0).then_some(Rseq {
                address: p.rseq.ptr,
                size: p.rseq.len,
                signature: p.rseq.sig,
            }),
            robust_list: p.tids.robust_list,
            tid_address: p.tids.clear_child_tid,
        },
        restart: restart.unwrap_or_default(),
        signals: signals(&raw),
        credentials: Credentials {
            securebits: p.own.securebits,
            ..Credentials::from_status(&status)
        },
        limits: limits_of(pid)?,
        scheduling,
        attributes,
        bounds: bounds(&p.mm)?,
    })
}

/// The module wants the stop of PTRACE_INTERRUPT, and the program's own registers.
fn raw_capture(kmod: &Kmod, stopped: &mut Stopped) -> Result<RawPcb> {
    let pid = stopped.pid();
    let fd = pidfd::open(pid).context("open process", pid)?;
    let result = match kmod.capture(fd.as_fd(), CAPTURED) {
        Err(e) if e.raw_os_error() == Some(libc::EPROTO) => {
            stopped.stop_anew()?;
            stopped.settle()?;
            kmod.capture(fd.as_fd(), CAPTURED)
        }
        r => r,
    };
    result.map_err(|e| match e.raw_os_error() {
        Some(libc::ESRCH) => Error::Gone(pid),
        _ => Error::Os {
            op: "capture by the kernel module",
            object: format!("process {pid}"),
            cause: e,
        },
    })
}

fn refusals(raw: &RawPcb) -> Vec<Obstacle> {
    let p = &raw.pcb;
    let timers = [
        p.itimers.real.value_ns != 0,
        p.itimers.virt_armed != 0,
        p.itimers.prof_armed != 0,
    ];
    let mut all: Vec<Obstacle> = REFUSED
        .iter()
        .filter(|(bits, _, _)| p.info.has & bits != 0)
        // The file names them one by one.
        .filter(|(bits, _, _)| *bits != abi::HAS_POSIX_TIMERS)
        .map(|(_, object, why)| Obstacle::new(object, why, ""))
        .collect();
    if p.mm.mlock_future != 0 {
        all.push(inside::locks_future());
    }
    all.extend(inside::armed(timers));
    all
}

fn attributes(
    stopped: &mut Stopped,
    files: &Kept,
    status: &Status,
    p: &abi::Pcb,
) -> Result<Attributes> {
    if p.info.has & ASKED != 0 || xstate_layout().xcr0 & XTILE_DATA != 0 {
        let mut batch = Batch::new();
        let asked = Attributes::ask(&mut batch);
        let done = stopped.run(batch)?;
        return Ok(Attributes::capture(Told::by(files)?, status, &asked, &done));
    }
    let [flags] = Stat::again(files)?.fields(9)?;
    let name = &p.comm.comm;
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    Ok(Attributes {
        comm: name[..end].to_vec(),
        personality: p.prctl.personality,
        umask: status.umask.unwrap_or(0o022),
        parent_death_signal: p.prctl.pdeath_signal as i32,
        dumpable: p.mm.dumpable,
        child_subreaper: p.own.child_subreaper != 0,
        thp_disable: p.mm.thp_disable,
        timer_slack: p.sched.timer_slack_ns,
        oom_score_adj: p.oom.score_adj,
        coredump_filter: p.mm.coredump_filter,
        tsc: 1,
        cpuid_faults: false,
        mce_kill: match flags as u32 {
            f if f & PF_MCE_PROCESS == 0 => 2,
            f => (f & PF_MCE_EARLY != 0) as u32,
        },
        mdwe: 0,
        memory_merge: false,
        speculation: [0; 3],
        xstate_permission: 0,
    })
}

fn signals(raw: &RawPcb) -> Signals {
    let p = &raw.pcb;
    let queue = |shared: bool| {
        raw.siginfos
            .iter()
            .filter(|s| (s.flags & abi::SI_SHARED != 0) == shared)
            .map(|s| match s.flags & abi::SI_BARE {
                0 => SigInfo::from_bytes(&s.info),
                _ => SigInfo::bare(s.signo),
            })
            .collect()
    };
    Signals {
        actions: p
            .sigactions
            .iter()
            .map(|a| Action {
                handler: a.handler,
                flags: a.flags,
                restorer: a.restorer,
                mask: a.mask,
            })
            .collect(),
        mask: match p.sigmask.has_saved {
            0 => p.sigmask.blocked,
            _ => p.sigmask.saved,
        },
        altstack: AltStack {
            base: p.altstack.sp,
            flags: p.altstack.flags,
            size: p.altstack.bytes,
        },
        private: queue(false),
        shared: queue(true),
    }
}

fn bounds(m: &abi::Mm) -> Result<Bounds> {
    let words = &m.auxv[..(m.auxv_count as usize).min(m.auxv.len())];
    // As /proc/PID/auxv: up to and with the null entry.
    let end = words
        .chunks_exact(2)
        .position(|c| c[0] == 0)
        .map_or(words.len(), |n| 2 * n + 2);
    let bounds = Bounds {
        start_code: m.start_code,
        end_code: m.end_code,
        start_data: m.start_data,
        end_data: m.end_data,
        start_brk: m.start_brk,
        brk: m.brk,
        start_stack: m.start_stack,
        arg_start: m.arg_start,
        arg_end: m.arg_end,
        env_start: m.env_start,
        env_end: m.env_end,
        auxv: words[..end].iter().flat_map(|w| w.to_le_bytes()).collect(),
    };
    bounds.check()?;
    Ok(bounds)
}

/// `None` for a wait that cannot be carried.
fn restart_of(p: &abi::Pcb, regs: &Regs, clock: ProgramClock) -> Option<Restart> {
    if regs.rax as i64 != restart::ERESTART_RESTARTBLOCK {
        return Some(Restart::Registers);
    }
    let args = restart::args_of(regs);
    let r = &p.restart;
    let place = match r.kind {
        abi::RESTART_NANOSLEEP => "nanosleep",
        abi::RESTART_POLL => "poll",
        abi::RESTART_FUTEX => "futex",
        _ => return None,
    };
    let call = match regs.orig_rax as i64 {
        restart::RESTART => restart::guess(place, &args)?,
        call => call,
    };
    match restart::wait(call, &args)? {
        Wait::Registers => Some(Restart::Again(call)),
        _ if r.deadline_ns >= abi::FOREVER => None,
        _ => {
            let left = r.deadline_ns as i64 - r.now_ns as i64;
            let now = p.info.now_monotonic_ns as i64;
            Some(Restart::Timed(Timed {
                call,
                args,
                deadline: now.checked_add(left)?.checked_add(clock.offset)?,
            }))
        }
    }
}

/// The other way round: on the restoring machine's CLOCK_MONOTONIC.
fn restart_block(timed: &Timed, clock: ProgramClock) -> Result<abi::Restart> {
    let args = &timed.args;
    let deadline = timed.deadline.saturating_sub(clock.offset).max(1) as u64;
    let block = abi::Restart {
        clockid: libc::CLOCK_MONOTONIC,
        deadline_ns: deadline.min(abi::FOREVER - 1),
        ..Default::default()
    };
    match (restart::wait(timed.call, args), timed.call) {
        (Some(Wait::Relative { left, .. }), restart::NANOSLEEP | restart::CLOCK_NANOSLEEP) => {
            Ok(abi::Restart {
                kind: abi::RESTART_NANOSLEEP,
                uaddr: left,
                has_rmtp: (left != 0) as u32,
                ..block
            })
        }
        (Some(Wait::Milliseconds(_)), _) => Ok(abi::Restart {
            kind: abi::RESTART_POLL,
            uaddr: args[0],
            nfds: args[1] as u32,
            has_timeout: 1,
            ..block
        }),
        (Some(Wait::Relative { .. }), restart::FUTEX) => Ok(abi::Restart {
            kind: abi::RESTART_FUTEX,
            uaddr: args[0],
            futex_val: args[2] as u32,
            futex_flags: abi::FUTEX_TIMEOUT
                | match args[1] & FUTEX_PRIVATE {
                    0 => abi::FUTEX_SHARED,
                    _ => 0,
                },
            futex_bitset: u32::MAX,
            ..block
        }),
        _ => Err(Error::bad(
            "interrupted call",
            format!("system call {} has no restart block", timed.call),
        )),
    }
}

const FUTEX_PRIVATE: u64 = 128;

pub fn finish(kmod: &Kmod, pid: i32, pcb: &Pcb, clock: ProgramClock) -> Result<()> {
    let (_, timed) = pcb.restart.with(&pcb.registers.general)?;
    let block = timed.map(|t| restart_block(t, clock)).transpose()?;
    let raw = raw_signals(&pcb.signals, block)?;
    let fd = pidfd::open(pid).context("open process", pid)?;
    kmod.restore(fd.as_fd(), &raw, raw.sections, None)
        .map_err(|e| failure(pid, e))
}

fn failure(pid: i32, e: RestoreError) -> Error {
    Error::Os {
        op: "restore by the kernel module",
        object: format!("{} of process {pid}", section_name(e.failed)),
        cause: e.source,
    }
}

fn raw_signals(s: &Signals, block: Option<abi::Restart>) -> Result<RawPcb> {
    s.check()?;
    let mut raw = RawPcb::empty();
    raw.sections = RESTORED;
    if let Some(block) = block {
        raw.sections |= abi::SEC_RESTART;
        raw.pcb.restart = block;
    }
    for (to, a) in raw.pcb.sigactions.iter_mut().zip(&s.actions) {
        *to = abi::Sigaction {
            handler: a.handler,
            flags: a.flags,
            restorer: a.restorer,
            mask: a.mask,
        };
    }
    raw.pcb.altstack = abi::Altstack {
        sp: s.altstack.base,
        bytes: s.altstack.size,
        flags: s.altstack.flags,
        reserved: 0,
    };
    for (queue, flags) in [(&s.private, 0), (&s.shared, abi::SI_SHARED)] {
        for info in queue {
            let mut entry = abi::Siginfo {
                signo: info.signal() as u32,
                flags,
                ..Default::default()
            };
            entry.info.copy_from_slice(&info.bytes());
            raw.siginfos.push(entry);
        }
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked(orig: i64, args: [u64; 6]) -> Regs {
        Regs {
            rax: restart::ERESTART_RESTARTBLOCK as u64,
            orig_rax: orig as u64,
            rdi: args[0],
            rsi: args[1],
            rdx: args[2],
            r10: args[3],
            r8: args[4],
            r9: args[5],
            ..Regs::default()
        }
    }

    fn pcb(kind: u32, deadline: u64) -> Box<abi::Pcb> {
        let mut p = Box::<abi::Pcb>::default();
        p.restart.kind = kind;
        p.restart.deadline_ns = deadline;
        p.restart.now_ns = 1_000;
        p.info.now_monotonic_ns = 5_000;
        p
    }

    #[test]
    fn deadlines_come_in_the_programs_time() {
        let clock = ProgramClock { offset: 100 };
        let p = pcb(abi::RESTART_NANOSLEEP, 3_000);
        let regs = blocked(restart::RESTART, [0x7000, 0x8000, 0, 0, 0, 0]);
        let Some(Restart::Timed(t)) = restart_of(&p, &regs, clock) else {
            panic!("no deadline");
        };
        assert_eq!((t.call, t.deadline), (restart::NANOSLEEP, 7_100));
        let block = restart_block(&t, ProgramClock { offset: 7_000 }).unwrap();
        assert_eq!((block.deadline_ns, block.now_ns), (100, 0));
        assert_eq!((block.uaddr, block.has_rmtp), (0x8000, 1));
    }

    #[test]
    fn waits_without_a_block_of_their_own_are_made_again() {
        let p = pcb(abi::RESTART_POLL, abi::FOREVER);
        let regs = blocked(restart::RESTART, [1, 1, u32::MAX as u64, 0, 0, 0]);
        assert_eq!(
            restart_of(&p, &regs, ProgramClock::default()),
            Some(Restart::Again(restart::POLL))
        );
        let p = pcb(abi::RESTART_CPU_SLEEP, 3_000);
        assert_eq!(restart_of(&p, &regs, ProgramClock::default()), None);
        assert_eq!(
            restart_of(&p, &Regs::default(), ProgramClock::default()),
            Some(Restart::Registers)
        );
    }

    #[test]
    fn a_futex_wait_keeps_its_scope() {
        let t = |op| Timed {
            call: restart::FUTEX,
            args: [1, op, 3, 4, 0, 0],
            deadline: 9,
        };
        let clock = ProgramClock::default();
        let shared = restart_block(&t(0), clock).unwrap();
        assert_eq!(shared.futex_flags, abi::FUTEX_TIMEOUT | abi::FUTEX_SHARED);
        let private = restart_block(&t(FUTEX_PRIVATE), clock).unwrap();
        assert_eq!(private.futex_flags, abi::FUTEX_TIMEOUT);
        assert!(restart_block(&t(1), clock).is_err());
    }

    #[test]
    fn the_auxiliary_vector_ends_with_its_null() {
        let mut m = abi::Mm {
            start_code: 1,
            end_code: 2,
            start_data: 1,
            end_data: 2,
            start_brk: 1,
            brk: 2,
            start_stack: 1,
            arg_start: 1,
            arg_end: 2,
            env_start: 1,
            env_end: 2,
            auxv_count: 8,
            ..Default::default()
        };
        m.auxv[..4].copy_from_slice(&[6, 4096, 0, 0]);
        assert_eq!(bounds(&m).unwrap().auxv.len(), 32);
        m.auxv_count = u32::MAX;
        assert_eq!(bounds(&m).unwrap().auxv.len(), 32);
    }
}
