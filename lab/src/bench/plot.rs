//! Pictures of what was measured.

use super::rows::PeerRow;
use crate::host::Make;
use anyhow::{anyhow, Context, Result};
use plotters::prelude::*;

const SIZE: (u32, u32) = (760, 430);
/// One for each of the means, told apart by people who see few colours too.
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 86, 86),
];

/// A figure of a row.
type Figure = (&'static str, &'static str, fn(&PeerRow) -> f64);

const FIGURES: [Figure; 2] = [
    (
        "gap",
        "largest gap in the program's time stamps, ms",
        |row| row.gap_ms,
    ),
    ("total", "whole move, ms", |row| row.total_ms),
];

/// Every picture of these rows: name of the file, and the SVG.
///
/// # Errors
/// Those of drawing.
pub fn all(rows: &[PeerRow]) -> Result<Vec<(String, String)>> {
    let mut pictures = Vec::new();
    for make in [Make::Netns, Make::Vm] {
        for mode in ["hot", "roaming"] {
            let of: Vec<&PeerRow> = rows
                .iter()
                .filter(|row| row.hosts == make && row.mode == mode)
                .collect();
            if of.is_empty() {
                continue;
            }
            for (name, what, figure) in FIGURES {
                let svg = draw(&Curves {
                    title: &title(make, mode),
                    x: "resident memory, MB",
                    y: what,
                    lines: lines(&of, figure),
                })
                .with_context(|| format!("draw {name}"))?;
                pictures.push((format!("peer-{make}-{mode}-{name}.svg"), svg));
            }
        }
    }
    Ok(pictures)
}

fn title(make: Make, mode: &str) -> String {
    let hosts = match make {
        Make::Netns => "two sets of namespaces",
        Make::Vm => "two emulated machines",
    };
    let program = match mode {
        "hot" => "a program that keeps writing to the same 64 pages",
        _ => "a program that writes all over its memory",
    };
    format!("{program}, between {hosts}")
}

/// The power of ten next to a value.
fn decade(value: f64, next: fn(f64) -> f64) -> f64 {
    10f64.powf(next(value.log10()))
}

/// One for each of the means.
fn lines(rows: &[&PeerRow], figure: fn(&PeerRow) -> f64) -> Vec<Line> {
    let mut lines = Vec::<Line>::new();
    for row in rows {
        let point = (f64::from(row.resident_mb), figure(row));
        match lines.iter_mut().find(|(means, _)| *means == row.means) {
            Some((_, points)) => points.push(point),
            None => lines.push((row.means.clone(), vec![point])),
        }
    }
    for (_, points) in &mut lines {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    lines
}

/// What it is of, and its points from left to right.
pub type Line = (String, Vec<(f64, f64)>);

/// A picture of lines; both its scales are logarithmic.
pub struct Curves<'a> {
    pub title: &'a str,
    /// What the scales are of.
    pub x: &'a str,
    pub y: &'a str,
    /// pmig's own, whose names begin with its own, are the bold ones.
    pub lines: Vec<Line>,
}

/// Draws it, as an SVG.
///
/// # Errors
/// Those of drawing.
pub fn draw(curves: &Curves<'_>) -> Result<String> {
    drawn(curves).map_err(|e| anyhow!("{}: {e}", curves.title))
}

type Drawn<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn drawn(curves: &Curves<'_>) -> Drawn<String> {
    /// Nothing is shown as less than that.
    const LEAST: f64 = 0.1;
    let points = || curves.lines.iter().flat_map(|(_, points)| points);
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        let all: Vec<f64> = values.collect();
        let least = all.iter().copied().fold(f64::INFINITY, f64::min);
        (least, all.iter().copied().fold(0.0, f64::max))
    };
    let (small, large) = bounds(&mut points().map(|point| point.0.max(LEAST)));
    let (low, high) = bounds(&mut points().map(|point| point.1.max(LEAST)));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(curves.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(64)
            .build_cartesian_2d(
                (small * 0.8..large * 1.25).log_scale(),
                (decade(low, f64::floor)..decade(high, f64::ceil)).log_scale(),
            )?;
        chart
            .configure_mesh()
            .x_desc(curves.x)
            .y_desc(curves.y)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|ms| match *ms < 1.0 {
                true => format!("{ms:.1}"),
                false => format!("{ms:.0}"),
            })
            .light_line_style(RGBColor(240, 240, 240))
            .draw()?;
        for (n, (name, points)) in curves.lines.iter().enumerate() {
            let colour = COLOURS[n % COLOURS.len()];
            let points: Vec<(f64, f64)> = points
                .iter()
                .map(|(x, y)| (x.max(LEAST), y.max(LEAST)))
                .collect();
            let width = if name.starts_with("pmig") { 3 } else { 2 };
            let dots = points.clone();
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(width)))?
                .label(name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(width))
                });
            chart.draw_series(
                dots.into_iter()
                    .map(|at| Circle::new(at, 3, colour.filled())),
            )?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .legend_area_size(28)
            .draw()?;
        root.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_a_line_for_each_of_the_means() {
        let row = |means: &str, resident_mb, gap_ms| PeerRow {
            hosts: Make::Vm,
            means: means.into(),
            mode: "hot".into(),
            resident_mb,
            moves: 10,
            gap_ms,
            worst_ms: gap_ms,
            baseline_ms: 4.0,
            total_ms: 10.0 * gap_ms,
            rate: 1.0,
        };
        let rows = [
            row("pmig", 1, 15.0),
            row("pmig", 64, 16.0),
            row("other", 1, 300.0),
            row("other", 64, 900.0),
        ];
        let pictures = all(&rows).unwrap();
        assert_eq!(pictures.len(), 2);
        let (name, svg) = &pictures[0];
        assert_eq!(name, "peer-vm-hot-gap.svg");
        assert_eq!(svg.matches("<circle").count(), 4);
        assert!(svg.contains("pmig") && svg.contains("resident memory"));
        assert!(all(&[]).unwrap().is_empty());
    }
}
