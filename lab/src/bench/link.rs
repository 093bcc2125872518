//! What the link between two hosts can do.

use super::CannotHere;
use crate::host::{Host, Make};
use crate::pair::Lab;
use crate::tools;
use crate::wire::Cmd;
use anyhow::{bail, Context, Result};
use serde_json::Value;
use std::time::Duration;

/// Where the servers of both measurements write.
const LOG: &str = "/tmp/link.log";

/// The link of a lab, as measured from a to b when nothing else uses it.
#[derive(Clone, Debug)]
pub struct Link {
    /// Bytes per second that iperf3 gets through it, or why that is not known.
    pub rate: std::result::Result<f64, String>,
    /// A small message there and back over TCP, in the median of many one after the
    /// other.
    pub round_trip: Duration,
    /// The same after a pause of some milliseconds, as the messages of a freeze come.
    pub round_trip_paused: Duration,
    /// Of each of the hosts.
    pub processors: u32,
}

impl Link {
    /// Starts what answers on both hosts, and measures.
    ///
    /// # Errors
    /// The hosts are gone, or do not reach each other.
    pub fn new(lab: &Lab, say: &dyn Fn(&str)) -> Result<Self> {
        let rate = serve_iperf3(lab, say)
            .and_then(|()| iperf3(lab.a(), lab.b()))
            .map_err(|e| format!("{e:#}"));
        lab.b().spawn(
            &Cmd::new(["roundtrip", "listen=7700"]),
            "/tmp/roundtrip.log",
        )?;
        let said = lab.a().sh("roundtrip to=b:7700")?;
        let median = |name: &str| -> Result<Duration> {
            let word = said.lines().find_map(|line| line.strip_prefix(name));
            let nanos = word.context("the round trip was not measured")?.trim();
            Ok(Duration::from_nanos(nanos.parse()?))
        };
        Ok(Self {
            rate,
            round_trip: median("median_ns ")?,
            round_trip_paused: median("paused_ns ")?,
            processors: lab.a().sh("nproc")?.trim().parse()?,
        })
    }
}

fn serve_iperf3(lab: &Lab, say: &dyn Fn(&str)) -> Result<()> {
    // The machines' image has it.
    if lab.make() == Make::Netns {
        tools::need(&["iperf3"], say)?;
    }
    for host in [lab.a(), lab.b()] {
        host.spawn(&Cmd::new(["iperf3", "--server"]), LOG)
            .map_err(|e| CannotHere(format!("{e:#}")))?;
    }
    Ok(())
}

/// Bytes per second that iperf3 carries from one host to the other.
///
/// # Errors
/// It is not there, or says nothing of use.
pub fn iperf3(from: &dyn Host, to: &dyn Host) -> Result<f64> {
    let seconds = match from.make() {
        Make::Netns => 1,
        Make::Vm => 2,
    };
    let line = format!("iperf3 --client {} --time {seconds} --json", to.name());
    for _ in 0..10 {
        let output = from.exec(&Cmd::shell(&line))?;
        let said: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("iperf3: {}{}", output.out(), output.err()))?;
        if let Some(bits) = said["end"]["sum_received"]["bits_per_second"].as_f64() {
            return Ok(bits / 8.0);
        }
        // The server takes one client at a time, and a moment to start.
        std::thread::sleep(Duration::from_millis(200));
    }
    bail!(
        "iperf3 from {} to {} did not succeed",
        from.name(),
        to.name()
    )
}
