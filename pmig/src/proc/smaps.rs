//! /proc/PID/smaps (proc_pid_smaps(5)): one mapping after the other, with the
//! flags that madvise(2) and its kin leave.
//!
//! The `procfs` crate reads the same file into a map of strings for each
//! mapping; this is read while a program stands still.

use std::ops::Range;

use crate::error::{Error, Result};

/// A mapping as the kernel tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    pub read: bool,
    pub write: bool,
    pub exec: bool,
    pub shared: bool,
    /// Bytes into the file.
    pub offset: u64,
    /// Major and minor number of the file's device.
    pub dev: (u32, u32),
    /// 0 where there is no file.
    pub inode: u64,
    /// Path or `[name]`, unescaped; may be anything that a program chose.
    pub name: Vec<u8>,
    /// Bytes in memory or in swap.
    pub resident: u64,
    /// The memory protection key, 0 for none.
    pub key: u32,
    /// Two letters each.
    pub flags: Vec<[u8; 2]>,
}

impl Mapping {
    pub fn has(&self, flag: &[u8; 2]) -> bool {
        self.flags.contains(flag)
    }
}

/// The lines of /proc/PID/maps, one for each mapping: /proc/PID/smaps has them
/// among its own, letter by letter (fs/proc/task_mmu.c, `show_map_vma`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lines(Vec<u8>);

impl Lines {
    /// Those of a process as they are now.
    ///
    /// # Errors
    /// As [`super::read`].
    pub fn of(pid: i32) -> Result<Lines> {
        super::mappings(pid, "maps").map(Lines)
    }

    /// The same of a file that is open.
    ///
    /// # Errors
    /// As [`super::read`].
    pub fn again(maps: &super::Maps) -> Result<Lines> {
        maps.read().map(Lines)
    }

    /// Those that stand in the text of either file.
    fn in_text(text: &[u8]) -> Lines {
        let lines = text.split_inclusive(|b| *b == b'\n');
        let mut all = Vec::with_capacity(text.len() / 8);
        for line in lines.filter(|l| is_mapping(l)) {
            all.extend_from_slice(line);
        }
        Lines(all)
    }

    /// The highest `len` bytes below an address where nothing is mapped.
    pub fn hole_below(&self, floor: u64, len: u64) -> u64 {
        let mut base = floor.saturating_sub(len);
        for m in self.0.rsplit(|b| *b == b'\n').filter_map(header) {
            if m.start < base.saturating_add(len) && base < m.end {
                base = m.start.saturating_sub(len);
            }
        }
        base
    }

    /// The last mapping of that name; what only the kernel maps lies last.
    pub fn find(&self, name: &[u8]) -> Option<Range<u64>> {
        let mut lines = self.0.rsplit(|b| *b == b'\n');
        lines.find_map(|line| {
            let mapping = line.ends_with(name).then(|| header(line))??;
            (mapping.name == name).then_some(mapping.start..mapping.end)
        })
    }
}

/// Whether a line begins a mapping. Fields begin with a capital letter, mappings
/// with a hex digit in lower case.
fn is_mapping(line: &[u8]) -> bool {
    line.first().is_some_and(|b| !b.is_ascii_uppercase())
}

/// Lists the mappings of a process, and tells their lines.
///
/// The kernel hands the list out in pieces. Between two of them a program that
/// runs may join mappings, which are then listed twice: it is listed again
/// until that did not happen.
///
/// # Errors
/// As [`super::read`], or a list that no kernel makes.
pub fn list(pid: i32) -> Result<(Vec<Mapping>, Lines)> {
    const TRIES: usize = 100;
    for _ in 0..TRIES {
        let text = super::mappings(pid, "smaps")?;
        let all = parse(&text)?;
        if apart(&all) {
            return Ok((all, Lines::in_text(&text)));
        }
    }
    Err(Error::bad(
        format!("/proc/{pid}/smaps"),
        "the program changes its mappings faster than they can be listed",
    ))
}

/// Whether each mapping ends before the next begins.
fn apart(all: &[Mapping]) -> bool {
    all.windows(2).all(|two| two[0].end <= two[1].start)
}

/// Parses the whole file.
pub fn parse(text: &[u8]) -> Result<Vec<Mapping>> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let bad = || {
            Error::bad(
                "smaps",
                format!("cannot make sense of {:?}", String::from_utf8_lossy(line)),
            )
        };
        if is_mapping(line) {
            all.push(header(line).ok_or_else(bad)?);
            continue;
        }
        let Some(last) = all.last_mut() else {
            return Err(bad());
        };
        let Some(colon) = line.iter().position(|b| *b == b':') else {
            return Err(bad());
        };
        let value = line[colon + 1..].trim_ascii();
        match &line[..colon] {
            b"Rss" | b"Swap" => {
                let kb = value
                    .strip_suffix(b" kB")
                    .and_then(number)
                    .ok_or_else(bad)?;
                last.resident = last.resident.saturating_add(kb.saturating_mul(1024));
            }
            b"ProtectionKey" => last.key = number(value).ok_or_else(bad)? as u32,
            b"VmFlags" => {
                last.flags = value
                    .split(|b| *b == b' ')
                    .filter_map(|f| f.try_into().ok())
                    .collect();
            }
            _ => {}
        }
    }
    Ok(all)
}

fn header(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let mut word = || {
        let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        rest = tail.get(1..).unwrap_or(b"");
        word
    };
    let (range, perms, offset, dev, inode) = (word(), word(), word(), word(), word());
    let (start, end) = pair(range, b'-')?;
    let (major, minor) = pair(dev, b':')?;
    let &[r, w, x, p] = perms else { return None };
    Some(Mapping {
        start,
        end,
        read: r == b'r',
        write: w == b'w',
        exec: x == b'x',
        shared: p == b's',
        offset: hex(offset)?,
        dev: (major as u32, minor as u32),
        inode: number(inode)?,
        name: unescape(rest.trim_ascii_start()),
        resident: 0,
        key: 0,
        flags: Vec::new(),
    })
}

/// A newline in a path is written as `\012`.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut i = 0;
    while i < name.len() {
        if name[i..].starts_with(b"\\012") {
            out.push(b'\n');
            i += 4;
        } else {
            out.push(name[i]);
            i += 1;
        }
    }
    out
}

fn pair(text: &[u8], between: u8) -> Option<(u64, u64)> {
    let at = text.iter().position(|b| *b == between)?;
    Some((hex(&text[..at])?, hex(&text[at + 1..])?))
}

fn hex(text: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok()
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_found_below_what_is_mapped() {
        let text = b"2000-3000 rw-p 00000000 00:00 0\n\
            7000-8000 rw-p 00000000 00:00 0\n\
            8000-a000 rw-p 00000000 00:00 0 [stack]\n";
        let lines = Lines(text.to_vec());
        assert_eq!(lines.hole_below(0x8000, 0x2000), 0x5000);
        assert_eq!(lines.hole_below(0x7000, 0x4000), 0x3000);
        assert_eq!(lines.hole_below(0x7000, 0x5000), 0);
        assert_eq!(lines.hole_below(0xf000, 0x1000), 0xe000);
    }

    #[test]
    fn a_mapping_that_grew_while_the_list_was_read_is_noticed() {
        let line = |range: &str| format!("{range} rw-p 00000000 00:00 0 \n");
        let list = |ranges: &[&str]| {
            let text: String = ranges.iter().map(|range| line(range)).collect();
            parse(text.as_bytes()).unwrap()
        };
        assert!(apart(&list(&["1000-3000", "3000-4000", "6000-7000"])));
        assert!(!apart(&list(&["1000-3000", "1000-4000", "6000-7000"])));
    }

    #[test]
    fn the_lines_are_those_of_maps() {
        let mut child = std::process::Command::new("sleep")
            .arg("9")
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        // Until it has become what it is to be.
        std::thread::sleep(std::time::Duration::from_millis(200));
        let (all, lines) = list(pid).unwrap();
        assert_eq!(lines, Lines::of(pid).unwrap());
        let stack = all.iter().find(|m| m.name == b"[stack]").unwrap();
        assert_eq!(lines.find(b"[stack]"), Some(stack.start..stack.end));
        assert_eq!(lines.find(b"stack]"), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_kernels_own_text_is_understood() {
        let all = parse(&std::fs::read("/proc/self/smaps").unwrap()).unwrap();
        let stack = all.iter().find(|m| m.name == b"[stack]").unwrap();
        assert!(stack.read && stack.write && !stack.shared && stack.has(b"gd"));
        assert!(stack.resident > 0);
        assert!(all.windows(2).all(|w| w[0].end <= w[1].start));
    }

    #[test]
    fn hostile_text_is_an_error_and_no_panic() {
        for text in [
            &b"Rss: 5 kB\n"[..],
            b"1-2 r 0 0:0 0\n",
            b"zz-1 rwxp 0 0:0 0 x\n",
            b"1-2 rwxp 0 0:0 0 x\nRss:\n",
            b"\xff\xff\n",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }
}
