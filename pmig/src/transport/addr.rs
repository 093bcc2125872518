use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The port of `tcp://host` where none is given.
pub const DEFAULT_PORT: u16 = 7644;

/// What a process moves to: where a pmig listens, `tcp://host[:port]` or
/// `unix:/path`, or a file, `file:/path`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Addr {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
    File(PathBuf),
}

impl Addr {
    /// Whether bytes cross the wire readable and unauthenticated.
    pub fn is_plain_network(&self) -> bool {
        matches!(self, Addr::Tcp { .. })
    }

    /// The name a person uses for that machine.
    pub fn host(&self) -> String {
        match self {
            Addr::Tcp { host, .. } => host.clone(),
            Addr::Unix(path) | Addr::File(path) => path.display().to_string(),
        }
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Addr::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Addr::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Addr::Unix(path) => write!(f, "unix:{}", path.display()),
            Addr::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl From<Addr> for String {
    fn from(addr: Addr) -> String {
        addr.to_string()
    }
}

impl TryFrom<String> for Addr {
    type Error = String;

    fn try_from(s: String) -> Result<Addr, String> {
        s.parse()
    }
}

impl FromStr for Addr {
    type Err = String;

    fn from_str(s: &str) -> Result<Addr, String> {
        for (scheme, addr) in [("unix", Addr::Unix as fn(_) -> _), ("file", Addr::File)] {
            let Some(path) = s.strip_prefix(scheme).and_then(|p| p.strip_prefix(':')) else {
                continue;
            };
            if !path.starts_with('/') {
                return Err(format!(
                    "{s}: a {scheme} address is {scheme}:/path, with an absolute path"
                ));
            }
            return Ok(addr(path.into()));
        }
        let Some(rest) = s.strip_prefix("tcp://") else {
            return Err(format!(
                "{s}: an address is tcp://host[:port] or unix:/path"
            ));
        };
        let (host, port) = match rest.strip_prefix('[') {
            Some(v6) => match v6.split_once(']') {
                Some((host, "")) => (host, None),
                Some((host, port)) => (host, port.strip_prefix(':')),
                None => return Err(format!("{s}: the bracket is not closed")),
            },
            None => match rest.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (rest, None),
            },
        };
        if host.is_empty() {
            return Err(format!("{s}: the host is missing"));
        }
        let port = match port {
            None => DEFAULT_PORT,
            Some(p) => p
                .parse()
                .ok()
                .filter(|p| *p != 0)
                .ok_or_else(|| format!("{s}: {p:?} is not a port"))?,
        };
        Ok(Addr::Tcp {
            host: host.to_string(),
            port,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in [
            "tcp://b:7644",
            "tcp://[::1]:9",
            "unix:/run/pmig.sock",
            "file:/srv/x",
        ] {
            assert_eq!(text.parse::<Addr>().unwrap().to_string(), text);
        }
        assert_eq!(
            "tcp://b".parse::<Addr>().unwrap().to_string(),
            "tcp://b:7644"
        );
    }

    #[test]
    fn what_is_not_an_address_is_refused() {
        for text in [
            "b",
            "tcp://",
            "tcp://b:0",
            "tcp://b:x",
            "unix:rel",
            "file:rel",
            "tcp://[::1",
        ] {
            assert!(text.parse::<Addr>().is_err(), "{text}");
        }
    }
}
