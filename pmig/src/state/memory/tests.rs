//! What a program does to its memory while it is followed, and what must be found
//! of it.

use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::process::{Child, ChildStdout, Command, Stdio};

use super::{Found, Tracker, Tracking, PAGE};
use crate::tracee::Stopped;

/// Does what it is told, a line of Python at a time.
const PROGRAM: &str = r#"
import ctypes, sys
c = ctypes.CDLL(None)
c.mmap.restype = c.mremap.restype = ctypes.c_void_p
c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
c.mremap.argtypes = [ctypes.c_void_p] + 2 * [ctypes.c_size_t] + [ctypes.c_int, ctypes.c_void_p]
c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
file = open(sys.executable, "rb")
# Room that nothing else comes to touch.
at = c.mmap(None, 64 * 4096, 0, 0x22, -1, 0) + 4096
page = lambda n: at + n * 4096
fill = lambda n, byte: ctypes.memset(page(n), byte, 4096)
print(at, flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"#;

struct Program(Child, BufReader<ChildStdout>, u64);

impl Program {
    fn start() -> Program {
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut program = Program(child, out, 0);
        program.2 = program.says().parse().unwrap();
        program
    }

    fn says(&mut self) -> String {
        let mut line = String::new();
        self.1.read_line(&mut line).unwrap();
        line.trim().into()
    }

    fn does(&mut self, what: &str) {
        let stdin = self.0.stdin.as_mut().unwrap();
        writeln!(stdin, "{what}").unwrap();
        assert_eq!(self.says(), "done");
    }

    fn page(&self, number: u64) -> Range<u64> {
        let at = self.2 + number * PAGE;
        at..at + PAGE
    }

    /// `None` where the kernel cannot follow it.
    fn followed(&self) -> Option<Tracker> {
        let mut stopped = Stopped::seize(self.0.id() as i32).unwrap();
        let mut tracker = Tracker::attach(&mut stopped, &[Tracking::Uffd]).unwrap();
        stopped.detach().unwrap();
        for _ in 0..2 {
            look(&mut tracker);
        }
        tracker.tracks().then_some(tracker)
    }

    fn last_look(&self, tracker: &mut Tracker) -> Found {
        let stopped = Stopped::seize(self.0.id() as i32).unwrap();
        let found = tracker.last_look().unwrap();
        stopped.detach().unwrap();
        found
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Looks, and counts what is found as sent.
fn look(tracker: &mut Tracker) {
    let found = tracker.look().unwrap();
    found.pages.into_iter().for_each(|r| tracker.mark_sent(r));
}

fn holds(runs: &[Range<u64>], page: &Range<u64>) -> bool {
    runs.iter()
        .any(|r| r.start <= page.start && page.end <= r.end)
}

#[test]
fn a_discarded_page_of_a_file_is_the_files_again() {
    for read in [false, true] {
        let mut program = Program::start();
        program.does("c.mmap(page(0), 4 * 4096, 3, 0x12, file.fileno(), 0)");
        program.does("fill(1, 7)");
        let Some(mut tracker) = program.followed() else {
            eprintln!("skipped: this kernel does not track writes");
            return;
        };
        program.does("c.madvise(page(1), 4096, 4)");
        if read {
            program.does("ctypes.string_at(page(1), 1)");
        }
        let found = program.last_look(&mut tracker);
        let page = program.page(1);
        // Dropped, or sent as it is now.
        assert!(
            holds(&found.drops, &page) || holds(&found.pages, &page),
            "read: {read}, {found:x?}"
        );
        assert!(!holds(&found.drops, &program.page(2)));
    }
}

#[test]
fn writes_are_found_where_another_mapping_was_moved_beside_theirs() {
    let mut program = Program::start();
    program.does("c.mmap(page(0), 2 * 4096, 3, 0x32, -1, 0); fill(0, 7)");
    program.does("c.mmap(page(8), 4096, 3, 0x32, -1, 0)");
    let Some(mut tracker) = program.followed() else {
        eprintln!("skipped: this kernel does not track writes");
        return;
    };
    // The kernel makes one of both, and watches it no longer.
    program.does("c.mremap(page(8), 4096, 4096, 3, page(2)); fill(0, 8)");
    look(&mut tracker);
    program.does("fill(0, 9)");
    let found = program.last_look(&mut tracker);
    assert!(holds(&found.pages, &program.page(0)), "{found:x?}");
}
