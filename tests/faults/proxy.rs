//! Somebody between source and target, who hears all and says what he likes.

use anyhow::{Context, Result};
use pmig::protocol::message::{ToSource, ToTarget};
use pmig::protocol::preface::{self, Kind};
use pmig::protocol::Wire;
use pmig::transport::{connect, Addr, Link, Listener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// A message on its way.
pub enum Message<'m> {
    ToTarget(&'m mut ToTarget),
    ToSource(&'m mut ToSource),
}

impl Message<'_> {
    /// What kind of message it is.
    pub fn name(&self) -> String {
        let text = match self {
            Message::ToTarget(message) => format!("{message:?}"),
            Message::ToSource(message) => format!("{message:?}"),
        };
        let end = text.find(|c: char| !c.is_alphanumeric());
        text[..end.unwrap_or(text.len())].to_owned()
    }
}

/// What becomes of it.
pub enum Act {
    /// It goes on, as it now is.
    Pass,
    /// These bytes go on in its place, frame and all.
    Instead(Vec<u8>),
    /// It goes on when the gate is open.
    Wait(Gate),
    /// The same, and the connection to the source is cut meanwhile.
    Late(Gate),
}

type Hook = Arc<dyn Fn(Message) -> Act + Send + Sync>;

/// Stops a message until somebody has done something.
#[derive(Clone, Default)]
pub struct Gate(Arc<(AtomicBool, AtomicBool)>);

impl Gate {
    /// Waits until the message is there.
    pub fn reached(&self) -> Result<()> {
        wait(&self.0 .0).context("the message does not come")
    }

    pub fn open(&self) {
        self.0 .1.store(true, Ordering::SeqCst);
    }

    fn pass(&self) -> Result<()> {
        self.0 .0.store(true, Ordering::SeqCst);
        wait(&self.0 .1).context("the gate stays shut")
    }
}

fn wait(flag: &AtomicBool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !flag.load(Ordering::SeqCst) {
        anyhow::ensure!(Instant::now() < deadline, "waited a minute");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Takes connections at one address and makes them to another, until dropped.
pub struct Proxy {
    at: PathBuf,
    over: Arc<AtomicBool>,
}

impl Proxy {
    pub fn start(
        at: &Path,
        target: &Path,
        hook: impl Fn(Message) -> Act + Send + Sync + 'static,
    ) -> Result<Proxy> {
        let listener = Listener::bind(&Addr::Unix(at.to_owned()))?;
        let proxy = Proxy {
            at: at.to_owned(),
            over: Arc::default(),
        };
        let (over, target, hook): (_, _, Hook) =
            (proxy.over.clone(), target.to_owned(), Arc::new(hook));
        thread::spawn(move || {
            while let Ok(link) = listener.accept() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (target, hook) = (target.clone(), hook.clone());
                thread::spawn(move || relay(link, &target, &hook));
            }
        });
        Ok(proxy)
    }

    pub fn address(&self) -> String {
        format!("unix:{}", self.at.display())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        let _ = connect(&Addr::Unix(self.at.clone()));
        let _ = std::fs::remove_file(&self.at);
    }
}

fn relay(mut source: Box<dyn Link>, target: &Path, hook: &Hook) -> Result<()> {
    let kind = preface::accept(&mut *source)?;
    let mut target = connect(&Addr::Unix(target.to_owned()))?;
    preface::open(&mut *target, kind)?;
    source.set_deadline(None)?;
    target.set_deadline(None)?;
    let (mut source_too, mut target_too) = (source.try_clone()?, target.try_clone()?);
    if kind == Kind::Fate {
        thread::scope(|scope| {
            scope.spawn(|| {
                let _ = std::io::copy(&mut source, &mut target);
                target.cut();
            });
            let _ = std::io::copy(&mut target_too, &mut source_too);
            source_too.cut();
        });
        return Ok(());
    }
    let (mut from_source, mut to_target) = (Wire::new(source), Wire::new(target));
    let (mut to_source, mut from_target) = (Wire::new(source_too), Wire::new(target_too));
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = there(&mut from_source, &mut to_target, hook);
            to_target.link().cut();
        });
        while let Ok(mut message) = from_target.recv::<ToSource>() {
            let act = hook(Message::ToSource(&mut message));
            // The target goes on, whoever hears it.
            let _ = go_on(&message, &[], act, &mut to_source, None);
        }
        to_source.link().cut();
    });
    Ok(())
}

fn there(from: &mut Wire, to: &mut Wire, hook: &Hook) -> Result<()> {
    loop {
        let mut message: ToTarget = from.recv()?;
        let mut raw = vec![0; message.content() as usize];
        from.recv_raw(&mut raw)?;
        let act = hook(Message::ToTarget(&mut message));
        go_on(&message, &raw, act, to, Some(from))?;
    }
}

fn go_on(
    message: &impl serde::Serialize,
    raw: &[u8],
    act: Act,
    to: &mut Wire,
    from: Option<&Wire>,
) -> Result<()> {
    match act {
        Act::Pass => {}
        Act::Instead(bytes) => {
            let mut link = to.link().try_clone()?;
            return Ok(link.write_all(&bytes)?);
        }
        Act::Wait(gate) => gate.pass()?,
        Act::Late(gate) => {
            if let Some(from) = from {
                from.link().cut();
            }
            gate.pass()?;
        }
    }
    Ok(to.send_with(message, raw)?)
}
