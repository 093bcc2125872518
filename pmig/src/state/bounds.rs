//! What the kernel knows of a program's address space beyond its mappings:
//! where code, heap, arguments and environment lie, and the auxiliary vector
//! (PR_SET_MM_MAP of PR_SET_MM(2const)).

use serde::{Deserialize, Serialize};

use super::words::bytes_of;
use crate::error::{Error, Result};
use crate::proc::stat::Stat;
use crate::proc::Kept;
use crate::tracee::{Batch, Call, Done};

/// The kernel's auxiliary vector holds fewer entries than this (AT_VECTOR_SIZE).
const MAX_AUXV: usize = 1024;

/// The fields of `struct prctl_mm_map`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    /// `/proc/PID/auxv`.
    #[serde(with = "serde_bytes")]
    pub auxv: Vec<u8>,
}

impl Bounds {
    pub fn ask(batch: &mut Batch) -> Call {
        batch.call("read the program break", libc::SYS_brk, &[0u64.into()])
    }

    /// `self` is what files tell.
    pub fn capture(&self, brk: Call, done: &Done) -> Bounds {
        Bounds {
            brk: done.result(brk) as u64,
            ..self.clone()
        }
    }

    /// All but the program break, which no file tells.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Bad`].
    pub fn from_proc(pid: i32) -> Result<Bounds> {
        Bounds::from_files(&Kept::of(pid))
    }

    /// The same, of a program that has executed no other one since `files` were first
    /// read.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Bad`].
    pub fn from_files(files: &Kept) -> Result<Bounds> {
        let stat = Stat::again(files)?;
        let auxv = files.read("auxv")?;
        let [start_code, end_code, start_stack] = stat.fields(26)?;
        let [start_data, end_data, start_brk, arg_start, arg_end, env_start, env_end] =
            stat.fields(45)?;
        let bounds = Bounds {
            start_code,
            end_code,
            start_data,
            end_data,
            start_brk,
            brk: start_brk,
            start_stack,
            arg_start,
            arg_end,
            env_start,
            env_end,
            auxv,
        };
        bounds.check()?;
        Ok(bounds)
    }

    /// # Errors
    /// [`Error::Bad`] for bounds that the kernel will not take.
    pub fn check(&self) -> Result<()> {
        let pairs = [
            (self.start_code, self.end_code),
            (self.start_data, self.end_data),
            (self.start_brk, self.brk),
            (self.arg_start, self.arg_end),
            (self.env_start, self.env_end),
        ];
        // A stranger's address space reads as zeroes here.
        if self.start_stack == 0 || pairs.iter().any(|(a, b)| *a == 0 || a > b) {
            return Err(Error::bad(
                "bounds of the address space",
                "not what a kernel tells",
            ));
        }
        if self.auxv.len() > MAX_AUXV || self.auxv.len() % 16 != 0 {
            return Err(Error::bad("auxiliary vector", "of impossible length"));
        }
        Ok(())
    }

    /// Sets them unless they are `now`, the process's own at present.
    ///
    /// # Errors
    /// As [`Bounds::check`].
    pub fn restore(&self, batch: &mut Batch, now: Option<&Bounds>) -> Result<()> {
        if now == Some(self) {
            return Ok(());
        }
        self.set(batch, None)
    }

    /// `exe` is a descriptor of the process for what `/proc/PID/exe` shall
    /// show; nothing of the old executable may be mapped any more then.
    ///
    /// # Errors
    /// As [`Bounds::check`].
    pub fn set(&self, batch: &mut Batch, exe: Option<i32>) -> Result<()> {
        self.check()?;
        let auxv = batch.data(&self.auxv);
        let exe = exe.map_or(u32::MAX, |fd| fd as u32);
        let words = [
            self.start_code,
            self.end_code,
            self.start_data,
            self.end_data,
            self.start_brk,
            self.brk,
            self.start_stack,
            self.arg_start,
            self.arg_end,
            self.env_start,
            self.env_end,
            0,
            self.auxv.len() as u64 | (exe as u64) << 32,
        ];
        let map = batch.data_with_pointers(&bytes_of(&words), &[(88, auxv)]);
        batch.call(
            "set the bounds of the address space",
            libc::SYS_prctl,
            &[
                libc::PR_SET_MM.into(),
                libc::PR_SET_MM_MAP.into(),
                map.into(),
                (words.len() * 8).into(),
                0u64.into(),
            ],
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_own() {
        let me = std::process::id() as i32;
        let b = Bounds::from_proc(me).unwrap();
        assert!(b.start_code < b.end_code);
        let here = &b as *const Bounds as u64;
        assert!(here < b.env_end, "the stack lies below the environment");
        assert_eq!(b.auxv.len() % 16, 0);
    }

    #[test]
    fn impossible_bounds_are_refused() {
        let good = Bounds::from_proc(std::process::id() as i32).unwrap();
        let mut b = Batch::new();
        for spoil in [
            |b: &mut Bounds| b.brk = 1,
            |b: &mut Bounds| b.arg_end = 0,
            |b: &mut Bounds| b.start_stack = 0,
            |b: &mut Bounds| b.auxv = vec![0; 4096],
            |b: &mut Bounds| b.auxv.truncate(7),
        ] {
            let mut bad = good.clone();
            spoil(&mut bad);
            assert!(bad.restore(&mut b, None).is_err(), "{bad:?}");
        }
        assert!(b.is_empty());
        good.restore(&mut b, Some(&good)).unwrap();
        assert!(b.is_empty(), "nothing differs");
        good.set(&mut b, Some(3)).unwrap();
        assert!(!b.is_empty());
    }
}
