//! Keeping what is heard until nothing stands still any more, and the file that
//! is made of it then.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use pmig::error::{Context, Error, Result};
use pmig::id::Id;
use pmig::phase::Phase;
use pmig::report::{Event, Progress};

use super::Heard;

/// Room that there always is before the program stops: what is heard while it
/// stands still needs no memory.
const SPARE: usize = 64;
/// So many events are enough for a picture.
const MANY: usize = 4096;

/// Where a page goes: a place known to take it.
#[derive(Debug)]
pub struct Sheet {
    directory: PathBuf,
    path: PathBuf,
}

impl Sheet {
    /// Tries whether a page could be written, before anything begins.
    ///
    /// # Errors
    ///
    /// There is no such directory, no file can be made in it, or what has the
    /// name is no file that could be replaced.
    pub fn prepare(path: &Path) -> Result<Sheet> {
        let path = std::path::absolute(path).context("find", path.display())?;
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::bad(path.display(), "is no name for a file"));
        };
        let sheet = Sheet {
            directory: directory.to_owned(),
            path: directory.join(name),
        };
        match fs::symlink_metadata(&path) {
            // A device or a link would be lost.
            Ok(there) if !there.is_file() => {
                let why = "is there already, and is no plain file that a page could replace";
                return Err(Error::bad(path.display(), why));
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e).context("write", path.display());
            }
            _ => {}
        }
        let (_, probe) = sheet.beside()?;
        fs::remove_file(&probe).context("remove", probe.display())?;
        Ok(sheet)
    }

    /// Whether another path is the same name in the same directory.
    pub fn is(&self, other: &Path) -> bool {
        let place = |directory: &Path| {
            let there = fs::metadata(directory).ok()?;
            Some((there.dev(), there.ino()))
        };
        self.path.file_name() == other.file_name()
            && other.parent().and_then(place) == place(&self.directory)
    }

    /// A new file in the directory, with a name that nobody else has.
    fn beside(&self) -> Result<(File, PathBuf)> {
        let path = self
            .directory
            .join(format!(".pmig-report-{}", Id::random()?));
        let mut options = OpenOptions::new();
        // Its mode is what the umask leaves.
        let file = options.write(true).create_new(true).open(&path);
        // The name that was asked for says more than ours.
        Ok((file.context("write", self.path.display())?, path))
    }

    /// Puts a page in place of what has its name, or leaves that as it is.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn write(&self, text: &str) -> Result<()> {
        let (mut file, beside) = self.beside()?;
        let written = file
            .write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&beside, &self.path));
        if written.is_err() {
            let _ = fs::remove_file(&beside);
        }
        written.context("write", self.path.display())
    }
}

/// Shows events as usual, and keeps them for a page if there will be one.
pub struct Kept {
    usual: Box<dyn Progress>,
    pub sheet: Option<Sheet>,
    pub begun: SystemTime,
    start: Instant,
    frozen: bool,
    pub heard: Vec<Heard>,
}

impl Kept {
    pub fn new(usual: Box<dyn Progress>, sheet: Option<Sheet>) -> Kept {
        Kept {
            usual,
            heard: Vec::with_capacity(if sheet.is_some() { 512 } else { 0 }),
            sheet,
            begun: SystemTime::now(),
            start: Instant::now(),
            frozen: false,
        }
    }

    fn keep(&mut self, at: Duration, event: &Event) {
        if let Event::Phase { phase } = event {
            if *phase == Phase::Freeze {
                self.heard.reserve(SPARE);
            }
            self.frozen = matches!(phase, Phase::Freeze | Phase::Ready | Phase::Commit);
        }
        if !self.frozen {
            self.thin_out();
        }
        self.heard.push((at, event.clone()));
    }

    /// Of a copy that goes on for hours every other look is left out, again and
    /// again.
    fn thin_out(&mut self) {
        if self.heard.len() < MANY {
            return;
        }
        let mut odd = false;
        self.heard.retain(|(_, event)| {
            odd = !odd;
            odd || !matches!(event, Event::Round(_))
        });
    }
}

impl Progress for Kept {
    fn event(&mut self, event: &Event) {
        if self.sheet.is_some() {
            let at = self.start.elapsed();
            self.keep(at, event);
        }
        self.usual.event(event);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{symlink, PermissionsExt};

    use pmig::report::{Round, Silent};

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let all = fs::read_dir(directory).unwrap();
        let name = |e: io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        all.map(name).collect()
    }

    #[test]
    fn a_page_takes_the_place_of_a_file_at_once_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.html");
        let sheet = Sheet::prepare(&path).unwrap();
        assert!(names(dir.path()).is_empty());
        sheet.write("one").unwrap();
        let before = File::open(&path).unwrap();
        sheet.write("two").unwrap();
        assert_eq!(io::read_to_string(before).unwrap(), "one");
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(names(dir.path()), ["x.html"]);
        let usual = dir.path().join("usual");
        File::create(&usual).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&usual));
    }

    #[test]
    fn what_cannot_be_written_is_found_before() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "").unwrap();
        symlink("/dev/null", at("link")).unwrap();
        for (path, words) in [
            (at("nowhere/x"), "No such file"),
            (at("file/x"), "Not a directory"),
            (dir.path().to_owned(), "no plain file"),
            (at("link"), "no plain file"),
            ("/dev/null".into(), "no plain file"),
            ("/".into(), "no name"),
            ("/proc/x".into(), "/proc/x"),
        ] {
            let text = Sheet::prepare(&path).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
        assert_eq!(names(dir.path()).len(), 2);
    }

    #[test]
    fn one_name_is_known_by_several_paths() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        let sheet = Sheet::prepare(&dir.path().join("x")).unwrap();
        assert!(sheet.is(&dir.path().join("in/../x")));
        for other in ["y", "in/x", "nowhere/x"] {
            assert!(!sheet.is(&dir.path().join(other)), "{other}");
        }
    }

    #[test]
    fn nothing_is_allocated_while_the_program_stands_still() {
        let dir = tempfile::tempdir().unwrap();
        let sheet = Sheet::prepare(&dir.path().join("x")).unwrap();
        let mut kept = Kept::new(Box::new(Silent), Some(sheet));
        let round = Round {
            round: 1,
            pages: 1,
            bytes: 1,
            of: 1,
            elapsed: Duration::ZERO,
            rate: 1,
            dirty_rate: None,
            eta: None,
        };
        for _ in 0..3 * MANY {
            kept.event(&Event::Round(round.clone()));
        }
        assert!(kept.heard.len() <= MANY, "{}", kept.heard.len());
        kept.heard.shrink_to_fit();
        kept.event(&Event::Phase {
            phase: Phase::Freeze,
        });
        let room = kept.heard.capacity();
        for phase in [Phase::Ready, Phase::Commit] {
            kept.event(&Event::Phase { phase });
        }
        assert_eq!(kept.heard.capacity(), room);
        assert!(room >= kept.heard.len() + 32);
    }
}
