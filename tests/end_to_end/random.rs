//! A program that does anything with its memory finds every byte of it as it left
//! it, however often it is moved, in whatever way, and whatever breaks.
//!
//! All follows from a seed: what the program does, when and how it is moved, and
//! what breaks then. `PMIG_SEED=17`, or `PMIG_SEED=1000..3000`, tries those seeds
//! instead of the usual ones.

use anyhow::{bail, ensure, Context, Result};
use lab::harness::{CannotHere, Trial};
use lab::scenario::{gone, tail, Moved, Program};
use lab::victim::hurry;
use lab::victim::random::dice::Dice;
use lab::victim::random::lines;
use lab::{Cmd, Host, Lab, Make, Status};
use pmig::fault::{Fault, Kind, Role};
use pmig::phase::Phase;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long anything may take before something is wrong.
const LIMIT: Duration = Duration::from_secs(100);
/// Options of `pmig migrate` of which each move gets one of the values that its
/// `--help` names, where there are some.
const OPTIONS: [&str; 2] = ["--mode", "--dirty-tracking"];
/// Seeds of one trial on namespaces.
const SHARE: u64 = 50;

pub fn trials() -> Vec<Trial> {
    let asked = asked();
    let mut trials = Vec::new();
    let all = asked.clone().unwrap_or(0..500);
    for first in all.clone().step_by(SHARE as usize) {
        let seeds = first..all.end.min(first + SHARE);
        trials.push(trial(Make::Netns, "ptrace", seeds));
    }
    for (pcb, seeds) in [("ptrace", 0..25), ("kmod", 25..50)] {
        let seeds = asked.clone().unwrap_or(seeds);
        trials.push(trial(Make::Vm, pcb, seeds));
    }
    for (name, harm) in HARM {
        let name = format!("random::{name}");
        trials.push(Trial::new(Make::Netns, name, move |lab| harmed(lab, harm)).bare());
    }
    trials
}

/// The seeds that somebody wants to see.
fn asked() -> Option<Range<u64>> {
    let text = std::env::var("PMIG_SEED").ok()?;
    let seeds = match text.split_once("..") {
        Some((first, end)) => first.parse().ok().zip(end.parse().ok()),
        None => text.parse().ok().map(|seed: u64| (seed, seed + 1)),
    };
    let (first, end) = seeds.unwrap_or_else(|| panic!("PMIG_SEED={text} is neither N nor N..M"));
    Some(first..end)
}

fn trial(make: Make, pcb: &'static str, seeds: Range<u64>) -> Trial {
    let name = format!(
        "random::{pcb}::every_byte_is_what_it_must_be_with_seeds_{}_to_{}",
        seeds.start,
        seeds.end - 1
    );
    Trial::new(make, name, move |lab| all(lab, pcb, seeds.clone())).bare()
}

fn is_there(host: &dyn Host, how: &str) -> bool {
    let tried = host.exec(&Cmd::new(["tracking", "have", how]));
    tried.is_ok_and(|tried| tried.status == Status::Code(0))
}

/// Tries all seeds, some side by side.
fn all(lab: &Lab, pcb: &'static str, seeds: Range<u64>) -> Result<()> {
    if pcb == "kmod" && lab.a().sh("test -e /dev/pmig").is_err() {
        return Err(CannotHere("the kernel module is not there".into()).into());
    }
    let help = lab.a().sh("pmig migrate --help")?;
    let options = OPTIONS.map(|option| {
        let mut values = values(&help, option);
        if option == "--dirty-tracking" {
            // Not every kernel has all of them.
            values.retain(|how| how == "auto" || is_there(lab.a(), how));
        }
        (option, values)
    });
    let at_once = match lab.make() {
        Make::Netns => 8,
        Make::Vm => 4,
    };
    let queue = Mutex::new(seeds.collect::<VecDeque<_>>());
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| loop {
                let next = queue.lock().map(|mut queue| queue.pop_front());
                let Ok(Some(seed)) = next else { return };
                let tried = try_seed(lab, pcb, seed, &options);
                if let (Err(e), Ok(mut wrong)) = (tried, wrong.lock()) {
                    wrong.push(format!(
                        "{e:#}\nagain: PMIG_SEED={seed} cargo test -p lab --test end_to_end -- \
                         {}::random::{pcb}",
                        lab.make()
                    ));
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap_or_default();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    Ok(())
}

/// The values of an option by the help that clap writes: in brackets, or one a
/// line. None where there is no such option.
fn values(help: &str, option: &str) -> Vec<String> {
    let Some((_, about)) = help.split_once(&format!("{option} ")) else {
        return Vec::new();
    };
    let lines = about.lines().skip(1);
    let about: Vec<&str> = std::iter::once(about.lines().next().unwrap_or_default())
        .chain(lines.take_while(|line| !line.trim_start().starts_with("--")))
        .collect();
    let all = about.join("\n");
    if let Some((_, list)) = all.split_once("[possible values: ") {
        let list = list.split(']').next().unwrap_or_default();
        return list.split(',').map(|value| value.trim().into()).collect();
    }
    let listed = about
        .iter()
        .filter_map(|line| line.trim().strip_prefix("- "));
    let value = |line: &str| line.split(':').next().unwrap_or_default().to_owned();
    listed.map(value).collect()
}

type Options = [(&'static str, Vec<String>); 2];

/// One move.
#[derive(Debug)]
struct Hop {
    /// After so many lines more.
    lines: usize,
    more: String,
    fault: Option<(String, Fault)>,
}

/// What becomes of the program of a seed.
fn plan(seed: u64, options: &Options) -> (u64, Vec<Hop>) {
    let mut dice = Dice::new(seed, u64::MAX);
    let megabytes = dice.within(1..5);
    let hops = 1 + dice.below(3);
    let hop = |_| {
        let mut more = String::new();
        for (option, values) in options {
            let choice = dice.any() as usize % (values.len() + 1);
            if let Some(value) = values.get(choice) {
                more += &format!(" {option} {value}");
            }
        }
        let (_, kind) = dice.pick(&Kind::ALL);
        let (_, role) = dice.pick(&Role::ALL);
        let fault = Fault::at(dice.pick(&Phase::ALL), kind, role);
        let lines = dice.below(12) as usize;
        let fault = dice.one_in(4).then(|| (fault.to_string(), fault));
        Hop { lines, more, fault }
    };
    (megabytes, (0..hops).map(hop).collect())
}

/// The program of one seed, with records and ports of its own on both hosts.
struct Tried<'a> {
    lab: &'a Lab,
    seed: u64,
    pcb: &'static str,
    port: u16,
    program: Program,
    /// Everything that serves for it.
    servers: Vec<(&'a dyn Host, u32)>,
    told: String,
}

fn try_seed(lab: &Lab, pcb: &'static str, seed: u64, options: &Options) -> Result<()> {
    static PORT: AtomicU16 = AtomicU16::new(20_000);
    let (megabytes, mut hops) = plan(seed, options);
    if lab.make() == Make::Vm {
        // Each takes its time.
        hops.truncate(2);
    }
    let output = format!("/srv/work/random.{seed}");
    let (pace, size) = match lab.make() {
        Make::Netns => (10_000, format!("mb={}", 2 * megabytes)),
        Make::Vm => (60_000, "mb=1".into()),
    };
    let line = format!("random seed={seed} pace_us={pace} {size}");
    let argv: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let pid = lab.a().spawn(&Cmd::new(argv.clone()), &output)?;
    let mut tried = Tried {
        lab,
        seed,
        pcb,
        port: PORT.fetch_add(8, Ordering::Relaxed),
        program: Program { pid, argv, output },
        servers: Vec::new(),
        told: String::new(),
    };
    let result = tried.goes(&hops);
    let logs = match &result {
        Ok(()) => String::new(),
        Err(_) => tried.logs(),
    };
    for (host, server) in &tried.servers {
        let _ = host.signal(*server, 9);
    }
    result.with_context(|| format!("seed {seed}: {hops:?}\n{}\n{logs}", tried.told))
}

impl<'a> Tried<'a> {
    fn goes(&mut self, hops: &[Hop]) -> Result<()> {
        let (mut here, mut there) = (self.lab.a(), self.lab.b());
        self.serve(there, 0, &[])?;
        if hops.len() > 1 {
            self.serve(here, 0, &[])?;
        }
        for (number, hop) in hops.iter().enumerate() {
            self.wait_lines(here, hop.lines)?;
            let place = self.hop(here, there, number as u16, hop)?;
            if place == there.name() {
                (here, there) = (there, here);
            }
        }
        // So that it looks at much of what has come along.
        self.wait_lines(here, 8)?;
        here.write(&hurry(self.program.pid), 0o644, b"")?;
        self.wait_for("its end", LIMIT, || {
            let text = self.program.written(here)?;
            Ok(text.lines().any(|line| line.starts_with("PASS")))
        })?;
        self.right(&self.program.written(here)?)?;
        gone(there, self.program.pid)?;
        for host in [here, there] {
            host.sh(&format!("rm -f {}", self.program.output))?;
        }
        Ok(())
    }

    /// Deadlines of pmig's, in this proportion to ten seconds.
    fn patience_ms(&self) -> u32 {
        match self.lab.make() {
            Make::Netns => 2000,
            Make::Vm => 4000,
        }
    }

    fn patience(&self, usual: Duration) -> Duration {
        usual * self.patience_ms() / 10_000
    }

    fn pmig(&self, words: &str, env: &[(&str, &str)]) -> Cmd {
        let words = std::iter::once("pmig").chain(words.split_whitespace());
        let name = format!("pmig/random.{}", self.seed);
        let mut cmd = Cmd::new(words)
            .env("PMIG_STATE_DIR", &format!("/var/lib/{name}"))
            .env("PMIG_RUN_DIR", &format!("/run/{name}"))
            .env("PMIG_PATIENCE_MS", &self.patience_ms().to_string());
        for (name, value) in env {
            cmd = cmd.env(name, value);
        }
        cmd
    }

    fn log(&self, number: u16) -> String {
        format!("/run/serve-random.{}.{number}", self.seed)
    }

    /// Starts `pmig serve`, the one of that number.
    fn serve(&mut self, host: &'a dyn Host, number: u16, env: &[(&str, &str)]) -> Result<()> {
        let port = self.port + number;
        let words = format!("serve -v --listen tcp://0.0.0.0:{port} --insecure");
        let log = self.log(number);
        let pid = host.spawn(&self.pmig(&words, env), &log)?;
        self.servers.push((host, pid));
        host.wait_for("pmig serve listening", LIMIT, &mut || {
            let said = host.read(&log)?;
            let said = String::from_utf8_lossy(&said);
            ensure!(host.ended(pid)?.is_none(), "pmig serve ended: {said}");
            Ok(said.contains("listening on"))
        })
    }

    /// What everybody who worked for it has logged.
    fn logs(&self) -> String {
        let line = format!(
            "tail -n 30 /run/serve-random.{}.* /run/pmig/random.{0}/keeper-*.log 2>/dev/null
             tail -n 3 {}; grep -H . /proc/{}/wchan /proc/{2}/cgroup; :",
            self.seed, self.program.output, self.program.pid
        );
        let log = |host: &dyn Host| {
            let text = host.sh(&line).unwrap_or_default();
            format!("-- on {}:\n{text}\n", host.name())
        };
        log(self.lab.a()) + &log(self.lab.b())
    }

    fn wait_for(
        &self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !done()? {
            ensure!(Instant::now() < deadline, "{what} did not come about");
            self.pause();
        }
        Ok(())
    }

    fn pause(&self) {
        std::thread::sleep(match self.lab.make() {
            Make::Netns => Duration::from_millis(15),
            Make::Vm => Duration::from_millis(100),
        });
    }

    /// So many bytes of output are there; nothing where it never was.
    fn length(&self, host: &dyn Host) -> u64 {
        let bytes = host.read(&self.program.output);
        bytes.map_or(0, |bytes| bytes.len() as u64)
    }

    fn wait_lines(&self, host: &dyn Host, lines: usize) -> Result<()> {
        let count = |text: &str| text.lines().count();
        let start = count(&self.program.written(host)?);
        let what = format!("{lines} more lines on {}", host.name());
        self.wait_for(&what, LIMIT, || {
            let text = self.program.written(host)?;
            ensure!(!text.contains("FAIL"), "{}: {}", host.name(), tail(&text));
            Ok(count(&text) >= (start + lines).max(1))
        })
        .with_context(|| tail(&self.program.written(host).unwrap_or_default()))
    }

    /// Moves it, or tries to; gives the name of the host where it runs then.
    fn hop(
        &mut self,
        from: &'a dyn Host,
        to: &'a dyn Host,
        number: u16,
        hop: &Hop,
    ) -> Result<&'a str> {
        let Some((name, fault)) = &hop.fault else {
            let moved = self.moved(from, to, hop)?;
            moved.ok().with_context(|| format!("hop {number}"))?;
            gone(from, self.program.pid)?;
            return Ok(to.name());
        };
        let env = [("PMIG_FAULT", &**name)];
        let mut port = self.port;
        if fault.role == Role::Target {
            self.serve(to, number + 1, &env)?;
            port += number + 1;
        }
        let words = self.words(to, port, hop);
        let said_at = format!("/run/migrate-random.{}.{number}", self.seed);
        let pid = from.spawn(&self.pmig(&words, &env), &said_at)?;
        // Nothing stands still for a source that hangs before the freeze, or when
        // all is done: a person sees it, and ends it.
        let hangs = (fault.role, fault.kind) == (Role::Source, Kind::Stall)
            && !(Phase::Freeze..=Phase::Commit).contains(&fault.phase);
        let mut within = match hangs {
            true => self.patience(Duration::from_secs(5)),
            false => LIMIT,
        };
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = from.ended(pid)? {
                break status;
            }
            if begun.elapsed() > within {
                ensure!(hangs, "pmig migrate does not end");
                from.signal(pid, 9)?;
                within = LIMIT;
            }
            self.pause();
        };
        let said = from.read(&said_at)?;
        let said = String::from_utf8_lossy(&said);
        self.told += &format!("hop {number} with {name}: {status:?}: {}\n", tail(&said));
        let place = self.settle(from, to)?;
        if (fault.role, fault.kind) == (Role::Target, Kind::Stall) {
            self.end_sessions(to)?;
        }
        // What broke may have kept pmig from noting what the program left there.
        let other = if place == to.name() { from } else { to };
        other.sh(&format!("rm -f {}", self.program.output))?;
        match status {
            Status::Code(0 | 1) => ensure!(place == to.name(), "it runs on {place}: {said}"),
            Status::Code(3 | 4) => ensure!(place == from.name(), "it runs on {place}: {said}"),
            Status::Code(5) | Status::Signal(_) => {}
            Status::Code(other) => bail!("pmig migrate ended with {other}: {said}"),
        }
        Ok(place)
    }

    /// Ends what hangs there: until the kernel does so, the PID is taken.
    fn end_sessions(&self, host: &dyn Host) -> Result<()> {
        let (_, server) = self.servers.last().context("nobody serves")?;
        for process in host.ps()?.iter().filter(|p| p.ppid == *server) {
            // It may end by itself meanwhile.
            let _ = host.signal(process.pid, 9);
        }
        if host
            .process(self.program.pid)?
            .is_some_and(|p| p.state == 'Z')
        {
            gone(host, self.program.pid)?;
        }
        Ok(())
    }

    fn words(&self, to: &dyn Host, port: u16, hop: &Hop) -> String {
        format!(
            "migrate {} {}:{port} --insecure --json -v --files ship --pcb {}{}",
            self.program.pid,
            to.address(),
            self.pcb,
            hop.more
        )
    }

    fn moved(&self, from: &dyn Host, to: &dyn Host, hop: &Hop) -> Result<Moved> {
        let words = self.words(to, self.port, hop);
        for _ in 0..20 {
            let output = from.exec(&self.pmig(&words, &[]))?;
            let events = output.out();
            let events = events.lines().filter_map(|l| serde_json::from_str(l).ok());
            let moved = Moved {
                status: output.status,
                events: events.collect(),
                output,
            };
            // A wait that was moved once is let end first; and what it maps and
            // unmaps may be gone when somebody looks.
            let said = moved.said();
            let fleeting = ["try again when the program", "map_files"];
            if !fleeting.iter().any(|words| said.contains(words)) {
                return Ok(moved);
            }
        }
        bail!("it is never where it can be moved from")
    }

    /// Finds where it runs, when the dust has settled; nobody else has it then.
    fn settle(&self, from: &'a dyn Host, to: &'a dyn Host) -> Result<&'a str> {
        let soon = self.patience(Duration::from_secs(5)) + Duration::from_secs(2);
        let late = self.patience(Duration::from_secs(150)) + Duration::from_secs(10);
        let mut place = self.place(from, to, soon)?;
        if place.is_none() {
            self.resolve(from, to)?;
            place = self.place(from, to, late)?;
        }
        let place = place.context("it runs nowhere")?;
        let other = if place.name() == from.name() {
            to
        } else {
            from
        };
        let copy = || -> Result<bool> {
            let process = other.process(self.program.pid)?;
            Ok(process.is_some_and(|p| p.state != 'Z' && p.comm == "random"))
        };
        let quiet = self.wait_for("the end of the other copy", soon, || Ok(!copy()?));
        if quiet.is_err() {
            self.resolve(from, to)?;
            self.wait_for("the end of the other copy", late, || Ok(!copy()?))?;
        }
        Ok(place.name())
    }

    fn resolve(&self, from: &dyn Host, to: &dyn Host) -> Result<()> {
        for host in [to, from] {
            host.exec(&self.pmig("resolve", &[]))?;
        }
        Ok(())
    }

    /// The host on which it goes on writing; none after that time.
    fn place(
        &self,
        from: &'a dyn Host,
        to: &'a dyn Host,
        within: Duration,
    ) -> Result<Option<&'a dyn Host>> {
        let deadline = Instant::now() + within;
        let hosts = [from, to];
        let alive = |host: &dyn Host| -> Result<bool> {
            let process = host.process(self.program.pid)?;
            Ok(process.is_some_and(|p| p.state != 'Z'))
        };
        let mut lengths = hosts.map(|host| self.length(host));
        while Instant::now() < deadline {
            self.pause();
            let now = hosts.map(|host| self.length(host));
            let grown = [now[0] > lengths[0], now[1] > lengths[1]];
            lengths = now;
            for (host, other) in [(0, 1), (1, 0)] {
                // Its file is there before it.
                if !grown[host] || !alive(hosts[host])? {
                    continue;
                }
                let was = [self.length(hosts[host]), self.length(hosts[other])];
                self.pause();
                let is = [self.length(hosts[host]), self.length(hosts[other])];
                if is[0] > was[0] {
                    ensure!(is[1] == was[1], "it runs on both hosts");
                    return Ok(Some(hosts[host]));
                }
            }
        }
        Ok(None)
    }

    /// Every line is there, once and in order.
    fn right(&self, text: &str) -> Result<()> {
        let mut last = String::new();
        let mut found = text.lines();
        for expected in lines(self.seed) {
            let line = found.next().context("it has no last line")?;
            if line != expected {
                let value = last.split(' ').nth(1).unwrap_or_default();
                let pass = format!("PASS checksum {value}");
                ensure!(
                    line == pass && found.next().is_none(),
                    "{line:?} follows {last:?} instead of {expected:?}"
                );
                return Ok(());
            }
            last = expected;
        }
        Ok(())
    }
}

/// What is done to memory behind the program's back, in Python: `mem` is its
/// memory, `at` a page of it that has content, `page` what it is.
const HARM: [(&str, &str); 4] = [
    (
        "a_bit_that_flips_is_noticed",
        "put(at + 77, bytes([page[77] ^ 4]))",
    ),
    ("a_page_that_is_lost_is_noticed", "put(at, bytes(4096))"),
    (
        "a_page_in_another_ones_place_is_noticed",
        "put(at, get(other))",
    ),
    (
        "a_page_that_comes_back_to_life_is_noticed",
        "old = get(at)\nwhile get(at) == old: pass\nput(at, old)",
    ),
];

/// The program must fail when its memory is not what it must be.
fn harmed(lab: &Lab, harm: &str) -> Result<()> {
    let a = lab.a();
    let output = "/srv/work/harmed".to_owned();
    let argv: Vec<String> = ["random", "seed=1", "mb=4", "pace_us=1000"]
        .map(String::from)
        .into();
    let pid = a.spawn(&Cmd::new(argv.clone()), &output)?;
    let program = Program { pid, argv, output };
    a.wait_for("some lines", LIMIT, &mut || {
        Ok(program.written(a)?.lines().count() > 20)
    })?;
    let script = format!(
        r#"
import time
pid = {pid}
mem = open("/proc/%d/mem" % pid, "r+b", buffering=0)
def get(at):
    mem.seek(at)
    return mem.read(4096)
def put(at, what):
    mem.seek(at)
    mem.write(what)
def pages():
    for line in open("/proc/%d/maps" % pid):
        start, end = (int(n, 16) for n in line.split()[0].split("-"))
        if start < 0x20000000 and line.split()[4] == "0":
            yield from range(start, end, 4096)
full = [at for at in pages() if get(at).count(0) < 2000]
at, other = full[0], full[-1]
page = get(at)
{harm}
"#
    );
    a.write("/srv/work/harm.py", 0o644, script.as_bytes())?;
    // What it does to a page that is unmapped or written at that moment is no
    // harm; so it is done until the program fails.
    a.wait_for("the harm to be noticed", LIMIT, &mut || {
        let _ = a.sh("timeout 5 python3 /srv/work/harm.py 2>/dev/null");
        let text = program.written(a)?;
        Ok(text.lines().any(|line| line.starts_with("FAIL")))
    })?;
    let said = tail(&program.written(a)?);
    let words = ["FAIL seed 1 line", "instead of 0x", "last done to it:"];
    for word in words {
        ensure!(said.contains(word), "no word of {word:?} in: {said}");
    }
    Ok(())
}
