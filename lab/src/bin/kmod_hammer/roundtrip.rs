//! Capture one process, restore into another, and let that one go on.

use crate::raw;
use crate::victim::{accepted, module, refused, Victim};
use pmig::sys::kmod::{abi, Kmod, RawPcb};
use pmig::sys::ptrace;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

type Outcome = Result<(), String>;

const MARK: u64 = 0x0123_4567_89ab_cdef;
const SLEEP_MS: u64 = 1500;
/// That it ends at all: when it is due is seen by the deadline itself, for between
/// capture and end lies as much time as the machine takes.
const LATE_MS: u64 = 20_000;

fn text(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |e| format!("{what}: {e}")
}

/// What a victim waits in, and what must come of it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wait {
    Nanosleep,
    Poll,
    Futex,
    Sigsuspend,
    Read,
}

const WAITS: [Wait; 5] = [
    Wait::Nanosleep,
    Wait::Poll,
    Wait::Futex,
    Wait::Sigsuspend,
    Wait::Read,
];

impl Wait {
    fn is_timed(self) -> bool {
        matches!(self, Wait::Nanosleep | Wait::Poll | Wait::Futex)
    }
}

fn monotonic_ns() -> Result<u64, String> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_err(|e| format!("clock: {e}"))?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// The signals a victim queues to itself: signal, code, shared.
const QUEUED: [(i32, i32, bool); 8] = [
    (libc::SIGUSR2, -1, false),
    (40, -1, false),
    (40, -42, false),
    (41, 0, false),
    (libc::SIGCONT, -6, false),
    (40, -1, true),
    (libc::SIGHUP, 0x80, true),
    (42, -60, true),
];

fn siginfo(i: usize) -> [u8; 128] {
    let (signal, code, _) = QUEUED[i];
    let mut info = [0u8; 128];
    info[0..4].copy_from_slice(&signal.to_ne_bytes());
    info[8..12].copy_from_slice(&code.to_ne_bytes());
    // A sender and a value that only an exact copy keeps.
    for (k, byte) in info[16..48].iter_mut().enumerate() {
        *byte = (i * 32 + k + 1) as u8;
    }
    info
}

/// The order in which the kernel hands them out: private before shared, then
/// by number, then as queued.
fn expected_order() -> Vec<usize> {
    let mut order: Vec<usize> = (0..QUEUED.len()).collect();
    order.sort_by_key(|&i| (QUEUED[i].2, QUEUED[i].0));
    order
}

/// A child's whole life; 0 if everything was as it must be.
fn live(wait: Wait) -> i32 {
    let mask = QUEUED.iter().fold(bit(libc::SIGTERM), |m, q| m | bit(q.0));
    let stack = raw::use_altstack(64 << 10);
    raw::handle(libc::SIGUSR1);
    raw::handle(libc::SIGALRM);
    raw::set_mask(mask);
    for (i, q) in QUEUED.iter().enumerate() {
        if raw::queue_to_self(q.0, &siginfo(i), q.2).is_err() {
            return 10;
        }
    }
    let spec = [SLEEP_MS as i64 / 1000, SLEEP_MS as i64 % 1000 * 1_000_000];
    let word = 7u32;
    let mut byte = [0u8; 1];
    // Everything but SIGUSR1, which will end the wait.
    let suspended = !bit(libc::SIGUSR1);
    let begun = Instant::now();
    let p = |x: &[i64]| x.as_ptr() as u64;
    let (nr, args, want) = match wait {
        Wait::Nanosleep => (libc::SYS_nanosleep, [p(&spec), 0, 0, 0, 0, 0], 0),
        Wait::Poll => (libc::SYS_poll, [0, 0, SLEEP_MS, 0, 0, 0], 0),
        Wait::Futex => (
            libc::SYS_futex,
            [&raw const word as u64, 128, 7, p(&spec), 0, 0],
            -i64::from(libc::ETIMEDOUT),
        ),
        Wait::Sigsuspend => (
            libc::SYS_rt_sigsuspend,
            [&raw const suspended as u64, 8, 0, 0, 0, 0],
            -i64::from(libc::EINTR),
        ),
        Wait::Read => (libc::SYS_read, [0, byte.as_mut_ptr() as u64, 1, 0, 0, 0], 1),
    };
    let (result, xmm, r12) = raw::marked_syscall(nr, args, MARK);
    let slept = begun.elapsed();
    if result != want {
        return 20;
    }
    if xmm != MARK || r12 != MARK {
        return 21;
    }
    let timed = wait.is_timed();
    if timed && slept < Duration::from_millis(SLEEP_MS) {
        return 22;
    }
    if timed && slept > Duration::from_millis(SLEEP_MS + LATE_MS) {
        return 23;
    }
    if wait == Wait::Sigsuspend && raw::handled() != bit(libc::SIGUSR1) {
        return 24;
    }
    if wait == Wait::Read && byte[0] != b'x' {
        return 25;
    }
    if raw::altstack() != (stack, 64 << 10, 0) {
        return 30;
    }
    // The mask is whole again, also after sigsuspend.
    if raw::set_mask(!0) != mask {
        return 31;
    }
    for i in expected_order() {
        if raw::take_signal(!0) != Some(siginfo(i)) {
            return 40 + i as i32;
        }
    }
    if raw::take_signal(!0).is_some() {
        return 50;
    }
    0
}

/// Copies all private writable memory of one child to another forked from the
/// same program, by the module's list of mappings.
fn copy_memory(kmod: &Kmod, from: &Victim, to: &Victim) -> Outcome {
    let source = File::open(format!("/proc/{}/mem", from.pid)).map_err(text("open source"))?;
    let target = OpenOptions::new()
        .write(true)
        .open(format!("/proc/{}/mem", to.pid))
        .map_err(text("open target"))?;
    let wanted =
        |v: &abi::Vma| v.flags & abi::VM_WRITE != 0 && v.flags & (abi::VM_SHARED | abi::VM_IO) == 0;
    let theirs = kmod.vmas(to.fd()).map_err(text("vmas of target"))?;
    for vma in kmod.vmas(from.fd()).map_err(text("vmas of source"))? {
        if !wanted(&vma) {
            continue;
        }
        // A stack that grew further in one of them: what both have.
        let Some(other) = theirs
            .iter()
            .find(|o| wanted(o) && o.start < vma.end && vma.start < o.end)
        else {
            return Err(format!("target has nothing at {:#x}", vma.start));
        };
        let start = vma.start.max(other.start);
        let mut bytes = vec![0u8; (vma.end.min(other.end) - start) as usize];
        source
            .read_exact_at(&mut bytes, start)
            .map_err(text("read memory"))?;
        target
            .write_all_at(&bytes, start)
            .map_err(text("write memory"))?;
    }
    Ok(())
}

fn same_vmas_as_proc(kmod: &Kmod, victim: &Victim) -> Outcome {
    let maps = fs::read_to_string(format!("/proc/{}/maps", victim.pid)).map_err(text("maps"))?;
    let mut lines = Vec::new();
    for line in maps.lines().filter(|l| !l.ends_with("[vsyscall]")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        lines.push(words[..5].join(" "));
    }
    let mut mine = Vec::new();
    for v in kmod.vmas(victim.fd()).map_err(text("vmas"))? {
        let flag = |bit, c| if v.flags & bit != 0 { c } else { '-' };
        mine.push(format!(
            "{:08x}-{:08x} {}{}{}{} {:08x} {:02x}:{:02x} {}",
            v.start,
            v.end,
            flag(abi::VM_READ, 'r'),
            flag(abi::VM_WRITE, 'w'),
            flag(abi::VM_EXEC, 'x'),
            if v.flags & abi::VM_MAYSHARE != 0 {
                's'
            } else {
                'p'
            },
            v.offset,
            v.dev_major,
            v.dev_minor,
            v.ino
        ));
    }
    if lines != mine {
        return Err(format!("mappings differ:\n{lines:#?}\n{mine:#?}"));
    }
    Ok(())
}

fn same(
    what: &str,
    mine: impl PartialEq + std::fmt::Debug,
    theirs: impl std::fmt::Debug,
) -> Outcome {
    let (a, b) = (format!("{mine:x?}"), format!("{theirs:x?}"));
    if a == b {
        Ok(())
    } else {
        Err(format!("{what}: module {a}, kernel's other interface {b}"))
    }
}

fn status_field(pid: i32, key: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(key))?;
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).ok()
}

/// Compares a capture with everything that ptrace and /proc also say.
fn compare(victim: &Victim, raw: &RawPcb) -> Outcome {
    let pid = victim.pid;
    let pcb = &raw.pcb;
    let regs = ptrace::regs(pid).map_err(text("regs"))?;
    same("rip", pcb.regs.rip, regs.rip)?;
    same("rax", pcb.regs.rax, regs.rax)?;
    same("orig_rax", pcb.regs.orig_rax, regs.orig_rax)?;
    same("r12", pcb.regs.r12, regs.r12)?;
    same("fs_base", pcb.regs.fs_base, regs.fs_base)?;
    same("gs", pcb.regs.gs, regs.gs)?;
    same(
        "xstate",
        &raw.xstate,
        ptrace::xstate(pid).map_err(text("xstate"))?,
    )?;
    let blocked = if pcb.sigmask.has_saved != 0 {
        pcb.sigmask.saved
    } else {
        pcb.sigmask.blocked
    };
    same("mask", blocked, ptrace::sigmask(pid).map_err(text("mask"))?)?;
    for shared in [false, true] {
        let mine: Vec<[u8; 48]> = raw
            .siginfos
            .iter()
            .filter(|s| (s.flags & abi::SI_SHARED != 0) == shared)
            .map(|s| s.info[..48].try_into().unwrap_or([0; 48]))
            .collect();
        let theirs: Vec<[u8; 48]> = ptrace::pending(pid, shared)
            .map_err(text("pending"))?
            .iter()
            .map(|s| s[..48].try_into().unwrap_or([0; 48]))
            .collect();
        same("pending", mine, theirs)?;
    }
    let rseq = ptrace::rseq(pid).map_err(text("rseq"))?;
    same(
        "rseq",
        (pcb.rseq.ptr, pcb.rseq.sig),
        (rseq.address, rseq.signature),
    )?;
    let caught = (0..64).fold(0, |m, i| m | u64::from(pcb.sigactions[i].handler > 1) << i);
    same("SigCgt", Some(caught), status_field(pid, "SigCgt"))?;
    let name = fs::read(format!("/proc/{pid}/comm")).map_err(text("comm"))?;
    let len = name.len() - 1;
    same("comm", &pcb.comm.comm[..len], &name[..len])?;
    let auxv = fs::read(format!("/proc/{pid}/auxv")).map_err(text("auxv"))?;
    let mine: Vec<u8> = pcb.mm.auxv.iter().flat_map(|w| w.to_ne_bytes()).collect();
    same("auxv", &mine[..auxv.len()], &auxv)?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(text("stat"))?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    // proc_pid_stat(5): start_brk is field 47, arg_start 48 to env_end 51.
    let field = |n: usize| fields.get(n - 3).and_then(|f| f.parse::<u64>().ok());
    same("start_brk", Some(pcb.mm.start_brk), field(47))?;
    same("arg_start", Some(pcb.mm.arg_start), field(48))?;
    same("env_end", Some(pcb.mm.env_end), field(51))?;
    same(
        "nice",
        Some(pcb.sched.nice),
        fields.get(16).and_then(|f| f.parse::<i32>().ok()),
    )?;
    same("pid", pcb.info.pid, pid as u32)
}

fn finish(kmod: &Kmod, wait: Wait, pipe: &std::os::fd::OwnedFd, husk: &Victim) -> Outcome {
    let flags = nix::sys::wait::WaitPidFlag::__WALL;
    let pid = nix::unistd::Pid::from_raw(husk.pid);
    let after = kmod
        .capture(husk.fd(), abi::SEC_RESTART)
        .map_err(text("look again"))?;
    ptrace::detach(husk.pid, 0).map_err(text("detach"))?;
    match wait {
        Wait::Sigsuspend => {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1)
                .map_err(|e| format!("kill: {e}"))?;
        }
        Wait::Read => {
            nix::unistd::write(pipe, b"x").map_err(|e| format!("write: {e}"))?;
        }
        _ => {}
    }
    match nix::sys::wait::waitpid(pid, Some(flags)) {
        Ok(nix::sys::wait::WaitStatus::Exited(_, 0)) => Ok(()),
        other => Err(format!(
            "{wait:?}: the husk ended with {other:?}; {:?}",
            after.pcb.restart
        )),
    }
}

fn one(kmod: &Kmod, wait: Wait) -> Outcome {
    let (reader, writer) = nix::unistd::pipe().map_err(|e| format!("pipe: {e}"))?;
    nix::unistd::dup2_stdin(&reader).map_err(|e| format!("dup2: {e}"))?;
    let source = Victim::new(|| live(wait)).map_err(text("fork"))?;
    source.wait_state('S').map_err(text("source"))?;
    source.stop().map_err(text("stop source"))?;
    // The husk comes from the same image with the same mappings, but has none
    // of what is carried.
    let husk = Victim::new(|| {
        raw::use_altstack(64 << 10);
        loop {
            raw::pause();
        }
    })
    .map_err(text("fork"))?;
    husk.wait_state('S').map_err(text("husk"))?;
    husk.stop().map_err(text("stop husk"))?;

    let begun = Instant::now();
    let captured = kmod
        .capture(source.fd(), kmod.capture_sections())
        .map_err(text("capture"))?;
    let took = begun.elapsed();
    compare(&source, &captured)?;
    same_vmas_as_proc(kmod, &source)?;
    copy_memory(kmod, &source, &husk)?;
    let sections = kmod.restore_sections() & !abi::SEC_EXE;
    let before = monotonic_ns()?;
    kmod.restore(husk.fd(), &captured, sections, None)
        .map_err(|e| e.to_string())?;
    let after = monotonic_ns()?;
    let again = kmod
        .capture(husk.fd(), kmod.capture_sections())
        .map_err(text("capture the husk"))?;
    let mut expect = captured.clone();
    expect.pcb.info = again.pcb.info;
    if wait.is_timed() {
        // As much as was left at the capture is left at the restore.
        let left = captured.pcb.restart.deadline_ns - captured.pcb.restart.now_ns;
        let due = again.pcb.restart.deadline_ns;
        if !(before + left..=after + left).contains(&due) {
            return Err(format!(
                "{wait:?}: due at {due}, where {left} ns were left between {before} and {after}"
            ));
        }
    }
    expect.pcb.restart.deadline_ns = again.pcb.restart.deadline_ns;
    expect.pcb.restart.now_ns = again.pcb.restart.now_ns;
    if expect.pcb != again.pcb || expect.xstate != again.xstate {
        return Err(format!(
            "{wait:?}: {:x?}\nbecame {:x?}",
            expect.pcb, again.pcb
        ));
    }
    if expect.siginfos != again.siginfos {
        return Err(format!("{wait:?}: queues differ"));
    }
    drop(source);
    finish(kmod, wait, &writer, &husk)?;
    println!("ok {wait:?}: captured in {} us", took.as_micros());
    Ok(())
}

/// Every thread of a stopped process, through its own pidfd.
fn threads(kmod: &Kmod) -> Outcome {
    let victim = Victim::new(|| {
        raw::with_threads(3);
        0
    })
    .map_err(text("fork"))?;
    let dir = format!("/proc/{}/task", victim.pid);
    let tids = || -> Vec<i32> {
        let Ok(entries) = fs::read_dir(&dir) else {
            return Vec::new();
        };
        let name = |e: std::io::Result<fs::DirEntry>| e.ok()?.file_name().into_string().ok();
        entries.filter_map(|e| name(e)?.parse().ok()).collect()
    };
    let end = Instant::now() + Duration::from_secs(20);
    while tids().len() < 4 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = nix::unistd::Pid::from_raw(victim.pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)
        .map_err(|e| format!("kill: {e}"))?;
    victim.wait_state('T').map_err(text("threads"))?;
    for tid in tids() {
        let fd = raw::pidfd_of_thread(tid).map_err(text("pidfd of a thread"))?;
        let one = loop {
            match kmod.capture(fd.as_fd(), kmod.capture_sections()) {
                // The stop reaches one thread after the other.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {}
                other => break other.map_err(text("capture of a thread"))?,
            }
        };
        let info = one.pcb.info;
        same(
            "thread",
            (info.pid, info.tgid, info.nr_threads),
            (tid, victim.pid, 4),
        )?;
    }
    Ok(())
}

/// Gives a process another executable, and takes nothing for ever: the file
/// can be written again when the process is gone.
fn executable(kmod: &Kmod) -> Outcome {
    let path = std::env::temp_dir().join("kmod_hammer_exe");
    fs::copy("/proc/self/exe", &path).map_err(text("copy"))?;
    let file = File::open(&path).map_err(text("open"))?;
    let victim = Victim::new(|| loop {
        raw::pause();
    })
    .map_err(text("fork"))?;
    victim.stop().map_err(text("stop"))?;
    for _ in 0..3 {
        kmod.restore(
            victim.fd(),
            &RawPcb::empty(),
            abi::SEC_EXE,
            Some(file.as_fd()),
        )
        .map_err(|e| e.to_string())?;
    }
    let link = fs::read_link(format!("/proc/{}/exe", victim.pid)).map_err(text("readlink"))?;
    same("exe", &link, &path)?;
    let write = || OpenOptions::new().write(true).open(&path);
    let busy = |e: std::io::Error| e.raw_os_error() == Some(libc::ETXTBSY);
    if !write().is_err_and(busy) {
        return Err("a running executable can be written".into());
    }
    drop((victim, file));
    write().map_err(text("write to what was the executable"))?;
    let null = File::open("/dev/null").map_err(text("open"))?;
    let victim = Victim::new(|| 0).map_err(text("fork"))?;
    let refused = kmod.restore(
        victim.fd(),
        &RawPcb::empty(),
        abi::SEC_EXE,
        Some(null.as_fd()),
    );
    if refused.is_ok() {
        return Err("a device became an executable".into());
    }
    fs::remove_file(&path).map_err(text("remove"))
}

pub fn run() -> Outcome {
    let kmod = module()?;
    executable(&kmod)?;
    println!("ok executable");
    threads(&kmod)?;
    println!("ok threads");
    for wait in WAITS {
        one(&kmod, wait)?;
    }
    for r in refused().map_err(text("victims"))? {
        match kmod.capture(r.victim.fd(), kmod.capture_sections()) {
            Err(e) if e.raw_os_error() == Some(r.errno) => println!("ok refused: {}", r.name),
            other => return Err(format!("{}: {:?}", r.name, other.map(|_| "captured"))),
        }
    }
    for (name, victim) in accepted().map_err(text("victims"))? {
        let raw = kmod
            .capture(victim.fd(), kmod.capture_sections())
            .map_err(text(name))?;
        let sections = kmod.restore_sections() & !abi::SEC_EXE;
        kmod.restore(victim.fd(), &raw, sections, None)
            .map_err(|e| format!("{name}: {e}"))?;
        let again = kmod
            .capture(victim.fd(), kmod.capture_sections())
            .map_err(text(name))?;
        same(name, &raw.pcb.regs, again.pcb.regs)?;
        println!("ok accepted: {name}");
    }
    Ok(())
}
