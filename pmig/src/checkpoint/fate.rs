//! What became of a dump whose pmig died, by the names of its file.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use super::{file, never, temporary};
use crate::journal::NeverRan;
use crate::protocol::fate::{Answer, Question, What};

/// It has one of three names. While it is written, and until it is decided:
/// `NAME.pmig-ID`. Its own: the program is in it. `NAME.pmig-ID.never`: that
/// will never be. Whoever takes the first away has decided, and a name is
/// taken away only once.
pub fn answer(path: &Path, question: &Question) -> Answer {
    match decide(path, question) {
        Ok(answer) => answer,
        Err(e) => Answer::Unknown(format!("{}: {e}", path.display())),
    }
}

fn decide(path: &Path, question: &Question) -> io::Result<Answer> {
    let (temporary, never) = (temporary(path, question.id), never(path, question.id));
    if question.what == What::Ask && temporary.exists() {
        return Ok(Answer::Undecided);
    }
    match fs::rename(&temporary, &never) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        Err(_) => {}
        Ok(()) => {
            // It takes room, and holds the program's memory.
            let _ = OpenOptions::new().write(true).truncate(true).open(&never);
        }
    }
    if never.exists() {
        return Ok(Answer::NeverRan(NeverRan::told()));
    }
    if file::id_of(path)? == Some(question.id) {
        return Ok(Answer::Committed);
    }
    Ok(Answer::Unknown(format!(
        "{} is not there any more, nor what was being written for it",
        path.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::file::Writer;
    use crate::id::{Id, Secret};

    fn question(id: Id, what: What) -> Question {
        Question {
            id,
            secret: Secret::random().unwrap(),
            what,
        }
    }

    #[test]
    fn who_takes_the_first_name_away_has_decided() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let ask = |id, what| answer(&path, &question(id, what));

        let id = Id::random().unwrap();
        let mut writer = Writer::create(&path, id).unwrap();
        writer.finish().unwrap();
        assert!(matches!(ask(id, What::Ask), Answer::Undecided));
        for _ in 0..2 {
            assert!(matches!(ask(id, What::Abandon), Answer::NeverRan(_)));
            assert!(writer.publish().is_err());
        }
        super::super::forget_at(&path, id);

        let id = Id::random().unwrap();
        let mut writer = Writer::create(&path, id).unwrap();
        writer.finish().unwrap();
        writer.publish().unwrap();
        for what in [What::Ask, What::Abandon, What::Abandon] {
            assert!(matches!(ask(id, what), Answer::Committed));
        }
        // Whatever became of it since: nobody lets the program run here too.
        fs::remove_file(&path).unwrap();
        assert!(matches!(ask(id, What::Abandon), Answer::Unknown(_)));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_whole_goes_with_who_wrote_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        drop(Writer::create(&path, Id::random().unwrap()).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
