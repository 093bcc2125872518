//! What was measured, as it is written down: plain data. Times are in
//! milliseconds, rates in bytes per second; of several moves always the median.

use super::link::Link;
use super::median;
use super::moves::{Moved, Told};
use super::peer::Means;
use super::scale::ScaleRow;
use crate::host::Make;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// One bench's results.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Results {
    /// Whether these are the few figures of the short mode.
    pub short: bool,
    pub links: Vec<LinkRow>,
    pub freezes: Vec<FreezeRow>,
    pub throughputs: Vec<ThroughputRow>,
    #[serde(default)]
    pub trackings: Vec<TrackingRow>,
    #[serde(default)]
    pub peers: Vec<PeerRow>,
    #[serde(default)]
    pub scales: Vec<ScaleRow>,
    /// CRIU's version on each make of hosts.
    #[serde(default)]
    pub versions: Vec<(Make, String)>,
    /// What this machine cannot measure.
    pub skipped: Vec<Missing>,
    /// What went wrong.
    pub failed: Vec<Missing>,
}

/// A figure that there is not.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Missing {
    pub what: String,
    pub why: String,
}

/// A link between two hosts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LinkRow {
    pub hosts: Make,
    /// Of each of them; none where an older run did not note it.
    #[serde(default)]
    pub processors: Option<u32>,
    pub iperf3: Option<f64>,
    pub round_trip_ms: f64,
    /// After a pause; none where an older run did not note it.
    #[serde(default)]
    pub paused_ms: Option<f64>,
}

/// How long a ticking program stood still.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FreezeRow {
    pub hosts: Make,
    /// How the PCB was read.
    pub pcb: String,
    /// `hot` or `roaming`.
    pub mode: String,
    pub resident_mb: u32,
    pub moves: usize,
    /// Stop to resume, by pmig.
    pub freeze_ms: f64,
    pub worst_ms: f64,
    /// What pmig says it did meanwhile.
    pub parts: Vec<(String, f64)>,
    /// Pages, and bytes over the wire, within the freeze.
    pub pages: f64,
    pub bytes: f64,
    pub rounds: f64,
    /// These bytes at iperf3's rate, and two round trips after a pause; none without
    /// iperf3.
    pub floor_ms: Option<f64>,
    /// The largest gap in the program's time stamps around the move, the gap
    /// between its last line at the source and its first at the target, and the
    /// largest in as long a time without a move.
    pub gap_ms: f64,
    pub switch_ms: f64,
    pub baseline_ms: f64,
    /// The whole migration.
    pub total_ms: f64,
}

/// What one means to tell the written pages costs; medians.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrackingRow {
    pub hosts: Make,
    /// As `--dirty-tracking` has it.
    pub how: String,
    pub resident_mb: u32,
    pub runs: usize,
    pub cost: TrackingCost,
}

/// One run of `tracking cost`, a program of the lab's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrackingCost {
    /// How long the program is stopped for it.
    pub attach: f64,
    /// The first look, one after which nothing was written, one after 4,096 pages
    /// were, and the last one after as many, standing still.
    pub first: f64,
    pub clean: f64,
    pub dirty: f64,
    pub last: f64,
    /// What it takes the program to write to 4,096 pages: the first time, after a
    /// look, and when nobody follows it.
    pub first_touch: f64,
    pub touch: f64,
    pub untracked: f64,
    /// Kilobytes in huge pages: before, after two looks, and after one write to
    /// each huge page.
    pub huge_kb: [u64; 3],
    /// Pages that are told as written then.
    pub huge_pages_found: u64,
}

impl TrackingRow {
    /// The medians of several runs.
    pub fn new(hosts: Make, how: &str, resident_mb: u32, runs: &[TrackingCost]) -> Self {
        let mid = |of: fn(&TrackingCost) -> f64| median(runs.iter().map(of));
        Self {
            hosts,
            how: how.into(),
            resident_mb,
            runs: runs.len(),
            cost: TrackingCost {
                attach: mid(|c| c.attach),
                first: mid(|c| c.first),
                clean: mid(|c| c.clean),
                dirty: mid(|c| c.dirty),
                last: mid(|c| c.last),
                first_touch: mid(|c| c.first_touch),
                touch: mid(|c| c.touch),
                untracked: mid(|c| c.untracked),
                huge_kb: [0, 1, 2].map(|n| median(runs.iter().map(|c| c.huge_kb[n] as f64)) as u64),
                huge_pages_found: mid(|c| c.huge_pages_found as f64) as u64,
            },
        }
    }
}

/// A ticking program moved by different means.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerRow {
    pub hosts: Make,
    /// By which means, as a person reads it.
    pub means: String,
    pub mode: String,
    pub resident_mb: u32,
    pub moves: usize,
    /// As of [`FreezeRow`].
    pub gap_ms: f64,
    pub worst_ms: f64,
    pub baseline_ms: f64,
    /// From the first command to the last page at the target.
    pub total_ms: f64,
    /// Resident bytes per second of that.
    pub rate: f64,
}

/// How fast the memory of an idle program travelled.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ThroughputRow {
    pub hosts: Make,
    /// As `--mode` has it: `post` is memory that follows the program.
    #[serde(default)]
    pub mode: String,
    pub resident_mb: u32,
    pub moves: usize,
    /// Bytes per second of the copy, or of the fill.
    pub rate: f64,
    /// Bytes per second that iperf3 got between the moves.
    pub iperf3: Option<f64>,
    /// That rate against iperf3's run just before it.
    pub ratio: Option<f64>,
    /// The whole migration's time, up to the last page, against the memory at
    /// iperf3's rate.
    pub whole: Option<f64>,
    pub total_ms: f64,
    /// The most memory that pmig itself had resident, at the source and at the
    /// target.
    #[serde(default)]
    pub peak_mb: [f64; 2],
}

impl Results {
    /// None yet.
    pub fn new() -> Self {
        Self {
            short: super::short(),
            ..Self::default()
        }
    }

    /// Notes CRIU's version, once for each make of hosts.
    pub fn note_peer(&mut self, hosts: Make, version: &str) {
        if self.versions.iter().all(|(known, _)| *known != hosts) {
            self.versions.push((hosts, version.into()));
        }
    }

    /// Notes a link, once for each make of hosts.
    pub fn add_link(&mut self, hosts: Make, link: &Link) {
        if self.links.iter().any(|known| known.hosts == hosts) {
            return;
        }
        if let Err(why) = &link.rate {
            self.skipped.push(Missing {
                what: format!("{hosts} iperf3"),
                why: why.clone(),
            });
        }
        self.links.push(LinkRow::new(hosts, link));
    }
}

/// In milliseconds.
pub(super) fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

impl LinkRow {
    /// A link between hosts of that make.
    pub fn new(hosts: Make, link: &Link) -> Self {
        Self {
            hosts,
            processors: Some(link.processors),
            iperf3: link.rate.as_ref().ok().copied(),
            round_trip_ms: ms(link.round_trip),
            paused_ms: Some(ms(link.round_trip_paused)),
        }
    }
}

impl FreezeRow {
    /// The medians of some moves over that link.
    pub fn new(
        (hosts, link): (Make, &Link),
        (pcb, mode, resident_mb): (&str, &str, u32),
        moves: &[Moved],
    ) -> Self {
        let of = |figure: &dyn Fn(&Moved) -> f64| median(moves.iter().map(figure));
        let mut parts = Vec::<(String, f64)>::new();
        for part in moves.iter().flat_map(|moved| &moved.told.freeze().parts) {
            if parts.iter().all(|(name, _)| *name != part.name) {
                let named = |moved: &Moved| {
                    let all = moved.told.freeze().parts.iter();
                    all.filter(|other| other.name == part.name)
                        .map(|other| ms(other.time))
                        .sum()
                };
                parts.push((part.name.to_string(), of(&named)));
            }
        }
        let floor = |moved: &Moved, rate: f64| {
            moved.told.freeze().bytes as f64 / rate * 1e3 + 2.0 * ms(link.round_trip_paused)
        };
        let freezes = moves.iter().map(|moved| ms(moved.told.freeze().total));
        Self {
            hosts,
            pcb: pcb.into(),
            mode: mode.into(),
            resident_mb,
            moves: moves.len(),
            freeze_ms: median(freezes.clone()),
            worst_ms: freezes.fold(0.0, f64::max),
            parts,
            pages: of(&|moved| moved.told.freeze().pages as f64),
            bytes: of(&|moved| moved.told.freeze().bytes as f64),
            rounds: of(&|moved| f64::from(moved.told.summary.rounds)),
            floor_ms: (link.rate.as_ref().ok()).map(|rate| of(&|moved| floor(moved, *rate))),
            gap_ms: of(&|moved| ms(moved.gap)),
            switch_ms: of(&|moved| ms(moved.switch)),
            baseline_ms: of(&|moved| ms(moved.baseline)),
            total_ms: of(&|moved| ms(moved.told.summary.total)),
        }
    }
}

impl PeerRow {
    /// The medians of some moves.
    pub fn new(
        (hosts, means): (Make, Means),
        (mode, resident_mb): (&str, u32),
        moves: &[Moved<Duration>],
    ) -> Self {
        let gaps = moves.iter().map(|moved| ms(moved.gap));
        let total_ms = median(moves.iter().map(|moved| ms(moved.told)));
        Self {
            hosts,
            means: means.name().into(),
            mode: mode.into(),
            resident_mb,
            moves: moves.len(),
            gap_ms: median(gaps.clone()),
            worst_ms: gaps.fold(0.0, f64::max),
            baseline_ms: median(moves.iter().map(|moved| ms(moved.baseline))),
            total_ms,
            rate: f64::from(resident_mb) * 1_048_576.0 / (total_ms / 1e3),
        }
    }
}

impl ThroughputRow {
    /// The medians of some moves, each with iperf3's rate just before it.
    pub fn new(
        hosts: Make,
        (mode, resident_mb): (&str, u32),
        moves: &[(Option<f64>, Told)],
    ) -> Self {
        let filled = |told: &Told| told.summary.filled.unwrap_or_default();
        let rate = |told: &Told| match told.summary.filled {
            Some(time) => told.summary.left_behind as f64 / time.as_secs_f64(),
            None => told.copied as f64 / told.copying.as_secs_f64(),
        };
        let bytes = |told: &Told| (told.copied + told.summary.left_behind) as f64;
        let whole = |told: &Told| (told.summary.total + filled(told)).as_secs_f64();
        let iperf3 = moves
            .iter()
            .filter_map(|(iperf3, told)| iperf3.map(|rate| (rate, told)))
            .collect::<Vec<_>>();
        let against = |figure: &dyn Fn(f64, &Told) -> f64| {
            let all = iperf3.iter().map(|(line, told)| figure(*line, told));
            (!iperf3.is_empty()).then(|| median(all))
        };
        let peak = |side: usize| {
            let all = moves.iter().map(|(_, told)| told.summary.peak[side]);
            all.max().unwrap_or(0) as f64 / 1e6
        };
        Self {
            hosts,
            mode: mode.into(),
            resident_mb,
            moves: moves.len(),
            rate: median(moves.iter().map(|(_, told)| rate(told))),
            iperf3: against(&|line, _| line),
            ratio: against(&|line, told| rate(told) / line),
            whole: against(&|line, told| whole(told) / (bytes(told) / line)),
            total_ms: median(moves.iter().map(|(_, told)| whole(told) * 1e3)),
            peak_mb: [peak(0), peak(1)],
        }
    }
}
