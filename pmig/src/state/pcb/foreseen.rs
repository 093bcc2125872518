//! What is known of a process before it stops, is taken for granted at its capture, and
//! is confirmed when all is on its way: what hardly ever changes, and takes long to
//! find out.

use std::ops::Range;

use super::Questions;
use crate::error::{Error, Result};
use crate::proc::status::Status;
use crate::proc::Kept;
use crate::state::attributes::Told;
use crate::state::bounds::Bounds;
use crate::tracee::{Done, Stopped};

const PAGE: u64 = 4096;

/// What is taken for granted.
#[derive(Debug, Clone)]
pub struct Foreseen {
    pub(super) bounds: Bounds,
    pub(super) told: Told,
    answers: Option<Answers>,
}

/// What a process has said of itself, and what could be seen of it then.
#[derive(Debug, Clone)]
pub struct Answers {
    done: Done,
    status: Status,
    brk: u64,
}

impl Answers {
    pub(super) fn new(done: Done, status: Status, brk: u64) -> Answers {
        Answers { done, status, brk }
    }

    /// Whether nothing is seen from outside that tells otherwise.
    fn may_hold(&self, status: &Status, heap: Option<&Range<u64>>, start_brk: u64) -> bool {
        let heap_ends = heap.map_or(start_brk.next_multiple_of(PAGE), |h| h.end);
        self.brk.next_multiple_of(PAGE) == heap_ends && status.is_of_same_settings(&self.status)
    }
}

impl Foreseen {
    /// `answers`: from a stop before.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Bad`].
    pub fn by(files: &Kept, answers: Option<Answers>) -> Result<Foreseen> {
        Ok(Foreseen {
            bounds: Bounds::from_files(files)?,
            told: Told::by(files)?,
            answers,
        })
    }

    /// What the process said, if nothing tells that it would say something else.
    pub(super) fn answers(&self, status: &Status, heap: Option<&Range<u64>>) -> Option<&Done> {
        let answers = self.answers.as_ref()?;
        answers
            .may_hold(status, heap, self.bounds.start_brk)
            .then_some(&answers.done)
    }

    /// Looks whether all of it was so. `was_asked`: at the capture, since what it had
    /// said before could not be so any more.
    ///
    /// # Errors
    /// [`Error::Changed`] where something was not; [`Error::Refused`]; those of a batch.
    pub fn confirm(
        &self,
        (stopped, was_asked): (&mut Stopped, bool),
        questions: &Questions,
        files: &Kept,
    ) -> Result<()> {
        let pid = stopped.pid();
        let changed = |what: &'static str| Err(Error::Changed { pid, what });
        let now = Foreseen::by(files, None)?;
        if now.bounds != self.bounds {
            return changed("the layout that it has told the kernel (PR_SET_MM)");
        }
        if now.told != self.told {
            return changed("oom_score_adj or coredump_filter");
        }
        let Some(answers) = self.answers.as_ref().filter(|_| !was_asked) else {
            return Ok(());
        };
        let done = questions.ask(stopped)?;
        match questions.obstacles(&done) {
            o if !o.is_empty() => return Err(Error::Refused(o)),
            _ => {}
        }
        match done.is_like(&answers.done, &questions.refusals.transient()) {
            true => Ok(()),
            false => changed("one of its settings (signal action, limit, prctl)"),
        }
    }
}
