//! The house rules of `ARCHITECTURE.md` and `CONTRIBUTING.md` that a machine
//! can check.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Who may import whom inside `pmig/src`: a module, and the modules it may
/// name. It may always name itself, and `error`. The order is the one of
/// `ARCHITECTURE.md`: nobody names what comes after it.
const MAP: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("phase", &[]),
    ("id", &[]),
    ("interrupt", &[]),
    ("transport", &[]),
    ("patience", &[]),
    ("laps", &[]),
    ("fault", &["phase"]),
    ("report", &["phase"]),
    ("sys", &[]),
    ("proc", &[]),
    ("tracee", &["sys", "proc"]),
    ("state", &["sys", "proc", "tracee", "id"]),
    ("policy", &["state"]),
    ("image", &["state"]),
    ("husk", &["sys", "proc", "tracee", "state"]),
    ("hold", &["proc", "id"]),
    ("journal", &["hold", "id", "transport"]),
    ("claim", &["journal"]),
    ("lineage", &["id", "journal"]),
    (
        "protocol",
        &["state", "image", "id", "journal", "transport"],
    ),
    (
        "checkpoint",
        &[
            "state",
            "image",
            "id",
            "journal",
            "patience",
            "protocol",
            "transport",
        ],
    ),
    (
        "holder",
        &["id", "image", "journal", "proc", "protocol", "sys"],
    ),
    (
        "fill",
        &[
            "fault",
            "hold",
            "id",
            "journal",
            "patience",
            "phase",
            "protocol",
            "state",
            "sys",
            "transport",
        ],
    ),
    (
        "resolve",
        &[
            "fill",
            "state",
            "checkpoint",
            "hold",
            "id",
            "journal",
            "protocol",
            "transport",
        ],
    ),
    (
        "keeper",
        &[
            "fill", "sys", "state", "fault", "id", "patience", "phase", "journal", "resolve",
        ],
    ),
    (
        "source",
        &[
            "checkpoint",
            "claim",
            "fault",
            "fill",
            "hold",
            "holder",
            "husk",
            "id",
            "image",
            "interrupt",
            "journal",
            "keeper",
            "laps",
            "lineage",
            "phase",
            "patience",
            "proc",
            "protocol",
            "report",
            "resolve",
            "state",
            "sys",
            "tracee",
            "transport",
        ],
    ),
    (
        "target",
        &[
            "fault",
            "fill",
            "hold",
            "holder",
            "husk",
            "id",
            "image",
            "journal",
            "laps",
            "lineage",
            "patience",
            "phase",
            "policy",
            "protocol",
            "report",
            "state",
            "sys",
            "tracee",
            "transport",
        ],
    ),
];

/// The rooms, and which other rooms each may name. The first three are what
/// rooms share; `pcb` puts the rooms of one thread together.
const ROOMS: &[(&str, &[&str])] = &[
    ("words", &[]),
    ("paths", &[]),
    ("objects", &["paths"]),
    ("attributes", &["words"]),
    ("bounds", &["words"]),
    ("clock", &[]),
    ("credentials", &["words"]),
    ("limits", &["words"]),
    ("registers", &["words"]),
    ("restart", &["words"]),
    ("scheduling", &["words"]),
    ("signals", &["words"]),
    ("fd", &["objects", "paths"]),
    ("files", &["objects", "paths"]),
    ("memory", &["paths"]),
    (
        "pcb",
        &[
            "attributes",
            "bounds",
            "credentials",
            "limits",
            "registers",
            "restart",
            "scheduling",
            "signals",
            "words",
        ],
    ),
];

/// Where unsafe code may be.
const UNSAFE: &[&str] = &[
    "pmig/src/sys/",
    "lab/src/sys.rs",
    "lab/src/victim/",
    "lab/src/bin/files.rs",
    "lab/src/bin/kmod_hammer/raw.rs",
];

/// Longer files are not read.
const LINES: usize = 700;

fn top() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A file of ours: its path from the top, and its text.
struct Source {
    path: String,
    text: String,
}

fn sources(extensions: &[&str]) -> Vec<Source> {
    let mut found = Vec::new();
    for dir in ["pmig", "lab", "kmod", "benches", "tests"] {
        walk(&top().join(dir), extensions, &mut found);
    }
    assert!(found.len() > 5, "the repository is not where it should be");
    found
}

fn walk(dir: &Path, extensions: &[&str], found: &mut Vec<Source>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            if !path.ends_with("target") {
                walk(&path, extensions, found);
            }
        } else if path
            .extension()
            .is_some_and(|e| extensions.iter().any(|x| e == *x))
        {
            // kbuild writes it.
            if path.to_string_lossy().ends_with(".mod.c") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let path = path.strip_prefix(top()).unwrap();
            found.push(Source {
                path: path.to_str().unwrap().to_owned(),
                text,
            });
        }
    }
}

fn report(broken: Vec<String>) {
    assert!(broken.is_empty(), "\n  {}\n", broken.join("\n  "));
}

/// The text without comments and the content of literals, lines kept.
fn code(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |n| n + 2)
        } else if let Some(hashes) = raw_string(rest) {
            let end = format!("\"{}", "#".repeat(hashes));
            let start = hashes + 2;
            rest[start..]
                .find(&end)
                .map_or(rest.len(), |n| start + n + end.len())
        } else if c == '"' {
            string(rest)
        } else if c == '\'' {
            character(rest)
        } else {
            0
        };
        if skipped == 0 {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        } else {
            out.extend(rest[..skipped].chars().filter(|c| *c == '\n'));
            out.push(' ');
            rest = &rest[skipped..];
        }
    }
    out
}

fn raw_string(text: &str) -> Option<usize> {
    let rest = text.strip_prefix('r')?;
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    rest[hashes..].starts_with('"').then_some(hashes)
}

fn string(text: &str) -> usize {
    let mut escaped = false;
    for (n, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return n + 1,
            _ => {}
        }
    }
    text.len()
}

/// A character, not a lifetime.
fn character(text: &str) -> usize {
    let mut inside = text.char_indices().skip(1);
    match inside.next() {
        Some((_, '\\')) => {
            inside.next();
            text[3..].find('\'').map_or(0, |n| n + 4)
        }
        Some((_, _)) => match inside.next() {
            Some((n, '\'')) => n + 1,
            _ => 0,
        },
        None => 0,
    }
}

/// Without the tests at its end, which may look everywhere.
fn without_tests(code: &str) -> &str {
    code.find("#[cfg(test)]\nmod tests {")
        .or_else(|| code.find("#[cfg(test)]\npub(super) mod tests {"))
        .map_or(code, |n| &code[..n])
}

fn words(code: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = code.trim_start();
    while let Some(c) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let len = if is_word(c) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            c.len_utf8()
        };
        words.push(&rest[..len]);
        rest = rest[len..].trim_start();
    }
    words
}

/// All paths that begin with `crate` or `super`, braces multiplied out, as
/// paths from the crate's root.
fn named(module: &[&str], code: &str) -> BTreeSet<Vec<String>> {
    let words = words(code);
    let mut found = BTreeSet::new();
    let mut at = 0;
    while at < words.len() {
        let (mut base, mut next): (Vec<String>, usize) = match words[at] {
            "crate" => (Vec::new(), at + 1),
            "super" => (owned(&module[..module.len().saturating_sub(1)]), at + 1),
            _ => {
                at += 1;
                continue;
            }
        };
        while words.get(next) == Some(&"::") && words.get(next + 1) == Some(&"super") {
            base.pop();
            next += 2;
        }
        at = next;
        tree(&words, &mut at, base, &mut found);
    }
    found
}

fn owned(path: &[&str]) -> Vec<String> {
    path.iter().map(|s| (*s).to_owned()).collect()
}

fn tree(words: &[&str], at: &mut usize, mut path: Vec<String>, found: &mut BTreeSet<Vec<String>>) {
    while words.get(*at) == Some(&"::") {
        *at += 1;
        match words.get(*at) {
            Some(&"{") => {
                *at += 1;
                while words.get(*at).is_some_and(|w| *w != "}") {
                    let mut path = path.clone();
                    if words[*at] != "self" {
                        path.push(words[*at].to_owned());
                    }
                    *at += 1;
                    tree(words, at, path, found);
                    while words.get(*at).is_some_and(|w| *w != "," && *w != "}") {
                        *at += 1;
                    }
                    if words.get(*at) == Some(&",") {
                        *at += 1;
                    }
                }
                *at += 1;
                return;
            }
            Some(word) if word.starts_with(|c: char| c.is_alphabetic() || c == '_') => {
                path.push((*word).to_owned());
                *at += 1;
            }
            _ => break,
        }
    }
    found.insert(path);
}

fn module_of(path: &str) -> Vec<&str> {
    let path = path.trim_end_matches(".rs");
    let path = path.strip_suffix("/mod").unwrap_or(path);
    path.split('/').collect()
}

#[test]
fn imports_go_one_way() {
    for (n, (module, may)) in MAP.iter().enumerate() {
        for other in *may {
            let place = MAP.iter().position(|(m, _)| m == other);
            assert!(place.is_some_and(|p| p < n), "{module} -> {other}");
        }
    }
    let mut broken = Vec::new();
    for source in sources(&["rs"]) {
        let Some(inside) = source.path.strip_prefix("pmig/src/") else {
            continue;
        };
        let module = module_of(inside);
        if ["main", "lib", "cli"].contains(&module[0]) || module.last() == Some(&"tests") {
            continue;
        }
        let Some((_, may)) = MAP.iter().find(|(m, _)| *m == module[0]) else {
            broken.push(format!("{}: not in the map", source.path));
            continue;
        };
        let code = code(&source.text);
        for path in named(&module, without_tests(&code)) {
            let Some(other) = path.first() else { continue };
            let known = MAP.iter().any(|(m, _)| m == other);
            if known && other != module[0] && other != "error" && !may.contains(&&**other) {
                broken.push(format!("{} names {}", source.path, path.join("::")));
            }
        }
    }
    report(broken);
}

#[test]
fn rooms_know_only_what_they_share() {
    let mut broken = Vec::new();
    for source in sources(&["rs"]) {
        let Some(inside) = source.path.strip_prefix("pmig/src/state/") else {
            continue;
        };
        let room = module_of(inside);
        if room == ["mod"] || room.last() == Some(&"tests") {
            continue;
        }
        let Some((_, may)) = ROOMS.iter().find(|(r, _)| *r == room[0]) else {
            broken.push(format!("{}: not in the list of rooms", source.path));
            continue;
        };
        let module = module_of(source.path.strip_prefix("pmig/src/").unwrap());
        let code = code(&source.text);
        for path in named(&module, without_tests(&code)) {
            let [first, other, ..] = &path[..] else {
                continue;
            };
            let known = ROOMS.iter().any(|(r, _)| r == other);
            if first == "state" && known && other != room[0] && !may.contains(&&**other) {
                broken.push(format!("{} names {}", source.path, path.join("::")));
            }
        }
    }
    report(broken);
}

#[test]
fn unsafe_code_stays_where_it_is_kept() {
    let mut broken = Vec::new();
    for source in sources(&["rs"]) {
        let text = code(&source.text);
        let kept = UNSAFE.iter().any(|place| source.path.starts_with(place));
        let plain: Vec<&str> = source.text.lines().collect();
        for (n, line) in text.lines().enumerate() {
            let words = words(line);
            let block = words.windows(2).any(|w| w == ["unsafe", "{"])
                || words.windows(2).any(|w| w == ["unsafe", "impl"]);
            let any = block || words.contains(&"unsafe");
            let at = format!("{}:{}", source.path, n + 1);
            if any && !kept {
                broken.push(format!("{at}: unsafe code"));
            }
            // A statement may begin some lines before its block.
            let before = plain[n.saturating_sub(12)..=n].iter();
            if block && !before.clone().any(|l| l.contains("SAFETY:")) {
                broken.push(format!("{at}: no SAFETY: line"));
            }
        }
    }
    report(broken);
}

#[test]
fn files_can_be_read_to_their_end() {
    let long = sources(&["rs", "c", "h"])
        .into_iter()
        .map(|s| (s.text.lines().count(), s.path))
        .filter(|(lines, _)| *lines > LINES)
        .map(|(lines, path)| format!("{path}: {lines} lines, {LINES} are allowed"));
    report(long.collect());
}

#[test]
fn nothing_is_left_for_later() {
    let macros = ["todo", "unimplemented", "dbg"];
    let mut broken = Vec::new();
    for source in sources(&["rs"]) {
        let text = code(&source.text);
        let words = words(&text);
        for pair in words.windows(2) {
            if macros.contains(&pair[0]) && pair[1] == "!" {
                broken.push(format!("{}: {}!", source.path, pair[0]));
            }
        }
    }
    report(broken);
}

#[test]
fn the_kernel_module_says_its_licence() {
    let mut broken = Vec::new();
    for source in sources(&["c", "h"]) {
        let line = source.text.lines().next().unwrap_or("");
        let ours = source.path.starts_with("kmod/");
        if ours && !line.contains("SPDX-License-Identifier: GPL-2.0") {
            broken.push(format!("{}: no SPDX line", source.path));
        }
    }
    report(broken);
}

#[test]
fn the_rules_see_what_they_look_for() {
    let text = "use crate::{state::{fd, paths::X}, sys};\n\
                // crate::cli\n let a = \"crate::target\"; let b = '\"'; let c: &'a u8;\n\
                fn f() { super::super::source::go(crate::hold::probe()) }";
    let found: Vec<String> = named(&["state", "pipe"], &code(text))
        .into_iter()
        .map(|p| p.join("::"))
        .collect();
    let expected = [
        "hold::probe",
        "source::go",
        "state::fd",
        "state::paths::X",
        "sys",
    ];
    assert_eq!(found, expected);
    assert_eq!(module_of("state/fd/mod.rs"), ["state", "fd"]);
}
