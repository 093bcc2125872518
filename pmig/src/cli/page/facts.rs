//! What is known of the migration, a row each; what is not known has none.

use super::super::show::{size, time};
use super::scale::{pages, Out};
use super::story::Story;
use super::text::{utc, Text};
use super::Told;

/// The section.
pub fn draw(told: &Told, story: &Story) -> String {
    let mut rows: Vec<(String, String)> = Vec::new();
    let mut row = |name: &str, value: String| {
        if !value.is_empty() {
            rows.push((name.into(), value));
        }
    };
    let count = |n: u32, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
    row("program", format!("{} {}", told.pid, told.name));
    if let Some(f) = story.facts {
        row(
            "made of",
            format!(
                "{}, {}, {} of memory, {}",
                count(f.processes, "process", "processes"),
                count(f.threads, "thread", "threads"),
                size(f.bytes),
                count(f.files, "descriptor", "descriptors"),
            ),
        );
    }
    match story.facts {
        Some(f) if !f.to.is_empty() => {
            row("from", machine(&f.from, &f.kernel_from));
            row("to", machine(&f.to, &f.kernel_to));
        }
        _ => {
            row("from", told.from.clone());
            row("to", told.to.clone());
        }
    }
    row("address", told.addr.clone());
    if let Some(f) = story.facts {
        row("pcb read by", f.pcb.clone());
    }
    for (name, value) in &told.asked {
        row(name, value.clone());
    }
    if let Some(done) = story.done {
        row("all of it took", time(done.total));
        if !done.freeze.total.is_zero() {
            row("stood still", time(done.freeze.total));
        }
        if let Some(error) = done.freeze.clock_error {
            // Less than what `time` has digits for.
            let error = match error.as_secs_f64() * 1e6 {
                us if us < 1000.0 => format!("{us:.1} µs"),
                _ => time(error),
            };
            row(
                "clock error",
                format!("{error} at most, between the two machines"),
            );
        }
        row("sent", size(done.bytes_sent));
        row(
            "sent while it stood still",
            format!("{}, {}", size(done.freeze.bytes), pages(done.freeze.pages)),
        );
    }
    for (name, value) in &story.more {
        row(name, value.clone());
    }
    row("begun", utc(told.begun));
    if let Some(failed) = &story.failed {
        row("exit code", failed.exit_code.to_string());
    }
    if let Some(f) = story.facts {
        row("migration", f.id.clone());
    }
    row("pmig", env!("CARGO_PKG_VERSION").into());

    let mut out = Out::default();
    out.put(format_args!(
        "<section>\n<h2>Facts</h2>\n<table class=\"facts\">\n<tbody>\n"
    ));
    for (name, value) in rows {
        out.put(format_args!(
            "<tr><th scope=\"row\">{}</th><td><bdi>{}</bdi></td></tr>\n",
            Text(&name),
            Text(&value)
        ));
    }
    out.put(format_args!("</tbody>\n</table>\n</section>\n"));
    out.0
}

fn machine(host: &str, kernel: &str) -> String {
    match kernel {
        "" => host.into(),
        kernel => format!("{host}, linux {kernel}"),
    }
}
