use super::*;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

const LEN: u64 = 16 << 20;
/// Fills so much memory with mappings that nothing can be joined to, and does
/// with it what it is told.
const PROGRAM: &str = r#"
import ctypes, sys
c = ctypes.CDLL(None)
c.mmap.restype = ctypes.c_void_p
c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
c.mremap.restype = ctypes.c_void_p
c.mremap.argtypes = [ctypes.c_void_p] + 2 * [ctypes.c_size_t] + [ctypes.c_int, ctypes.c_void_p]
c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
c.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
c.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
size = 16 << 20
huge = 2 << 20
# At a place where whole page tables can be moved.
def room():
    at = c.mmap(None, size + 2 * huge, 0, 0x22, -1, 0)
    return (at + huge) // huge * huge
at, other = room(), room()
fresh = lambda to: c.mmap(to, size, 3, 0x32, -1, 0)
fresh(at)
fresh(other)
c.madvise(at, size, 15)
c.madvise(other, size, 15)
ctypes.memset(at, 7, size)
ctypes.memset(other, 8, size)
print(at, other, flush=True)
for line in sys.stdin:
    line = line.strip()
    if line == "map":
        fresh(at)
    if line in ("map", "write"):
        ctypes.memset(at + 5 * 4096, 9, 1)
    if line == "discard":
        c.madvise(at + 5 * 4096, 4096, 4)
    if line == "wipe":
        c.madvise(at, size, 18)
    if line == "purge":
        c.madvise(at + huge, 2 * huge, 4)
    if line == "read":
        c.madvise(at + 5 * 4096, 4096, 4)
        ctypes.string_at(at + 5 * 4096, 1)
    if line == "move":
        c.mremap(other, size, size, 3, at)
    if line == "piece":
        c.mremap(other + 5 * 4096, 4096, 4096, 3, at + 5 * 4096)
    if line == "grow":
        c.munmap(at + 5 * 4096, 4096)
        c.mmap(at + 5 * 4096, 4096, 3, 0x32, -1, 0)
    if line == "protect":
        ctypes.memset(at + 5 * 4096, 9, 1)
        c.mprotect(at + 5 * 4096, 4096, 1)
    print("done", flush=True)
"#;

struct Program {
    child: Child,
    out: BufReader<ChildStdout>,
    area: Range<u64>,
    other: Range<u64>,
}

impl Program {
    fn start() -> Program {
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut program = Program {
            child,
            out,
            area: 0..0,
            other: 0..0,
        };
        let said = program.says();
        let mut at = said.split(' ').map(|n| n.parse().unwrap());
        let mut next = || at.next().map(|at: u64| at..at + LEN).unwrap();
        (program.area, program.other) = (next(), next());
        program
    }

    fn page(&self) -> Range<u64> {
        self.area.start + 5 * PAGE..self.area.start + 6 * PAGE
    }

    fn says(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim().into()
    }

    fn does(&mut self, what: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        writeln!(stdin, "{what}").unwrap();
        assert_eq!(self.says(), "done");
    }

    /// With all that it has counted as sent.
    fn followed(&self, tracking: Tracking) -> Tracker {
        let mut stopped = Stopped::seize(self.child.id() as i32).unwrap();
        let mut tracker = Tracker::attach(&mut stopped, &[tracking]).unwrap();
        stopped.detach().unwrap();
        for _ in 0..2 {
            let found = tracker.look().unwrap();
            found.pages.into_iter().for_each(|r| tracker.mark_sent(r));
        }
        tracker
    }

    fn last_look(&self, tracker: &mut Tracker) -> Found {
        let stopped = Stopped::seize(self.child.id() as i32).unwrap();
        let found = tracker.last_look().unwrap();
        stopped.detach().unwrap();
        found
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn within(runs: &[Range<u64>], area: &Range<u64>) -> u64 {
    let part = |r: &Range<u64>| r.end.min(area.end).saturating_sub(r.start.max(area.start));
    runs.iter().map(part).sum()
}

/// Tries it by each means that there is here.
fn by_each(what: &str, each: impl Fn(&mut Program, Tracker)) {
    for tracking in Tracking::ALL {
        match tracking.probe() {
            Ok(()) if tracking != Tracking::None => {
                let mut program = Program::start();
                let tracker = program.followed(tracking);
                assert_eq!(tracker.tracking(), tracking);
                program.does(what);
                each(&mut program, tracker);
            }
            Ok(()) => {}
            Err(o) => eprintln!("skipped: {}: {}", o.object, o.why),
        }
    }
}

/// Whether the husk loses what it has of a range, by a step or page by page.
fn loses(found: &Found, r: &Range<u64>) -> bool {
    let unmapped = |s: &Step| matches!(s, Step::Unmap(u) if u.start <= r.start && r.end <= u.end);
    found.steps.iter().any(unmapped) || within(&found.drops, r) == r.end - r.start
}

#[test]
fn the_last_look_finds_what_was_written() {
    by_each("write", |program, mut tracker| {
        let found = program.last_look(&mut tracker);
        assert!(found.steps.is_empty());
        assert_eq!(within(&found.pages, &program.page()), PAGE);
        // By one means pages that were written before are told again.
        if tracker.tracking() != Tracking::SoftDirty {
            assert_eq!(within(&found.pages, &program.area), PAGE);
        }
        assert_eq!(within(&found.drops, &program.area), 0);
    });
}

#[test]
fn what_was_found_once_counts_as_clean() {
    by_each("write", |program, mut tracker| {
        assert_eq!(
            within(&tracker.look().unwrap().pages, &program.page()),
            PAGE
        );
        let again = program.last_look(&mut tracker);
        let cumulative = tracker.tracking() == Tracking::SoftDirty;
        assert_eq!(within(&again.pages, &program.page()) == 0, !cumulative);
    });
}

#[test]
fn the_last_look_finds_what_was_mapped_again_at_the_same_place() {
    by_each("map", |program, mut tracker| {
        let found = program.last_look(&mut tracker);
        let page = program.page();
        assert_eq!(within(&found.pages, &page), PAGE);
        assert!(loses(&found, &(program.area.start..page.start)));
        assert!(loses(&found, &(page.end..program.area.end)));
    });
}

#[test]
fn what_was_discarded_or_mapped_anew_and_only_read_is_lost() {
    for what in ["discard", "read", "grow"] {
        by_each(what, |program, mut tracker| {
            let found = program.last_look(&mut tracker);
            assert_eq!(within(&found.pages, &program.page()), 0, "{found:?}");
            assert!(loses(&found, &program.page()), "{what}: {found:?}");
        });
    }
}

#[test]
fn what_was_discarded_with_its_page_tables_is_lost() {
    by_each("purge", |program, mut tracker| {
        let found = program.last_look(&mut tracker);
        let at = program.area.start;
        assert!(
            loses(&found, &(at + (2 << 20)..at + (6 << 20))),
            "{found:?}"
        );
        assert_eq!(within(&found.drops, &program.area), 4 << 20);
    });
}

/// The pages come with their bits as clear as they were where they were.
#[test]
fn what_was_moved_to_the_same_place_is_found_and_lost_where_it_was() {
    by_each("move", |program, mut tracker| {
        let found = program.last_look(&mut tracker);
        assert_eq!(within(&found.pages, &program.area), LEN);
        assert!(loses(&found, &program.other));
    });
    by_each("piece", |program, mut tracker| {
        let found = program.last_look(&mut tracker);
        assert_eq!(within(&found.pages, &program.page()), PAGE);
    });
}

#[test]
fn what_was_written_and_then_protected_is_found() {
    by_each("protect", |program, mut tracker| {
        let found = program.last_look(&mut tracker);
        assert_eq!(within(&found.pages, &program.page()), PAGE);
        let protect = |s: &Step| matches!(s, Step::Protect(r, 1) if *r == program.page());
        assert!(found.steps.iter().any(protect), "{:?}", found.steps);
    });
}

#[test]
fn who_is_distrusted_is_sent_as_a_whole() {
    by_each("write", |program, mut tracker| {
        tracker.distrust();
        let found = program.last_look(&mut tracker);
        assert_eq!(within(&found.pages, &program.area), LEN);
    });
}

#[test]
fn of_what_is_to_follow_a_little_that_the_target_knows_travels_at_once() {
    by_each("write", |program, mut tracker| {
        if tracker.tracking() == Tracking::SoftDirty {
            // By that means much is told that was not written.
            return;
        }
        let page = program.page();
        let written = |f: &Found| (within(&f.pages, &page), within(&f.drops, &page));
        let mut found = program.last_look(&mut tracker);
        tracker.postpone(&mut found, &[], 1 << 20);
        assert_eq!(written(&found), (PAGE, 0));
        assert_eq!(within(&tracker.postponed(), &page), 0);
        tracker.postpone(&mut found, &[], 0);
        assert_eq!(written(&found), (0, PAGE), "dropped there, and missing");
        assert_eq!(within(&tracker.postponed(), &page), PAGE);
    });
}

#[test]
fn what_a_child_is_to_find_empty_does_not_follow() {
    by_each("write", |program, mut tracker| {
        let page = program.page();
        let mut found = tracker.look().unwrap();
        tracker.postpone(&mut found, &[], 0);
        assert_eq!(within(&tracker.postponed(), &page), PAGE);
        program.does("wipe");
        let mut found = tracker.look().unwrap();
        tracker.postpone(&mut found, &[], 0);
        assert_eq!(within(&found.pages, &page), PAGE);
        assert_eq!(within(&tracker.postponed(), &page), 0);
    });
}

#[test]
fn without_tracking_all_is_found_in_the_end() {
    let program = Program::start();
    let mut tracker = Tracker::without_tracking(program.child.id() as i32).unwrap();
    assert_eq!(tracker.look().unwrap().bytes(), 0);
    let found = program.last_look(&mut tracker);
    assert_eq!(within(&found.pages, &program.area), LEN);
}

#[test]
fn stretches_end_where_something_else_is_mapped() {
    by_each("nothing", |program, tracker| {
        let stretches = tracker.stretches();
        assert!(stretches
            .iter()
            .any(|r| r.start <= program.area.start && program.area.end <= r.end));
        for (vma, dense) in tracker.layout.vmas.iter().zip(&tracker.dense) {
            let inside = |r: &Range<u64>| r.start < vma.end && vma.start < r.end;
            let covered = stretches.iter().any(inside);
            assert_eq!(covered, vma.is_private() && *dense, "{vma:?}");
        }
    });
}
