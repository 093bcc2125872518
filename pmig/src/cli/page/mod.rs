//! How a migration went, as a page of its own: HTML that needs nothing else, no
//! script, no font, no network.
//!
//! A pure function of the events and of when they were heard. What they say
//! (names of programs, hosts and files, a peer's words) is shown as text, and a
//! browser is told to run and load nothing.

mod facts;
mod keep;
mod rounds;
mod scale;
mod story;
#[cfg(test)]
mod tests;
mod text;
mod timeline;

use std::time::SystemTime;

use super::show::{end, size, time};
pub use keep::{Kept, Sheet};
use scale::Out;
pub use story::Heard;
use story::{Failed, Story};
use text::Text;

/// What a page is made from.
pub struct Told<'a> {
    pub pid: i32,
    /// As the program calls itself.
    pub name: String,
    /// This host.
    pub from: String,
    /// The host it was to go to, or the file, and the address in full.
    pub to: String,
    pub addr: String,
    /// What was asked for, in words: name and value.
    pub asked: Vec<(&'static str, String)>,
    pub begun: SystemTime,
    pub heard: &'a [Heard],
    /// What was said of a failure; the last line is where the program is.
    pub said: Vec<String>,
}

const STYLE: &str = include_str!("style.css");

/// The page.
pub fn page(told: &Told) -> String {
    let story = Story::of(told.heard);
    let (pid, name) = (told.pid, Text(&told.name));
    let (from, to) = ends(told, &story);
    let mut out = Out::default();
    out.put(format_args!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <title>{pid} {name}: {} → {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n",
        Text(from),
        Text(to)
    ));
    out.put(format_args!(
        "<h1>{pid} <bdi>{name}</bdi> <span class=\"way\"><bdi>{}</bdi> → <bdi>{}</bdi></span></h1>\n",
        Text(from),
        Text(to)
    ));
    match &story.failed {
        Some(failed) => failure(&mut out, told, &story, failed),
        None => success(&mut out, &story),
    }
    figures(&mut out, &story);
    let graphic = timeline::draw(&story, from, to);
    if !graphic.is_empty() {
        out.put(format_args!(
            "<section class=\"graphic\">\n<h2>Where the time went</h2>\n{graphic}"
        ));
        if story.done.is_some() {
            out.put(format_args!(
                "<p class=\"lead\">What both machines do for pages, descriptors, pcb and hold is \
                 drawn together, where the first of it happened.</p>\n"
            ));
        }
        out.put(format_args!("</section>\n"));
    }
    out.put(format_args!("{}", rounds::draw(&story)));
    if !story.notes.is_empty() {
        out.put(format_args!("<section>\n<h2>Notes</h2>\n<ul>\n"));
        for note in &story.notes {
            out.put(format_args!("<li><bdi>{}</bdi></li>\n", Text(note)));
        }
        out.put(format_args!("</ul>\n</section>\n"));
    }
    out.put(format_args!("{}", facts::draw(told, &story)));
    out.put(format_args!("</main>\n</body>\n</html>\n"));
    out.0
}

/// What the two machines call themselves, or are called here.
fn ends<'a>(told: &'a Told, story: &Story<'a>) -> (&'a str, &'a str) {
    match story.facts {
        Some(facts) if !facts.to.is_empty() => (&facts.from, &facts.to),
        _ => (&told.from, &told.to),
    }
}

fn success(out: &mut Out, story: &Story) {
    if let Some(done) = story.done {
        out.put(format_args!(
            "<p class=\"verdict\">✓ <bdi>{}</bdi></p>\n",
            Text(&end(done))
        ));
    }
}

/// What failed and where the program is: that comes before anything else.
fn failure(out: &mut Out, told: &Told, story: &Story, failed: &Failed) {
    let word = match failed.outcome {
        "moved" => "it moved, but something after that failed",
        _ => failed.word(),
    };
    let phase = story
        .failed_in()
        .map_or(String::new(), |s| format!(" in {}", s.phase));
    out.put(format_args!(
        "<div class=\"failed\">\n<p class=\"verdict\">✕ {word}{phase}</p>\n"
    ));
    if failed.obstacles.is_empty() {
        for line in failed.error.lines() {
            out.put(format_args!("<p><bdi>{}</bdi></p>\n", Text(line)));
        }
    } else {
        out.put(format_args!(
            "<table class=\"obstacles\">\n<thead><tr><th>what stands in the way</th><th>why</th>\
             <th>what to do</th></tr></thead>\n<tbody>\n"
        ));
        for o in failed.obstacles {
            out.put(format_args!(
                "<tr><td><bdi>{}</bdi></td><td><bdi>{}</bdi></td><td><bdi>{}</bdi></td></tr>\n",
                Text(&o.object),
                Text(&o.why),
                Text(&o.remedy)
            ));
        }
        out.put(format_args!("</tbody>\n</table>\n"));
    }
    if let Some(now) = told.said.last() {
        let now = now.strip_prefix("pmig: ").unwrap_or(now);
        out.put(format_args!(
            "<p class=\"now\">Where it is now: <bdi>{}</bdi></p>\n",
            Text(now)
        ));
    }
    out.put(format_args!("</div>\n"));
}

/// What one asks first.
fn figures(out: &mut Out, story: &Story) {
    let mut all: Vec<(String, &str)> = Vec::new();
    match (story.done, story.frozen) {
        (Some(done), _) => {
            if !done.freeze.total.is_zero() {
                all.push((time(done.freeze.total), "stood still"));
            }
            all.push((time(done.total), "from the command to its end"));
            all.push((size(done.bytes_sent), "sent"));
            let rounds = if done.rounds == 1 { "round" } else { "rounds" };
            all.push((done.rounds.to_string(), rounds));
        }
        (None, frozen) => {
            let held = story.failed.as_ref().is_some_and(Failed::is_held);
            let stood = if held {
                "stands still, so far"
            } else {
                "stood still"
            };
            match frozen {
                Some((from, to)) => all.push((time(to.saturating_sub(from)), stood)),
                None => all.push(("never".into(), stood)),
            }
            all.push((time(story.end), "from the command to its end"));
        }
    }
    out.put(format_args!("<dl class=\"figures\">\n"));
    for (value, name) in all {
        out.put(format_args!("<div><dt>{name}</dt><dd>{value}</dd></div>\n"));
    }
    out.put(format_args!("</dl>\n"));
}
