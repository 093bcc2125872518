//! Where the time of the freeze goes, for `-vv`.

use std::time::{Duration, Instant};

/// Times of steps, kept until nothing stands still any more.
pub struct Laps {
    last: Instant,
    all: Vec<(&'static str, Duration)>,
}

impl Laps {
    pub fn new() -> Laps {
        Laps {
            last: Instant::now(),
            all: Vec::with_capacity(32),
        }
    }

    /// A step has ended.
    pub fn add(&mut self, what: &'static str) {
        let now = Instant::now();
        self.all.push((what, now.duration_since(self.last)));
        self.last = now;
    }

    /// Writes them to the log.
    pub fn log(&self, side: &str) {
        for (what, time) in &self.all {
            tracing::debug!("{side}: {what} {time:?}");
        }
    }
}

impl Default for Laps {
    fn default() -> Laps {
        Laps::new()
    }
}
