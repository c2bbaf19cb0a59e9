//! Documents: every `drctl …` in them is a line that drctl understands, so that they cannot rot.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// A line and whether it is meant to be typed as it is; in prose a verb may stand for its whole line.
struct Found {
    line: String,
    whole: bool,
}

#[test]
fn every_command_in_the_documents_can_be_typed() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("README.md")];
    for folder in ["docs", "runbooks"] {
        let entries = fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        files.extend(entries.filter(|path| path.extension().is_some_and(|name| name == "md")));
    }
    let (mut wrong, mut count) = (Vec::new(), 0);
    for file in &files {
        for found in commands(&fs::read_to_string(file).unwrap()) {
            count += 1;
            if let Err(why) = understood(&found) {
                wrong.push(format!("{}: {}\n    {}", name(file), found.line, why.lines().next().unwrap_or_default()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count > 60, "only {count} commands were found");
}

#[test]
fn a_command_that_does_not_exist_is_found() {
    for (text, fits) in [
        ("type `drctl restor ledger`", false),
        ("type `drctl drill ledger --no-such-option`", false),
        ("`drctl backup`, and `drctl drill TARGET --region NAME`", true),
        ("```sh\ndrctl backup\n```", false),
        ("```sh\ndrctl backup \"$TARGET\" --fast || true # now\n```", true),
    ] {
        let found = commands(text);
        assert!(!found.is_empty(), "{text}");
        assert_eq!(found.iter().all(|found| understood(found).is_ok()), fits, "{text}");
    }
}

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

/// What begins with `drctl ` in code: lines of blocks that are for a shell, and code in prose.
fn commands(text: &str) -> Vec<Found> {
    const SHELLS: [&str; 5] = ["run", "verify", "rollback", "sh", ""];
    let (mut found, mut block, mut prose) = (Vec::new(), None::<String>, String::new());
    for line in text.lines() {
        match (&block, line.trim_start().strip_prefix("```")) {
            (None, Some(kind)) => block = Some(kind.to_owned()),
            (Some(_), Some(_)) => block = None,
            (Some(kind), None) if SHELLS.contains(&kind.as_str()) => {
                let starts = line.match_indices("drctl ").map(|(at, _)| at);
                let starts =
                    starts.filter(|at| line[..*at].chars().all(|c| " $(\"=ABCDEFGHIJKLMNOPQRSTUVWXYZ".contains(c)));
                found.extend(starts.map(|at| Found { line: line[at..].to_owned(), whole: true }));
            }
            (Some(_), None) => {}
            (None, None) => prose += &format!("{line}\n"),
        }
    }
    // What is signed begins with `drctl signed`, and says so with line ends.
    let code = prose.split('`').skip(1).step_by(2).filter(|code| !code.contains("\\n"));
    for code in code.filter(|code| code.starts_with("drctl ")) {
        found.push(Found { line: code.split_whitespace().collect::<Vec<_>>().join(" "), whole: false });
    }
    found
}

fn understood(found: &Found) -> Result<(), String> {
    let words = words(&found.line);
    let unfinished = found.line.contains('…') || words.len() < 2;
    let line: Vec<OsString> = words.iter().map(OsString::from).collect();
    if line.len() < 2 {
        return Ok(());
    }
    match drctl::cli::check_line(&line) {
        Err(why)
            if (!found.whole || unfinished) && (why.contains("required") || why.contains("requires a subcommand")) =>
        {
            Ok(())
        }
        told => told,
    }
}

/// The words of one command: up to a pipe or the like, placeholders filled in.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote, mut begun) = (Vec::new(), String::new(), None, false);
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => (quote, begun) = (Some(c), true),
            (None, '#') if !begun => break,
            (None, '|' | ';' | ')' | '&' | '>' | '…' | '\\') => break,
            (None, c) if c.is_whitespace() => {
                if begun {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            (_, c) => (word, begun) = (word + &c.to_string(), true),
        }
    }
    if begun {
        words.push(word);
    }
    words.into_iter().filter(|word| !word.starts_with('[') && !word.ends_with(']')).map(|word| filled(&word)).collect()
}

/// `TARGET`, `$TARGET` and `<target>` stand for something that somebody fills in.
fn filled(word: &str) -> String {
    let (option, value) = word.split_once('=').map_or((None, word), |(option, value)| (Some(option), value));
    let inner = value.trim_start_matches(['$', '<']).trim_end_matches('>');
    let placeholder = value.starts_with('<')
        || value.starts_with('$')
        || (inner.len() > 1 && inner.chars().all(|c| c.is_ascii_uppercase() || c == '_'));
    let value = match inner {
        _ if !placeholder => value.to_owned(),
        "TIME" => "2026-11-20 03:55".to_owned(),
        "LSN" => "0/1".to_owned(),
        "DURATION" => "4h".to_owned(),
        "N" => "1".to_owned(),
        _ => "ledger".to_owned(),
    };
    option.map_or(value.clone(), |option| format!("{option}={value}"))
}
