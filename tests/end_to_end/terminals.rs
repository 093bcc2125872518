//! Programs on terminals, and people who look at them and type.

use anyhow::{ensure, Context, Result};
use lab::harness::{CannotHere, Trial};
use lab::scenario::{gone, migrate, wait, Moved, Program, Through, Way, LIMIT};
use lab::terminal::Terminal;
use lab::{Cmd, Host, Lab, Make, Status};
use pmig::phase::Phase;
use std::time::Duration;

type Claim = (&'static str, fn(&Lab, Way) -> Result<()>);
type PlainClaim = (&'static str, fn(&Lab) -> Result<()>);

/// Tried with every way to bring a program there.
const CLAIMS: &[Claim] = &[
    ("bash_goes_on_amid_a_line", bash),
    ("vim_goes_on_amid_an_insertion", vim),
    ("less_goes_on_at_its_page", less),
    ("python_goes_on_at_its_prompt", python),
    ("what_was_typed_ahead_goes_along", typed_ahead),
];

const PLAIN: &[PlainClaim] = &[
    ("a_program_goes_from_anywhere_to_anywhere", to_and_fro),
    ("a_terminal_keeps_its_size_and_its_owner", size_and_owner),
    ("a_job_in_the_background_gets_plain_modes", background),
    (
        "a_program_of_a_shell_gets_a_terminal_of_its_own",
        of_a_shell,
    ),
    ("a_program_whose_terminal_hung_up_moves", hung_up),
    ("a_move_sends_no_signal_by_the_terminal", no_signal),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (make, pcb) in [
        (Make::Netns, "ptrace"),
        (Make::Vm, "ptrace"),
        (Make::Vm, "kmod"),
    ] {
        for through in [Through::Wire, Through::File] {
            for (name, body) in CLAIMS {
                let way = match through {
                    Through::Wire => pcb.to_owned(),
                    Through::File => format!("{pcb}::file"),
                };
                trials.push(Trial::new(make, format!("terminals::{way}::{name}"), {
                    move |lab| {
                        if pcb == "kmod" && lab.a().sh("test -e /dev/pmig").is_err() {
                            return Err(CannotHere("the kernel module is not there".into()).into());
                        }
                        body(lab, Way::new(pcb, through))
                    }
                }));
            }
        }
    }
    for phase in Phase::ALL.into_iter().filter(|p| *p >= Phase::Freeze) {
        for (kind, role) in [
            ("kill", "source"),
            ("cut", "source"),
            ("stall", "source"),
            ("kill", "keeper"),
        ] {
            let name = format!("terminals::{role}_{kind}_at_{phase}_loses_no_key");
            let fault = format!("{phase}:{kind}:{role}");
            let body = move |lab: &Lab| no_key_lost(lab, &fault);
            trials.push(Trial::new(Make::Netns, name, body));
        }
    }
    for make in [Make::Netns, Make::Vm] {
        for (name, body) in PLAIN {
            trials.push(Trial::new(make, format!("terminals::{name}"), body));
        }
    }
    trials
}

/// Starts a program under `pmig run`.
pub fn run(host: &dyn Host, words: &[&str]) -> Result<Program> {
    let all = ["pmig", "run", "--detach", "--"].iter().chain(words);
    let cmd = Cmd::new(all.copied()).env("TERM", "xterm-256color");
    let said = host.exec(&cmd)?.ok()?.out();
    Ok(Program {
        pid: said.trim().parse().with_context(|| said.clone())?,
        argv: words.iter().map(|w| (*w).to_owned()).collect(),
        output: String::new(),
    })
}

/// Brings it from a to b, where nothing of it was before.
fn bring(lab: &Lab, program: &Program, way: Way) -> Result<Moved> {
    let moved = way.bring(lab.a(), lab.b(), program)?;
    moved.ok()?;
    gone(lab.a(), program.pid)?;
    Ok(moved)
}

fn bash(lab: &Lab, way: Way) -> Result<()> {
    let program = run(lab.a(), &["bash", "--norc"])?;
    let mut here = Terminal::attach(lab.a(), program.pid)?;
    here.sees("bash-")?;
    here.types("x=4; echo $((x+1))$x; trap 'echo resized' WINCH\n")?;
    here.sees("54")?;
    here.types("echo half")?;
    here.sees("half")?;
    here.detach()?;
    bring(lab, &program, way)?;
    let mut there = Terminal::attach(lab.b(), program.pid)?;
    // What was on its screen, and the line that is not finished yet.
    there.sees("54")?;
    there.sees("echo half")?;
    there.types("way$x\n")?;
    there.sees("halfway4")?;
    // The programs that it starts have its terminal too.
    there.types("stty size; tty\n")?;
    there.sees("24 80")?;
    there.sees("/dev/pts/")?;
    there.resize(30, 100)?;
    there.sees("resized")?;
    there.types("stty size\n")?;
    there.sees("30 100")?;
    // Control-C is for what runs in front.
    there.types("sleep 1000\n")?;
    std::thread::sleep(Duration::from_millis(500));
    there.types("\x03")?;
    there.types("echo $?-done; exit 7\n")?;
    there.sees("130-done")?;
    there.sees("ended with exit code 7]")?;
    ensure!(there.ends()? == Status::Code(7));
    Ok(())
}

fn vim(lab: &Lab, way: Way) -> Result<()> {
    // Larger builds of vim keep a thread for a timer.
    lab::tools::need(&["vim.tiny"], &|what| println!("{what}"))?;
    lab.a().write("/srv/work/text", 0o644, b"first line\n")?;
    let words = ["vim.tiny", "-u", "NONE", "-N", "/srv/work/text"];
    let program = run(lab.a(), &words)?;
    let mut here = Terminal::attach(lab.a(), program.pid)?;
    here.sees("first line")?;
    here.types("osecond line, written on a")?;
    here.sees("written on a")?;
    here.detach()?;
    bring(lab, &program, way)?;
    let mut there = Terminal::attach(lab.b(), program.pid)?;
    there.sees("first line")?;
    there.sees("written on a")?;
    there.types(" and on b\x1b:wq\r")?;
    there.sees("ended]")?;
    ensure!(there.ends()? == Status::Code(0));
    let text = lab.b().read("/srv/work/text")?;
    let text = String::from_utf8_lossy(&text);
    ensure!(
        text == "first line\nsecond line, written on a and on b\n",
        "{text:?}"
    );
    Ok(())
}

fn less(lab: &Lab, way: Way) -> Result<()> {
    lab::tools::need(&["less"], &|what| println!("{what}"))?;
    let text: String = (1..=500)
        .map(|n| format!("line {n} of the text\n"))
        .collect();
    // What is only read has to be there.
    for host in [lab.a(), lab.b()] {
        host.write("/srv/work/text", 0o644, text.as_bytes())?;
    }
    let program = run(lab.a(), &["less", "/srv/work/text"])?;
    let mut here = Terminal::attach(lab.a(), program.pid)?;
    here.sees("line 23 of")?;
    here.types(" ")?;
    here.sees("line 46 of")?;
    here.detach()?;
    bring(lab, &program, way)?;
    let mut there = Terminal::attach(lab.b(), program.pid)?;
    let before = there.sees("line 46 of")?;
    ensure!(!before.contains("line 23 of"), "{before}");
    there.types(" ")?;
    there.sees("line 69 of")?;
    there.types("q")?;
    there.sees("ended]")?;
    there.ends().map(drop)
}

fn python(lab: &Lab, way: Way) -> Result<()> {
    let program = run(lab.a(), &["python3", "-q", "-E"])?;
    let mut here = Terminal::attach(lab.a(), program.pid)?;
    here.sees(">>> ")?;
    here.types("n = 20\n")?;
    here.sees(">>> ")?;
    here.types("n + ")?;
    here.sees("n + ")?;
    here.detach()?;
    bring(lab, &program, way)?;
    let mut there = Terminal::attach(lab.b(), program.pid)?;
    there.sees("n + ")?;
    there.types("n + 2\n")?;
    there.sees("42")?;
    there.types("exit(3)\n")?;
    there.sees("ended with exit code 3]")?;
    there.ends().map(drop)
}

/// Reads nothing for as long as a file is not there, then four lines.
const SLOW_READER: &str = "\
import os, sys, time
sys.stdout.write('ready\\n'); sys.stdout.flush()
while not os.path.exists('/srv/work/read'): time.sleep(0.02)
print('got', [os.read(0, 100) for _ in range(4)], flush=True)
time.sleep(1000)
";

/// What is typed for it: a line, an end of file behind some words, one alone,
/// and a line that is not finished.
const AHEAD: &str = "one\ntwo\x04\x04thre\x7fe";
const GOT: &str = "got [b'one\\n', b'two', b'', b'three\\n']";

fn typed_ahead(lab: &Lab, way: Way) -> Result<()> {
    let program = slow_reader(lab.a())?;
    bring(lab, &program, way)?;
    reads_all(lab.b(), &program)
}

/// One that has not read yet what was typed.
fn slow_reader(host: &dyn Host) -> Result<Program> {
    let program = run(host, &["python3", "-c", SLOW_READER])?;
    let mut here = Terminal::attach(host, program.pid)?;
    here.sees("ready")?;
    here.types(AHEAD)?;
    here.sees("e")?;
    std::thread::sleep(Duration::from_millis(300));
    here.detach()?;
    Ok(program)
}

/// Waits until who looks at a program hands on every key as it is: by what is
/// shown that cannot be seen.
fn raw(host: &dyn Host) -> Result<()> {
    let raw = "for p in $(pgrep -x pmig); do stty -a < /proc/$p/fd/0; done 2>/dev/null \
               | grep -q -- -icanon";
    wait("the terminal to be raw", LIMIT, || Ok(host.sh(raw).is_ok()))
}

/// The rest is typed, and it reads.
fn reads_all(host: &dyn Host, program: &Program) -> Result<()> {
    let mut there = Terminal::attach(host, program.pid)?;
    raw(host)?;
    // The unfinished line can still be corrected.
    there.types("x\x7fe\n")?;
    host.write("/srv/work/read", 0o644, b"")?;
    there.sees(GOT)?;
    there.detach()
}

fn no_key_lost(lab: &Lab, fault: &str) -> Result<()> {
    let program = slow_reader(lab.a())?;
    let env = [("PMIG_FAULT", fault), ("PMIG_PATIENCE_MS", "2000")];
    // However it ends: whoever stalls is ended by the keeper.
    migrate(lab.a(), lab.b(), &program, "", &env)?;
    let mut place = None;
    wait("it to run in one place", LIMIT, || {
        let runs = |host: &dyn Host| -> Result<bool> {
            // What is left to be decided is.
            let _ = host.exec(&Cmd::new(["pmig", "resolve"]))?;
            Ok(host.process(program.pid)?.is_some_and(|p| p.state != 'Z'))
        };
        place = match (runs(lab.a())?, runs(lab.b())?) {
            (true, false) => Some(lab.a()),
            (false, true) => Some(lab.b()),
            _ => None,
        };
        Ok(place.is_some())
    })?;
    reads_all(place.context("it is nowhere")?, &program)
}

fn to_and_fro(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let program = run(a, &["bash", "--norc"])?;
    let mut hosts = [a, b];
    for round in 0..6 {
        let [from, to] = hosts;
        let mut here = Terminal::attach(from, program.pid)?;
        here.types(&format!("r{round}=$((1000+{round}))\n"))?;
        // Whoever looks on is told where it went.
        migrate(from, to, &program, "", &[])?.ok()?;
        here.sees("runs on ")?;
        here.ends()?;
        hosts.swap(0, 1);
    }
    let mut here = Terminal::attach(a, program.pid)?;
    here.types("echo $r0-$r1-$r2-$r3-$r4-$r5\n")?;
    here.sees("1000-1001-1002-1003-1004-1005")?;
    // Its clocks are its own by now, and those of what it starts.
    here.types("p=$(pmig run -d -- sleep 1000); pmig attach --key ^e $p\n")?;
    std::thread::sleep(Duration::from_millis(500));
    here.types("\x05")?;
    here.sees("[detached")?;
    here.types("kill -9 $p\n")?;
    here.types("exit\n")?;
    here.ends().map(drop)
}

fn size_and_owner(lab: &Lab) -> Result<()> {
    let code = "\
import os, time
os.chown(0, 65534, 5); os.fchmod(0, 0o640)
while True:
    node = os.fstat(0)
    print(os.get_terminal_size(), node.st_uid, node.st_gid, oct(node.st_mode), flush=True)
    time.sleep(0.1)
";
    let program = run(lab.a(), &["python3", "-c", code])?;
    let mut here = Terminal::attach(lab.a(), program.pid)?;
    here.resize(40, 120)?;
    let expected = "columns=120, lines=40) 65534 5 0o20640";
    here.sees(expected)?;
    here.detach()?;
    migrate(lab.a(), lab.b(), &program, "", &[])?.ok()?;
    let pid = program.pid.to_string();
    let mut there = Terminal::open(lab.b(), &["pmig", "attach", "--watch", &pid])?;
    for _ in 0..60 {
        there.sees(expected)?;
    }
    there.detach()?;
    lab.b().signal(program.pid, 9)
}

/// It has a descriptor more at one moment and one less at the next, so that the table
/// of the freeze is mostly another than the one known before.
const LISTENER: &str = "\
import os, signal, time
seen = []
for s in (signal.SIGHUP, signal.SIGCONT, signal.SIGWINCH):
    signal.signal(s, lambda n, f: seen.append(n))
while not os.path.exists('/srv/work/tell'):
    fd = os.open('/dev/null', os.O_RDONLY)
    time.sleep(0.001)
    os.close(fd)
    time.sleep(0.001)
with open('/srv/work/seen', 'w') as out:
    print('seen', seen, file=out)
";

fn no_signal(lab: &Lab) -> Result<()> {
    let mut hosts = [lab.a(), lab.b()];
    let program = run(hosts[0], &["python3", "-c", LISTENER])?;
    wait("it to listen", LIMIT, || {
        let caught = format!(
            "grep -q 'SigCgt:.*[89a-f]......$' /proc/{}/status",
            program.pid
        );
        Ok(hosts[0].sh(&caught).is_ok())
    })?;
    for _ in 0..6 {
        migrate(hosts[0], hosts[1], &program, "--pcb ptrace", &[])?.ok()?;
        hosts.swap(0, 1);
    }
    hosts[0].write("/srv/work/tell", 0o644, b"")?;
    gone_soon(hosts[0], program.pid)?;
    let seen = String::from_utf8(hosts[0].read("/srv/work/seen")?)?;
    ensure!(seen == "seen []\n", "{seen}");
    Ok(())
}

fn background(lab: &Lab) -> Result<()> {
    let a = lab.a();
    a.write("/srv/work/slow.py", 0o644, SLOW_READER.as_bytes())?;
    let shell = run(a, &["bash", "--norc"])?;
    let mut here = Terminal::attach(a, shell.pid)?;
    here.types("python3 /srv/work/slow.py & echo job $!.\n")?;
    here.sees("\njob ")?;
    let pid = here.sees(".")?;
    here.sees("ready")?;
    // Back at its prompt, bash has set its own.
    here.types("echo at the $((1+1))nd prompt\n")?;
    here.sees("2nd prompt")?;
    let program = Program {
        pid: pid.trim().parse().with_context(|| pid.clone())?,
        argv: Vec::new(),
        output: String::new(),
    };
    migrate(a, lab.b(), &program, "", &[])?.ok()?;
    let mut there = Terminal::attach(lab.b(), program.pid)?;
    raw(lab.b())?;
    there.types(AHEAD)?;
    std::thread::sleep(Duration::from_millis(200));
    there.detach()?;
    reads_all(lab.b(), &program)?;
    // What was typed at the prompt stayed with the shell.
    here.types("exit\n")?;
    here.sees("exit")?;
    here.types("exit\n")?;
    here.sees("ended")?;
    here.ends().map(drop)
}

fn of_a_shell(lab: &Lab) -> Result<()> {
    let mut shell = Terminal::open(lab.a(), &["bash", "--norc"])?;
    shell.types("python3 -q -E; echo shell goes on: $?\n")?;
    shell.sees(">>> ")?;
    shell.types("import os; n = 5; print('pid', os.getpid(), 'end')\n")?;
    // After the echo of what was typed.
    shell.sees("\npid ")?;
    let pid = shell.sees(" end")?;
    let program = Program {
        pid: pid.trim().parse().with_context(|| pid.clone())?,
        argv: Vec::new(),
        output: String::new(),
    };
    shell.sees(">>> ")?;
    let said = lab.a().sh(&format!("pmig check {pid}"))?;
    ensure!(said.contains("terminal"), "{said}");
    migrate(lab.a(), lab.b(), &program, "", &[])?.ok()?;
    shell.sees("shell goes on: 137")?;
    let mut there = Terminal::attach(lab.b(), program.pid)?;
    there.types("n + 37\n")?;
    there.sees("42")?;
    there.types("os.isatty(0), os.ttyname(0), os.getsid(0) == os.getpid()\n")?;
    there.sees("(True, '/dev/pts/")?;
    there.sees("True)")?;
    there.types("open('/dev/tty', 'w').write('seen\\n') and exit()\n")?;
    there.sees("seen")?;
    there.ends()?;
    shell.types("exit\n")?;
    shell.ends().map(drop)
}

/// A terminal emulator that shows nothing.
const EMULATOR: &str = "\
import os, pty, sys
pid, fd = pty.fork()
if pid == 0: os.execvp('python3', ['python3', '-c', sys.argv[1]])
while True: os.read(fd, 4096)
";

/// What is left to a program whose terminal hung up.
const ABANDONED: &str = "\
import os, signal, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
log = open('/srv/work/log', 'w')
while not os.path.exists('/srv/work/stop'): time.sleep(0.05)
try: log.write('read %r, ' % os.read(0, 10))
except OSError as e: log.write('errno %d, ' % e.errno)
try: os.write(1, b'x')
except OSError as e: log.write('errno %d\\n' % e.errno)
";

/// Starts that on a, and has its terminal hang up.
fn abandoned(lab: &Lab, code: &str) -> Result<Program> {
    let cmd = Cmd::new(["python3", "-c", EMULATOR, code]);
    let emulator = lab.a().spawn(&cmd, "/dev/null")?;
    let mut found = None;
    wait("the program to begin", LIMIT, || {
        let all = lab.a().ps()?;
        let ours = |p: &&lab::wire::Process| p.ppid == emulator && p.cmdline.len() == 3;
        found = all.iter().find(ours).map(|p| p.pid);
        Ok(found.is_some() && lab.a().sh("test -e /srv/work/log").is_ok())
    })?;
    lab.a().signal(emulator, 9)?;
    let pid = found.context("it is not there")?;
    wait("the terminal to hang up", LIMIT, || {
        let tty = lab.a().sh(&format!("readlink /proc/{pid}/fd/0"))?;
        Ok(tty.contains("deleted"))
    })?;
    Ok(Program {
        pid,
        argv: Vec::new(),
        output: String::new(),
    })
}

fn hung_up(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let program = abandoned(lab, ABANDONED)?;
    migrate(a, b, &program, "--files ship", &[])?.ok()?;
    gone(a, program.pid)?;
    b.write("/srv/work/stop", 0o644, b"")?;
    gone_soon(b, program.pid)?;
    let log = b.sh("cat /srv/work/log")?;
    ensure!(log == "read b'', errno 5\n", "{log:?}");

    // By that name there is none any more.
    a.sh("rm -f /srv/work/log")?;
    let code = format!("tty = open('/dev/tty')\n{ABANDONED}");
    let program = abandoned(lab, &code)?;
    let moved = migrate(a, b, &program, "--files ship", &[])?;
    moved.failed(3, &["/dev/tty"])?;
    a.signal(program.pid, 9)
}

pub fn gone_soon(host: &dyn Host, pid: u32) -> Result<()> {
    wait("its end", LIMIT, || {
        Ok(host.process(pid)?.is_none_or(|p| p.state == 'Z'))
    })
}
