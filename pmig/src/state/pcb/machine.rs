//! What a machine is, and whether another will do in its place.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{husk_credentials, Needs};
use crate::error::{Context, Error, Obstacle, Result};
use crate::proc;
use crate::proc::status::Status;
use crate::state::credentials::Credentials;
use crate::state::limits::Limits;
use crate::state::registers::component_names;
use crate::state::scheduling::online;
use crate::sys::cpu::{xstate_layout, XstateLayout};
use crate::sys::kmod::Kmod;

/// Instruction sets that programs choose by at run time, as `/proc/cpuinfo`
/// names them. What only the kernel uses is left out.
const CHOSEN_BY: [&str; 96] = [
    "cmov",
    "cx8",
    "fxsr",
    "mmx",
    "mmxext",
    "3dnow",
    "3dnowext",
    "3dnowprefetch",
    "sse",
    "sse2",
    "pni",
    "ssse3",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "misalignsse",
    "pclmulqdq",
    "cx16",
    "movbe",
    "popcnt",
    "aes",
    "xsave",
    "xsaveopt",
    "xsavec",
    "xgetbv1",
    "avx",
    "f16c",
    "fma",
    "fma4",
    "xop",
    "tbm",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rdpid",
    "lahf_lm",
    "abm",
    "bmi1",
    "bmi2",
    "hle",
    "rtm",
    "adx",
    "fsgsbase",
    "erms",
    "fsrm",
    "fzrm",
    "fsrs",
    "fsrc",
    "avx2",
    "avx_vnni",
    "avx_ifma",
    "avx_vnni_int8",
    "avx_ne_convert",
    "avx512f",
    "avx512dq",
    "avx512ifma",
    "avx512pf",
    "avx512er",
    "avx512cd",
    "avx512bw",
    "avx512vl",
    "avx512vbmi",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_bitalg",
    "avx512_vpopcntdq",
    "avx512_4vnniw",
    "avx512_4fmaps",
    "avx512_vp2intersect",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "gfni",
    "vaes",
    "vpclmulqdq",
    "sha_ni",
    "sha512",
    "sm3",
    "sm4",
    "clflushopt",
    "clwb",
    "clzero",
    "cldemote",
    "movdiri",
    "movdir64b",
    "enqcmd",
    "serialize",
    "tsxldtrk",
    "waitpkg",
    "ospke",
    "mpx",
    "monitorx",
    "cmpccxadd",
];

/// One machine, as seen by a process on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// Its name, for messages.
    pub host: String,
    /// `uname -r`.
    pub kernel: String,
    pub arch: String,
    pub page_size: u64,
    pub flags: BTreeSet<String>,
    pub xstate: XstateLayout,
    pub cpus: Vec<u32>,
    pub pid_max: u32,
    /// The highest capability its kernel knows.
    pub last_capability: u32,
    /// Hash of the vdso: programs keep addresses of functions in it.
    pub vdso: String,
    /// Version of the module's interface, where it is loaded.
    pub module: Option<u32>,
    pub time_namespaces: bool,
    /// What a process born of pmig has.
    pub gives: Credentials,
    pub limits: Limits,
    /// pmig's own; below it (and 0) only CAP_SYS_RESOURCE goes.
    pub oom_score_adj: i32,
}

impl MachineFacts {
    /// # Errors
    /// Those of procfs.
    pub fn here() -> Result<MachineFacts> {
        let name = nix::sys::utsname::uname().context("read", "the machine's name")?;
        let word = |s: &std::ffi::OsStr| s.to_string_lossy().into_owned();
        let number = |path: &str| {
            proc::setting(path)
                .and_then(|t| t.parse::<u32>().ok())
                .ok_or_else(|| Error::bad(path, "is no number"))
        };
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
        let own = std::process::id() as i32;
        Ok(MachineFacts {
            host: word(name.nodename()),
            kernel: word(name.release()),
            arch: word(name.machine()),
            page_size: page.context("read", "the page size")?.unwrap_or(4096) as u64,
            flags: flags(&proc::setting("/proc/cpuinfo").unwrap_or_default()),
            xstate: xstate_layout().clone(),
            cpus: online(),
            pid_max: number("/proc/sys/kernel/pid_max")?,
            last_capability: number("/proc/sys/kernel/cap_last_cap")?,
            vdso: vdso()?,
            module: Kmod::open().ok().flatten().map(|k| k.version()),
            time_namespaces: Path::new("/proc/self/ns/time").exists(),
            gives: husk_credentials(&Status::read(own)?),
            limits: Limits::own()?,
            oom_score_adj: proc::setting("/proc/self/oom_score_adj")
                .and_then(|t| t.parse().ok())
                .unwrap_or(0),
        })
    }
}

/// Reasons why a process of `source` that needs `needs` cannot live on
/// `target`.
pub fn fits(source: &MachineFacts, target: &MachineFacts, needs: &Needs) -> Vec<Obstacle> {
    let there = &target.host;
    let mut all = Vec::new();
    let mut unless = |ok: bool, object: &str, why: String, remedy: &str| {
        if !ok {
            all.push(Obstacle::new(object, why, remedy));
        }
    };
    unless(
        source.arch == target.arch && source.page_size == target.page_size,
        "machine",
        format!(
            "{there} is {} with pages of {} bytes, this is {} with {}",
            target.arch, target.page_size, source.arch, source.page_size
        ),
        "choose a machine of the same kind",
    );
    let lacking: Vec<&str> = source
        .flags
        .difference(&target.flags)
        .map(String::as_str)
        .collect();
    unless(
        lacking.is_empty(),
        "cpu",
        format!(
            "the one of {there} lacks {}, which the program may be using",
            lacking.join(", ")
        ),
        "choose a machine whose processor has them",
    );
    let missing = source.xstate.xcr0 & !target.xstate.xcr0;
    unless(
        missing == 0,
        "vector registers",
        format!("{there} does not have {} enabled", component_names(missing)),
        "choose a machine whose processor has them",
    );
    unless(
        source.vdso == target.vdso,
        "vdso",
        format!(
            "linux {} on {there} has another than linux {} here, and programs remember \
             where its functions are",
            target.kernel, source.kernel
        ),
        "run the same kernel on both",
    );
    unless(
        (needs.pid as u32) < target.pid_max,
        "process id",
        format!(
            "{} is above what {there} allows ({})",
            needs.pid, target.pid_max
        ),
        "raise kernel.pid_max there",
    );
    unless(
        target.time_namespaces,
        "clocks",
        format!("{there} has no time namespaces, its monotonic clock would step"),
        "use a kernel with CONFIG_TIME_NS",
    );
    unless(
        target.gives.uid.effective == 0,
        "privilege",
        format!("pmig serve does not run as root on {there}"),
        "start it as root",
    );
    let may_raise = target.gives.capabilities.effective & CAP_SYS_RESOURCE != 0;
    unless(
        may_raise || needs.oom_score_adj >= target.oom_score_adj.min(0),
        "oom score",
        format!(
            "{there} may not set one as low as {} without cap_sys_resource",
            needs.oom_score_adj
        ),
        "start pmig serve with it",
    );
    all.extend(needs.scheduling.obstacles());
    all.extend(needs.credentials.obstacles(&target.gives));
    all.extend(needs.limits.obstacles(&target.limits, may_raise));
    all
}

const CAP_SYS_RESOURCE: u64 = 1 << 24;

fn flags(cpuinfo: &str) -> BTreeSet<String> {
    cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("flags")?.split_once(':'))
        .map(|(_, f)| f)
        .unwrap_or_default()
        .split_whitespace()
        .filter(|f| CHOSEN_BY.contains(f))
        .map(str::to_string)
        .collect()
}

/// The vdso is the same in every process of a kernel: its own will do.
fn vdso() -> Result<String> {
    let own = std::process::id() as i32;
    let maps = proc::text(own, "maps")?;
    let range = maps
        .lines()
        .find(|l| l.ends_with("[vdso]"))
        .and_then(|l| l.split_whitespace().next()?.split_once('-'))
        .and_then(|(a, b)| {
            let number = |t| u64::from_str_radix(t, 16).ok();
            Some((number(a)?, number(b)?))
        });
    let Some((start, end)) = range else {
        return Ok("none".to_string());
    };
    let mut bytes = vec![0; (end - start).min(1 << 20) as usize];
    File::open("/proc/self/mem")
        .and_then(|f| f.read_exact_at(&mut bytes, start))
        .context("read", "the vdso")?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_needs() -> Needs {
        super::super::needs(std::process::id() as i32).unwrap()
    }

    #[test]
    fn a_machine_fits_itself() {
        let here = MachineFacts::here().unwrap();
        assert!(here.flags.contains("sse2"));
        let mut needs = own_needs();
        needs.oom_score_adj = 0;
        if here.gives.uid.effective == 0 {
            assert_eq!(fits(&here, &here, &needs), vec![]);
        }
    }

    #[test]
    fn what_is_lacking_is_named() {
        let here = MachineFacts::here().unwrap();
        let mut b = here.clone();
        b.host = "b".to_string();
        b.flags.remove("sse2");
        b.xstate.xcr0 = 1;
        b.vdso = "other".to_string();
        b.pid_max = 1;
        b.time_namespaces = false;
        let mut needs = own_needs();
        needs.oom_score_adj = 0;
        let all = fits(&here, &b, &needs);
        let text: Vec<String> = all.iter().map(ToString::to_string).collect();
        for part in [
            "lacks sse2",
            "vdso",
            "process id",
            "clocks",
            "b does not have sse",
        ] {
            assert!(text.iter().any(|t| t.contains(part)), "{part} in {text:?}");
        }
    }

    #[test]
    fn flags_are_those_that_programs_see() {
        let f = flags("vendor_id\t: x\nflags\t\t: fpu pti avx2 smep sse2\nflags\t: none\n");
        assert_eq!(f.into_iter().collect::<Vec<_>>(), vec!["avx2", "sse2"]);
    }
}
