//! Pure parsers of procfs and cgroupfs text, where the procfs crate has none.

pub mod cgroup;
pub mod smaps;
