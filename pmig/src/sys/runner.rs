//! The code that runs inside another process: a loop over a table of system
//! calls, position independent, some 200 bytes.

use core::arch::global_asm;

/// Words before the first entry of a table.
pub const HEADER_WORDS: usize = 12;
/// Words of an entry: number, six arguments, flags, result.
pub const ENTRY_WORDS: usize = 9;

/// Header words, by index.
pub mod header {
    /// Calls to make.
    pub const COUNT: usize = 0;
    /// Calls made.
    pub const MADE: usize = 1;
    /// Thread group, thread and signal by which the end is told.
    pub const TGID: usize = 2;
    pub const TID: usize = 3;
    pub const SIGNAL: usize = 4;
    /// The scratch mapping, unmapped when nobody listened; zeros where there is none.
    pub const SCRATCH: usize = 5;
    pub const SCRATCH_LEN: usize = 6;
    /// Stack pointer, frame pointer and instruction pointer of the way home.
    pub const HOME_SP: usize = 7;
    pub const HOME_BP: usize = 8;
    pub const HOME_IP: usize = 9;
}

/// Entry words, by index.
pub mod entry {
    pub const NUMBER: usize = 0;
    pub const ARGS: usize = 1;
    pub const FLAGS: usize = 7;
    pub const RESULT: usize = 8;
    /// Bits 0 to 5 of the flags: that argument is the address of its value.
    /// Bit 6: go on after an error.
    pub const MAY_FAIL: u64 = 1 << 6;
}

// rbx: the table. The tracer sets it, and the stop at the end is the signal
// that tgkill sends to the thread itself. A signal that would be ignored still
// stops a traced thread; where the tracer has died it is ignored indeed, and
// the code unmaps itself, if it has a mapping of its own, and goes home by a
// prepared rt_sigreturn frame.
global_asm!(
    ".pushsection .rodata.pmig_runner, \"a\"",
    ".global pmig_runner_start",
    ".global pmig_runner_end",
    "pmig_runner_start:",
    "mov r12, [rbx]",
    "lea r13, [rbx + {header}]",
    "2:",
    "test r12, r12",
    "jz 9f",
    "mov r14, [r13 + 56]",
    "mov rdi, [r13 + 8]",
    "test r14b, 1",
    "jz 3f",
    "mov rdi, [rdi]",
    "3:",
    "mov rsi, [r13 + 16]",
    "test r14b, 2",
    "jz 4f",
    "mov rsi, [rsi]",
    "4:",
    "mov rdx, [r13 + 24]",
    "test r14b, 4",
    "jz 5f",
    "mov rdx, [rdx]",
    "5:",
    "mov r10, [r13 + 32]",
    "test r14b, 8",
    "jz 6f",
    "mov r10, [r10]",
    "6:",
    "mov r8, [r13 + 40]",
    "test r14b, 16",
    "jz 7f",
    "mov r8, [r8]",
    "7:",
    "mov r9, [r13 + 48]",
    "test r14b, 32",
    "jz 8f",
    "mov r9, [r9]",
    "8:",
    "mov rax, [r13]",
    "syscall",
    "mov [r13 + 64], rax",
    "inc qword ptr [rbx + 8]",
    "add r13, {entry}",
    "dec r12",
    "cmp rax, -4095",
    "jb 2b",
    "test r14b, {may_fail}",
    "jnz 2b",
    "9:",
    "mov rdi, [rbx + 16]",
    "mov rsi, [rbx + 24]",
    "mov rdx, [rbx + 32]",
    "mov eax, {tgkill}",
    "syscall",
    "mov rdi, [rbx + 40]",
    "mov rsi, [rbx + 48]",
    "mov rsp, [rbx + 56]",
    "mov rbp, [rbx + 64]",
    "mov r12, [rbx + 72]",
    "mov eax, {munmap}",
    "jmp r12",
    "pmig_runner_end:",
    ".popsection",
    header = const HEADER_WORDS * 8,
    entry = const ENTRY_WORDS * 8,
    may_fail = const entry::MAY_FAIL,
    tgkill = const libc::SYS_tgkill,
    munmap = const libc::SYS_munmap,
);

extern "C" {
    static pmig_runner_start: u8;
    static pmig_runner_end: u8;
}

/// The runner's bytes.
pub fn code() -> &'static [u8] {
    let (start, end) = (&raw const pmig_runner_start, &raw const pmig_runner_end);
    // SAFETY: both symbols delimit the bytes assembled above, which are part
    // of this program's read-only data and live as long as it does.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}
