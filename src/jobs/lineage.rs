//! Timelines: which histories are stored, which of them goes on from a position, and which branch each ancestor is on.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use futures::future::try_join_all;

use crate::model::commit::WalNeed;
use crate::model::{Branch, Error, Lsn, Result, SystemId, Timeline};
use crate::pg::history::History;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::wal::log::read_history;

/// A timeline to follow: `2`, or `2-5f0c11aa` where two servers chose one number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Follow {
    /// Its number.
    pub timeline: Timeline,
    /// Its branch, where there are several.
    pub branch: Option<Branch>,
}

impl Follow {
    fn is(&self, history: &History, branch: &Branch) -> bool {
        history.timeline() == self.timeline && self.branch.as_ref().is_none_or(|wanted| wanted == branch)
    }
}

impl From<Timeline> for Follow {
    fn from(timeline: Timeline) -> Self {
        Self { timeline, branch: None }
    }
}

impl FromStr for Follow {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong =
            || Error::usage(format!("`{text}` is no timeline")).hint("a number, or a number and a branch: 2-5f0c11aa");
        let (number, branch) = text.split_once('-').map_or((text, None), |(number, branch)| (number, Some(branch)));
        let timeline = number.parse().ok().filter(|number| *number > 0).map(Timeline).ok_or_else(wrong)?;
        let branch = branch.map(|branch| Branch::try_from(branch.to_owned())).transpose().map_err(|_| wrong())?;
        Ok(Self { timeline, branch })
    }
}

impl fmt::Display for Follow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.timeline.0)?;
        self.branch.as_ref().map_or(Ok(()), |branch| write!(f, "-{branch}"))
    }
}

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
    histories_of(repository, need.system_id, known).await
}

/// Every history file of a cluster.
///
/// # Errors
/// As [`histories`].
pub async fn histories_of(
    repository: &Repository,
    system_id: SystemId,
    known: &[StoredHistory],
) -> Result<Vec<StoredHistory>> {
    let prefix = layout::histories(system_id);
    let keys = repository.regions.list_union(&prefix).await?;
    let named = keys.iter().filter_map(|key| key.strip_prefix(&prefix).and_then(layout::parse_branch));
    let reads = named.map(async |(timeline, branch)| {
        if let Some(known) = known.iter().find(|known| known.timeline == timeline && known.branch == branch) {
            return Ok(known.clone());
        }
        let content = read_history(repository, system_id, timeline, &branch).await?;
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
pub fn choose(histories: &[StoredHistory], need: &WalNeed, wanted: Option<&Follow>) -> Result<(History, Branch)> {
    let descendants = descendants(histories, need).map(|h| (h.history.clone(), h.branch.clone()));
    let mut candidates: Vec<_> = descendants.collect();
    candidates.push((own_history(histories, need), need.branch.clone()));
    let newest = || candidates.iter().map(|(history, _)| Follow::from(history.timeline())).max_by_key(|of| of.timeline);
    let newest = wanted.cloned().or_else(newest).unwrap_or_else(|| Follow::from(need.timeline));
    candidates.retain(|(history, branch)| newest.is(history, branch));
    if let [one] = candidates.as_slice() {
        return Ok(one.clone());
    }
    let timeline = newest.timeline;
    if candidates.is_empty() {
        return Err(Error::refused(format!("timeline {newest} does not descend from the backup")));
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
    let words: Vec<_> = candidates.iter().map(|(_, branch)| format!("--timeline {}-{branch}", timeline.0)).collect();
    Err(error.hint(format!(
        "two servers were promoted independently; only you know whose commits count: {}",
        words.join(" or ")
    )))
}

fn own_history(histories: &[StoredHistory], need: &WalNeed) -> History {
    let own = histories.iter().find(|h| h.timeline == need.timeline && h.branch == need.branch);
    own.map_or_else(|| History::without_ancestors(need.timeline), |own| own.history.clone())
}

/// The histories that go on from the backup, on newer timelines than its own.
fn descendants<'h>(histories: &'h [StoredHistory], need: &WalNeed) -> impl Iterator<Item = &'h StoredHistory> {
    let (own, timeline, stop) = (own_history(histories, need), need.timeline, need.stop_lsn);
    histories.iter().filter(move |h| {
        let reaches = h.timeline > timeline && h.history.contains(timeline, stop);
        // The same numbers may belong to another history: what went before must be the same, too.
        reaches && h.history.entries().get(..own.entries().len()) == Some(own.entries())
    })
}

/// The newest timeline that goes on from the backup: each history that claims its number. None: the backup's own is.
pub fn newest<'h>(histories: &'h [StoredHistory], need: &WalNeed) -> Vec<&'h StoredHistory> {
    let newest = descendants(histories, need).map(|h| h.timeline).max();
    descendants(histories, need).filter(|h| Some(h.timeline) == newest).collect()
}

/// The timelines that left a branch, and where each did.
pub fn children<'h>(
    histories: &'h [StoredHistory],
    (timeline, branch): (Timeline, &'h Branch),
) -> impl Iterator<Item = (&'h StoredHistory, Lsn)> {
    let own = histories.iter().find(|h| h.timeline == timeline && h.branch == *branch);
    // A timeline whose history is not stored has children that nobody can tell from those of another one.
    let before = own.map(|own| own.history.entries()).or((timeline == Timeline::FIRST).then_some(&[][..]));
    histories.iter().filter_map(move |child| {
        let (last, earlier) = child.history.entries().split_last()?;
        (last.timeline == timeline && Some(earlier) == before).then_some((child, last.switch))
    })
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
    let mut found = histories.iter().filter(fits).map(|h| h.branch.clone());
    match (found.next(), found.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(Error::refused(format!("the history of timeline {timeline} is in no region"))),
        (Some(one), Some(other)) => {
            let text = format!("timeline {timeline} on the way may be branch {one} or {other}");
            Err(Error::refused(text).hint("both left in one place: restore to a point before, with --timeline"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::WalSegmentSize;

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
        let wanted = choose(&all, &need(1, &Branch::root(), 0x200_0000), Some(&Timeline(1).into())).unwrap();
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
        for wanted in &all {
            let words = format!("2-{}", wanted.branch);
            assert!(error.hint_text().unwrap().contains(&words), "{error}");
            let chosen = choose(&all, &need(1, &Branch::root(), 0x200_0000), Some(&words.parse().unwrap())).unwrap();
            assert_eq!(chosen, (wanted.history.clone(), wanted.branch.clone()));
        }
        for text in ["", "0", "x", "2-", "2-5F0C11AA", "2-5f0c11aa-1"] {
            assert!(text.parse::<Follow>().is_err(), "{text}");
        }
        let other = choose(&all, &need(1, &Branch::root(), 0x200_0000), Some(&Timeline(9).into())).unwrap_err();
        assert!(other.message().contains("does not descend"));
    }
}
