//! Problems that somebody was told of and that are not over: one page for each, and one when it ends, also when the
//! process that told it is another one by then.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::disk::place;

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// One line.
    pub title: String,
    /// When it was told.
    pub since: DateTime<Utc>,
}

/// The open ones, in the state directory. A memory, not evidence: losing it costs a page told twice.
#[derive(Debug)]
pub struct Problems {
    path: PathBuf,
    open: BTreeMap<String, Problem>,
}

impl Problems {
    /// What an earlier process told.
    pub fn open(state_dir: &Path) -> Self {
        let path = state_dir.join("problems.json");
        let text = std::fs::read(&path).unwrap_or_default();
        Self { open: serde_json::from_slice(&text).unwrap_or_default(), path }
    }

    /// Notes a problem; says whether it is new.
    pub fn raise(&mut self, key: &str, title: &str, at: DateTime<Utc>) -> bool {
        if self.open.contains_key(key) {
            return false;
        }
        self.open.insert(key.to_owned(), Problem { title: title.to_owned(), since: at });
        self.keep();
        true
    }

    /// Notes that a problem is over; says which, if it was one.
    pub fn resolve(&mut self, key: &str) -> Option<Problem> {
        let problem = self.open.remove(key)?;
        self.keep();
        Some(problem)
    }

    /// Since when there is a problem.
    #[cfg(test)]
    pub fn since(&self, key: &str) -> Option<DateTime<Utc>> {
        self.open.get(key).map(|problem| problem.since)
    }

    fn keep(&self) {
        let kept = serde_json::to_vec(&self.open).map_err(|error| error.to_string());
        let kept = kept.and_then(|text| place::place(&self.path, &text, 0o600).map_err(|error| error.to_string()));
        if let Err(error) = kept {
            tracing::warn!(error, path = %self.path.display(), "open problems are not kept: a restart tells them again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_told_once_until_it_ends_also_across_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let at = DateTime::UNIX_EPOCH;
        let mut problems = Problems::open(dir.path());
        assert!(problems.raise("region/a", "a is away", at));
        assert!(!problems.raise("region/a", "a is still away", at));
        let mut problems = Problems::open(dir.path());
        assert!(!problems.raise("region/a", "a is away", at));
        assert_eq!(problems.resolve("region/a").map(|problem| problem.title), Some("a is away".to_owned()));
        assert_eq!(problems.resolve("region/a"), None);
        assert!(Problems::open(dir.path()).raise("region/a", "a is away again", at));
    }
}
