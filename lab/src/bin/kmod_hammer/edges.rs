//! Every field of every structure at its edges, on tasks in every state.

use crate::bytes::{edges, get, leaves, open, put, section_at, Bent, Leaf};
use crate::raw;
use crate::victim::{accepted, module, refused, Refused, Victim};
use pmig::sys::kmod::{abi, Kmod, RawPcb};
use pmig::sys::{pidfd, ptrace};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

type Outcome = Result<(), String>;

fn text(what: &str) -> impl Fn(io::Error) -> String + '_ {
    move |e| format!("{what}: {e}")
}

/// What a call may end with; anything else would be news.
const KNOWN: [i32; 17] = [
    libc::EPERM,
    libc::ESRCH,
    libc::EINTR,
    libc::ENOEXEC,
    libc::EBADF,
    libc::EAGAIN,
    libc::ENOMEM,
    libc::EACCES,
    libc::EFAULT,
    libc::EBUSY,
    libc::EINVAL,
    libc::ENOSPC,
    libc::EDEADLK,
    libc::EPROTO,
    libc::EOPNOTSUPP,
    libc::EINPROGRESS,
    libc::E2BIG,
];

pub fn known(errno: i32) -> bool {
    KNOWN.contains(&errno)
}

/// A child that does things which depend on what was restored into it.
pub fn busy_child() -> io::Result<Victim> {
    let child = Victim::confined(|| {
        raw::use_altstack(16 << 10);
        raw::handle(libc::SIGUSR1);
        loop {
            std::thread::sleep(Duration::from_micros(300));
            raw::exercise();
        }
    })?;
    // Not before its handler and stack are there.
    std::thread::sleep(Duration::from_millis(3));
    ptrace::seize(child.pid, 0)?;
    if settle(&child) {
        Ok(child)
    } else {
        Err(io::Error::other("no stop"))
    }
}

/// Lets a task run for a moment with what it was given, and reads of it what
/// procfs takes from the same fields. False if it did not survive.
pub fn let_run(victim: &Victim) -> bool {
    for file in ["cmdline", "environ", "auxv", "stat", "status", "syscall"] {
        let _ = fs::read(format!("/proc/{}/{file}", victim.pid));
    }
    if emulated() && !keeps_to_code(victim).unwrap_or(false) {
        return false;
    }
    if ptrace::cont(victim.pid, 0).is_err() {
        return false;
    }
    std::thread::sleep(Duration::from_millis(1));
    settle(victim)
}

/// Whether QEMU translates this machine's code. Any user's `retf` can then bring
/// the kernel down, module or not: QEMU 7.2 reads the stack as if it were the
/// kernel's own (helper_ret_protected in target/i386/tcg/seg_helper.c).
fn emulated() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    let name = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_ne_bytes);
    name.concat() == b"TCGTCGTCGTCG"
}

/// Whether a child goes on right behind a system call, and with handlers that
/// are there: in the middle of an instruction any other may begin.
fn keeps_to_code(victim: &Victim) -> io::Result<bool> {
    let memory = fs::File::open(format!("/proc/{}/mem", victim.pid))?;
    let reads = |at: u64, expected: &[u8]| {
        let mut bytes = vec![0; expected.len()];
        memory.read_exact_at(&mut bytes, at).is_ok() && bytes == expected
    };
    let rip = ptrace::regs(victim.pid)?.rip;
    if !reads(rip.wrapping_sub(2), &[0x0f, 0x05]) {
        return Ok(false);
    }
    let Some(kmod) = Kmod::open()? else {
        return Ok(false);
    };
    let raw = kmod.capture(victim.fd(), abi::SEC_SIGACTIONS)?;
    let handlers = raw::handlers();
    // mov rax, rt_sigreturn; syscall
    let restorer = [0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05];
    Ok(raw.pcb.sigactions.iter().all(|action| {
        action.handler <= 1
            || handlers.contains(&action.handler) && reads(action.restorer, &restorer)
    }))
}

/// Brings a tracee into the stop of PTRACE_INTERRUPT. False if it dies first.
fn settle(victim: &Victim) -> bool {
    if ptrace::interrupt(victim.pid).is_err() {
        return false;
    }
    // Signals it sends to itself stop it on the way to the stop asked for.
    for _ in 0..20 {
        if !matches!(
            ptrace::wait(victim.pid, Duration::from_secs(2)),
            Ok(Some(_))
        ) {
            return false;
        }
        let Ok(info) = ptrace::siginfo(victim.pid) else {
            return false;
        };
        let signal = get(&info, 0, 4) as i32;
        match get(&info, 8, 4) {
            0x8005 => return true,
            _ if !matches!(signal, libc::SIGUSR1 | libc::SIGCHLD) => return false,
            _ if ptrace::cont(victim.pid, signal).is_err() => return false,
            _ => {}
        }
    }
    false
}

struct Hammer {
    kmod: Kmod,
    device: File,
    victim: Option<Victim>,
    calls: u64,
    accepted: u64,
}

impl Hammer {
    /// A child in ptrace stop and what a capture of it says.
    fn fresh(&mut self) -> Result<RawPcb, String> {
        if self.victim.is_none() {
            self.victim = Some(busy_child().map_err(text("child"))?);
        }
        let victim = self.victim.as_ref().ok_or("no child")?;
        let sections = self.kmod.capture_sections();
        match self.kmod.capture(victim.fd(), sections) {
            Ok(raw) => Ok(raw),
            Err(e) => Err(format!("capture of a fresh child: {e}")),
        }
    }

    fn run(&mut self, bent: &mut Bent, request: u32, what: &str) -> Result<bool, String> {
        self.calls += 1;
        match bent.call(&self.device, request) {
            Ok(()) => {
                self.accepted += 1;
                Ok(true)
            }
            Err(e) if known(e) => Ok(false),
            Err(e) => Err(format!("{what}: errno {e}")),
        }
    }

    fn pcb_field(&mut self, leaf: &Leaf) -> Outcome {
        let section = section_at(leaf.offset);
        let mut raw = self.fresh()?;
        let old = get(&raw::bytes_of(&raw.pcb), leaf.offset, leaf.size);
        let mut touched = false;
        for value in edges(old) {
            let victim = self.victim.as_ref().ok_or("no child")?;
            // A header's field goes with a section that it could break.
            let section = if section == 0 { abi::SEC_COMM } else { section };
            let mut bent = Bent::restore(victim.fd(), &raw, section);
            put(&mut bent.pcb, leaf.offset, leaf.size, value);
            let what = format!("{} = {value:#x}", leaf.name);
            if !self.run(&mut bent, abi::IOC_RESTORE, &what)? {
                continue;
            }
            touched = true;
            // What the kernel itself acts on is let run each time.
            let acted_on = abi::SEC_RSEQ | abi::SEC_RESTART | abi::SEC_ALTSTACK | abi::SEC_TIDS;
            if section & acted_on == 0 && self.accepted % 3 != 0 {
                continue;
            }
            if !self.victim.as_ref().is_some_and(let_run) {
                self.victim = None;
            }
            raw = self.fresh()?;
        }
        // Nothing bent is carried over into the next field.
        if let Some(victim) = self.victim.as_ref().filter(|_| touched) {
            let sections = self.kmod.restore_sections() & !abi::SEC_EXE;
            if self
                .kmod
                .restore(victim.fd(), &raw, sections, None)
                .is_err()
            {
                self.victim = None;
            }
        }
        Ok(())
    }

    fn call_field(&mut self, leaf: &Leaf, request: u32, pages: &[u64; 3]) -> Outcome {
        let raw = self.fresh()?;
        let sections = self.kmod.capture_sections() & self.kmod.restore_sections();
        let pointer = matches!(leaf.name.as_str(), "pcb[0]" | "xstate[0]" | "siginfos[0]");
        let make = |victim: &Victim, kmod: &Kmod| match request {
            abi::IOC_CAPTURE => Bent::capture(kmod, victim.fd(), sections),
            _ => Bent::restore(victim.fd(), &raw, sections),
        };
        let victim = self.victim.as_ref().ok_or("no child")?;
        let old = get(&make(victim, &self.kmod).call, leaf.offset, leaf.size);
        let mut values = edges(old);
        if pointer {
            // A capture writes where it is told: only where this cannot hurt.
            values.retain(|v| *v < 4096 || *v >= 0x7fff_ffff_f000);
            values.extend([pages[0], pages[1] + 4090, pages[2], pages[2] - 8]);
        }
        for value in values {
            let victim = self.victim.as_ref().ok_or("no child")?;
            let mut bent = make(victim, &self.kmod);
            put(&mut bent.call, leaf.offset, leaf.size, value);
            let what = format!("call.{} = {value:#x}", leaf.name);
            self.run(&mut bent, request, &what)?;
        }
        Ok(())
    }

    fn siginfo_fields(&mut self) -> Outcome {
        let mut raw = self.fresh()?;
        let mut entry = abi::Siginfo {
            signo: 40,
            ..Default::default()
        };
        entry.info[0] = 40;
        raw.siginfos = vec![entry; 3];
        for leaf in leaves("pmig_siginfo") {
            for value in edges(0) {
                let victim = self.victim.as_ref().ok_or("no child")?;
                let queues = abi::SEC_PENDING | abi::SEC_SHARED_PENDING;
                let mut bent = Bent::restore(victim.fd(), &raw, queues);
                put(&mut bent.siginfos, leaf.offset, leaf.size, value);
                let what = format!("siginfo.{} = {value:#x}", leaf.name);
                if self.run(&mut bent, abi::IOC_RESTORE, &what)? {
                    if !self.victim.as_ref().is_some_and(let_run) {
                        self.victim = None;
                    }
                    let keep = raw.siginfos.clone();
                    raw = self.fresh()?;
                    raw.siginfos = keep;
                }
            }
        }
        Ok(())
    }

    fn xstate_words(&mut self) -> Outcome {
        let mut raw = self.fresh()?;
        // The legacy area's control words and the header are what is checked.
        let offsets = (0..64).step_by(4).chain((464..576).step_by(8));
        for offset in offsets {
            let old = get(&raw.xstate, offset, 8);
            for value in edges(old) {
                let victim = self.victim.as_ref().ok_or("no child")?;
                let mut bent = Bent::restore(victim.fd(), &raw, abi::SEC_XSTATE);
                put(&mut bent.xstate, offset, 8, value);
                let what = format!("xstate[{offset}] = {value:#x}");
                if self.run(&mut bent, abi::IOC_RESTORE, &what)? {
                    if !self.victim.as_ref().is_some_and(let_run) {
                        self.victim = None;
                    }
                    raw = self.fresh()?;
                }
            }
        }
        Ok(())
    }

    fn other_calls(&mut self, pages: &[u64; 3]) -> Outcome {
        let mut entries = vec![0u8; 4096 * size_of::<abi::Vma>()];
        self.fresh()?;
        let victim = self.victim.as_ref().ok_or("no child")?;
        let fd = victim.fd().as_raw_fd();
        let vmas = |entries: &mut Vec<u8>| {
            let mut call = vec![0u8; 32 << 10];
            put(&mut call, 0, 4, size_of::<abi::Vmas>() as u64);
            put(&mut call, 8, 4, fd as u64);
            put(&mut call, 12, 4, size_of::<abi::Vma>() as u64);
            put(&mut call, 24, 8, entries.as_mut_ptr() as u64);
            put(&mut call, 32, 4, 4096);
            call
        };
        for leaf in leaves("pmig_vmas") {
            let mut values = edges(get(&vmas(&mut entries), leaf.offset, leaf.size));
            if leaf.name == "entries[0]" {
                values.retain(|v| *v < 4096 || *v >= 0x7fff_ffff_f000);
                values.extend([pages[0], pages[1] + 4090, pages[2]]);
            }
            for value in values {
                let mut call = vmas(&mut entries);
                put(&mut call, leaf.offset, leaf.size, value);
                self.calls += 1;
                match raw::ioctl(&self.device, abi::IOC_VMAS, &mut call) {
                    Err(e) if !known(e) => return Err(format!("vmas.{}: {e}", leaf.name)),
                    _ => {}
                }
            }
        }
        // As many words as lie before the end of memory.
        let dirty = || {
            let mut call = vec![0u8; 32 << 10];
            put(&mut call, 0, 4, size_of::<abi::Dirty>() as u64);
            put(&mut call, 8, 4, fd as u64);
            put(&mut call, 16, 8, pages[1]);
            put(&mut call, 24, 8, pages[1] + (512 << 12));
            put(&mut call, 32, 8, pages[1]);
            call
        };
        for leaf in leaves("pmig_dirty") {
            let mut values = edges(get(&dirty(), leaf.offset, leaf.size));
            if leaf.name == "pages" {
                values.retain(|v| *v < 4096 || *v >= 0x7fff_ffff_f000);
                values.extend([pages[0], pages[1] + 4090, pages[2]]);
            }
            for value in values {
                let mut call = dirty();
                put(&mut call, leaf.offset, leaf.size, value);
                self.calls += 1;
                match raw::ioctl(&self.device, abi::IOC_DIRTY, &mut call) {
                    Err(e) if !known(e) => return Err(format!("dirty.{}: {e}", leaf.name)),
                    _ => {}
                }
            }
        }
        for leaf in leaves("pmig_query") {
            for value in edges(0) {
                let mut call = vec![0u8; 32 << 10];
                put(&mut call, 0, 4, size_of::<abi::Query>() as u64);
                put(&mut call, leaf.offset, leaf.size, value);
                let _ = raw::ioctl(&self.device, abi::IOC_QUERY, &mut call);
            }
        }
        for request in [
            abi::IOC_QUERY,
            abi::IOC_CAPTURE,
            abi::IOC_RESTORE,
            abi::IOC_VMAS,
            abi::IOC_DIRTY,
        ] {
            for address in [0, 1, pages[2], 0xffff_8000_0000_0000, u64::MAX] {
                match raw::ioctl_number(&self.device, request, address) {
                    Err(libc::EFAULT) => {}
                    other => return Err(format!("argument {address:#x}: {other:?}")),
                }
            }
            // The structure's last bytes are where nothing is mapped.
            if let Ok(()) = raw::ioctl_number(&self.device, request, pages[2] - 4) {
                return Err(format!("{request:#x} across the end of memory passed"));
            }
        }
        for request in [0, 0xb700, 0xb706, u32::MAX] {
            match raw::ioctl_number(&self.device, request, 0) {
                Err(libc::ENOTTY) => {}
                other => return Err(format!("request {request:#x}: {other:?}")),
            }
        }
        Ok(())
    }
}

/// Each section alone and all together, on tasks in every state.
fn states(hammer: &mut Hammer) -> Outcome {
    let raw = hammer.fresh()?;
    let both = hammer.kmod.restore_sections() & !abi::SEC_EXE;
    for Refused {
        name,
        victim,
        errno,
    } in refused().map_err(text("victims"))?
    {
        for bit in (0..64)
            .map(|i| 1u64 << i)
            .filter(|b| both & b != 0)
            .chain([both])
        {
            let mut bent = Bent::restore(victim.fd(), &raw, bit);
            if bent.call(&hammer.device, abi::IOC_RESTORE) != Err(errno) {
                return Err(format!("restore {bit:#x} into {name}: not refused"));
            }
            if bent.field("done") != 0 {
                return Err(format!("restore {bit:#x} into {name}: done in part"));
            }
            let mut bent = Bent::capture(&hammer.kmod, victim.fd(), bit);
            if bent.call(&hammer.device, abi::IOC_CAPTURE) != Err(errno) {
                return Err(format!("capture {bit:#x} of {name}: not refused"));
            }
            hammer.calls += 2;
        }
        println!("ok refused in every section: {name}");
    }
    for (name, victim) in accepted().map_err(text("victims"))? {
        let own = hammer
            .kmod
            .capture(victim.fd(), hammer.kmod.capture_sections())
            .map_err(text(name))?;
        for bit in (0..64).map(|i| 1u64 << i).filter(|b| both & b != 0) {
            let mut bent = Bent::restore(victim.fd(), &own, bit);
            bent.call(&hammer.device, abi::IOC_RESTORE)
                .map_err(|e| format!("restore {bit:#x} into {name}: errno {e}"))?;
            hammer.calls += 1;
        }
        println!("ok restored section by section: {name}");
    }
    Ok(())
}

fn privilege(hammer: &Hammer) -> Outcome {
    let Some(victim) = &hammer.victim else {
        return Err("no child".into());
    };
    let device = hammer.device.try_clone().map_err(text("dup"))?;
    let pidfd = victim.pidfd.try_clone().map_err(text("dup"))?;
    let child = Victim::new(|| {
        raw::become_nobody();
        let mut bent = Bent::capture(&hammer.kmod, pidfd.as_fd(), abi::SEC_INFO);
        i32::from(bent.call(&device, abi::IOC_CAPTURE) != Err(libc::EPERM))
    })
    .map_err(text("fork"))?;
    let pid = nix::unistd::Pid::from_raw(child.pid);
    match nix::sys::wait::waitpid(pid, None) {
        Ok(nix::sys::wait::WaitStatus::Exited(_, 0)) => {}
        other => return Err(format!("an ordinary user with the device: {other:?}")),
    }
    let me = pidfd::open(std::process::id() as i32).map_err(text("pidfd"))?;
    let kthread = pidfd::open(2).map_err(text("pidfd"))?;
    for (what, fd, errno) in [
        ("itself", me.as_fd(), libc::EDEADLK),
        ("a kernel thread", kthread.as_fd(), libc::EOPNOTSUPP),
        ("no pidfd", device.as_fd(), libc::EBADF),
    ] {
        let mut bent = Bent::capture(&hammer.kmod, fd, abi::SEC_INFO);
        if bent.call(&device, abi::IOC_CAPTURE) != Err(errno) {
            return Err(format!("{what}: not refused with errno {errno}"));
        }
    }
    match raw::unload_module() {
        libc::EAGAIN | libc::EBUSY => Ok(()),
        other => Err(format!("the module was unloaded while open: {other}")),
    }
}

/// A captured process with as many signals as its user may queue: restoring
/// more must fail and leave the queue as it was.
fn queue_limit(hammer: &mut Hammer) -> Outcome {
    let child = Victim::new(|| {
        raw::limit_sigpending(4);
        loop {
            raw::pause();
        }
    })
    .map_err(text("fork"))?;
    child.wait_state('S').map_err(text("child"))?;
    child.stop().map_err(text("child"))?;
    let mut entry = abi::Siginfo {
        signo: 40,
        ..Default::default()
    };
    entry.info[0] = 40;
    let mut raw = RawPcb::empty();
    raw.sections = abi::SEC_PENDING;
    raw.siginfos = vec![entry; 2];
    hammer
        .kmod
        .restore(child.fd(), &raw, abi::SEC_PENDING, None)
        .map_err(|e| format!("two signals: {e}"))?;
    let before = hammer
        .kmod
        .capture(child.fd(), abi::SEC_PENDING | abi::SEC_SIGMASK)
        .map_err(text("capture"))?;
    raw.siginfos = vec![entry; 100];
    match hammer
        .kmod
        .restore(child.fd(), &raw, abi::SEC_PENDING, None)
    {
        Err(e) if e.source.raw_os_error() == Some(libc::EAGAIN) => {}
        other => return Err(format!("a hundred signals: {other:?}")),
    }
    let after = hammer
        .kmod
        .capture(child.fd(), abi::SEC_PENDING | abi::SEC_SIGMASK)
        .map_err(text("capture"))?;
    if before != after || after.siginfos.len() != 2 {
        return Err("a failed restore changed the queue or the mask".into());
    }
    Ok(())
}

pub fn run() -> Outcome {
    let mut hammer = Hammer {
        kmod: module()?,
        device: open().map_err(text("open"))?,
        victim: None,
        calls: 0,
        accepted: 0,
    };
    let pages = raw::awkward_pages().map_err(text("mmap"))?;
    states(&mut hammer)?;
    privilege(&hammer)?;
    queue_limit(&mut hammer)?;
    println!("ok privilege, unloading, queue limit");
    hammer.other_calls(&pages)?;
    println!("ok vmas and query");
    for request in [abi::IOC_CAPTURE, abi::IOC_RESTORE] {
        for leaf in leaves("pmig_call") {
            hammer.call_field(&leaf, request, &pages)?;
        }
    }
    println!("ok fields of the call");
    hammer.siginfo_fields()?;
    println!("ok fields of siginfo");
    hammer.xstate_words()?;
    println!("ok xstate");
    for leaf in leaves("pmig_pcb") {
        // A few elements of the long arrays stand for the others.
        let spared = |array: &str, tried: &[usize]| {
            let is = |i: &usize| leaf.name.contains(&format!("{array}[{i}]"));
            leaf.name.contains(array) && !tried.iter().any(is)
        };
        if !spared("sigactions", &[0, 8, 9, 18, 63]) && !spared("auxv", &[0, 1, 50, 51, 52, 63]) {
            hammer.pcb_field(&leaf)?;
        }
    }
    println!(
        "ok edges: {} calls, {} accepted",
        hammer.calls, hammer.accepted
    );
    Ok(())
}
