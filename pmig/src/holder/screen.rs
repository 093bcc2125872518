//! What a terminal shows, and how it is shown to somebody who comes later.

use std::num::NonZeroU16;

use vt100::Parser;

use crate::image::Picture;
use crate::sys::tty::Size;

/// Lines that are kept of what left the screen at its top.
const SCROLLBACK: usize = 1000;

/// The most bytes of lines above the screen that go into a picture; of more the
/// oldest are left out.
const MOST_ABOVE: usize = Picture::MOST_SHOWN / 2;

/// Programs can make their terminals as large as they like; what is kept of
/// them is not.
const MOST_ROWS: u16 = 500;
const MOST_COLS: u16 = 1000;

/// What a program has written to its terminal, as far as it can be seen.
pub struct Screen {
    parser: Parser,
    /// All that was written is in it, or it came with a picture, or something was
    /// written since.
    known: bool,
}

fn extent(size: Size) -> (NonZeroU16, NonZeroU16) {
    // What a terminal emulator takes that is told nothing.
    let or = |n: u16, most, other| NonZeroU16::new(n.min(most)).unwrap_or(other);
    (
        or(size.rows, MOST_ROWS, Parser::DEFAULT_ROWS),
        or(size.cols, MOST_COLS, Parser::DEFAULT_COLS),
    )
}

impl Screen {
    /// Of a terminal whose program may have written to another before; `blank`:
    /// it has written nothing yet.
    pub fn new(size: Size, blank: bool) -> Screen {
        let (rows, cols) = extent(size);
        Screen {
            parser: Parser::new(rows, cols, SCROLLBACK),
            known: blank,
        }
    }

    /// Whether its picture says what the program thinks it shows.
    pub fn is_known(&self) -> bool {
        self.known
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.known = true;
        self.parser.process(bytes);
    }

    pub fn resize(&mut self, size: Size) {
        let (rows, cols) = extent(size);
        if self.parser.screen().size() != (rows, cols) {
            self.parser.set_size(rows, cols);
        }
    }

    /// Bytes that, written to an empty terminal of the same size, make it show
    /// the same, scrollback and modes included. Empty if nothing is known.
    pub fn picture(&self) -> Vec<u8> {
        if !self.known {
            return Vec::new();
        }
        let screen = self.parser.screen();
        let mut text = String::new();
        if screen.alternate_screen() {
            // What is behind it, through a parser that is in no sequence.
            let (rows, cols) = screen.size();
            let mut behind = Parser::new(rows, cols, 0);
            *behind.screen_mut() = screen.clone();
            behind.process(b"\x1b[?47l");
            scrolled(&mut text, behind.screen().clone());
            text.push_str(&behind.screen().contents_formatted());
            text.push_str("\x1b[?1049h");
        } else {
            scrolled(&mut text, screen.clone());
        }
        text.push_str(&screen.state_formatted());
        text.into_bytes()
    }
}

/// The lines above the screen, and as many as scroll them out of it again.
fn scrolled(text: &mut String, mut screen: vt100::Screen) {
    let (rows, cols) = screen.size();
    let (rows, cols) = (usize::from(rows.get()), cols.get());
    screen.set_scrollback(usize::MAX);
    let mut left = screen.scrollback();
    let mut lines = Vec::new();
    while left > 0 {
        screen.set_scrollback(left);
        let part = left.min(rows);
        for (n, line) in (0u16..).zip(screen.rows_formatted(0, cols).take(part)) {
            let end = if screen.row_wrapped(n) { "" } else { "\r\n" };
            lines.push(format!("\x1b[m{line}{end}"));
        }
        left -= part;
    }
    let mut room = MOST_ABOVE;
    let fitting = lines.iter().rev().take_while(|line| {
        room = room.saturating_sub(line.len());
        room > 0
    });
    let from = lines.len() - fitting.count();
    if from < lines.len() {
        text.extend(lines.drain(from..));
        text.push_str("\x1b[m");
        text.push_str(&"\r\n".repeat(rows - 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: Size = Size {
        rows: 5,
        cols: 20,
        width: 0,
        height: 0,
    };

    /// A screen made from another's picture.
    fn again(screen: &Screen) -> Screen {
        let mut copy = Screen::new(SIZE, false);
        copy.write(&screen.picture());
        copy
    }

    fn all(screen: &Screen) -> (String, String) {
        let mut s = screen.parser.screen().clone();
        s.set_scrollback(usize::MAX);
        let mut lines = String::new();
        for n in (1..=s.scrollback()).rev() {
            s.set_scrollback(n);
            lines.push_str(&s.rows(0, 20).next().unwrap());
            lines.push('\n');
        }
        (lines, screen.parser.screen().state_formatted())
    }

    #[test]
    fn a_picture_shows_the_same_lines_colours_and_cursor() {
        let mut screen = Screen::new(SIZE, false);
        assert!(screen.picture().is_empty());
        for n in 0..40 {
            screen.write(format!("line {n} \x1b[3{}mcolour\x1b[m\r\n", n % 8).as_bytes());
        }
        screen.write(b"$ \x1b[?2004h\x1b[1mbold\x1b[2D");
        assert_eq!(all(&again(&screen)), all(&screen));
        let (lines, _) = all(&screen);
        assert!(lines.starts_with("line 0 colour\n"), "{lines}");
    }

    #[test]
    fn what_is_behind_a_full_screen_program_comes_too() {
        let mut screen = Screen::new(SIZE, false);
        screen.write(b"before\r\n$ vim\r\n\x1b[?1049h\x1b[2J\x1b[3;3Htext\x1b[?25l");
        let mut copy = again(&screen);
        assert_eq!(all(&copy), all(&screen));
        for s in [&mut screen, &mut copy] {
            s.write(b"\x1b[?1049l\x1b[?25h");
            assert!(s.parser.screen().contents().contains("before"));
        }
        assert_eq!(all(&copy), all(&screen));
    }

    #[test]
    fn long_lines_stay_whole_and_pictures_short() {
        let mut screen = Screen::new(SIZE, false);
        screen.write(b"0123456789012345678901234567890123456789\r\n\r\n\r\n\r\n\r\n\r\n\r\n");
        assert_eq!(all(&again(&screen)), all(&screen));
        let wide = Size {
            rows: 1000,
            cols: 1000,
            ..SIZE
        };
        let mut screen = Screen::new(wide, false);
        for n in 0..2_000_000 {
            screen.write(format!("\x1b[3{}mx", n % 8).as_bytes());
        }
        assert!(screen.picture().len() > 1000);
    }
}
