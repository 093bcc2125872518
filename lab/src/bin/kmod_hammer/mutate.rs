//! Random mutations of valid calls, on tasks in every state.

use crate::bytes::{edges, get, leaves, open, put, Bent, Leaf};
use crate::edges::{busy_child, known, let_run};
use crate::raw;
use crate::victim::{accepted, module, refused, Victim};
use pmig::sys::kmod::{abi, Kmod, RawPcb};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

type Outcome = Result<(), String>;

/// xorshift64: the same seed gives the same calls.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

struct Mutator {
    random: Random,
    kmod: Kmod,
    device: File,
    pages: [u64; 3],
    call: Vec<Leaf>,
    pcb: Vec<Leaf>,
}

fn text(what: &str) -> impl Fn(io::Error) -> String + '_ {
    move |e| format!("{what}: {e}")
}

impl Mutator {
    fn value(&mut self, old: u64) -> u64 {
        match self.random.below(4) {
            0 => self.random.next(),
            1 => old ^ 1 << self.random.below(64),
            2 => old.wrapping_add(self.random.next() % 33).wrapping_sub(16),
            _ => {
                let all = edges(old);
                all[self.random.below(all.len())]
            }
        }
    }

    fn bend_word(&mut self, bytes: &mut [u8], offset: usize, size: usize) {
        let value = self.value(get(bytes, offset, size));
        put(bytes, offset, size, value);
    }

    fn bend_call(&mut self, bent: &mut Bent, request: u32) {
        let leaf = self.call[self.random.below(self.call.len())].clone();
        let pointer = matches!(leaf.name.as_str(), "pcb[0]" | "xstate[0]" | "siginfos[0]");
        if pointer && request == abi::IOC_CAPTURE {
            // A capture writes where it is told.
            let offset = self.random.next() % 64;
            let page = self.pages[self.random.below(3)];
            let at = match self.random.below(3) {
                0 => page - offset % 8,
                1 => self.pages[1] + 4096 - offset,
                _ => offset,
            };
            put(&mut bent.call, leaf.offset, leaf.size, at);
        } else {
            self.bend_word(&mut bent.call, leaf.offset, leaf.size);
        }
    }

    fn bend(&mut self, bent: &mut Bent, request: u32) {
        for _ in 0..=self.random.below(4) {
            match self.random.below(8) {
                0 => self.bend_call(bent, request),
                1 => {
                    let used =
                        bent.field("xstate_size").clamp(8, bent.xstate.len() as u64) as usize;
                    let offset = self.random.below(used - 7);
                    self.bend_word(&mut bent.xstate, offset, 8);
                }
                2 => {
                    let used = bent.field("siginfo_count").clamp(1, 64) as usize;
                    let at = self.random.below(used * size_of::<abi::Siginfo>());
                    self.bend_word(&mut bent.siginfos, at, 1);
                }
                _ => {
                    let leaf = self.pcb[self.random.below(self.pcb.len())].clone();
                    self.bend_word(&mut bent.pcb, leaf.offset, leaf.size);
                }
            }
        }
    }

    /// Some signals for the queues, valid before they are bent.
    fn signals(&mut self) -> Vec<abi::Siginfo> {
        let mut all = Vec::new();
        for i in 0..self.random.below(6) {
            let signo = 34 + self.random.below(31) as u32;
            let mut entry = abi::Siginfo {
                signo,
                flags: (i as u32 & 1) * abi::SI_SHARED,
                ..Default::default()
            };
            entry.info[..4].copy_from_slice(&signo.to_ne_bytes());
            entry.info[8..12].copy_from_slice(&(-1i32).to_ne_bytes());
            all.push(entry);
        }
        all
    }

    fn sections(&mut self) -> u64 {
        let both = self.kmod.capture_sections() & self.kmod.restore_sections();
        match self.random.below(4) {
            0 => both,
            1 => {
                let bits: Vec<u64> = (0..64).map(|i| 1 << i).filter(|b| both & b != 0).collect();
                bits[self.random.below(bits.len())]
            }
            _ => both & self.random.next(),
        }
    }

    /// One bent call. Whether the module accepted it as a restore.
    fn one(&mut self, victim: &Victim, valid: &RawPcb) -> Result<bool, String> {
        let sections = self.sections();
        let restore = self.random.chance(80);
        let (mut bent, request) = if restore {
            let mut raw = valid.clone();
            raw.siginfos = self.signals();
            (Bent::restore(victim.fd(), &raw, sections), abi::IOC_RESTORE)
        } else {
            let bent = Bent::capture(&self.kmod, victim.fd(), sections);
            (bent, abi::IOC_CAPTURE)
        };
        self.bend(&mut bent, request);
        // A bent descriptor may be that of another task, in another state.
        let same = bent.field("pidfd") == victim.fd().as_raw_fd() as u64;
        match bent.call(&self.device, request) {
            Ok(()) => Ok(restore && same),
            Err(e) if known(e) => Ok(false),
            Err(e) => Err(format!("a bent call ended with errno {e}")),
        }
    }
}

pub fn run(calls: u64, seed: u64) -> Outcome {
    let mut m = Mutator {
        random: Random(seed | 1),
        kmod: module()?,
        device: open().map_err(text("open"))?,
        pages: raw::awkward_pages().map_err(text("mmap"))?,
        call: leaves("pmig_call"),
        pcb: leaves("pmig_pcb"),
    };
    let sections = m.kmod.capture_sections();
    let refused = refused().map_err(text("victims"))?;
    let mut stopped = accepted().map_err(text("victims"))?;
    let mut busy = busy_child().map_err(text("child"))?;
    let mut valid = m
        .kmod
        .capture(busy.fd(), sections)
        .map_err(text("capture"))?;
    let (mut restored, mut deaths) = (0u64, 0u64);
    for i in 0..calls {
        match m.random.below(10) {
            0 => {
                let refused = &refused[m.random.below(refused.len())];
                if m.one(&refused.victim, &valid)? {
                    let name = refused.name;
                    return Err(format!(
                        "call {i}: a task in a bad state was restored: {name}"
                    ));
                }
            }
            1 => {
                let at = m.random.below(stopped.len());
                restored += u64::from(m.one(&stopped[at].1, &valid)?);
                // A bent alarm or signal may have killed it meanwhile.
                if m.kmod.capture(stopped[at].1.fd(), abi::SEC_INFO).is_err() {
                    drop(stopped);
                    stopped = accepted().map_err(text("victims"))?;
                }
            }
            _ => {
                if !m.one(&busy, &valid)? {
                    continue;
                }
                restored += 1;
                // Not every time: a run costs more than many calls.
                if m.random.chance(60) || let_run(&busy) {
                    continue;
                }
                deaths += 1;
                // Before the next is born: it may have filled the machine.
                drop(busy);
                busy = busy_child().map_err(text("child"))?;
                valid = m
                    .kmod
                    .capture(busy.fd(), sections)
                    .map_err(text("capture"))?;
            }
        }
    }
    if restored < calls / 50 {
        return Err(format!("only {restored} of {calls} calls went through"));
    }
    println!("ok mutate: {calls} calls, {restored} accepted, {deaths} programs died of them");
    Ok(())
}
