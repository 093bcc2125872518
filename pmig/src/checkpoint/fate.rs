//! What became of a dump whose pmig died, by the two names of its file.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{file, temporary};
use crate::journal::NeverRan;
use crate::protocol::fate::{Answer, Question, What};

/// To have the name taken away that it has while it is written decides that it
/// never gets another: who writes it can no longer give it one.
pub fn answer(path: &Path, question: &Question) -> Answer {
    match decide(path, question) {
        Ok(answer) => answer,
        Err(e) => Answer::Unknown(format!("{}: {e}", path.display())),
    }
}

fn decide(path: &Path, question: &Question) -> io::Result<Answer> {
    let whole = || Ok::<_, io::Error>(file::id_of(path)? == Some(question.id));
    let temporary = temporary(path, question.id);
    match File::open(&temporary) {
        Ok(open) => {
            if question.what == What::Ask {
                return Ok(if open.metadata()?.nlink() > 1 {
                    Answer::Committed
                } else {
                    Answer::Undecided
                });
            }
            std::fs::remove_file(&temporary)?;
            // It had the other name, if it still has one.
            Ok(if open.metadata()?.nlink() > 0 {
                Answer::Committed
            } else {
                Answer::NeverRan(NeverRan::told())
            })
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound && whole()? => Ok(Answer::Committed),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Answer::Unknown(format!(
            "{} is not there any more, nor what was being written for it",
            path.display()
        ))),
        Err(e) => Err(e),
    }
}
