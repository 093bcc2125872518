use pmig::checkpoint::{look, Looked};
use pmig::error::printable;
use pmig::state::fd::{Description, Kind};
use pmig::state::memory::{Backing, Layout, Vma};

use super::output::{json, line};
use super::show::size;
use super::{say, Exit, Inspect};

pub fn run(args: &Inspect) -> Exit {
    match look(&args.file) {
        Ok(looked) if args.json => json(&looked),
        Ok(looked) => show(&looked).iter().for_each(|l| line(&printable(l))),
        Err(e) => {
            say(&e);
            return Exit::Other;
        }
    }
    Exit::Done
}

fn show(looked: &Looked) -> Vec<String> {
    let Looked { preview, last, .. } = looked;
    let mut text = vec![
        format!(
            "{} {}   from {}, linux {}   {}",
            preview.needs.pid,
            preview.comm,
            preview.machine.host,
            preview.machine.kernel,
            size(looked.size)
        ),
        format!("  executable  {}", preview.exe),
        format!(
            "  memory      {} in {} rounds, {} mappings",
            size(looked.memory),
            looked.rounds + 1,
            looked.layout.vmas.len()
        ),
    ];
    text.extend(
        looked
            .layout
            .vmas
            .iter()
            .map(|v| mapping(v, &looked.layout)),
    );
    text.push(format!("  descriptors {}", last.descriptors.holders.len()));
    text.extend(last.descriptors.holders.iter().map(|h| {
        let of = last.descriptors.descriptions.get(h.description as usize);
        format!("    fd {:<4} {}", h.fd, of.map_or("?".into(), description))
    }));
    text.push(format!("  files       {}", preview.files.files.len()));
    text.extend(preview.files.files.iter().map(|file| {
        let how = match file.uses.written {
            true => "its content is here",
            false => "must be there already",
        };
        format!("    {} ({how})", file.path)
    }));
    text
}

fn mapping(v: &Vma, layout: &Layout) -> String {
    let letter = |bit, letter| if v.prot & bit != 0 { letter } else { '-' };
    let what = match v.backing {
        Backing::Anonymous if v.grows_down => "[stack]".into(),
        Backing::Anonymous => String::new(),
        Backing::Droppable => "[droppable]".into(),
        Backing::File(n) => match layout.files.get(n as usize) {
            Some(file) => file.path.display().to_string(),
            None => "?".into(),
        },
        Backing::Vvar => "[vvar]".into(),
        Backing::Vdso => "[vdso]".into(),
    };
    let line = format!(
        "    {:012x}-{:012x} {}{}{} {what}",
        v.start,
        v.end,
        letter(1, 'r'),
        letter(2, 'w'),
        letter(4, 'x')
    );
    line.trim_end().into()
}

fn description(of: &Description) -> String {
    match &of.kind {
        Kind::Terminal(_) => "a terminal".into(),
        Kind::Regular(file) => format!("{} at {}", file.path, file.offset),
        Kind::Directory(directory) => format!("{}/", directory.path),
        Kind::Device(device) => device.path.to_string(),
        Kind::Pipe(end) => format!("pipe {}", end.pipe),
    }
}
