//! What the benches share: hosts, the link between them, moves with their
//! figures, and the summary.

pub mod link;
pub mod moves;
pub mod peer;
pub mod plot;
pub mod rows;
pub mod scale;
pub mod summary;

pub use crate::harness::CannotHere;
use crate::host::{Host, Make};
use crate::pair::{serve, Lab, Processors};
use anyhow::{Context, Result};
use link::Link;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::rc::Rc;
use std::time::Duration;

/// True if only a few quick figures are wanted: `PMIG_BENCH=short`, or
/// criterion's `--quick` or `--test`.
pub fn short() -> bool {
    std::env::var_os("PMIG_BENCH").is_some_and(|value| value == "short")
        || std::env::args().any(|word| word == "--quick" || word == "--test")
}

/// How long a program is watched on either side of its move.
pub fn window() -> Duration {
    Duration::from_millis(if short() { 400 } else { 1000 })
}

/// Two hosts with pmig serving on both, and what their link can do.
pub struct Stage {
    pub lab: Lab,
    pub link: Link,
}

impl Stage {
    fn new(make: Make) -> Result<Self> {
        let say = |what: &str| eprintln!("{what}");
        let lab = match make {
            Make::Netns => Lab::netns()?,
            Make::Vm => Lab::vm(Processors::Own, &say)?,
        };
        serve(lab.a(), &[]).context("start pmig serve on a")?;
        serve(lab.b(), &[]).context("start pmig serve on b")?;
        let link = Link::new(&lab, &say)?;
        Ok(Self { lab, link })
    }

    /// The host of that index; 0 is a.
    pub fn host(&self, index: usize) -> &dyn Host {
        if index == 0 {
            self.lab.a()
        } else {
            self.lab.b()
        }
    }

    /// True if both hosts have pmig's kernel module.
    pub fn has_module(&self) -> bool {
        let has = |host: &dyn Host| host.sh("test -c /dev/pmig").is_ok();
        has(self.lab.a()) && has(self.lab.b())
    }
}

/// The hosts in use: one pair at a time, started when first needed.
#[derive(Default)]
pub struct Stages {
    current: Option<Rc<Stage>>,
    impossible: Vec<(Make, String)>,
}

impl Stages {
    /// Hosts of that make.
    ///
    /// # Errors
    /// Whatever keeps them from coming up, now or when first tried.
    pub fn get(&mut self, make: Make) -> Result<Rc<Stage>> {
        let known = self.impossible.iter().find(|(known, _)| *known == make);
        if let Some((_, why)) = known {
            return Err(CannotHere(why.clone()).into());
        }
        if self.current.as_ref().map(|stage| stage.lab.make()) != Some(make) {
            // Two machines at a time are enough for any computer.
            self.current = None;
            match Stage::new(make) {
                Ok(stage) => self.current = Some(Rc::new(stage)),
                Err(e) => {
                    self.impossible.push((make, format!("{e:#}")));
                    return Err(e);
                }
            }
        }
        self.current.clone().context("no hosts")
    }

    /// Lets go of hosts on which something went wrong.
    pub fn forget(&mut self) {
        self.current = None;
    }
}

/// How a measurement went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Went {
    Well,
    Failed,
    Skipped,
}

/// What a measurement left behind that was not completed.
struct Left(Went, String);

/// Leaves a measurement that cannot be completed, up to [`guarded`].
pub fn leave(error: &anyhow::Error) -> ! {
    let went = match error.downcast_ref::<CannotHere>() {
        Some(_) => Went::Skipped,
        None => Went::Failed,
    };
    resume_unwind(Box::new(Left(went, format!("{error:#}"))))
}

/// Measures, and notes in the results what was left by [`leave`].
pub fn guarded(what: &str, results: &mut rows::Results, measure: impl FnOnce()) -> Went {
    let Err(panic) = catch_unwind(AssertUnwindSafe(measure)) else {
        return Went::Well;
    };
    let Left(went, why) = match panic.downcast::<Left>() {
        Ok(left) => *left,
        Err(other) => resume_unwind(other),
    };
    println!("{what}: {why}");
    let missing = rows::Missing {
        what: what.into(),
        why,
    };
    match went {
        Went::Skipped => results.skipped.push(missing),
        _ => results.failed.push(missing),
    }
    went
}

/// The value in the middle; zero of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values = values.into_iter().collect::<Vec<_>>();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => 0.0,
        even if even % 2 == 0 => (values[half - 1] + values[half]) / 2.0,
        _ => values[half],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median([]), 0.0);
    }

    #[test]
    fn what_is_left_is_noted() {
        let mut results = rows::Results::default();
        let cannot = || leave(&CannotHere("no iperf3".into()).into());
        assert_eq!(guarded("one", &mut results, cannot), Went::Skipped);
        let fails = || leave(&anyhow::anyhow!("broke"));
        assert_eq!(guarded("two", &mut results, fails), Went::Failed);
        assert_eq!(guarded("three", &mut results, || ()), Went::Well);
        assert_eq!(results.skipped[0].why, "no iperf3");
        assert_eq!(results.failed[0].what, "two");
    }
}
