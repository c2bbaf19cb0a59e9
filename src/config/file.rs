//! TOML as sections that know their own name, their lines, and which keys were asked for.
//!
//! A key is known because the code asked for it: there is no second list. [`Section::finish`] refuses what nobody asked
//! for.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::secret::Secret;
use crate::config::units;
use crate::model::{Error, Result};

/// A parsed file.
pub(super) struct Document<'t> {
    /// Its name for people.
    name: &'t str,
    /// Where relative paths begin.
    directory: &'t Path,
    text: &'t str,
    root: DeTable<'t>,
}

/// A table of the file, or the place where one could stand: an absent table yields no values, so that every default is
/// applied in one way.
pub(super) struct Section<'d> {
    document: &'d Document<'d>,
    table: Option<&'d DeTable<'d>>,
    path: String,
    line: Option<usize>,
    asked: RefCell<BTreeSet<&'static str>>,
}

/// A key that nobody asked for.
#[derive(Debug, Clone)]
pub(super) struct UnknownKey {
    pub(super) key: String,
    pub(super) position: Position,
    /// The nearest known name, or all.
    pub(super) hint: String,
}

/// A place in a file; both count from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl<'t> Document<'t> {
    pub(super) fn parse(name: &'t str, directory: &'t Path, text: &'t str) -> Result<Self> {
        Self::parse_placed(name, directory, text).map_err(|(Position { line, .. }, message)| {
            Error::usage(format!("{name} is not TOML")).because(format!("line {line}: {message}"))
        })
    }

    /// The same, where the place of a mistake is wanted apart from its words.
    pub(super) fn parse_placed(
        name: &'t str,
        directory: &'t Path,
        text: &'t str,
    ) -> std::result::Result<Self, (Position, String)> {
        let root = DeTable::parse(text).map_err(|error| {
            // The library's own Display repeats the line, which may hold what should have been a reference.
            let start = error.span().map_or(0, |span| span.start);
            (position_at(text, start), error.message().to_owned())
        })?;
        Ok(Self { name, directory, text, root: root.into_inner() })
    }

    pub(super) fn root(&self) -> Section<'_> {
        self.section(Some(&self.root), String::new(), None)
    }

    fn section<'d>(&'d self, table: Option<&'d DeTable<'d>>, path: String, line: Option<usize>) -> Section<'d> {
        Section { document: self, table, path, line, asked: RefCell::default() }
    }

    fn line_of<T>(&self, spanned: &Spanned<T>) -> usize {
        line_at(self.text, spanned.span().start)
    }
}

fn line_at(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

fn position_at(text: &str, offset: usize) -> Position {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let column = before.get(line_start..).unwrap_or_default().chars().count() + 1;
    Position { line: line_at(text, offset), column }
}

impl<'d> Section<'d> {
    /// Whether the table stands in the file.
    pub(super) fn is_present(&self) -> bool {
        self.table.is_some()
    }

    /// Whether the key stands in the table, with whatever value.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|table| table.contains_key(key))
    }

    pub(super) fn string(&self, key: &'static str) -> Result<Option<&'d str>> {
        self.value(key)?.map(|value| self.as_string(key, value)).transpose()
    }

    pub(super) fn boolean(&self, key: &'static str) -> Result<Option<bool>> {
        let Some(value) = self.value(key)? else { return Ok(None) };
        value.get_ref().as_bool().map(Some).ok_or_else(|| self.wrong_type(key, value, "true or false"))
    }

    pub(super) fn integer(&self, key: &'static str, range: RangeInclusive<i32>) -> Result<Option<i32>> {
        let Some(value) = self.value(key)? else { return Ok(None) };
        let number = value.get_ref().as_integer().filter(|number| number.radix() == 10);
        let number = number.and_then(|number| number.as_str().parse().ok()).filter(|number| range.contains(number));
        let expected = || format!("a whole number from {} to {}", range.start(), range.end());
        number.map(Some).ok_or_else(|| self.wrong_type(key, value, &expected()))
    }

    pub(super) fn strings(&self, key: &'static str) -> Result<Vec<&'d str>> {
        let Some(value) = self.value(key)? else { return Ok(Vec::new()) };
        let array = value.get_ref().as_array().ok_or_else(|| self.wrong_type(key, value, "a list of strings"))?;
        array.iter().map(|item| self.as_string(key, item)).collect()
    }

    pub(super) fn duration(&self, key: &'static str) -> Result<Option<Duration>> {
        self.converted(key, units::parse_duration)
    }

    /// A duration that must be longer than nothing.
    pub(super) fn interval(&self, key: &'static str) -> Result<Option<Duration>> {
        self.converted(key, |text| match units::parse_duration(text)? {
            Duration::ZERO => Err(Error::usage("it must be longer than 0s")),
            duration => Ok(duration),
        })
    }

    pub(super) fn size(&self, key: &'static str) -> Result<Option<u64>> {
        self.converted(key, units::parse_size)
    }

    /// A path; a relative one is taken from the file's own directory.
    pub(super) fn path(&self, key: &'static str) -> Result<Option<PathBuf>> {
        self.converted(key, |text| match text {
            "" => Err(Error::usage("it is empty")),
            path => Ok(self.document.directory.join(path)),
        })
    }

    pub(super) fn secret(&self, key: &'static str) -> Result<Option<Secret>> {
        self.converted(key, |text| Secret::parse(text, self.document.directory))
    }

    /// One of several words.
    pub(super) fn choice<T: Copy>(&self, key: &'static str, choices: &[(&'static str, T)]) -> Result<Option<T>> {
        self.converted(key, |text| {
            let found = choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
            let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
            found.ok_or_else(|| {
                Error::usage(format!("`{text}` is not one of its values")).hint(format!("use {}", words.join(" or ")))
            })
        })
    }

    /// A string turned into something better; an error of `convert` is told with its place in the file.
    pub(super) fn converted<T>(
        &self,
        key: &'static str,
        convert: impl FnOnce(&'d str) -> Result<T>,
    ) -> Result<Option<T>> {
        let Some(text) = self.string(key)? else { return Ok(None) };
        convert(text).map(Some).map_err(|error| self.wrong(key, &error))
    }

    /// The table under `key`.
    pub(super) fn section(&self, key: &'static str) -> Result<Section<'d>> {
        let path = self.path_of(key);
        match self.value(key)? {
            None => Ok(self.document.section(None, path, None)),
            Some(value) => self.as_section(value, path, key),
        }
    }

    /// The tables under `key` by name, in the order of the file.
    pub(super) fn named(&self, key: &'static str) -> Result<Vec<(&'d str, Section<'d>)>> {
        let outer = self.section(key)?;
        let mut entries: Vec<_> = outer.table.iter().flat_map(|table| table.iter()).collect();
        entries.sort_by_key(|(name, value)| first_mention(name.span().start, value));
        let named = entries.into_iter().map(|(name, value)| {
            let path = format!("{}.{}", outer.path, name.get_ref());
            Ok((name.get_ref().as_ref(), self.as_section(value, path, name.get_ref())?))
        });
        named.collect()
    }

    /// Refuses the first key that nobody asked for. Call it after every key was asked for.
    pub(super) fn finish(&self) -> Result<()> {
        let Some(unknown) = self.unknown_keys().into_iter().next() else { return Ok(()) };
        let UnknownKey { key, position, hint } = unknown;
        Err(Error::usage(format!("unknown key `{key}` in {}", self.place()))
            .because(format!("line {}", position.line))
            .hint(hint))
    }

    /// Every key that nobody asked for, in the order of the file.
    pub(super) fn unknown_keys(&self) -> Vec<UnknownKey> {
        let asked = self.asked.borrow();
        let mut unknown: Vec<_> = self.table.iter().flat_map(|table| table.iter()).collect();
        unknown.retain(|(key, _)| !asked.contains(key.get_ref().as_ref()));
        unknown.sort_by_key(|(key, _)| key.span().start);
        let told = unknown.into_iter().map(|(key, _)| {
            let hint = match nearest(key.get_ref(), asked.iter().copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known keys: {}", asked.iter().copied().collect::<Vec<_>>().join(", ")),
            };
            let position = position_at(self.document.text, key.span().start);
            UnknownKey { key: key.get_ref().to_string(), position, hint }
        });
        told.collect()
    }

    /// Where the value of a key stands; for an absent one, where its section begins.
    pub(super) fn position_of(&self, key: &str) -> Position {
        let value = self.table.and_then(|table| table.get(key));
        let start = Position { line: self.line.unwrap_or(1), column: 1 };
        value.map_or(start, |value| position_at(self.document.text, value.span().start))
    }

    /// `error`, which is about the value of `key`, with its place in the file.
    pub(super) fn wrong(&self, key: &'static str, error: &Error) -> Error {
        let value = self.table.and_then(|table| table.get(key));
        let line = value.map(|value| self.document.line_of(value)).or(self.line);
        self.placed(format!("`{key}` in {} is wrong", self.place()), line, error)
    }

    /// `error`, which is about the section as a whole, with its place in the file.
    pub(super) fn wrong_here(&self, error: &Error) -> Error {
        self.placed(format!("{} is wrong", self.place()), self.line, error)
    }

    /// The error for a key that must be there.
    pub(super) fn missing(&self, key: &'static str) -> Error {
        let message = format!("{} has no `{key}`", self.place());
        let error = Error::usage(message);
        self.line.map_or(error.clone(), |line| error.because(format!("line {line}")))
    }

    fn placed(&self, message: String, line: Option<usize>, error: &Error) -> Error {
        let first = match line {
            Some(line) => format!("line {line}: {}", error.message()),
            None => error.message().to_owned(),
        };
        let mut placed = Error::usage(message).because(first);
        for cause in error.causes() {
            placed = placed.because(cause);
        }
        match error.hint_text() {
            Some(hint) => placed.hint(hint),
            None => placed,
        }
    }

    fn place(&self) -> String {
        match self.path.as_str() {
            "" => self.document.name.to_owned(),
            path => format!("[{path}] of {}", self.document.name),
        }
    }

    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    #[allow(clippy::unnecessary_wraps, reason = "reads like its siblings, which can fail")]
    fn value(&self, key: &'static str) -> Result<Option<&'d Spanned<DeValue<'d>>>> {
        self.asked.borrow_mut().insert(key);
        Ok(self.table.and_then(|table| table.get(key)))
    }

    fn as_string(&self, key: &'static str, value: &'d Spanned<DeValue<'d>>) -> Result<&'d str> {
        value.get_ref().as_str().ok_or_else(|| self.wrong_type(key, value, "a string in quotes"))
    }

    fn as_section(&self, value: &'d Spanned<DeValue<'d>>, path: String, key: &str) -> Result<Section<'d>> {
        let line = self.document.line_of(value);
        let table = value.get_ref().as_table().ok_or_else(|| {
            let message = format!("`{key}` in {} is wrong", self.place());
            Error::usage(message)
                .because(format!("line {line}: expected a table, found {}", value.get_ref().type_str()))
        })?;
        Ok(self.document.section(Some(table), path, Some(line)))
    }

    fn wrong_type(&self, key: &'static str, value: &Spanned<DeValue<'_>>, expected: &str) -> Error {
        let found = match value.get_ref() {
            DeValue::Integer(number) => format!("{number}"),
            other => other.type_str().to_owned(),
        };
        let line = self.document.line_of(value);
        Error::usage(format!("`{key}` in {} is wrong", self.place()))
            .because(format!("line {line}: expected {expected}, found {found}"))
    }
}

/// Where a table is mentioned first: `[regions.a.kms]` may stand before `[regions.a]`, whose span begins at the latter.
fn first_mention(key: usize, value: &Spanned<DeValue<'_>>) -> usize {
    let inner = value.get_ref().as_table().into_iter().flat_map(|table| table.iter());
    inner.map(|(name, value)| first_mention(name.span().start, value)).fold(key, usize::min)
}

/// The known name that `name` is most likely a misspelling of.
pub(super) fn nearest<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    let spelled = name.replace('-', "_").to_lowercase();
    let distance = |candidate: &str| strsim::damerau_levenshtein(&spelled, &candidate.replace('-', "_"));
    let near = known.into_iter().map(|candidate| (distance(candidate), candidate)).min()?;
    let longest = spelled.chars().count().max(near.1.chars().count());
    (near.0 <= (longest / 3).max(1)).then_some(near.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Document<'_> {
        Document::parse("drctl.toml", Path::new("/etc/drctl"), text).unwrap()
    }

    #[test]
    fn an_unknown_key_is_told_with_its_line_and_the_nearest_name() {
        let document = document("[regions.a]\nurl = \"/srv/a\"\nendpont = \"http://x\"\n");
        let regions = document.root().named("regions").unwrap();
        let (name, region) = &regions[0];
        region.string("url").unwrap();
        region.string("endpoint").unwrap();
        let error = region.finish().unwrap_err();
        assert_eq!(*name, "a");
        assert_eq!(error.message(), "unknown key `endpont` in [regions.a] of drctl.toml");
        assert_eq!(error.causes(), ["line 3"]);
        assert_eq!(error.hint_text(), Some("did you mean `endpoint`?"));
    }

    #[test]
    fn a_key_like_no_other_gets_the_list() {
        let document = document("zebra = 1\n");
        let root = document.root();
        root.section("regions").unwrap();
        root.section("targets").unwrap();
        let error = root.finish().unwrap_err();
        assert_eq!(error.message(), "unknown key `zebra` in drctl.toml");
        assert_eq!(error.hint_text(), Some("known keys: regions, targets"));
    }

    #[test]
    fn names_keep_the_order_of_the_file() {
        let document =
            document("[regions.zz.kms]\nkey = \"k\"\n[regions.aa]\n[regions.mm]\n[regions.zz]\nurl = \"x\"\n");
        let names: Vec<_> = document.root().named("regions").unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["zz", "aa", "mm"]);
    }

    #[test]
    fn a_wrong_value_is_told_with_its_line_and_what_was_expected() {
        let document = document("a = 5\nb = \"5 parsecs\"\nc = \"x\"\nd = 3\n");
        let root = document.root();
        let told = |error: Error| error.causes()[0].clone();
        assert_eq!(told(root.string("a").unwrap_err()), "line 1: expected a string in quotes, found 5");
        assert_eq!(told(root.duration("b").unwrap_err()), "line 2: `5 parsecs` is not a duration");
        assert_eq!(told(root.boolean("c").unwrap_err()), "line 3: expected true or false, found string");
        assert_eq!(told(root.integer("a", 1..=3).unwrap_err()), "line 1: expected a whole number from 1 to 3, found 5");
        assert_eq!(root.integer("d", 1..=3).unwrap(), Some(3));
        assert!(root.section("d").is_err());
    }

    #[test]
    fn broken_toml_names_the_line_and_shows_no_text() {
        let error = Document::parse("drctl.toml", Path::new("/"), "a = 1\npassword = hunter2\n").err().unwrap();
        assert!(error.causes()[0].starts_with("line 2: "), "{error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}
