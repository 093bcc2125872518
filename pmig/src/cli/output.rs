//! Writing to whoever started pmig, who may have gone away meanwhile: that ends
//! nothing.

use std::io::{self, Write};

use serde::Serialize;

pub fn line(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

pub fn error_line(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

pub fn json(value: &impl Serialize) {
    if let Ok(text) = serde_json::to_string(value) {
        line(&text);
    }
}
