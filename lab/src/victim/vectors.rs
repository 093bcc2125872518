//! State that stays in vector registers across a system call.
#![allow(unsafe_code)]

use super::Mix;
use std::arch::asm;
use std::time::{Duration, Instant};

const REGISTERS: usize = 16;
const LANES: usize = 4;

/// Contents of the sixteen 256-bit vector registers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct Vectors([[u64; LANES]; REGISTERS]);

/// One step: each register takes in its neighbour and one farther away.
macro_rules! step {
    ($($own:literal $next:literal $far:literal)*) => {
        concat!($(
            "vpaddq ymm", $own, ", ymm", $own, ", ymm", $next, "\n",
            "vpxor ymm", $own, ", ymm", $own, ", ymm", $far, "\n",
        )*)
    };
}

/// What undoes itself: the time it takes is all that it does.
macro_rules! spin {
    ($($own:literal $next:literal)*) => {
        concat!($(
            "vpxor ymm", $own, ", ymm", $own, ", ymm", $next, "\n",
            "vpxor ymm", $own, ", ymm", $own, ", ymm", $next, "\n",
        )*)
    };
}

macro_rules! each {
    ($before:literal $between:literal $($at:literal $number:literal)*) => {
        concat!($($before, $number, $between, $at, "]\n",)*)
    };
}

impl Vectors {
    /// Contents drawn from a hash.
    pub fn new(mix: &mut Mix) -> Self {
        let mut all = [[0; LANES]; REGISTERS];
        for (index, lane) in all.iter_mut().flatten().enumerate() {
            *lane = mix.add(index as u64);
        }
        Self(all)
    }

    /// A hash of the contents.
    pub fn sum(&self) -> u64 {
        let mut mix = Mix(3);
        for lane in self.0.iter().flatten() {
            mix.add(*lane);
        }
        mix.0
    }

    fn step_plainly(&mut self) {
        for own in 0..REGISTERS {
            for lane in 0..LANES {
                let next = self.0[(own + 1) % REGISTERS][lane];
                let far = self.0[(own + 5) % REGISTERS][lane];
                self.0[own][lane] = self.0[own][lane].wrapping_add(next) ^ far;
            }
        }
    }

    /// Steps, writes the line to a descriptor, spins and steps again, all
    /// without ever storing the registers: what they hold in between is
    /// nowhere in memory.
    ///
    /// # Errors
    /// A write that failed or was short.
    pub fn write_line(&mut self, fd: i32, line: &[u8], spins: u64) -> Result<(), String> {
        let wrote = if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 is there, and the line outlives the call.
            unsafe { self.write_in_registers(fd, line, spins) }
        } else {
            self.step_plainly();
            // SAFETY: the line outlives the call.
            let wrote = unsafe { libc::write(fd, line.as_ptr().cast(), line.len()) };
            self.step_plainly();
            wrote as i64
        };
        if wrote == line.len() as i64 {
            return Ok(());
        }
        Err(format!("write of {} bytes returned {wrote}", line.len()))
    }

    /// # Safety
    /// The processor must have AVX2.
    unsafe fn write_in_registers(&mut self, fd: i32, line: &[u8], spins: u64) -> i64 {
        let wrote: i64;
        // SAFETY: the registers are declared as clobbered, the contents are 32
        // byte aligned and 512 bytes long, and the system call reads the line.
        unsafe {
            asm!(
                each!("vmovdqa ymm" ", [r8+" "0" "0" "32" "1" "64" "2" "96" "3" "128" "4"
                    "160" "5" "192" "6" "224" "7" "256" "8" "288" "9" "320" "10" "352" "11"
                    "384" "12" "416" "13" "448" "14" "480" "15"),
                step!("0" "1" "5" "1" "2" "6" "2" "3" "7" "3" "4" "8" "4" "5" "9" "5" "6" "10"
                    "6" "7" "11" "7" "8" "12" "8" "9" "13" "9" "10" "14" "10" "11" "15"
                    "11" "12" "0" "12" "13" "1" "13" "14" "2" "14" "15" "3" "15" "0" "4"),
                "syscall",
                "test r9, r9",
                "jz 3f",
                "2:",
                spin!("0" "1" "1" "2" "2" "3" "3" "4" "4" "5" "5" "6" "6" "7" "7" "8" "8" "9"
                    "9" "10" "10" "11" "11" "12" "12" "13" "13" "14" "14" "15" "15" "0"),
                "dec r9",
                "jnz 2b",
                "3:",
                step!("0" "1" "5" "1" "2" "6" "2" "3" "7" "3" "4" "8" "4" "5" "9" "5" "6" "10"
                    "6" "7" "11" "7" "8" "12" "8" "9" "13" "9" "10" "14" "10" "11" "15"
                    "11" "12" "0" "12" "13" "1" "13" "14" "2" "14" "15" "3" "15" "0" "4"),
                "mov r10, r8",
                "vmovdqa [r10], ymm0", "vmovdqa [r10+32], ymm1",
                "vmovdqa [r10+64], ymm2", "vmovdqa [r10+96], ymm3",
                "vmovdqa [r10+128], ymm4", "vmovdqa [r10+160], ymm5",
                "vmovdqa [r10+192], ymm6", "vmovdqa [r10+224], ymm7",
                "vmovdqa [r10+256], ymm8", "vmovdqa [r10+288], ymm9",
                "vmovdqa [r10+320], ymm10", "vmovdqa [r10+352], ymm11",
                "vmovdqa [r10+384], ymm12", "vmovdqa [r10+416], ymm13",
                "vmovdqa [r10+448], ymm14", "vmovdqa [r10+480], ymm15",
                "vzeroupper",
                inlateout("rax") libc::SYS_write => wrote,
                in("rdi") i64::from(fd),
                in("rsi") line.as_ptr(),
                in("rdx") line.len(),
                in("r8") self.0.as_mut_ptr(),
                inout("r9") spins => _,
                out("rcx") _, out("r10") _, out("r11") _,
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                options(nostack),
            );
        }
        wrote
    }
}

/// How many spins take about that long on this processor, now.
pub fn spins_in(time: Duration) -> u64 {
    if time.is_zero() || !std::arch::is_x86_feature_detected!("avx2") {
        return 0;
    }
    let mut vectors = Vectors::new(&mut Mix(0));
    const TRIED: u64 = 20_000;
    let before = Instant::now();
    // Nothing is written: only the time counts. A descriptor of -1 is refused.
    let _ = vectors.write_line(-1, &[], TRIED);
    let took = before.elapsed().as_nanos().max(1);
    (u128::from(TRIED) * time.as_nanos() / took) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_and_memory_compute_the_same() {
        if !std::arch::is_x86_feature_detected!("avx2") {
            return;
        }
        let mut fast = Vectors::new(&mut Mix(1));
        let mut plain = fast.clone();
        // SAFETY: AVX2 was found above.
        let wrote = unsafe { fast.write_in_registers(-1, &[], 3) };
        assert_eq!(wrote, -i64::from(libc::EBADF));
        plain.step_plainly();
        plain.step_plainly();
        assert_eq!(fast, plain);
    }
}
