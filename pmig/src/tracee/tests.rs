use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::outside::unused_stack;
use super::scratch::Spare;
use super::*;
use crate::error::Error;
use crate::proc::smaps::Lines;
use crate::sys::ptrace::{self, Regs};
use crate::sys::runner;

/// A program that counts as fast as it can, in user code and system calls alike,
/// and ends with the sum; killed when the test ends.
struct Counting {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Counting {
    fn start() -> (Counting, i32) {
        let mut child = Command::new("python3")
            .args([
                "-c",
                "import os,time\nprint('go',flush=True)\ns=0.5\nn=0\n\
                 while not os.path.exists(f'/tmp/pmig-test-stop-{os.getpid()}'):\n\
                 \x20 s=s*1.0000001+n%7; n+=1; os.getppid(); time.sleep(0.0001)\n\
                 t=0.5\n\
                 for i in range(n): t=t*1.0000001+i%7\n\
                 print('same' if s==t else 'differs')",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut it = Counting { child, out };
        assert_eq!(it.line(), "go\n");
        let pid = it.child.id() as i32;
        (it, pid)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }

    fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn stop_and_check(mut self) {
        let flag = format!("/tmp/pmig-test-stop-{}", self.child.id());
        std::fs::write(&flag, "").unwrap();
        let line = self.line();
        std::fs::remove_file(&flag).unwrap();
        assert_eq!(line, "same\n");
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// With a table of that many bytes, at least.
fn excursion(pid: i32, len: usize) {
    let mut s = Stopped::seize(pid).unwrap();
    let mut b = Batch::new();
    b.space(len);
    let me = b.call("getpid", libc::SYS_getpid, &[]);
    let name = b.space(16);
    b.call(
        "prctl",
        libc::SYS_prctl,
        &[libc::PR_GET_NAME.into(), name.into()],
    );
    let bad = b.may_fail("close", libc::SYS_close, &[(-1i32).into()]);
    let fd = b.call("dup", libc::SYS_dup, &[1i32.into()]);
    b.call("close", libc::SYS_close, &[fd.into()]);
    let done = s.run(b).unwrap();
    assert_eq!(done.result(me), pid as i64);
    assert_eq!(done.result(bad), -(libc::EBADF as i64));
    assert!(done.bytes(name).starts_with(b"python3"));
    s.detach().unwrap();
}

#[test]
fn excursions_leave_no_trace_in_a_live_program() {
    let (program, pid) = Counting::start();
    let maps = || std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mem = open_mem(pid).unwrap();
    let read = |name: &str| {
        let range = Lines::of(pid).unwrap().find(name.as_bytes()).unwrap();
        let mut bytes = vec![0; (range.end - range.start) as usize];
        mem.read_exact_at(&mut bytes, range.start).unwrap();
        bytes
    };
    let unused = |stack: &[u8]| stack.iter().take_while(|b| **b == 0).count();
    let (before, vdso, stack) = (maps(), read("[vdso]"), unused(&read("[stack]")));
    for _ in 0..50 {
        excursion(pid, 0);
        std::thread::sleep(Duration::from_millis(1));
    }
    let line = |maps: &str, name| maps.lines().find(|l| l.ends_with(name)).map(String::from);
    for name in ["[vdso]", "[stack]"] {
        assert_eq!(line(&maps(), name), line(&before, name));
    }
    assert!(!maps()
        .lines()
        .any(|l| l.contains("r-xp 00000000 00:00 0") && !l.ends_with("[vdso]")));
    assert!(read("[vdso]") == vdso, "the vdso has other bytes");
    assert_eq!(unused(&read("[stack]")), stack);
    program.stop_and_check();
}

#[test]
fn a_table_too_large_for_what_is_lent_gets_a_mapping_for_as_long() {
    let (program, pid) = Counting::start();
    let maps = || std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let count = maps().lines().count();
    let mut s = Stopped::seize(pid).unwrap();
    for calls in [1, 1000, 1] {
        let mut b = Batch::new();
        let all: Vec<Call> = (0..calls)
            .map(|_| b.call("getpid", libc::SYS_getpid, &[]))
            .collect();
        let done = s.run(b).unwrap();
        assert!(all.iter().all(|c| done.result(*c) == i64::from(pid)));
    }
    assert!(s.scratch().is_some());
    s.detach().unwrap();
    assert_eq!(maps().lines().count(), count);
    program.stop_and_check();
}

#[test]
fn a_failed_call_is_an_error_with_its_name() {
    let (program, pid) = Counting::start();
    let mut s = Stopped::seize(pid).unwrap();
    let mut b = Batch::new();
    b.call("close the impossible", libc::SYS_close, &[(-1i32).into()]);
    b.call("exit", libc::SYS_exit, &[1i32.into()]);
    let e = s.run(b).unwrap_err();
    assert_eq!(e.errno(), Some(libc::EBADF), "{e}");
    assert!(e.to_string().contains("close the impossible"), "{e}");
    s.detach().unwrap();
    program.stop_and_check();
}

/// Not a test of its own: the tracer that the next one kills.
#[test]
fn tracer_to_be_killed() {
    let Ok(plan) = std::env::var("PMIG_TEST_TRACER") else {
        return;
    };
    let plan: Vec<i32> = plan.split(' ').map(|n| n.parse().unwrap()).collect();
    ptrace::DIE_AFTER.store(plan[1].into(), Ordering::Relaxed);
    excursion(plan[0], plan[2] as usize);
}

/// Memory that is lent is enough, or it takes a mapping.
const TABLES: [usize; 2] = [0, 64 << 10];

/// Waits until a program is on its own again, and has the mask that it had.
fn is_home(pid: i32) -> bool {
    let blocks = || {
        let text = crate::proc::text(pid, "status").unwrap();
        text.contains("SigBlk:\t0000000000000000") && text.contains("TracerPid:\t0\n")
    };
    (0..500).any(|_| {
        std::thread::sleep(Duration::from_millis(2));
        blocks()
    })
}

#[test]
fn a_program_heals_itself_wherever_the_tracer_dies() {
    let (mut program, pid) = Counting::start();
    for (len, least) in TABLES.into_iter().zip([15, 20]) {
        let mut killed = 0;
        for after in 0.. {
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "tracee::tests::tracer_to_be_killed"])
                .env("PMIG_TEST_TRACER", format!("{pid} {after} {len}"))
                .stdout(Stdio::null())
                .status()
                .unwrap();
            if status.success() {
                break;
            }
            assert_eq!(status.signal(), Some(libc::SIGKILL), "step {after}");
            killed += 1;
            assert!(program.lives(), "died with step {after}");
            assert!(is_home(pid), "it has another mask by step {after}");
        }
        assert!(
            killed > least,
            "an excursion takes more than {killed} steps"
        );
    }
    program.stop_and_check();
}

#[test]
fn a_program_that_is_given_up_in_a_call_of_ours_goes_home_from_it() {
    let (mut program, pid) = Counting::start();
    // What it is traced by is this thread.
    std::thread::spawn(move || {
        let mut s = Stopped::seize(pid).unwrap();
        s.patience = Duration::from_millis(100);
        let mut b = Batch::new();
        let second = b.data(&[1u64, 0].map(u64::to_le_bytes).concat());
        b.call("sleep", libc::SYS_nanosleep, &[second.into(), 0u64.into()]);
        let e = s.run(b).unwrap_err();
        assert!(matches!(e, Error::Deadline { .. }), "{e}");
    })
    .join()
    .unwrap();
    assert!(is_home(pid));
    std::thread::sleep(Duration::from_millis(1200));
    assert!(program.lives(), "it died of it");
    assert!(is_home(pid));
    // Of a killed one it is no different.
    excursion(pid, 0);
    program.stop_and_check();
}

#[test]
fn a_program_that_still_is_in_code_of_ours_is_left_alone() {
    let (program, pid) = Counting::start();
    let ground = Ground::survey(pid).unwrap();
    let end = Lines::of(pid).unwrap().find(b"[vdso]").unwrap().end;
    let at = |rip| Regs {
        rip,
        ..Regs::default()
    };
    assert!(ground.is_left_by(1, &at(end - 512)).is_ok());
    let e = ground.is_left_by(1, &at(end - 200)).unwrap_err();
    assert!(e.to_string().contains("killed"), "{e}");
    program.stop_and_check();
}

#[test]
fn what_is_not_free_behind_the_vdso_is_not_lent() {
    let mem = std::fs::File::open("/proc/self/mem").unwrap();
    let mut vdso = vec![0; 8192];
    assert!(Spare::find(8192, &vdso, &mem).is_some());
    // Another pmig was killed there.
    vdso[8192 - 256..][..runner::code().len()].copy_from_slice(runner::code());
    assert!(Spare::find(8192, &vdso, &mem).is_some());
    vdso[8191] = 1;
    assert!(Spare::find(8192, &vdso, &mem).is_none());
    vdso[8191] = 0;
    vdso[8192 - 256] ^= 1;
    assert!(Spare::find(8192, &vdso, &mem).is_none());
}

#[test]
fn a_stack_lends_only_what_is_empty_below_the_program() {
    let own = std::process::id() as i32;
    let mem = open_mem(own).unwrap();
    // The allocator maps that much anew.
    let mut room = vec![0u8; 64 << 20];
    let start = (room.as_ptr() as u64).next_multiple_of(4096);
    let stack = start..start + (32 << 10);
    let find = |sp, ours| unused_stack((own, &mem), sp, 8192, Some(stack.clone()), ours);
    // It is on another stack, and has never been here.
    let elsewhere = stack.end + 4096;
    assert_eq!(find(elsewhere, None).unwrap(), stack.start);
    // It has.
    std::hint::black_box(&mut room[..1 << 20]).fill(1);
    std::hint::black_box(&mut room[..1 << 20]).fill(0);
    assert_ne!(find(elsewhere, None).unwrap(), stack.start);
    // That was us.
    assert_eq!(find(elsewhere, Some(stack.start)).unwrap(), stack.start);
    assert_eq!(find(stack.end - 64, None).unwrap(), stack.start);
    // It is down there: then below that which it has by now.
    let real = Lines::of(own).unwrap().find(b"[stack]").unwrap().start;
    let low = stack.start + 8192;
    assert_ne!(find(low, Some(stack.start)).unwrap(), stack.start);
    mem.write_all_at(&[1], stack.start + 8191).unwrap();
    assert_ne!(find(stack.end - 64, None).unwrap(), stack.start);
    assert!(find(elsewhere, None).unwrap() <= real);
}
