//! End to end on real programs: what a program made of itself is captured,
//! and a twin that did nothing of the kind gets it all.

mod foreseen;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::proc::sched::InCall;
use crate::state::restart::Timed;
use crate::tracee::{Ground, RemoteAddr};

/// A python program; killed, with its children, when the test ends.
struct Program {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
    others: Vec<i32>,
    /// Surveyed before anything is timed, as a migration does.
    ground: Option<Ground>,
}

impl Drop for Program {
    fn drop(&mut self) {
        for pid in &self.others {
            let pid = nix::unistd::Pid::from_raw(*pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn python(script: &str) -> Program {
    let mut child = Command::new("python3")
        .args(["-S", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is there");
    let out = BufReader::new(child.stdout.take().unwrap());
    Program {
        child,
        out,
        others: Vec::new(),
        ground: None,
    }
}

impl Program {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim().to_string()
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn stop(&mut self, watch: &mut Watch) -> Stopped {
        let pid = self.pid();
        let ground = self
            .ground
            .get_or_insert_with(|| Ground::survey(pid).unwrap())
            .clone();
        stop(pid, watch).on(ground).unwrap()
    }
}

/// Until it has fallen asleep in a system call.
fn asleep(pid: i32) {
    for _ in 0..400 {
        if Status::read(pid).unwrap().letter == 'S' {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("process {pid} does not sleep");
}

fn stop(pid: i32, watch: &mut Watch) -> Stopped {
    watch.before(pid);
    let stopped = Stopped::seize(pid).unwrap();
    watch.stopped(&stopped, ProgramClock::default()).unwrap();
    stopped
}

fn capture(stopped: &mut Stopped, watch: &Watch) -> Result<Pcb> {
    capture_by(&Backend::Ptrace, stopped, watch)
}

fn capture_by(backend: &Backend, stopped: &mut Stopped, watch: &Watch) -> Result<Pcb> {
    let context = CaptureContext {
        watch,
        clock: ProgramClock::default(),
        files: &Kept::of(stopped.pid()),
        questions: &Questions::new(),
        foreseen: None,
        heap: None,
    };
    let captured = backend.capture(stopped, &context, &mut |_| Ok(()))?;
    Ok(captured.pcb)
}

/// ptrace, and the module where there is one.
fn backends() -> Vec<Backend> {
    let module = Backend::choose(PcbChoice::Kmod);
    if module.is_err() {
        eprintln!("skipped for the kernel module: it is not loaded");
    }
    [Ok(Backend::Ptrace), module]
        .into_iter()
        .flatten()
        .collect()
}

const TWINS: &str = r#"
import ctypes, os, resource, signal, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def must(r):
    if r < 0: raise OSError(ctypes.get_errno(), "call failed")
    return r
def prctl(*a): return must(libc.prctl(*[ctypes.c_ulong(x) for x in a]))
stack = ctypes.create_string_buffer(1 << 16)
twin = os.fork()
if twin == 0:
    while True: signal.pause()
changed = os.fork()
if changed == 0:
    signal.signal(signal.SIGUSR1, lambda *a: None)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    must(libc.sigaltstack(struct.pack("=QiiQ", ctypes.addressof(stack), 0, 0, 1 << 16), None))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, 40, 41})
    os.kill(os.getpid(), signal.SIGUSR1)
    for n in (7, 8, 9): must(libc.sigqueue(os.getpid(), 40, ctypes.c_void_p(n)))
    must(libc.pthread_kill(ctypes.c_ulong(__import__("threading").get_ident()), 41))
    os.umask(0o027)
    prctl(15, ctypes.addressof(name := ctypes.create_string_buffer(b"odd:) name")))
    prctl(29, 123456)
    prctl(36, 1)
    prctl(41, 1, 0, 0, 0)
    must(libc.personality(0x40000))
    open("/proc/self/oom_score_adj", "w").write("300")
    open("/proc/self/coredump_filter", "w").write("0x31")
    os.sched_setaffinity(0, {0})
    os.nice(5)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    must(libc.syscall(251, 1, 0, (3 << 13)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (77, 99))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 4096))
    prctl(24, 39, 0, 0, 0)
    prctl(8, 1, 0, 0, 0)
    os.setgroups([5, 7])
    os.setresgid(100, 101, 102)
    os.setresuid(1000, 1001, 1002)
    header = struct.pack("=Ii", 0x20080522, 0)
    must(libc.syscall(126, header, struct.pack("=6I",
        1 << 13, 1 << 13 | 1 << 10 | 1 << 8, 1 << 13 | 1 << 10, 0, 0, 0)))
    prctl(47, 2, 10, 0, 0)
    must(libc.syscall(126, header, struct.pack("=6I",
        1 << 13 | 1 << 8, 1 << 13 | 1 << 10 | 1 << 8, 1 << 13 | 1 << 10, 0, 0, 0)))
    prctl(28, 0b100011)
    must(libc.syscall(126, header, struct.pack("=6I",
        1 << 13, 1 << 13 | 1 << 10, 1 << 13 | 1 << 10, 0, 0, 0)))
    prctl(38, 1, 0, 0, 0)
    prctl(4, 1)
    prctl(1, 12)
    print(os.getpid(), twin, flush=True)
    while True: signal.pause()
os.waitpid(changed, 0)
"#;

fn twins() -> Option<(Program, i32, i32)> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can give a process what this test wants");
        return None;
    }
    let mut p = python(TWINS);
    let line = p.line();
    let pids: Vec<i32> = line.split(' ').map(|w| w.parse().unwrap()).collect();
    p.others = pids.clone();
    asleep(pids[0]);
    asleep(pids[1]);
    Some((p, pids[0], pids[1]))
}

#[test]
fn a_twin_gets_everything() {
    for backend in backends() {
        a_twin_gets_everything_by(&backend);
    }
}

fn a_twin_gets_everything_by(backend: &Backend) {
    let Some((_program, changed, twin)) = twins() else {
        return;
    };
    let mut watch = backend.watch();
    let mut a = stop(changed, &mut watch);
    let pcb = capture_by(backend, &mut a, &watch).unwrap();
    as_the_program_says(&pcb);
    assert_eq!(capture(&mut a, &watch).unwrap(), pcb, "{}", backend.name());

    let mut b = stop(twin, &mut watch);
    without_rseq(&mut b, &pcb);
    restore_by(backend, &mut b, &pcb);
    b.settle().unwrap();
    let again = capture_by(backend, &mut b, &watch).unwrap();
    assert_eq!(again.registers.general, pcb.registers.general);
    assert_eq!(again.registers.xstate, pcb.registers.xstate);
    assert_eq!(again, pcb);
}

fn restore_by(backend: &Backend, stopped: &mut Stopped, pcb: &Pcb) {
    let mut present = Present::fresh(stopped.pid()).unwrap();
    let clock = ProgramClock::default();
    backend
        .restore(stopped, Batch::new(), pcb, &mut present)
        .unwrap();
    backend.prepare(stopped, pcb, clock).unwrap();
    backend.finish(stopped, pcb, clock).unwrap();
}

#[test]
fn what_was_restored_ahead_is_completed_and_not_done_again() {
    for backend in backends() {
        let Some((_program, changed, twin)) = twins() else {
            return;
        };
        let mut watch = backend.watch();
        let mut a = stop(changed, &mut watch);
        let pcb = capture_by(&backend, &mut a, &watch).unwrap();
        let mut b = stop(twin, &mut watch);
        without_rseq(&mut b, &pcb);
        let mut present = Present::fresh(twin).unwrap();

        // As it was earlier: other values of what is set in each of the ways there are.
        let mut before = pcb.clone();
        before.attributes.comm = b"before".to_vec();
        before.attributes.umask = 0o111;
        before.attributes.oom_score_adj = 500;
        before.attributes.timer_slack += 7;
        before.attributes.tsc = 3 - pcb.attributes.tsc;
        before.signals.altstack = Default::default();
        before.signals.actions[9] = Default::default();
        before.signals.actions[60].flags = 0x1000_0000;
        before.areas.robust_list += 8;
        before.bounds.brk += 4096;
        backend
            .restore_ahead(&mut b, Batch::new(), &before, &mut present)
            .unwrap();
        present.leave_rseq(&mut b).unwrap();

        let clock = ProgramClock::default();
        backend
            .restore(&mut b, Batch::new(), &pcb, &mut present)
            .unwrap();
        backend.prepare(&mut b, &pcb, clock).unwrap();
        backend.finish(&mut b, &pcb, clock).unwrap();
        b.settle().unwrap();
        let again = capture_by(&backend, &mut b, &watch).unwrap();
        assert_eq!(again, pcb, "{}", backend.name());

        let mut batch = Batch::new();
        // Signals on their way are nothing that is there or not.
        let lasting = Pcb {
            signals: pcb.signals.ahead(),
            ..pcb
        };
        present.differs_by(&backend, &lasting, &mut batch).unwrap();
        assert!(batch.is_empty(), "all of it is there");
    }
}

#[test]
fn what_moves_is_told_from_what_stays() {
    let Some((_program, changed, _)) = twins() else {
        return;
    };
    let mut watch = Backend::Ptrace.watch();
    let mut a = stop(changed, &mut watch);
    let pcb = capture(&mut a, &watch).unwrap();
    let mut later = pcb.clone();
    later.registers.general.rip += 1;
    later.registers.xstate[100] ^= 1;
    later.signals.mask ^= 4;
    later.signals.shared.clear();
    assert_eq!(pcb.moved_on(later.moving()), later);
    later.attributes.umask ^= 1;
    assert_ne!(pcb.moved_on(later.moving()), later);
}

/// A husk has no rseq area; other processes do.
fn without_rseq(stopped: &mut Stopped, pcb: &Pcb) {
    let Some(r) = pcb.areas.rseq else { return };
    let mut batch = Batch::new();
    batch.call(
        "unregister rseq",
        libc::SYS_rseq,
        &[
            r.address.into(),
            r.size.into(),
            1u64.into(),
            r.signature.into(),
        ],
    );
    stopped.run(batch).unwrap();
}

/// Compared with the constants of the script above.
fn as_the_program_says(pcb: &Pcb) {
    let c = &pcb.credentials;
    assert_eq!(
        (c.uid.real, c.uid.effective, c.uid.saved),
        (1000, 1001, 1002)
    );
    assert_eq!((c.gid.real, c.gid.effective, c.gid.saved), (100, 101, 102));
    assert_eq!((c.uid.fs, c.gid.fs), (1001, 101));
    assert_eq!(c.groups, vec![5, 7]);
    assert_eq!(c.capabilities.effective, 1 << 13);
    assert_eq!(c.capabilities.permitted, 1 << 13 | 1 << 10);
    assert_eq!(c.capabilities.inheritable, 1 << 13 | 1 << 10);
    assert_eq!(c.capabilities.ambient, 1 << 10);
    assert_eq!(c.capabilities.bounding >> 39 & 1, 0);
    assert_eq!(c.securebits, 0b10_0011);
    assert!(c.no_new_privs);
    let a = &pcb.attributes;
    assert_eq!(a.comm, b"odd:) name");
    assert_eq!((a.umask, a.personality), (0o027, 0x40000));
    assert_eq!((a.parent_death_signal, a.dumpable), (12, 1));
    assert!(a.child_subreaper && a.thp_disable == 1);
    assert_eq!((a.timer_slack, a.oom_score_adj), (123_456, 300));
    assert_eq!(a.coredump_filter, 0x31);
    let s = &pcb.scheduling;
    assert_eq!((s.policy, s.nice, s.io_priority), (3, 5, 3 << 13));
    if crate::state::scheduling::online().len() > 1 {
        assert_eq!(s.cpus, Some(vec![0]));
    }
    assert_eq!(pcb.limits.0[7].soft, 77);
    assert_eq!(pcb.limits.0[7].hard, 99);
    let sig = &pcb.signals;
    assert_eq!(sig.mask, 1 << 9 | 1 << 39 | 1 << 40);
    assert_eq!((sig.altstack.flags, sig.altstack.size), (0, 1 << 16));
    assert!(sig.actions[9].handler > 1 && sig.actions[9].restorer != 0);
    assert_eq!(sig.actions[11].handler, 1);
    let numbers = |q: &[crate::state::signals::SigInfo]| -> Vec<i32> {
        q.iter().map(|i| i.signal()).collect()
    };
    assert_eq!(numbers(&sig.shared), vec![10, 40, 40, 40]);
    assert_eq!(numbers(&sig.private), vec![41]);
    let values: Vec<u8> = sig.shared[1..].iter().map(|i| i.bytes()[24]).collect();
    assert_eq!(values, vec![7, 8, 9]);
    assert_eq!(pcb.restart, Restart::Registers);
}

#[test]
fn it_travels_unchanged() {
    let mut p = python("import signal\nprint(1, flush=True)\nsignal.pause()");
    p.line();
    asleep(p.pid());
    let mut watch = Watch::new();
    let mut s = p.stop(&mut watch);
    let pcb = capture(&mut s, &watch).unwrap();
    s.detach().unwrap();
    let config = bincode::config::standard();
    let bytes = bincode::serde::encode_to_vec(&pcb, config).unwrap();
    let (back, n): (Pcb, usize) = bincode::serde::decode_from_slice(&bytes, config).unwrap();
    assert_eq!((back, n), (pcb, bytes.len()));
}

/// Sleeps three seconds in one raw call, and says how it ended and how long it
/// took.
fn sleeper(call: &str) -> Program {
    let mut p = python(&format!(
        "import ctypes, struct, time\n\
         libc = ctypes.CDLL(None, use_errno=True)\n\
         span = ctypes.create_string_buffer(struct.pack('=qq', 3, 0))\n\
         word = ctypes.create_string_buffer(struct.pack('=q', 5))\n\
         moment = ctypes.create_string_buffer(struct.pack('=qq', int(time.monotonic()) + 5, 0))\n\
         A = lambda b: ctypes.c_ulong(ctypes.addressof(b))\n\
         print(0, flush=True)\n\
         input()\n\
         t = time.monotonic()\n\
         r = libc.syscall({call})\n\
         e = ctypes.get_errno() if r < 0 else 0\n\
         print(r, e, time.monotonic() - t, flush=True)\n"
    ));
    p.line();
    p.ground = Some(Ground::survey(p.pid()).unwrap());
    writeln!(p.child.stdin.as_ref().unwrap()).unwrap();
    let reads = |c: InCall| c.number == libc::SYS_read;
    while InCall::read(p.pid()).unwrap().is_none_or(reads) {
        std::thread::sleep(Duration::from_millis(2));
    }
    p
}

fn ended(p: &mut Program) -> (i64, i32, f64) {
    let line = p.line();
    let w: Vec<&str> = line.split(' ').collect();
    (
        w[0].parse().unwrap(),
        w[1].parse().unwrap(),
        w[2].parse().unwrap(),
    )
}

/// Stops it thrice; the third time it is restored as if it were new.
fn through_stops(call: &str, result: (i64, i32)) {
    for backend in backends() {
        through_stops_by(&backend, call, result);
    }
}

fn through_stops_by(backend: &Backend, call: &str, result: (i64, i32)) {
    let by = backend.name();
    let mut p = sleeper(call);
    let begun = Instant::now();
    let mut watch = backend.watch();
    for round in 0..3 {
        std::thread::sleep(Duration::from_millis(150));
        let mut s = p.stop(&mut watch);
        let pcb = capture_by(backend, &mut s, &watch).unwrap();
        let Restart::Timed(Timed { deadline, .. }) = pcb.restart else {
            panic!("{call} by {by}: {:?} in round {round}", pcb.restart);
        };
        let left = deadline - ProgramClock::default().now();
        let due = 3_000_000_000 - begun.elapsed().as_nanos() as i64;
        assert!(
            (left - due).abs() < 500_000_000,
            "{call} by {by}: {left} in round {round}, due {due}"
        );
        if round < 2 {
            watch.going_on(&mut s).unwrap();
        } else {
            without_rseq(&mut s, &pcb);
            restore_by(backend, &mut s, &pcb);
        }
        s.detach().unwrap();
    }
    let (r, e, took) = ended(&mut p);
    assert_eq!((r, e), result, "{call} by {by}");
    assert!((3.0..5.0).contains(&took), "{call} by {by} took {took}");
    eprintln!("{call} by {by} took {took}");
}

#[test]
fn a_sleep_goes_on_to_its_end() {
    through_stops("35, A(span), 0", (0, 0));
}

/// Somebody else stopped it before, so that all that is known of its sleep is a
/// timer that vanishes with it.
#[test]
fn a_restarted_sleep_is_known_by_its_timer() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: only root sees the timers of the machine");
    }
    let mut p = sleeper("35, A(span), 0");
    let begun = Instant::now();
    let mut found = 0;
    for round in 0..10 {
        let mut watch = Watch::new();
        let s = p.stop(&mut watch);
        // On a busy machine other timers vanish in the same moment.
        if let Ok(Restart::Timed(t)) = Restart::capture(&s, &watch) {
            let left = t.deadline - ProgramClock::default().now();
            let due = 3_000_000_000 - begun.elapsed().as_nanos() as i64;
            assert!(
                (left - due).abs() < 500_000_000,
                "{left} in {round}, due {due}"
            );
            found += (s.regs().orig_rax == libc::SYS_restart_syscall as u64) as u32;
        }
        s.detach().unwrap();
        std::thread::sleep(Duration::from_millis(30));
    }
    assert!(found > 0);
}

#[test]
fn a_sleep_that_tells_what_is_left_goes_on_to_its_end() {
    through_stops("35, A(span), A(span)", (0, 0));
    through_stops("230, 1, 0, A(span), 0", (0, 0));
}

#[test]
fn to_prime_a_sleep_leaves_memory_as_it_was() {
    let mut p = sleeper("35, A(span), A(span)");
    let mut watch = Watch::new();
    let mut s = p.stop(&mut watch);
    let regs = s.regs();
    let restart = Restart::capture(&s, &watch).unwrap();
    let Restart::Timed(timed) = restart else {
        panic!("{restart:?} is no sleep");
    };
    let left = |s: &Stopped| {
        let mut left = [0; 16];
        s.read(RemoteAddr(timed.args[1]), &mut left).unwrap();
        left
    };
    let before = left(&s);
    std::thread::sleep(Duration::from_millis(20));
    restart
        .restore(&mut s, &regs, ProgramClock::default())
        .unwrap();
    assert_eq!(left(&s), before);
    s.detach().unwrap();
}

#[test]
fn a_poll_goes_on_to_its_end() {
    through_stops("7, 0, 0, 3000", (0, 0));
}

#[test]
fn a_futex_wait_goes_on_to_its_end() {
    through_stops("202, A(word), 128, 5, A(span), 0, 0", (-1, libc::ETIMEDOUT));
}

/// Waits that their registers tell all of are made again; the second stop
/// finds them behind restart_syscall.
fn again(call: &str, number: i64, wake: impl Fn(&Program) -> bool, result: (i64, i32)) {
    for backend in backends() {
        let mut p = sleeper(call);
        let mut watch = backend.watch();
        for round in 0..3 {
            let mut s = p.stop(&mut watch);
            let pcb = capture_by(&backend, &mut s, &watch).unwrap();
            assert_eq!(pcb.restart, Restart::Again(number), "{call} in {round}");
            if round < 2 {
                watch.going_on(&mut s).unwrap();
            } else {
                without_rseq(&mut s, &pcb);
                restore_by(&backend, &mut s, &pcb);
            }
            s.detach().unwrap();
            asleep(p.pid());
        }
        assert!(wake(&p));
        let (r, e, _) = ended(&mut p);
        assert_eq!((r, e), result, "{call} by {}", backend.name());
    }
}

#[test]
fn a_wait_until_a_moment_is_made_again() {
    // FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG
    let call = "202, A(word), 137, 5, A(moment), 0, -1";
    again(call, libc::SYS_futex, |_| true, (-1, libc::ETIMEDOUT));
}

#[test]
fn a_wait_for_ever_is_made_again() {
    let kick = |p: &Program| {
        let pid = nix::unistd::Pid::from_raw(p.pid());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1).is_ok()
    };
    again(
        "*[7, 0, 0, -1, __import__('signal').signal(10, lambda *a: 0) and 0][:4]",
        libc::SYS_poll,
        kick,
        (-1, libc::EINTR),
    );
}

#[test]
fn a_wait_that_ended_meanwhile_has_its_result() {
    let mut p = sleeper("35, A(span), 0");
    let mut watch = Watch::new();
    let mut s = p.stop(&mut watch);
    let restart = Restart::capture(&s, &watch).unwrap();
    let regs = s.regs();
    // A minute later by the program's clock.
    let clock = ProgramClock {
        offset: 60_000_000_000,
    };
    let regs = restart.restore(&mut s, &regs, clock).unwrap();
    s.set_regs(&regs).unwrap();
    s.detach().unwrap();
    let (r, _, took) = ended(&mut p);
    assert_eq!(r, 0);
    assert!(took < 2.9, "{took}");
}

#[test]
fn what_cannot_be_carried_is_named_at_the_freeze() {
    let mut p = python(
        "import signal\nsignal.setitimer(signal.ITIMER_REAL, 60)\n\
         print(1, flush=True)\nsignal.pause()",
    );
    p.line();
    asleep(p.pid());
    let mut watch = Watch::new();
    let mut s = p.stop(&mut watch);
    match capture(&mut s, &watch) {
        Err(Error::Refused(o)) => {
            assert_eq!(o.len(), 1);
            assert_eq!(o[0].object, "real interval timer");
        }
        other => panic!("{other:?}"),
    }
    s.detach().unwrap();
    assert!(p.child.try_wait().unwrap().is_none(), "it goes on");
}

#[test]
fn locked_memory_to_come_is_found() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: only root may lock memory without limit");
    }
    for (flags, found) in [(2, true), (6, true), (0, false)] {
        let mut p = python(&format!(
            "import ctypes, signal\n\
             {flags} and ctypes.CDLL(None).mlockall({flags})\n\
             print(1, flush=True)\nsignal.pause()"
        ));
        p.line();
        asleep(p.pid());
        let mut watch = Watch::new();
        let mut s = p.stop(&mut watch);
        match capture(&mut s, &watch) {
            Err(Error::Refused(o)) if found => assert_eq!(o[0].object, "memory locking"),
            Ok(_) if !found => {}
            other => panic!("{flags}: {other:?}"),
        }
    }
}

#[test]
fn a_capture_is_quick() {
    for backend in backends() {
        a_capture_is_quick_by(&backend);
    }
}

fn a_capture_is_quick_by(backend: &Backend) {
    let mut p = python("import signal\nprint(1, flush=True)\nsignal.pause()");
    p.line();
    asleep(p.pid());
    let mut best = Duration::MAX;
    for _ in 0..20 {
        let mut watch = backend.watch();
        let mut s = p.stop(&mut watch);
        let begun = Instant::now();
        capture_by(backend, &mut s, &watch).unwrap();
        best = best.min(begun.elapsed());
        s.detach().unwrap();
        asleep(p.pid());
    }
    eprintln!("capture by {}: {best:?}", backend.name());
    assert!(best < Duration::from_secs(5), "{best:?}");
}
