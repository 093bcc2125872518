use std::sync::Once;

use super::*;

/// Records of these tests go to a directory of their own, not the machine's.
pub(crate) fn private_state() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let dir = std::env::temp_dir().join(format!("pmig-test-{}", std::process::id()));
        std::env::set_var("PMIG_STATE_DIR", dir.join("state"));
        std::env::set_var("PMIG_RUN_DIR", dir.join("run"));
    });
}

pub(crate) fn new(pid: i32, place: Place) -> New {
    New {
        id: Id::random().unwrap(),
        secret: Secret::random().unwrap(),
        pid,
        comm: "test".into(),
        peer: "b".into(),
        addr: None,
        place,
    }
}

fn nowhere() -> New {
    let place = Place {
        cgroup: "/nonexistent/pmig".into(),
        home: None,
    };
    new(std::process::id() as i32, place)
}

#[test]
fn commit_and_abort_race_and_one_wins() {
    private_state();
    for _ in 0..20 {
        let armed = Armed::arm(nowhere()).unwrap();
        let (commit, abort) = std::thread::scope(|s| {
            let commit = s.spawn(|| armed.commit());
            let abort = s.spawn(|| armed.abort("too slow"));
            (commit.join().unwrap(), abort.join().unwrap().unwrap())
        });
        match (commit, abort) {
            (Ok(c), Stage::Committing(_)) => assert_eq!(c.order().id(), armed.record().id),
            (Err(Lost::Aborted { why }), Stage::Aborted(..)) => assert_eq!(why, "too slow"),
            other => panic!("both or neither: {other:?}"),
        }
    }
}

#[test]
fn the_same_id_arms_once_only() {
    private_state();
    let new = nowhere();
    let _one = Armed::arm(new.clone()).unwrap();
    assert!(Armed::arm(new.clone()).is_err());
    let husk = Husk::arm(new.clone()).unwrap();
    assert!(Husk::arm(new).is_err());
    assert!(husk.this_boot().unwrap());
}

#[test]
fn an_owner_keeps_others_away_until_it_is_gone() {
    private_state();
    let new = nowhere();
    let id = new.id;
    assert!(matches!(open_source(id).unwrap(), Found::Missing));
    let armed = Armed::arm(new).unwrap();
    assert!(matches!(open_source(id).unwrap(), Found::Busy));
    let keeper = Armed::join(id).unwrap();
    drop(armed);
    assert!(matches!(open_source(id).unwrap(), Found::Busy));
    drop(keeper);
    let Found::Mine(mine) = open_source(id).unwrap() else {
        panic!("free now")
    };
    assert!(Armed::join(id).is_err(), "a resolver keeps keepers away");
    assert!(unsettled(Role::Source).unwrap().contains(&id));
    mine.settle().unwrap();
    assert!(!unsettled(Role::Source).unwrap().contains(&id));
}

#[test]
fn what_is_not_known_never_reads_as_never_ran() {
    private_state();
    let new = nowhere();
    assert!(matches!(
        look(new.id, &new.secret).unwrap(),
        Looked::Unknown(_)
    ));
    let husk = Husk::arm(new.clone()).unwrap();
    assert!(matches!(
        look(new.id, &Secret::random().unwrap()).unwrap(),
        Looked::Unknown(_)
    ));
    assert!(matches!(
        look(new.id, &new.secret).unwrap(),
        Looked::Undecided(_)
    ));
    // Another boot: whatever was recorded unsynced may be lost.
    let one = of_another_boot(&husk);
    assert!(matches!(
        look(new.id, &new.secret).unwrap(),
        Looked::Unknown(_)
    ));
    one.replace("record", b"{\"garbage\":", false).unwrap();
    assert!(look(new.id, &new.secret).is_err());
}

/// As if the machine had rebooted since it was recorded; its records.
fn of_another_boot(husk: &Husk) -> Folder {
    let mut record = husk.record().clone();
    record.boot_id = "another".into();
    let all = folder(Role::Target).unwrap();
    let one = all.find(&record.id.to_string()).unwrap().unwrap();
    one.replace("record", &json(&record).unwrap(), false)
        .unwrap();
    one
}

fn lose_fates(role: Role, id: Id) {
    fates(role).unwrap().remove(&id.to_string()).unwrap();
}

#[test]
fn a_decision_that_is_gone_never_reads_as_undecided() {
    private_state();
    let new = nowhere();
    let armed = Armed::arm(new.clone()).unwrap();
    let husk = Husk::arm(new.clone()).unwrap();
    let order = armed.commit().unwrap().order();
    lose_fates(Role::Source, new.id);
    lose_fates(Role::Target, new.id);
    for armed in [&armed, &see_source(new.id).unwrap().unwrap()] {
        assert!(armed.lost().unwrap());
        assert!(armed.abort("nobody knows better").is_err());
        assert!(armed.stage().is_err());
    }
    for husk in [&husk, &see_target(new.id).unwrap().unwrap()] {
        assert!(husk.commit(&order).is_err());
        assert!(husk.abort("nobody knows better").is_err());
        assert!(
            husk.strayed().unwrap().is_none(),
            "somebody is at work on it"
        );
    }
    let looked = look(new.id, &new.secret).unwrap();
    assert!(matches!(looked, Looked::Lost), "{looked:?}");
}

#[test]
fn a_place_of_decision_that_is_cleared_by_halves_is_as_bad_as_none() {
    private_state();
    for decided in [false, true] {
        let new = nowhere();
        let armed = Armed::arm(new.clone()).unwrap();
        if decided {
            armed.commit().unwrap();
        }
        let all = fates(Role::Source).unwrap();
        let place = all.find(&new.id.to_string()).unwrap().unwrap();
        let names = place.names().unwrap();
        assert_eq!(names.len(), 1, "{names:?}");
        place.forget(&names[0]).unwrap();
        assert!(armed.lost().unwrap());
        assert!(armed.abort("nobody knows better").is_err());
        assert!(armed.commit().is_err());
        assert!(armed.lost().unwrap());
    }
}

#[test]
fn what_is_done_is_known_though_its_place_of_decision_was_lost() {
    private_state();
    let new = nowhere();
    let order = Armed::arm(new.clone()).unwrap().commit().unwrap().order();
    let husk = Husk::arm(new.clone()).unwrap();
    let Fate::Committed(committed) = husk.commit(&order).unwrap() else {
        panic!("nobody aborted it")
    };
    lose_fates(Role::Target, new.id);
    committed.settle().unwrap();
    assert!(matches!(husk.abort("too late"), Ok(Fate::Committed(_))));
    assert!(matches!(
        look(new.id, &new.secret).unwrap(),
        Looked::Decided(Fate::Committed(_))
    ));
}

#[test]
fn who_alone_could_have_given_the_order_can_still_say_that_it_did_not() {
    private_state();
    let new = nowhere();
    let armed = Armed::arm(new.clone()).unwrap();
    let husk = Husk::arm(new.clone()).unwrap();
    lose_fates(Role::Source, new.id);
    lose_fates(Role::Target, new.id);
    let stage = armed.withdraw("it was lost").unwrap();
    assert!(matches!(stage, Stage::Aborted(_, why) if why == "it was lost"));
    assert!(matches!(armed.commit(), Err(Lost::Aborted { .. })));
    let fate = husk.withdraw("it was lost").unwrap();
    assert!(matches!(fate, Fate::Aborted(_)));
    assert!(matches!(
        look(new.id, &new.secret).unwrap(),
        Looked::Decided(Fate::Aborted(_))
    ));
}

#[test]
fn what_is_lost_at_the_source_is_taken_for_committing_unless_the_program_runs() {
    private_state();
    let running = nowhere();
    let mut gone = nowhere();
    gone.pid = 1;
    for new in [&running, &gone] {
        drop(Armed::arm(new.clone()).unwrap());
        lose_fates(Role::Source, new.id);
    }
    let taken = |id| match open_source(id).unwrap() {
        Found::Mine(armed) => armed,
        other => panic!("{other:?}"),
    };
    let stage = taken(running.id).stage().unwrap();
    assert!(matches!(stage, Stage::Aborted(..)), "{stage:?}");
    // As if another had its number by now.
    let all = folder(Role::Source).unwrap();
    let one = all.find(&gone.id.to_string()).unwrap().unwrap();
    let mut record = see_source(gone.id).unwrap().unwrap().record().clone();
    record.start += 1;
    one.replace("record", &json(&record).unwrap(), false)
        .unwrap();
    let Stage::Committing(committing) = taken(gone.id).stage().unwrap() else {
        panic!("the order may have been given")
    };
    committing.runs_there().unwrap();
    committing.armed().settle().unwrap();
    let stage = see_source(gone.id).unwrap().unwrap().stage().unwrap();
    assert!(matches!(stage, Stage::Decided(_, Verdict::Moved { .. })));
}

#[test]
fn a_verdict_stands_when_the_decision_before_it_is_lost() {
    private_state();
    let new = nowhere();
    let armed = Armed::arm(new.clone()).unwrap();
    armed.commit().unwrap().runs_there().unwrap();
    lose_fates(Role::Source, new.id);
    for settle in [false, true] {
        if settle {
            armed.settle().unwrap();
        }
        let stage = see_source(new.id).unwrap().unwrap().stage().unwrap();
        assert!(matches!(stage, Stage::Decided(_, Verdict::Moved { .. })));
    }
}

#[test]
fn what_is_lost_at_the_target_is_decided_by_a_person_or_never() {
    private_state();
    let stray = || {
        let new = nowhere();
        drop(Husk::arm(new.clone()).unwrap());
        lose_fates(Role::Target, new.id);
        let Found::Mine(husk) = open_target(new.id).unwrap() else {
            panic!("nobody is at work on it")
        };
        let strayed = husk.strayed().unwrap().expect("it is lost");
        (new, husk, strayed)
    };
    let (new, _husk, strayed) = stray();
    assert!(matches!(strayed.run_here().unwrap(), Fate::Committed(_)));
    assert!(matches!(strayed.drop_it().unwrap(), Fate::Committed(_)));
    assert!(matches!(
        look(new.id, &new.secret).unwrap(),
        Looked::Decided(Fate::Committed(_))
    ));
    let (new, husk, strayed) = stray();
    strayed.settle().unwrap();
    assert!(husk.strayed().unwrap().is_none());
    assert!(husk.abort("nobody knows better").is_err());
    let looked = look(new.id, &new.secret).unwrap();
    assert!(matches!(looked, Looked::Unknown(_)), "{looked:?}");
}

#[test]
fn what_was_settled_is_known_after_a_boot() {
    private_state();
    let new = nowhere();
    let husk = Husk::arm(new.clone()).unwrap();
    let Fate::Aborted(aborted) = husk.abort("the source asked").unwrap() else {
        panic!("nothing else was recorded")
    };
    aborted.settle().unwrap();
    lose_fates(Role::Target, new.id);
    of_another_boot(&husk);
    let order = Armed::arm(new.clone()).unwrap().commit().unwrap().order();
    let husk = see_target(new.id).unwrap().unwrap();
    assert!(matches!(husk.commit(&order).unwrap(), Fate::Aborted(_)));
    assert!(matches!(
        look(new.id, &new.secret).unwrap(),
        Looked::Decided(Fate::Aborted(_))
    ));
}

#[test]
fn a_late_commit_is_refused() {
    private_state();
    let new = nowhere();
    let source = Armed::arm(new.clone()).unwrap();
    let husk = Husk::arm(new.clone()).unwrap();
    let Fate::Aborted(aborted) = husk.abort("the source asked").unwrap() else {
        panic!("nothing else was recorded")
    };
    aborted.bury().unwrap();
    let order = source.commit().unwrap().order();
    assert!(matches!(husk.commit(&order).unwrap(), Fate::Aborted(_)));

    let other = Husk::arm(nowhere()).unwrap();
    assert!(other.commit(&order).is_err(), "an order for another one");
    assert!(other.fate().unwrap().is_none());
}

#[test]
fn a_verdict_is_given_once() {
    private_state();
    let armed = Armed::arm(nowhere()).unwrap();
    let committing = armed.commit().unwrap();
    let here = committing.by_hand(true).unwrap();
    assert!(matches!(here, Verdict::RunsHere { .. }));
    assert_eq!(committing.runs_there().unwrap(), here);
    assert!(matches!(armed.stage().unwrap(), Stage::Decided(_, v) if v == here));
}

#[test]
fn old_records_go_and_fresh_ones_stay() {
    private_state();
    let fresh = Armed::arm(nowhere()).unwrap();
    fresh.settle().unwrap();
    let old = Armed::arm(nowhere()).unwrap();
    old.settle().unwrap();
    let (fresh_id, old_id) = (fresh.record().id, old.record().id);
    let settled = old.0.folder.path().join("settled");
    drop((fresh, old));
    let past = SystemTime::now() - KEEP_FOR - Duration::from_secs(60);
    std::fs::File::options()
        .append(true)
        .open(settled)
        .unwrap()
        .set_modified(past)
        .unwrap();
    prune(Role::Source).unwrap();
    assert!(matches!(open_source(old_id).unwrap(), Found::Missing));
    assert!(matches!(open_source(fresh_id).unwrap(), Found::Mine(_)));
    let left = fates(Role::Source).unwrap().names().unwrap();
    assert!(!left.contains(&old_id.to_string()));
}
