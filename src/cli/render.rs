//! What a command writes: results on stdout; errors, progress and the log on stderr.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tracing_subscriber::fmt::MakeWriter;

use crate::cli::exit::Reader;
use crate::model::{Error, Result};

/// Where a command writes, and how.
#[derive(Debug, Clone)]
pub struct Output {
    /// One JSON value instead of text for people.
    pub json: bool,
    /// Whether text for people may carry colour.
    pub colour: bool,
    /// Every line that is redrawn; other text steps around them.
    pub(super) bars: MultiProgress,
}

/// Colours support a word, they never replace it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    /// Something is wrong.
    Red,
    /// Something needs attention.
    Yellow,
    /// Something is proven.
    Green,
}

impl Output {
    /// Output to this process's terminal or pipe.
    pub fn new(json: bool) -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let able = io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        Self { json, colour: wanted && able && !json, bars }
    }

    /// Writes text to stdout. A reader that went away (`| head`) is no error.
    ///
    /// # Errors
    /// The text could not be written: a full disk, for one. A result that nobody received is not a success.
    pub fn print(&self, text: &str) -> Result<()> {
        let written = self.bars.suspend(|| {
            let mut stdout = io::stdout().lock();
            stdout.write_all(text.as_bytes())?;
            if !text.ends_with('\n') {
                stdout.write_all(b"\n")?;
            }
            stdout.flush()
        });
        match written {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Error::failed("the result could not be written to stdout").because(error))
            }
            _ => Ok(()),
        }
    }

    /// Writes one value as JSON to stdout.
    ///
    /// # Errors
    /// As [`print`](Self::print).
    pub fn print_json(&self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|error| Error::failed("the result cannot be shown as JSON").because(error))?;
        self.print(&text)
    }

    /// Writes one value as a line of JSON to stdout, for a reader that follows.
    ///
    /// # Errors
    /// As [`print`](Self::print).
    pub fn print_json_line(&self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(value)
            .map_err(|error| Error::failed("the result cannot be shown as JSON").because(error))?;
        self.print(&text)
    }

    /// Tells a person something on stderr, around the lines that are redrawn.
    pub fn note(&self, text: &str) {
        // A terminal that went away is no reason to stop what is being told about.
        let _ = self.bars.suspend(|| writeln!(io::stderr().lock(), "{}", plain(text)));
    }

    /// A line that is redrawn, on a terminal; elsewhere nothing.
    pub fn status_line(&self) -> ProgressBar {
        if self.json || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let line = self.bars.add(ProgressBar::new_spinner());
        line.with_style(ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()))
    }

    /// `text` in colour, where colour is welcome.
    pub fn paint(&self, colour: Colour, text: &str) -> String {
        let code = match colour {
            Colour::Red => 31,
            Colour::Yellow => 33,
            Colour::Green => 32,
        };
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Tells an error: as JSON on stdout, or as text on stderr.
    pub(super) fn tell(&self, error: &Error, reader: Reader) {
        // Nothing is left to be done when even the error cannot be written: the exit code still tells.
        let _ = match self.json {
            true => self.print_json(&error_json(error, reader.code(&Err(error.clone())))),
            false => self
                .bars
                .suspend(|| io::stderr().lock().write_all(error_text(error).as_bytes()))
                .map_err(|error| Error::failed("the error could not be written").because(error)),
        };
    }
}

/// The log's way to stderr: around the lines that are redrawn.
impl<'w> MakeWriter<'w> for Output {
    type Writer = LogWriter;

    fn make_writer(&'w self) -> LogWriter {
        LogWriter(self.bars.clone())
    }
}

/// Writes log lines to stderr.
#[derive(Debug)]
pub struct LogWriter(MultiProgress);

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().lock().write_all(line))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An error as text: what failed, why, what to do.
pub fn error_text(error: &Error) -> String {
    let mut text = format!("error: {}\n", plain(error.message()));
    for cause in error.causes() {
        let _ = writeln!(text, "cause: {}", plain(cause));
    }
    if let Some(hint) = error.hint_text() {
        let _ = writeln!(text, "hint:  {}", plain(hint));
    }
    text
}

/// An error as JSON, with the exit code of the process.
pub fn error_json(error: &Error, exit_code: u8) -> serde_json::Value {
    serde_json::json!({
        "error": {
            "kind": error.kind(),
            "message": error.message(),
            "causes": error.causes(),
            "hint": error.hint_text(),
        },
        "exit_code": exit_code,
    })
}

/// One line without control characters: parts of an error come from servers, and a terminal obeys what it is sent.
fn plain(text: &str) -> String {
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(visible).collect::<String>().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A plain table: columns as wide as their widest cell, three spaces between, nothing at the ends of lines.
#[derive(Debug, Clone, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with a head line.
    pub fn new<S: Into<String>>(head: impl IntoIterator<Item = S>) -> Self {
        Self { rows: vec![head.into_iter().map(Into::into).collect()] }
    }

    /// Adds a line; it may have fewer cells than the head.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// Whether it has no line but its head.
    pub fn is_empty(&self) -> bool {
        self.rows.len() <= 1
    }

    /// The text.
    pub fn to_text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cells = |column: usize| self.rows.iter().filter_map(move |row| row.get(column));
        let width = |column| cells(column).map(|cell| visible_width(cell)).max();
        let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width.saturating_sub(visible_width(cell)) + 3));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Characters that take up room: colour sequences (`ESC [ … m`) do not.
fn visible_width(cell: &str) -> usize {
    let mut in_sequence = false;
    let visible = cell.chars().filter(|c| {
        let hidden = in_sequence || *c == '\x1b';
        in_sequence = hidden && *c != 'm';
        !hidden
    });
    visible.count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;

    fn example() -> Error {
        Error::damaged("backup ledger-261120-010059-k7f cannot be restored from eu-west-1")
            .because("frame 81 of pack 01jd/0007 does not authenticate")
            .hint("us-east-1 holds a good copy: run again without --region, then `drctl repair ledger`")
    }

    #[test]
    fn an_error_is_three_lines() {
        let golden = "\
error: backup ledger-261120-010059-k7f cannot be restored from eu-west-1
cause: frame 81 of pack 01jd/0007 does not authenticate
hint:  us-east-1 holds a good copy: run again without --region, then `drctl repair ledger`
";
        assert_eq!(error_text(&example()), golden);
        assert_eq!(error_text(&Error::failed("x")), "error: x\n");
    }

    #[test]
    fn an_error_as_json_has_stable_keys() {
        let golden = r#"{"error":{"causes":["frame 81 of pack 01jd/0007 does not authenticate"],"hint":"us-east-1 holds a good copy: run again without --region, then `drctl repair ledger`","kind":"damaged","message":"backup ledger-261120-010059-k7f cannot be restored from eu-west-1"},"exit_code":1}"#;
        assert_eq!(error_json(&example(), Kind::Damaged.exit_code()).to_string(), golden);
    }

    #[test]
    fn a_servers_words_cannot_steer_the_terminal() {
        let error = Error::failed("x").because("\x1b]0;owned\x07 line one\n  line two");
        assert_eq!(error_text(&error), "error: x\ncause: ]0;owned line one line two\n");
    }

    #[test]
    fn tables_are_narrow_and_ignore_colour() {
        let mut table = Table::new(["ID", "SIZE", "REGIONS"]);
        table.row(["ledger", "1.65 GB", "3 of 3"]);
        table.row(["k8s", "\x1b[31m–\x1b[0m"]);
        assert_eq!(
            table.to_text(),
            "ID       SIZE      REGIONS\nledger   1.65 GB   3 of 3\nk8s      \x1b[31m–\x1b[0m\n"
        );
    }
}
