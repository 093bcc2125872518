//! A page tells how a migration went.

use anyhow::{ensure, Context, Result};
use lab::browser::Browser;
use lab::harness::Trial;
use lab::scenario::{dump, gone, migrate, migrate_to, runs_on, unmoved, Moved, Program, LIMIT};
use lab::{Host, Lab, Make};
use std::path::Path;

type Claim = (&'static str, fn(&Lab) -> Result<()>);

const CLAIMS: &[Claim] = &[
    ("a_page_tells_how_a_migration_went", went_well),
    (
        "a_page_of_a_failed_migration_says_where_the_program_is",
        failed,
    ),
    (
        "a_page_that_cannot_be_written_is_found_before_anything_begins",
        found_before,
    ),
    (
        "a_page_that_cannot_be_written_in_the_end_changes_no_outcome",
        full_disk,
    ),
    ("a_dump_has_a_page_that_never_takes_its_place", dumped),
];

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = CLAIMS
        .iter()
        .map(|(name, body)| Trial::new(Make::Netns, format!("reporting::{name}"), body))
        .collect();
    // Machines of QEMU's have clocks of their own.
    let (name, body) = CLAIMS[0];
    trials.push(Trial::new(Make::Vm, format!("reporting::{name}"), body));
    trials.push(Trial::new(
        Make::Netns,
        "reporting::a_browser_shows_pages_and_finds_nothing_wrong_with_them",
        browsed,
    ));
    trials
}

const PAGE: &str = "/srv/work/page.html";
const LINE: &str = "iterative lines=200 heap_kb=20000";

fn page(host: &dyn Host) -> Result<String> {
    Ok(String::from_utf8(host.read(PAGE)?)?)
}

fn has(page: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(page.contains(word), "no word of {word:?}");
    }
    Ok(())
}

/// Nothing but pages is left beside them.
fn tidy(host: &dyn Host) -> Result<()> {
    let names = host.sh("ls -A /srv/work")?;
    ensure!(!names.contains(".pmig-report"), "{names}");
    Ok(())
}

fn started(lab: &Lab) -> Result<(Program, String)> {
    let expected = unmoved(lab.b(), LINE, &["pace_us=0"])?;
    let program = Program::start(lab.a(), LINE)?;
    program.wait_lines(lab.a(), 10)?;
    Ok((program, expected))
}

fn went_well(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let (program, expected) = started(lab)?;
    a.write(PAGE, 0o600, b"of the day before")?;
    let more = format!("--files ship --report {PAGE}");
    let moved = migrate(a, b, &program, &more, &[])?;
    let done = moved.ok()?;
    let page = page(a)?;
    has(
        &page,
        &[
            &format!("<title>{} iterative: a → b</title>", program.pid),
            &format!("running on b as {}", program.pid),
            &format!(">{}</dd></div>", done["rounds"]),
            "magnified",
            "Rounds of the copy",
            "travel along",
            "</html>",
        ],
    )?;
    for phase in [
        "hello", "build", "copy", "freeze", "ready", "commit", "release",
    ] {
        has(&page, &[&format!(">{phase}</text>")])?;
    }
    for part in done["freeze"]["parts"].as_array().context("no parts")? {
        let shown = page.contains(&format!(">{}</text>", part["name"].as_str().unwrap_or("?")));
        let long = part["ms"].as_f64().is_some_and(|ms| ms >= 0.005);
        ensure!(shown == long, "{part}");
    }
    ensure!(done["freeze"]["at_ms"].as_f64() > Some(0.0), "{done}");
    tidy(a)?;
    runs_on(b, &program, &expected)
}

fn failed(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let (program, expected) = started(lab)?;
    let more = format!("--files ship --report {PAGE}");
    migrate_to(a, "unix:/srv/nobody", &program, &more, &[])?.failed(4, &["nobody"])?;
    let never = [
        "failed in hello",
        "/srv/nobody",
        "never frozen for it and runs on here",
    ];
    has(&page(a)?, &never)?;
    let cut = migrate(
        a,
        b,
        &program,
        &more,
        &[("PMIG_FAULT", "freeze:cut:source")],
    )?;
    cut.failed(4, &["runs_on"])?;
    let stopped = cut.event("failed").map(|event| &event["stopped_ms"]);
    ensure!(
        stopped.and_then(|ms| ms.as_f64()) > Some(0.0),
        "{}",
        cut.said()
    );
    has(
        &page(a)?,
        &["failed in freeze", "stood still for", "and runs on here"],
    )?;
    let refused = migrate(a, b, &program, &format!("--report {PAGE}"), &[])?;
    refused.failed(3, &[])?;
    has(
        &page(a)?,
        &[
            "refused in hello",
            "what stands in the way",
            &program.output,
        ],
    )?;
    tidy(a)?;
    runs_on(a, &program, &expected)
}

fn found_before(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let (program, expected) = started(lab)?;
    a.sh("mkdir /srv/work/sealed; mount -t tmpfs -o ro tmpfs /srv/work/sealed")?;
    let wrong = |moved: Result<Moved>, words: &[&str]| -> Result<()> {
        let moved = moved?;
        moved.failed(2, words)?;
        ensure!(moved.events.is_empty(), "{:?}", moved.events);
        Ok(())
    };
    for (file, word) in [
        ("/srv/nowhere/x.html", "No such file"),
        ("/srv/work/sealed/x.html", "Read-only"),
        ("/srv/work", "no plain file"),
        ("/dev/null", "no plain file"),
    ] {
        let more = format!("--files ship --report {file}");
        wrong(migrate(a, b, &program, &more, &[]), &[file, word])?;
        let more = format!("--report {file}");
        wrong(dump(a, &program, "/srv/work/x", &more, &[]), &[file, word])?;
    }
    a.sh("umount /srv/work/sealed; test -c /dev/null")?;
    let known = a.sh("pmig ps --all")?;
    ensure!(known.contains("nothing came here"), "{known}");
    tidy(a)?;
    runs_on(a, &program, &expected)
}

fn full_disk(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.a(), lab.b());
    let (program, expected) = started(lab)?;
    a.sh("mkdir /srv/work/full; mount -t tmpfs -o size=8k tmpfs /srv/work/full")?;
    let file = "/srv/work/full/x.html";
    a.write(file, 0o600, b"of the day before")?;
    let more = format!("--files ship --report {file}");
    let moved = migrate(a, b, &program, &more, &[])?;
    let (before, names) = (a.read(file)?, a.sh("ls -A /srv/work/full")?);
    a.sh("umount /srv/work/full")?;
    moved.ok()?;
    let said = moved.output.err();
    ensure!(said.contains(file) && said.contains("No space"), "{said}");
    ensure!(
        before == b"of the day before" && names == "x.html\n",
        "{names}"
    );
    gone(a, program.pid)?;
    runs_on(b, &program, &expected)
}

fn dumped(lab: &Lab) -> Result<()> {
    let a = lab.a();
    let (program, expected) = started(lab)?;
    let file = "/srv/work/x";
    // By another way to the same place.
    let same = dump(a, &program, file, "--report /srv/work/../work/x", &[])?;
    same.failed(2, &["both"])?;
    dump(a, &program, file, &format!("--report {PAGE}"), &[])?.ok()?;
    let page = page(a)?;
    has(
        &page,
        &[&format!("{} is in {file}", program.pid), "→ in a file"],
    )?;
    a.sh(&format!("pmig restore {file}"))?;
    tidy(a)?;
    runs_on(a, &program, &expected)
}

/// What a page must not do is found by what is looked for: a page does it.
const BAD: &str = "<!DOCTYPE html><meta http-equiv=\"Content-Security-Policy\" \
                   content=\"default-src 'none'\"><script>alert(1)</script>";

fn browsed(lab: &Lab) -> Result<()> {
    let browser = Browser::find()?;
    let (a, b) = (lab.a(), lab.b());
    let (program, expected) = started(lab)?;
    let more = format!("--files ship --report {PAGE}");
    migrate(a, b, &program, &more, &[("PMIG_FAULT", "copy:cut:source")])?.failed(4, &[])?;
    let failed = page(a)?;
    // What was built for it has its PID.
    b.wait_for("the end of the husk", LIMIT, &mut || {
        Ok(b.process(program.pid)?.is_none())
    })?;
    migrate(a, b, &program, &more, &[])?.ok()?;
    let moved = page(a)?;
    runs_on(b, &program, &expected)?;

    let dir = tempfile::tempdir()?;
    let at = |name: &str, text: &str| -> Result<_> {
        let path = dir.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path)
    };
    let bad = browser.read(&at("bad.html", BAD)?)?;
    ensure!(!bad.troubles.is_empty(), "the browser said nothing");
    let blank = at("blank.html", "<!DOCTYPE html><title>nothing</title>")?;
    let empty = browser.picture(&blank, false)?;
    for (name, text, word) in [
        ("moved.html", &moved, "running on b"),
        ("failed.html", &failed, "failed in copy"),
    ] {
        let path = at(name, text)?;
        let seen = browser.read(&path)?;
        ensure!(seen.troubles.is_empty(), "{name}: {:?}", seen.troubles);
        has(&seen.dom, &[word, "Where the time went", "</html>"])?;
        looks(&browser, &path, &empty).context(name)?;
    }
    Ok(())
}

/// There is something to be seen, in the light, in the dark and on paper.
fn looks(browser: &Browser, page: &Path, empty: &[u8]) -> Result<()> {
    let (light, dark) = (browser.picture(page, false)?, browser.picture(page, true)?);
    for picture in [&light, &dark] {
        ensure!(picture.starts_with(b"\x89PNG"), "no picture");
        // What is all of one colour is packed into nearly nothing.
        ensure!(picture.len() > 5 * empty.len(), "{} bytes", picture.len());
    }
    ensure!(light != dark, "the dark is light");
    let paper = browser.paper(page)?;
    ensure!(
        paper.starts_with(b"%PDF") && paper.len() > 10_000,
        "no paper"
    );
    Ok(())
}
