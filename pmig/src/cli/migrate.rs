use std::io::{self, IsTerminal};

use pmig::error::{printable, Context, Error};
use pmig::report::{Event, Failure, Outcome, Progress};
use pmig::transport::Addr;
use pmig::{interrupt, resolve, source};

use super::check::{comm, refusal};
use super::machine::hostname;
use super::output::error_line;
use super::page::{page, Kept, Sheet, Told};
use super::show::{time, Json, Plain, Terminal};
use super::{files, lines, say, Dump, Exit, Migrate, Report};

pub fn run(args: &Migrate) -> Exit {
    match args.insecure.allows(&args.addr) {
        Ok(()) => {}
        Err(exit) => return exit,
    }
    match sheet(&args.report) {
        Ok(sheet) => go(args.pid, &args.addr, &args.how.options(), args.json, sheet),
        Err(exit) => exit,
    }
}

/// The same for a file, whose name must be free.
pub fn dump(args: &Dump) -> Exit {
    let file = match std::path::absolute(&args.output).context("find", args.output.display()) {
        Ok(file) => file,
        Err(e) => {
            say(&e);
            return Exit::Other;
        }
    };
    // Records keep it as text.
    if file.to_str().is_none() {
        say(&Error::bad(
            file.display(),
            "a name for a file must be UTF-8",
        ));
        return Exit::Usage;
    }
    match sheet(&args.report) {
        // The page is written last: it would be all that is left of the program.
        Ok(Some(sheet)) if sheet.is(&file) => {
            say(&Error::bad(
                file.display(),
                "cannot be both the program's file and the report",
            ));
            Exit::Usage
        }
        Ok(sheet) => go(
            args.pid,
            &Addr::File(file),
            &args.options(),
            args.json,
            sheet,
        ),
        Err(exit) => exit,
    }
}

/// The place of a report, which must be able to take one.
fn sheet(report: &Report) -> Result<Option<Sheet>, Exit> {
    let sheet = report.file.as_deref().map(Sheet::prepare).transpose();
    sheet.map_err(|e| {
        say(&e);
        Exit::Usage
    })
}

fn go(pid: i32, addr: &Addr, options: &source::Options, json: bool, sheet: Option<Sheet>) -> Exit {
    if let Err(e) = interrupt::listen() {
        say(&e);
        return Exit::Other;
    }
    resolve::sweep(&files::Shipped);
    let usual: Box<dyn Progress> = if json {
        Box::new(Json::new())
    } else if io::stdout().is_terminal() {
        Box::new(Terminal::new())
    } else {
        Box::new(Plain::new())
    };
    // It may be gone later.
    let name = comm(pid);
    let mut progress = Kept::new(usual, sheet);
    let (exit, said) = match source::migrate(pid, addr, options, &mut progress) {
        Ok(_) => (Exit::Done, Vec::new()),
        Err(failure) => {
            let exit = exit_of(&failure);
            progress.event(&event_of(&failure, exit));
            let said = explain((pid, addr), &name, &failure);
            said.iter().for_each(|line| error_line(line));
            (exit, said)
        }
    };
    if let Some(sheet) = &progress.sheet {
        let told = Told {
            pid,
            name,
            from: hostname(),
            to: addr.host(),
            addr: addr.to_string(),
            asked: asked(addr, options),
            begun: progress.begun,
            heard: &progress.heard,
            said,
        };
        if let Err(e) = sheet.write(&page(&told)) {
            say(&e);
        }
    }
    exit
}

/// What was asked for, for the report.
fn asked(addr: &Addr, options: &source::Options) -> Vec<(&'static str, String)> {
    let mode = match (addr, options.stays) {
        (Addr::File(_), true) => "to a file; it runs on here too",
        (Addr::File(_), false) => "to a file",
        _ => "to another machine",
    };
    let files = match options.ship {
        true => "travel along where they have to",
        false => "are to be there already",
    };
    vec![
        ("mode", mode.into()),
        ("files", files.into()),
        (
            "freeze aimed at",
            format!("{} at most", time(options.max_freeze)),
        ),
    ]
}

fn exit_of(failure: &Failure) -> Exit {
    match (&failure.outcome, &failure.error) {
        (Outcome::NeverStopped | Outcome::RunsOn { .. }, Error::Refused(_)) => Exit::Refused,
        (Outcome::NeverStopped | Outcome::RunsOn { .. }, _) => Exit::RunsOn,
        (Outcome::Unresolved { .. }, _) => Exit::Unresolved,
        (Outcome::Moved { .. } | Outcome::Ended, _) => Exit::Other,
    }
}

fn event_of(failure: &Failure, exit: Exit) -> Event {
    Event::Failed {
        error: failure.error.to_string(),
        obstacles: match &failure.error {
            Error::Refused(obstacles) => obstacles.clone(),
            _ => Vec::new(),
        },
        outcome: failure.outcome.name().into(),
        exit_code: exit as u8,
        stopped: match failure.outcome {
            Outcome::RunsOn { stopped } => Some(stopped),
            _ => None,
        },
    }
}

/// What went wrong, where the program is now and what to do, in that order.
fn explain((pid, addr): (i32, &Addr), name: &str, failure: &Failure) -> Vec<String> {
    let to_file = matches!(addr, Addr::File(_));
    let there = (!to_file).then_some(addr);
    let host = printable(&addr.host());
    let mut said = match &failure.error {
        Error::Refused(obstacles) => refusal(pid, name, there, obstacles),
        error => lines(error)
            .split('\n')
            .enumerate()
            .map(|(n, l)| {
                if n == 0 {
                    format!("pmig: {l}")
                } else {
                    l.into()
                }
            })
            .collect(),
    };
    let insecure = if addr.is_plain_network() {
        " --insecure"
    } else {
        ""
    };
    let again = match failure.error {
        Error::Refused(_) | Error::Interrupted => String::new(),
        // Where it is the error says already.
        Error::Gone(_) if failure.outcome == Outcome::Ended => return said,
        _ if to_file => format!("; try again, or see pmig check {pid}"),
        _ => format!("; try again, or see pmig check {pid} {addr}{insecure}"),
    };
    said.push(match &failure.outcome {
        Outcome::NeverStopped => {
            format!("{pid} was never frozen for it and runs on here{again}")
        }
        Outcome::RunsOn { stopped } => format!(
            "{pid} stood still for {} and runs on here{again}",
            time(*stopped)
        ),
        Outcome::Unresolved { id } if to_file => format!(
            "{pid} is held here, frozen and intact: whether {host} came to be whole is not known; \
             pmig resolve {id} looks again"
        ),
        Outcome::Moved { id } if to_file => format!(
            "{pid} is in {host}; what is left to clear away here: pmig resolve {id}"
        ),
        Outcome::Unresolved { id } => format!(
            "{pid} is held here, frozen and intact: {host} was told to let it run, and has not said \
             whether it does; when {host} can be reached again: pmig resolve {id}"
        ),
        Outcome::Moved { id } => format!(
            "{pid} runs on {host}; what is left to clear away here: pmig resolve {id}"
        ),
        Outcome::Ended => format!("{pid} has ended"),
    });
    said
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;
    use pmig::error::Obstacle;

    use super::super::{Cli, Command};
    use super::*;

    fn args() -> Migrate {
        let line = ["pmig", "migrate", "4242", "tcp://b", "--insecure"];
        match Cli::try_parse_from(line).unwrap().command {
            Command::Migrate(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_failure_says_where_the_program_is_and_what_to_do() {
        let lost = || Error::Link {
            peer: "b".into(),
            cause: io::ErrorKind::BrokenPipe.into(),
        };
        let refused = || Error::Refused(vec![Obstacle::new("fd 7", "is a door", "close it")]);
        let id = || "ab".repeat(16);
        let stopped = Duration::from_millis(3);
        for (error, outcome, exit, words) in [
            (
                lost(),
                Outcome::NeverStopped,
                Exit::RunsOn,
                "runs on here; try again",
            ),
            (
                lost(),
                Outcome::RunsOn { stopped },
                Exit::RunsOn,
                "stood still for 3.0 ms",
            ),
            (
                refused(),
                Outcome::NeverStopped,
                Exit::Refused,
                "runs on here",
            ),
            (
                refused(),
                Outcome::RunsOn { stopped },
                Exit::Refused,
                "runs on here",
            ),
            (
                lost(),
                Outcome::Unresolved { id: id() },
                Exit::Unresolved,
                "pmig resolve abab",
            ),
            (
                lost(),
                Outcome::Moved { id: id() },
                Exit::Other,
                "runs on b",
            ),
            (lost(), Outcome::Ended, Exit::Other, "has ended"),
        ] {
            let failure = Failure { error, outcome };
            assert_eq!(exit_of(&failure), exit, "{failure:?}");
            let args = args();
            let text = explain((args.pid, &args.addr), "x", &failure).join("\n");
            assert!(text.contains(words), "{text}");
        }
    }
}
