// SPDX-License-Identifier: GPL-2.0

//! Text for people: tables, sizes, and words of others that must not control the terminal.

use std::io::{self, Write};
use std::process;

use serde::Serialize;
use tabwriter::TabWriter;

use crate::failure::{Exit, Failure};

/// Prints to the standard output. A reader that has seen enough, such as head, ends the program.
pub fn say(text: &str) {
    let mut out = io::stdout().lock();
    if out
        .write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .is_err()
    {
        process::exit(Exit::Failed as i32);
    }
}

/// Prints JSON for programs.
///
/// # Errors
///
/// It cannot be made, which does not happen with numbers and text.
pub fn say_json(value: &impl Serialize) -> Result<(), Failure> {
    let json = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::new(Exit::Failed, "making JSON", error))?;
    say(&format!("{json}\n"));
    Ok(())
}

/// Escapes what a terminal would obey, and what hides the order of letters.
pub fn plain(text: &str) -> String {
    let obeyed = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        if obeyed(c) {
            plain.extend(c.escape_default());
        } else {
            plain.push(c);
        }
    }
    plain
}

/// A size with a binary unit, to three digits or more.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut rest = bytes as f64;
    let mut chosen = "B";
    for unit in UNITS {
        if rest < 1024.0 {
            break;
        }
        rest /= 1024.0;
        chosen = unit;
    }
    if rest.fract() == 0.0 {
        format!("{rest:.0} {chosen}")
    } else {
        format!("{rest:.1} {chosen}")
    }
}

/// A time in milliseconds.
pub fn duration(milliseconds: u64) -> String {
    match milliseconds {
        0..1000 => format!("{milliseconds} ms"),
        1000..60_000 => format!("{:.1} s", milliseconds as f64 / 1000.0),
        _ => format!(
            "{} min {} s",
            milliseconds / 60_000,
            milliseconds / 1000 % 60
        ),
    }
}

/// What is known, or a dash.
pub fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// Aligns the columns of a table.
pub fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let mut writer = TabWriter::new(Vec::new()).padding(2);
    let mut lines = vec![head.join("\t")];
    lines.extend(rows.iter().map(|row| row.join("\t")));
    // Writing into memory does not fail.
    let _ = writeln!(writer, "{}", lines.join("\n"));
    let bytes = writer.into_inner().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.lines()
        .flat_map(|line| {
            [
                line.trim_end(),
                "
",
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1024), "1 KiB");
        assert_eq!(size(1536 << 20), "1.5 GiB");
        assert_eq!(size(u64::MAX), "16 EiB");
    }

    #[test]
    fn durations() {
        assert_eq!(duration(0), "0 ms");
        assert_eq!(duration(1500), "1.5 s");
        assert_eq!(duration(61_000), "1 min 1 s");
    }

    #[test]
    fn terminals_are_not_controlled() {
        assert_eq!(plain("a\x1b[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert_eq!(plain("a\u{202e}b"), "a\\u{202e}b");
        assert_eq!(plain("ü \"x\""), "ü \"x\"");
    }

    #[test]
    fn columns_are_aligned() {
        let row = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
        let text = table(["A", "B"], &[row("longer", "x"), row("y", "")]);
        assert_eq!(text, "A       B\nlonger  x\ny\n");
    }
}
