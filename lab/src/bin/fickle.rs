//! Sets what a process can set about itself to something else before every line,
//! such as nobody can see from outside, and checks that it still is what was set.

use lab::victim::{raw, run, Args, Mix, Pace};
use std::io::Write;
use std::process::ExitCode;

extern "C" fn even(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
extern "C" fn odd(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

const DIRECTORIES: [&str; 2] = ["/", "/srv/work"];

/// What it is to be at a line.
#[derive(Debug, PartialEq, Eq)]
struct Settings {
    handler: usize,
    flags: u64,
    core: (u64, u64),
    slack: i64,
    directory: String,
}

impl Settings {
    fn of(number: u64) -> Self {
        let is_odd = number % 2 == 1;
        Self {
            handler: if is_odd { odd } else { even } as *const () as usize,
            flags: if is_odd { libc::SA_NODEFER as u64 } else { 0 },
            core: (number, 1 << 20),
            slack: 60_000 + number as i64,
            directory: DIRECTORIES[usize::from(is_odd)].to_owned(),
        }
    }

    fn set(&self) -> Result<(), String> {
        let handler = if self.flags == 0 { even } else { odd };
        raw::handle(libc::SIGUSR1, self.flags as i32, handler).map_err(text)?;
        raw::set_limit(libc::RLIMIT_CORE, self.core.0, self.core.1).map_err(text)?;
        raw::prctl(libc::PR_SET_TIMERSLACK, self.slack as u64).map_err(text)?;
        std::env::set_current_dir(&self.directory).map_err(text)
    }

    fn now() -> Result<Self, String> {
        let [handler, flags, ..] = raw::action(libc::SIGUSR1).map_err(text)?;
        let directory = std::env::current_dir().map_err(text)?;
        Ok(Self {
            handler: handler as usize,
            flags: flags & libc::SA_NODEFER as u64,
            core: raw::limit(libc::RLIMIT_CORE).map_err(text)?,
            slack: raw::prctl(libc::PR_GET_TIMERSLACK, 0).map_err(text)?,
            directory: directory.display().to_string(),
        })
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn main() -> ExitCode {
    run(|| {
        let args = Args::new(&["lines", "pace_us", "resident_mb"])?;
        let pace = Pace::new(&args, 10_000)?;
        let mut mix = Mix(1);
        let resident = vec![1u8; args.number("resident_mb", 0)? as usize * (1 << 20)];
        let mut out = std::io::stdout();
        for number in 0..args.number("lines", 400)? {
            let settings = Settings::of(number);
            settings.set()?;
            let line = format!("{number} {:016x}\n", mix.add(number));
            out.write_all(line.as_bytes()).map_err(text)?;
            pace.pass()?;
            let now = Settings::now()?;
            if now != settings {
                return Err(format!("{number}: {settings:?} has become {now:?}"));
            }
        }
        match resident.iter().all(|byte| *byte == 1) {
            true => Ok(mix.0),
            false => Err("its memory is not what it was".to_owned()),
        }
    })
}
