//! Compares `abi` with `kmod/pmig_abi.h` by means of a C compiler.

use super::*;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::Command;

const HEADER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../kmod/pmig_abi.h");

/// What the C compiler says of the header: "struct", "struct.field" and
/// constants, each with its number or numbers. None if there is no compiler.
fn ask_c(program: &str) -> Option<BTreeMap<String, Vec<u64>>> {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("abi.c");
    let binary = dir.path().join("abi");
    std::fs::write(&source, program).unwrap();
    let built = Command::new("cc")
        // Padding would be bytes that neither side names.
        .args(["-Wall", "-Wpadded", "-Werror", "-o"])
        .arg(&binary)
        .arg(&source)
        .output();
    let built = match built {
        Ok(built) => built,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
        Err(e) => panic!("run cc: {e}"),
    };
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let out = Command::new(&binary).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let numbers = |line: &str| {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap().to_owned();
        (name, words.map(|w| w.parse().unwrap()).collect())
    };
    Some(text.lines().map(numbers).collect())
}

#[test]
fn structs_and_constants_are_those_of_the_header() {
    let mut c = format!("#include <stddef.h>\n#include <stdio.h>\n#include \"{HEADER}\"\n");
    c.push_str("int main(void) {\n");
    for (name, _, fields) in abi::struct_layouts() {
        writeln!(c, "printf(\"{name} %zu\\n\", sizeof(struct {name}));").unwrap();
        for (field, ..) in fields {
            writeln!(
                c,
                "printf(\"{name}.{field} %zu %zu\\n\", offsetof(struct {name}, {field}), \
                 sizeof(((struct {name} *)0)->{field}));"
            )
            .unwrap();
        }
    }
    for (name, _) in abi::constants() {
        writeln!(
            c,
            "printf(\"{name} %llu\\n\", (unsigned long long)({name}));"
        )
        .unwrap();
    }
    writeln!(c, "printf(\"%s 0\\n\", PMIG_DEVICE); return 0; }}").unwrap();

    let Some(said) = ask_c(&c) else {
        eprintln!("skipped: structs_and_constants_are_those_of_the_header: no cc");
        return;
    };
    for (name, size, fields) in abi::struct_layouts() {
        assert_eq!(said[name], [size as u64], "size of {name}");
        let mut end = 0;
        for (field, offset, bytes) in fields {
            let c = &said[&format!("{name}.{field}")];
            assert_eq!(*c, [offset as u64, bytes as u64], "{name}.{field}");
            assert_eq!(offset, end, "{name}.{field} follows the one before");
            end = offset + bytes;
        }
        assert_eq!(end, size, "{name} ends with its last field");
    }
    for (name, value) in abi::constants() {
        assert_eq!(said[name], [value], "{name}");
    }
    assert!(said.contains_key(DEVICE));
}

#[test]
fn the_header_has_nothing_that_is_missing_here() {
    let header = std::fs::read_to_string(HEADER).unwrap();
    let mut constants = BTreeSet::new();
    let mut structs = BTreeSet::new();
    for line in header.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("#define"), Some(name), Some(_)) => {
                constants.insert(name);
            }
            (Some("struct"), Some(name), Some("{")) => {
                structs.insert(name);
            }
            _ => {}
        }
    }
    constants.remove("PMIG_DEVICE");
    let mine: BTreeSet<_> = abi::constants().into_iter().map(|(n, _)| n).collect();
    assert_eq!(constants, mine);
    let mine: BTreeSet<_> = abi::struct_layouts().into_iter().map(|s| s.0).collect();
    assert_eq!(structs, mine);
}

#[test]
fn every_section_has_a_name() {
    for (name, value) in abi::constants() {
        if name.starts_with("PMIG_SEC_") {
            assert_ne!(section_name(value), "unknown", "{name}");
        }
    }
}
