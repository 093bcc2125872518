//! What is taken for granted of a program, and found out to be so or not.

use super::*;
use crate::proc::smaps::Lines;
use crate::sys::limits::{get, set};

/// What a capture finds by what was foreseen, and whether that is so.
fn capture_foreseen(
    p: &mut Program,
    watch: &mut Watch,
    foreseen: &Foreseen,
) -> (Captured, Result<()>) {
    let files = Kept::of(p.pid());
    let mut s = p.stop(watch);
    let context = CaptureContext {
        watch,
        clock: ProgramClock::default(),
        files: &files,
        questions: &Questions::new(),
        foreseen: Some(foreseen),
        heap: Lines::of(p.pid()).unwrap().find(b"[heap]"),
    };
    let captured = Backend::Ptrace
        .capture(&mut s, &context, &mut |_| Ok(()))
        .unwrap();
    let was_asked = captured.answers.is_some();
    let confirmed = foreseen.confirm((&mut s, was_asked), context.questions, &files);
    s.settle().unwrap();
    watch.going_on(&mut s).unwrap();
    s.detach().unwrap();
    asleep(p.pid());
    (captured, confirmed)
}

#[test]
fn what_was_foreseen_is_not_asked_again_and_confirmed() {
    let mut p = sleeper("35, A(span), 0");
    let (pid, watch) = (p.pid(), &mut Watch::new());
    let foresee = |answers| Foreseen::by(&Kept::of(pid), answers).expect("there is such a process");
    let (first, confirmed) = capture_foreseen(&mut p, watch, &foresee(None));
    confirmed.unwrap();
    let answers = first.answers.expect("nothing was known before");
    let foreseen = foresee(Some(answers));
    let (second, confirmed) = capture_foreseen(&mut p, watch, &foreseen);
    confirmed.unwrap();
    assert!(second.answers.is_none());
    let but_for_the_moment = |pcb: &Pcb| pcb.moved_on(first.pcb.moving());
    assert_eq!(but_for_the_moment(&second.pcb), first.pcb);

    let changed = |(captured, confirmed): (Captured, Result<()>), word: &str| {
        assert!(captured.answers.is_none(), "{word}");
        match confirmed {
            Err(Error::Changed { pid: of, what }) => {
                assert_eq!(of, pid);
                assert!(what.contains(word), "{what}");
            }
            other => panic!("{other:?} where {word} was changed"),
        }
    };
    // Nothing of a limit is seen but by asking.
    let (soft, hard) = get(pid, libc::RLIMIT_NOFILE).unwrap();
    set(pid, libc::RLIMIT_NOFILE, (soft - 1, hard)).unwrap();
    changed(capture_foreseen(&mut p, watch, &foreseen), "limit");
    set(pid, libc::RLIMIT_NOFILE, (soft, hard)).unwrap();
    capture_foreseen(&mut p, watch, &foreseen).1.unwrap();
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), "77").unwrap();
    changed(capture_foreseen(&mut p, watch, &foreseen), "oom_score_adj");
}

#[test]
fn what_is_seen_to_have_changed_is_asked_anew() {
    let mut p = sleeper("35, A(span), 0");
    let (pid, watch) = (p.pid(), &mut Watch::new());
    let nothing = Foreseen::by(&Kept::of(pid), None).unwrap();
    let (first, _) = capture_foreseen(&mut p, watch, &nothing);
    let foreseen = Foreseen::by(&Kept::of(pid), first.answers).unwrap();
    let mut s = p.stop(watch);
    let mut rename = Batch::new();
    let name = rename.data(b"renamed\0");
    let args = [libc::PR_SET_NAME.into(), name.into()];
    rename.call("set the name", libc::SYS_prctl, &args);
    s.run(rename).unwrap();
    s.settle().unwrap();
    watch.going_on(&mut s).unwrap();
    s.detach().unwrap();
    asleep(pid);
    let (second, confirmed) = capture_foreseen(&mut p, watch, &foreseen);
    confirmed.unwrap();
    assert!(second.answers.is_some());
    assert_eq!(second.pcb.attributes.comm, b"renamed");
}
