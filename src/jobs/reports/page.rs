//! A report of what was done to a directory, as people read it.

use std::fmt::Write as _;

/// What went wrong, what is known, and how long each phase took.
pub fn markdown<'p>(
    title: &str,
    error: Option<&str>,
    rows: &[(&str, String)],
    phases: impl IntoIterator<Item = (&'p str, f64)>,
) -> String {
    let mut text = format!("# {title}\n\n");
    let _ = error.iter().try_for_each(|error| writeln!(text, "- {error}\n"));
    text.push_str("| | |\n|---|---|\n");
    for (name, value) in rows {
        let _ = writeln!(text, "| {name} | {value} |");
    }
    text.push_str("\n| phase | seconds |\n|---|---|\n");
    for (name, seconds) in phases {
        let _ = writeln!(text, "| {name} | {seconds:.2} |");
    }
    text
}
