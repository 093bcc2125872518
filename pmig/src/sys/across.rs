//! The memory of another process, many runs in one call: process_vm_readv(2) and
//! process_vm_writev(2). They copy once, where /proc/PID/mem copies twice and looks
//! up each page by itself, but do only what the process itself may do to its memory.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

use nix::sys::uio::{process_vm_readv, process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;

/// Runs that the kernel takes in one call (UIO_MAXIOV).
pub const MOST_RUNS: usize = 1024;

/// Reads runs of addresses of a process, one behind the other. Returns how many bytes
/// it got before the first that cannot be read so, for whatever reason.
pub fn read(pid: i32, runs: &[Range<u64>], into: &mut [u8]) -> usize {
    let mut got = 0;
    for some in runs.chunks(MOST_RUNS) {
        let (remote, len) = remote(some);
        let Some(part) = into.get_mut(got..got + len) else {
            break;
        };
        let mut local = [IoSliceMut::new(part)];
        let n = process_vm_readv(Pid::from_raw(pid), &mut local, &remote).unwrap_or(0);
        got += n;
        if n < len {
            break;
        }
    }
    got
}

/// Writes to runs of addresses of a process what lies one behind the other in `bytes`.
/// Returns how many bytes it wrote before the first that cannot be written so, for
/// whatever reason.
pub fn write(pid: i32, runs: &[Range<u64>], bytes: &[u8]) -> usize {
    let mut done = 0;
    for some in runs.chunks(MOST_RUNS) {
        let (remote, len) = remote(some);
        let Some(part) = bytes.get(done..done + len) else {
            break;
        };
        let local = [IoSlice::new(part)];
        let n = process_vm_writev(Pid::from_raw(pid), &local, &remote).unwrap_or(0);
        done += n;
        if n < len {
            break;
        }
    }
    done
}

fn remote(runs: &[Range<u64>]) -> (Vec<RemoteIoVec>, usize) {
    let all = runs.iter().map(|r| RemoteIoVec {
        base: r.start as usize,
        len: (r.end - r.start) as usize,
    });
    let all: Vec<RemoteIoVec> = all.collect();
    let len = all.iter().map(|r| r.len).sum();
    (all, len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_copied_up_to_the_first_that_is_not_there() {
        let own = std::process::id() as i32;
        let mut memory = vec![0u8; 64];
        let at = memory.as_mut_ptr() as u64;
        let there = [at..at + 8, at + 32..at + 40];
        let bytes: Vec<u8> = (1..=16).collect();
        assert_eq!(write(own, &there, &bytes), 16);
        assert_eq!(memory[32..40], bytes[8..]);
        let mut back = [0; 16];
        assert_eq!(read(own, &there, &mut back), 16);
        assert_eq!(back[..], bytes[..]);
        let gone = [there[0].clone(), 0..8];
        assert_eq!(read(own, &gone, &mut back), 8);
        assert_eq!(write(own, &gone, &bytes), 8);
    }

    #[test]
    fn more_runs_than_one_call_takes_are_several_calls() {
        let own = std::process::id() as i32;
        let from: Vec<u8> = (0..4 * MOST_RUNS).map(|n| n as u8).collect();
        let at = from.as_ptr() as u64;
        let runs: Vec<Range<u64>> = (0..from.len() as u64 / 2)
            .map(|n| at + 2 * n..at + 2 * n + 1)
            .collect();
        let mut into = vec![0; runs.len()];
        assert_eq!(read(own, &runs, &mut into), runs.len());
        assert!(into.iter().enumerate().all(|(n, b)| *b == (2 * n) as u8));
    }
}
