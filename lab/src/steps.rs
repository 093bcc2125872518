//! What takes long, said while it goes on.

use indicatif::{ProgressBar, ProgressStyle};
use std::cell::RefCell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Steps one after another: a spinner on a terminal, plain lines elsewhere.
#[derive(Debug, Default)]
pub struct Steps(RefCell<Option<Step>>);

#[derive(Debug)]
struct Step {
    what: String,
    start: Instant,
    spinner: Option<ProgressBar>,
}

impl Steps {
    /// Ends the step before, and begins this one.
    pub fn begin(&self, what: &str) {
        self.end();
        let spinner = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("  {spinner} {msg} {elapsed}");
            let bar = ProgressBar::new_spinner().with_message(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        if spinner.is_none() {
            eprintln!("  {what} ...");
        }
        *self.0.borrow_mut() = Some(Step {
            what: what.to_owned(),
            start: Instant::now(),
            spinner,
        });
    }

    /// Ends the step that goes on, if any.
    pub fn end(&self) {
        if let Some(step) = self.0.borrow_mut().take() {
            if let Some(spinner) = step.spinner {
                spinner.finish_and_clear();
                let took = step.start.elapsed().as_secs_f64();
                eprintln!("  {:<60} {took:6.1} s", step.what);
            }
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.end();
    }
}
