//! Which WAL leads from a backup to the newest point: timelines, branches, and where the gap-free WAL ends.

use std::ops::ControlFlow;

use futures::future::{join, join_all};

use crate::jobs::context::Context;
use crate::jobs::lineage::{Follow, StoredHistory, branch_of, choose, histories, newest};
use crate::model::commit::WalNeed;
use crate::model::{Error, Lsn, Result, ResultExt, Timeline};
use crate::pg::history::History;
use crate::pg::wal::{Expect, Record, RecordWalker, magic_of};
use crate::repository::handle::Repository;
use crate::repository::wal::index::{BranchId, Stretch};
use crate::repository::wal::reader::BranchLog;

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
    /// Newer timelines than the one aimed at that nobody asked for and that nothing but the history is stored of, in words.
    pub(super) not_followed: Vec<String>,
}

impl Route {
    /// Finds the way.
    ///
    /// # Errors
    /// The WAL that makes the backup consistent is not whole, or two histories claim one timeline.
    pub(super) async fn find(repository: &Repository, need: &WalNeed, wanted: Option<&Follow>) -> Result<Self> {
        // Every way begins on the backup's own branch, so its WAL is listed while the histories come.
        let own = BranchId { system_id: need.system_id, timeline: need.timeline, branch: need.branch.clone() };
        let (histories, own) = join(histories(repository, need, &[]), BranchLog::load(repository, own)).await;
        let histories = histories.during(|| "read the timeline histories")?;
        let Lived { histories: lived, log, not_followed } = match wanted {
            Some(_) => Lived { histories: histories.clone(), log: None, not_followed: Vec::new() },
            None => Lived::of(repository, need, &histories).await,
        };
        let mut read: Vec<_> = [own].into_iter().chain(log).collect();
        let (history, branch) = choose(&lived, need, wanted)?;
        let (legs, aim) = (Vec::new(), history.clone());
        let mut route = Self { need: need.clone(), history: aim, legs, histories, beyond: None, not_followed };
        let mut from = need.wal_segment_size.segment_start(need.start_lsn);
        for reign in history.ancestry().filter(|reign| reign.timeline >= need.timeline) {
            let is_last = reign.timeline == history.timeline();
            let branch =
                if is_last { branch.clone() } else { branch_of(&route.histories, need, &history, reign.timeline)? };
            let id = BranchId { system_id: need.system_id, timeline: reign.timeline, branch };
            let log = match read.iter().position(|log| *log.index.branch() == id) {
                Some(at) => read.swap_remove(at),
                None => BranchLog::load(repository, id.clone()).await,
            };
            let end = leg_end(&log, from, reign.end);
            let Some((to, is_whole)) = end else {
                route.missing(&log, reign.timeline, from)?;
                break;
            };
            let stretches = log.stretches(repository, (from, to)).await?;
            route.beyond = if is_whole { unreadable(&log) } else { beyond(&log, reign.timeline, to) };
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

/// The histories of which more is stored than their file.
struct Lived {
    histories: Vec<StoredHistory>,
    /// The WAL of the newest one, if only one has its number.
    log: Option<BranchLog>,
    not_followed: Vec<String>,
}

impl Lived {
    /// Drops the newest timelines that nobody has stored WAL of. A server stores its history as it is promoted, and a copy that
    /// was promoted for a look may store no more than that: where it began the way would end, and what was stored of the
    /// older timeline behind that would be left out.
    async fn of(repository: &Repository, need: &WalNeed, histories: &[StoredHistory]) -> Self {
        let mut lived = Self { histories: histories.to_vec(), log: None, not_followed: Vec::new() };
        loop {
            let newest: Vec<_> = newest(&lived.histories, need).into_iter().cloned().collect();
            let Some(timeline) = newest.first().map(|h| h.timeline) else { return lived };
            let logs = newest.iter().map(|h| {
                let (system_id, branch) = (need.system_id, h.branch.clone());
                BranchLog::load(repository, BranchId { system_id, timeline, branch })
            });
            let mut logs = join_all(logs).await;
            if logs.iter().any(|log| may_hold_wal(repository, log)) {
                lived.log = logs.pop().filter(|_| logs.is_empty());
                return lived;
            }
            lived.not_followed.extend(newest.iter().map(not_followed));
            lived.histories.retain(|h| h.timeline != timeline);
        }
    }
}

/// Whether there is WAL, or may be where nobody can look.
fn may_hold_wal(repository: &Repository, log: &BranchLog) -> bool {
    let silent = log.index.unreadable().len() >= repository.regions.lowest_quorum();
    silent || !log.damaged.is_empty() || log.runs.iter().any(|run| run.end() > run.start())
}

fn not_followed(StoredHistory { timeline, branch, history, .. }: &StoredHistory) -> String {
    let left =
        history.entries().last().map(|left| format!(", which left timeline {} at {},", left.timeline, left.switch));
    let left = left.unwrap_or_default();
    let asked = format!("--timeline {}-{branch} restores up to there", timeline.0);
    format!("timeline {timeline}{left} has no WAL in any region and is not followed; {asked}")
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

/// Frames at the ends of runs that are nowhere intact: what was in them may lie behind everything else.
fn unreadable(log: &BranchLog) -> Option<String> {
    let damaged: Vec<_> = log.damaged.iter().map(Error::to_string).collect();
    (!damaged.is_empty()).then(|| damaged.join("; "))
}

fn beyond(log: &BranchLog, timeline: Timeline, end: Lsn) -> Option<String> {
    let next = log.runs.iter().map(|run| run.start()).filter(|start| *start > end).min();
    let next = next.map_or_else(String::new, |next| format!("; WAL goes on at {next}, which cannot be reached"));
    Some(format!("the WAL of timeline {timeline} has a hole from {end}{next}"))
}
