//! What happened, put together from the events.

use std::time::Duration;

use pmig::error::Obstacle;
use pmig::phase::Phase;
use pmig::report::{End, Event, Facts, Round, Summary};
use serde::Serialize;
use serde_json::Value;

use super::super::show::{size, time};

/// An event, and when it was heard, from the command on.
pub type Heard = (Duration, Event);

/// A phase, or what is known of it.
#[derive(Debug, PartialEq)]
pub struct Stretch {
    pub phase: Phase,
    pub what: String,
    pub from: Duration,
    pub to: Duration,
    /// Whether its end was told, and not only the beginning of the next.
    told: bool,
}

/// A round of the copy that came to its end.
#[derive(Debug)]
pub struct Copied<'a> {
    pub round: &'a Round,
    pub from: Duration,
    pub to: Duration,
    /// Bytes that the program wrote to meanwhile, if somebody looked later.
    pub dirtied: Option<u64>,
}

/// Bytes per second over a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    pub from: Duration,
    pub to: Duration,
    pub rate: f64,
}

/// A migration that did not go through.
#[derive(Debug)]
pub struct Failed<'a> {
    pub error: &'a str,
    pub obstacles: &'a [Obstacle],
    pub outcome: &'a str,
    pub exit_code: u8,
}

impl Failed<'_> {
    /// What to call it.
    pub fn word(&self) -> &'static str {
        match self.outcome {
            "unresolved" => "not settled",
            _ if !self.obstacles.is_empty() => "refused",
            _ => "failed",
        }
    }

    /// Whether it is held yet.
    pub fn is_held(&self) -> bool {
        self.outcome == "unresolved"
    }
}

/// All that a page shows.
#[derive(Debug, Default)]
pub struct Story<'a> {
    pub facts: Option<&'a Facts>,
    pub phases: Vec<Stretch>,
    pub rounds: Vec<Copied<'a>>,
    pub sent: Vec<Rate>,
    pub dirtied: Vec<Rate>,
    pub notes: Vec<&'a str>,
    pub done: Option<&'a Summary>,
    pub failed: Option<Failed<'a>>,
    /// When the program stood still.
    pub frozen: Option<(Duration, Duration)>,
    /// The last that was heard.
    pub end: Duration,
    /// What events say beyond what is known here: name and value.
    pub more: Vec<(String, String)>,
}

/// The size of a page of memory.
const PAGE: u64 = 4096;

impl<'a> Story<'a> {
    pub fn of(heard: &'a [Heard]) -> Story<'a> {
        let mut story = Story {
            end: heard.last().map_or(Duration::ZERO, |(at, _)| *at),
            ..Story::default()
        };
        let mut stopped = None;
        // Of the round under way: its number, and what was sent when.
        let mut under_way: Option<(u32, Duration, u64)> = None;
        for (at, event) in heard {
            match event {
                Event::Facts(facts) => {
                    story.facts = Some(facts);
                    story.learn(facts, FACTS);
                }
                Event::Phase { phase } => {
                    story.end_phase(*at);
                    story.phases.push(Stretch {
                        phase: *phase,
                        what: String::new(),
                        from: *at,
                        to: story.end,
                        told: false,
                    });
                }
                Event::Ended { phase, what, .. } => {
                    if let Some(last) = story.phases.last_mut().filter(|s| s.phase == *phase) {
                        what.clone_into(&mut last.what);
                        last.to = *at;
                        last.told = true;
                    }
                }
                Event::Round(round) => story.progress(&mut under_way, *at, round),
                Event::RoundEnded(round) => {
                    story.progress(&mut under_way, *at, round);
                    let from = at.saturating_sub(round.elapsed);
                    story.round_ended(round, from, *at);
                }
                Event::Note { text } => story.notes.push(text),
                Event::Done(summary) => {
                    story.done = Some(summary);
                    story.learn(summary, SUMMARY);
                }
                Event::Failed {
                    error,
                    obstacles,
                    outcome,
                    exit_code,
                    stopped: time,
                } => {
                    stopped = *time;
                    story.failed = Some(Failed {
                        error,
                        obstacles,
                        outcome,
                        exit_code: *exit_code,
                    });
                }
                // All that there are have a place; others are listed until they have.
                other => story.learn(other, &["event"]),
            }
        }
        story.frozen = story.stood_still(stopped);
        story.during_freeze();
        story
    }

    fn end_phase(&mut self, at: Duration) {
        if let Some(last) = self.phases.last_mut().filter(|s| !s.told) {
            last.to = at;
        }
    }

    /// What was sent since the last that was heard of this round.
    fn progress(
        &mut self,
        under_way: &mut Option<(u32, Duration, u64)>,
        at: Duration,
        round: &Round,
    ) {
        let (from, before) = match under_way {
            Some((number, from, before)) if *number == round.round => (*from, *before),
            _ => (at.saturating_sub(round.elapsed), 0),
        };
        *under_way = Some((round.round, at, round.bytes));
        let rate = rate(round.bytes.saturating_sub(before), from, at);
        self.sent.extend(rate);
    }

    fn round_ended(&mut self, round: &'a Round, from: Duration, to: Duration) {
        if let Some(before) = self.rounds.last_mut() {
            before.dirtied = Some(round.of);
            if let Some(dirty) = round.dirty_rate {
                self.dirtied.push(Rate {
                    from: before.from,
                    to: from,
                    rate: dirty as f64,
                });
            }
        }
        self.rounds.push(Copied {
            round,
            from,
            to,
            dirtied: None,
        });
    }

    /// What was written during the last round is what the freeze had to copy, if
    /// anybody could tell what was written.
    fn during_freeze(&mut self) {
        let (Some(done), Some((stop, resume))) = (self.done, self.frozen) else {
            return;
        };
        self.sent.extend(rate(done.freeze.bytes, stop, resume));
        let follows = |last: &&mut Copied| last.round.dirty_rate.is_some();
        let Some(last) = self.rounds.last_mut().filter(follows) else {
            return;
        };
        let bytes = done.freeze.pages.saturating_mul(PAGE);
        last.dirtied = Some(bytes);
        self.dirtied.extend(rate(bytes, last.from, stop));
    }

    fn stood_still(&self, stopped: Option<Duration>) -> Option<(Duration, Duration)> {
        // Of what began again the last.
        let mut freezes = self.phases.iter().filter(|s| s.phase == Phase::Freeze);
        let from = freezes.next_back()?.from;
        // Whatever comes behind the commit, it runs then.
        let mut behind = self.phases.iter().skip_while(|s| s.phase != Phase::Commit);
        let released = behind.nth(1).map_or(self.end, |s| s.from);
        Some(match (self.done, &self.failed) {
            (Some(done), _) if !done.freeze.total.is_zero() => {
                let from = match done.freeze.at {
                    Duration::ZERO => from,
                    at => at,
                };
                (from, from.saturating_add(done.freeze.total))
            }
            (_, Some(failed)) if matches!(failed.outcome, "unresolved" | "ended") => {
                (from, self.end)
            }
            (_, Some(_)) => match stopped {
                Some(stopped) => (from, from.saturating_add(stopped)),
                None => (from, released),
            },
            _ => (from, released),
        })
    }

    /// Keeps what an event says that nothing here has a place for.
    fn learn(&mut self, event: &impl Serialize, known: &[&str]) {
        let Ok(Value::Object(fields)) = serde_json::to_value(event) else {
            return;
        };
        for (name, value) in fields {
            if !known.contains(&&*name) {
                self.more.extend(spelt(&name, &value));
            }
        }
    }

    /// Whether it runs where it was to go.
    pub fn is_there(&self) -> bool {
        match &self.failed {
            Some(failed) => failed.outcome == "moved",
            None => self.done.is_some_and(|done| done.end == End::Moved),
        }
    }

    /// The phase in which it ended, where it did not end well.
    pub fn failed_in(&self) -> Option<&Stretch> {
        self.failed.as_ref().and(self.phases.last())
    }

    /// Where the program is in the end, in a word or two for a graphic.
    pub fn at_last(&self, from: &'a str, to: &'a str) -> &'a str {
        match (&self.failed, self.done.map(|done| done.end)) {
            (Some(failed), _) => match failed.outcome {
                "unresolved" => "held",
                "ended" => "has ended",
                "moved" => to,
                _ => from,
            },
            (None, Some(End::Moved)) => to,
            (None, Some(End::InFile)) => "in a file",
            (None, Some(End::Copied)) => from,
            (None, None) => "",
        }
    }
}

/// What pages have a place for.
const FACTS: &[&str] = &[
    "id",
    "pid",
    "comm",
    "processes",
    "threads",
    "bytes",
    "files",
    "from",
    "to",
    "kernel_from",
    "kernel_to",
    "pcb",
];
const SUMMARY: &[&str] = &[
    "id",
    "pid",
    "comm",
    "to",
    "end",
    "total_ms",
    "bytes_sent",
    "rounds",
    "freeze",
];

fn rate(bytes: u64, from: Duration, to: Duration) -> Option<Rate> {
    let took = to.saturating_sub(from).as_secs_f64();
    (took > 0.0).then(|| Rate {
        from,
        to,
        rate: bytes as f64 / took,
    })
}

/// A field of an event in words: `clock_error_ms` is a time, `bytes` are bytes.
fn spelt(name: &str, value: &Value) -> Option<(String, String)> {
    let plain = name.trim_end_matches("_ms").replace('_', " ");
    let text = match value {
        Value::Number(n) if name.ends_with("_ms") => {
            let seconds = n.as_f64()? / 1000.0;
            time(Duration::try_from_secs_f64(seconds).ok()?)
        }
        Value::Number(n) if name.split('_').any(|word| word == "bytes") => size(n.as_u64()?),
        Value::Number(n) => n.to_string(),
        Value::String(text) if !text.is_empty() => text.clone(),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        _ => return None,
    };
    Some((plain, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_here_is_spelt_by_its_name() {
        let value = serde_json::json!({
            "id": "x", "clock_error_ms": 0.021, "tracking": "write protection",
            "bytes_left": 4096, "lazily": true, "none": null, "odd_ms": -1.0,
        });
        let mut story = Story::default();
        story.learn(&value, FACTS);
        story.more.sort();
        let more: Vec<(&str, &str)> = story.more.iter().map(|(n, v)| (&**n, &**v)).collect();
        assert_eq!(
            more,
            [
                ("bytes left", "4.1 kB"),
                ("clock error", "0.02 ms"),
                ("lazily", "yes"),
                ("tracking", "write protection"),
            ]
        );
    }

    #[test]
    fn rates_are_those_between_two_events() {
        let ms = Duration::from_millis;
        let round = |round, bytes, elapsed, dirty_rate| Round {
            round,
            pages: 2,
            bytes,
            of: 8192,
            elapsed: ms(elapsed),
            rate: 0,
            dirty_rate,
            eta: None,
        };
        let heard = [
            (ms(110), Event::Round(round(1, 1000, 10, None))),
            (ms(120), Event::RoundEnded(round(1, 4000, 20, None))),
            (ms(140), Event::RoundEnded(round(2, 500, 10, Some(81_920)))),
        ];
        let story = Story::of(&heard);
        let rates: Vec<(Duration, Duration, u64)> = story
            .sent
            .iter()
            .map(|r| (r.from, r.to, r.rate.round() as u64))
            .collect();
        assert_eq!(
            rates,
            [
                (ms(100), ms(110), 100_000),
                (ms(110), ms(120), 300_000),
                (ms(130), ms(140), 50_000),
            ]
        );
        let dirtied = [Rate {
            from: ms(100),
            to: ms(130),
            rate: 81_920.0,
        }];
        assert_eq!(story.dirtied, dirtied);
        assert_eq!(story.rounds[0].dirtied, Some(8192));
        assert_eq!(story.rounds[1].dirtied, None);
    }
}
