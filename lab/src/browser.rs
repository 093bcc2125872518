//! A browser without a screen, to see pages as their readers do.

use crate::harness::CannotHere;
use crate::tools::{need, there};
use anyhow::{ensure, Context, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The same browser under the names that distributions give it.
const NAMES: [&str; 4] = [
    "chromium",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
];

/// What a browser says before what a page did wrong.
const TROUBLE: &str = ":CONSOLE:";

/// A browser, and a directory of its own.
#[derive(Debug)]
pub struct Browser {
    program: &'static str,
    home: tempfile::TempDir,
}

/// What a browser makes of a page.
#[derive(Debug)]
pub struct Seen {
    /// The page as it was understood, as HTML.
    pub dom: String,
    /// What was blocked or broken.
    pub troubles: Vec<String>,
}

impl Browser {
    /// The browser of this machine.
    ///
    /// # Errors
    /// There is none, and it cannot be had: [`CannotHere`].
    pub fn find() -> Result<Self> {
        let known = || NAMES.into_iter().find(|name| there(name));
        let program = match known() {
            Some(program) => program,
            None => {
                let debian = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
                // Elsewhere the package of that name may be a mere hint at another.
                if !debian.lines().any(|line| line == "ID=debian") {
                    return Err(CannotHere("this machine lacks chromium".into()).into());
                }
                need(&[NAMES[0]], &|what| println!("{what}"))
                    .map_err(|e| CannotHere(format!("chromium cannot be had: {e:#}")))?;
                NAMES[0]
            }
        };
        let home = tempfile::tempdir().context("make a directory for the browser")?;
        Ok(Self { program, home })
    }

    /// Reads a page.
    ///
    /// # Errors
    /// The browser fails.
    pub fn read(&self, page: &Path) -> Result<Seen> {
        let output = self.run(&["--enable-logging=stderr", "--dump-dom"], page)?;
        let said = String::from_utf8_lossy(&output.stderr);
        let troubles = said.lines().filter(|line| line.contains(TROUBLE));
        Ok(Seen {
            dom: String::from_utf8_lossy(&output.stdout).into_owned(),
            troubles: troubles.map(str::to_owned).collect(),
        })
    }

    /// A picture of the page as PNG, in the light or in the dark.
    ///
    /// # Errors
    /// The browser fails.
    pub fn picture(&self, page: &Path, dark: bool) -> Result<Vec<u8>> {
        let file = self.home.path().join("picture.png");
        let scheme = format!("preferredColorScheme={}", if dark { 0 } else { 1 });
        let words = [
            "--hide-scrollbars",
            "--window-size=1040,1600",
            &format!("--blink-settings={scheme}"),
            &format!("--screenshot={}", file.display()),
        ];
        self.run(&words, page)?;
        made(&file)
    }

    /// The page on paper, as PDF.
    ///
    /// # Errors
    /// The browser fails.
    pub fn paper(&self, page: &Path) -> Result<Vec<u8>> {
        let file = self.home.path().join("paper.pdf");
        let words = [
            "--no-pdf-header-footer",
            &format!("--print-to-pdf={}", file.display()),
        ];
        self.run(&words, page)?;
        made(&file)
    }

    fn run(&self, words: &[&str], page: &Path) -> Result<Output> {
        let output = Command::new("timeout")
            .args(["-k", "1", "60", self.program])
            // Its sandbox is not for root, and pages here are our own.
            .args(["--headless", "--no-sandbox", "--disable-gpu"])
            .args(["--disable-dev-shm-usage", "--no-first-run"])
            .arg(format!("--user-data-dir={}", self.home.path().display()))
            .args(words)
            .arg(format!("file://{}", page.display()))
            .output()
            .context(self.program)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {said}", output.status);
        Ok(output)
    }
}

/// The content of a file that is there once.
fn made(file: &PathBuf) -> Result<Vec<u8>> {
    let bytes = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
    std::fs::remove_file(file)?;
    Ok(bytes)
}
