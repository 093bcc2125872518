use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pmig::checkpoint::{Played, Player};
use pmig::error::{printable, Context, Error};
use pmig::id::Id;
use pmig::journal::{self, run_dir, state_dir, Folder};
use pmig::patience::patience;
use pmig::protocol::fate::Answer;
use pmig::{resolve, transport};
use serde::Serialize;

use super::output::{error_line, json, line};
use super::show::time;
use super::{attach, files, lines, say, session, Exit, Restore, Verbose};

/// How long a session may take for what is to be done when the program runs.
const TIDYING: Duration = Duration::from_secs(20);

/// What `--json` prints.
#[derive(Serialize)]
struct Restored {
    pid: i32,
    comm: String,
    notes: Vec<String>,
}

pub fn run(args: &Restore, verbose: Verbose) -> u8 {
    let (exit, pid) = run_and_say(args, verbose);
    match pid
        .filter(|_| !args.detach && !args.json)
        .and_then(attach::shown)
    {
        Some(code) => code,
        None => exit as u8,
    }
}

/// Brings it back; its PID, if it runs.
fn run_and_say(args: &Restore, verbose: Verbose) -> (Exit, Option<i32>) {
    resolve::sweep(&files::Shipped);
    let begun = Instant::now();
    let restored = restore(args, verbose);
    let pid = restored.as_ref().ok().map(|played| played.pid);
    let exit = match restored {
        Ok(played) if args.json => {
            json(&Restored {
                pid: played.pid,
                comm: played.comm,
                notes: played.notes,
            });
            Exit::Done
        }
        Ok(played) => {
            for note in &played.notes {
                line(&format!("note: {}", printable(note)));
            }
            line(&format!(
                "{} {} runs, {} after you asked",
                played.pid,
                printable(&played.comm),
                time(begun.elapsed())
            ));
            Exit::Done
        }
        Err(Unrestored::Unsure(why)) => {
            error_line(&format!("pmig: {}", printable(&why)));
            Exit::Unresolved
        }
        Err(Unrestored::Nothing(Error::Refused(obstacles))) => {
            let file = args.file.display().to_string();
            let plural = if obstacles.len() == 1 { "" } else { "s" };
            error_line(&format!(
                "pmig: what is in {} cannot run here: {} obstacle{plural}",
                printable(&file),
                obstacles.len()
            ));
            for obstacle in &obstacles {
                error_line(&format!(
                    "  {}",
                    lines(&Error::Refused(vec![obstacle.clone()]))
                ));
            }
            Exit::Refused
        }
        Err(Unrestored::Nothing(e)) => {
            say(&e);
            error_line("nothing was restored, and the file is as it was");
            Exit::Other
        }
    };
    (exit, pid)
}

/// Why a program was not seen to run.
enum Unrestored {
    /// It does not, and never will by this.
    Nothing(Error),
    /// Its records do not say.
    Unsure(String),
}

impl From<Error> for Unrestored {
    fn from(error: Error) -> Unrestored {
        Unrestored::Nothing(error)
    }
}

fn restore(args: &Restore, verbose: Verbose) -> Result<Played, Unrestored> {
    let player = Player::open(&args.file)?;
    Folder::at(&state_dir())?;
    Folder::at(&run_dir())?;
    let name = args.file.display().to_string();
    let (ours, theirs) = transport::pair("the target", &name).context("make", "a connection")?;
    // What goes wrong there is said here too.
    let log = match verbose.level {
        0 => Stdio::null(),
        _ => Stdio::inherit(),
    };
    let mut child = session::start(theirs, session::What::File(&args.file), verbose, log)?;
    let (question, whom) = (player.question(), player.whom());
    let played = player.play(ours, args.pcb.into());
    if played.is_ok() {
        if !tidied_up(&mut child) {
            // The program does not need it any more, and others can do the rest.
            end(&mut child);
            resolve::sweep_arrivals(&files::Shipped);
        }
        return Ok(played?);
    }
    end(&mut child);
    // Its records know best, whatever was heard of it.
    match resolve::answer(&question, &files::Shipped) {
        Answer::Committed => Ok(whom),
        Answer::Unknown(why) if known(question.id) => Err(Unrestored::Unsure(format!(
            "whether what is in {name} runs is not known: {why}; pmig resolve {}",
            question.id
        ))),
        _ => Ok(played?),
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Whether there is a record by which it can be resolved.
fn known(id: Id) -> bool {
    journal::see_target(id).is_ok_and(|record| record.is_some())
}

/// Waits for a session that has nothing more to do than that.
fn tidied_up(child: &mut Child) -> bool {
    let until = Instant::now() + patience(TIDYING);
    while Instant::now() < until {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(Duration::from_millis(2)),
            Ok(Some(status)) => return status.success(),
            Err(_) => return false,
        }
    }
    false
}
