//! The way home: how a program that was stopped for an excursion goes on by
//! itself when pmig dies in the middle of one.
//!
//! Whatever the program executes for us ends in an rt_sigreturn(2) to a frame
//! with its own context. The frame lies where the program has nothing: at the low
//! end of its stack, or below. A system call instruction of the
//! vdso makes the call; what follows it there pops a few registers and
//! returns, and the address it returns to is a sequence in the program's own
//! text that makes the rt_sigreturn.

use crate::error::{Error, Result};
use crate::sys::ptrace::Regs;

/// A system call instruction followed by a return, at an offset in some code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gadget {
    /// Offset of the `syscall` instruction.
    pub at: usize,
    /// Whether the return address is found through rbp instead of rsp.
    pub by_bp: bool,
    /// Where it lies from that register's value at the call.
    pub ret: i64,
}

/// Finds a gadget by following the instructions after each `syscall`.
pub fn find_gadget(code: &[u8]) -> Option<Gadget> {
    code.windows(2)
        .enumerate()
        .filter(|(_, w)| w == &[0x0f, 0x05])
        .find_map(|(at, _)| {
            let (by_bp, ret) = follow(&code[at + 2..])?;
            (-192..=192)
                .contains(&ret)
                .then_some(Gadget { at, by_bp, ret })
        })
}

/// Where the return address of a function's end lies: `(through rbp, offset)`.
fn follow(mut code: &[u8]) -> Option<(bool, i64)> {
    let (mut by_bp, mut sp, mut bp_known) = (false, 0i64, true);
    for _ in 0..24 {
        let used = match *code {
            [0xc3, ..] => return Some((by_bp, sp)),
            [0xc9, ..] if bp_known => {
                (by_bp, sp, bp_known) = (true, 8, false);
                1
            }
            [0x5c, ..] => return None,
            [b @ 0x58..=0x5f, ..] => {
                sp += 8;
                bp_known &= b != 0x5d;
                1
            }
            [0x41, 0x58..=0x5f, ..] => {
                sp += 8;
                2
            }
            [0x48, 0x83, 0xc4, n, ..] => {
                sp += n as i8 as i64;
                4
            }
            [0x48, 0x8d, 0x65, n, ..] if bp_known => {
                (by_bp, sp) = (true, n as i8 as i64);
                4
            }
            // xor or mov between registers other than rsp and rbp
            [0x31 | 0x89, m, ..] if plain(m, false) => 2,
            [r @ 0x40..=0x4f, 0x31 | 0x89, m, ..] if plain(m, r & 1 != 0) => 3,
            [0x90, ..] => 1,
            [0x66, 0x90, ..] => 2,
            _ => return None,
        };
        code = &code[used..];
    }
    None
}

fn plain(modrm: u8, extended: bool) -> bool {
    modrm >= 0xc0 && (extended || !matches!(modrm & 7, 4 | 5))
}

/// How the program's own text makes an rt_sigreturn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    /// `mov eax, 15; syscall`, the signal trampoline of every C library.
    Trampoline(u64),
    /// `pop rax; ret`, to be given 15 and the address of a system call
    /// instruction.
    Pop(u64),
}

impl Return {
    /// Where it begins.
    pub fn at(self) -> u64 {
        match self {
            Return::Trampoline(at) | Return::Pop(at) => at,
        }
    }
}

type Pattern = (&'static [u8], fn(u64) -> Return);

/// The byte sequences to look for, best first, and what each makes.
const RETURNS: [Pattern; 3] = [
    (
        &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05],
        Return::Trampoline,
    ),
    (&[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05], Return::Trampoline),
    (&[0x58, 0xc3], Return::Pop),
];

/// Finds a way to rt_sigreturn in a piece of text that is mapped at `base`.
pub fn find_return(text: &[u8], base: u64) -> Option<Return> {
    RETURNS.iter().find_map(|(pattern, make)| {
        let at = memchr::memmem::find(text, pattern)?;
        Some(make(base + at as u64))
    })
}

/// Room kept below the return address for what the gadget pops.
const BELOW: usize = 256;
/// Bytes of `struct ucontext` up to and including the mask.
const UCONTEXT: usize = 304;
const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;

/// Bytes that [`frame`] takes, with alignment.
pub fn frame_len(xstate: usize) -> usize {
    BELOW + 32 + UCONTEXT + 64 + xstate + 4 + 128
}

/// A frame, and the values that lead to it.
pub struct Frame {
    pub bytes: Vec<u8>,
    pub sp: u64,
    pub bp: u64,
}

/// Lays out at `base` (16-aligned) what brings the program back to `regs`,
/// `xstate` and `mask` (`arch/x86/kernel/signal_64.c`).
pub fn frame(
    base: u64,
    gadget: &Gadget,
    syscall: u64,
    back: Return,
    regs: &Regs,
    xstate: &[u8],
    mask: u64,
) -> Result<Frame> {
    if xstate.len() < 576 {
        return Err(Error::bad("vector state", "shorter than an XSAVE header"));
    }
    let mut chain = match back {
        Return::Trampoline(at) => vec![at],
        Return::Pop(at) => vec![at, 15, syscall],
    };
    let ret_at = base + BELOW as u64;
    let uc_at = ret_at + chain.len() as u64 * 8;
    let fp_at = (uc_at + UCONTEXT as u64).next_multiple_of(64);

    let r = restarted(regs);
    let segments = (r.cs & 0xffff) | (r.ss & 0xffff) << 48;
    // An impossible flag makes the kernel leave the alternate stack alone.
    let stack = [0u64, 0x7fff, 0];
    let context = [
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx,
        r.rax, r.rcx, r.rsp, r.rip, r.eflags, segments, 0, 0, 0, 0, fp_at,
    ];
    // UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    chain.extend([7, 0]);
    chain.extend(stack);
    chain.extend(context);
    chain.extend([0; 8]);
    chain.push(mask);

    let mut bytes = vec![0; BELOW];
    bytes.extend(chain.iter().flat_map(|w| w.to_le_bytes()));
    bytes.resize((fp_at - base) as usize, 0);
    let fp = bytes.len();
    bytes.extend_from_slice(xstate);
    let xcr0: [u8; 8] = xstate[464..472].try_into().expect("eight bytes");
    let words = |at: usize, v: &[u8], bytes: &mut Vec<u8>| {
        bytes[fp + at..fp + at + v.len()].copy_from_slice(v);
    };
    words(464, &MAGIC1.to_le_bytes(), &mut bytes);
    words(468, &(xstate.len() as u32 + 4).to_le_bytes(), &mut bytes);
    words(472, &xcr0, &mut bytes);
    words(480, &(xstate.len() as u32).to_le_bytes(), &mut bytes);
    words(484, &[0; 28], &mut bytes);
    bytes.extend_from_slice(&MAGIC2.to_le_bytes());

    let reach = (ret_at as i64 - gadget.ret) as u64;
    Ok(Frame {
        bytes,
        sp: if gadget.by_bp { base + 64 } else { reach },
        bp: if gadget.by_bp { reach } else { regs.rbp },
    })
}

/// The registers with which the program makes its interrupted call again. A
/// call that the kernel would take up by its restart block starts afresh,
/// because rt_sigreturn clears that block.
fn restarted(regs: &Regs) -> Regs {
    let mut r = *regs;
    if r.orig_rax as i64 >= 0 && matches!(r.rax as i64, -516 | -514..=-512) {
        r.rip -= 2;
        r.rax = r.orig_rax;
    }
    r
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gadget_is_followed_through_pops_and_leave() {
        let g = find_gadget(&[0x90, 0x0f, 0x05, 0xc3]).unwrap();
        assert_eq!((g.at, g.by_bp, g.ret), (1, false, 0));
        let g = find_gadget(&[0x0f, 0x05, 0x48, 0x83, 0xc4, 0x30, 0x5b, 0x41, 0x5c, 0xc3]);
        assert_eq!(g.unwrap().ret, 0x40);
        let g = find_gadget(&[0x0f, 0x05, 0xc9, 0x31, 0xd2, 0x45, 0x31, 0xc0, 0xc3]).unwrap();
        assert_eq!((g.by_bp, g.ret), (true, 8));
        let g = find_gadget(&[
            0x0f, 0x05, 0x48, 0x8d, 0x65, 0xf0, 0x5b, 0x41, 0x5e, 0x5d, 0xc3,
        ]);
        let g = g.unwrap();
        assert_eq!((g.by_bp, g.ret), (true, 8));
    }

    #[test]
    fn code_that_cannot_be_followed_is_no_gadget() {
        assert_eq!(find_gadget(&[0x0f, 0x05, 0xeb, 0xfe]), None);
        assert_eq!(find_gadget(&[0x0f, 0x05]), None);
        assert_eq!(find_gadget(&[0x0f, 0x05, 0x31, 0xe4, 0xc3]), None);
    }
}
