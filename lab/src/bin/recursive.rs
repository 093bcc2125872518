//! Goes down a hundred thousand frames and more, and comes up again.

use lab::victim::{run, Args, Work, WORK_ARGS};
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use std::hint::black_box;
use std::process::ExitCode;

/// Enough for a million frames of this program.
const STACK: u64 = 256 << 20;

fn main() -> ExitCode {
    run(|| {
        let known = [&WORK_ARGS[..], &["lines", "depth"]].concat();
        let args = Args::new(&known)?;
        let depth = args.number("depth", 120_000)?;
        let lines = args.number("lines", 400)?;
        // The kernel grows the stack up to the limit at the moment of growing.
        let (_, hard) = getrlimit(Resource::RLIMIT_STACK).map_err(|e| e.to_string())?;
        setrlimit(Resource::RLIMIT_STACK, STACK.min(hard), hard)
            .map_err(|e| format!("raise the stack limit: {e}"))?;
        let mut work = Work::new(&args, 10_000)?;
        // Every frame is passed twice, and lines come at even distances.
        let every = (2 * depth / lines.max(1)).max(1);
        let sum = descend(&mut work, depth, depth, every)?;
        work.add(sum);
        work.finish()
    })
}

#[inline(never)]
fn descend(work: &mut Work, left: u64, depth: u64, every: u64) -> Result<u64, String> {
    let down = depth - left;
    let own = black_box([left, work.add(left), down]);
    if down % every == every - 1 {
        work.line("down")?;
    }
    let below = if left > 1 {
        descend(work, left - 1, depth, every)?
    } else {
        0
    };
    let up = depth + left;
    if up % every == every - 1 {
        work.line("up")?;
    }
    let [first, second, third] = black_box(own);
    if first != left || third != down {
        return Err(format!("frame {down} holds {first} and {third}"));
    }
    Ok(work.add(below ^ second))
}
