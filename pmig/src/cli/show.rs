//! How a migration looks: on a terminal, in plain lines, as JSON.

use std::io::{self, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pmig::error::printable;
use pmig::phase::Phase;
use pmig::report::{End, Event, Facts, Freeze, Progress, Summary};

/// Where the last column ends.
const WIDTH: usize = 78;

/// Every event as a line of JSON.
pub struct Json(Later);

/// A line for each thing that is over.
pub struct Plain(Later);

/// The same, and below it what is going on.
pub struct Terminal {
    later: Later,
    /// While a round is under way.
    bar: Option<ProgressBar>,
}

/// Lines wait while the program stands still: whoever reads them may be slow.
#[derive(Default)]
struct Later {
    frozen: bool,
    lines: Vec<String>,
}

impl Later {
    fn take(&mut self, event: &Event, lines: impl IntoIterator<Item = String>) -> Vec<String> {
        match event {
            Event::Phase { phase } => {
                self.frozen = matches!(phase, Phase::Freeze | Phase::Ready | Phase::Commit);
            }
            Event::Resumed(_) | Event::Done(_) | Event::Failed { .. } => self.frozen = false,
            _ => {}
        }
        self.lines.extend(lines);
        if self.frozen {
            Vec::new()
        } else {
            std::mem::take(&mut self.lines)
        }
    }
}

impl Json {
    pub fn new() -> Json {
        Json(Later::default())
    }
}

impl Progress for Json {
    fn event(&mut self, event: &Event) {
        let line = serde_json::to_string(event).ok();
        write(&self.0.take(event, line));
    }
}

impl Plain {
    pub fn new() -> Plain {
        Plain(Later::default())
    }
}

impl Progress for Plain {
    fn event(&mut self, event: &Event) {
        write(&self.0.take(event, lines(event)));
    }
}

impl Terminal {
    pub fn new() -> Terminal {
        Terminal {
            later: Later::default(),
            bar: None,
        }
    }

    fn show(&mut self, name: &str, bytes: u64, of: u64, eta: Option<Duration>) {
        let left = label(name);
        let done = format!("{} of {}", bare(bytes, of), size(of));
        let eta = eta.map_or(String::new(), |d| format!("eta {}", time(d)));
        let used = left.chars().count() + 18 + 2 + done.chars().count();
        let gap = WIDTH.saturating_sub(used + eta.chars().count()).max(1);
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stdout());
            if let Ok(style) = ProgressStyle::with_template("{prefix}{bar:18}  {msg}") {
                bar.set_style(style.progress_chars("##."));
            }
            bar
        });
        bar.set_prefix(left);
        bar.set_length(of.max(1));
        bar.set_position(bytes.min(of));
        bar.set_message(format!("{done}{}{eta}", " ".repeat(gap)));
    }

    fn end_bar(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Terminal {
    fn event(&mut self, event: &Event) {
        if !matches!(event, Event::Round(_) | Event::Fill(_) | Event::Note { .. }) {
            self.end_bar();
        }
        let lines = self.later.take(event, lines(event));
        match &self.bar {
            Some(bar) if !lines.is_empty() => bar.suspend(|| write(&lines)),
            _ => write(&lines),
        }
        match event {
            _ if self.later.frozen => {}
            Event::Round(r) => self.show(&format!("copy {}", r.round), r.bytes, r.of, r.eta),
            Event::Fill(f) => self.show("fill", f.bytes, f.of, f.eta),
            _ => {}
        }
    }
}

fn write(lines: &[String]) {
    let mut out = io::stdout().lock();
    for line in lines {
        // Nobody reads it any more: the migration goes on nevertheless.
        let _ = writeln!(out, "{line}");
    }
    let _ = out.flush();
}

fn lines(event: &Event) -> Vec<String> {
    match event {
        Event::Facts(facts) => vec![head(facts)],
        Event::Ended {
            phase: Phase::Build,
            what,
            elapsed,
        } => vec![row("build", what, &time(*elapsed))],
        Event::RoundEnded(round) => {
            let name = format!("copy {}", round.round);
            let took = time(round.elapsed);
            if round.bytes == 0 {
                return vec![row(&name, "nothing was written meanwhile", &took)];
            }
            let mut what = format!("{} at {}/s", size(round.bytes), size(round.rate));
            if let Some(dirty) = round.dirty_rate {
                what += &format!(", dirtied meanwhile at {}/s", size(dirty));
            }
            vec![row(&name, &what, &took)]
        }
        Event::Ended {
            phase: Phase::Fill,
            what,
            elapsed,
        } => vec![row("fill", what, &time(*elapsed))],
        Event::Note { text } => vec![row("note", &printable(text), "")],
        Event::Resumed(freeze) => frozen(freeze),
        Event::Done(summary) if summary.filled.is_some() => vec![end(summary)],
        Event::Done(summary) => done(summary),
        Event::Phase { .. }
        | Event::Ended { .. }
        | Event::Round(_)
        | Event::Fill(_)
        | Event::Failed { .. } => Vec::new(),
    }
}

fn head(f: &Facts) -> String {
    let count = |n: u32, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
    let left = format!(
        "{} {}   {} · {} · {} · {}",
        f.pid,
        printable(&f.comm),
        count(f.processes, "process", "processes"),
        count(f.threads, "thread", "threads"),
        size(f.bytes),
        count(f.files, "file", "files"),
    );
    let kernels = if f.kernel_to.is_empty() {
        format!("linux {}", printable(&f.kernel_from))
    } else if f.kernel_from == f.kernel_to {
        format!("linux {} on both", printable(&f.kernel_from))
    } else {
        format!(
            "linux {} -> {}",
            printable(&f.kernel_from),
            printable(&f.kernel_to)
        )
    };
    format!(
        "{left}      {} -> {}   {kernels}",
        printable(&f.from),
        printable(&f.to)
    )
}

fn done(s: &Summary) -> Vec<String> {
    let mut lines = frozen(&s.freeze);
    lines.push(end(s));
    lines
}

fn frozen(freeze: &Freeze) -> Vec<String> {
    let Freeze {
        total,
        pages,
        parts,
        ..
    } = freeze;
    let plural = if *pages == 1 { "" } else { "s" };
    let parts: Vec<String> = parts
        .iter()
        .map(|p| format!("{} {:.1}", printable(&p.name), p.time.as_secs_f64() * 1e3))
        .collect();
    vec![
        row("freeze", &format!("{pages} page{plural}"), &time(*total)),
        row("", &parts.join(" · "), ""),
    ]
}

/// What became of the program, in one line.
pub fn end(s: &Summary) -> String {
    let (to, pid, took, sent) = (printable(&s.to), s.pid, time(s.total), size(s.bytes_sent));
    match s.end {
        End::Moved => format!("running on {to} as {pid}, {took} after you asked; {sent} sent"),
        End::InFile => {
            format!("{pid} is in {to}, {sent}, {took} after you asked; it goes on by pmig restore")
        }
        End::Copied => format!("a copy of {pid} is in {to}, {sent}; {pid} itself runs on here"),
    }
}

fn label(name: &str) -> String {
    format!("  {name:<8} ")
}

/// A label, what it was, and right-aligned how long it took.
fn row(name: &str, what: &str, took: &str) -> String {
    let left = format!("{}{what}", label(name));
    let gap = WIDTH
        .saturating_sub(left.chars().count() + took.chars().count())
        .max(2);
    if took.is_empty() {
        left
    } else {
        format!("{left}{}{took}", " ".repeat(gap))
    }
}

const UNITS: [(&str, f64); 4] = [("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)];

fn unit(of: u64) -> (&'static str, f64) {
    UNITS
        .into_iter()
        .find(|(_, one)| of as f64 >= *one)
        .unwrap_or(("B", 1.0))
}

/// `312 MB`, `1.3 GB`: two digits at least.
pub fn size(bytes: u64) -> String {
    format!("{} {}", bare(bytes, bytes), unit(bytes).0)
}

/// The number alone, in the unit that suits another.
fn bare(bytes: u64, of: u64) -> String {
    let (_, one) = unit(of);
    let value = bytes as f64 / one;
    if value < 9.95 && one > 1.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

/// `0.21 ms`, `12.4 ms`, `850 ms`, `13.4 s`, `2 min 5 s`.
pub fn time(d: Duration) -> String {
    let s = d.as_secs_f64();
    if s < 0.00095 {
        format!("{:.2} ms", s * 1e3)
    } else if s < 0.0995 {
        format!("{:.1} ms", s * 1e3)
    } else if s < 0.9995 {
        format!("{:.0} ms", s * 1e3)
    } else if s < 99.95 {
        format!("{s:.1} s")
    } else {
        let s = s.round() as u64;
        format!("{} min {} s", s / 60, s % 60)
    }
}

#[cfg(test)]
mod tests {
    use pmig::report::Round;

    use super::*;

    #[test]
    fn numbers_have_units_and_no_noise() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (4_096, "4.1 kB"),
            (312_400_000, "312 MB"),
            (1_330_000_000, "1.3 GB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        for (us, text) in [
            (210, "0.21 ms"),
            (12_400, "12.4 ms"),
            (850_000, "850 ms"),
            (13_400_000, "13.4 s"),
            (125_000_000, "2 min 5 s"),
        ] {
            assert_eq!(time(Duration::from_micros(us)), text);
        }
    }

    #[test]
    fn names_of_programs_cannot_play_with_the_terminal() {
        let facts = Facts {
            id: String::new(),
            pid: 4242,
            comm: "\x1b[2Jsim\r".into(),
            processes: 1,
            threads: 1,
            bytes: 312_000_000,
            files: 9,
            from: "a".into(),
            to: "b\x07".into(),
            kernel_from: "6.12".into(),
            kernel_to: "6.12".into(),
            pcb: "kmod".into(),
            tracking: "uffd".into(),
        };
        let line = &lines(&Event::Facts(facts))[0];
        assert!(!line.chars().any(char::is_control), "{line:?}");
        assert!(line.contains("1 process · 1 thread · 312 MB · 9 files"));
    }

    #[test]
    fn a_migration_fits_one_screen() {
        let ms = Duration::from_millis;
        let mut freeze = Freeze {
            total: Duration::from_micros(12_400),
            pages: 48,
            ..Freeze::default()
        };
        for (name, us) in [
            ("stop", 200),
            ("scan", 400),
            ("pages", 7100),
            ("wire", 4700),
        ] {
            freeze.add(name, Duration::from_micros(us));
        }
        let events = [
            Event::Ended {
                phase: Phase::Build,
                what: "41 mappings, 9 descriptors; stopped 0.3 ms to track writes".into(),
                elapsed: ms(38),
            },
            Event::RoundEnded(Round {
                round: 1,
                pages: 76_171,
                bytes: 312_000_000,
                of: 312_000_000,
                elapsed: ms(11_500),
                rate: 27_000_000,
                dirty_rate: Some(4_000_000),
                eta: None,
            }),
            Event::Done(Summary {
                id: String::new(),
                pid: 4242,
                comm: "simulate".into(),
                to: "b".into(),
                end: End::Moved,
                total: ms(13_400),
                bytes_sent: 361_000_000,
                rounds: 2,
                attach: Duration::from_micros(300),
                tracking: "uffd".into(),
                left_behind: 0,
                filled: None,
                peak: [0; 2],
                freeze,
            }),
        ];
        let shown: Vec<String> = events.iter().flat_map(lines).collect();
        assert_eq!(
            shown.join("\n"),
            "  build    41 mappings, 9 descriptors; stopped 0.3 ms to track writes  38.0 ms\n\
             \x20 copy 1   312 MB at 27 MB/s, dirtied meanwhile at 4.0 MB/s             11.5 s\n\
             \x20 freeze   48 pages                                                    12.4 ms\n\
             \x20          stop 0.2 · scan 0.4 · pages 7.1 · wire 4.7\n\
             running on b as 4242, 13.4 s after you asked; 361 MB sent"
        );
    }

    #[test]
    fn a_round_without_pages_shows_no_rates() {
        let round = Event::RoundEnded(Round {
            round: 4,
            pages: 0,
            bytes: 0,
            of: 0,
            elapsed: Duration::from_millis(2),
            rate: 0,
            dirty_rate: Some(0),
            eta: None,
        });
        let shown = lines(&round).concat();
        assert!(shown.contains("copy 4   nothing was written"), "{shown}");
        assert!(!shown.contains("0 B"), "{shown}");
    }

    #[test]
    fn nothing_is_shown_while_the_program_stands_still() {
        let mut later = Later::default();
        let mut see = |event: Event| later.take(&event, vec!["x".into()]).len();
        let phase = |phase| Event::Phase { phase };
        assert_eq!(see(phase(Phase::Copy)), 1);
        assert_eq!(see(phase(Phase::Freeze)), 0);
        assert_eq!(see(phase(Phase::Ready)), 0);
        assert_eq!(see(phase(Phase::Commit)), 0);
        assert_eq!(see(phase(Phase::Release)), 4);
    }
}
