use pmig::error::{printable, Result};
use pmig::resolve::{self, How, Resolved, Unresolved};
use serde::Serialize;

use super::output::{json, line};
use super::{files, say, Exit, Resolve};

/// What `--json` prints.
#[derive(Serialize)]
struct Answer {
    resolved: Vec<Resolved>,
    /// What still waits, those at work included.
    unresolved: Vec<Unresolved>,
}

pub fn run(args: &Resolve) -> Exit {
    match all(args) {
        Ok(answer) => {
            let waits = |u: &Unresolved| !u.busy && args.id.is_none_or(|id| id == u.id);
            let open = answer.unresolved.iter().any(waits);
            if args.json {
                json(&answer);
            } else {
                print(&answer, args.id.is_none());
            }
            if open {
                Exit::Unresolved
            } else {
                Exit::Done
            }
        }
        Err(e) => {
            say(&e);
            Exit::Other
        }
    }
}

fn all(args: &Resolve) -> Result<Answer> {
    let how = match (args.run_here, args.drop) {
        (true, _) => How::RunHere,
        (_, true) => How::Drop,
        _ => How::Ask,
    };
    let ids = match args.id {
        Some(id) => vec![id],
        None => resolve::unresolved()?
            .into_iter()
            .filter(|u| !u.busy)
            .map(|u| u.id)
            .collect(),
    };
    let mut resolved = Vec::new();
    for id in ids {
        match resolve::resolve(id, how, &files::Shipped) {
            Ok(one) => resolved.push(one),
            Err(e) if args.id.is_some() => return Err(e),
            Err(e) => tracing::warn!("{e}"),
        }
    }
    Ok(Answer {
        resolved,
        unresolved: resolve::unresolved()?,
    })
}

fn print(answer: &Answer, all: bool) {
    for one in &answer.resolved {
        line(&one.text);
    }
    let busy = answer.unresolved.iter().filter(|u| u.busy && all);
    for u in busy {
        line(&format!(
            "{} {}: {} ({})",
            u.pid,
            printable(&u.comm),
            u.what,
            u.id
        ));
    }
    if answer.resolved.is_empty() && answer.unresolved.is_empty() && all {
        line("nothing is held on this machine");
    }
}
