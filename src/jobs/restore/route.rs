//! Which WAL leads from a backup to the newest point: timelines, branches, and where the gap-free WAL ends.

use std::fmt;
use std::ops::ControlFlow;
use std::str::FromStr;

use bytes::Bytes;

use crate::jobs::context::Context;
use crate::model::commit::WalNeed;
use crate::model::{Branch, Error, Lsn, Result, ResultExt, Timeline};
use crate::pg::history::History;
use crate::pg::wal::{Expect, Record, RecordWalker, magic_of};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::wal_index::{BranchId, Stretch};
use crate::repository::wal_log::read_history;
use crate::repository::wal_reader::BranchLog;

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
pub(super) struct StoredHistory {
    pub(super) timeline: Timeline,
    pub(super) branch: Branch,
    pub(super) content: Bytes,
    pub(super) history: History,
}

/// WAL of one branch on the way.
#[derive(Debug)]
pub(super) struct Leg {
    pub(super) branch: BranchId,
    pub(super) log: BranchLog,
    /// First byte.
    pub(super) from: Lsn,
    /// Behind the last byte: the switch to the next timeline, or the end of the last complete record.
    pub(super) to: Lsn,
    pub(super) stretches: Vec<Stretch>,
}

/// The way from a backup's start to the end of the gap-free WAL.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) need: WalNeed,
    /// Of the timeline aimed at, with its ancestors.
    pub(super) history: History,
    pub(super) legs: Vec<Leg>,
    /// Every history file of the cluster.
    pub(super) histories: Vec<StoredHistory>,
    /// WAL beyond the end that cannot be reached, in words.
    pub(super) beyond: Option<String>,
}

/// Every history file of the backup's cluster.
pub(super) async fn histories(repository: &Repository, need: &WalNeed) -> Result<Vec<StoredHistory>> {
    let prefix = layout::histories(need.system_id);
    let mut found = Vec::new();
    for key in repository.regions.list_union(&prefix).await? {
        let Some((timeline, branch)) = key.strip_prefix(&prefix).and_then(layout::parse_branch) else { continue };
        let content = read_history(repository, need.system_id, timeline, &branch).await?;
        let text = std::str::from_utf8(&content).map_err(|error| {
            Error::damaged(format!("the history of timeline {timeline} is not text")).because(error)
        })?;
        let history = History::parse(timeline, text)?;
        found.push(StoredHistory { timeline, branch, content, history });
    }
    Ok(found)
}

/// The history to follow: the newest timeline (or the one asked for) that descends from the backup.
pub(super) fn choose(
    histories: &[StoredHistory],
    need: &WalNeed,
    wanted: Option<&Follow>,
) -> Result<(History, Branch)> {
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

/// The branch of an ancestor: the one whose own history is the beginning of the descendant's.
fn branch_of(histories: &[StoredHistory], need: &WalNeed, history: &History, timeline: Timeline) -> Result<Branch> {
    if timeline == need.timeline {
        return Ok(need.branch.clone());
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

impl Route {
    /// Finds the way.
    ///
    /// # Errors
    /// The WAL that makes the backup consistent is not whole, or two histories claim one timeline.
    pub(super) async fn find(repository: &Repository, need: &WalNeed, wanted: Option<&Follow>) -> Result<Self> {
        let histories = histories(repository, need).await.during(|| "read the timeline histories")?;
        let (history, branch) = choose(&histories, need, wanted)?;
        let mut route =
            Self { need: need.clone(), history: history.clone(), legs: Vec::new(), histories, beyond: None };
        let mut from = need.wal_segment_size.segment_start(need.start_lsn);
        for reign in history.ancestry().filter(|reign| reign.timeline >= need.timeline) {
            let is_last = reign.timeline == history.timeline();
            let branch =
                if is_last { branch.clone() } else { branch_of(&route.histories, need, &history, reign.timeline)? };
            let id = BranchId { system_id: need.system_id, timeline: reign.timeline, branch };
            let log = BranchLog::load(repository, id.clone()).await;
            let end = leg_end(&log, from, reign.end);
            let Some((to, is_whole)) = end else {
                route.missing(&log, reign.timeline, from)?;
                break;
            };
            let stretches = log.stretches(repository, (from, to)).await?;
            if !is_whole {
                route.beyond = beyond(&log, reign.timeline, to);
            }
            route.legs.push(Leg { branch: id, log, from, to, stretches });
            match reign.end {
                Some(switch) if is_whole => from = switch,
                _ => break,
            }
        }
        route.check_backup_is_covered()?;
        route.aim_at_last_leg();
        Ok(route)
    }

    /// No WAL of a timeline at all: the way ends with the one before.
    fn missing(&mut self, log: &BranchLog, timeline: Timeline, from: Lsn) -> Result<()> {
        if self.legs.is_empty() {
            let error = Error::refused(format!("the WAL from {from} on timeline {timeline} is in no region"));
            return Err(log.damaged.iter().fold(error, |error, damage| error.because(damage)));
        }
        self.beyond = Some(format!("timeline {timeline} has no WAL from {from} on"));
        Ok(())
    }

    fn check_backup_is_covered(&self) -> Result<()> {
        let need = &self.need;
        let covered = self.legs.first().is_some_and(|leg| leg.to >= need.stop_lsn);
        if covered {
            return Ok(());
        }
        let at = self.legs.first().map_or(need.start_lsn, |leg| leg.to);
        let text = format!(
            "the WAL that makes the backup consistent ({} to {}) has a hole at {at}",
            need.start_lsn, need.stop_lsn
        );
        Err(Error::refused(text).hint("choose another backup: drctl list"))
    }

    /// The timeline aimed at is the one of the last leg.
    fn aim_at_last_leg(&mut self) {
        let Some(timeline) = self.legs.last().map(|leg| leg.branch.timeline) else { return };
        let entries = self
            .histories
            .iter()
            .find(|h| h.timeline == timeline && self.legs.last().is_some_and(|leg| leg.branch.branch == h.branch));
        if timeline != self.history.timeline() {
            self.history = entries.map_or_else(|| History::without_ancestors(timeline), |h| h.history.clone());
        }
    }

    /// Drops everything behind `end`.
    pub(super) fn cut(&mut self, end: Lsn) {
        self.legs.retain(|leg| leg.from < end);
        if let Some(leg) = self.legs.last_mut() {
            leg.to = leg.to.min(end);
        }
        self.aim_at_last_leg();
    }

    /// Where the gap-free WAL ends: the end of its last complete record.
    pub(super) fn end(&self) -> Lsn {
        self.legs.last().map_or(self.need.stop_lsn, |leg| leg.to)
    }

    /// The timeline aimed at.
    pub(super) fn timeline(&self) -> Timeline {
        self.history.timeline()
    }

    /// Walks the records from the boundary `from` up to `to`. Returns the last complete one.
    pub(super) async fn walk(
        &self,
        (context, repository): (&Context, &Repository),
        (from, to): (Lsn, Lsn),
        mut on_record: impl FnMut(&Record) -> ControlFlow<()> + Send,
    ) -> Result<Option<(Lsn, Lsn)>> {
        let expect = Expect {
            magic: magic_of(self.need.server_version / 10_000),
            system_id: Some(self.need.system_id),
            history: Some(self.history.clone()),
        };
        let walker = RecordWalker::at_record(from, self.need.wal_segment_size)?;
        let mut walker = walker.expecting(expect);
        let mut last = None;
        for leg in &self.legs {
            let range = (leg.from.max(from), leg.to.min(to));
            if range.0 >= range.1 {
                continue;
            }
            let mut stop = false;
            let mut sink = |at: Lsn, wal: &[u8]| {
                walker.push(at, wal, |record| {
                    if !stop && record.end <= to {
                        last = Some((record.start, record.end));
                        stop = on_record(record).is_break();
                    }
                })?;
                Ok(if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            };
            leg.log.read(repository, &context.ring, range, &mut sink).await?;
            if stop {
                break;
            }
        }
        Ok(last)
    }
}

/// Where a leg ends, and whether it reaches its switch. `None`: nothing of it is there.
fn leg_end(log: &BranchLog, from: Lsn, switch: Option<Lsn>) -> Option<(Lsn, bool)> {
    let window = match log.window(from) {
        Some(window) => window,
        // A timeline may have been left at the very position where it began.
        None if switch == Some(from) => return Some((from, true)),
        None => return None,
    };
    match switch {
        Some(switch) if window.end >= switch => Some((switch, true)),
        _ => window
            .last_record_end
            .filter(|end| *end > from)
            .map(|end| (end, switch.is_none() && is_last_window(log, from))),
    }
}

fn is_last_window(log: &BranchLog, from: Lsn) -> bool {
    let end = log.window(from).map_or(from, |window| window.end);
    log.runs.iter().all(|run| run.end() <= end)
}

fn beyond(log: &BranchLog, timeline: Timeline, end: Lsn) -> Option<String> {
    let next = log.runs.iter().map(|run| run.start()).filter(|start| *start > end).min();
    let next = next.map_or_else(String::new, |next| format!("; WAL goes on at {next}, which cannot be reached"));
    Some(format!("the WAL of timeline {timeline} has a hole from {end}{next}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{SystemId, WalSegmentSize};

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
