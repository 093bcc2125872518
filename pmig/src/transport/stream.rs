use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{
    getsockname, setsockopt, sockopt, AddressFamily, SockaddrLike, SockaddrStorage,
};

use super::{Addr, Link};

/// How long an attempt to connect may take.
const CONNECT: Duration = Duration::from_secs(10);

/// A connection that has not acknowledged anything for this long is dead.
const SILENCE_MS: u32 = 20_000;

/// What may be on its way or wait for the wire, in bytes: so much that pmig does
/// not wait for the last pages to be sent when it could capture other state.
const AHEAD: usize = 4 << 20;

/// Reaches the pmig that listens at `addr`.
pub fn connect(addr: &Addr) -> io::Result<Box<dyn Link>> {
    match addr {
        Addr::Tcp { host, port } => {
            let mut last = None;
            for at in (host.as_str(), *port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&at, CONNECT) {
                    Ok(stream) => return Ok(Box::new(tcp(stream, host.clone())?)),
                    Err(e) => last = Some(e),
                }
            }
            Err(last.unwrap_or_else(|| io::Error::other("the name has no address")))
        }
        Addr::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            Ok(Box::new(Plain::new(stream, path.display().to_string())))
        }
        Addr::File(_) => Err(no_file()),
    }
}

fn no_file() -> io::Error {
    io::Error::other("a file is nobody to speak with")
}

/// Two ends of a connection within this machine, and what each calls the other.
pub fn pair(first: &str, second: &str) -> io::Result<(Box<dyn Link>, Box<dyn Link>)> {
    let (a, b) = UnixStream::pair()?;
    let end = |stream, peer: &str| Box::new(Plain::new(stream, peer.to_owned()));
    Ok((end(a, first), end(b, second)))
}

fn tcp(stream: TcpStream, peer: String) -> io::Result<Plain<TcpStream>> {
    // The freeze sends small messages and waits for each answer.
    stream.set_nodelay(true)?;
    setsockopt(&stream, sockopt::KeepAlive, &true)?;
    setsockopt(&stream, sockopt::TcpKeepIdle, &5)?;
    setsockopt(&stream, sockopt::TcpKeepInterval, &5)?;
    setsockopt(&stream, sockopt::TcpUserTimeout, &SILENCE_MS)?;
    // Beyond the machine's limit only root may go.
    if setsockopt(&stream, sockopt::SndBufForce, &AHEAD).is_err() {
        let _ = setsockopt(&stream, sockopt::SndBuf, &AHEAD);
    }
    Ok(Plain::new(stream, peer))
}

/// Takes over a connection that another process accepted, whose peer it calls
/// `peer`.
pub fn adopt(fd: OwnedFd, peer: String) -> io::Result<Box<dyn Link>> {
    match getsockname::<SockaddrStorage>(fd.as_raw_fd())?.family() {
        Some(AddressFamily::Inet | AddressFamily::Inet6) => {
            Ok(Box::new(tcp(TcpStream::from(fd), peer)?))
        }
        Some(AddressFamily::Unix) => Ok(Box::new(Plain::new(UnixStream::from(fd), peer))),
        _ => Err(io::Error::other("a socket of another kind")),
    }
}

/// Waits for other pmigs.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    pub fn bind(addr: &Addr) -> io::Result<Listener> {
        match addr {
            Addr::Tcp { host, port } => {
                TcpListener::bind((host.as_str(), *port)).map(Listener::Tcp)
            }
            Addr::Unix(path) => {
                // A socket that nobody answers is the leaving of a dead server.
                let stale = std::fs::symlink_metadata(path)
                    .is_ok_and(|m| m.file_type().is_socket())
                    && UnixStream::connect(path).is_err();
                if stale {
                    std::fs::remove_file(path)?;
                }
                UnixListener::bind(path).map(Listener::Unix)
            }
            Addr::File(_) => Err(no_file()),
        }
    }

    pub fn accept(&self) -> io::Result<Box<dyn Link>> {
        match self {
            Listener::Tcp(l) => {
                let (stream, from) = l.accept()?;
                Ok(Box::new(tcp(stream, from.ip().to_string())?))
            }
            Listener::Unix(l) => {
                let (stream, _) = l.accept()?;
                Ok(Box::new(Plain::new(stream, "a local socket".into())))
            }
        }
    }

    /// The descriptor, for handing it on or waiting on it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(l) => l.as_fd(),
            Listener::Unix(l) => l.as_fd(),
        }
    }
}

struct Plain<S> {
    stream: S,
    peer: String,
    /// By one of its handles. What had arrived could still be read otherwise.
    cut: Arc<AtomicBool>,
}

impl<S> Plain<S> {
    fn new(stream: S, peer: String) -> Plain<S> {
        Plain {
            stream,
            peer,
            cut: Arc::default(),
        }
    }

    fn whole(&self) -> io::Result<()> {
        match self.cut.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::ConnectionAborted.into()),
            false => Ok(()),
        }
    }
}

macro_rules! link {
    ($stream:ty) => {
        impl Read for Plain<$stream> {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                self.whole()?;
                self.stream.read(buf)
            }

            fn read_vectored(&mut self, bufs: &mut [io::IoSliceMut<'_>]) -> io::Result<usize> {
                self.whole()?;
                self.stream.read_vectored(bufs)
            }
        }

        impl Write for Plain<$stream> {
            fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
                self.whole()?;
                self.stream.write(buf)
            }

            fn write_vectored(&mut self, bufs: &[io::IoSlice<'_>]) -> io::Result<usize> {
                self.whole()?;
                self.stream.write_vectored(bufs)
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }

        impl Link for Plain<$stream> {
            fn try_clone(&self) -> io::Result<Box<dyn Link>> {
                Ok(Box::new(Plain {
                    stream: self.stream.try_clone()?,
                    peer: self.peer.clone(),
                    cut: Arc::clone(&self.cut),
                }))
            }

            fn set_deadline(&self, after: Option<Duration>) -> io::Result<()> {
                self.stream.set_read_timeout(after)?;
                self.stream.set_write_timeout(after)
            }

            fn end(&self) {
                let _ = self.stream.shutdown(Shutdown::Write);
            }

            fn cut(&self) {
                self.cut.store(true, Ordering::Relaxed);
                let _ = self.stream.shutdown(Shutdown::Both);
            }

            fn is_cut(&self) -> bool {
                self.cut.load(Ordering::Relaxed)
            }

            fn peer(&self) -> String {
                self.peer.clone()
            }

            fn fd(&self) -> BorrowedFd<'_> {
                self.stream.as_fd()
            }
        }
    };
}

link!(TcpStream);
link!(UnixStream);
