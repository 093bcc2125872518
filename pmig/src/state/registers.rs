//! Registers: general, FPU and vector state, and the areas in memory that the
//! kernel knows a thread by.

use serde::{Deserialize, Serialize};

use super::words::u64_at;
use crate::error::{Context, Error, Obstacle, Result};
use crate::sys::cpu::{xstate_layout, XstateLayout};
use crate::sys::ptrace::Regs;
use crate::sys::sched;
use crate::tracee::{Batch, Stopped};

/// The legacy area and the XSAVE header, which every processor has.
const FIXED: usize = 576;
/// `xcomp_bv` and `xstate_bv` of the XSAVE header (Intel SDM vol. 1, 13.4.2).
const XSTATE_BV: usize = 512;
/// Where the kernel notes XCR0 in an area it hands out (`struct
/// _fpx_sw_bytes`).
const SW_XCR0: usize = 464;
/// One past the highest address a program can have with five-level paging.
const TASK_SIZE: u64 = 1 << 56;

/// General registers and extended state, as at the stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    pub general: Regs,
    /// The NT_X86_XSTATE register set: XSAVE's standard format.
    #[serde(with = "serde_bytes")]
    pub xstate: Vec<u8>,
    /// Where its components lie.
    pub layout: XstateLayout,
}

impl Registers {
    /// # Errors
    /// ptrace's own.
    pub fn capture(stopped: &Stopped) -> Result<Registers> {
        Ok(Registers {
            general: stopped.regs(),
            xstate: stopped.xstate()?,
            layout: xstate_layout().clone(),
        })
    }

    /// Gives the extended state to `stopped`. The general registers go last,
    /// with the restart of an interrupted call.
    ///
    /// # Errors
    /// [`Error::Refused`] where this processor lacks a component in use,
    /// [`Error::Bad`] for a state that is none.
    pub fn restore_xstate(&self, stopped: &mut Stopped) -> Result<()> {
        let state = relay(&self.xstate, &self.layout, xstate_layout())?;
        stopped.set_xstate(&state)
    }

    /// Components of the state that are not in their initial configuration.
    pub fn components_in_use(&self) -> u64 {
        u64_at(&self.xstate, XSTATE_BV)
    }
}

/// Lays an area out as another processor wants it: the standard format has
/// fixed offsets per processor, not for all of them (PKRU follows AVX on some
/// and AVX-512 on others).
fn relay(state: &[u8], from: &XstateLayout, to: &XstateLayout) -> Result<Vec<u8>> {
    if state.len() < FIXED {
        return Err(Error::bad("vector state", "shorter than its header"));
    }
    let used = u64_at(state, XSTATE_BV);
    let missing = used & !to.xcr0;
    if missing != 0 {
        return Err(Error::Refused(vec![Obstacle::new(
            "vector registers",
            format!(
                "{} in use, which this processor does not have",
                component_names(missing)
            ),
            "choose a machine whose processor has them",
        )]));
    }
    if from == to && state.len() == to.size as usize {
        return Ok(state.to_vec());
    }
    let mut out = vec![0; (to.size as usize).max(FIXED)];
    out[..FIXED].copy_from_slice(&state[..FIXED]);
    out[SW_XCR0..SW_XCR0 + 8].copy_from_slice(&to.xcr0.to_le_bytes());
    for c in from.components.iter().filter(|c| c.index < 64) {
        if used >> c.index & 1 == 0 {
            continue;
        }
        let there = to.components.iter().find(|t| t.index == c.index);
        let source = range(c.offset, c.size, state.len());
        let place = there.and_then(|t| range(t.offset, t.size, out.len()));
        match (source, place) {
            (Some(s), Some(p)) if s.len() == p.len() => out[p].copy_from_slice(&state[s]),
            _ => {
                return Err(Error::bad(
                    "vector state",
                    format!("{} laid out impossibly", component_names(1 << c.index)),
                ))
            }
        }
    }
    Ok(out)
}

fn range(offset: u32, size: u32, len: usize) -> Option<std::ops::Range<usize>> {
    let (start, end) = (offset as usize, offset as usize + size as usize);
    (start >= FIXED && end <= len).then_some(start..end)
}

/// Names of extended state components, as people know them.
pub fn component_names(mask: u64) -> String {
    (0..64)
        .filter(|i| mask >> i & 1 == 1)
        .map(|i| match i {
            0 => "x87".to_string(),
            1 => "sse".to_string(),
            2 => "avx".to_string(),
            3 | 4 => "mpx".to_string(),
            5..=7 => "avx512".to_string(),
            9 => "pkru".to_string(),
            17 | 18 => "amx".to_string(),
            19 => "apx".to_string(),
            n => format!("component {n}"),
        })
        .fold(Vec::new(), |mut names: Vec<String>, n| {
            if !names.contains(&n) {
                names.push(n);
            }
            names
        })
        .join(", ")
}

/// Memory that the kernel reads or writes on the thread's behalf.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserAreas {
    /// rseq(2).
    pub rseq: Option<Rseq>,
    /// Head of the robust futex list; 0: none.
    pub robust_list: u64,
    /// What set_tid_address(2) set, cleared when the thread exits.
    pub tid_address: u64,
}

/// A registered rseq(2) area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    pub address: u64,
    pub size: u32,
    pub signature: u32,
}

/// RSEQ_FLAG_UNREGISTER of `<linux/rseq.h>`.
const RSEQ_UNREGISTER: u64 = 1;
/// `sizeof(struct robust_list_head)`, the only length that the kernel takes.
const ROBUST_LIST_HEAD: u64 = 24;

impl UserAreas {
    /// `tid_address` comes from the process itself (PR_GET_TID_ADDRESS).
    ///
    /// # Errors
    /// Those of ptrace and get_robust_list(2).
    pub fn capture(stopped: &Stopped, tid_address: u64) -> Result<UserAreas> {
        let pid = stopped.pid();
        let rseq = stopped.rseq()?;
        let (robust_list, _) =
            sched::robust_list(pid).context("read the robust futex list of process", pid)?;
        Ok(UserAreas {
            rseq: (rseq.address != 0).then_some(Rseq {
                address: rseq.address,
                size: rseq.size,
                signature: rseq.signature,
            }),
            robust_list,
            tid_address,
        })
    }

    /// Sets what differs from `now`, the process's own at present (`None`: it has
    /// none).
    ///
    /// # Errors
    /// [`Error::Bad`] for addresses that no program can have.
    pub fn restore(&self, batch: &mut Batch, now: Option<&UserAreas>) -> Result<()> {
        let areas = [
            self.rseq.map_or(0, |r| r.address),
            self.robust_list,
            self.tid_address,
        ];
        if areas.iter().any(|a| *a >= TASK_SIZE) {
            return Err(Error::bad("thread areas", "an address is out of range"));
        }
        let mut register = |what, r: Rseq, flags: u64| {
            let args = [
                r.address.into(),
                r.size.into(),
                flags.into(),
                r.signature.into(),
            ];
            batch.call(what, libc::SYS_rseq, &args);
        };
        let rseq = now.and_then(|n| n.rseq);
        if self.rseq != rseq {
            if let Some(before) = rseq {
                register("unregister rseq", before, RSEQ_UNREGISTER);
            }
            if let Some(r) = self.rseq {
                register("rseq", r, 0);
            }
        }
        if self.robust_list != now.map_or(0, |n| n.robust_list) {
            batch.call(
                "set_robust_list",
                libc::SYS_set_robust_list,
                &[self.robust_list.into(), ROBUST_LIST_HEAD.into()],
            );
        }
        if now.is_none_or(|n| n.tid_address != self.tid_address) {
            batch.call(
                "set_tid_address",
                libc::SYS_set_tid_address,
                &[self.tid_address.into()],
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::cpu::Component;

    fn layout(components: &[(u32, u32, u32)]) -> XstateLayout {
        XstateLayout {
            xcr0: components.iter().fold(3, |m, c| m | 1 << c.0),
            size: components.iter().map(|c| c.1 + c.2).max().unwrap_or(576),
            components: components
                .iter()
                .map(|&(index, offset, size)| Component {
                    index,
                    offset,
                    size,
                })
                .collect(),
        }
    }

    fn state(layout: &XstateLayout, used: u64) -> Vec<u8> {
        let mut s: Vec<u8> = (0..layout.size).map(|i| (i % 251) as u8).collect();
        s[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&used.to_le_bytes());
        s
    }

    #[test]
    fn the_same_layout_keeps_every_byte() {
        let l = layout(&[(2, 576, 256), (9, 832, 8)]);
        let s = state(&l, 0b10_0000_0111);
        assert_eq!(relay(&s, &l, &l).unwrap(), s);
    }

    #[test]
    fn components_move_to_where_the_processor_wants_them() {
        let from = layout(&[(2, 576, 256), (9, 2688, 8)]);
        let to = layout(&[(2, 576, 256), (9, 832, 8)]);
        let s = state(&from, 0b10_0000_0111);
        let moved = relay(&s, &from, &to).unwrap();
        assert_eq!(moved.len(), 840);
        assert_eq!(moved[832..840], s[2688..2696]);
        assert_eq!(moved[576..832], s[576..832]);
        assert_eq!(u64_at(&moved, SW_XCR0), to.xcr0);
    }

    #[test]
    fn a_component_in_use_must_be_there() {
        let from = layout(&[(2, 576, 256), (5, 1088, 64)]);
        let to = layout(&[(2, 576, 256)]);
        let e = relay(&state(&from, 0b10_0111), &from, &to).unwrap_err();
        assert!(e.to_string().contains("avx512"), "{e}");
        relay(&state(&from, 0b111), &from, &to).unwrap();
    }

    #[test]
    fn impossible_layouts_are_refused() {
        let to = layout(&[(2, 576, 256)]);
        for c in [(2, 0, 256), (2, 576, 9999), (2, u32::MAX, 256), (2, 576, 8)] {
            let mut from = to.clone();
            from.components[0].offset = c.1;
            from.components[0].size = c.2;
            assert!(relay(&state(&to, 7), &from, &to).is_err(), "{c:?}");
        }
        assert!(relay(&[0; 100], &to, &to).is_err());
    }

    #[test]
    fn names_are_given_once() {
        assert_eq!(component_names(0b10_1110_0100), "avx, avx512, pkru");
    }
}
