//! Where cgroup v2 is mounted, and what its files say.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

/// A mount of the cgroup v2 tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The cgroup that shows at [`Mount::at`], as the reader's cgroup
    /// namespace names it; `/` but in odd containers.
    pub root: PathBuf,
    pub at: PathBuf,
}

impl Mount {
    /// The first writable-looking mount of cgroup v2 in the text of
    /// `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
    pub fn find(mountinfo: &str) -> Option<Mount> {
        mountinfo.lines().find_map(|line| {
            let (fields, rest) = line.split_once(" - ")?;
            if rest.split(' ').next()? != "cgroup2" {
                return None;
            }
            let mut fields = fields.split(' ').skip(3);
            Some(Mount {
                root: unescape(fields.next()?),
                at: unescape(fields.next()?),
            })
        })
    }

    /// The directory of a cgroup, where it can be seen through this mount.
    pub fn dir(&self, cgroup: &Path) -> Option<PathBuf> {
        let inside = cgroup.strip_prefix(&self.root).ok()?;
        inside
            .components()
            .all(|c| matches!(c, Component::Normal(_)))
            .then(|| self.at.join(inside))
    }
}

/// The v2 cgroup in the text of `/proc/PID/cgroup` (cgroups(7)): the line `0::`.
pub fn of_process(text: &str) -> Option<PathBuf> {
    text.lines()
        .find_map(|line| line.strip_prefix("0::"))
        .map(PathBuf::from)
}

/// What `cgroup.events` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Events {
    /// Whether a live process is in it or below.
    pub populated: bool,
    /// Whether all of them are frozen.
    pub frozen: bool,
}

impl Events {
    pub fn parse(text: &str) -> Option<Events> {
        let value = |key: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(key))?;
            match line.trim() {
                "0" => Some(false),
                "1" => Some(true),
                _ => None,
            }
        };
        Some(Events {
            populated: value("populated ")?,
            frozen: value("frozen ")?,
        })
    }
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let octal = |at: usize| bytes.get(at).filter(|b| matches!(b, b'0'..=b'7'));
        let code = match (bytes[i], octal(i + 1), octal(i + 2), octal(i + 3)) {
            (b'\\', Some(a), Some(b), Some(c)) => {
                u8::try_from((a - b'0') as u32 * 64 + (b - b'0') as u32 * 8 + (c - b'0') as u32)
                    .ok()
            }
            _ => None,
        };
        match code {
            Some(byte) => {
                out.push(byte);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    OsString::from_vec(out).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
25 1 0:23 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
26 25 0:24 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
27 25 0:25 / /sys/fs/cgroup/uni\\040fied rw,relatime shared:10 - cgroup2 cgroup2 rw
";

    #[test]
    fn the_v2_mount_is_found_beside_v1() {
        let mount = Mount::find(HYBRID).unwrap();
        assert_eq!(mount.at, Path::new("/sys/fs/cgroup/uni fied"));
        assert_eq!(
            mount.dir(Path::new("/a/b")).unwrap(),
            Path::new("/sys/fs/cgroup/uni fied/a/b")
        );
        assert_eq!(Mount::find("1 2 0:1 / / rw - ext4 /dev/sda rw\n"), None);
        assert_eq!(Mount::find("garbage\n - cgroup2\n"), None);
    }

    #[test]
    fn a_cgroup_outside_the_mount_has_no_directory() {
        let mount = Mount {
            root: "/box".into(),
            at: "/sys/fs/cgroup".into(),
        };
        assert_eq!(
            mount.dir(Path::new("/box/x")).unwrap(),
            Path::new("/sys/fs/cgroup/x")
        );
        for outside in ["/", "/boxes", "/../x", "/box/../../x"] {
            assert_eq!(mount.dir(Path::new(outside)), None, "{outside}");
        }
    }

    #[test]
    fn the_v2_line_is_told_from_v1() {
        let text = "9:name=systemd:/x\n4:memory:/y\n0::/user.slice/a\n";
        assert_eq!(of_process(text).unwrap(), Path::new("/user.slice/a"));
        assert_eq!(of_process("4:memory:/y\n"), None);
    }

    #[test]
    fn events_are_read_or_refused() {
        assert_eq!(
            Events::parse("populated 1\nfrozen 0\n"),
            Some(Events {
                populated: true,
                frozen: false
            })
        );
        assert_eq!(Events::parse("populated 1\n"), None);
        assert_eq!(Events::parse("populated 2\nfrozen 0\n"), None);
    }
}
