use super::Files;
use crate::error::{Error, Result};
use crate::id::Id;
use crate::journal::{self, Aborted, Committed, Fate, Found, Looked, NeverRan};
use crate::protocol::fate::{Answer, Question, What};
use crate::state::clock::A_MOMENT;

/// Answers the source's question about a migration; may have to end its husk
/// for that.
pub fn answer(question: &Question, files: &dyn Files) -> Answer {
    try_answer(question, files).unwrap_or_else(|e| {
        tracing::warn!("migration {}: {e}", question.id);
        Answer::Unknown("its record there cannot be used".into())
    })
}

fn try_answer(question: &Question, files: &dyn Files) -> Result<Answer> {
    let mut looked = journal::look(question.id, &question.secret)?;
    if let Looked::Lost = looked {
        let Found::Mine(_alone) = journal::open_target(question.id)? else {
            // Its session may yet say that it has not let it run.
            return Ok(Answer::Undecided);
        };
        looked = journal::look(question.id, &question.secret)?;
    }
    let fate = match looked {
        Looked::Unknown(why) => return Ok(Answer::Unknown(why)),
        Looked::Lost => {
            return Ok(Answer::Unknown(format!(
                "what was decided there is lost, and a person has to say; there: pmig resolve {}",
                question.id
            )))
        }
        Looked::Undecided(_) if question.what == What::Ask => return Ok(Answer::Undecided),
        Looked::Undecided(husk) => husk.abort("the source abandoned it")?,
        Looked::Decided(fate) => fate,
    };
    Ok(match fate {
        Fate::Aborted(aborted) => Answer::NeverRan(undo(&aborted, files)?),
        Fate::Committed(committed) => {
            if !committed.settled()? {
                // What misses memory is thawed by who fills it.
                if !committed.filling()? {
                    thaw(&committed)?;
                }
                let id = committed.record().id;
                // A living session sees to the files itself.
                if let Found::Mine(_lock) = journal::open_target(id)? {
                    if let Err(e) = finish(&committed, files) {
                        tracing::warn!("migration {id}: it runs here, but: {e}");
                    }
                }
            }
            Answer::Committed
        }
    })
}

/// Lets it run, as somebody else may be about to do: not before its clocks, of which
/// nothing is known here, are where they were.
fn thaw(committed: &Committed) -> Result<()> {
    std::thread::sleep(A_MOMENT);
    committed.thaw_again()
}

/// Lets it run and puts its files in their places, or does so again.
pub(super) fn finish(committed: &Committed, files: &dyn Files) -> Result<()> {
    if committed.filling()? && committed.stop()? {
        return Err(Error::bad(
            format!("process {}", committed.record().pid),
            "misses memory, and both who filled it are dead; it is frozen, for what it would \
             read is not what it wrote",
        ));
    }
    committed.filled()?;
    thaw(committed)?;
    if let Some(noted) = committed.files()? {
        files.finish(&noted)?;
    }
    committed.settle()
}

/// Ends the husk, and what was shipped for it.
pub(super) fn undo(aborted: &Aborted, files: &dyn Files) -> Result<NeverRan> {
    let never = aborted.bury()?;
    if let Some(noted) = aborted.files()? {
        if let Err(e) = files.undo(&noted) {
            // Leftovers take room, but nothing depends on them.
            tracing::warn!("files shipped for {}: {e}", aborted.record().id);
        }
    }
    if let Err(e) = aborted.settle() {
        // It is dead, whether there is room to write that down or not.
        tracing::warn!("the record of {} stays open: {e}", aborted.record().id);
    }
    Ok(never)
}

pub(super) fn sweep_one(id: Id, files: &dyn Files) -> Result<()> {
    let Found::Mine(husk) = journal::open_target(id)? else {
        return Ok(());
    };
    if !husk.this_boot()? {
        return husk.settle_lost();
    }
    if let Some(strayed) = husk.strayed()? {
        let record = husk.record();
        if husk.is_gone()? {
            return strayed.settle();
        }
        tracing::warn!(
            "whether {} from {} was to run here is lost; see pmig resolve {id}",
            record.pid,
            record.peer
        );
        return Ok(());
    }
    match husk.fate()? {
        Some(Fate::Committed(committed)) => finish(&committed, files),
        Some(Fate::Aborted(aborted)) => undo(&aborted, files).map(drop),
        None if husk.held()? && husk.is_from_file() => {
            // The file is as it was, and can be restored again.
            match husk.abort("what was to bring it back died")? {
                Fate::Aborted(aborted) => undo(&aborted, files).map(drop),
                Fate::Committed(committed) => finish(&committed, files),
            }
        }
        None if husk.held()? => {
            let record = husk.record();
            tracing::info!(
                "a copy of {} from {} is held here until {} decides",
                record.pid,
                record.peer,
                record.peer
            );
            Ok(())
        }
        // It died with its session, before it was ready.
        None => match husk.abort("its session died")? {
            Fate::Aborted(aborted) => undo(&aborted, files).map(drop),
            Fate::Committed(_) => Err(Error::bad(
                format!("migration {id}"),
                "was committed while it was aborted",
            )),
        },
    }
}
