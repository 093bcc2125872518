//! System calls as they are: no retries, no hidden errors.
#![allow(unsafe_code)]

use std::io;
use std::time::Duration;

/// The result of a raw system call, an error as the kernel gave it.
///
/// # Errors
/// The error of the call.
pub type Result<T> = io::Result<T>;

fn check(result: i64) -> Result<i64> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}

/// A clock's time since its own zero.
pub fn clock(id: i32) -> Duration {
    let mut time = timespec(Duration::ZERO);
    // SAFETY: the structure lives through the call.
    unsafe { libc::clock_gettime(id, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The same, past the vdso.
pub fn clock_by_call(id: i32) -> Duration {
    let mut time = timespec(Duration::ZERO);
    // SAFETY: the structure lives through the call.
    unsafe { libc::syscall(libc::SYS_clock_gettime, id, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// nanosleep(2).
pub fn nanosleep(time: Duration) -> Result<i64> {
    let time = timespec(time);
    let mut left = time;
    // SAFETY: both structures live through the call.
    check(unsafe { libc::syscall(libc::SYS_nanosleep, &time, &mut left) })
}

/// clock_nanosleep(2) by the monotonic clock, to a moment or for a time.
pub fn clock_nanosleep(absolute: bool, time: Duration) -> Result<i64> {
    let time = timespec(time);
    let flags = if absolute { libc::TIMER_ABSTIME } else { 0 };
    let mut left = time;
    // SAFETY: both structures live through the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_clock_nanosleep,
            libc::CLOCK_MONOTONIC,
            flags,
            &time,
            &mut left,
        )
    })
}

/// poll(2) for input.
pub fn poll(fd: i32, time: Duration) -> Result<i64> {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: the structure lives through the call.
    check(unsafe { libc::syscall(libc::SYS_poll, &mut poll, 1, time.as_millis() as i32) })
}

/// ppoll(2) for input.
pub fn ppoll(fd: i32, time: Duration) -> Result<i64> {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut time = timespec(time);
    // SAFETY: the structures live through the call; there is no mask.
    check(unsafe { libc::syscall(libc::SYS_ppoll, &mut poll, 1, &mut time, 0, 0) })
}

/// select(2) for input.
pub fn select(fd: i32, time: Duration) -> Result<i64> {
    let mut set = [0u64; 16];
    set[fd as usize / 64] |= 1 << (fd % 64);
    let mut time = libc::timeval {
        tv_sec: time.as_secs() as i64,
        tv_usec: i64::from(time.subsec_micros()),
    };
    // SAFETY: the set is as large as the kernel's and lives through the call.
    check(unsafe { libc::syscall(libc::SYS_select, fd + 1, &mut set, 0, 0, &mut time) })
}

/// futex(2), waiting on a word that nobody wakes.
pub fn futex_wait(time: Duration) -> Result<i64> {
    let word = 0u32;
    let time = timespec(time);
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: word and time live through the call.
    check(unsafe { libc::syscall(libc::SYS_futex, &word, operation, 0, &time) })
}

/// rt_sigtimedwait(2) for one blocked signal.
pub fn sigtimedwait(signal: i32, time: Duration) -> Result<(i64, libc::siginfo_t)> {
    let set = 1u64 << (signal - 1);
    let time = timespec(time);
    // SAFETY: all zeroes are a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: set, info and time live through the call.
    let result =
        check(unsafe { libc::syscall(libc::SYS_rt_sigtimedwait, &set, &mut info, &time, 8) })?;
    Ok((result, info))
}

/// read(2) of one byte.
pub fn read_byte(fd: i32) -> Result<(i64, u8)> {
    let mut byte = 0u8;
    // SAFETY: the byte lives through the call.
    let result = check(unsafe { libc::syscall(libc::SYS_read, fd, &mut byte, 1) })?;
    Ok((result, byte))
}

/// write(2) of one byte; may be called in a signal handler.
pub fn write_byte(fd: i32, byte: u8) {
    // SAFETY: the byte lives through the call.
    unsafe { libc::write(fd, (&raw const byte).cast(), 1) };
}

/// prctl(2) with plain numbers.
pub fn prctl(option: i32, argument: u64) -> Result<i64> {
    // SAFETY: only options without pointers are used in this program.
    check(unsafe { libc::syscall(libc::SYS_prctl, option, argument, 0, 0, 0) })
}

/// prctl(2) for options that store one number.
pub fn prctl_read(option: i32) -> Result<u32> {
    let mut value = 0u32;
    // SAFETY: the number lives through the call.
    check(unsafe { libc::syscall(libc::SYS_prctl, option, &mut value, 0, 0, 0) })?;
    Ok(value)
}

/// sched_setscheduler(2) of a policy without a priority.
pub fn set_policy(policy: i32) -> Result<i64> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure lives through the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &param) })
}

/// sched_getscheduler(2).
pub fn policy() -> Result<i64> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) })
}

/// setpriority(2) of this process.
pub fn set_nice(nice: i32) -> Result<i64> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, nice) })
}

/// getpriority(2) as the kernel gives it: 20 less the nice value.
pub fn nice() -> Result<i64> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0) })
}

/// A limit, soft and hard, by its number.
pub fn limit(number: u32) -> Result<(u64, u64)> {
    let mut limit = [0u64; 2];
    // SAFETY: the kernel writes two numbers.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, 0, number, 0, &mut limit) })?;
    Ok((limit[0], limit[1]))
}

/// Sets a limit by its number.
pub fn set_limit(number: u32, soft: u64, hard: u64) -> Result<i64> {
    let limit = [soft, hard];
    // SAFETY: the kernel reads two numbers.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, 0, number, &limit, 0) })
}

/// What the kernel holds for one signal: handler, flags, restorer, mask.
pub fn action(signal: i32) -> Result<[u64; 4]> {
    let mut action = [0u64; 4];
    // SAFETY: the kernel's structure is four words long.
    check(unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, 0, &mut action, 8) })?;
    Ok(action)
}

/// Sets a handler through the C library, which supplies the restorer.
pub fn handle(
    signal: i32,
    flags: i32,
    handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void),
) -> Result<i64> {
    // SAFETY: all zeroes are a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = flags | libc::SA_SIGINFO;
    // SAFETY: the handlers of this program only touch atomics and write(2).
    check(i64::from(unsafe {
        libc::sigaction(signal, &action, std::ptr::null_mut())
    }))
}

/// Ignores a signal.
pub fn ignore(signal: i32) {
    // SAFETY: SIG_IGN runs no code.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Replaces the mask of blocked signals, and gives the one before.
pub fn set_mask(mask: Option<u64>) -> Result<u64> {
    let mut old = 0u64;
    let new = mask.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: both masks live through the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            new,
            &mut old,
            8,
        )
    })?;
    Ok(old)
}

/// The set of pending signals.
pub fn pending() -> Result<u64> {
    let mut set = 0u64;
    // SAFETY: the set lives through the call.
    check(unsafe { libc::syscall(libc::SYS_rt_sigpending, &mut set, 8) })?;
    Ok(set)
}

/// Queues a signal with a value to this process, or to this thread alone.
pub fn queue(signal: i32, value: u64, thread: bool) -> Result<i64> {
    // struct siginfo: signo, errno, code, padding, pid, uid, value.
    let mut info = [0u32; 32];
    let pid = std::process::id();
    info[0] = signal as u32;
    info[2] = libc::SI_QUEUE as u32;
    info[4] = pid;
    info[6] = value as u32;
    info[7] = (value >> 32) as u32;
    // SAFETY: the kernel reads 128 bytes.
    check(unsafe {
        if thread {
            libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, pid, signal, &info)
        } else {
            libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, &info)
        }
    })
}

/// The value that a queued signal carries.
pub fn value(info: &libc::siginfo_t) -> u64 {
    // SAFETY: the caller's signal was queued with a value.
    unsafe { info.si_value().sival_ptr as u64 }
}

/// kill(2).
pub fn kill_self(signal: i32) -> Result<i64> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::syscall(libc::SYS_kill, std::process::id(), signal) })
}

/// Sets the alternative signal stack to leaked memory of that size, and gives
/// its address.
pub fn set_altstack(size: usize) -> Result<u64> {
    let stack = Vec::leak(vec![0u8; size]);
    let stack = libc::stack_t {
        ss_sp: stack.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: size,
    };
    // SAFETY: the memory is never freed.
    check(i64::from(unsafe {
        libc::sigaltstack(&stack, std::ptr::null_mut())
    }))?;
    Ok(stack.ss_sp as u64)
}

/// The alternative signal stack: address, flags, size.
pub fn altstack() -> Result<(u64, i32, usize)> {
    // SAFETY: all zeroes are a valid stack_t.
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives through the call.
    check(i64::from(unsafe {
        libc::sigaltstack(std::ptr::null(), &mut stack)
    }))?;
    Ok((stack.ss_sp as u64, stack.ss_flags, stack.ss_size))
}

/// The personality; see personality(2).
pub fn personality(new: Option<u32>) -> Result<i64> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::syscall(libc::SYS_personality, new.unwrap_or(u32::MAX)) })
}

/// A word of the futex list head's address, or an error; get_robust_list(2).
pub fn robust_list() -> Result<(u64, u64)> {
    let (mut head, mut length) = (0u64, 0u64);
    // SAFETY: both numbers live through the call.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &mut head, &mut length) })?;
    Ok((head, length))
}

/// Runs `body` in a child, which exits with what it returns; gives its PID. For
/// programs of one thread.
pub fn fork(body: impl FnOnce() -> i32) -> Result<i32> {
    // SAFETY: by the caller's word there is no other thread whose locks the child
    // could wait for.
    match check(i64::from(unsafe { libc::fork() }))? {
        0 => {
            let code = body();
            // SAFETY: ends the child without running the parent's handlers.
            unsafe { libc::_exit(code) }
        }
        pid => Ok(pid as i32),
    }
}

/// Waits for a child's end, and gives its status; wait(2).
pub fn end_of(pid: i32) -> Result<i32> {
    let mut status = 0;
    // SAFETY: the status lives through the call.
    check(i64::from(unsafe { libc::waitpid(pid, &mut status, 0) }))?;
    Ok(status)
}
