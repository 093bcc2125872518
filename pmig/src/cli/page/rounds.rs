//! The rounds of the copy, as a table with a graphic in its last column.

use super::super::show::{size, time};
use super::scale::{bytes_unit, pages, width, Out};
use super::story::Story;

/// The graphic's measures.
const WIDE: f64 = 260.0;
const HIGH: f64 = 18.0;
const MARGIN: f64 = 8.0;

/// Bytes on a scale of powers of ten: what is copied first and last differ by
/// several.
struct Powers {
    least: i32,
    most: i32,
}

impl Powers {
    fn over(all: impl Iterator<Item = u64>) -> Powers {
        let (mut least, mut most) = (i32::MAX, i32::MIN);
        for bytes in all.filter(|b| *b > 0) {
            let log = (bytes as f64).log10();
            least = least.min(log.floor() as i32);
            most = most.max(log.ceil() as i32);
        }
        match most < least {
            true => Powers { least: 3, most: 4 },
            false => Powers {
                least,
                most: most.max(least + 1),
            },
        }
    }

    fn x(&self, bytes: u64) -> f64 {
        let log = (bytes.max(1) as f64).log10() - f64::from(self.least);
        let part = log / f64::from(self.most - self.least);
        MARGIN + part.clamp(0.0, 1.0) * (WIDE - 2.0 * MARGIN)
    }

    fn marks(&self) -> impl Iterator<Item = (f64, String)> + '_ {
        (self.least..=self.most).map(|power| {
            let bytes = 10u64.saturating_pow(power.max(0) as u32);
            let (unit, one) = bytes_unit(bytes as f64);
            (self.x(bytes), format!("{:.0} {unit}", bytes as f64 / one))
        })
    }
}

/// The section; nothing where no round came to its end.
pub fn draw(story: &Story) -> String {
    if story.rounds.is_empty() {
        return String::new();
    }
    let freeze = story.done.map(|done| &done.freeze);
    let sizes = story
        .rounds
        .iter()
        .flat_map(|r| [r.round.bytes, r.dirtied.unwrap_or(0)])
        .chain(freeze.map(|f| f.bytes));
    let powers = Powers::over(sizes);
    let mut out = Out::default();
    out.put(format_args!(
        "<section>\n<h2>Rounds of the copy</h2>\n<p class=\"lead\">A round sends what was written \
         since the round before. They end when what is left fits the freeze.</p>\n\
         <table class=\"rounds\">\n<thead><tr><th>round</th><th>took</th><th>to copy</th>\
         <th>sent</th><th>rate</th><th>dirtied meanwhile</th><th>{}</th></tr></thead>\n<tbody>\n",
        header(&powers)
    ));
    for copied in &story.rounds {
        let round = copied.round;
        let rate = match round.bytes {
            0 => String::new(),
            _ => format!("{}/s", size(round.rate)),
        };
        row(
            &mut out,
            [
                round.round.to_string(),
                time(round.elapsed),
                size(round.of),
                size(round.bytes),
                rate,
                copied.dirtied.map_or(String::new(), size),
            ],
            &dots(&powers, round.bytes, copied.dirtied),
        );
    }
    if let Some(freeze) = freeze {
        row(
            &mut out,
            [
                "freeze".into(),
                match freeze.total.is_zero() {
                    true => String::new(),
                    false => time(freeze.total),
                },
                pages(freeze.pages),
                size(freeze.bytes),
                String::new(),
                String::new(),
            ],
            &dots(&powers, freeze.bytes, None),
        );
    }
    out.put(format_args!("</tbody>\n</table>\n</section>\n"));
    out.0
}

fn row(out: &mut Out, cells: [String; 6], graphic: &str) {
    let [name, rest @ ..] = cells;
    out.put(format_args!("<tr><th scope=\"row\">{name}</th>"));
    for cell in rest {
        out.put(format_args!("<td>{cell}</td>"));
    }
    out.put(format_args!("<td class=\"plot\">{graphic}</td></tr>\n"));
}

/// The scale, and what the two marks mean.
fn header(powers: &Powers) -> String {
    let mut out = Out::default();
    out.put(format_args!(
        "<svg viewBox=\"0 0 {WIDE} 34\" width=\"{WIDE}\" height=\"34\" aria-hidden=\"true\">\
         <circle class=\"full\" cx=\"{MARGIN}\" cy=\"8\" r=\"4\"/>\
         <text class=\"tick\" x=\"{}\" y=\"12\">sent</text>\
         <circle class=\"hollow\" cx=\"{}\" cy=\"8\" r=\"4\"/>\
         <text class=\"tick\" x=\"{}\" y=\"12\">dirtied meanwhile</text>",
        MARGIN + 8.0,
        MARGIN + 56.0,
        MARGIN + 64.0
    ));
    let mut free = f64::MIN;
    for (x, text) in powers.marks() {
        let half = width(&text) / 2.0;
        let at = x.clamp(half, WIDE - half);
        if at - half > free {
            out.put(format_args!(
                "<text class=\"tick\" text-anchor=\"middle\" x=\"{at:.1}\" y=\"30\">{text}</text>"
            ));
            free = at + half + 4.0;
        }
    }
    out.put(format_args!("</svg>"));
    out.0
}

fn dots(powers: &Powers, sent: u64, dirtied: Option<u64>) -> String {
    let mut out = Out::default();
    let middle = HIGH / 2.0;
    out.put(format_args!(
        "<svg viewBox=\"0 0 {WIDE} {HIGH}\" width=\"{WIDE}\" height=\"{HIGH}\" aria-hidden=\"true\">"
    ));
    for (x, _) in powers.marks() {
        out.put(format_args!(
            "<path class=\"grid\" d=\"M{x:.1} 0V{HIGH}\"/>"
        ));
    }
    let dirtied = dirtied.filter(|bytes| *bytes > 0);
    if let (Some(dirtied), true) = (dirtied, sent > 0) {
        let (a, b) = (powers.x(sent), powers.x(dirtied));
        out.put(format_args!(
            "<path class=\"between\" d=\"M{a:.1} {middle}H{b:.1}\"/>"
        ));
    }
    if let Some(dirtied) = dirtied {
        let x = powers.x(dirtied);
        out.put(format_args!(
            "<circle class=\"hollow\" cx=\"{x:.1}\" cy=\"{middle}\" r=\"4\"/>"
        ));
    }
    if sent > 0 {
        let x = powers.x(sent);
        out.put(format_args!(
            "<circle class=\"full\" cx=\"{x:.1}\" cy=\"{middle}\" r=\"4\"/>"
        ));
    }
    out.put(format_args!("</svg>"));
    out.0
}
