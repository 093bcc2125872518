//! What of an address space is the kernel's own.

use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::layout::{Backing, Layout};
use crate::error::{Context, Error, Result};

/// The part of an address space that is the kernel's own: a program carries
/// addresses of its functions, so both machines must have the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// blake3 of the vdso's code.
    pub vdso: [u8; 32],
    /// Where the code lies from the lowest address of what comes with it.
    pub distance: u64,
}

impl Kernel {
    /// This machine's, as every process here has it.
    pub fn here() -> Result<Kernel> {
        // Later our own memory may be such as no program's is carried.
        static HERE: OnceLock<Kernel> = OnceLock::new();
        match HERE.get() {
            Some(kernel) => Ok(kernel.clone()),
            None => Kernel::look().map(|kernel| HERE.get_or_init(|| kernel).clone()),
        }
    }

    fn look() -> Result<Kernel> {
        let own = Layout::capture(std::process::id() as i32, &[])?;
        let none = || Error::bad("this kernel", "it has no vdso");
        let (_, distance) = own.vdso().ok_or_else(none)?;
        let code = own
            .vmas
            .iter()
            .find(|v| v.backing == Backing::Vdso)
            .ok_or_else(none)?;
        let mut bytes = vec![0; (code.end - code.start) as usize];
        std::fs::File::open("/proc/self/mem")
            .and_then(|mem| mem.read_exact_at(&mut bytes, code.start))
            .context("read", "the vdso")?;
        Ok(Kernel {
            vdso: *blake3::hash(&bytes).as_bytes(),
            distance,
        })
    }
}
