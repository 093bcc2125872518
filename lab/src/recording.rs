//! What was printed and when, as a picture that moves: an SVG that shows it
//! again at its own pace, and its end where nothing moves.

use std::fmt::Write;
use std::time::{Duration, Instant};

/// Lines that are seen at once.
const ROWS: usize = 26;
/// In pixels.
const LINE: usize = 18;
const CHAR: f64 = 7.8;
const MARGIN: usize = 16;
const BAR: usize = 30;
/// How long the end is seen before it begins anew.
const REST: Duration = Duration::from_secs(6);
/// Longer pauses are cut to this.
const PAUSE: Duration = Duration::from_millis(1500);

/// Lines, and when each was printed.
#[derive(Debug)]
pub struct Recording {
    title: String,
    lines: Vec<(Duration, String)>,
    last: Instant,
    at: Duration,
}

impl Recording {
    pub fn new(title: &str) -> Self {
        Self {
            title: title.into(),
            lines: Vec::new(),
            last: Instant::now(),
            at: Duration::ZERO,
        }
    }

    /// Prints a line, or several, and remembers them.
    pub fn say(&mut self, text: &str) {
        println!("{text}");
        self.at += self.last.elapsed().min(PAUSE);
        self.last = Instant::now();
        for line in text.split('\n') {
            self.lines.push((self.at, line.trim_end().to_owned()));
        }
    }

    /// The picture.
    pub fn svg(&self) -> String {
        let columns = self.lines.iter().map(|(_, line)| line.chars().count());
        let width = MARGIN * 2 + (columns.max().unwrap_or(0).clamp(60, 132) as f64 * CHAR) as usize;
        let height = BAR + ROWS * LINE + MARGIN;
        let whole = (self.at + REST).as_secs_f64();
        // One step for each moment at which lines appear.
        let mut steps: Vec<(f64, usize)> = Vec::new();
        for (n, (at, _)) in self.lines.iter().enumerate() {
            let at = at.as_secs_f64() / whole;
            match steps.last_mut() {
                Some((same, shown)) if *same == at => *shown = n + 1,
                _ => steps.push((at, n + 1)),
            }
        }
        if let Some((first, _)) = steps.first_mut() {
            // Where an animation has to begin.
            *first = 0.0;
        }
        let times = join(steps.iter().map(|(at, _)| format!("{at:.5}")));
        let up = |shown: usize| LINE * shown.saturating_sub(ROWS);
        let moves = join(steps.iter().map(|(_, n)| format!("0 -{}", up(*n))));
        let heights = join(steps.iter().map(|(_, n)| (n * LINE).to_string()));
        let all = self.lines.len();
        let animated = |what: &str, values: &str| {
            format!(
                "<{what} calcMode=\"discrete\" dur=\"{whole:.2}s\" repeatCount=\"indefinite\" \
                 keyTimes=\"{times}\" values=\"{values}\"/>"
            )
        };
        let mut svg = String::new();
        let _ = write!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"ui-monospace,Menlo,Consolas,\
             'DejaVu Sans Mono',monospace\" font-size=\"13\">\n\
             <title>{title}</title>\n\
             <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#16191d\"/>\n\
             <text x=\"{MARGIN}\" y=\"20\" fill=\"#7d8590\" font-size=\"12\">{title}</text>\n\
             <clipPath id=\"screen\"><rect x=\"0\" y=\"{BAR}\" width=\"{width}\" height=\"{screen}\"/></clipPath>\n\
             <clipPath id=\"shown\"><rect x=\"0\" y=\"0\" width=\"{width}\" height=\"{shown}\">{grow}</rect></clipPath>\n\
             <g clip-path=\"url(#screen)\"><g transform=\"translate(0 {BAR})\">\n\
             <g transform=\"translate(0 -{end})\">{scroll}\n\
             <g clip-path=\"url(#shown)\" xml:space=\"preserve\">\n",
            title = escaped(&self.title),
            screen = ROWS * LINE,
            shown = all * LINE,
            end = up(all),
            grow = animated("animate attributeName=\"height\"", &heights),
            scroll = animated("animateTransform attributeName=\"transform\" type=\"translate\"", &moves),
        );
        for (n, (_, line)) in self.lines.iter().enumerate() {
            if !line.is_empty() {
                let _ = writeln!(
                    svg,
                    "<text x=\"{MARGIN}\" y=\"{}\" fill=\"{}\">{}</text>",
                    n * LINE + 14,
                    colour(line),
                    escaped(line)
                );
            }
        }
        svg.push_str("</g></g></g></g>\n</svg>\n");
        svg
    }
}

fn join(values: impl Iterator<Item = String>) -> String {
    values.collect::<Vec<_>>().join(";")
}

/// What is typed, what either host's program writes, and the rest.
fn colour(line: &str) -> &'static str {
    let words = line.trim_start();
    match words.get(..3) {
        Some("a$ " | "b$ ") => "#ffffff",
        Some("a |") => "#79c0ff",
        Some("b |") => "#7ee787",
        _ if words.starts_with("running on") => "#ffffff",
        _ => "#c9d1d9",
    }
}

fn escaped(text: &str) -> String {
    let printable = text.chars().filter(|c| !c.is_control());
    printable.fold(String::new(), |mut all, c| {
        match c {
            '&' => all.push_str("&amp;"),
            '<' => all.push_str("&lt;"),
            '>' => all.push_str("&gt;"),
            '"' => all.push_str("&quot;"),
            c => all.push(c),
        }
        all
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_shows_its_lines_in_order_and_ends_with_the_last() {
        let mut recording = Recording::new("a <demo>");
        for n in 0..40 {
            recording.at += Duration::from_millis(100);
            recording.say(&format!("a | line {n} <&>"));
        }
        let svg = recording.svg();
        assert!(svg.contains("a &lt;demo&gt;") && svg.contains("line 39 &lt;&amp;&gt;"));
        assert!(svg.contains(&format!("translate(0 -{})", 14 * LINE)));
        let times = svg.split("keyTimes=\"").nth(1).unwrap();
        let times = times.split('"').next().unwrap();
        let times: Vec<f64> = times.split(';').map(|t| t.parse().unwrap()).collect();
        assert_eq!(times[0], 0.0);
        assert!(times.windows(2).all(|w| w[0] < w[1]) && *times.last().unwrap() < 1.0);
        assert_eq!(svg.matches("<text").count(), 41);
    }
}
