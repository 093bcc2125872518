//! What files and directories are called.

use super::*;

#[test]
fn a_name_that_was_taken_for_granted_is_looked_up_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let [before, after] = ["before", "after"].map(|name| dir.path().join(name));
    let file = std::fs::File::create(&before).unwrap();
    let child = Command::new("perl")
        .args(["-e", "use POSIX; POSIX::close($_) for 3..999; sleep 60"])
        .current_dir(dir.path())
        .stdin(file)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let sleeper = Sleeper::when_asleep(child);
    let mut watch = Watch::new(sleeper.pid()).unwrap();
    let path = |table: &FdTable| match &table.descriptions[0].kind {
        Kind::Regular(file) => file.path.to_string(),
        other => panic!("{other:?}"),
    };
    let is = |table: &FdTable, name: &std::path::Path| path(table) == name.to_string_lossy();
    let first = watch.look(Beat::Running).unwrap();
    let brief = watch.look(Beat::Brief).unwrap();
    watch.look_again(&brief).unwrap();
    assert_eq!(brief, first);

    std::fs::rename(&before, &after).unwrap();
    let brief = watch.look(Beat::Brief).unwrap();
    assert!(is(&brief, &before));
    match watch.look_again(&brief) {
        Err(Error::Changed { pid, what }) => {
            assert_eq!(pid, sleeper.pid());
            assert!(what.contains("called"), "{what}");
        }
        other => panic!("{other:?}"),
    }
    let table = watch.look(Beat::Stopped).unwrap();
    assert!(is(&table, &after));
    watch.look_again(&table).unwrap();

    let moved = dir.path().with_extension("moved");
    std::fs::rename(dir.path(), &moved).unwrap();
    let brief = watch.look(Beat::Brief).unwrap();
    let renamed = watch.look_again(&brief);
    std::fs::rename(&moved, dir.path()).unwrap();
    assert!(matches!(renamed, Err(Error::Changed { .. })), "{renamed:?}");
}
