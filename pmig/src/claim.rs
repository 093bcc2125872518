//! One migration of a process at a time.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::error::{Context, Error, Obstacle, Result};
use crate::journal::{run_dir, Folder};

/// Held while a process is on its way; the kernel lets go of it when pmig dies.
#[derive(Debug)]
pub struct Claim {
    _lock: Flock<File>,
}

impl Claim {
    /// # Errors
    ///
    /// [`Error::Refused`] where another pmig here is moving the process.
    pub fn take(pid: i32) -> Result<Claim> {
        Folder::at(&run_dir())?;
        let path = run_dir().join(format!("moving-{pid}"));
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .context("open", path.display())?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Claim { _lock: lock }),
            Err((_, Errno::EWOULDBLOCK)) => Err(Error::Refused(vec![Obstacle::new(
                format!("process {pid}"),
                "another pmig is moving it just now",
                "wait for that to end",
            )])),
            Err((_, e)) => Err(e).context("lock", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_claimed_once_at_a_time() {
        // A PID that nobody has.
        let pid = i32::MAX - 7;
        let Ok(first) = Claim::take(pid) else {
            // Without the right to write there is nothing to claim.
            return;
        };
        assert!(matches!(Claim::take(pid), Err(Error::Refused(_))));
        drop(first);
        Claim::take(pid).unwrap();
        let _ = std::fs::remove_file(run_dir().join(format!("moving-{pid}")));
    }
}
