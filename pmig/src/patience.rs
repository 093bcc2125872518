//! How long anybody waits for anybody else.
//!
//! The deadlines of one migration are steps: who asks gives up before who is
//! asked, so that every failure is seen first where it can still be undone.
//! They all stretch and shrink together: `PMIG_PATIENCE_MS` says how long a
//! keeper lets pmig be silent ([`KEEPER`]), and the rest keeps its proportion.

use std::sync::OnceLock;
use std::time::Duration;

/// How long pmig may be silent while the program stands still, before the
/// commit.
pub const KEEPER: Duration = Duration::from_secs(10);

/// A deadline as this process is to keep it.
pub fn patience(usual: Duration) -> Duration {
    usual.mul_f64(scale())
}

fn scale() -> f64 {
    static SCALE: OnceLock<f64> = OnceLock::new();
    *SCALE.get_or_init(|| {
        let wanted = std::env::var("PMIG_PATIENCE_MS").ok();
        wanted.map_or(1.0, |text| scale_of(&text))
    })
}

fn scale_of(text: &str) -> f64 {
    text.parse::<u32>().map_or(1.0, |ms| {
        (f64::from(ms) / 1000.0 / KEEPER.as_secs_f64()).clamp(0.001, 1000.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_changes_nothing() {
        for text in ["", "-1", "1s", "99999999999"] {
            assert_eq!(scale_of(text), 1.0, "{text}");
        }
        assert_eq!(scale_of("5000"), 0.5);
        assert_eq!(scale_of("0"), 0.001);
    }
}
