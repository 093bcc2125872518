//! How long a small message takes over TCP, there and back: `listen=PORT`
//! answers, `to=HOST:PORT` asks and prints the median.

use lab::victim::Args;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

const MESSAGE: usize = 64;
const TIMES: usize = 500;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("roundtrip: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let args = Args::new(&["listen", "to"])?;
    match (args.text("listen"), args.text("to")) {
        (Some(port), None) => {
            let port = port.parse().map_err(|e| format!("{port}: {e}"))?;
            listen(port).map_err(|e| format!("listen on {port}: {e}"))
        }
        (None, Some(to)) => {
            let median = ask(to).map_err(|e| format!("{to}: {e}"))?;
            println!("median_ns {}", median.as_nanos());
            Ok(())
        }
        _ => Err("expected listen=PORT or to=HOST:PORT".into()),
    }
}

fn listen(port: u16) -> io::Result<()> {
    for stream in TcpListener::bind(("0.0.0.0", port))?.incoming() {
        let mut stream = stream?;
        stream.set_nodelay(true)?;
        thread::spawn(move || {
            let mut message = [0; MESSAGE];
            while stream.read_exact(&mut message).is_ok() && stream.write_all(&message).is_ok() {}
        });
    }
    Ok(())
}

fn ask(to: &str) -> io::Result<Duration> {
    let mut stream = connect(to)?;
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE];
    let mut times = Vec::with_capacity(TIMES);
    for _ in 0..TIMES {
        let start = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[TIMES / 2])
}

/// The other side may not have got to listening.
fn connect(to: &str) -> io::Result<TcpStream> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match TcpStream::connect(to) {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(50)),
            other => return other,
        }
    }
}
