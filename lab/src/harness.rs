//! Runs trials on hosts, in the words of `cargo test`.
//!
//! Trials on namespaces get hosts of their own; trials on machines share two,
//! which are tidied up between them and end with the last.

use crate::host::{Host, Make};
use crate::pair::{serve, tidy, Lab, Processors};
use anyhow::{bail, Context, Result};
use std::collections::VecDeque;
use std::fmt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Why something cannot be tried on this machine.
#[derive(Debug)]
pub struct CannotHere(pub String);

impl fmt::Display for CannotHere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CannotHere {}

/// The body of a trial.
pub type Body = Box<dyn Fn(&Lab) -> Result<()> + Send + Sync>;

/// One thing to try.
pub struct Trial {
    /// What the name says is claimed.
    pub name: String,
    pub make: Make,
    /// Whether `pmig serve` runs on both hosts beforehand.
    pub serves: bool,
    pub body: Body,
}

impl Trial {
    /// A trial with pmig serving on both hosts.
    pub fn new(
        make: Make,
        name: impl fmt::Display,
        body: impl Fn(&Lab) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: format!("{make}::{name}"),
            make,
            serves: true,
            body: Box::new(body),
        }
    }

    /// The same with nothing started on the hosts.
    #[must_use]
    pub fn bare(mut self) -> Self {
        self.serves = false;
        self
    }
}

/// How long a trial may take before its hosts are ended.
const LIMIT: Duration = Duration::from_secs(400);

/// What was asked for on the command line, as far as it is understood here.
#[derive(Debug, Default)]
struct Asked {
    filters: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
    /// Only what is passed over as a rule: nothing here is.
    ignored: bool,
}

impl Asked {
    fn read() -> Self {
        let mut asked = Self::default();
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            match word.as_str() {
                "--exact" => asked.exact = true,
                "--list" => asked.list = true,
                "--ignored" => asked.ignored = true,
                "--skip" => asked.skip.extend(words.next()),
                "--test-threads" | "--format" | "--color" | "-Z" => drop(words.next()),
                _ if word.starts_with('-') => {}
                _ => asked.filters.push(word),
            }
        }
        asked
    }

    fn wants(&self, name: &str) -> bool {
        let fits = |filter: &String| match self.exact {
            true => name == filter,
            false => name.contains(filter.as_str()),
        };
        !self.ignored
            && (self.filters.is_empty() || self.filters.iter().any(fits))
            && !self.skip.iter().any(fits)
    }
}

#[derive(Debug)]
enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

#[derive(Default)]
struct Results {
    passed: usize,
    failed: Vec<(String, String)>,
    skipped: Vec<(String, String)>,
}

impl Results {
    fn add(&mut self, name: &str, start: Instant, verdict: Verdict) {
        let took = start.elapsed().as_secs_f64();
        match verdict {
            Verdict::Passed => {
                println!("test {name} ... ok <{took:.1}s>");
                self.passed += 1;
            }
            Verdict::Failed(why) => {
                // Said at once too: a run may be cut off before its end.
                println!("test {name} ... FAILED <{took:.1}s>\n{why}");
                self.failed.push((name.into(), why));
            }
            Verdict::Skipped(why) => {
                println!("test {name} ... ignored, {why}");
                self.skipped.push((name.into(), why));
            }
        }
    }
}

fn judge(result: std::thread::Result<Result<()>>) -> Verdict {
    match result {
        Ok(Ok(())) => Verdict::Passed,
        Ok(Err(e)) => match e.downcast_ref::<CannotHere>() {
            Some(reason) => Verdict::Skipped(reason.to_string()),
            None => Verdict::Failed(format!("{e:#}")),
        },
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Verdict::Failed(format!("panicked: {}", text.unwrap_or("?")))
        }
    }
}

/// Does the same on both hosts at once: each takes its time.
fn on_both(lab: &Lab, what: impl Fn(&dyn Host) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let a = scope.spawn(|| what(lab.a()));
        let b = what(lab.b());
        match a.join() {
            Ok(a) => a.and(b),
            Err(_) => bail!("a thread panicked"),
        }
    })
}

fn run_on(lab: &Lab, trial: &Trial) -> Verdict {
    let (over, end) = mpsc::channel::<()>();
    let verdict = std::thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let late = end.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout);
            if late {
                // Ends every conversation with them, and so the trial.
                let _ = lab.a().crash();
                let _ = lab.b().crash();
            }
            late
        });
        let verdict = judge(catch_unwind(AssertUnwindSafe(|| {
            if trial.serves {
                on_both(lab, |host| serve(host, &[]).map(drop)).context("start pmig serve")?;
            }
            (trial.body)(lab)
        })));
        drop(over);
        (verdict, watch.join().unwrap_or(false))
    });
    match verdict {
        (Verdict::Failed(why), true) => {
            Verdict::Failed(format!("it did not end in {LIMIT:?}; then: {why}"))
        }
        (Verdict::Failed(why), false) => {
            let troubles = [lab.a(), lab.b()].map(|host| host.trouble());
            let troubles = troubles.into_iter().flatten().collect::<String>();
            Verdict::Failed(why + &troubles)
        }
        (verdict, _) => verdict,
    }
}

/// Runs what was asked for, and says how it went.
pub fn main(trials: Vec<Trial>) -> ExitCode {
    let asked = Asked::read();
    if asked.list {
        for trial in &trials {
            println!("{}: test", trial.name);
        }
        return ExitCode::SUCCESS;
    }
    let all = trials.len();
    let (netns, vm): (Vec<_>, Vec<_>) = trials
        .into_iter()
        .filter(|trial| asked.wants(&trial.name))
        .partition(|trial| trial.make == Make::Netns);
    let filtered = all - netns.len() - vm.len();
    let start = Instant::now();
    println!("\nrunning {} tests", netns.len() + vm.len());
    let results = Mutex::new(Results::default());
    on_namespaces(netns, &results);
    on_machines(vm, &results);
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !results.skipped.is_empty() {
        println!("\nskipped:");
        for (name, why) in &results.skipped {
            println!("    {name}: {why}");
        }
    }
    if !results.failed.is_empty() {
        println!("\nfailures:");
        for (name, why) in &results.failed {
            println!("\n---- {name} ----\n{why}");
        }
    }
    let good = results.failed.is_empty();
    println!(
        "\ntest result: {}. {} passed; {} failed; {} ignored; 0 measured; {filtered} filtered out; \
         finished in {:.2}s\n",
        if good { "ok" } else { "FAILED" },
        results.passed,
        results.failed.len(),
        results.skipped.len(),
        start.elapsed().as_secs_f64()
    );
    // As libtest ends when a test fails.
    ExitCode::from(if good { 0 } else { 101 })
}

fn on_namespaces(trials: Vec<Trial>, results: &Mutex<Results>) {
    let lock = |mutex| Mutex::lock(mutex).unwrap_or_else(PoisonError::into_inner);
    if !nix::unistd::geteuid().is_root() {
        for trial in trials {
            let why = Verdict::Skipped("namespaces with cgroups of their own need root".into());
            lock(results).add(&trial.name, Instant::now(), why);
        }
        return;
    }
    in_parallel(2, trials, results, |_: &mut (), trial| match Lab::netns() {
        Ok(lab) => run_on(&lab, trial),
        Err(e) => Verdict::Failed(format!("{e:#}")),
    });
}

/// Tries all, so many at a time where there are processors for it; whoever tries
/// keeps something of its own from one to the next.
fn in_parallel<T: Default>(
    workers: usize,
    trials: Vec<Trial>,
    results: &Mutex<Results>,
    one: impl Fn(&mut T, &Trial) -> Verdict + Sync,
) {
    let queue = Mutex::new(VecDeque::from(trials));
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get().min(workers));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                let mut own = T::default();
                loop {
                    let next = queue.lock().map(|mut queue| queue.pop_front());
                    let Ok(Some(trial)) = next else { return };
                    let start = Instant::now();
                    let verdict = one(&mut own, &trial);
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    results.add(&trial.name, start, verdict);
                }
            });
        }
    });
}

/// Two machines, shared by the trials of one worker: most of a trial's time is
/// spent waiting, so that two pairs go well on two processors.
#[derive(Default)]
struct Pair {
    lab: Option<Lab>,
    /// Why there is none.
    broken: Option<String>,
}

/// So many trials keep two pairs of machines busy.
const MANY: usize = 40;

fn on_machines(trials: Vec<Trial>, results: &Mutex<Results>) {
    // A second pair takes its time to boot.
    let pairs = if trials.len() > MANY { 2 } else { 1 };
    in_parallel(pairs, trials, results, |pair: &mut Pair, trial| {
        machines(&mut pair.lab, &mut pair.broken, trial)
    });
}

/// What a guest's kernel says when the emulator, patching its code on one
/// processor while another runs it, has let it fall over. No kernel on real
/// hardware does so, and no trial here is about it.
const EMULATORS_FAULT: &str = "Oops: int3:";

fn machines(lab: &mut Option<Lab>, broken: &mut Option<String>, trial: &Trial) -> Verdict {
    match on_whole_machines(lab, broken, trial) {
        Verdict::Failed(why) if why.contains(EMULATORS_FAULT) => {
            println!("a machine fell over by the emulator's fault; once more: {why}");
            on_whole_machines(lab, broken, trial)
        }
        verdict => verdict,
    }
}

fn on_whole_machines(lab: &mut Option<Lab>, broken: &mut Option<String>, trial: &Trial) -> Verdict {
    if let Some(why) = broken {
        return Verdict::Failed(why.clone());
    }
    // Machines that a trial broke are not given to the next.
    let whole = lab.as_ref().is_some_and(|lab| on_both(lab, tidy).is_ok());
    if !whole {
        *lab = None;
        match Lab::vm(Processors::Two, &|what| println!("{what}")) {
            Ok(new) => *lab = Some(new),
            Err(e) => {
                let verdict = judge(Ok(Err(e)));
                match &verdict {
                    Verdict::Failed(why) if !why.contains(EMULATORS_FAULT) => {
                        *broken = Some(why.clone());
                    }
                    _ => {}
                }
                return verdict;
            }
        }
    }
    match lab {
        Some(lab) => run_on(lab, trial),
        None => Verdict::Failed("the machines are gone".into()),
    }
}
