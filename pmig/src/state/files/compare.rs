//! Whether the target has the files a process needs, and what is to be done
//! about those it has not.

use std::collections::BTreeMap;

use nix::sys::statvfs::fstatvfs;

use super::leftovers::Left;
use super::{boot_id, FileRef, FileSet, Ledger, Stamp};
use crate::error::{Context, Error, Obstacle, Result};
use crate::state::objects::Opener;
use crate::state::paths::{FilePath, Pinned};

/// What is done about a file at the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// The file that is there is used.
    Use,
    /// The source sends it. What stands under its name now, if anything, was
    /// left there by the program itself and may be replaced.
    Ship { replace: Option<Stamp> },
}

/// Looks at the target for every file of a set. Files that are there already
/// are admitted to the opener. `leftovers` is the ledger and the program's
/// lineage.
///
/// # Errors
/// [`Error::Refused`] with every file that stands in the way;
/// [`Error::Bad`] where the set is malformed.
pub fn compare(
    set: &FileSet,
    opener: &mut Opener,
    ship: bool,
    leftovers: Option<(&Ledger, &str)>,
) -> Result<Vec<Plan>> {
    set.check()?;
    let same_kernel = set.boot == boot_id()?;
    let mut plans = Vec::with_capacity(set.files.len());
    let mut obstacles = Vec::new();
    let mut left = Left::by(leftovers);
    for file in &set.files {
        match plan(file, opener, ship, same_kernel, &mut left) {
            Ok((plan, found)) => {
                if let (Plan::Use, Some(found)) = (&plan, found) {
                    let path = file.path.clone();
                    opener.prove(path.clone(), proof(file, &found)?);
                    opener.admit(path.clone(), path, found.dev, found.ino);
                }
                plans.push(plan);
            }
            Err(Error::Refused(o)) => obstacles.extend(o),
            Err(e) => return Err(e),
        }
    }
    if obstacles.is_empty() {
        obstacles = short_of_space(set, &plans)?;
    }
    if obstacles.is_empty() {
        Ok(plans)
    } else {
        Err(Error::Refused(obstacles))
    }
}

fn refuse<T>(file: &FileRef, why: impl std::fmt::Display, remedy: &str) -> Result<T> {
    let what = match file.uses {
        u if u.exe => "executable",
        u if u.mapped => "mapping",
        _ => "file",
    };
    let object = format!("{what} {}", file.path);
    Err(Error::Refused(vec![Obstacle::new(object, why, remedy)]))
}

fn plan(
    file: &FileRef,
    opener: &Opener,
    ship: bool,
    same_kernel: bool,
    left: &mut Left<'_>,
) -> Result<(Plan, Option<Stamp>)> {
    opener.allow(&file.path)?;
    let Some(there) = find(file)? else {
        return match (ship, file.uses.written) {
            (true, _) => Ok((Plan::Ship { replace: None }, None)),
            (false, true) => refuse(
                file,
                "is open for writing, and does not exist on the target",
                "add --files ship",
            ),
            (false, false) => refuse(
                file,
                "does not exist on the target",
                "install it there, or add --files ship",
            ),
        };
    };
    if there.file_type() != libc::S_IFREG || there.is_special().context("look at", &file.path)? {
        return refuse(
            file,
            "the target has something else there, not a regular file",
            "move it away there",
        );
    }
    let stamp = Stamp::of(there.stat());
    if same_kernel && (stamp.dev, stamp.ino) == (file.stamp.dev, file.stamp.ino) {
        return Ok((Plan::Use, Some(stamp)));
    }
    let why = if file.uses.written {
        "is open for writing, and the target has a file of its own there".to_owned()
    } else if stamp.size != file.stamp.size {
        let sizes = format!("{} bytes here, {} there", file.stamp.size, stamp.size);
        format!("the target has another file there ({sizes})")
    } else if opener.is_proven(&file.path, &proof(file, &stamp)?) {
        return Ok((Plan::Use, Some(stamp)));
    } else {
        match file.identity.differs(&there, &file.path)? {
            None => return Ok((Plan::Use, Some(stamp))),
            Some(how) => format!("the target has another file there ({how})"),
        }
    };
    let ours = left.has(&file.path, &stamp)?;
    match (ours, ship) {
        (true, true) => Ok((
            Plan::Ship {
                replace: Some(stamp),
            },
            None,
        )),
        (true, false) => refuse(
            file,
            why + ", left by the program itself",
            "add --files ship",
        ),
        (false, true) if file.uses.written => refuse(file, why, "move that file away there"),
        (false, false) if file.uses.written => {
            refuse(file, why, "move that file away there, and add --files ship")
        }
        (false, _) => refuse(file, why, "install the same one there"),
    }
}

/// What a comparison rests on: what the file is at the source, and the state it
/// is in here. A list that comes again at the freeze, with one file more, must
/// not have all files read again.
fn proof(file: &FileRef, here: &Stamp) -> Result<Vec<u8>> {
    let said = (&file.identity, file.stamp.size, here);
    bincode::serde::encode_to_vec(said, bincode::config::standard())
        .map_err(|e| Error::bad(&file.path, e))
}

/// What stands under the file's name, if anything.
fn find(file: &FileRef) -> Result<Option<Pinned>> {
    let e = match Pinned::by_path(&file.path) {
        Ok(there) => return Ok(Some(there)),
        Err(e) => e,
    };
    match e.errno() {
        Some(libc::ENOENT) => {}
        Some(libc::ELOOP) => {
            return refuse(
                file,
                "a symbolic link stands in its way on the target",
                "put the file itself there under this very path",
            )
        }
        Some(libc::ENOTDIR) => {
            return refuse(
                file,
                "its directory is something else on the target",
                "make the directory there",
            )
        }
        _ => return Err(e),
    }
    let dir = file.path.parent();
    match Pinned::by_path(&dir) {
        Ok(dir) if dir.file_type() == libc::S_IFDIR => Ok(None),
        _ => refuse(
            file,
            format!("the directory {dir} does not exist on the target"),
            "make it there",
        ),
    }
}

/// Whether the file systems the shipped files go to have room for them.
fn short_of_space(set: &FileSet, plans: &[Plan]) -> Result<Vec<Obstacle>> {
    let mut needed: BTreeMap<u64, (u64, u64, FilePath)> = BTreeMap::new();
    for (file, plan) in set.files.iter().zip(plans) {
        if *plan == Plan::Use {
            continue;
        }
        let dir = file.path.parent();
        let pinned = Pinned::by_path(&dir)?;
        let space = fstatvfs(&pinned).context("look at the space in", &dir)?;
        let free = space.blocks_available() * space.fragment_size();
        let entry = needed.entry(pinned.stat().st_dev).or_insert((0, free, dir));
        entry.0 = entry.0.saturating_add(file.stamp.size.min(file.allocated));
    }
    Ok(needed
        .into_values()
        .filter(|(need, free, _)| need > free)
        .map(|(need, free, dir)| {
            Obstacle::new(
                format!("directory {dir}"),
                format!(
                    "the files to be shipped take {} MB, and {} MB are free there",
                    need.div_ceil(1_000_000),
                    free / 1_000_000
                ),
                "make room on the target",
            )
        })
        .collect())
}
