//! How all of them are measured.

use criterion::Criterion;
use std::time::Duration;

/// Ten samples, each of one move or look, after one that finds nothing prepared and is
/// left out; more where they are quicker than `time` together.
pub fn measuring(time: Duration) -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(1))
        .measurement_time(time)
        .nresamples(2000)
        .without_plots()
        .configure_from_args()
}
