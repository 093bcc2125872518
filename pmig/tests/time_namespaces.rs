//! A husk that is in a time namespace can enter another: the clocks that it was given
//! ahead may turn out to be wrong at the freeze. Not by the usual harness, because only
//! the main thread of a process can make one.

use std::os::fd::AsFd;

use pmig::husk::Husk;
use pmig::state::clock::{Clock, Namespace, Reading};
use pmig::state::memory::Layout;
use pmig::tracee::Batch;

/// Seconds that CLOCK_MONOTONIC of a process is ahead of the machine's
/// (time_namespaces(7)).
fn ahead(pid: i32) -> i64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/timens_offsets")).unwrap();
    text.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn main() {
    let own = ahead(std::process::id() as i32);
    let layout = Layout::capture(std::process::id() as i32, &[]).unwrap();
    let mut husk = Husk::stand_in(&layout).unwrap();
    let mut namespace = Namespace::make().unwrap();
    for seconds in [1000, 2000] {
        let ahead = Reading::default().after(seconds * 1_000_000_000);
        let clock = Clock::capture(ahead, Reading::default());
        clock.set(&namespace).unwrap();
        let mut batch = Batch::new();
        Husk::enter_time(&mut batch, namespace.as_fd());
        husk.stopped().run(batch).unwrap();
        assert_eq!(self::ahead(husk.pid()), own + seconds);
        namespace = namespace.another().unwrap();
    }
    println!("test a_husk_that_is_in_a_time_namespace_can_enter_another ... ok");
}
