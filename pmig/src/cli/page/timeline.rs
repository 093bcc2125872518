//! The graphic: phases, throughput, and below them the freeze under a magnifier.

use std::time::Duration;

use pmig::phase::Phase;
use pmig::report::{End, Part};

use super::super::show::{size, time};
use super::scale::{bytes_unit, pages, ticks, width, Out, Span, LEFT, RIGHT, WIDTH};
use super::story::{Story, Stretch};
use super::text::{short, Text};

const ROW: f64 = 24.0;
/// The height of a bar in its row.
const BAR: f64 = 14.0;
/// The height of the throughput's panel.
const PANEL: f64 = 110.0;
/// Where the second column of words begins.
const SECOND: f64 = 92.0;
/// Shorter parts of the freeze are not seen, and left out.
const LEAST: Duration = Duration::from_micros(5);
/// A bar is never narrower.
const THIN: f64 = 1.5;

/// All of it; nothing where nothing began.
pub fn draw(story: &Story, from: &str, to: &str) -> String {
    if story.phases.is_empty() {
        return String::new();
    }
    let span = Span::new(Duration::ZERO, story.end);
    let mut out = Out::default();
    let mut y = 22.0;
    place(&mut out, story, &span, (from, to), y);
    y += ROW + 6.0;
    for phase in &story.phases {
        bar(&mut out, story, &span, phase, y);
        y += ROW;
    }
    if story.sent.iter().any(|r| r.rate > 0.0) {
        y += 22.0;
        throughput(&mut out, story, &span, y);
        y += PANEL;
    } else if story.failed.is_some() {
        // For what is said there.
        y += 16.0;
    }
    y += 6.0;
    axis(&mut out, &span, y, "after the command");
    let mut back = Out::default();
    if let Some((from, to)) = story.frozen {
        let (a, b) = (span.x(from), span.x(to).max(span.x(from) + THIN));
        column(&mut back, (a, b), y);
        stood_still(&mut out, story, (a, b), to.saturating_sub(from));
        if let Some(done) = story.done.filter(|d| !d.freeze.total.is_zero()) {
            let top = y + 62.0;
            wedge(&mut back, (a, b), y, top);
            let times = story.end.as_secs_f64() / done.freeze.total.as_secs_f64();
            y = waterfall(&mut out, &done.freeze.parts, done.freeze.total, times, top);
        }
    }
    if let (Some(failed), Some(phase)) = (&story.failed, story.failed_in()) {
        failure(&mut out, &span, story, failed.word(), phase);
    }
    y += 30.0;
    format!(
        "<svg role=\"img\" viewBox=\"0 0 {WIDTH} {y:.0}\" aria-label=\"{}\">\n{PATTERNS}{}{}</svg>\n",
        Text(&said(story)),
        back.0,
        out.0
    )
}

/// For eyes that see no colours, and for paper.
const PATTERNS: &str = "<defs><pattern id=\"still\" width=\"6\" height=\"6\" \
patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\">\
<rect class=\"frozen\" width=\"6\" height=\"6\"/>\
<rect class=\"stripe\" width=\"2\" height=\"6\"/></pattern></defs>\n";

/// The graphic in words.
fn said(story: &Story) -> String {
    let mut words: Vec<String> = story
        .phases
        .iter()
        .map(|s| format!("{} {}", s.phase, time(s.to.saturating_sub(s.from))))
        .collect();
    if let Some(done) = story.done.filter(|d| !d.freeze.total.is_zero()) {
        let parts = done.freeze.parts.iter();
        words.push(format!("stood still {}", time(done.freeze.total)));
        words.extend(parts.map(|p| format!("{} {}", p.name, time(p.time))));
    }
    words.join(", ")
}

fn rect(out: &mut Out, class: &str, x: (f64, f64), y: f64, height: f64) {
    let wide = (x.1 - x.0).max(THIN);
    out.put(format_args!(
        "<rect class=\"{class}\" x=\"{:.2}\" y=\"{y:.1}\" width=\"{wide:.2}\" height=\"{height}\"/>\n",
        x.0
    ));
}

/// Text at a place: `start`, `middle` or `end` of it.
fn word(out: &mut Out, class: &str, anchor: &str, at: (f64, f64), text: &str) {
    out.put(format_args!(
        "<text class=\"{class}\" text-anchor=\"{anchor}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
        at.0,
        at.1,
        Text(text)
    ));
}

/// Where the program is, over the whole time.
fn place(out: &mut Out, story: &Story, span: &Span, (here, there): (&str, &str), y: f64) {
    let base = y + 17.0;
    word(out, "name", "start", (0.0, base), "the program");
    let (from, to) = story.frozen.unwrap_or((story.end, story.end));
    let before = (LEFT, span.x(from));
    let label = |out: &mut Out, x: (f64, f64), text: &str| {
        if width(text) + 12.0 < x.1 - x.0 {
            word(out, "inside", "start", (x.0 + 8.0, base), text);
        }
    };
    rect(out, "source", before, y, ROW);
    label(out, before, &format!("runs on {}", short(here, 30)));
    if story.frozen.is_some() {
        rect(out, "still", (before.1, span.x(to)), y, ROW);
    }
    if to < story.end {
        let after = (span.x(to), RIGHT);
        rect(out, class_after(story), after, y, ROW);
    }
    // What follows has no end, and stands beside.
    let arrow = format!("→ {}", short(story.at_last(here, there), 9));
    word(out, "value", "start", (RIGHT + 6.0, base), &arrow);
}

fn class_after(story: &Story) -> &'static str {
    match story.done.map(|done| done.end) {
        _ if story.is_there() => "target",
        Some(End::InFile) if story.failed.is_none() => "nowhere",
        _ => "source",
    }
}

/// By what the program did during the most of it.
fn class(story: &Story, phase: &Stretch) -> &'static str {
    let most = (phase.from + phase.to) / 2;
    match story.frozen {
        Some((stop, _)) if most < stop => "source",
        Some((_, resume)) if most < resume => "still",
        Some(_) => class_after(story),
        None => "source",
    }
}

fn bar(out: &mut Out, story: &Story, span: &Span, phase: &Stretch, y: f64) {
    let base = y + 12.0;
    word(out, "name", "start", (0.0, base), phase.phase.name());
    let what = match phase.what.as_str() {
        // What it was to be is no word for what became of it.
        "" if story.failed.is_some() && story.phases.last() == Some(phase) => String::new(),
        "" => meaning(story, phase.phase),
        what => what.to_owned(),
    };
    word(out, "what", "start", (SECOND, base), &short(&what, 30));
    let x = (span.x(phase.from), span.x(phase.to));
    let top = y + 1.0;
    rect(out, class(story, phase), x, top, BAR);
    if phase.phase == Phase::Copy {
        for round in &story.rounds {
            let x = (span.x(round.from), span.x(round.to));
            if x.1 - x.0 < 3.0 {
                continue;
            }
            // A gap between neighbours.
            rect(out, "round", (x.0, x.0 + 1.0), top, BAR);
            let number = round.round.round.to_string();
            if x.1 - x.0 > width(&number) + 6.0 {
                let at = ((x.0 + x.1) / 2.0, base);
                word(out, "inside", "middle", at, &number);
            }
        }
    }
    beside(out, x, base, &time(phase.to.saturating_sub(phase.from)));
}

/// A label at the end of a bar, or before it where there is no room.
fn beside(out: &mut Out, x: (f64, f64), base: f64, text: &str) {
    let end = x.1.max(x.0 + THIN) + 5.0;
    if end + width(text) <= WIDTH {
        word(out, "value", "start", (end, base), text);
    } else {
        word(out, "value", "end", (x.0 - 5.0, base), text);
    }
}

/// What a phase is for, where it did not say itself what it did.
fn meaning(story: &Story, phase: Phase) -> String {
    let words = match phase.name() {
        "hello" => "looked at, and offered",
        "build" => "made ready at the target",
        "copy" => "memory, while it runs",
        "freeze" => match story.done.map(|done| done.freeze.pages) {
            Some(0) => "all but memory",
            Some(n) => return format!("{}, and the rest", pages(n)),
            None => "the last pages and the rest",
        },
        "ready" => "until the target is ready",
        "commit" => "recorded, and let run there",
        "fill" => "pages that are still missing",
        "release" => "tidied up here",
        _ => "",
    };
    words.into()
}

fn axis(out: &mut Out, span: &Span, y: f64, what: &str) {
    let (marks, unit) = span.marks();
    out.put(format_args!(
        "<path class=\"axis\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/>\n"
    ));
    for (x, text) in marks {
        out.put(format_args!(
            "<path class=\"axis\" d=\"M{x:.2} {y:.1}v4\"/>\n"
        ));
        word(out, "tick", "middle", (x, y + 16.0), &text);
    }
    word(out, "tick", "start", (RIGHT + 22.0, y + 16.0), unit);
    word(out, "tick", "start", (0.0, y + 16.0), what);
}

/// The time in which it stands still, through everything above the axis.
fn column(out: &mut Out, x: (f64, f64), to: f64) {
    rect(out, "shade", x, 22.0, to - 22.0);
}

fn stood_still(out: &mut Out, story: &Story, x: (f64, f64), total: Duration) {
    let held = story.failed.as_ref().is_some_and(|failed| failed.is_held());
    // Where the other machine's word was lost nobody knows how long it was.
    let unknown = story.done.is_some_and(|d| d.freeze.total.is_zero());
    let text = match (held, unknown) {
        (true, _) => "stands still".into(),
        (_, true) => "stood still".into(),
        _ => format!("stood still for {}", time(total)),
    };
    let middle = (x.0 + x.1) / 2.0;
    let half = width(&text) / 2.0;
    let at = middle.clamp(LEFT + half, WIDTH - half);
    word(out, "strong", "middle", (at, 14.0), &text);
}

/// What is seen through the magnifier, and where it lies: straight down through
/// the axis' text, and then wider.
fn wedge(out: &mut Out, x: (f64, f64), from: f64, to: f64) {
    let ((a, b), low) = (x, from + 22.0);
    out.put(format_args!(
        "<path class=\"shade\" d=\"M{a:.2} {from:.1}H{b:.2}V{low:.1}L{RIGHT} {to:.1}H{LEFT}L{a:.2} {low:.1}Z\"/>\n\
         <path class=\"edge\" d=\"M{a:.2} {low:.1}L{LEFT} {to:.1}M{b:.2} {low:.1}L{RIGHT} {to:.1}\"/>\n"
    ));
}

/// The parts of the freeze, one below the other; says where it ends.
fn waterfall(out: &mut Out, parts: &[Part], total: Duration, times: f64, top: f64) -> f64 {
    let span = Span::new(Duration::ZERO, total);
    let shown: Vec<&Part> = parts.iter().filter(|p| p.time >= LEAST).collect();
    let mut y = top + 8.0;
    let bottom = y + shown.len() as f64 * ROW + 4.0;
    rect(out, "shade", (LEFT, RIGHT), top, bottom - top);
    word(out, "name", "start", (0.0, top - 22.0), "the freeze");
    let larger = format!("magnified {} times", round(times));
    word(out, "what", "start", (SECOND, top - 22.0), &larger);
    let mut at = Duration::ZERO;
    for part in parts {
        let end = at + part.time;
        if part.time >= LEAST {
            let base = y + 12.0;
            word(out, "name", "start", (0.0, base), &short(&part.name, 12));
            word(out, "what", "start", (SECOND, base), part_means(&part.name));
            let x = (span.x(at), span.x(end));
            rect(out, "still", x, y + 1.0, BAR);
            beside(out, x, base, &time(part.time));
            // To where the next one begins.
            if y + ROW < bottom - 5.0 {
                let (top, low) = (y + 1.0 + BAR, y + ROW + 1.0);
                out.put(format_args!(
                    "<path class=\"edge\" d=\"M{:.2} {top:.1}V{low:.1}\"/>\n",
                    x.1
                ));
            }
            y += ROW;
        }
        at = end;
    }
    axis(out, &span, bottom, "after it was stopped");
    bottom
}

fn part_means(name: &str) -> &'static str {
    match name {
        "stop" => "until it stands still",
        "scan" => "which pages were written",
        "descriptors" => "read here, made there",
        "pcb" => "registers, signals, identity",
        "pages" => "read, sent and written",
        "files" => "ends of shipped files",
        "check" => "looked for obstacles again",
        "hold" => "frozen by its cgroups",
        "wire" => "between the machines",
        "resume" => "recorded, ordered, thawed",
        _ => "",
    }
}

/// Two digits are enough.
fn round(times: f64) -> String {
    match times {
        t if t < 10.0 => format!("{t:.1}"),
        t if t < 100.0 => format!("{t:.0}"),
        t => {
            let ten = 10f64.powf(t.log10().floor() - 1.0);
            format!("{:.0}", (t / ten).round() * ten)
        }
    }
}

/// Bytes per second: what was sent as a surface, what was dirtied as a line.
fn throughput(out: &mut Out, story: &Story, span: &Span, y: f64) {
    let both = story.sent.iter().chain(&story.dirtied);
    let most = both.map(|r| r.rate).fold(0.0, f64::max).max(1.0);
    let bottom = y + PANEL;
    let height = |rate: f64| bottom - rate / most * PANEL;
    let (unit, one) = bytes_unit(most);
    word(out, "name", "start", (0.0, y + 12.0), "throughput");
    key(out, y, !story.dirtied.is_empty());
    for (value, text) in ticks(most / one, 4) {
        let at = height(value * one);
        out.put(format_args!(
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{RIGHT}\"/>\n"
        ));
        let text = match value {
            0.0 => text,
            _ => format!("{text} {unit}/s"),
        };
        word(out, "tick", "end", (LEFT - 6.0, at + 4.0), &text);
    }
    let mut surface = String::new();
    for r in &story.sent {
        let (a, b) = (span.x(r.from), span.x(r.to).max(span.x(r.from) + 0.5));
        surface += &format!(
            "M{a:.2} {bottom:.1}V{:.1}H{b:.2}V{bottom:.1}Z",
            height(r.rate)
        );
    }
    out.put(format_args!("<path class=\"sent\" d=\"{surface}\"/>\n"));
    let mut line = String::new();
    for r in &story.dirtied {
        let (a, b) = (span.x(r.from), span.x(r.to));
        let pen = if line.is_empty() { 'M' } else { 'L' };
        line += &format!("{pen}{a:.2} {0:.1}H{b:.2}", height(r.rate));
    }
    if !line.is_empty() {
        out.put(format_args!("<path class=\"dirtied\" d=\"{line}\"/>\n"));
    }
    labels(out, story, span, &height);
}

/// Which is which.
fn key(out: &mut Out, y: f64, dirtied: bool) {
    let end = SECOND + 18.0;
    rect(out, "sent", (SECOND, end), y + 3.0, 10.0);
    word(out, "what", "start", (end + 6.0, y + 12.0), "sent");
    if !dirtied {
        return;
    }
    let middle = y + ROW + 8.0;
    out.put(format_args!(
        "<path class=\"dirtied\" d=\"M{SECOND} {middle:.1}H{end}\"/>\n"
    ));
    word(out, "what", "start", (end + 6.0, middle + 4.0), "dirtied");
}

/// How much it was, where it was so for the longest time.
fn labels(out: &mut Out, story: &Story, span: &Span, height: &dyn Fn(f64) -> f64) {
    let middle = |from, to, text: &str| {
        let half = width(text) / 2.0;
        ((span.x(from) + span.x(to)) / 2.0).clamp(LEFT + half, RIGHT - half)
    };
    let dirtied = story
        .dirtied
        .iter()
        .max_by_key(|r| r.to.saturating_sub(r.from));
    let mut taken = None;
    if let Some(r) = dirtied {
        let text = format!("dirtied at {}/s", size(r.rate as u64));
        let y = height(r.rate) - 6.0;
        word(
            out,
            "label",
            "middle",
            (middle(r.from, r.to, &text), y),
            &text,
        );
        taken = Some(y);
    }
    let Some(longest) = story.rounds.iter().max_by_key(|c| c.round.elapsed) else {
        return;
    };
    let text = format!("sent at {}/s", size(longest.round.rate));
    // Below all that was sent during this round.
    let lowest = story
        .sent
        .iter()
        .filter(|r| r.from >= longest.from && r.to <= longest.to)
        .map(|r| height(r.rate))
        .fold(f64::MIN, f64::max);
    let y = lowest + 15.0;
    let wide = span.x(longest.to) - span.x(longest.from);
    let free = taken.is_none_or(|taken| (taken - y).abs() > 13.0);
    if free && y < height(0.0) - 4.0 && width(&text) < wide {
        let x = middle(longest.from, longest.to, &text);
        word(out, "label", "middle", (x, y), &text);
    }
}

/// A mark where it failed.
fn failure(out: &mut Out, span: &Span, story: &Story, what: &str, phase: &Stretch) {
    let row = story.phases.len() as f64 - 1.0;
    let y = 22.0 + ROW + 6.0 + row * ROW;
    let x = span.x(story.end);
    let words = format!("✕ {what} in {}", phase.phase);
    word(out, "strong", "end", (x, y + ROW + 10.0), &words);
    out.put(format_args!(
        "<path class=\"cross\" d=\"M{x:.1} {:.1}v{:.1}\"/>\n",
        y - 2.0,
        BAR + 6.0
    ));
}
