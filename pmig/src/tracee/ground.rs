//! What an excursion into a live program needs to know about its address
//! space, found from outside while the program runs.

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use super::home::{find_gadget, find_return, Gadget, Return};
use super::outside::{open_mem, raise_stack_limit};
use super::scratch::Spare;
use crate::error::{Error, Result};
use crate::proc;
use crate::sys::ptrace::Regs;

/// The most of one text mapping that is searched.
const SEARCH: usize = 4 << 20;

/// Where in the vdso a call is made, and where in the program's text the way
/// home begins.
#[derive(Clone)]
pub struct Ground {
    pub(super) gadget: Gadget,
    /// Address of the gadget's `syscall` instruction.
    pub(super) syscall: u64,
    pub(super) back: Return,
    /// The bytes at `syscall` and at the return, to notice an exec.
    proof: [(u64, [u8; 2]); 2],
    /// Room for the runner.
    pub(super) spare: Option<Rc<Spare>>,
    /// Where the last excursion had its frame.
    pub(super) ours: Rc<Cell<Option<u64>>>,
}

/// One line of /proc/PID/maps, as far as it matters here.
struct Line {
    pub start: u64,
    pub end: u64,
    pub exec: bool,
    pub name: String,
}

/// Reads /proc/PID/maps (proc_pid_maps(5)).
fn lines(pid: i32) -> Result<Vec<Line>> {
    let path = format!("/proc/{pid}/maps");
    let text = proc::mappings(pid, "maps")?;
    String::from_utf8_lossy(&text)
        .lines()
        .map(|l| {
            let bad = || Error::bad(&path, format!("cannot make sense of {l:?}"));
            let mut words = l.splitn(6, ' ');
            let (range, perms) = (words.next(), words.next());
            let (start, end) = range.and_then(|r| r.split_once('-')).ok_or_else(bad)?;
            let hex = |s: &str| u64::from_str_radix(s, 16).map_err(|_| bad());
            Ok(Line {
                start: hex(start)?,
                end: hex(end)?,
                exec: perms.is_some_and(|p| p.as_bytes().get(2) == Some(&b'x')),
                name: words.nth(3).unwrap_or("").trim_start().to_string(),
            })
        })
        .collect()
}

impl Ground {
    /// Searches the address space of a process, which may be running.
    pub fn survey(pid: i32) -> Result<Ground> {
        let mem = open_mem(pid)?;
        let maps = lines(pid)?;
        let read = |line: &Line| -> Vec<u8> {
            let mut text = vec![0; ((line.end - line.start) as usize).min(SEARCH)];
            match mem.read_at(&mut text, line.start) {
                Ok(n) => text.truncate(n),
                Err(_) => text.clear(),
            }
            text
        };
        let vdso = maps
            .iter()
            .find(|l| l.name == "[vdso]")
            .ok_or_else(|| Error::bad(format!("process {pid}"), "it has no vdso"))?;
        let code = read(vdso);
        let gadget = find_gadget(&code)
            .ok_or_else(|| Error::bad("vdso", "no system call instruction leads to a return"))?;
        let spare = Spare::find(vdso.end, &code, &mem).map(Rc::new);
        let mut back: Option<Return> = None;
        for line in maps.iter().filter(|l| l.exec && l.name != "[vsyscall]") {
            match (find_return(&read(line), line.start), back) {
                (Some(r @ Return::Trampoline(_)), _) => {
                    back = Some(r);
                    break;
                }
                (Some(r), None) => back = Some(r),
                _ => {}
            }
        }
        let back = back.ok_or_else(|| {
            Error::bad(
                format!("process {pid}"),
                "its code has no sequence by which it could go home from an excursion",
            )
        })?;
        let syscall = vdso.start + gadget.at as u64;
        let proof = [syscall, back.at()].map(|at| {
            let mut bytes = [0; 2];
            let _ = mem.read_exact_at(&mut bytes, at);
            (at, bytes)
        });
        raise_stack_limit();
        Ok(Ground {
            gadget,
            syscall,
            back,
            proof,
            spare,
            ours: Rc::default(),
        })
    }

    /// Makes sure that it does not stand in code of ours, which a pmig that was killed
    /// a moment ago had it execute.
    ///
    /// # Errors
    /// [`Error::Bad`] where it does.
    pub(super) fn is_left_by(&self, pid: i32, regs: &Regs) -> Result<()> {
        if self.spare.as_ref().is_some_and(|s| s.contains(regs.rip)) {
            return Err(Error::bad(
                format!("process {pid}"),
                "it still makes calls for a pmig that was killed; try again",
            ));
        }
        Ok(())
    }

    /// Whether the address space still is the one surveyed.
    pub(super) fn holds(&self, mem: &File) -> bool {
        self.proof.iter().all(|(at, bytes)| {
            let mut now = [0; 2];
            mem.read_exact_at(&mut now, *at).is_ok() && now == *bytes
        })
    }
}
