//! From values to places on a page.

use std::fmt::{Arguments, Write};
use std::time::Duration;

/// What a page is written to.
#[derive(Default)]
pub struct Out(pub String);

impl Out {
    pub fn put(&mut self, text: Arguments<'_>) {
        // A string takes everything.
        let _ = self.0.write_fmt(text);
    }
}

/// Where the graphics stand, in units of their own.
pub const WIDTH: f64 = 970.0;
pub const LEFT: f64 = 290.0;
pub const RIGHT: f64 = 885.0;

/// A span of time, drawn between [`LEFT`] and [`RIGHT`].
#[derive(Clone, Copy)]
pub struct Span {
    from: f64,
    length: f64,
}

impl Span {
    pub fn new(from: Duration, to: Duration) -> Span {
        Span {
            from: from.as_secs_f64(),
            length: to.saturating_sub(from).as_secs_f64().max(1e-9),
        }
    }

    pub fn x(&self, at: Duration) -> f64 {
        let part = (at.as_secs_f64() - self.from) / self.length;
        LEFT + part.clamp(0.0, 1.0) * (RIGHT - LEFT)
    }

    /// Where marks belong, with their text, and the unit of all of them.
    pub fn marks(&self) -> (Vec<(f64, String)>, &'static str) {
        let (unit, one) = match self.length {
            s if s < 2.0 => ("ms", 1e-3),
            s if s < 240.0 => ("s", 1.0),
            s if s < 4.0 * 3600.0 => ("min", 60.0),
            _ => ("h", 3600.0),
        };
        let all = ticks(self.length / one, 9);
        let place = |(value, text)| (LEFT + value * one / self.length * (RIGHT - LEFT), text);
        (all.into_iter().map(place).collect(), unit)
    }
}

/// Round values from zero to a greatest: steps of 1, 2 or 5 and zeros, so many
/// at most; with as many digits as they need.
pub fn ticks(most: f64, count: usize) -> Vec<(f64, String)> {
    if !(most.is_finite() && most > 0.0) {
        return vec![(0.0, "0".into())];
    }
    let least = most / count.max(1) as f64;
    let ten = 10f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|n| n * ten)
        .find(|step| *step >= least * 0.999)
        .unwrap_or(10.0 * ten);
    let digits = (-step.log10().floor()).max(0.0) as usize;
    (0..=(most / step * 1.0001) as usize)
        .map(|n| n as f64 * step)
        .map(|value| match value {
            0.0 => (0.0, "0".into()),
            _ => (value, format!("{value:.digits$}")),
        })
        .collect()
}

/// The unit that suits a number of bytes.
pub fn bytes_unit(most: f64) -> (&'static str, f64) {
    match most {
        b if b >= 1e9 => ("GB", 1e9),
        b if b >= 1e6 => ("MB", 1e6),
        b if b >= 1e3 => ("kB", 1e3),
        _ => ("B", 1.0),
    }
}

/// `1 page`, `230,000 pages`.
pub fn pages(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text + if n == 1 { " page" } else { " pages" }
}

/// About how wide a text of the usual size is.
pub fn width(text: &str) -> f64 {
    text.chars().count() as f64 * 6.8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round() {
        let text = |most, count| -> Vec<String> {
            ticks(most, count)
                .into_iter()
                .map(|(_, text)| text)
                .collect()
        };
        assert_eq!(text(12.4, 7), ["0", "2", "4", "6", "8", "10", "12"]);
        assert_eq!(text(1.0, 5), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(text(235.0, 5), ["0", "50", "100", "150", "200"]);
        for odd in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(text(odd, 5), ["0"]);
        }
    }

    #[test]
    fn many_digits_stand_in_threes() {
        for (n, text) in [
            (0, "0 pages"),
            (1, "1 page"),
            (999, "999 pages"),
            (1000, "1,000 pages"),
            (1_230_000, "1,230,000 pages"),
        ] {
            assert_eq!(pages(n), text);
        }
    }

    #[test]
    fn times_have_a_place_and_a_unit() {
        let ms = Duration::from_millis;
        let span = Span::new(ms(100), ms(300));
        assert_eq!(span.x(ms(100)), LEFT);
        assert_eq!(span.x(ms(500)), RIGHT);
        assert_eq!(span.x(ms(200)), (LEFT + RIGHT) / 2.0);
        let (marks, unit) = span.marks();
        assert_eq!((marks.len(), unit), (5, "ms"));
        assert_eq!(marks[4], (RIGHT, "200".to_owned()));
        assert_eq!(Span::new(ms(1), ms(1)).x(ms(1)), LEFT);
        assert_eq!(Span::new(ms(0), ms(600_000)).marks().1, "min");
    }
}
