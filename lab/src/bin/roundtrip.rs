//! How long a small message takes over TCP, there and back: `listen=PORT`
//! answers, `to=HOST:PORT` asks and prints the medians: of one after the other, and of
//! those that come after a pause.

use lab::victim::Args;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

const MESSAGE: usize = 64;
const TIMES: usize = 500;
const AFTER_PAUSES: usize = 100;
/// As between the messages of a freeze: long enough for both sides to fall asleep.
const PAUSE: Duration = Duration::from_millis(5);

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
            let [hot, paused] = ask(to).map_err(|e| format!("{to}: {e}"))?;
            println!("median_ns {}", hot.as_nanos());
            println!("paused_ns {}", paused.as_nanos());
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

fn ask(to: &str) -> io::Result<[Duration; 2]> {
    let mut stream = connect(to)?;
    stream.set_nodelay(true)?;
    let mut median = |times: usize, pause: Duration| -> io::Result<Duration> {
        let mut message = [0; MESSAGE];
        let mut all = Vec::with_capacity(times);
        for _ in 0..times {
            if !pause.is_zero() {
                thread::sleep(pause);
            }
            let start = Instant::now();
            stream.write_all(&message)?;
            stream.read_exact(&mut message)?;
            all.push(start.elapsed());
        }
        all.sort();
        Ok(all[times / 2])
    };
    Ok([median(TIMES, Duration::ZERO)?, median(AFTER_PAUSES, PAUSE)?])
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
