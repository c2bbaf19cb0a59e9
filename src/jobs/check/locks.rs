//! Object locks: can the bucket keep what is configured, does the lock fit what retention keeps, and are backups locked.

use chrono::{DateTime, TimeDelta, Utc};

use super::finding::{Finding, Findings};
use super::subject::Subject;
use crate::model::retention::Rules;
use crate::model::{Error, RegionName, Result, TargetName};
use crate::repository::catalog;
use crate::repository::handle::Repository;
use crate::repository::health::RegionHealth;
use crate::repository::locks::look::{self, BackupLocks, State};

/// What the configuration promises, region by region; pure.
pub(super) fn promises(subject: &Subject, health: &[RegionHealth]) -> Vec<Finding> {
    let mut list = Vec::new();
    for region in subject.regions.all() {
        let Some(rule) = &region.lock else { continue };
        let mut findings = Findings::about("locks", &region.name);
        let answers = health.iter().find(|health| health.region == region.name);
        match answers.and_then(|health| health.answers.as_ref().ok()).map(|answers| answers.can_lock) {
            Some(true) => findings.ok(format!("the bucket keeps versions and locks; backups are locked for {}", span(rule.keep))),
            Some(false) => findings.fail(
                "a lock is configured, and the bucket has no Object Lock and no versions, or these credentials may not know: \
                 nothing can be written",
                "make the bucket with Object Lock (aws s3api create-bucket --object-lock-enabled-for-bucket), or give every \
                 role s3:GetBucketObjectLockConfiguration and s3:GetBucketVersioning",
            ),
            // That the region does not answer is said already.
            None => {}
        }
        for (target, rules) in subject.retention.iter().filter(|(_, rules)| !rules.keep_everything()) {
            fits(&mut findings, rule.keep, (target, rules));
        }
        list.extend(findings.into_list());
    }
    list
}

/// Whether a lock covers what the rules keep for sure, and does not keep much more.
fn fits(findings: &mut Findings, keep: TimeDelta, (target, rules): (&TargetName, &Rules)) {
    if let Some(within) = rules.within.filter(|within| *within > keep) {
        findings.warn(
            format!(
                "{target} keeps backups within {} and locks them for {}: whoever may delete takes the older ones",
                span(within),
                span(keep)
            ),
            format!("lock for {} at least, or keep less", span(within)),
        );
        return;
    }
    match longest(rules) {
        Some(longest) if longest < keep => findings.warn(
            format!(
                "{target} keeps backups for about {} and locks them for {}: prune finds what expires locked, and its space \
                 stays taken for the difference",
                span(longest),
                span(keep)
            ),
            "that is safe and costs space; lock for less if it was not meant",
        ),
        Some(longest) if longest > keep => findings.ok(format!(
            "{target} keeps backups for up to {}; those older than {} are not locked any more",
            span(longest),
            span(keep)
        )),
        _ => findings.ok(format!("what {target} keeps is locked for {}", span(keep))),
    }
}

/// For how long the rules keep a backup that is taken every day; `None` where only numbers of backups are kept.
fn longest(rules: &Rules) -> Option<TimeDelta> {
    let days = [(rules.daily, 1), (rules.weekly, 7), (rules.monthly, 31), (rules.yearly, 366)];
    let counted = days.into_iter().filter(|(count, _)| *count > 0);
    counted.map(|(count, days)| TimeDelta::days(i64::from(count) * days)).chain(rules.within).max()
}

/// Asks every store for the lock of every object that a locked backup needs.
pub(super) async fn backups(subject: &Subject) -> (Vec<Finding>, Vec<BackupLocks>) {
    if subject.regions.all().iter().all(|region| region.lock.is_none()) {
        return (Vec::new(), Vec::new());
    }
    let mut findings = Findings::about("locks", "all");
    match looked(subject).await {
        Ok((locks, asked)) => {
            let mut list = told(&locks, subject.clock.now());
            findings.ok(format!("{asked} objects were asked for their lock (--no-locks leaves them out)"));
            list.extend(findings.into_list());
            (list, locks)
        }
        Err(error) => {
            let why = error.hint_text().unwrap_or("see the other findings").to_owned();
            findings.warn(format!("locks of backups could not be looked at: {error}"), why);
            (findings.into_list(), Vec::new())
        }
    }
}

async fn looked(subject: &Subject) -> Result<(Vec<BackupLocks>, u64)> {
    let repository = Repository::open(subject.regions.clone(), subject.listed_signers.clone()).await?;
    let (backups, unreadable) = catalog::backups(&repository, None).await?;
    if let Some(error) = unreadable.into_iter().next() {
        return Err(Error::damaged("a COMMIT is in no region intact").because(error));
    }
    let phase = subject.progress.begin("look at locks", None);
    let looked = look::look(&repository, &backups, subject.clock.now(), &phase).await;
    Ok((looked.backups, looked.asked))
}

fn told(locks: &[BackupLocks], now: DateTime<Utc>) -> Vec<Finding> {
    let mut list = Vec::new();
    let mut regions: Vec<&RegionName> = locks.iter().map(|locks| &locks.region).collect();
    regions.dedup();
    for region in regions {
        let mut findings = Findings::about("locks", region);
        let of_region: Vec<_> = locks.iter().filter(|locks| locks.region == *region).collect();
        of_region.iter().for_each(|locks| one(&mut findings, locks, now));
        let over = of_region.iter().filter(|locks| locks.state == State::Over).count();
        if over > 0 {
            findings.ok(format!("{over} backups are older than the lock and not locked any more"));
        }
        list.extend(findings.into_list());
    }
    list
}

fn one(findings: &mut Findings, locks: &BackupLocks, now: DateTime<Utc>) {
    let (id, objects) = (&locks.backup, locks.objects);
    let object = locks.weakest.as_deref().unwrap_or("nothing");
    match locks.state {
        State::Locked => {
            let until = locks.weakest_until.map_or_else(String::new, at);
            findings.ok(format!("{id}: all {objects} objects are locked; the weakest lock ends {until} ({object})"));
        }
        State::Weak => {
            let until = match locks.weakest_until {
                None => "is not locked".to_owned(),
                Some(until) if until <= now => format!("was locked until {}", at(until)),
                Some(until) => format!("is locked until {} only", at(until)),
            };
            let (weak, promised) = (locks.weak, at(locks.promised_until));
            findings.warn(
                format!(
                    "{id}: {weak} of {objects} objects are locked for less than promised ({promised}); {object} {until}"
                ),
                format!("drctl repair {} --quick", locks.target),
            );
        }
        State::Unknown => findings.warn(
            format!("{id}: its locks are not known: {}", locks.error.as_deref().unwrap_or("no answer")),
            "give the write role s3:GetObjectRetention; see deploy/iam/write.json",
        ),
        State::Over => {}
    }
}

fn at(time: DateTime<Utc>) -> String {
    time.format("%F %T UTC").to_string()
}

fn span(time: TimeDelta) -> String {
    match (time.num_days(), time.num_seconds()) {
        (days, _) if days > 1 => format!("{days} days"),
        (_, seconds) if seconds >= 7200 => format!("{} hours", seconds / 3600),
        (_, seconds) => format!("{seconds} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::check::Level;

    fn rules(within: Option<i64>, daily: u32, monthly: u32) -> Rules {
        let (last, weekly, yearly, timezone) = (3, 0, 0, chrono_tz::Tz::UTC);
        let within = within.map(TimeDelta::days);
        Rules { last, daily, weekly, monthly, yearly, within, wal: None, timezone, undrilled: false }
    }

    #[test]
    fn a_lock_that_does_not_fit_what_is_kept_is_told() {
        let level = |lock: i64, rules: &Rules| {
            let mut findings = Findings::about("locks", "a");
            fits(&mut findings, TimeDelta::days(lock), (&"ledger".parse().unwrap(), rules));
            let [finding] = <[Finding; 1]>::try_from(findings.into_list()).unwrap();
            (finding.level, finding.what)
        };
        let (worst, what) = level(7, &rules(Some(30), 0, 0));
        assert_eq!(worst, Level::Warn);
        assert!(what.contains("within 30 days") && what.contains("for 7 days"), "{what}");
        let (worst, what) = level(60, &rules(None, 14, 0));
        assert!(worst == Level::Warn && what.contains("its space"), "{what}");
        let (worst, what) = level(35, &rules(Some(30), 14, 12));
        assert!(worst == Level::Ok && what.contains("up to 372 days"), "{what}");
        // How long the newest three last is not a matter of time.
        assert_eq!(level(35, &rules(None, 0, 0)).0, Level::Ok);
        assert_eq!(level(30, &rules(Some(30), 0, 0)).0, Level::Ok);
    }
}
