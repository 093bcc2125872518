//! One program, one migration, and what is left of both.
//!
//! Several cells can share two hosts: each has a directory, records and a port
//! of its own.

use super::proxy::{Act, Message, Proxy};
use anyhow::{bail, ensure, Context, Result};
use lab::victim::hurry;
use lab::{Cmd, Host, Lab, Make, Status};
use serde_json::Value;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything may take before something is wrong.
pub const LIMIT: Duration = Duration::from_secs(120);
/// What is computed: longer than any of it takes, until somebody hurries it.
fn work(make: Make) -> [&'static str; 3] {
    match make {
        Make::Netns => ["iterative", "lines=2000", "pace_us=10000"],
        Make::Vm => ["iterative", "lines=2000", "pace_us=40000"],
    }
}
/// One migration on two hosts that it may share.
pub struct Cell<'a> {
    pub a: &'a dyn Host,
    pub b: &'a dyn Host,
    name: String,
    port: u16,
    expected: String,
    /// All of pmig's deadlines, in this proportion to ten seconds.
    patience_ms: u32,
    /// For sockets: both hosts and we see it.
    shared: TempDir,
}

/// A program whose output, on standard output and in a file, can be checked.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    pub pid: u32,
}

/// A pmig that moves a program, or tries to.
#[derive(Clone, Copy, Debug)]
pub struct Moving {
    pub pid: u32,
}

/// How it ended.
#[derive(Debug)]
pub struct Said {
    pub status: Status,
    pub text: String,
}

impl Said {
    /// The last event of that name.
    pub fn event(&self, name: &str) -> Option<Value> {
        let lines = self.text.lines().rev();
        let mut events = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.find(|event| event["event"] == name)
    }

    /// The exit code; none if a signal ended it.
    pub fn code(&self) -> Option<i32> {
        match self.status {
            Status::Code(code) => Some(code),
            Status::Signal(_) => None,
        }
    }
}

impl<'a> Cell<'a> {
    /// Prepares a cell on both hosts.
    pub fn new(lab: &'a Lab, name: &str) -> Result<Self> {
        static PORT: AtomicU16 = AtomicU16::new(17_000);
        let cell = Self {
            a: lab.a(),
            b: lab.b(),
            name: name.replace(':', "-"),
            port: PORT.fetch_add(1, Ordering::Relaxed),
            expected: expected(lab.b())?,
            patience_ms: match lab.make() {
                Make::Netns => 2000,
                Make::Vm => 4000,
            },
            shared: TempDir::new_in("/var/tmp").context("make a directory in /var/tmp")?,
        };
        for host in [cell.a, cell.b] {
            host.sh(&format!("mkdir -p {}", cell.directory()))?;
        }
        Ok(cell)
    }

    /// A deadline of pmig's, as it is kept here.
    pub fn patience(&self, usual: Duration) -> Duration {
        usual * self.patience_ms / 10_000
    }

    pub fn directory(&self) -> String {
        format!("/srv/work/{}", self.name)
    }

    pub fn address(&self) -> String {
        format!("tcp://b:{}", self.port)
    }

    pub fn state(&self) -> String {
        format!("/var/lib/pmig/{}", self.name)
    }

    pub fn run(&self) -> String {
        format!("/run/pmig/{}", self.name)
    }

    /// A pmig with this cell's own records and shortened deadlines.
    pub fn pmig(&self, words: &str, env: &[(&str, &str)]) -> Cmd {
        let words = std::iter::once("pmig").chain(words.split_whitespace());
        let mut cmd = Cmd::new(words)
            .env("PMIG_STATE_DIR", &self.state())
            .env("PMIG_RUN_DIR", &self.run())
            .env("PMIG_PATIENCE_MS", &self.patience_ms.to_string());
        for (name, value) in env {
            cmd = cmd.env(name, value);
        }
        cmd
    }

    /// Starts `pmig serve` on b; gives its PID.
    pub fn serve(&self, env: &[(&str, &str)]) -> Result<u32> {
        self.serve_at(&format!("tcp://0.0.0.0:{}", self.port), env)
    }

    /// Somebody between the hosts who hears all; namespaces only.
    pub fn proxy(&self, hook: impl Fn(Message) -> Act + Send + Sync + 'static) -> Result<Proxy> {
        Proxy::start(
            &self.shared.path().join("a"),
            &self.shared.path().join("b"),
            hook,
        )
    }

    /// Starts `pmig serve` on b where [`Cell::proxy`] reaches it.
    pub fn serve_shared(&self) -> Result<u32> {
        self.serve_at(&format!("unix:{}/b", self.shared.path().display()), &[])
    }

    fn serve_at(&self, listen: &str, env: &[(&str, &str)]) -> Result<u32> {
        let log = format!("/run/serve-{}", self.name);
        let words = format!("serve -v --listen {listen} --insecure");
        let pid = self.b.spawn(&self.pmig(&words, env), &log)?;
        self.b.wait_for("pmig serve listening", LIMIT, &mut || {
            let said = self.b.read(&log)?;
            let said = String::from_utf8_lossy(&said);
            ensure!(self.b.ended(pid)?.is_none(), "pmig serve ended: {said}");
            Ok(said.contains("listening on"))
        })?;
        Ok(pid)
    }

    /// What `pmig serve` and its sessions have logged.
    pub fn log(&self) -> String {
        let log = self.b.read(&format!("/run/serve-{}", self.name));
        let keeper = self.a.sh(&format!(
            "cat /run/pmig/{}/keeper-*.log 2>/dev/null; :",
            self.name
        ));
        format!(
            "{}{}",
            String::from_utf8_lossy(&log.unwrap_or_default()),
            keeper.unwrap_or_default()
        )
    }

    /// Starts the program on a and waits until it gets on.
    pub fn start(&self) -> Result<Program> {
        let file = format!("file={}/own", self.directory());
        let words = [&work(self.a.make())[..], &[&file]].concat();
        let cmd = Cmd::new(words).cwd(&self.directory());
        let pid = self.a.spawn(&cmd, &format!("{}/out", self.directory()))?;
        let program = Program { pid };
        self.a.wait_for("five lines", LIMIT, &mut || {
            Ok(self.output(self.a)?.lines().count() >= 5)
        })?;
        Ok(program)
    }

    /// Starts to move the program to an address.
    pub fn migrate_to(
        &self,
        program: Program,
        address: &str,
        env: &[(&str, &str)],
    ) -> Result<Moving> {
        let words = format!(
            "migrate {} {address} --insecure --json -v --files ship",
            program.pid
        );
        self.begin(&words, env)
    }

    /// Starts to write the program to a file.
    pub fn dump(&self, program: Program, more: &str, env: &[(&str, &str)]) -> Result<Moving> {
        let words = format!("dump {} -o {} --json -v {more}", program.pid, self.file());
        self.begin(&words, env)
    }

    /// Where [`Cell::dump`] writes to.
    pub fn file(&self) -> String {
        format!("{}/program.pmig", self.directory())
    }

    fn begin(&self, words: &str, env: &[(&str, &str)]) -> Result<Moving> {
        let pid = self.a.spawn(&self.pmig(words, env), &self.said_at())?;
        Ok(Moving { pid })
    }

    fn said_at(&self) -> String {
        format!("/run/migrate-{}", self.name)
    }

    /// How the migration ended; none if it goes on after that time.
    pub fn said(&self, moving: Moving, within: Duration) -> Result<Option<Said>> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.a.ended(moving.pid)? {
                let text = self.a.read(&self.said_at())?;
                let text = String::from_utf8_lossy(&text).into_owned();
                return Ok(Some(Said { status, text }));
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// What the program wrote, as that host has it; nothing where there is no
    /// such file.
    pub fn output(&self, host: &dyn Host) -> Result<String> {
        host.sh(&format!("cat {}/out 2>/dev/null; :", self.directory()))
    }

    /// Waits for the program's end, and says where that was.
    pub fn finish(&self, program: Program) -> Result<&'a dyn Host> {
        self.finish_within(program, LIMIT)?
            .context("the program ends nowhere")
    }

    /// The same; none if it did not end within that time.
    pub fn finish_within(
        &self,
        program: Program,
        within: Duration,
    ) -> Result<Option<&'a dyn Host>> {
        for host in [self.a, self.b] {
            host.write(&hurry(program.pid), 0o644, b"")?;
        }
        let deadline = Instant::now() + within;
        loop {
            for host in [self.a, self.b] {
                let output = self.output(host)?;
                let word = |word: &str| output.lines().any(|line| line.starts_with(word));
                ensure!(!word("FAIL"), "{}: {output}", host.name());
                if word("PASS") {
                    self.whole(program, host)?;
                    return Ok(Some(host));
                }
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The program's output is whole there, and the other host has nothing of
    /// it that runs or could run.
    fn whole(&self, program: Program, host: &dyn Host) -> Result<()> {
        same(&self.output(host)?, &self.expected)
            .with_context(|| format!("its output on {}", host.name()))?;
        let own = host.sh(&format!("cat {}/own", self.directory()))?;
        let (lines, _) = self.expected.split_once("PASS").context("no last line")?;
        same(&own, lines).with_context(|| format!("its file on {}", host.name()))?;
        let other = if host.name() == "a" { self.b } else { self.a };
        other.wait_for("the end of the other copy", LIMIT, &mut || {
            let copy = other.process(program.pid)?;
            Ok(copy.is_none_or(|copy| copy.state == 'Z' || copy.comm != "iterative"))
        })?;
        let rest = self.output(other)?;
        ensure!(
            self.expected.starts_with(&rest) && rest.len() < self.expected.len(),
            "it wrote on {} too: {rest}",
            other.name()
        );
        Ok(())
    }

    /// What pmig left on the hosts that it should not have.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        let line = format!(
            "for d in {state}/source/*/ {state}/target/*/; do
                 [ ! -d $d ] || [ -e $d/settled ] || echo unsettled $d $(ls $d)
             done
             find {directory} -name '.pmig-*' -o -name '*.pmig-*'
             for e in $(find /sys/fs/cgroup -path '*pmig*' -name cgroup.events); do
                 d=$(dirname $e)
                 id=$(basename $d | sed 's/^pmig-//; s/-source$//; s/-target$//')
                 [ -d {state}/source/$id ] || [ -d {state}/target/$id ] || continue
                 case $d in *-source) echo $d $(cat $e);; esac
                 grep -q 'frozen 1' $e && echo frozen $d
             done 2>/dev/null; :",
            state = self.state(),
            directory = self.directory()
        );
        let mut all = Vec::new();
        for host in [self.a, self.b] {
            let found = host.sh(&line)?;
            all.extend(found.lines().map(|line| format!("{}: {line}", host.name())));
            for id in host
                .sh(&format!(
                    "ls {}/source {0}/target 2>/dev/null; :",
                    self.state()
                ))?
                .lines()
            {
                let keeper = |cmdline: &[String]| cmdline.iter().any(|word| word == id);
                let left = host.ps()?.into_iter().filter(|p| keeper(&p.cmdline));
                all.extend(left.map(|p| format!("{}: {:?}", host.name(), p.cmdline)));
            }
        }
        Ok(all)
    }

    /// Waits until nothing is left behind.
    pub fn clean(&self, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        loop {
            let left = self.leftovers()?;
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("left behind: {left:#?}");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// What the program writes when nobody moves it. The two makes may have other
/// vector registers, which are part of the checksum.
fn expected(host: &dyn Host) -> Result<String> {
    static KNOWN: [OnceLock<String>; 2] = [const { OnceLock::new() }; 2];
    let known = &KNOWN[usize::from(host.make() == Make::Vm)];
    if let Some(known) = known.get() {
        return Ok(known.clone());
    }
    let [program, lines, _] = work(host.make());
    let output = host.exec(&Cmd::new([program, lines, "pace_us=0"]))?;
    let output = output.ok()?.out();
    ensure!(output.contains("PASS"), "{output}");
    Ok(known.get_or_init(|| output).clone())
}

fn same(written: &str, expected: &str) -> Result<()> {
    let mut pairs = written.lines().zip(expected.lines()).enumerate();
    if let Some((number, (one, other))) = pairs.find(|(_, (one, other))| one != other) {
        bail!("line {number} is {one:?} instead of {other:?}");
    }
    ensure!(
        written == expected,
        "{} bytes instead of {}",
        written.len(),
        expected.len()
    );
    Ok(())
}
