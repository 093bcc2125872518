//! The benches' results as a person reads them, and where they are kept.

use super::rows::{FreezeRow, Missing, PeerRow, Results, ThroughputRow, TrackingRow};
use super::{plot, scale};
use crate::build;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

/// The benches, in the order of the summary.
const BENCHES: [&str; 5] = ["freeze_time", "scale", "throughput", "tracking", "peer"];

fn directory() -> Result<PathBuf> {
    let lab = build::directory()?;
    let directory = lab.with_file_name("pmig-bench");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    Ok(directory)
}

/// Ends a bench: keeps its results, and prints and writes the summary of all
/// that there are; fails if anything did.
pub fn conclude(bench: &str, results: &Results) -> ExitCode {
    // It was only asked what there is to measure.
    if results.links.is_empty()
        && results.trackings.is_empty()
        && results.failed.is_empty()
        && results.skipped.is_empty()
    {
        return ExitCode::SUCCESS;
    }
    if let Err(e) = keep(bench, results) {
        eprintln!("{bench}: {e:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::from(u8::from(!results.failed.is_empty()))
}

fn keep(bench: &str, results: &Results) -> Result<()> {
    let directory = directory()?;
    let put = |name: &str, text: &str| {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    put(
        &format!("{bench}.json"),
        &serde_json::to_string_pretty(results)?,
    )?;
    let known = |name: &&str| {
        let text = fs::read(directory.join(format!("{name}.json"))).ok()?;
        // What cannot be understood is another version's.
        Some((name.to_string(), serde_json::from_slice(&text).ok()?))
    };
    let all = BENCHES
        .iter()
        .filter_map(known)
        .collect::<Vec<(String, Results)>>();
    let pictures = plot::all(&results.peers)?;
    for (name, picture) in pictures
        .into_iter()
        .chain(scale::pictures(&results.scales)?)
    {
        put(&name, &picture)?;
    }
    let text = text(&all);
    put("summary.md", &text)?;
    let all = all
        .iter()
        .map(|(bench, results)| Named { bench, results })
        .collect::<Vec<_>>();
    put("summary.json", &serde_json::to_string_pretty(&all)?)?;
    println!("\n{text}\nwritten to {}", directory.display());
    Ok(())
}

#[derive(Serialize)]
struct Named<'a> {
    bench: &'a str,
    #[serde(flatten)]
    results: &'a Results,
}

fn text(all: &[(String, Results)]) -> String {
    let mut text = String::new();
    for (bench, results) in all {
        let short = if results.short { " (short)" } else { "" };
        let _ = writeln!(text, "## {bench}{short}\n");
        for link in &results.links {
            let rate = link.iperf3.map_or("unknown".into(), rate);
            let processors = match link.processors {
                None => String::new(),
                Some(1) => ", one processor each".into(),
                Some(n) => format!(", {n} processors each"),
            };
            let paused =
                (link.paused_ms).map_or(String::new(), |ms| format!(", after a pause {ms:.2} ms"));
            let _ = writeln!(
                text,
                "Link of {}{processors}: {rate} by iperf3, round trip {:.2} ms{paused}.\n",
                link.hosts, link.round_trip_ms
            );
        }
        text += &freezes(&results.freezes);
        text += &throughputs(&results.throughputs);
        text += &trackings(&results.trackings);
        for (hosts, version) in &results.versions {
            let _ = writeln!(text, "CRIU {version} on {hosts}.\n");
        }
        text += &peers(&results.peers);
        text += &scale::text(&results.scales);
        text += &missing("Skipped, since this machine cannot", &results.skipped);
        text += &missing("Failed", &results.failed);
    }
    text
}

fn trackings(rows: &[TrackingRow]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut figures = vec![[
        "tracking",
        "stopped for it",
        "first look",
        "clean look",
        "4,096 written",
        "last look",
        "program: first writes",
        "after a look",
        "untracked",
        "of huge pages stay",
        "pages told",
    ]
    .map(str::to_owned)
    .to_vec()];
    for row in rows {
        let c = &row.cost;
        let stay = c.huge_kb[2] as f64 / c.huge_kb[0].max(1) as f64 * 100.0;
        let mut line = vec![format!("{} {} {} MB", row.hosts, row.how, row.resident_mb)];
        line.extend(
            [
                c.attach,
                c.first,
                c.clean,
                c.dirty,
                c.last,
                c.first_touch,
                c.touch,
                c.untracked,
            ]
            .map(ms),
        );
        line.extend([format!("{stay:.0} %"), c.huge_pages_found.to_string()]);
        figures.push(line);
    }
    table(&figures)
}

fn freezes(rows: &[FreezeRow]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut figures = vec![[
        "program",
        "moves",
        "freeze",
        "worst",
        "floor",
        "gap",
        "of it switch",
        "gap unmoved",
        "whole move",
        "rounds",
        "last pages",
    ]
    .map(str::to_owned)
    .to_vec()];
    let mut names = Vec::<&str>::new();
    for (name, _) in rows.iter().flat_map(|row| &row.parts) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let mut parts = vec![["program", "freeze"]
        .iter()
        .chain(&names)
        .map(|name| (*name).to_owned())
        .collect::<Vec<_>>()];
    for row in rows {
        let program = format!(
            "{} {} {} {} MB",
            row.hosts, row.pcb, row.mode, row.resident_mb
        );
        let mut line = vec![program.clone(), ms(row.freeze_ms)];
        line.extend(names.iter().map(|name| {
            let found = row.parts.iter().find(|(known, _)| known == name);
            found.map_or("-".into(), |(_, time)| format!("{time:.2}"))
        }));
        parts.push(line);
        figures.push(vec![
            program,
            row.moves.to_string(),
            ms(row.freeze_ms),
            ms(row.worst_ms),
            row.floor_ms.map_or("?".into(), ms),
            ms(row.gap_ms),
            ms(row.switch_ms),
            ms(row.baseline_ms),
            ms(row.total_ms),
            format!("{:.0}", row.rounds),
            format!("{:.0}", row.pages),
        ]);
    }
    format!(
        "Medians in milliseconds. Freeze: stop to resume, by pmig. Floor: the bytes of the freeze \
         at iperf3's rate, and two round trips after a pause. Gap: the largest in the program's own time stamps \
         around its move; unmoved: in as long a time before.\n\n{}\nThe freeze in its parts:\n\n{}\n",
        table(&figures),
        table(&parts)
    )
}

fn throughputs(rows: &[ThroughputRow]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut lines = vec![[
        "program",
        "moves",
        "memory",
        "iperf3",
        "ratio",
        "whole move",
        "of ideal",
        "pmig's memory",
    ]
    .map(str::to_owned)
    .to_vec()];
    for row in rows {
        lines.push(vec![
            match row.mode.as_str() {
                "post" => format!("{} idle {} MB, fill", row.hosts, row.resident_mb),
                _ => format!("{} idle {} MB", row.hosts, row.resident_mb),
            },
            row.moves.to_string(),
            rate(row.rate),
            row.iperf3.map_or("?".into(), rate),
            row.ratio
                .map_or("?".into(), |ratio| format!("{:.0} %", ratio * 100.0)),
            format!("{} ms", ms(row.total_ms)),
            row.whole
                .map_or("?".into(), |whole| format!("{whole:.2} x")),
            format!("{:.0} + {:.0} MB", row.peak_mb[0], row.peak_mb[1]),
        ]);
    }
    format!(
        "Medians. Memory: incompressible bytes per second of the copy, or of the fill, when they \
         follow the program. Ratio: against iperf3 just before it. Whole move: up to the last page; \
         of ideal: against the memory at iperf3's rate. pmig's memory: the most that was resident \
         at the source and at the target.\n\n{}\n",
        table(&lines)
    )
}

fn peers(rows: &[PeerRow]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut lines = vec![[
        "program",
        "moved by",
        "moves",
        "gap",
        "worst",
        "gap unmoved",
        "whole move",
        "memory",
    ]
    .map(str::to_owned)
    .to_vec()];
    for row in rows {
        lines.push(vec![
            format!("{} {} {} MB", row.hosts, row.mode, row.resident_mb),
            row.means.clone(),
            row.moves.to_string(),
            ms(row.gap_ms),
            ms(row.worst_ms),
            ms(row.baseline_ms),
            ms(row.total_ms),
            rate(row.rate),
        ]);
    }
    format!(
        "Medians in milliseconds. Gap: the largest in the program's own time stamps around its \
         move. Whole move: from the first command to the last page at the target. Memory: what is \
         resident, by that time.\n\n{}\n",
        table(&lines)
    )
}

fn missing(title: &str, all: &[Missing]) -> String {
    let mut text = String::new();
    if !all.is_empty() {
        let _ = writeln!(text, "{title}:\n");
        for one in all {
            let _ = writeln!(text, "- {}: {}", one.what, one.why.replace('\n', " "));
        }
        text.push('\n');
    }
    text
}

fn ms(value: f64) -> String {
    format!("{value:.1}")
}

fn rate(value: f64) -> String {
    format!("{:.0} MB/s", value / 1e6)
}

/// A table in Markdown whose columns are in line as plain text too.
pub(super) fn table(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(String::len).max().unwrap_or(0)
    };
    let widths = (0..columns).map(width).collect::<Vec<_>>();
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let _ = match column {
                0 => write!(text, "| {cell:<width$} "),
                _ => write!(text, "| {cell:>width$} "),
            };
        }
        text += "|\n";
        if number == 0 {
            for (column, width) in widths.iter().enumerate() {
                let rule = "-".repeat(width + 1);
                text += &match column {
                    0 => format!("|{rule}-"),
                    _ => format!("|{rule}:"),
                };
            }
            text += "|\n";
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_in_line() {
        let lines = [
            vec!["a".to_owned(), "bcd".into()],
            vec!["xyz".into(), "1".into()],
        ];
        let expected = "| a   | bcd |\n|-----|----:|\n| xyz |   1 |\n";
        assert_eq!(table(&lines), expected);
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut results = Results::default();
        results.skipped.push(Missing {
            what: "vm kmod hot 1 MB".into(),
            why: "no module".into(),
        });
        let text = text(&[("freeze_time".into(), results)]);
        assert!(text.contains("- vm kmod hot 1 MB: no module"), "{text}");
    }
}
