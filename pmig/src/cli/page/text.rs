//! Text for a page: names of programs, hosts and files are whatever somebody
//! else chose.

use std::fmt::{self, Display, Write};
use std::time::{SystemTime, UNIX_EPOCH};

/// Text from anywhere, for the content of an element or for an attribute in
/// quotes. What cannot be seen, or moves what stands beside it, is spelt out.
pub struct Text<'a>(pub &'a str);

impl Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in visible(self.0).chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// The text with characters that cannot be seen spelt out: `\n`, `\u{202e}`.
pub fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else if is_hidden(c) {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

/// Marks of direction and joining, separators of lines, tags, and what is no
/// character at all, which no parser of XML would take.
fn is_hidden(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fdd0}'..='\u{fdef}' | '\u{fff9}'..='\u{fffb}'
        | '\u{e0000}'..='\u{e0fff}')
        || c as u32 & 0xfffe == 0xfffe
}

/// At most so many characters of it; graphics have no room for more.
pub fn short(text: &str, most: usize) -> String {
    let text = visible(text);
    if text.chars().count() <= most {
        return text;
    }
    let mut cut: String = text.chars().take(most.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

/// `2026-11-26 23:21:15 UTC`.
pub fn utc(time: SystemTime) -> String {
    let s = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    // Days since 1 March of the year 0: leap days come last then.
    let day = s / 86_400 + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (h, m) = (s / 3600 % 24, s / 60 % 60);
    format!("{year}-{month:02}-{day:02} {h:02}:{m:02}:{:02} UTC", s % 60)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn hostile_text_stays_text() {
        for (text, shown) in [
            ("<script>", "&lt;script&gt;"),
            ("a\"b'c&d", "a&quot;b&#39;c&amp;d"),
            ("\x1b[2J\n\0", "\\u{1b}[2J\\n\\u{0}"),
            ("\u{202e}lmth\u{2066}", "\\u{202e}lmth\\u{2066}"),
            ("\u{ffff}\u{feff}\u{85}", "\\u{ffff}\\u{feff}\\u{85}"),
            ("größer 日本", "größer 日本"),
        ] {
            assert_eq!(Text(text).to_string(), shown);
        }
        assert_eq!(short("abcdef", 6), "abcdef");
        assert_eq!(short("abcdefg", 6), "abcde…");
    }

    #[test]
    fn days_are_told_from_seconds() {
        for (s, day) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_795_735_275, "2026-11-26 23:21:15 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(s)), day);
        }
    }
}
