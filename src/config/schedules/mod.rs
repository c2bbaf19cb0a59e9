//! `schedules/*.toml`: one schedule per file, named by the file.
//!
//! The folder counts as a whole or not at all, and whoever mends it hears of every mistake at once.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::file::{Document, Position, nearest};
use crate::config::settings::Settings;
use crate::model::schedule::Schedule;
use crate::model::{Error, ScheduleName};

mod reader;
#[cfg(test)]
mod tests;

use reader::Reader;

/// One mistake in one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mistake {
    /// The file.
    pub file: PathBuf,
    /// Its line, from 1; none when the file as a whole is meant.
    pub line: Option<usize>,
    /// Its column, from 1.
    pub column: Option<usize>,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub hint: Option<String>,
}

/// Why a folder cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistakes {
    /// The folder.
    pub dir: PathBuf,
    /// At least one, by file and line.
    pub list: Vec<Mistake>,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let (Some(line), Some(column)) = (self.line, self.column) {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.what)?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "; {hint}"))
    }
}

impl From<Mistakes> for Error {
    fn from(mistakes: Mistakes) -> Self {
        let Mistakes { dir, list } = mistakes;
        let word = if list.len() == 1 { "mistake" } else { "mistakes" };
        let error = Self::usage(format!("{} {word} in the schedules of {}", list.len(), dir.display()));
        list.iter().fold(error, Self::because).hint("mend the files, then: drctl schedule lint")
    }
}

/// Reads every `*.toml` of the folder that the settings name.
///
/// # Errors
/// Every mistake of every file, also a target that is not configured, an unknown `after`, or a circle of them.
pub fn load_schedules(settings: &Settings) -> Result<Vec<Schedule>, Mistakes> {
    let mut folder = Folder { settings, read: BTreeMap::new(), mistakes: Vec::new() };
    folder.files();
    folder.follow();
    let Folder { read, mut mistakes, .. } = folder;
    if mistakes.is_empty() {
        return Ok(read.into_values().filter_map(|read| read.schedule).collect());
    }
    mistakes.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
    Err(Mistakes { dir: settings.schedules.dir.clone(), list: mistakes })
}

struct Folder<'s> {
    settings: &'s Settings,
    read: BTreeMap<ScheduleName, Read>,
    mistakes: Vec<Mistake>,
}

/// A file with a good name; its contents may be wrong.
struct Read {
    file: PathBuf,
    schedule: Option<Schedule>,
    after: Option<(ScheduleName, Position)>,
}

impl Folder<'_> {
    fn files(&mut self) {
        let dir = &self.settings.schedules.dir;
        let paths = std::fs::read_dir(dir).and_then(|entries| {
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>()
        });
        let mut paths = match paths {
            Ok(paths) => paths,
            Err(error) => {
                let hint = "make the folder, or name another as [schedules] dir in drctl.toml".to_owned();
                let what = format!("the folder cannot be read: {error}");
                let file = dir.clone();
                return self.mistakes.push(Mistake { file, line: None, column: None, what, hint: Some(hint) });
            }
        };
        // Editors and mounted volumes leave hidden files there.
        let hidden = |path: &PathBuf| path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        paths.retain(|path| !hidden(path) && path.extension().is_some_and(|extension| extension == "toml"));
        paths.sort();
        for path in paths {
            self.file(path);
        }
    }

    fn file(&mut self, file: PathBuf) {
        let whole = |error: &Error| mistake(&file, None, error);
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let name = match stem.parse::<ScheduleName>() {
            Ok(name) => name,
            Err(error) => return self.mistakes.push(whole(&error.during("the file names its schedule"))),
        };
        let (schedule, after) = match read_regular(&file) {
            Ok(text) => self.text(&file, &name, &text),
            Err(error) => {
                self.mistakes.push(whole(&Error::usage("the file cannot be read").because(error)));
                (None, None)
            }
        };
        self.read.insert(name, Read { file, schedule, after });
    }

    fn text(
        &mut self,
        file: &Path,
        name: &ScheduleName,
        text: &str,
    ) -> (Option<Schedule>, Option<(ScheduleName, Position)>) {
        let document = match Document::parse_placed("the file", Path::new("/"), text) {
            Ok(document) => document,
            Err((position, message)) => {
                self.mistakes.push(mistake(file, Some(position), &Error::usage("not TOML").because(message)));
                return (None, None);
            }
        };
        let mut reader = Reader::new(file, document.root());
        let schedule = reader.schedule(name, self.settings);
        let (after, mut mistakes) = reader.end();
        let good = mistakes.is_empty();
        self.mistakes.append(&mut mistakes);
        (schedule.filter(|_| good), after)
    }

    /// Every `after` must name another schedule, and the chain must end.
    fn follow(&mut self) {
        for (name, Read { file, after, .. }) in &self.read {
            let Some((after, position)) = after else { continue };
            let error = match self.circle(name) {
                _ if !self.read.contains_key(after) => {
                    let known = self.read.keys().map(ScheduleName::as_str).filter(|known| *known != name.as_str());
                    let error = Error::usage(format!("`after`: there is no schedule `{after}`"));
                    match nearest(after.as_str(), known) {
                        Some(near) => error.hint(format!("did you mean `{near}`?")),
                        None => error.hint("it names another file of this folder, without .toml"),
                    }
                }
                Some(circle) => {
                    Error::usage(format!("`after` goes in a circle: {circle}")).hint("one of them must begin")
                }
                None => continue,
            };
            self.mistakes.push(mistake(file, Some(*position), &error));
        }
    }

    /// The circle that begins and ends with `name`, told at its first member only.
    fn circle(&self, name: &ScheduleName) -> Option<String> {
        let next = |name: &ScheduleName| self.read.get(name)?.after.as_ref().map(|(after, _)| after);
        let mut members = vec![name];
        while let Some(after) = next(members.last()?) {
            if after == name {
                let first = members.iter().all(|member| *member >= name);
                let told = members.iter().copied().chain([name]).map(ScheduleName::as_str).collect::<Vec<_>>();
                return first.then(|| told.join(" → "));
            }
            if members.contains(&after) {
                return None;
            }
            members.push(after);
        }
        None
    }
}

/// Anything else than a regular file, behind a link too, may wait for ever for somebody to write.
fn read_regular(file: &Path) -> std::io::Result<String> {
    match std::fs::metadata(file)?.is_file() {
        true => std::fs::read_to_string(file),
        false => Err(std::io::Error::other("it is not a regular file")),
    }
}

pub(super) fn mistake(file: &Path, position: Option<Position>, error: &Error) -> Mistake {
    Mistake {
        file: file.to_owned(),
        line: position.map(|position| position.line),
        column: position.map(|position| position.column),
        what: error.to_string(),
        hint: error.hint_text().map(str::to_owned),
    }
}
