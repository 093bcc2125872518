use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::*;
use crate::proc::smaps::Lines;
use crate::sys::ptrace;

/// A shell that counts as fast as it can, in user code and system calls alike,
/// and ends with the sum.
fn counting() -> Child {
    Command::new("python3")
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
        .unwrap()
}

fn first_line(child: &mut Child) -> BufReader<std::process::ChildStdout> {
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "go\n");
    out
}

fn stop_and_check(mut child: Child, mut out: BufReader<std::process::ChildStdout>) {
    let flag = format!("/tmp/pmig-test-stop-{}", child.id());
    std::fs::write(&flag, "").unwrap();
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    std::fs::remove_file(&flag).unwrap();
    assert_eq!(line, "same\n");
    assert!(child.wait().unwrap().success());
}

fn excursion(pid: i32) {
    let mut s = Stopped::seize(pid).unwrap();
    let mut b = Batch::new();
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
    let mut child = counting();
    let out = first_line(&mut child);
    let pid = child.id() as i32;
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
        excursion(pid);
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
    stop_and_check(child, out);
}

#[test]
fn a_table_too_large_for_what_is_lent_gets_a_mapping_for_as_long() {
    let mut child = counting();
    let out = first_line(&mut child);
    let pid = child.id() as i32;
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
    stop_and_check(child, out);
}

#[test]
fn a_failed_call_is_an_error_with_its_name() {
    let mut child = counting();
    let out = first_line(&mut child);
    let mut s = Stopped::seize(child.id() as i32).unwrap();
    let mut b = Batch::new();
    b.call("close the impossible", libc::SYS_close, &[(-1i32).into()]);
    b.call("exit", libc::SYS_exit, &[1i32.into()]);
    let e = s.run(b).unwrap_err();
    assert_eq!(e.errno(), Some(libc::EBADF), "{e}");
    assert!(e.to_string().contains("close the impossible"), "{e}");
    s.detach().unwrap();
    stop_and_check(child, out);
}

/// Not a test of its own: the tracer that the next one kills.
#[test]
fn tracer_to_be_killed() {
    let Ok(plan) = std::env::var("PMIG_TEST_TRACER") else {
        return;
    };
    let (pid, after) = plan.split_once(' ').unwrap();
    ptrace::DIE_AFTER.store(after.parse().unwrap(), Ordering::Relaxed);
    excursion(pid.parse().unwrap());
}

#[test]
fn a_program_heals_itself_wherever_the_tracer_dies() {
    let mut child = counting();
    let out = first_line(&mut child);
    let pid = child.id();
    let mut killed = 0;
    for after in 0.. {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tracee::tests::tracer_to_be_killed"])
            .env("PMIG_TEST_TRACER", format!("{pid} {after}"))
            .stdout(Stdio::null())
            .status()
            .unwrap();
        if status.success() {
            break;
        }
        killed += 1;
        assert!(
            child.try_wait().unwrap().is_none(),
            "died with request {after}"
        );
    }
    assert!(killed > 15, "an excursion takes more than {killed} steps");
    stop_and_check(child, out);
}
