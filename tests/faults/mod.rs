//! Whatever breaks, and wherever, and whoever lies: a program runs on whole, in
//! one place.

mod cell;
mod crashes;
mod dumping;
mod hostile;
mod lost;
mod matrix;
mod proxy;

use lab::harness::Trial;

pub fn trials() -> Vec<Trial> {
    let mut trials = matrix::trials();
    trials.extend(crashes::trials());
    trials.extend(lost::trials());
    trials.extend(dumping::trials());
    trials.extend(hostile::trials());
    trials
}
