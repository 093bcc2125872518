//! The question of a migration's fate, asked by its source and answered by its
//! target over a connection of its own.
//!
//! Question: id (16 bytes), secret (32), what (1). Answer: code (1), length of
//! a text (2, little endian), the text.

use std::time::{Duration, Instant};

use super::preface::{read_by, write_by};
use crate::error::{Error, Result};
use crate::id::{Id, Secret};
use crate::journal::NeverRan;
use crate::transport::Link;

/// How long either side takes part in one question.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// Longer explanations are cut.
const MAX_TEXT: usize = 1024;

/// What the source wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Only to know.
    Ask,
    /// That it does not run there, if that can still be had.
    Abandon,
}

/// A question about one migration.
#[derive(Debug, Clone)]
pub struct Question {
    pub id: Id,
    pub secret: Secret,
    pub what: What,
}

/// What the target says.
#[derive(Debug)]
pub enum Answer {
    /// It runs there, or has run.
    Committed,
    /// It never ran there and never will.
    NeverRan(NeverRan),
    /// A husk is there, and nothing is decided. The answer to [`What::Abandon`] only
    /// where its session alone can still decide.
    Undecided,
    /// Nothing can be said, and why: a person must decide.
    Unknown(String),
}

/// Asks over a connection that was opened for it.
pub fn ask(link: &mut dyn Link, question: &Question) -> Result<Answer> {
    let until = Instant::now() + PATIENCE;
    let what = match question.what {
        What::Ask => 0,
        What::Abandon => 1,
    };
    let mut words = Vec::with_capacity(QUESTION);
    words.extend_from_slice(question.id.bytes());
    words.extend_from_slice(question.secret.bytes());
    words.push(what);
    write_by(link, &words, until)?;

    let mut head = [0; 3];
    read_by(link, &mut head, until)?;
    let [code, l0, l1] = head;
    let len = usize::from(u16::from_le_bytes([l0, l1]));
    if len > MAX_TEXT {
        return Err(Error::bad(link.peer(), "answers with too long a text"));
    }
    let mut text = vec![0; len];
    read_by(link, &mut text, until)?;
    match code {
        0 => Ok(Answer::Committed),
        1 => Ok(Answer::NeverRan(NeverRan::told())),
        2 => Ok(Answer::Undecided),
        3 => Ok(Answer::Unknown(String::from_utf8_lossy(&text).into_owned())),
        _ => Err(Error::bad(
            link.peer(),
            format!("answers {code}, which means nothing"),
        )),
    }
}

/// Hears one question and gives the answer to it.
pub fn serve(link: &mut dyn Link, answer: impl FnOnce(&Question) -> Answer) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    let mut words = [0; QUESTION];
    read_by(link, &mut words, until)?;
    let (id, rest) = words.split_at(16);
    let (secret, what) = rest.split_at(32);
    let (Ok(id), Ok(secret)) = (id.try_into(), secret.try_into()) else {
        return Err(Error::bad(link.peer(), "asks in a wrong length"));
    };
    let question = Question {
        id: Id::from_bytes(id),
        secret: Secret::from_bytes(secret),
        what: match what {
            [0] => What::Ask,
            [1] => What::Abandon,
            _ => return Err(Error::bad(link.peer(), "asks what means nothing")),
        },
    };
    let (code, text) = match answer(&question) {
        Answer::Committed => (0, String::new()),
        Answer::NeverRan(_) => (1, String::new()),
        Answer::Undecided => (2, String::new()),
        Answer::Unknown(why) => (3, why),
    };
    let text = &text.as_bytes()[..text.len().min(MAX_TEXT)];
    let mut words = vec![code];
    words.extend_from_slice(&(text.len() as u16).to_le_bytes());
    words.extend_from_slice(text);
    // Killing a husk may have taken its time.
    write_by(link, &words, Instant::now() + PATIENCE)
}

const QUESTION: usize = 49;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::preface::tests::pair;
    use super::*;

    fn question(what: What) -> Question {
        Question {
            id: Id::random().unwrap(),
            secret: Secret::random().unwrap(),
            what,
        }
    }

    #[test]
    fn a_question_arrives_whole_and_so_does_the_answer() {
        let asked = question(What::Abandon);
        let (mut a, mut b) = pair();
        let answer = std::thread::scope(|s| {
            let asked = &asked;
            s.spawn(move || {
                serve(&mut *b, |q| {
                    assert_eq!((q.id, q.what), (asked.id, What::Abandon));
                    assert!(q.secret.is(&asked.secret));
                    Answer::Unknown("é".repeat(MAX_TEXT))
                })
                .unwrap()
            });
            ask(&mut *a, asked).unwrap()
        });
        let Answer::Unknown(why) = answer else {
            panic!("{answer:?}")
        };
        assert!(why.starts_with("éé"));
    }

    #[test]
    fn hostile_bytes_are_refused_on_both_sides() {
        let (mut a, mut b) = pair();
        a.write_all(&[0xff; QUESTION]).unwrap();
        assert!(serve(&mut *b, |_| panic!("not a question")).is_err());

        let (mut a, mut b) = pair();
        a.write_all(&[1; 20]).unwrap();
        a.cut();
        assert!(serve(&mut *b, |_| panic!("not a question")).is_err());

        for said in [&[7u8, 0, 0][..], &[3, 0xff, 0xff], &[2, 0, 0], &[0]] {
            let (mut a, mut b) = pair();
            b.write_all(said).unwrap();
            b.cut();
            assert!(
                ask(&mut *a, &question(What::Abandon)).is_err(),
                "{said:?} must mean nothing"
            );
        }
    }
}
