//! What backups need, and which of them needs it.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use crate::model::KeysetId;
use crate::repository::catalog::{self, Backup};
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::layout;

/// Everything that readable inventories name, and which COMMIT needs it.
#[derive(Debug, Default)]
pub(super) struct Closure {
    pub(super) lines: BTreeMap<String, InventoryLine>,
    pub(super) needs: BTreeMap<String, Vec<String>>,
    /// When the youngest backup began that needs an object: its lock counts from there, also where it is brought later.
    pub(super) since: BTreeMap<String, DateTime<Utc>>,
}

impl Closure {
    pub(super) fn has_keyset(&self, keyset: &KeysetId) -> bool {
        let of = |key: &String| key.strip_prefix(layout::KEYSETS)?.split('/').nth(1)?.parse::<KeysetId>().ok();
        let wraps = self.lines.range(layout::KEYSETS.to_owned()..);
        wraps
            .map(|(key, _)| key)
            .take_while(|key| key.starts_with(layout::KEYSETS))
            .any(|key| of(key).as_ref() == Some(keyset))
    }
}

pub(super) async fn closure(repository: &Repository, backups: &[Backup]) -> Closure {
    let mut closure = Closure::default();
    for Backup { commit, .. } in backups {
        let mut needs = catalog::own_records(commit);
        let key = needs.pop().unwrap_or_default();
        match catalog::inventory(repository, commit).await {
            Ok(lines) => {
                needs.extend(lines.iter().map(|line| line.key.clone()));
                closure.lines.extend(lines.into_iter().map(|line| (line.key.clone(), line)));
            }
            Err(error) => tracing::warn!(%error, backup = %commit.id, "its objects cannot be compared"),
        }
        for needed in needs.iter().chain([&key]) {
            let since = closure.since.entry(needed.clone()).or_insert(commit.started_at);
            *since = commit.started_at.max(*since);
        }
        closure.needs.insert(key, needs);
    }
    closure
}
