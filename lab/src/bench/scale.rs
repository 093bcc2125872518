//! How the time of a move grows with what a program has, and with what it writes.

use super::moves::{Moved, Told};
use super::peer::Means;
use super::plot::{self, Curves};
use super::rows::ms;
use super::summary::table;
use super::{median, CannotHere};
use crate::host::Make;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::time::Duration;

/// What there is more and more of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    Mappings,
    Descriptors,
    /// What the program is asked to write, in megabytes per second.
    DirtyRate,
}

impl Scale {
    /// All of them.
    pub const ALL: [Scale; 3] = [Scale::Mappings, Scale::Descriptors, Scale::DirtyRate];

    /// As a person reads it.
    pub fn name(self) -> &'static str {
        match self {
            Scale::Mappings => "mappings",
            Scale::Descriptors => "descriptors",
            Scale::DirtyRate => "MB/s written",
        }
    }

    fn file(self) -> &'static str {
        match self {
            Scale::Mappings => "mappings",
            Scale::Descriptors => "descriptors",
            Scale::DirtyRate => "writes",
        }
    }
}

/// One point of a curve; times in milliseconds, medians.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScaleRow {
    pub hosts: Make,
    /// Who moved it, and how.
    pub means: String,
    pub scale: Scale,
    /// How many or how much was asked for; none: as fast as it can.
    pub asked: Option<u32>,
    pub moves: usize,
    /// How long it stood still: by pmig's word, else the largest gap in its time
    /// stamps.
    pub still_ms: f64,
    pub worst_ms: f64,
    /// Until it ran at the target and nothing was missing there.
    pub total_ms: f64,
    /// Bytes per second that it wrote while it was copied, if that was measured.
    pub written: Option<f64>,
    /// Bytes that followed when it ran at the target.
    pub left_behind: f64,
}

impl ScaleRow {
    /// The medians of some moves by pmig.
    pub fn new(
        hosts: Make,
        means: &str,
        (scale, asked): (Scale, Option<u32>),
        moves: &[Told],
    ) -> Self {
        let of = |figure: &dyn Fn(&Told) -> f64| median(moves.iter().map(figure));
        let still = moves.iter().map(|told| ms(told.freeze().total));
        let written = moves.iter().filter_map(|told| told.dirty_rate);
        let written = written.map(|rate| rate as f64).collect::<Vec<_>>();
        Self {
            hosts,
            means: means.into(),
            scale,
            asked,
            moves: moves.len(),
            still_ms: median(still.clone()),
            worst_ms: still.fold(0.0, f64::max),
            total_ms: of(&|told| ms(told.summary.total + told.summary.filled.unwrap_or_default())),
            written: (!written.is_empty()).then(|| median(written)),
            left_behind: of(&|told| told.summary.left_behind as f64),
        }
    }

    /// The medians of some moves by others.
    pub fn of_peer(
        hosts: Make,
        means: Means,
        (scale, asked): (Scale, Option<u32>),
        moves: &[Moved<Duration>],
    ) -> Self {
        let still = moves.iter().map(|moved| ms(moved.gap));
        Self {
            hosts,
            means: means.name().into(),
            scale,
            asked,
            moves: moves.len(),
            still_ms: median(still.clone()),
            worst_ms: still.fold(0.0, f64::max),
            total_ms: median(moves.iter().map(|moved| ms(moved.told))),
            written: None,
            left_behind: 0.0,
        }
    }
}

/// The slope of the line that lies closest to some points, by least squares; zero
/// where they do not lie apart.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len().max(1) as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let apart: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
    let along: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    if apart > 0.0 {
        along / apart
    } else {
        0.0
    }
}

/// Where a curve is drawn: time by number.
type Points = Vec<(f64, f64)>;

/// The rows of each means, in order, where it stands still and as a whole.
fn by_means(rows: &[ScaleRow], hosts: Make, scale: Scale) -> Vec<(&str, Points, Points)> {
    let mut all: Vec<(&str, Points, Points)> = Vec::new();
    for row in rows {
        if row.hosts != hosts || row.scale != scale {
            continue;
        }
        let x = match (scale, row.written, row.asked) {
            (Scale::DirtyRate, Some(written), _) => written / 1e6,
            (_, _, Some(asked)) => f64::from(asked),
            // By others, and nobody knows how fast.
            _ => continue,
        };
        let at = match all.iter().position(|(means, ..)| *means == row.means) {
            Some(at) => at,
            None => {
                all.push((&row.means, Vec::new(), Vec::new()));
                all.len() - 1
            }
        };
        all[at].1.push((x, row.still_ms));
        all[at].2.push((x, row.total_ms));
    }
    for (_, still, total) in &mut all {
        still.sort_by(|a, b| a.0.total_cmp(&b.0));
        total.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    all
}

/// Every picture of these rows: name of the file, and the SVG.
///
/// # Errors
/// Those of drawing.
pub fn pictures(rows: &[ScaleRow]) -> Result<Vec<(String, String)>> {
    let mut pictures = Vec::new();
    for make in [Make::Netns, Make::Vm] {
        for scale in Scale::ALL {
            let mut lines = Vec::new();
            for (means, still, total) in by_means(rows, make, scale) {
                // An idle program writes next to nothing, which no such scale has.
                let shown = |points: Points| -> Points {
                    points.into_iter().map(|(x, y)| (x.max(1.0), y)).collect()
                };
                lines.push((format!("{means}: stands still"), shown(still)));
                lines.push((format!("{means}: whole move"), shown(total)));
            }
            if lines.is_empty() {
                continue;
            }
            let svg = plot::draw(&Curves {
                title: &format!("a program with more and more {}, {make}", scale.name()),
                x: scale.name(),
                y: "ms",
                lines,
            })?;
            pictures.push((format!("scale-{make}-{}.svg", scale.file()), svg));
        }
    }
    Ok(pictures)
}

/// The rows as a person reads them, and what each mapping and descriptor costs.
pub fn text(rows: &[ScaleRow]) -> String {
    let mut text = String::new();
    if rows.is_empty() {
        return text;
    }
    let _ = writeln!(
        text,
        "Medians in milliseconds. Still: stop to resume, by pmig; of others the largest gap in the \
         program's own time stamps. Whole move: until nothing is missing at the target.\n"
    );
    for scale in Scale::ALL {
        // The rest says nothing of mappings and descriptors.
        let columns = if scale == Scale::DirtyRate { 8 } else { 6 };
        let cut = |line: Vec<String>| line.into_iter().take(columns).collect::<Vec<_>>();
        let mut lines = vec![cut([
            scale.name(),
            "moved by",
            "moves",
            "still",
            "worst",
            "whole move",
            "written meanwhile",
            "followed",
        ]
        .map(str::to_owned)
        .to_vec())];
        for row in rows.iter().filter(|row| row.scale == scale) {
            let asked = row.asked.map_or("all it can".into(), |n| n.to_string());
            let megabytes = |bytes: f64| format!("{:.0} MB", bytes / 1e6);
            lines.push(cut(vec![
                format!("{} {asked}", row.hosts),
                row.means.clone(),
                row.moves.to_string(),
                format!("{:.2}", row.still_ms),
                format!("{:.2}", row.worst_ms),
                format!("{:.1}", row.total_ms),
                row.written
                    .map_or("?".into(), |rate| format!("{}/s", megabytes(rate))),
                megabytes(row.left_behind),
            ]));
        }
        if lines.len() > 1 {
            text += &table(&lines);
            text.push('\n');
        }
        if scale != Scale::DirtyRate {
            text += &costs(rows, scale);
        }
    }
    text
}

/// What one more costs; of the two largest alone besides, which is as much where
/// nothing grows faster than their number.
fn costs(rows: &[ScaleRow], scale: Scale) -> String {
    let mut text = String::new();
    for make in [Make::Netns, Make::Vm] {
        for (means, still, total) in by_means(rows, make, scale) {
            if still.len() < 2 {
                continue;
            }
            let micros = |points: &[(f64, f64)]| {
                let last = &points[points.len() - 2..];
                let each = |points| slope(points) * 1e3;
                format!("{:.2} us ({:.2} at the end)", each(points), each(last))
            };
            let _ = writeln!(
                text,
                "Each of the {} on {make}, moved by {means}: {} of standing still, {} of the whole.\n",
                scale.name(),
                micros(&still),
                micros(&total)
            );
        }
    }
    text
}

/// How many descriptors a program on these hosts may have, of so many wanted: pmig
/// needs some beside them.
///
/// # Errors
/// [`CannotHere`] where that is not even half.
pub fn descriptors(wanted: u32, limit: u32) -> Result<u32> {
    const BESIDE: u32 = 1000;
    let most = limit.saturating_sub(BESIDE);
    if most < wanted / 2 {
        return Err(CannotHere(format!("no program may have more than {limit}")).into());
    }
    Ok(wanted.min(most))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(scale: Scale, asked: u32, still_ms: f64) -> ScaleRow {
        ScaleRow {
            hosts: Make::Netns,
            means: "pmig".into(),
            scale,
            asked: Some(asked),
            moves: 10,
            still_ms,
            worst_ms: still_ms,
            total_ms: 10.0 * still_ms,
            written: None,
            left_behind: 0.0,
        }
    }

    #[test]
    fn the_cost_of_each_is_told() {
        let rows = [10, 1000, 20_000].map(|n| row(Scale::Mappings, n, 1.0 + f64::from(n) / 2e3));
        let text = text(&rows);
        assert!(
            text.contains("0.50 us (0.50 at the end) of standing still, 5.00 us (5.00"),
            "{text}"
        );
        let pictures = pictures(&rows).unwrap();
        assert_eq!(pictures[0].0, "scale-netns-mappings.svg");
        assert_eq!(pictures.len(), 1);
    }

    #[test]
    fn points_in_one_place_have_no_slope() {
        assert_eq!(slope(&[(3.0, 1.0), (3.0, 2.0)]), 0.0);
        assert_eq!(slope(&[]), 0.0);
        assert_eq!(slope(&[(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]), 1.0);
    }

    #[test]
    fn there_are_no_more_descriptors_than_may_be() {
        assert_eq!(descriptors(20_000, 1 << 20).unwrap(), 20_000);
        assert_eq!(descriptors(20_000, 20_000).unwrap(), 19_000);
        assert!(descriptors(20_000, 4096).is_err());
    }
}
