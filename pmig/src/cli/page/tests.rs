//! What a page must say, and must not do.

use std::time::{Duration, UNIX_EPOCH};

use pmig::error::Obstacle;
use pmig::phase::Phase;
use pmig::report::{End, Event, Facts, Freeze, Round, Summary};
use roxmltree::{Document, Node, ParsingOptions};

use super::*;

const HOSTILE: &str = "</title><script>alert('x')</script>\"&\u{202e}\x1b[2J\n\u{0}\u{ffff}";

fn us(us: u64) -> Duration {
    Duration::from_micros(us)
}

fn facts(name: &str) -> Event {
    Event::Facts(Facts {
        id: "5f".repeat(16),
        pid: 4242,
        comm: name.into(),
        processes: 1,
        threads: 1,
        bytes: 312_000_000,
        files: 9,
        from: name.replace("simulate", "a"),
        to: name.replace("simulate", "b"),
        kernel_from: "6.12.117".into(),
        kernel_to: name.replace("simulate", "6.12.117"),
        pcb: "kmod".into(),
        tracking: "uffd".into(),
    })
}

fn round(round: u32, bytes: u64, of: u64, elapsed: u64, dirty_rate: Option<u64>) -> Round {
    Round {
        round,
        pages: of / 4096,
        bytes,
        of,
        elapsed: us(elapsed),
        rate: bytes.saturating_mul(1_000_000) / elapsed.max(1),
        dirty_rate,
        eta: None,
    }
}

fn freeze() -> Freeze {
    let mut freeze = Freeze {
        at: us(1_560_800),
        total: us(12_400),
        clock_error: Some(us(21)),
        pages: 48,
        bytes: 221_000,
        ..Freeze::default()
    };
    for (name, time) in [
        ("stop", 200),
        ("scan", 400),
        ("descriptors", 300),
        ("pcb", 900),
        ("pages", 5_100),
        ("files", 2),
        ("check", 350),
        ("hold", 800),
        ("wire", 3_600),
        ("resume", 748),
    ] {
        freeze.add(name, us(time));
    }
    freeze
}

fn phase(phase: Phase) -> Event {
    Event::Phase { phase }
}

fn ended(phase: Phase, what: &str, elapsed: u64) -> Event {
    Event::Ended {
        phase,
        what: what.into(),
        elapsed: us(elapsed),
    }
}

/// As when the target's word was lost, and the records told the end.
fn unmeasured(mut heard: Vec<Heard>) -> Vec<Heard> {
    if let Some((_, Event::Done(summary))) = heard.last_mut() {
        summary.freeze = Freeze {
            at: Duration::ZERO,
            total: Duration::ZERO,
            clock_error: None,
            ..freeze()
        };
    }
    heard
}

/// What is heard until the program is stopped.
fn copying(name: &str) -> Vec<Heard> {
    [
        (10, phase(Phase::Hello)),
        (21_000, facts(name)),
        (24_000, ended(Phase::Hello, "accepted", 23_900)),
        (24_100, phase(Phase::Build)),
        (
            62_000,
            ended(Phase::Build, "41 mappings, 9 descriptors", 38_000),
        ),
        (62_050, phase(Phase::Copy)),
        (
            272_000,
            Event::Round(round(1, 62_000_000, 312_000_000, 200_000, None)),
        ),
        (
            472_000,
            Event::Round(round(1, 109_000_000, 312_000_000, 400_000, None)),
        ),
        (
            672_000,
            Event::Round(round(1, 170_000_000, 312_000_000, 600_000, None)),
        ),
        (
            872_000,
            Event::Round(round(1, 238_000_000, 312_000_000, 800_000, None)),
        ),
        (
            1_172_000,
            Event::RoundEnded(round(1, 309_000_000, 312_000_000, 1_100_000, None)),
        ),
        (
            1_372_000,
            Event::Round(round(2, 39_000_000, 72_000_000, 190_000, Some(65_000_000))),
        ),
        (
            1_504_000,
            Event::RoundEnded(round(2, 72_000_000, 72_000_000, 330_000, Some(65_000_000))),
        ),
        (
            1_556_000,
            Event::RoundEnded(round(3, 9_800_000, 9_800_000, 50_000, Some(29_000_000))),
        ),
        (1_560_000, ended(Phase::Copy, "3 rounds", 1_498_000)),
        (1_560_400, phase(Phase::Freeze)),
    ]
    .map(|(at, event)| (us(at), event))
    .into()
}

fn moved(name: &str) -> Vec<Heard> {
    let mut heard = copying(name);
    let summary = Summary {
        id: "5f".repeat(16),
        pid: 4242,
        comm: name.into(),
        to: name.replace("simulate", "b"),
        end: End::Moved,
        total: us(1_573_300),
        bytes_sent: 391_200_000,
        rounds: 3,
        attach: us(300),
        tracking: "uffd".into(),
        left_behind: 0,
        filled: None,
        peak: [0; 2],
        freeze: freeze(),
    };
    let note = format!("what is typed at {name} comes later");
    heard.insert(2, (us(21_100), Event::Note { text: note }));
    heard.extend(
        [
            (1_568_600, phase(Phase::Ready)),
            (1_572_400, phase(Phase::Commit)),
            (1_573_250, phase(Phase::Release)),
            (1_581_000, Event::Done(summary)),
        ]
        .map(|(at, event)| (us(at), event)),
    );
    heard
}

fn failed(mut heard: Vec<Heard>, outcome: &str, stopped: Option<Duration>) -> Vec<Heard> {
    let at = heard.last().unwrap().0 + us(4_100);
    let event = Event::Failed {
        error: "connection to b: broken pipe".into(),
        obstacles: Vec::new(),
        outcome: outcome.into(),
        exit_code: 4,
        stopped,
    };
    heard.push((at, event));
    heard
}

fn page_of(name: &str, heard: &[Heard], said: &[&str]) -> String {
    page(&Told {
        pid: 4242,
        name: name.into(),
        from: "a".into(),
        to: "b".into(),
        addr: "tcp:b".into(),
        asked: vec![("files", "travel along".into())],
        begun: UNIX_EPOCH,
        heard,
        said: said.iter().map(|s| (*s).into()).collect(),
    })
}

fn parsed(html: &str) -> Document<'_> {
    let options = ParsingOptions {
        allow_dtd: true,
        ..ParsingOptions::default()
    };
    Document::parse_with_options(html, options).unwrap_or_else(|e| panic!("{e}: {html}"))
}

/// Everything that a page tells, one word after the other.
fn words(document: &Document) -> String {
    let texts = document.descendants().filter_map(|n| n.text());
    texts.collect::<Vec<_>>().join(" ")
}

fn with_class<'a, 'i>(document: &'a Document<'i>, class: &str) -> Vec<Node<'a, 'i>> {
    let has = |n: &Node| n.attribute("class") == Some(class);
    document.descendants().filter(has).collect()
}

fn number(node: &Node, name: &str) -> f64 {
    node.attribute(name).unwrap().parse().unwrap()
}

/// Whatever may happen.
fn all() -> Vec<Vec<Heard>> {
    let mut all = vec![moved("simulate"), moved(HOSTILE)];
    all.push(unmeasured(moved("simulate")));
    // Whatever event was the last.
    for n in 0..moved("x").len() {
        all.push(moved("x")[..n].to_vec());
    }
    for outcome in [
        "never_stopped",
        "runs_on",
        "unresolved",
        "moved",
        "ended",
        "",
    ] {
        for until in [1, 5, 9, 16, 18, 20] {
            let heard = moved("simulate")[..until].to_vec();
            all.push(failed(heard, outcome, Some(us(3_000))));
        }
    }
    // As many rounds as there may be, and none of which anything is known.
    let mut many = copying("simulate")[..6].to_vec();
    for n in 1..=30 {
        let event = Event::RoundEnded(round(n, 1 << 30, 1 << 30, 9_000_000, Some(1)));
        many.push((us(100_000 + u64::from(n) * 9_000_000), event));
    }
    many.push((us(300_000_000), phase(Phase::Freeze)));
    all.push(many);
    let blind = |(_, event): &Heard| !matches!(event, Event::Round(_) | Event::RoundEnded(_));
    all.push(moved("simulate").into_iter().filter(blind).collect());
    // Moments and amounts that nobody expects.
    let odd = moved("simulate");
    let odd = odd.into_iter().map(|(_, event)| (Duration::ZERO, event));
    all.push(odd.collect());
    let huge = round(1, u64::MAX, u64::MAX, 0, Some(u64::MAX));
    all.push(vec![
        (us(0), phase(Phase::Copy)),
        (us(0), Event::RoundEnded(huge.clone())),
        (Duration::MAX, Event::RoundEnded(huge)),
    ]);
    all
}

#[test]
fn every_page_is_well_formed_and_loads_and_runs_nothing() {
    for heard in all() {
        let html = page_of(HOSTILE, &heard, &[HOSTILE]);
        let document = parsed(&html);
        for node in document.descendants().filter(Node::is_element) {
            let name = node.tag_name().name();
            let known = [
                "html", "head", "meta", "title", "style", "body", "main", "section", "div", "h1",
                "h2", "p", "span", "bdi", "dl", "dt", "dd", "ul", "li", "table", "thead", "tbody",
                "tr", "th", "td", "svg", "defs", "pattern", "rect", "path", "circle", "text",
            ];
            assert!(known.contains(&name), "{name}");
            for attribute in node.attributes() {
                let name = attribute.name();
                assert!(
                    !name.starts_with("on") && name != "src" && name != "href",
                    "{name}"
                );
                if ["x", "y", "width", "height", "cx", "d", "viewBox"].contains(&name) {
                    let value = attribute.value();
                    assert!(!value.contains("NaN") && !value.contains("inf"), "{value}");
                }
            }
        }
        for word in [
            "http:", "https:", "://", "src=", "<script", "@import", "\u{202e}",
        ] {
            assert!(!html.contains(word), "{word}");
        }
        assert_eq!(
            html.matches("url(").count(),
            html.matches("url(#still)").count()
        );
        assert!(html.contains("default-src 'none'"));
    }
}

#[test]
fn hostile_names_are_shown_and_do_nothing() {
    let html = page_of(HOSTILE, &moved(HOSTILE), &[]);
    let document = parsed(&html);
    let title = document.descendants().find(|n| n.has_tag_name("title"));
    let title = title.and_then(|n| n.text()).unwrap();
    let shown = "</title><script>alert('x')</script>\"&\\u{202e}\\u{1b}[2J\\n\\u{0}\\u{ffff}";
    assert!(title.contains(shown), "{title}");
    assert!(!html.chars().any(|c| c.is_control() && c != '\n'));
}

#[test]
fn nothing_stands_outside_the_graphic() {
    for heard in all() {
        let html = page_of("simulate", &heard, &[]);
        let document = parsed(&html);
        for svg in document.descendants().filter(|n| n.has_tag_name("svg")) {
            let view: Vec<f64> = svg
                .attribute("viewBox")
                .unwrap()
                .split(' ')
                .map(|n| n.parse().unwrap())
                .collect();
            for rect in svg
                .descendants()
                .filter(|n| n.has_tag_name("rect") && n.has_attribute("x"))
            {
                let (x, y) = (number(&rect, "x"), number(&rect, "y"));
                let (wide, high) = (number(&rect, "width"), number(&rect, "height"));
                assert!(x >= 0.0 && x + wide <= view[2] + 2.0, "{rect:?}");
                assert!(y >= 0.0 && y + high <= view[3], "{rect:?}");
            }
        }
    }
}

#[test]
fn the_parts_of_the_freeze_are_to_scale_and_add_up() {
    let html = page_of("simulate", &moved("simulate"), &[]);
    let document = parsed(&html);
    let bars: Vec<Node> = with_class(&document, "still");
    // The band, freeze, ready, commit, and nine parts: one is too short.
    let parts = &bars[4..];
    assert_eq!(parts.len(), 9);
    let all: f64 = parts.iter().map(|bar| number(bar, "width")).sum();
    let space = scale::RIGHT - scale::LEFT;
    assert!((all - space).abs() < 1.0, "{all} of {space}");
    let pages = number(&parts[4], "width");
    assert!((pages - space * 5.1 / 12.4).abs() < 0.1, "{pages}");
    // Each begins where the one before ends.
    for pair in parts.windows(2) {
        let end = number(&pair[0], "x") + number(&pair[0], "width");
        assert!((number(&pair[1], "x") - end).abs() < 0.3);
    }
    let text = words(&document);
    for said in [
        "5.1 ms",
        "3.6 ms",
        "stood still for 12.4 ms",
        "magnified 130 times",
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
    // The magnified place is where the program stood still.
    let span = scale::Span::new(Duration::ZERO, us(1_581_000));
    let band = number(&bars[0], "x");
    assert!((band - span.x(us(1_560_800))).abs() < 0.1, "{band}");
}

#[test]
fn a_page_tells_what_happened() {
    let html = page_of("simulate", &moved("simulate"), &[]);
    let text = words(&parsed(&html));
    for said in [
        "running on b as 4242, 1.6 s after you asked; 391 MB sent",
        "1 process, 1 thread, 312 MB of memory, 9 descriptors",
        "a, linux 6.12.117",
        "41 mappings, 9 descriptors",
        "48 pages, and the rest",
        "21.0 µs at most, between the two machines",
        "what is typed at simulate comes later",
        "travel along",
        "kmod",
        "1970-01-01 00:00:00 UTC",
        "dirtied at 65 MB/s",
        "sent at 281 MB/s",
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
    for phase in Phase::ALL {
        assert!(text.contains(phase.name()), "{phase}");
    }
    // What a round dirtied is what the next had to look at.
    let rows: Vec<Vec<String>> = parsed(&html)
        .descendants()
        .filter(|n| n.has_tag_name("tr"))
        .map(|n| {
            n.children()
                .filter_map(|c| c.text())
                .map(str::to_owned)
                .collect()
        })
        .collect();
    let row = ["2", "330 ms", "72 MB", "72 MB", "218 MB/s", "9.8 MB"];
    assert!(rows.iter().any(|r| r == &row), "{rows:?}");
    let row = ["3", "50.0 ms", "9.8 MB", "9.8 MB", "196 MB/s", "197 kB"];
    assert!(rows.iter().any(|r| r == &row), "{rows:?}");
}

#[test]
fn a_failed_migration_says_where_the_program_is() {
    let said = [
        "pmig: connection to b: broken pipe",
        "4242 runs on here; try again",
    ];
    for (outcome, place, mark) in [
        ("never_stopped", "→ a", "✕ failed in copy"),
        ("runs_on", "→ a", "✕ failed in freeze"),
        ("unresolved", "→ held", "✕ not settled in freeze"),
        ("moved", "→ b", "✕ failed in freeze"),
        ("ended", "→ has ended", "✕ failed in freeze"),
    ] {
        let stopped = (outcome == "runs_on").then_some(us(3_000));
        let heard = match outcome {
            "never_stopped" => copying("simulate")[..9].to_vec(),
            _ => copying("simulate"),
        };
        let html = page_of("simulate", &failed(heard, outcome, stopped), &said);
        let text = words(&parsed(&html));
        for word in [
            place,
            mark,
            "connection to b: broken pipe",
            "4242 runs on here; try again",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert_eq!(text.contains("stands still"), outcome == "unresolved");
        assert_eq!(
            text.contains("stood still for 3.0 ms"),
            outcome == "runs_on"
        );
        assert_eq!(text.contains("never"), outcome == "never_stopped");
    }
}

#[test]
fn nobody_says_how_long_it_stood_still_where_nobody_knows() {
    let html = page_of("simulate", &unmeasured(moved("simulate")), &[]);
    let text = words(&parsed(&html));
    assert!(text.contains("stood still"), "{text}");
    for word in ["stood still for", "magnified", "0.00 ms"] {
        assert!(!text.contains(word), "{word}: {text}");
    }
}

#[test]
fn obstacles_are_named_with_their_remedies() {
    let event = Event::Failed {
        error: "ignored".into(),
        obstacles: vec![Obstacle::new("fd 7 <b>", "is a door", "close it")],
        outcome: "never_stopped".into(),
        exit_code: 3,
        stopped: None,
    };
    let heard = [(us(0), phase(Phase::Hello)), (us(900), event)];
    let html = page_of("simulate", &heard, &["4242 was never frozen"]);
    let text = words(&parsed(&html));
    for word in [
        "refused in hello",
        "fd 7 <b>",
        "is a door",
        "close it",
        "was never frozen",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(!text.contains("ignored"));
}
