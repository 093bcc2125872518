//! `/proc/PID/stat`.

use super::Kept;
use crate::error::{Error, Result};

/// The numbers of `/proc/PID/stat`, by their places in proc_pid_stat(5). Read
/// while programs stand still, so no more of it is understood than is asked
/// for.
#[derive(Debug, Clone)]
pub struct Stat {
    pid: i32,
    text: String,
}

/// The place of the first field behind the name and the state.
const FIRST: usize = 4;

impl Stat {
    /// # Errors
    /// [`Error::Gone`], or [`Error::Bad`] where the text is no stat.
    pub fn read(pid: i32) -> Result<Stat> {
        Stat::again(&Kept::of(pid))
    }

    /// The same of a process whose files are kept open.
    ///
    /// # Errors
    /// As [`Stat::read`].
    pub fn again(files: &Kept) -> Result<Stat> {
        Stat::parse(files.pid(), &files.text("stat")?)
    }

    fn parse(pid: i32, text: &str) -> Result<Stat> {
        // The name may hold anything, parentheses included.
        let rest = text
            .rfind(") ")
            .and_then(|at| text[at + 2..].split_once(' '))
            .map(|(_, rest)| rest.trim_ascii().to_owned());
        match rest {
            Some(text) => Ok(Stat { pid, text }),
            None => Err(Error::bad(format!("/proc/{pid}/stat"), "not understood")),
        }
    }

    /// The fields from place `from` on, in order, as many as are asked for;
    /// negative ones as two's complement.
    ///
    /// # Errors
    /// [`Error::Bad`] where there are fewer, or they are no numbers.
    pub fn fields<const N: usize>(&self, from: usize) -> Result<[u64; N]> {
        let mut words = self.text.split_ascii_whitespace().skip(from - FIRST);
        let mut all = [0; N];
        for field in &mut all {
            *field = words.next().and_then(number).ok_or_else(|| {
                Error::bad(
                    format!("/proc/{}/stat", self.pid),
                    format!("field {from} or one behind it is no number"),
                )
            })?;
        }
        Ok(all)
    }
}

fn number(word: &str) -> Option<u64> {
    word.parse()
        .ok()
        .or_else(|| word.parse::<i64>().ok().map(|n| n as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_the_procfs_crate_says() {
        let theirs = procfs::process::Process::myself().unwrap().stat().unwrap();
        let own = Stat::read(theirs.pid).unwrap();
        assert_eq!(own.fields(4).unwrap(), [theirs.ppid as u64]);
        assert_eq!(own.fields(9).unwrap(), [u64::from(theirs.flags)]);
        assert_eq!(
            own.fields(26).unwrap(),
            [theirs.startcode, theirs.endcode, theirs.startstack]
        );
        assert_eq!(
            own.fields(45).unwrap(),
            [
                theirs.start_data.unwrap(),
                theirs.end_data.unwrap(),
                theirs.start_brk.unwrap()
            ]
        );
        assert_eq!(own.fields(50).unwrap(), [theirs.env_start.unwrap()]);
    }

    #[test]
    fn a_name_cannot_pass_for_fields() {
        let stat = Stat::parse(1, "1 (a) R 7 (b) ) S 2 -3 4\n").unwrap();
        assert_eq!(stat.fields(4).unwrap(), [2, -3i64 as u64, 4]);
        assert!(stat.fields::<1>(7).is_err());
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Stat::parse(1, "").is_err());
        assert!(Stat::parse(1, "1 (a) R").is_err());
        assert!(Stat::parse(1, "1 (a) R x").unwrap().fields::<1>(4).is_err());
    }
}
