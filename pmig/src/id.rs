//! How a migration is named, and the secret that proves who may decide it.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};

/// A migration's name: 16 random bytes, written as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Id([u8; 16]);

/// Known to source and target alone; quoted in every question about the fate
/// of a migration. Never shown.
#[derive(Clone, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Secret([u8; 32]);

impl Id {
    pub fn random() -> Result<Id> {
        random().map(Id)
    }

    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Id {
        Id(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl Secret {
    pub fn random() -> Result<Secret> {
        random().map(Secret)
    }

    pub(crate) fn from_bytes(bytes: [u8; 32]) -> Secret {
        Secret(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Looks at every byte whatever the first ones are, so that the time tells
    /// nothing of where they differ.
    pub fn is(&self, other: &Secret) -> bool {
        self.0
            .iter()
            .zip(&other.0)
            .fold(0, |diff, (a, b)| diff | (a ^ b))
            == 0
    }
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .context("read", "/dev/urandom")?;
    Ok(bytes)
}

fn write_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn read_hex<const N: usize>(s: &str) -> Result<[u8; N], String> {
    let digits = s.as_bytes();
    let lower = |d: &u8| matches!(d, b'0'..=b'9' | b'a'..=b'f');
    if digits.len() != 2 * N || !digits.iter().all(lower) {
        return Err(format!("{} lower-case hex digits are needed", 2 * N));
    }
    let mut bytes = [0; N];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&s[2 * i..2 * i + 2], 16).map_err(|e| e.to_string())?;
    }
    Ok(bytes)
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&write_hex(&self.0))
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Id({self})")
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl FromStr for Id {
    type Err = String;

    fn from_str(s: &str) -> Result<Id, String> {
        read_hex(s).map(Id)
    }
}

impl From<Id> for String {
    fn from(id: Id) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for Id {
    type Error = String;

    fn try_from(s: String) -> Result<Id, String> {
        s.parse()
    }
}

impl From<Secret> for String {
    fn from(secret: Secret) -> String {
        write_hex(&secret.0)
    }
}

impl TryFrom<String> for Secret {
    type Error = String;

    fn try_from(s: String) -> Result<Secret, String> {
        read_hex(&s).map(Secret)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_safe_file_name_and_reads_back() {
        let id = Id::random().unwrap();
        assert_eq!(id.to_string().parse::<Id>(), Ok(id));
        for bad in [
            "",
            "../../../../../../../../etc/psswd",
            "00",
            "é0000000000000000000000000000000",
            "AA000000000000000000000000000000",
            "+a+a+a+a+a+a+a+a+a+a+a+a+a+a+a+a",
        ] {
            assert!(bad.parse::<Id>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_secret_is_only_itself_and_shows_nothing() {
        let (a, b) = (Secret::random().unwrap(), Secret::random().unwrap());
        assert!(a.is(&a.clone()) && !a.is(&b));
        assert_eq!(format!("{a:?}"), "Secret(..)");
    }
}
