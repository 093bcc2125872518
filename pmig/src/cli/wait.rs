use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use pmig::error::{printable, Error, Result};
use pmig::holder::{self, Ask, Ended, Said};
use pmig::journal::{self, Fate, Record, Role};
use pmig::sys::pidfd;

use super::output::{error_line, json};
use super::{say, Exit, Wait};

/// How long its holder may take to note how it ended.
const SOON: Duration = Duration::from_secs(1);

/// What became of a program.
enum End {
    Ended(Ended),
    Left(String),
    /// It has ended, and nobody knows how.
    Unknown,
}

pub fn run(args: &Wait) -> u8 {
    let pid = args.pid;
    match wait(pid) {
        Ok(End::Ended(ended)) => {
            if args.json {
                json(&ended);
            }
            ended.code()
        }
        Ok(End::Left(there)) => {
            error_line(&format!("pmig: {pid} {} now", printable(&there)));
            Exit::Other as u8
        }
        Ok(End::Unknown) => {
            error_line(&format!("pmig: {pid} has ended; how, is not known"));
            Exit::Other as u8
        }
        Err(e) => {
            say(&e);
            Exit::Other as u8
        }
    }
}

fn wait(pid: i32) -> Result<End> {
    let process = pidfd::open(pid).ok();
    let start = journal::start_of(pid).ok();
    let came = latest(pid)?;
    // The one that is meant is the one that runs, if one does.
    let meant = came.filter(|record| start.is_none_or(|s| s == record.start));
    if let (Some(process), Some(start)) = (&process, start) {
        if let Some(found) = holder::find_soon(pid)? {
            let mut line = found.line;
            line.set_patience(None)?;
            // It may have said its last word already.
            let _ = line.say(&Ask::Wait);
            match line.hear() {
                Ok(Said::Ended(ended)) => return Ok(End::Ended(ended)),
                Ok(Said::Left { there }) => return Ok(End::Left(there)),
                // It was killed, or answers to nobody.
                _ => {}
            }
        } else if meant.is_none() {
            return Err(Error::bad(
                format!("process {pid}"),
                "neither came here nor was started by pmig run, so only its parent can wait for it",
            ));
        }
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        while let Err(nix::errno::Errno::EINTR) = poll(&mut fds, PollTimeout::NONE) {}
        if let Some(there) = journal::left(pid, start)? {
            return Ok(End::Left(there));
        }
    }
    let Some(record) = meant else {
        return Err(Error::Gone(pid));
    };
    if let Some(there) = journal::left(pid, record.start)? {
        return Ok(End::Left(there));
    }
    // Its holder, if it lives, is about to note it.
    let begun = Instant::now();
    loop {
        let noted = journal::see_target(record.id)?.map(|husk| husk.end());
        match noted.transpose()?.flatten() {
            Some(how) => {
                return serde_json::from_value(how)
                    .map(End::Ended)
                    .map_err(|e| Error::bad("record of its end", e))
            }
            None if begun.elapsed() > SOON => return Ok(End::Unknown),
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The record of the program that came here last under that number.
fn latest(pid: i32) -> Result<Option<Record>> {
    let mut ids = journal::unsettled(Role::Target)?;
    ids.extend(journal::settled(Role::Target)?);
    let mut found: Option<Record> = None;
    for id in ids {
        let Ok(Some(husk)) = journal::see_target(id) else {
            continue;
        };
        let record = husk.record();
        let ours = record.pid == pid && matches!(husk.fate(), Ok(Some(Fate::Committed(_))));
        if ours && found.as_ref().is_none_or(|f| f.time <= record.time) {
            found = Some(record.clone());
        }
    }
    Ok(found)
}
