//! One line of `check`.

use std::fmt;

use serde::Serialize;

/// How bad it is, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Nothing to do.
    Ok,
    /// Works today.
    Warn,
    /// A backup or a restore would not work, or would do harm.
    Fail,
}

/// What was looked at, what was found, what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad.
    pub level: Level,
    /// `region`, `locks`, `keys`, `postgres`, `dump`, `files`, `machine`.
    pub area: &'static str,
    /// Which one.
    pub object: String,
    /// What was found.
    pub what: String,
    /// What to type or change.
    pub fix: Option<String>,
}

/// Everything that is said about one object.
#[derive(Debug)]
pub struct Findings {
    area: &'static str,
    object: String,
    list: Vec<Finding>,
}

impl Findings {
    /// Nothing yet.
    pub fn about(area: &'static str, object: impl fmt::Display) -> Self {
        Self { area, object: object.to_string(), list: Vec::new() }
    }

    /// All is well.
    pub fn ok(&mut self, what: impl Into<String>) {
        self.add(Level::Ok, what.into(), None);
    }

    /// Works today.
    pub fn warn(&mut self, what: impl Into<String>, fix: impl Into<String>) {
        self.add(Level::Warn, what.into(), Some(fix.into()));
    }

    /// Does not work, or does harm.
    pub fn fail(&mut self, what: impl Into<String>, fix: impl Into<String>) {
        self.add(Level::Fail, what.into(), Some(fix.into()));
    }

    /// What was found, in order.
    pub fn into_list(self) -> Vec<Finding> {
        self.list
    }

    fn add(&mut self, level: Level, what: String, fix: Option<String>) {
        self.list.push(Finding { level, area: self.area, object: self.object.clone(), what, fix });
    }
}

/// Bytes for people, in powers of 1000 as in the configuration.
pub fn size(bytes: u64) -> String {
    let units = [(1_000_000_000_000, "TB"), (1_000_000_000, "GB"), (1_000_000, "MB")];
    let (unit, name) = units.into_iter().find(|(unit, _)| bytes >= *unit).unwrap_or((1000u64, "kB"));
    let tenths = u128::from(bytes) * 10 / u128::from(unit);
    format!("{}.{} {name}", tenths / 10, tenths % 10)
}
