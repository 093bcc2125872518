//! The raw calls for which no safe wrapper exists.
#![allow(unsafe_code)]

use std::arch::asm;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Runs `body` in a child, which exits with what it returns.
pub fn fork(body: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: this program has a single thread.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: an orphan would outlive the test; numbers only.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            // What bent programs say when they break is of no interest, and none
            // shall keep this one's output open.
            if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
                let _ = nix::unistd::dup2_stdout(&null);
                let _ = nix::unistd::dup2_stderr(&null);
            }
            let code = body();
            // SAFETY: ends the child without running the parent's handlers.
            unsafe { libc::_exit(code) }
        }
        pid => Ok(pid),
    }
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// As [`fork`], but born in that cgroup, in a process group of its own, and as
/// somebody who can do nobody any harm: whatever is done to it, and whatever it
/// then does, must end with it. Only raw calls may be relied on in `body`: the
/// C library takes the child's thread ID to be the parent's.
pub fn fork_confined(cgroup: Option<&OwnedFd>, body: impl FnOnce() -> i32) -> io::Result<i32> {
    // struct clone_args of clone3(2).
    let mut args = [0u64; 11];
    args[4] = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args[0] = CLONE_INTO_CGROUP;
        args[10] = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child has its own copy of memory, and this
    // program has a single thread.
    match unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
                let _ = nix::unistd::dup2_stdout(&null);
                let _ = nix::unistd::dup2_stderr(&null);
            }
            // SAFETY: numbers and locals only; the child uses no descriptor
            // that it closes here.
            let code = unsafe {
                libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0);
                libc::setpgid(0, 0);
                let limit = |what, n| {
                    let limit = libc::rlimit {
                        rlim_cur: n,
                        rlim_max: n,
                    };
                    libc::setrlimit(what, &limit);
                };
                // Microseconds of a real-time policy, seconds of any.
                limit(libc::RLIMIT_RTTIME, 200_000);
                limit(libc::RLIMIT_CPU, 2);
                limit(libc::RLIMIT_AS, 64 << 20);
                limit(libc::RLIMIT_FSIZE, 0);
                limit(libc::RLIMIT_CORE, 0);
                const NOBODY: libc::id_t = 65534;
                libc::syscall(libc::SYS_setgroups, 0, 0);
                libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY);
                libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY);
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                match libc::syscall(libc::SYS_geteuid) == i64::from(NOBODY) {
                    true => body(),
                    false => 1,
                }
            };
            // SAFETY: as in `fork`.
            unsafe { libc::_exit(code) }
        }
        pid => Ok(pid as i32),
    }
}

/// A child in vfork(2), so that this process is the parent in the middle of
/// the call until the child ends.
pub fn vfork_and_wait(seconds: u32) {
    // SAFETY: the child touches nothing: it sleeps and exits by system calls.
    unsafe {
        let mut spec = [i64::from(seconds), 0];
        let child: i64;
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            // Dies with its parent.
            "mov eax, 157",
            "mov edi, 1",
            "mov esi, 9",
            "syscall",
            "mov eax, 35",
            "mov rdi, {spec}",
            "xor esi, esi",
            "syscall",
            "mov eax, 60",
            "xor edi, edi",
            "syscall",
            "2:",
            spec = in(reg) spec.as_mut_ptr(),
            inlateout("rax") 58i64 => child,
            out("rdi") _, out("rsi") _, out("rcx") _, out("r11") _,
        );
        libc::waitpid(child as i32, std::ptr::null_mut(), 0);
    }
}

/// A system call made with `mark` in a vector register and in r12; returns its
/// result and what the two hold afterwards.
pub fn marked_syscall(nr: i64, args: [u64; 6], mark: u64) -> (i64, u64, u64) {
    let (result, xmm, r12): (i64, u64, u64);
    // SAFETY: the callers pass pointers to living buffers of the right size.
    unsafe {
        asm!(
            "movq xmm15, r12",
            "syscall",
            "movq {xmm}, xmm15",
            xmm = lateout(reg) xmm,
            inlateout("r12") mark => r12,
            inlateout("rax") nr => result,
            in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
            in("r10") args[3], in("r8") args[4], in("r9") args[5],
            out("rcx") _, out("r11") _, out("xmm15") _,
        );
    }
    (result, xmm, r12)
}

/// An ioctl whose argument is these bytes. The errno if it fails.
pub fn ioctl(fd: &impl AsRawFd, request: u32, bytes: &mut [u8]) -> Result<(), i32> {
    // SAFETY: the module is tested for writing no further than the size at the
    // head of the structure; callers give at most that or an unmapped end.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, bytes.as_mut_ptr()) };
    if r < 0 {
        Err(errno())
    } else {
        Ok(())
    }
}

/// An ioctl whose argument is any number at all.
pub fn ioctl_number(fd: &impl AsRawFd, request: u32, argument: u64) -> Result<(), i32> {
    // SAFETY: only called with addresses where nothing is mapped.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, argument) };
    if r < 0 {
        Err(errno())
    } else {
        Ok(())
    }
}

pub fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A descriptor for one thread, where the kernel has PIDFD_THREAD (6.9).
pub fn pidfd_of_thread(tid: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only; the descriptor is new.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, tid, libc::O_EXCL);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Queues a signal with any content to this process or this thread.
pub fn queue_to_self(signal: i32, info: &[u8; 128], shared: bool) -> io::Result<()> {
    // SAFETY: `info` is a siginfo_t's worth of bytes.
    let r = unsafe {
        let pid = libc::getpid();
        if shared {
            libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, info.as_ptr())
        } else {
            let call = libc::SYS_rt_tgsigqueueinfo;
            libc::syscall(call, pid, pid, signal, info.as_ptr())
        }
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The next pending signal of `mask`, without waiting.
pub fn take_signal(mask: u64) -> Option<[u8; 128]> {
    let mut info = [0u8; 128];
    let zero = [0i64; 2];
    // SAFETY: all pointers are to living buffers; a mask has 8 bytes.
    let r = unsafe {
        let call = libc::SYS_rt_sigtimedwait;
        libc::syscall(call, &raw const mask, info.as_mut_ptr(), zero.as_ptr(), 8)
    };
    (r > 0).then_some(info)
}

/// Sets the signal mask and returns the one before.
pub fn set_mask(mask: u64) -> u64 {
    let mut old = 0u64;
    // SAFETY: both are masks of 8 bytes.
    unsafe {
        let call = libc::SYS_rt_sigprocmask;
        let how = libc::SIG_SETMASK;
        libc::syscall(call, how, &raw const mask, &raw mut old, 8);
    }
    old
}

static HANDLED: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

extern "C" fn note(signal: i32) {
    HANDLED.fetch_or(1 << (signal - 1), std::sync::atomic::Ordering::SeqCst);
}

/// Signals that [`handle`] has seen, as a mask.
pub fn handled() -> u64 {
    HANDLED.load(std::sync::atomic::Ordering::SeqCst)
}

/// Where the handlers are that a child may have: those of [`handle`], and of
/// Rust's runtime, which this process has too.
pub fn handlers() -> Vec<u64> {
    let own = [libc::SIGSEGV, libc::SIGBUS].map(|signal| {
        // SAFETY: reads into a local.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut action);
            action.sa_sigaction as u64
        }
    });
    [own[0], own[1], note as *const () as u64].into()
}

/// Notes `signal` when it comes, on the alternate stack.
pub fn handle(signal: i32) {
    // SAFETY: the handler touches one atomic.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = note as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK | libc::SA_RESTART;
        action.sa_mask = std::mem::zeroed();
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
}

/// Gives this thread an alternate stack, and returns where it is.
pub fn use_altstack(size: usize) -> u64 {
    let stack = Box::leak(vec![0u8; size].into_boxed_slice());
    // SAFETY: the stack is never freed.
    unsafe {
        let alt = libc::stack_t {
            ss_sp: stack.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: size,
        };
        libc::sigaltstack(&alt, std::ptr::null_mut());
    }
    stack.as_ptr() as u64
}

/// The alternate stack as the kernel has it: address, size, flags.
pub fn altstack() -> (u64, u64, i32) {
    // SAFETY: reads into a local.
    unsafe {
        let mut alt: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &mut alt);
        (alt.ss_sp as u64, alt.ss_size as u64, alt.ss_flags)
    }
}

/// Sleeps until a signal ends it.
pub fn pause() {
    // SAFETY: no arguments.
    unsafe { libc::pause() };
}

/// Lets the parent trace this process and stops in a signal-delivery-stop.
pub fn trace_me_and_stop() {
    // SAFETY: numbers only.
    unsafe {
        libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
        libc::raise(libc::SIGUSR1);
    }
}

/// Lowers the number of signals this user may have queued.
pub fn limit_sigpending(n: u64) {
    let limit = libc::rlimit {
        rlim_cur: n,
        rlim_max: n,
    };
    // SAFETY: reads a local.
    unsafe { libc::setrlimit(libc::RLIMIT_SIGPENDING, &limit) };
}

/// A structure's bytes.
pub fn bytes_of(pcb: &pmig::sys::kmod::abi::Pcb) -> Vec<u8> {
    let start = std::ptr::from_ref(pcb).cast::<u8>();
    // SAFETY: the structure is made of integers without padding (a test of the
    // pmig crate says so), so every byte is initialised.
    unsafe { std::slice::from_raw_parts(start, size_of_val(pcb)) }.to_vec()
}

/// A page that can be read but not written, the start of one that ends where
/// nothing is mapped, and an address where nothing is.
pub fn awkward_pages() -> io::Result<[u64; 3]> {
    // SAFETY: new mappings at addresses of the kernel's choice.
    unsafe {
        let map = |prot, len| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let p = libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0);
            if p == libc::MAP_FAILED {
                Err(io::Error::last_os_error())
            } else {
                Ok(p as u64)
            }
        };
        let read_only = map(libc::PROT_READ, 4096)?;
        let two = map(libc::PROT_READ | libc::PROT_WRITE, 8192)?;
        libc::munmap((two + 4096) as *mut _, 4096);
        Ok([read_only, two, two + 4096])
    }
}

/// Numbers shared by all processes forked after this.
pub fn shared_numbers(n: usize) -> io::Result<&'static [std::sync::atomic::AtomicU64]> {
    // SAFETY: a new mapping of zeroes that is never unmapped.
    unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let p = libc::mmap(std::ptr::null_mut(), n * 8, prot, flags, -1, 0);
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(std::slice::from_raw_parts(p.cast(), n))
    }
}

/// Tries to unload the module; the errno.
pub fn unload_module() -> i32 {
    // SAFETY: a string and a flag.
    let r = unsafe { libc::syscall(libc::SYS_delete_module, c"pmig".as_ptr(), libc::O_NONBLOCK) };
    if r < 0 {
        errno()
    } else {
        0
    }
}

/// Becomes an ordinary user, without any capability.
pub fn become_nobody() {
    // SAFETY: numbers only.
    unsafe {
        libc::setgid(65534);
        libc::setuid(65534);
    }
}

/// Does things whose effect depends on what was restored.
pub fn exercise() {
    // SAFETY: plain calls; the process is one that may die of them.
    unsafe {
        let brk = libc::syscall(libc::SYS_brk, 0);
        libc::syscall(libc::SYS_brk, brk + 4096);
        libc::syscall(libc::SYS_brk, brk);
        // Not raise(3), which knows another's thread ID in a confined child.
        let (pid, tid) = (libc::getpid(), libc::gettid());
        libc::syscall(libc::SYS_tgkill, pid, tid, libc::SIGUSR1);
        libc::sched_yield();
        libc::syscall(libc::SYS_restart_syscall);
        let child = libc::fork();
        if child == 0 {
            libc::_exit(0);
        }
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
}

/// Runs a 32-bit program that waits for ever. Returns only if it cannot.
pub fn exec_32bit() -> i32 {
    // An ELF header, one program header, and: mov eax, 29 (pause); int 0x80;
    // jmp back.
    let mut elf: Vec<u8> = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |v: &mut Vec<u8>, x: u16| v.extend_from_slice(&x.to_le_bytes());
    let word = |v: &mut Vec<u8>, x: u32| v.extend_from_slice(&x.to_le_bytes());
    half(&mut elf, 2);
    half(&mut elf, 3);
    for x in [1, 0x0804_8054, 52, 0, 0] {
        word(&mut elf, x);
    }
    for x in [52, 32, 1, 0, 0, 0] {
        half(&mut elf, x);
    }
    for x in [1, 0, 0x0804_8000, 0x0804_8000, 0x5d, 0x5d, 5, 4096] {
        word(&mut elf, x);
    }
    elf.extend_from_slice(&[0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7]);
    // SAFETY: the arrays end with null, the strings live.
    unsafe {
        let fd = libc::memfd_create(c"pause32".as_ptr(), 0);
        libc::write(fd, elf.as_ptr().cast(), elf.len());
        let argv = [c"pause32".as_ptr(), std::ptr::null()];
        let path = format!("/proc/self/fd/{fd}\0");
        libc::execv(path.as_ptr().cast(), argv.as_ptr());
    }
    errno()
}

/// Starts threads that sleep; the calling one waits for a signal.
pub fn with_threads(n: usize) {
    for _ in 0..n {
        std::thread::spawn(|| loop {
            std::thread::sleep(std::time::Duration::from_millis(3));
        });
    }
    loop {
        pause();
    }
}
