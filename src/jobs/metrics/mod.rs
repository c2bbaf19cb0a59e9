//! `metrics`: what the regions and the WAL receivers of this host say, as figures.
//!
//! [`read`] reads the regions, needs no key, and costs about as much as `drctl status`; [`receivers`] asks memory alone.
//! Both say what `status` says, from the same sources.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use crate::jobs::context::{Context, Objectives};
use crate::jobs::list::{self, Listed};
use crate::jobs::prune;
use crate::model::schedule::Schedule;
use crate::model::{RegionName, Result, TargetName};
use crate::observe::metrics::{Page, table};
use crate::repository::catalog;
use crate::repository::handle::Repository;
use crate::repository::records::reports;
use crate::repository::regions::list_all;
use crate::repository::survey::{self, State, Survey};
use crate::repository::wal::gaps;

mod drills;
pub mod receivers;
pub mod slots;
pub mod standbys;

/// Everything that is read from the regions.
///
/// # Errors
/// No region answers.
pub async fn read(context: &Context, schedules: &[Schedule]) -> Result<Page> {
    let (repository, began) = (&context.repository, context.clock.monotonic());
    let mut page = Page::default();
    context.promises().for_each(|(target, promised)| objectives(target, promised, &mut page));
    let (backups, _) = catalog::backups(repository, None).await?;
    let surveys = survey::survey(repository, &backups).await?;
    let (heads, _) = reports::list(repository, None).await?;
    for survey in &surveys {
        self::backups(survey, &mut page);
        exposure(survey, context.clock.now(), &mut page);
        debts(survey, &mut page);
        let conflicts = (!survey.branches.is_empty()).then(|| to_f64(survey.conflicts().len() as u64));
        page.set_known(&table::WAL_CONFLICTS, [survey.target.as_str()], conflicts);
        page.set_known(&table::WAL_GAPS, [survey.target.as_str()], open_gaps(repository, survey).await);
        let unproven = prune::alarm::unproven(context, survey, &heads).map(to_f64);
        page.set_known(&table::BACKUPS_UNPROVEN, [survey.target.as_str()], unproven);
    }
    drills::add(&heads, &mut page);
    slots::add(context, schedules, &mut page).await?;
    page.set_time(&table::SNAPSHOT_TIME, [], Some(context.clock.now()));
    let took = context.clock.monotonic().saturating_sub(began);
    page.set(&table::SNAPSHOT_DURATION, [], took.as_secs_f64());
    Ok(page)
}

/// The size of every region that can be listed. It lists everything there is.
pub async fn stored(repository: &Repository) -> Page {
    let sizes = repository.regions.all().iter().map(|region| async {
        let listed = list_all(region.store.as_ref(), "").await.ok()?;
        Some((&region.name, listed.iter().map(|object| object.size).sum::<u64>()))
    });
    let mut page = Page::default();
    for (region, bytes) in futures::future::join_all(sizes).await.into_iter().flatten() {
        page.set(&table::REGION_STORED, [region.as_str()], to_f64(bytes));
    }
    page
}

fn objectives(target: &TargetName, objectives: &Objectives, page: &mut Page) {
    let name = target.as_str();
    page.set_known(&table::RPO_TARGET, [name], objectives.rpo.map(|rpo| rpo.as_secs_f64()));
    page.set_known(&table::RTO_TARGET, [name, "restore"], objectives.rto_restore.map(|rto| rto.as_secs_f64()));
    page.set_known(&table::RTO_TARGET, [name, "failover"], objectives.rto_failover.map(|rto| rto.as_secs_f64()));
}

const STATES: [State; 4] = [State::Complete, State::Debt, State::Damaged, State::Unreachable];

const fn word(state: State) -> &'static str {
    match state {
        State::Complete => "complete",
        State::Debt => "debt",
        State::Damaged => "damaged",
        State::Unreachable => "unreachable",
    }
}

/// Oldest first, so that what is said of the newest is said last.
fn backups(survey: &Survey, page: &mut Page) {
    let target = survey.target.as_str();
    let mut reach: BTreeMap<RegionName, (DateTime<Utc>, DateTime<Utc>)> = BTreeMap::new();
    for backup in list::list(survey) {
        let Listed { kind, started_at, finished_at, .. } = backup;
        page.set_latest(&table::BACKUP_LAST_ATTEMPT, [target], started_at);
        page.set(&table::BACKUP_LAST_DURATION, [target, kind], (finished_at - started_at).as_seconds_f64());
        page.set(&table::BACKUP_LAST_SIZE, [target, kind, "source"], to_f64(backup.size_bytes));
        page.set(&table::BACKUP_LAST_SIZE, [target, kind, "stored"], to_f64(backup.stored_bytes));
        for region in &backup.regions {
            let name = region.name.as_str();
            for state in STATES {
                let labels = [target, kind, name, word(state)];
                let known = page.get(&table::BACKUPS, labels).unwrap_or_default();
                page.set(&table::BACKUPS, labels, known + f64::from(u8::from(region.state == state)));
            }
            if region.state == State::Complete {
                page.set_latest(&table::BACKUP_LAST_SUCCESS, [target, kind, name], finished_at);
            }
            if let Some(until) = region.recoverable_until {
                // Without WAL a backup brings one moment back.
                let (from, until) = match backup.start_lsn {
                    Some(_) => (finished_at, until.max(finished_at)),
                    None => (until, until),
                };
                let known = reach.entry(region.name.clone()).or_insert((from, until));
                known.1 = known.1.max(until);
            }
        }
    }
    for (region, (from, to)) in reach {
        page.set_time(&table::RECOVERY_WINDOW_START, [target, region.as_str()], Some(from));
        page.set_time(&table::RECOVERABLE_POINT, [target, region.as_str()], Some(to));
    }
}

/// Where there is no WAL, what was written since the newest recovery point is exposed, whether or not anything was. With
/// WAL its receiver knows.
fn exposure(survey: &Survey, now: DateTime<Utc>, page: &mut Page) {
    if survey.backups.last().is_none_or(|(backup, _)| backup.commit.wal.is_some()) {
        return;
    }
    let target = survey.target.as_str();
    let mut newest: BTreeMap<RegionName, DateTime<Utc>> = BTreeMap::new();
    for region in list::list(survey).into_iter().flat_map(|backup| backup.regions) {
        if let Some(point) = region.recoverable_until {
            let known = newest.entry(region.name).or_insert(point);
            *known = point.max(*known);
        }
    }
    for (region, point) in newest {
        // A recovery point in the future says nothing of what would be lost now.
        let age = (now - point).to_std().ok().map(|age| age.as_secs_f64());
        page.set_known(&table::RPO_EXPOSURE, [target, region.as_str()], age);
    }
}

fn debts(survey: &Survey, page: &mut Page) {
    for (region, (objects, unreadable)) in survey.debts() {
        let known = unreadable.is_none().then(|| to_f64(objects.len() as u64));
        page.set_known(&table::REGION_COPIES_MISSING, [survey.target.as_str(), region.as_str()], known);
    }
}

/// Gaps that nothing fills and behind which no backup begins; `None` if that cannot be read.
async fn open_gaps(repository: &Repository, survey: &Survey) -> Option<f64> {
    let commits = || survey.backups.iter().map(|(backup, _)| &backup.commit);
    let mut open = 0.0;
    for branch in &survey.branches {
        let (gaps, errors) = gaps::read(repository, &branch.branch).await.ok()?;
        if !errors.is_empty() {
            return None;
        }
        let crossed = |gap: &gaps::Gap| {
            commits().any(|commit| commit.wal.as_ref().is_some_and(|need| gap.is_before(need, commit.started_at)))
        };
        let is_stored = |from, to| branch.union.iter().any(|reach| reach.window.covers(from, to));
        open += gaps
            .iter()
            .chain(&branch.lost)
            .filter(|gap| !crossed(gap) && gap.is_open(is_stored))
            .map(|_| 1.0)
            .sum::<f64>();
    }
    (!survey.branches.is_empty()).then_some(open)
}

#[allow(clippy::cast_precision_loss, reason = "Prometheus counts in doubles")]
const fn to_f64(number: u64) -> f64 {
    number as f64
}
