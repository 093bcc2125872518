//! A new process that shares nothing with its maker.

use std::ffi::{c_char, CString};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::runner;

/// `struct clone_args`, `<linux/sched.h>`.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLOSE_RANGE_UNSHARE: u32 = 2;

/// Where the husk's own code stands until it has its address space.
pub const HUSK_BASE: u64 = 0x10_0000;

/// Bytes of writable memory behind the code.
pub const HUSK_TABLE: u64 = 64 << 10;

/// An executable of one page of code (a trap, preceded by the runner) and some
/// zeroed memory.
fn executable() -> Vec<u8> {
    let code_at = 0x1000usize;
    let mut elf = vec![0u8; 2 * 0x1000];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes()); // ET_EXEC
    put(18, &62u16.to_le_bytes()); // EM_X86_64
    put(20, &1u32.to_le_bytes());
    put(24, &(HUSK_BASE + 0x800).to_le_bytes()); // entry
    put(32, &64u64.to_le_bytes()); // program headers
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    let mut header = |n: usize, flags: u32, offset: u64, at: u64, file: u64, mem: u64| {
        let h = 64 + 56 * n;
        put(h, &1u32.to_le_bytes()); // PT_LOAD
        put(h + 4, &flags.to_le_bytes());
        for (i, word) in [offset, at, at, file, mem, 0x1000].iter().enumerate() {
            put(h + 8 + 8 * i, &word.to_le_bytes());
        }
    };
    header(0, 5, code_at as u64, HUSK_BASE, 0x1000, 0x1000);
    header(1, 6, 0, HUSK_BASE + 0x1000, 0, HUSK_TABLE);
    put(code_at, runner::code());
    put(code_at + 0x800, &[0xcc]);
    elf
}

/// A memfd with the husk's executable, to be made once.
pub fn husk_image() -> io::Result<OwnedFd> {
    use std::io::Write;
    // SAFETY: the name is a C string; the new descriptor is owned from here.
    let fd = unsafe {
        let fd = libc::memfd_create(c"husk".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mut file = std::fs::File::from(fd);
    file.write_all(&executable())?;
    Ok(file.into())
}

/// Who is to be the parent of a new process: this executable, run with other
/// arguments.
#[derive(Debug, Clone, Copy)]
pub struct Parent<'a> {
    /// Its standard input. It inherits nothing else.
    pub stdin: BorrowedFd<'a>,
    pub cgroup: BorrowedFd<'a>,
    /// The argument that says what it is.
    pub role: &'a str,
}

/// Makes a process with the given PID (0: any) in the given cgroup, in a
/// session of its own, without descriptors, with default signal actions, which
/// waits until a byte comes on `gate` and then executes `image`. Without a
/// `parent` the reaper of orphans is its parent. Returns its PID.
///
/// # Errors
///
/// EEXIST when the PID is taken, EINVAL when it is above pid_max, EPERM
/// without CAP_CHECKPOINT_RESTORE (clone(2)).
pub fn husk(
    image: BorrowedFd<'_>,
    gate: BorrowedFd<'_>,
    cgroup: Option<BorrowedFd<'_>>,
    pid: i32,
    parent: Option<Parent<'_>>,
) -> io::Result<i32> {
    let set_tid = [pid];
    let mut args = CloneArgs {
        flags: CLONE_CLEAR_SIGHAND,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if pid != 0 {
        args.set_tid = set_tid.as_ptr() as u64;
        args.set_tid_size = 1;
    }
    if let Some(fd) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = fd.as_raw_fd() as u64;
    }
    let (image, gate) = (image.as_raw_fd(), gate.as_raw_fd());
    let (hear, say) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let mut hear = std::fs::File::from(hear);
    let tell = say.as_raw_fd();
    let mut between = CloneArgs {
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    let becomes = parent.map(|p| Becomes::new(p, &mut between)).transpose()?;
    // SAFETY: without CLONE_VM both children have their own copy of memory.
    // They make only raw system calls, none of which allocates or takes a
    // lock, and never return.
    let first = unsafe {
        let r = clone3(&mut between);
        if r == 0 {
            let r = clone3(&mut args);
            if r == 0 {
                child(image, gate)
            }
            let answer = r as i32;
            libc::syscall(libc::SYS_write, tell, &raw const answer, 4usize);
            if let (true, Some(becomes)) = (answer > 0, &becomes) {
                becomes.execute();
            }
            libc::syscall(libc::SYS_exit_group, 0);
        }
        r
    };
    drop(say);
    if first < 0 {
        return Err(io::Error::from_raw_os_error(-first as i32));
    }
    let mut answer = [0; 4];
    let heard = hear.read_exact(&mut answer);
    if becomes.is_none() || heard.is_err() || i32::from_ne_bytes(answer) < 0 {
        let mut status = 0;
        // SAFETY: status is a live int.
        unsafe { libc::waitpid(first as i32, &mut status, libc::__WALL) };
    }
    heard?;
    match i32::from_ne_bytes(answer) {
        e if e < 0 => Err(io::Error::from_raw_os_error(-e)),
        pid => Ok(pid),
    }
}

/// What the parent of a new process executes, ready to be used where nothing may
/// be allocated.
struct Becomes {
    stdin: i32,
    null: OwnedFd,
    _words: Vec<CString>,
    argv: Vec<*const c_char>,
    _vars: Vec<CString>,
    envp: Vec<*const c_char>,
}

impl Becomes {
    fn new(parent: Parent<'_>, args: &mut CloneArgs) -> io::Result<Becomes> {
        args.flags |= CLONE_INTO_CGROUP | CLONE_CLEAR_SIGHAND;
        args.cgroup = parent.cgroup.as_raw_fd() as u64;
        let words = vec![CString::from(c"pmig"), CString::new(parent.role)?];
        let vars = std::env::vars_os()
            .map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()))
            .collect::<Result<Vec<_>, _>>()?;
        let pointers = |strings: &[CString]| {
            let all = strings.iter().map(|s| s.as_ptr());
            all.chain(std::iter::once(std::ptr::null())).collect()
        };
        let null = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")?;
        Ok(Becomes {
            stdin: parent.stdin.as_raw_fd(),
            null: null.into(),
            argv: pointers(&words),
            _words: words,
            envp: pointers(&vars),
            _vars: vars,
        })
    }

    /// # Safety
    ///
    /// Only between clone3(2) and exit in a child with memory of its own.
    unsafe fn execute(&self) {
        // SAFETY: raw system calls on descriptors and memory of this process;
        // the strings live as long as `self`.
        unsafe {
            libc::syscall(libc::SYS_setsid);
            libc::syscall(libc::SYS_dup3, self.stdin, 900, 0);
            libc::syscall(libc::SYS_dup3, self.null.as_raw_fd(), 901, 0);
            libc::syscall(libc::SYS_dup3, 900, 0, 0);
            libc::syscall(libc::SYS_dup3, 901, 1, 0);
            libc::syscall(libc::SYS_dup3, 901, 2, 0);
            libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32);
            libc::syscall(
                libc::SYS_execve,
                c"/proc/self/exe".as_ptr(),
                self.argv.as_ptr(),
                self.envp.as_ptr(),
            );
        }
    }
}

/// Has a command run in a session of its own that `terminal` controls, with it
/// as standard input, output and error, and with no signal blocked.
pub fn on_terminal(command: &mut Command, terminal: &OwnedFd) -> io::Result<()> {
    command
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal.try_clone()?);
    // SAFETY: only system calls that may be made after fork(2) in a process
    // with threads, on numbers and memory of the closure's own.
    unsafe {
        command.pre_exec(|| {
            unblock_signals();
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    Ok(())
}

/// Has children be waited for, whatever whoever started this process wished:
/// where SIGCHLD is ignored they vanish.
pub fn heed_children() {
    // SAFETY: the default action runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Blocks no signal. May be called between clone(2) and execve(2).
fn unblock_signals() {
    let none = 0u64;
    // SAFETY: the kernel reads eight bytes of a live number.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            0usize,
            8usize,
        );
    }
}

/// How a child ended, as wait(2) says it; none while it lives.
///
/// # Errors
/// `ECHILD` for what is no child.
pub fn reap(pid: i32) -> io::Result<Option<i32>> {
    let mut status = 0;
    // SAFETY: status is a live int.
    match unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG | libc::__WALL) } {
        0 => Ok(None),
        n if n < 0 => Err(io::Error::last_os_error()),
        _ => Ok(Some(status)),
    }
}

/// clone3(2) with the error as a negative result.
///
/// # Safety
///
/// In the child nothing of the parent's may be relied on but its memory.
unsafe fn clone3(args: &mut CloneArgs) -> i64 {
    // SAFETY: the struct lives for the call; the rest is the caller's promise.
    unsafe {
        let r = libc::syscall(libc::SYS_clone3, args as *mut _, size_of::<CloneArgs>());
        if r < 0 {
            -(*libc::__errno_location() as i64)
        } else {
            r
        }
    }
}

/// # Safety
///
/// Only for the child of [`husk`].
unsafe fn child(image: i32, gate: i32) -> ! {
    // SAFETY: raw system calls on descriptors and memory of this process.
    unsafe {
        libc::syscall(libc::SYS_setsid);
        unblock_signals();
        let mut byte = 0u8;
        libc::syscall(libc::SYS_read, gate, &raw mut byte, 1usize);
        // Only the image stays until the exec, which closes it too.
        libc::syscall(libc::SYS_dup3, image, 900, libc::O_CLOEXEC);
        libc::syscall(libc::SYS_close_range, 0u32, 899u32, CLOSE_RANGE_UNSHARE);
        libc::syscall(libc::SYS_close_range, 901u32, u32::MAX, 0u32);
        let argv: [*const c_char; 2] = [c"pmig-husk".as_ptr(), std::ptr::null()];
        let envp: [*const c_char; 1] = [std::ptr::null()];
        libc::syscall(
            libc::SYS_execveat,
            900,
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        libc::syscall(libc::SYS_exit_group, 127);
    }
    loop {
        std::hint::spin_loop();
    }
}
