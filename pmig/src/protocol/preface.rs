//! The first bytes of a connection: that both are pmigs, of the same version,
//! and what it is about.

use std::io;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::transport::Link;

/// The version of everything that follows. Both sides must have the same.
pub const VERSION: u16 = 5;

/// How long either side waits for the other's preface.
pub const PATIENCE: Duration = Duration::from_secs(10);

const MAGIC: [u8; 4] = *b"PMIG";
const LEN: usize = 7;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Migration,
    /// The fate of a migration: see [`super::fate`].
    Fate,
    /// Memory that a migration left behind: see [`crate::protocol::message`].
    Fill,
}

impl Kind {
    fn number(self) -> u8 {
        match self {
            Kind::Migration => 1,
            Kind::Fate => 2,
            Kind::Fill => 3,
        }
    }
}

/// Says what the connection is for, and hears that the other side agrees.
pub fn open(link: &mut dyn Link, kind: Kind) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    write_by(link, &words(VERSION, kind.number()), until)?;
    let mut answer = [0; LEN];
    read_by(link, &mut answer, until)?;
    let (version, agreed) = parse(&answer)
        .ok_or_else(|| Error::bad(link.peer(), "whatever answers there is not pmig"))?;
    if version != VERSION {
        return Err(Error::bad(
            link.peer(),
            format!("speaks version {version}, this pmig version {VERSION}: install the same one on both"),
        ));
    }
    if agreed != kind.number() {
        return Err(Error::bad(link.peer(), "does not know what is asked of it"));
    }
    Ok(())
}

/// Hears what a new connection is for, and agrees.
///
/// # Errors
/// Fails on anything but a pmig of the same version; a pmig of another version
/// is told ours before.
pub fn accept(link: &mut dyn Link) -> Result<Kind> {
    let until = Instant::now() + PATIENCE;
    let mut head = [0; LEN];
    read_by(link, &mut head, until)?;
    let (version, number) =
        parse(&head).ok_or_else(|| Error::bad(link.peer(), "does not speak pmig's protocol"))?;
    let kind = [Kind::Migration, Kind::Fate, Kind::Fill]
        .into_iter()
        .find(|k| k.number() == number && version == VERSION);
    write_by(link, &words(VERSION, kind.map_or(0, Kind::number)), until)?;
    kind.ok_or_else(|| {
        Error::bad(
            link.peer(),
            format!("asks for {number} in version {version}; this pmig speaks version {VERSION}"),
        )
    })
}

fn words(version: u16, kind: u8) -> [u8; LEN] {
    let [v0, v1] = version.to_le_bytes();
    let [a, b, c, d] = MAGIC;
    [a, b, c, d, v0, v1, kind]
}

fn parse(bytes: &[u8; LEN]) -> Option<(u16, u8)> {
    let [a, b, c, d, v0, v1, kind] = *bytes;
    ([a, b, c, d] == MAGIC).then(|| (u16::from_le_bytes([v0, v1]), kind))
}

/// Fills `buf` by a moment, however slowly the bytes drip.
pub(super) fn read_by(link: &mut dyn Link, mut buf: &mut [u8], until: Instant) -> Result<()> {
    while !buf.is_empty() {
        match limited(link, until).and_then(|()| link.read(buf)) {
            Ok(0) => return Err(broken(link, io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => buf = &mut buf[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(broken(link, e)),
        }
    }
    Ok(())
}

pub(super) fn write_by(link: &mut dyn Link, mut bytes: &[u8], until: Instant) -> Result<()> {
    while !bytes.is_empty() {
        match limited(link, until).and_then(|()| link.write(bytes)) {
            Ok(0) => return Err(broken(link, io::ErrorKind::WriteZero.into())),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(broken(link, e)),
        }
    }
    Ok(())
}

fn limited(link: &dyn Link, until: Instant) -> io::Result<()> {
    match until.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => link.set_deadline(Some(left)),
        _ => Err(io::ErrorKind::TimedOut.into()),
    }
}

fn broken(link: &dyn Link, cause: io::Error) -> Error {
    let cause = match cause.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, "no answer within the time allowed")
        }
        io::ErrorKind::UnexpectedEof => {
            io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the other side")
        }
        _ => cause,
    };
    Error::Link {
        peer: link.peer(),
        cause,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::transport::{connect, Addr, Listener};

    /// Two ends of a connection.
    pub fn pair() -> (Box<dyn Link>, Box<dyn Link>) {
        let dir = tempfile::tempdir().unwrap();
        let addr = Addr::Unix(dir.path().join("sock"));
        let listener = Listener::bind(&addr).unwrap();
        let a = connect(&addr).unwrap();
        (a, listener.accept().unwrap())
    }

    #[test]
    fn two_pmigs_agree_on_what_a_connection_is_for() {
        for kind in [Kind::Migration, Kind::Fate, Kind::Fill] {
            let (mut a, mut b) = pair();
            std::thread::scope(|s| {
                let heard = s.spawn(move || accept(&mut *b).unwrap());
                open(&mut *a, kind).unwrap();
                assert_eq!(heard.join().unwrap(), kind);
            });
        }
    }

    #[test]
    fn garbage_and_other_versions_are_refused_with_a_reason() {
        let ours = &format!("version {VERSION}");
        for (said, why) in [
            (*b"GET / H", "does not speak"),
            (words(VERSION + 1, 1), ours),
            (words(VERSION, 9), "asks for 9"),
        ] {
            let (mut a, mut b) = pair();
            a.write_all(&said).unwrap();
            let error = accept(&mut *b).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let (mut a, mut b) = pair();
        b.write_all(&words(VERSION + 1, 0)).unwrap();
        let error = open(&mut *a, Kind::Fate).unwrap_err().to_string();
        assert!(error.contains(ours), "{error}");
    }

    #[test]
    fn a_dripping_peer_does_not_hold_us() {
        let (mut a, mut b) = pair();
        std::thread::scope(|s| {
            s.spawn(move || {
                for _ in 0..20 {
                    if a.write_all(b"P").is_err() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let until = Instant::now() + Duration::from_millis(100);
            assert!(read_by(&mut *b, &mut [0; 100], until).is_err());
            assert!(Instant::now() < until + Duration::from_millis(100));
            drop(b);
        });
    }
}
