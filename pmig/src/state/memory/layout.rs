//! What an address space is made of, and how one becomes another.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Obstacle, Result};
use crate::proc::smaps::{self, Mapping};
use crate::tracee::{Arg, Batch, RemoteAddr};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// TASK_SIZE of a 64-bit process with four-level page tables.
pub const TOP: u64 = 0x7fff_ffff_f000;
/// Below this nobody maps anything (vm.mmap_min_addr).
pub const BOTTOM: u64 = 0x1000;
/// More mappings than any kernel allows by default (vm.max_map_count), with
/// room for those who raised it.
const MOST: usize = 1 << 20;

/// `MAP_DROPPABLE` of `<linux/mman.h>`: pages that the kernel may take away.
const MAP_DROPPABLE: u64 = 0x08;

/// What the pages of a mapping come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    Anonymous,
    /// Anonymous, and the kernel may drop it under pressure (mmap(2)).
    Droppable,
    /// A regular file, by its place in [`Layout::files`].
    File(u32),
    /// The kernel's data and code for time without system calls (vdso(7)).
    Vvar,
    Vdso,
}

/// madvise(2) advice that stays with a mapping: flag in smaps, advice to set
/// it, advice to take it off.
const ADVICE: [(&[u8; 2], i32, i32); 8] = [
    (b"dc", libc::MADV_DONTFORK, libc::MADV_DOFORK),
    (b"dd", libc::MADV_DONTDUMP, libc::MADV_DODUMP),
    (b"wf", libc::MADV_WIPEONFORK, libc::MADV_KEEPONFORK),
    (b"hg", libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE),
    (b"nh", libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE),
    (b"mg", libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE),
    (b"sr", libc::MADV_SEQUENTIAL, libc::MADV_NORMAL),
    (b"rr", libc::MADV_RANDOM, libc::MADV_NORMAL),
];

/// A mapping, as it travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vma {
    pub start: u64,
    pub end: u64,
    /// PROT_READ | PROT_WRITE | PROT_EXEC
    pub prot: u8,
    /// MAP_SHARED, read-only and of a file.
    pub shared: bool,
    pub grows_down: bool,
    /// MAP_NORESERVE
    pub no_reserve: bool,
    /// Bytes into the file; of the vdso's code, the lowest address of all that
    /// the kernel maps with it.
    pub offset: u64,
    pub backing: Backing,
    /// Bits by the order of the table of advice.
    pub advice: u8,
    /// Perhaps made since it was last looked at, even where the same stood
    /// before: whatever was sent for it is void.
    pub fresh: bool,
}

impl Vma {
    pub fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Whether its pages can differ from what backs them, and be watched.
    pub fn is_private(&self) -> bool {
        !self.shared && !matches!(self.backing, Backing::Vvar | Backing::Vdso)
    }

    /// Whether its pages may be left behind: anonymous ones may, but for those that a
    /// child is to find empty (MADV_WIPEONFORK), which a copy of what is missing would
    /// fill for it.
    pub fn may_follow(&self) -> bool {
        let wiped = ADVICE.iter().position(|(flag, ..)| *flag == b"wf");
        self.backing == Backing::Anonymous
            && !self.shared
            && wiped.is_none_or(|n| self.advice >> n & 1 == 0)
    }

    /// Whether `other` shows the same at address `at` of both.
    fn same_at(&self, other: &Vma, at: u64) -> bool {
        let key = |v: &Vma| {
            let offset = match v.backing {
                Backing::File(_) => v.offset.wrapping_add(at - v.start),
                _ => 0,
            };
            (v.backing, v.shared, v.grows_down, v.no_reserve, offset)
        };
        key(self) == key(other)
    }

    fn piece(&self, r: Range<u64>) -> Vma {
        Vma {
            start: r.start,
            end: r.end,
            offset: match self.backing {
                Backing::File(_) => self.offset + (r.start - self.start),
                _ => self.offset,
            },
            ..self.clone()
        }
    }
}

/// A file that is mapped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedFile {
    /// By the kernel's account; opened only through `link`.
    pub path: PathBuf,
    pub dev: (u32, u32),
    pub inode: u64,
    /// Name in /proc/PID/map_files of a mapping of it.
    pub link: String,
}

/// An address space.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// In order of address.
    pub vmas: Vec<Vma>,
    pub files: Vec<MappedFile>,
}

/// One step from one address space to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Unmap(Range<u64>),
    Map(Vma),
    Protect(Range<u64>, u8),
    Advise(Range<u64>, i32),
}

impl Layout {
    /// Only what the kernel maps by itself.
    pub fn of_the_kernel(&self) -> Layout {
        let own = |v: &&Vma| matches!(v.backing, Backing::Vvar | Backing::Vdso);
        Layout {
            vmas: self.vmas.iter().filter(own).cloned().collect(),
            files: Vec::new(),
        }
    }

    /// Lists the address space of a process. `known` gives files the same
    /// numbers as before.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with every mapping that cannot be carried.
    pub fn capture(pid: i32, known: &[MappedFile]) -> Result<Layout> {
        Layout::from_mappings(&smaps::list(pid)?.0, known, |_| false)
    }

    /// `follows`: of which mappings it is known what was done to them since they
    /// were last looked at. The others are fresh.
    pub(super) fn from_mappings(
        mappings: &[Mapping],
        known: &[MappedFile],
        follows: impl Fn(&Mapping) -> bool,
    ) -> Result<Layout> {
        let mut layout = Layout {
            vmas: Vec::with_capacity(mappings.len()),
            files: known.to_vec(),
        };
        let mut obstacles = Vec::new();
        let mut places = Places::default();
        for (n, file) in known.iter().enumerate() {
            places.entry((file.dev, file.inode)).or_default().push(n);
        }
        for m in mappings {
            if m.name == b"[vsyscall]" {
                continue;
            }
            match claim(m, &mut layout.files, &mut places) {
                Ok(mut vma) => {
                    vma.fresh = vma.is_private() && !follows(m);
                    layout.vmas.push(vma);
                }
                Err(o) => obstacles.push(o),
            }
        }
        if let Some((low, _)) = layout.vdso() {
            for v in &mut layout.vmas {
                if v.backing == Backing::Vdso {
                    v.offset = low;
                }
            }
        }
        if obstacles.is_empty() {
            Ok(layout)
        } else {
            Err(Error::Refused(obstacles))
        }
    }

    /// Checks what a peer says.
    pub fn check(&self) -> Result<()> {
        let bad = |what: String| Err(Error::bad("address space from peer", what));
        if self.vmas.len() > MOST || self.files.len() > MOST {
            return bad(format!("{} mappings are too many", self.vmas.len()));
        }
        let mut last = BOTTOM;
        for v in &self.vmas {
            let aligned = (v.start | v.end | v.offset) % PAGE == 0;
            if !aligned || v.start < last || v.end <= v.start || v.end > TOP || v.prot > 7 {
                return bad(format!("mapping {:x}-{:x} is impossible", v.start, v.end));
            }
            if v.offset.checked_add(v.end - v.start).is_none() {
                return bad(format!("mapping {:x} wraps its file", v.start));
            }
            match v.backing {
                Backing::File(n) if n as usize >= self.files.len() => {
                    return bad(format!("mapping {:x} is of no file", v.start));
                }
                Backing::File(_) if v.grows_down => {
                    return bad(format!("mapping {:x} is a growing file", v.start));
                }
                Backing::File(_) => {}
                _ if v.shared => {
                    return bad(format!("mapping {:x} is shared memory", v.start));
                }
                _ => {}
            }
            last = v.end;
        }
        Ok(())
    }

    /// The lowest address of the kernel's own mappings, and where its code
    /// lies from there.
    pub fn vdso(&self) -> Option<(u64, u64)> {
        let low = self
            .vmas
            .iter()
            .find(|v| matches!(v.backing, Backing::Vvar | Backing::Vdso))?;
        let code = self.vmas.iter().find(|v| v.backing == Backing::Vdso)?;
        Some((low.start, code.start.checked_sub(low.start)?))
    }
}

/// The places of files in a list, by device and inode number.
type Places = BTreeMap<((u32, u32), u64), Vec<usize>>;

/// Takes a mapping, or says why it cannot be carried.
fn claim(m: &Mapping, files: &mut Vec<MappedFile>, places: &mut Places) -> Result<Vma, Obstacle> {
    let name = String::from_utf8_lossy(&m.name).into_owned();
    let refuse = |why: &str, remedy: &str| {
        let shown = if name.is_empty() {
            format!("{:x}-{:x}", m.start, m.end)
        } else {
            format!("{name} at {:x}", m.start)
        };
        Err(Obstacle::new(format!("mapping {shown}"), why, remedy))
    };
    let no = "there is no way to carry it yet";
    if m.key != 0 {
        return refuse("it has a memory protection key", no);
    }
    for (flag, why) in [
        (b"ht", "it is made of huge pages (hugetlbfs)"),
        (b"lo", "it is locked in memory"),
        (b"io", "it is memory of a device"),
        (b"pf", "it is memory of a device"),
        (b"ss", "it is a shadow stack"),
        (b"sl", "it is sealed"),
        (b"um", "the program watches it by a userfaultfd"),
        (b"ui", "the program watches it by a userfaultfd"),
    ] {
        // The kernel's own mappings look like a device's.
        if m.has(flag) && !m.name.starts_with(b"[v") {
            return refuse(why, no);
        }
    }
    let backing = match &*m.name {
        b"[vdso]" => Backing::Vdso,
        n if n.starts_with(b"[vvar") => Backing::Vvar,
        b"[uprobes]" => return refuse("a tracer has put probes into it", "remove the probes"),
        n if n.starts_with(b"/memfd:")
            || n.starts_with(b"/SYSV")
            || n == b"/dev/zero (deleted)" =>
        {
            return refuse("it is shared memory without a name", no)
        }
        n if n.starts_with(b"/[aio]") => {
            return refuse("the program uses asynchronous I/O rings", no)
        }
        n if n.starts_with(b"anon_inode:") => {
            return refuse("it belongs to a descriptor of the kernel's", no)
        }
        n if m.inode != 0 => {
            if n.ends_with(b" (deleted)") {
                return refuse(
                    "its file was deleted",
                    "restart the program on the new file",
                );
            }
            if !n.starts_with(b"/") {
                return refuse("its file has no path here", no);
            }
            if m.shared && m.has(b"mw") {
                return refuse("it is shared and may be written", no);
            }
            use std::os::unix::ffi::OsStringExt;
            let path = PathBuf::from(std::ffi::OsString::from_vec(m.name.clone()));
            let places = places.entry((m.dev, m.inode)).or_default();
            let known = places.iter().find(|n| files[**n].path == path).copied();
            let at = known.unwrap_or_else(|| {
                files.push(MappedFile {
                    path,
                    dev: m.dev,
                    inode: m.inode,
                    link: String::new(),
                });
                places.push(files.len() - 1);
                files.len() - 1
            });
            // The mapping that named the file may be gone by now.
            files[at].link = format!("{:x}-{:x}", m.start, m.end);
            Backing::File(at as u32)
        }
        _ if m.shared => return refuse("it is shared memory", no),
        _ if m.has(b"dp") => Backing::Droppable,
        _ => Backing::Anonymous,
    };
    let prot = [(m.read, 1), (m.write, 2), (m.exec, 4)]
        .iter()
        .filter(|(on, _)| *on)
        .map(|(_, bit)| bit)
        .sum();
    let advice = ADVICE
        .iter()
        .enumerate()
        .filter(|(_, (flag, ..))| m.has(flag))
        .map(|(i, _)| 1u8 << i)
        .sum();
    let mut vma = Vma {
        start: m.start,
        end: m.end,
        prot,
        shared: m.shared,
        grows_down: m.has(b"gd"),
        no_reserve: m.has(b"nr"),
        offset: match backing {
            Backing::File(_) => m.offset,
            _ => 0,
        },
        backing,
        advice,
        fresh: false,
    };
    if !vma.is_private() {
        vma.advice = 0;
    }
    Ok(vma)
}

/// The steps that lead from `old` to `new`: what is the same stays, what is
/// fresh is made anew.
pub fn steps(old: &[Vma], new: &[Vma]) -> Vec<Step> {
    let mut edges: Vec<u64> = old
        .iter()
        .chain(new)
        .flat_map(|v| [v.start, v.end])
        .collect();
    edges.sort_unstable();
    edges.dedup();
    let (mut o, mut n) = (0, 0);
    let (mut unmap, mut map): (Vec<Step>, Vec<(usize, Vma)>) = (Vec::new(), Vec::new());
    let (mut protect, mut advise) = (Vec::new(), Vec::new());
    for w in edges.windows(2) {
        let (a, b) = (w[0], w[1]);
        while old.get(o).is_some_and(|v| v.end <= a) {
            o += 1;
        }
        while new.get(n).is_some_and(|v| v.end <= a) {
            n += 1;
        }
        let was = old.get(o).filter(|v| v.start <= a);
        let is = new.get(n).filter(|v| v.start <= a);
        if let (Some(was), Some(is)) = (was, is) {
            if !is.fresh && was.same_at(is, a) {
                if was.prot != is.prot {
                    protect.push(Step::Protect(a..b, is.prot));
                }
                for advice in advices(was.advice, is.advice) {
                    advise.push(Step::Advise(a..b, advice));
                }
                continue;
            }
        }
        if was.is_some() {
            match unmap.last_mut() {
                Some(Step::Unmap(r)) if r.end == a => r.end = b,
                _ => unmap.push(Step::Unmap(a..b)),
            }
        }
        if let Some(is) = is {
            match map.last_mut() {
                Some((m, v)) if *m == n && v.end == a => v.end = b,
                _ => map.push((n, is.piece(a..b))),
            }
        }
    }
    for (_, v) in &map {
        for advice in advices(0, v.advice) {
            advise.push(Step::Advise(v.range(), advice));
        }
    }
    unmap.extend(map.into_iter().map(|(_, v)| Step::Map(v)));
    unmap.extend(protect);
    unmap.extend(advise);
    unmap
}

fn advices(was: u8, is: u8) -> impl Iterator<Item = i32> {
    ADVICE
        .iter()
        .enumerate()
        .filter_map(move |(i, (_, on, off))| {
            match (was >> i & 1, is >> i & 1) {
                (0, 1) => Some(*on),
                // The opposite advice is given by its own bit, where it has one.
                (1, 0) if *off != libc::MADV_HUGEPAGE && *off != libc::MADV_NOHUGEPAGE => {
                    Some(*off)
                }
                _ => None,
            }
        })
}

/// Adds to a batch what makes the steps happen. `file` tells the descriptor,
/// in the process, of a file of the layout.
pub fn apply(steps: &[Step], batch: &mut Batch, file: impl Fn(u32) -> Option<Arg>) -> Result<()> {
    for step in steps {
        match step {
            Step::Unmap(r) => {
                batch.call(
                    "unmap",
                    libc::SYS_munmap,
                    &[RemoteAddr(r.start).into(), (r.end - r.start).into()],
                );
            }
            Step::Map(v) => map(v, batch, &file)?,
            Step::Protect(r, prot) => {
                batch.call(
                    "protect",
                    libc::SYS_mprotect,
                    &[
                        RemoteAddr(r.start).into(),
                        (r.end - r.start).into(),
                        (*prot as u64).into(),
                    ],
                );
            }
            Step::Advise(r, advice) => {
                // A kernel without the feature has nothing to be advised.
                batch.may_fail(
                    "advise",
                    libc::SYS_madvise,
                    &[
                        RemoteAddr(r.start).into(),
                        (r.end - r.start).into(),
                        (*advice).into(),
                    ],
                );
            }
        }
    }
    Ok(())
}

/// The file that a step needs open.
pub fn file_of(step: &Step) -> Option<u32> {
    match step {
        Step::Map(Vma {
            backing: Backing::File(n),
            ..
        }) => Some(*n),
        _ => None,
    }
}

fn map(v: &Vma, batch: &mut Batch, file: &impl Fn(u32) -> Option<Arg>) -> Result<()> {
    /// `<asm/prctl.h>`
    const ARCH_MAP_VDSO_64: u64 = 0x2003;
    let mut flags = libc::MAP_FIXED_NOREPLACE as u64;
    let mut fd = Arg::Val(u64::MAX);
    match v.backing {
        // Both come with the code; see `Layout::vdso`.
        Backing::Vvar => return Ok(()),
        Backing::Vdso => {
            batch.call(
                "map the vdso",
                libc::SYS_arch_prctl,
                &[ARCH_MAP_VDSO_64.into(), RemoteAddr(v.offset).into()],
            );
            return Ok(());
        }
        Backing::Anonymous => flags |= (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64,
        Backing::Droppable => flags |= MAP_DROPPABLE | libc::MAP_ANONYMOUS as u64,
        Backing::File(n) => {
            fd = file(n).ok_or_else(|| Error::bad("mapping", "its file is not there"))?;
            flags |= if v.shared {
                libc::MAP_SHARED
            } else {
                libc::MAP_PRIVATE
            } as u64;
        }
    }
    if v.grows_down {
        flags |= libc::MAP_GROWSDOWN as u64;
    }
    if v.no_reserve && v.backing != Backing::Droppable {
        flags |= libc::MAP_NORESERVE as u64;
    }
    batch.call(
        "map",
        libc::SYS_mmap,
        &[
            RemoteAddr(v.start).into(),
            (v.end - v.start).into(),
            (v.prot as u64).into(),
            flags.into(),
            fd,
            v.offset.into(),
        ],
    );
    Ok(())
}

/// Memory of a process's own, in bytes, swapped out or not (proc_pid_status(5)).
pub fn resident(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).context("read", &path)?;
    let kb = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name))
            .and_then(|v| v.trim().strip_suffix(" kB")?.parse::<u64>().ok())
            .unwrap_or(0)
    };
    Ok((kb("RssAnon:") + kb("VmSwap:")) * 1024)
}

/// Lists the address space of a process that is to move.
///
/// # Errors
///
/// [`Error::Refused`] with all that stands in its way, as far as can be said
/// without stopping it.
pub fn first_look(pid: i32) -> Result<Layout> {
    let (mappings, _) = smaps::list(pid)?;
    let layout = Layout::from_mappings(&mappings, &[], |_| false)?;
    let watched = mappings.iter().any(|m| m.has(b"uw"));
    let (why, remedy) = match (watched, layout.vdso()) {
        (true, _) => (
            "somebody watches it by a userfaultfd (perhaps another migration)",
            "wait for that to end",
        ),
        // A thread of the kernel has no mappings either.
        (_, None) if !layout.vmas.is_empty() => (
            "the program has no vdso, through which pmig acts inside it",
            "boot without vdso=0",
        ),
        _ => return Ok(layout),
    };
    Err(Error::Refused(vec![Obstacle::new("memory", why, remedy)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64) -> Vma {
        Vma {
            start,
            end,
            prot: 3,
            shared: false,
            grows_down: false,
            no_reserve: false,
            offset: 0,
            backing: Backing::Anonymous,
            advice: 0,
            fresh: false,
        }
    }

    #[test]
    fn an_address_space_leads_to_itself_without_a_step() {
        let here = Layout::capture(std::process::id() as i32, &[]).unwrap();
        let mut same = here.vmas.clone();
        same.iter_mut().for_each(|v| v.fresh = false);
        assert_eq!(steps(&here.vmas, &same), []);
        assert!(here.vdso().is_some());
        here.check().unwrap();
    }

    #[test]
    fn a_reprotected_half_is_one_step() {
        let old = [vma(0x1000, 0x5000)];
        let mut low = vma(0x1000, 0x3000);
        low.prot = 0;
        assert_eq!(
            steps(&old, &[low, vma(0x3000, 0x5000)]),
            [Step::Protect(0x1000..0x3000, 0)]
        );
    }

    #[test]
    fn what_is_fresh_is_made_anew_even_where_it_looks_the_same() {
        let old = [vma(0x1000, 0x5000)];
        let mut new = vma(0x1000, 0x5000);
        new.fresh = true;
        assert_eq!(
            steps(&old, &[new.clone()]),
            [Step::Unmap(0x1000..0x5000), Step::Map(new)]
        );
    }

    #[test]
    fn impossible_address_spaces_are_refused() {
        let layout = |vmas: Vec<Vma>| Layout {
            vmas,
            files: vec![],
        };
        assert!(layout(vec![vma(0x1001, 0x2000)]).check().is_err());
        assert!(layout(vec![vma(0x2000, 0x2000)]).check().is_err());
        assert!(layout(vec![vma(0x1000, TOP + PAGE)]).check().is_err());
        assert!(layout(vec![vma(0x1000, 0x4000), vma(0x3000, 0x5000)])
            .check()
            .is_err());
        let mut v = vma(0x1000, 0x2000);
        v.backing = Backing::File(0);
        assert!(layout(vec![v.clone()]).check().is_err());
        v.backing = Backing::Anonymous;
        v.shared = true;
        assert!(layout(vec![v]).check().is_err());
    }
}
