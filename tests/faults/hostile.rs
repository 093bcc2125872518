//! Peers that lie.

use super::cell::{Cell, Said, LIMIT};
use super::proxy::{Act, Message};
use anyhow::{ensure, Context, Result};
use lab::harness::Trial;
use lab::{Lab, Make};
use pmig::protocol::message::{ToSource, ToTarget};
use serde::de::DeserializeOwned;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Lies told about each kind of message.
const LIES: u64 = 6;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, body) in [
        (
            "a_target_survives_every_lie_of_a_source",
            (|lab| lies(lab, "source")) as fn(&Lab) -> Result<()>,
        ),
        ("a_source_survives_every_lie_of_a_target", |lab| {
            lies(lab, "target")
        }),
    ] {
        trials.push(Trial::new(Make::Netns, format!("faults::{name}"), body).bare());
    }
    trials
}

/// How a message is falsified.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// One value in it is another.
    Value(u64),
    /// Its length is not.
    Length,
    /// It ends too soon, or has more.
    Bytes(bool),
}

fn lies(lab: &Lab, liar: &'static str) -> Result<()> {
    let cell = Cell::new(lab, &format!("lies-of-{liar}"))?;
    let server = cell.serve_shared()?;
    // Which kinds there are, an honest migration shows.
    let heard = Arc::new(Mutex::new(BTreeMap::<String, usize>::new()));
    {
        let heard = heard.clone();
        let proxy = cell.proxy(move |message| {
            let said_by = match message {
                Message::ToTarget(_) => "source",
                Message::ToSource(_) => "target",
            };
            if let (true, Ok(mut heard)) = (said_by == liar, heard.lock()) {
                *heard.entry(message.name()).or_default() += 1;
            }
            Act::Pass
        })?;
        let said = one(&cell, &proxy.address())?;
        ensure!(said.code() == Some(0), "{said:?}");
    }
    let kinds = heard.lock().map(|heard| heard.clone()).unwrap_or_default();
    ensure!(kinds.len() > 3, "{kinds:?}");
    for (number, kind) in kinds.keys().enumerate() {
        let values = (0..LIES).map(|n| Lie::Value(n * 1_000_003 + number as u64));
        for lie in values.chain([Lie::Length, Lie::Bytes(false), Lie::Bytes(true)]) {
            told(&cell, liar, kind, lie)
                .with_context(|| format!("{lie:?} about {kind}: {}", cell.log()))?;
        }
    }
    ensure!(cell.b.ended(server)?.is_none(), "pmig serve has ended");
    let log = cell.log();
    ensure!(!log.contains("panicked"), "{log}");
    cell.clean(LIMIT)?;
    cell.b.signal(server, 9)
}

/// Moves a program, and ends it wherever it is then.
fn one(cell: &Cell, address: &str) -> Result<Said> {
    let program = cell.start()?;
    let moving = cell.migrate_to(program, address, &[])?;
    let said = cell.said(moving, LIMIT)?.context("pmig does not end")?;
    if said.code() == Some(5) {
        for host in [cell.a, cell.b] {
            host.exec(&cell.pmig("resolve", &[]))?;
        }
    }
    let mut places = Vec::new();
    for host in [cell.a, cell.b] {
        let process = host.process(program.pid)?;
        if process.is_some_and(|p| p.state != 'Z' && p.comm == "iterative") {
            places.push(host.name());
            let _ = host.signal(program.pid, 9);
        }
        host.sh(&format!("rm -f {}/o*", cell.directory()))?;
    }
    ensure!(places.len() < 2, "it is on both: {said:?}");
    ensure!(
        said.code() != Some(4) || places == ["a"] || said.text.contains("has ended"),
        "it is on {places:?}: {said:?}"
    );
    Ok(said)
}

fn told(cell: &Cell, liar: &str, kind: &str, lie: Lie) -> Result<()> {
    let (by_source, kind) = (liar == "source", kind.to_owned());
    let once = Mutex::new(false);
    let proxy = cell.proxy(move |message| {
        let mut done = match once.lock() {
            Ok(done) => done,
            Err(broken) => broken.into_inner(),
        };
        if *done || message.name() != kind {
            return Act::Pass;
        }
        match message {
            Message::ToTarget(message) if by_source => {
                *done = true;
                falsify::<ToTarget>(message, lie)
            }
            Message::ToSource(message) if !by_source => {
                *done = true;
                falsify::<ToSource>(message, lie)
            }
            _ => Act::Pass,
        }
    })?;
    let said = one(cell, &proxy.address())?;
    ensure!(
        matches!(said.code(), Some(0 | 1 | 3 | 4 | 5)) && !said.text.contains("panicked"),
        "{said:?}"
    );
    Ok(())
}

fn falsify<T: Serialize + DeserializeOwned>(message: &mut T, lie: Lie) -> Act {
    match lie {
        Lie::Value(seed) => {
            let Ok(honest) = serde_json::to_value(&*message) else {
                return Act::Pass;
            };
            // Most values fit no place: try until one does.
            for attempt in 0..50 {
                let mut value = honest.clone();
                change(&mut value, seed.wrapping_add(attempt * 7919));
                if let Ok(false_one) = serde_json::from_value(value) {
                    *message = false_one;
                    break;
                }
            }
            Act::Pass
        }
        Lie::Length => Act::Instead(vec![0xff; 64]),
        Lie::Bytes(more) => {
            let Ok(mut body) =
                bincode::serde::encode_to_vec(&*message, bincode::config::standard())
            else {
                return Act::Pass;
            };
            if more {
                body.push(0);
            } else {
                body.truncate(body.len() / 2);
            }
            let mut frame = (body.len() as u32).to_le_bytes().to_vec();
            frame.extend(body);
            Act::Instead(frame)
        }
    }
}

/// Puts another value in one place.
fn change(value: &mut Value, seed: u64) {
    let mut places = Vec::new();
    find(value, &mut String::new(), &mut places);
    let Some(place) = places.get(mix(seed) as usize % places.len().max(1)) else {
        return;
    };
    let Some(at) = value.pointer_mut(place) else {
        return;
    };
    let which = mix(seed ^ 0x5555) as usize;
    *at = match &*at {
        Value::Bool(is) => Value::from(!is),
        Value::String(_) => {
            let texts = ["", "../../etc/passwd", "a\0b\n", "/", &"x".repeat(5000)];
            Value::from(texts[which % texts.len()])
        }
        Value::Array(items) => {
            let often = [0, 2, 1000][which % 3];
            let all = std::iter::repeat_n(items.iter().cloned(), often);
            Value::from(all.flatten().collect::<Vec<_>>())
        }
        _ => {
            let numbers = [
                0,
                1,
                4095,
                4096,
                1 << 31,
                1 << 47,
                i64::MAX as u64,
                u64::MAX,
            ];
            match which % (numbers.len() + 2) {
                8 => Value::from(-1),
                9 => Value::from(i64::MIN),
                n => Value::from(numbers[n]),
            }
        }
    };
}

fn find(value: &Value, at: &mut String, places: &mut Vec<String>) {
    let end = at.len();
    let mut inside = |name: &str, value: &Value, places: &mut Vec<String>| {
        at.push('/');
        at.push_str(&name.replace('~', "~0").replace('/', "~1"));
        find(value, at, places);
        at.truncate(end);
    };
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                inside(name, value, places);
            }
        }
        Value::Array(items) => {
            // Long lists are not all there is.
            for (number, value) in items.iter().enumerate().take(12) {
                inside(&number.to_string(), value, places);
            }
            places.push(at[..end].to_owned());
        }
        _ => places.push(at[..end].to_owned()),
    }
}

fn mix(seed: u64) -> u64 {
    lab::victim::Mix(seed).add(1)
}
