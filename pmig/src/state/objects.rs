//! What rooms share: open file descriptions and who holds them, and the one
//! way by which files are opened at the target.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::io;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{open, readlinkat, OFlag};
use nix::sys::stat::Mode;

use crate::error::{Context, Error, Obstacle, Result};
use crate::state::paths::{FilePath, Pinned};
use crate::sys::fds::Order;

/// A regular file a descriptor leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenFile {
    /// A descriptor that holds it.
    pub fd: i32,
    pub path: FilePath,
    pub ino: u64,
    /// It can be written to through this descriptor.
    pub writable: bool,
}

/// Descriptors by the open file descriptions that they share.
pub(crate) struct Shared {
    /// Each group, and the list of them, in the order given.
    pub groups: Vec<Vec<i32>>,
    /// All of them, those of one key in the kernel's order.
    pub order: Vec<i32>,
}

/// Sorts descriptors into groups that share one open file description.
///
/// `key` tells descriptions apart without asking the kernel, `compare` asks it.
/// The order it gives need not be consistent: a running process changes under
/// our hands. Takes n (1 + log n) comparisons at most, and no more than n where
/// `rank` tells the order that was found before, and it still is the same.
pub(crate) fn share<K: Ord, R: Ord>(
    fds: &[i32],
    key: impl Fn(usize) -> K,
    rank: impl Fn(i32) -> R,
    mut compare: impl FnMut(i32, i32) -> io::Result<Order>,
) -> io::Result<Shared> {
    let mut alike: BTreeMap<K, Vec<usize>> = BTreeMap::new();
    for n in 0..fds.len() {
        alike.entry(key(n)).or_default().push(n);
    }
    let mut compare = |a: usize, b: usize| match compare(fds[a], fds[b])? {
        Order::Same => Ok(Ordering::Equal),
        Order::Less => Ok(Ordering::Less),
        Order::Greater => Ok(Ordering::Greater),
        Order::Different => Err(io::Error::other("the kernel does not order descriptions")),
    };
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for mut bucket in alike.into_values() {
        bucket.sort_by_cached_key(|n| rank(fds[*n]));
        // What is in order already, merged two by two.
        let mut runs: VecDeque<Vec<Vec<usize>>> = VecDeque::new();
        for n in bucket {
            let Some(run) = runs.back_mut() else {
                runs.push_back(vec![vec![n]]);
                continue;
            };
            let last = run.len() - 1;
            match compare(run[last][0], n)? {
                Ordering::Equal => run[last].push(n),
                Ordering::Less => run.push(vec![n]),
                Ordering::Greater => runs.push_back(vec![vec![n]]),
            }
        }
        while runs.len() > 1 {
            let [a, b] = [(); 2].map(|()| runs.pop_front().unwrap_or_default());
            runs.push_back(merge(a, b, &mut compare)?);
        }
        groups.extend(runs.into_iter().flatten());
    }
    let order = groups.iter().flatten().map(|n| fds[*n]).collect();
    groups.iter_mut().for_each(|g| g.sort_unstable());
    groups.sort_unstable_by_key(|g| g[0]);
    let groups = groups
        .into_iter()
        .map(|g| g.into_iter().map(|n| fds[n]).collect())
        .collect();
    Ok(Shared { groups, order })
}

/// Groups in order, of two such lists.
fn merge(
    a: Vec<Vec<usize>>,
    b: Vec<Vec<usize>>,
    compare: &mut impl FnMut(usize, usize) -> io::Result<Ordering>,
) -> io::Result<Vec<Vec<usize>>> {
    let mut all = Vec::with_capacity(a.len() + b.len());
    let (mut a, mut b) = (a.into_iter().peekable(), b.into_iter().peekable());
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        match compare(x[0], y[0])? {
            Ordering::Less => all.extend(a.next()),
            Ordering::Greater => all.extend(b.next()),
            Ordering::Equal => {
                let both = a.next().into_iter().chain(b.next());
                all.push(both.flatten().collect());
            }
        }
    }
    all.extend(a.chain(b));
    Ok(all)
}

/// Other processes that have one of these pipes open: a process for each such
/// pipe.
///
/// What cannot be seen this way: an end that lies in a socket as a message not
/// received yet, or that only an io_uring or a mapping of the kernel's holds.
/// A process that ends while it is looked at holds nothing.
///
/// # Errors
/// Where `/proc` cannot be read.
pub(crate) fn others_with_pipes(pid: i32, pipes: &BTreeSet<u64>) -> Result<BTreeMap<u64, i32>> {
    let mut found = BTreeMap::new();
    if pipes.is_empty() {
        return Ok(found);
    }
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let mut proc = Dir::open("/proc", flags, Mode::empty()).context("open", "/proc")?;
    for entry in proc.iter() {
        let entry = entry.context("read", "/proc")?;
        let Some(other) = number(entry.file_name().to_bytes()) else {
            continue;
        };
        if other == i64::from(pid) {
            continue;
        }
        let fds = match open(format!("/proc/{other}/fd").as_str(), flags, Mode::empty()) {
            Ok(fds) => fds,
            Err(Errno::ENOENT | Errno::ESRCH) => continue,
            Err(e) => return Err(e).context("open", format!("/proc/{other}/fd")),
        };
        let Ok(mut list) = fds
            .try_clone()
            .map_err(|_| ())
            .and_then(|d| Dir::from_fd(d).map_err(|_| ()))
        else {
            continue;
        };
        for entry in list.iter().map_while(|e| e.ok()) {
            let ino = readlinkat(&fds, entry.file_name())
                .ok()
                .and_then(|link| pipe_inode(&link));
            if let Some(ino) = ino.filter(|i| pipes.contains(i)) {
                found.entry(ino).or_insert(other as i32);
            }
        }
    }
    Ok(found)
}

fn number(name: &[u8]) -> Option<i64> {
    std::str::from_utf8(name).ok()?.parse().ok()
}

/// The inode in the text of a pipe's link, `pipe:[123]`.
fn pipe_inode(link: &OsStr) -> Option<u64> {
    let digits = link.to_str()?.strip_prefix("pipe:[")?.strip_suffix(']')?;
    digits.parse().ok()
}

/// Opens files at the target: plain paths only, below the roots the policy
/// names, regular files only if they were looked at and found to be the right
/// ones.
#[derive(Debug, Clone)]
pub struct Opener {
    roots: Vec<FilePath>,
    admitted: BTreeMap<FilePath, Admitted>,
    proofs: BTreeMap<FilePath, Vec<u8>>,
}

/// A regular file that may be opened.
#[derive(Debug, Clone)]
struct Admitted {
    /// Where it is now: elsewhere than its path until a shipped file is put in
    /// its place.
    at: FilePath,
    dev: u64,
    ino: u64,
}

impl Opener {
    /// An opener that admits no regular file yet.
    pub fn new(roots: Vec<FilePath>) -> Opener {
        Opener {
            roots,
            admitted: BTreeMap::new(),
            proofs: BTreeMap::new(),
        }
    }

    /// Whether a file was compared before, with the same thing said of it on
    /// both sides: then it need not be read again.
    pub(crate) fn is_proven(&self, path: &FilePath, proof: &[u8]) -> bool {
        self.proofs.get(path).is_some_and(|p| p == proof)
    }

    /// Remembers what was said of a file when it was found to be the right one.
    pub(crate) fn prove(&mut self, path: FilePath, proof: Vec<u8>) {
        self.proofs.insert(path, proof);
    }

    /// From now on `path` is the file with this device and inode number, which
    /// is found at `at`.
    pub fn admit(&mut self, path: FilePath, at: FilePath, dev: u64, ino: u64) {
        self.admitted.insert(path, Admitted { at, dev, ino });
    }

    /// Whether the policy lets this path be opened.
    ///
    /// # Errors
    /// [`Error::Refused`] naming the path.
    pub fn allow(&self, path: &FilePath) -> Result<()> {
        if self.roots.iter().any(|r| path.is_within(r)) {
            return Ok(());
        }
        Err(Error::Refused(vec![Obstacle::new(
            path,
            "lies outside the directories this machine lets migrated programs use",
            "allow the directory there, or let the program close the file first",
        )]))
    }

    /// A regular file that was admitted.
    ///
    /// # Errors
    /// [`Error::Bad`] where it was not, or has been replaced since.
    pub fn regular(&self, path: &FilePath) -> Result<Pinned> {
        self.allow(path)?;
        let admitted = self
            .admitted
            .get(path)
            .ok_or_else(|| Error::bad(path, "was not compared with the source's"))?;
        let pinned = Pinned::by_path(&admitted.at)?;
        let stat = pinned.stat();
        if (stat.st_dev, stat.st_ino) != (admitted.dev, admitted.ino)
            || pinned.file_type() != libc::S_IFREG
        {
            return Err(Error::bad(path, "was replaced by another file just now"));
        }
        Ok(pinned)
    }

    /// A directory within the policy's roots.
    ///
    /// # Errors
    /// As openat2(2); [`Error::Bad`] where it is none.
    pub fn directory(&self, path: &FilePath) -> Result<Pinned> {
        self.allow(path)?;
        let pinned = self.anything(path)?;
        if pinned.is_special().context("look at", path)? {
            return Err(Error::bad(path, "is made by the kernel of this machine"));
        }
        Opener::must_be_directory(path, pinned)
    }

    /// A directory to stand in, be it outside the roots: it gives no access the
    /// program's own identity does not give.
    ///
    /// # Errors
    /// As openat2(2); [`Error::Bad`] where it is none.
    pub fn place(&self, path: &FilePath) -> Result<Pinned> {
        Opener::must_be_directory(path, self.anything(path)?)
    }

    fn must_be_directory(path: &FilePath, pinned: Pinned) -> Result<Pinned> {
        if pinned.file_type() != libc::S_IFDIR {
            return Err(Error::bad(path, "is not a directory here"));
        }
        Ok(pinned)
    }

    /// Whatever is there, held without opening it.
    ///
    /// # Errors
    /// As openat2(2).
    pub fn anything(&self, path: &FilePath) -> Result<Pinned> {
        Pinned::by_path(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Descriptions by number, as kcmp would order them.
    fn grouped(descriptions: &[u32]) -> (Vec<Vec<i32>>, usize) {
        let (shared, asked) = grouped_again(descriptions, &[]);
        (shared.groups, asked)
    }

    /// The same, where that order was found before.
    fn grouped_again(descriptions: &[u32], order: &[i32]) -> (Shared, usize) {
        let fds: Vec<i32> = (0..descriptions.len() as i32).collect();
        let mut asked = 0;
        let shared = share(
            &fds,
            |_| (),
            |fd| order.iter().position(|known| *known == fd),
            |a, b| {
                asked += 1;
                Ok(
                    match descriptions[a as usize].cmp(&descriptions[b as usize]) {
                        std::cmp::Ordering::Equal => Order::Same,
                        std::cmp::Ordering::Less => Order::Less,
                        std::cmp::Ordering::Greater => Order::Greater,
                    },
                )
            },
        )
        .unwrap();
        (shared, asked)
    }

    #[test]
    fn shared_descriptions_are_found() {
        let (groups, _) = grouped(&[7, 3, 7, 9, 3, 7]);
        assert_eq!(groups, vec![vec![0, 2, 5], vec![1, 4], vec![3]]);
    }

    #[test]
    fn many_descriptions_take_few_comparisons() {
        let many: Vec<u32> = (0..4096u32).map(|n| n.wrapping_mul(2654435761)).collect();
        let (groups, asked) = grouped(&many);
        assert_eq!(groups.len(), 4096);
        assert!(asked < 4096 * 14, "{asked}");
        assert!(grouped(&[5; 4096]).1 < 4096);
    }

    #[test]
    fn a_known_order_is_only_looked_through() {
        let mut some: Vec<u32> = (0..500u32).map(|n| n.wrapping_mul(2654435761)).collect();
        some.extend_from_within(..100);
        let (first, _) = grouped_again(&some, &[]);
        let (again, asked) = grouped_again(&some, &first.order);
        assert_eq!((first.groups, &first.order), (again.groups, &again.order));
        assert_eq!(asked, some.len() - 1);
        // One that has changed is found nevertheless.
        some[7] = some[300];
        let (changed, _) = grouped_again(&some, &first.order);
        assert_eq!(changed.groups, grouped(&some).0);
        assert!(changed.groups.contains(&vec![7, 300]));
    }

    #[test]
    fn an_inconsistent_order_does_no_harm() {
        let fds: Vec<i32> = (0..200).collect();
        let mut n = 0;
        let groups = share(
            &fds,
            |_| (),
            |_| (),
            |_, _| {
                n += 1;
                Ok(if n % 3 == 0 {
                    Order::Less
                } else {
                    Order::Greater
                })
            },
        );
        assert_eq!(groups.unwrap().groups.len(), 200);
    }

    #[test]
    fn a_pipe_held_by_another_process_is_seen() {
        use std::os::fd::AsRawFd;
        let (r, _w) = nix::unistd::pipe().unwrap();
        let link =
            nix::fcntl::readlink(format!("/proc/self/fd/{}", r.as_raw_fd()).as_str()).unwrap();
        let ino = pipe_inode(&link).unwrap();
        let wanted = BTreeSet::from([ino]);
        let me = std::process::id() as i32;
        assert_eq!(
            others_with_pipes(1, &wanted).unwrap(),
            BTreeMap::from([(ino, me)])
        );
        assert!(others_with_pipes(me, &wanted).unwrap().is_empty());
    }

    #[test]
    fn only_admitted_files_are_opened() {
        use std::os::unix::ffi::OsStrExt;
        let dir = tempfile::tempdir().unwrap();
        let at = |n: &str| FilePath::new(dir.path().join(n).as_os_str().as_bytes()).unwrap();
        std::fs::write(dir.path().join("a"), b"x").unwrap();
        let mut opener = Opener::new(vec![at("a").parent()]);
        assert!(opener.regular(&at("a")).is_err());
        let stat = *Pinned::by_path(&at("a")).unwrap().stat();
        opener.admit(at("a"), at("a"), stat.st_dev, stat.st_ino);
        assert!(opener.regular(&at("a")).is_ok());
        std::fs::write(dir.path().join("b"), b"x").unwrap();
        std::fs::rename(dir.path().join("b"), dir.path().join("a")).unwrap();
        assert!(opener.regular(&at("a")).is_err());
        assert!(opener.directory(&FilePath::new("/etc").unwrap()).is_err());
        assert!(opener.place(&FilePath::new("/etc").unwrap()).is_ok());
    }
}
