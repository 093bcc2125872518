//! `/proc/PID/status`.

use procfs::process::Status as Known;
use procfs::FromBufRead;

use crate::error::{Error, Result};

/// `/proc/PID/status` (proc_pid_status(5)), with the lines that the procfs
/// crate leaves out.
#[derive(Debug, Clone)]
pub struct Status {
    /// What the procfs crate knows.
    pub known: Known,
    /// `x86_Thread_features: shstk ...`: a shadow stack is on.
    pub shadow_stack: bool,
    /// `untag_mask`: not all ones where addresses carry tags (LAM).
    pub tagged_addresses: bool,
}

impl Status {
    /// # Errors
    /// [`Error::Gone`], or [`Error::Bad`] where the text is not a status.
    pub fn read(pid: i32) -> Result<Status> {
        Status::parse(pid, &super::text(pid, "status")?)
    }

    fn parse(pid: i32, text: &str) -> Result<Status> {
        let known = Known::from_buf_read(text.as_bytes())
            .map_err(|e| Error::bad(format!("/proc/{pid}/status"), e))?;
        let line = |name: &str| {
            text.lines()
                .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
        };
        Ok(Status {
            known,
            shadow_stack: line("x86_Thread_features")
                .is_some_and(|v| v.split_whitespace().any(|f| f == "shstk")),
            tagged_addresses: line("untag_mask").is_some_and(|v| v.trim() != "0xffffffffffffffff"),
        })
    }

    /// The state's letter: R, S, D, T, t, Z, X, ...
    pub fn letter(&self) -> char {
        self.known.state.chars().next().unwrap_or('?')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_own() {
        let s = Status::read(std::process::id() as i32).unwrap();
        assert_eq!(s.known.pid, std::process::id() as i32);
        assert!(!s.tagged_addresses);
    }

    #[test]
    fn sees_what_the_crate_leaves_out() {
        let own = crate::proc::text(std::process::id() as i32, "status").unwrap();
        let own: String = own
            .lines()
            .filter(|l| !l.starts_with("untag_mask") && !l.starts_with("x86_Thread_features"))
            .map(|l| format!("{l}\n"))
            .collect();
        let s = Status::parse(
            1,
            &(own.clone() + "untag_mask:\t0x7fffffffffff\nx86_Thread_features:\tshstk wrss\n"),
        )
        .unwrap();
        assert!(s.shadow_stack && s.tagged_addresses);
        let s = Status::parse(1, &own).unwrap();
        assert!(!s.shadow_stack && !s.tagged_addresses);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Status::parse(1, "").is_err());
        assert!(Status::parse(1, "Name\nUid:\t1\n").is_err());
    }
}
