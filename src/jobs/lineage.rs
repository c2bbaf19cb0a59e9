//! Timelines: which histories are stored, which of them goes on from a position, and which branch each ancestor is on.

use bytes::Bytes;
use futures::future::try_join_all;

use crate::model::commit::WalNeed;
use crate::model::{Branch, Error, Result, Timeline};
use crate::pg::history::History;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::wal_log::read_history;

/// A history file that the repository holds.
#[derive(Debug, Clone)]
pub struct StoredHistory {
    /// The timeline.
    pub timeline: Timeline,
    /// The branch of it that the file names.
    pub branch: Branch,
    /// The file.
    pub content: Bytes,
    /// What it says.
    pub history: History,
}

/// Every history file of the backup's cluster; those that are known are not read again.
///
/// # Errors
/// No region answers, or one of them is not readable.
pub async fn histories(repository: &Repository, need: &WalNeed, known: &[StoredHistory]) -> Result<Vec<StoredHistory>> {
    let prefix = layout::histories(need.system_id);
    let keys = repository.regions.list_union(&prefix).await?;
    let named = keys.iter().filter_map(|key| key.strip_prefix(&prefix).and_then(layout::parse_branch));
    let reads = named.map(async |(timeline, branch)| {
        if let Some(known) = known.iter().find(|known| known.timeline == timeline && known.branch == branch) {
            return Ok(known.clone());
        }
        let content = read_history(repository, need.system_id, timeline, &branch).await?;
        let text = std::str::from_utf8(&content).map_err(|error| {
            Error::damaged(format!("the history of timeline {timeline} is not text")).because(error)
        })?;
        let history = History::parse(timeline, text)?;
        Ok::<_, Error>(StoredHistory { timeline, branch, content, history })
    });
    try_join_all(reads).await
}

/// The history to follow: the newest timeline (or the one asked for) that descends from the backup.
///
/// # Errors
/// None does, or several claim one number.
pub fn choose(histories: &[StoredHistory], need: &WalNeed, wanted: Option<Timeline>) -> Result<(History, Branch)> {
    let own = histories.iter().find(|h| h.timeline == need.timeline && h.branch == need.branch);
    let own_history = own.map_or_else(|| History::without_ancestors(need.timeline), |own| own.history.clone());
    let descends = |h: &&StoredHistory| {
        let reaches = h.timeline > need.timeline && h.history.contains(need.timeline, need.stop_lsn);
        // The same numbers may belong to another history: what went before must be the same, too.
        reaches && h.history.entries().get(..own_history.entries().len()) == Some(own_history.entries())
    };
    let mut candidates: Vec<_> =
        histories.iter().filter(descends).map(|h| (h.history.clone(), h.branch.clone())).collect();
    candidates.push((own_history, need.branch.clone()));
    let newest = wanted.or_else(|| candidates.iter().map(|(history, _)| history.timeline()).max());
    candidates.retain(|(history, _)| Some(history.timeline()) == newest);
    if let [one] = candidates.as_slice() {
        return Ok(one.clone());
    }
    let timeline = newest.unwrap_or(need.timeline);
    if candidates.is_empty() {
        return Err(Error::refused(format!("timeline {timeline} does not descend from the backup")));
    }
    let describe = |(history, branch): &(History, Branch)| {
        let left = history
            .entries()
            .last()
            .map_or_else(String::new, |entry| format!(" left {} at {}", entry.timeline, entry.switch));
        format!("branch {branch}{left}")
    };
    let error = Error::refused(format!("{} histories call themselves timeline {timeline}", candidates.len()));
    let error = candidates.iter().fold(error, |error, candidate| error.because(describe(candidate)));
    Err(error.hint("two servers were promoted independently: restore to a point before they parted, with --timeline"))
}

/// The branch of an ancestor: the one whose own history is the beginning of the descendant's.
///
/// # Errors
/// It is not stored.
pub fn branch_of(histories: &[StoredHistory], need: &WalNeed, history: &History, timeline: Timeline) -> Result<Branch> {
    if timeline == need.timeline {
        return Ok(need.branch.clone());
    }
    if timeline == Timeline::FIRST {
        return Ok(Branch::root());
    }
    let before: Vec<_> = history.entries().iter().take_while(|entry| entry.timeline < timeline).cloned().collect();
    let fits = |h: &&StoredHistory| h.timeline == timeline && h.history.entries() == before;
    let found = histories.iter().find(fits).map(|h| h.branch.clone());
    found.ok_or_else(|| Error::refused(format!("the history of timeline {timeline} is in no region")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Lsn, SystemId, WalSegmentSize};

    fn need(timeline: u32, branch: &Branch, stop: u64) -> WalNeed {
        WalNeed {
            system_id: SystemId(7),
            timeline: Timeline(timeline),
            branch: branch.clone(),
            start_lsn: Lsn(0x100_0028),
            stop_lsn: Lsn(stop),
            wal_segment_size: WalSegmentSize::DEFAULT,
            server_version: 150_018,
        }
    }

    fn stored(timeline: u32, text: &'static str, digest: u8) -> StoredHistory {
        let history = History::parse(Timeline(timeline), text).unwrap();
        let branch = Branch::from_history_digest(&[digest; 32]);
        StoredHistory { timeline: Timeline(timeline), branch, content: Bytes::from_static(text.as_bytes()), history }
    }

    #[test]
    fn the_newest_descendant_is_followed() {
        let all = [stored(2, "1\t0/3000000\ta\n", 2), stored(3, "1\t0/3000000\ta\n\n2\t0/5000000\tb\n", 3)];
        let (history, branch) = choose(&all, &need(1, &Branch::root(), 0x200_0000), None).unwrap();
        assert_eq!((history.timeline(), branch), (Timeline(3), all[1].branch.clone()));
        let wanted = choose(&all, &need(1, &Branch::root(), 0x200_0000), Some(Timeline(1))).unwrap();
        assert_eq!(wanted.0, History::without_ancestors(Timeline(1)));
        // A backup taken on timeline 1 after 2 had left it does not lead there.
        let (history, branch) = choose(&all, &need(1, &Branch::root(), 0x400_0000), None).unwrap();
        assert_eq!((history.timeline(), branch), (Timeline(1), Branch::root()));
        let on_two = need(2, &all[0].branch, 0x400_0000);
        assert_eq!(choose(&all, &on_two, None).unwrap().0.timeline(), Timeline(3));
        assert_eq!(branch_of(&all, &need(1, &Branch::root(), 0), &all[1].history, Timeline(2)).unwrap(), all[0].branch);
    }

    #[test]
    fn two_histories_of_one_number_are_refused_and_named() {
        let all = [stored(2, "1\t0/3000000\ta\n", 2), stored(2, "1\t0/4000000\tb\n", 3)];
        let error = choose(&all, &need(1, &Branch::root(), 0x200_0000), None).unwrap_err();
        assert_eq!(error.kind(), crate::model::Kind::Refused);
        assert!(error.to_string().contains("0/4000000"), "{error}");
        let other = choose(&all, &need(1, &Branch::root(), 0x200_0000), Some(Timeline(9))).unwrap_err();
        assert!(other.message().contains("does not descend"));
    }
}
