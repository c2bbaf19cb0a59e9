//! Which backups are kept. Pure: rules and backups in, a verdict on each of them out.
//!
//! Only *proven* backups (a drill started them and passed) fill the places that the rules offer. So whoever can write
//! backups, or a source that went bad unnoticed, cannot push a good one out by adding new ones. An unproven backup goes only
//! when it is older than the oldest proven one that stays. Ages are measured from the newest proven backup, never from a
//! clock: a clock that runs ahead, or a target that is no longer backed up, expires nothing.
//!
//! A backup and its copies are of one moment, and one of them is enough: of those that are proven the newest copy counts, and
//! the others have no place any more. A copy that is not proven yet counts for nothing and stays as long as what it is of.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use chrono::{DateTime, Datelike, TimeDelta, Utc};
use chrono_tz::Tz;
use serde::Serialize;

use crate::model::commit::CopyOf;
use crate::model::{BackupId, RegionName};

/// How many proven backups stay, whatever the rules say: one that turns out to be bad leaves another.
pub const ALWAYS_PROVEN: usize = 2;

/// What is kept of one target. A backup stays if any rule wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// The newest ones.
    pub last: u32,
    /// The newest of each of so many days that have one.
    pub daily: u32,
    /// Of so many weeks (ISO, from Monday).
    pub weekly: u32,
    /// Of so many months.
    pub monthly: u32,
    /// Of so many years.
    pub yearly: u32,
    /// Everything that is at most so much older than the newest.
    pub within: Option<TimeDelta>,
    /// WAL that is older is kept only where a backup is not consistent without it; `None` keeps it from the oldest kept
    /// backup on.
    pub wal: Option<TimeDelta>,
    /// Where days, weeks, months and years begin.
    pub timezone: Tz,
    /// Backups count without a drill: of a source that no drill can start.
    pub undrilled: bool,
}

impl Rules {
    /// Whether no rule keeps anything, which keeps everything.
    pub const fn keep_everything(&self) -> bool {
        let counts = self.last | self.daily | self.weekly | self.monthly | self.yearly;
        counts == 0 && self.within.is_none()
    }
}

/// A backup as the rules see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub id: BackupId,
    /// When it began.
    pub at: DateTime<Utc>,
    /// Whether a drill proved it.
    pub proven: bool,
    /// Whether somebody says so on whom nobody relies: it takes no place, and is not taken for one that nobody ever tried.
    pub doubted: bool,
    /// Who needs it beside the rules: pins, holds, running jobs.
    pub needed: Vec<String>,
    /// What it is a copy of.
    pub copy: Option<CopyOf>,
}

impl Candidate {
    fn origin(&self) -> &BackupId {
        self.copy.as_ref().map_or(&self.id, |copy| &copy.backup)
    }

    /// Of one moment: the original first, then its copies as they were made.
    fn order(&self) -> (Option<DateTime<Utc>>, &BackupId) {
        (self.copy.as_ref().map(|copy| copy.at), &self.id)
    }
}

/// Why a backup stays.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The target has no rules.
    NoRules,
    /// Among the newest.
    Last,
    /// The newest proven one of its day.
    Daily,
    /// Of its week.
    Weekly,
    /// Of its month.
    Monthly,
    /// Of its year.
    Yearly,
    /// Young enough.
    Within,
    /// One of the two newest that a drill proved.
    Drilled,
    /// The newest of the target.
    Newest,
    /// Never proven, and not older than every proven one that stays.
    Unproven,
    /// A copy of one that stays, and not proven yet.
    Copy,
    /// Proven, by the word of somebody on whom nobody relies.
    Doubted,
    /// A pin, a hold, or a job that runs.
    Needed(String),
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::NoRules => "no retention is configured",
            Self::Last => "keep_last",
            Self::Daily => "keep_daily",
            Self::Weekly => "keep_weekly",
            Self::Monthly => "keep_monthly",
            Self::Yearly => "keep_yearly",
            Self::Within => "keep_within",
            Self::Drilled => "one of the two newest that count",
            Self::Newest => "the newest",
            Self::Unproven => "never drilled",
            Self::Copy => "a copy that waits for its drill",
            Self::Doubted => "proven by the word of a signer who is not listed",
            Self::Needed(by) => by,
        })
    }
}

/// What becomes of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It stays, for these reasons.
    Keep(Vec<Keep>),
    /// No rule wants it.
    Expired,
    /// A proven copy of it took its place.
    Replaced,
    /// No drill ever proved it, and it is older than every proven one that stays.
    NeverProven,
    /// The rules let it go, and a lock or a hold keeps it.
    Retained {
        /// Where the lock ends last.
        region: RegionName,
        /// When; `None` for a legal hold, which somebody must lift.
        until: Option<DateTime<Utc>>,
    },
}

impl Verdict {
    /// Whether it stays.
    pub const fn keeps(&self) -> bool {
        matches!(self, Self::Keep(_) | Self::Retained { .. })
    }
}

/// Judges the backups of one target.
pub fn judge(candidates: &[Candidate], rules: &Rules) -> BTreeMap<BackupId, Verdict> {
    let mut newest_first: Vec<_> = candidates.iter().collect();
    newest_first.sort_by(|a, b| (b.at, &b.id).cmp(&(a.at, &a.id)));
    let mut reasons = wanted(&newest_first, rules);
    for candidate in candidates {
        let needed = candidate.needed.iter().cloned().map(Keep::Needed);
        reasons.entry(&candidate.id).or_default().extend(needed);
    }
    if let Some(newest) = newest_first.first() {
        reasons.entry(&newest.id).or_default().insert(Keep::Newest);
    }
    let stays = |candidate: &Candidate| reasons.get(&candidate.id).is_some_and(|reasons| !reasons.is_empty());
    let oldest_proven = candidates.iter().filter(|candidate| candidate.proven && stays(candidate));
    let oldest_proven = oldest_proven.map(|candidate| candidate.at).min();
    let verdict = |candidate: &Candidate| {
        let reasons = reasons.get(&candidate.id).into_iter().flatten().cloned().collect::<Vec<_>>();
        match () {
            () if !reasons.is_empty() => Verdict::Keep(reasons),
            () if candidate.proven && !is_foremost(candidate, candidates) => Verdict::Replaced,
            () if candidate.proven => Verdict::Expired,
            () if candidate.doubted => Verdict::Keep(vec![Keep::Doubted]),
            () if oldest_proven.is_some_and(|oldest| candidate.at < oldest) => Verdict::NeverProven,
            () => Verdict::Keep(vec![Keep::Unproven]),
        }
    };
    let mut verdicts: BTreeMap<_, _> =
        candidates.iter().map(|candidate| (candidate.id.clone(), verdict(candidate))).collect();
    for copy in candidates.iter().filter(|candidate| candidate.copy.is_some() && !candidate.proven) {
        if let Some(shared) = fate(copy, candidates, &verdicts) {
            verdicts.insert(copy.id.clone(), shared);
        }
    }
    verdicts
}

/// Whether it is the one of its moment that counts.
fn is_foremost(candidate: &Candidate, all: &[Candidate]) -> bool {
    let same = all.iter().filter(|other| other.proven && other.origin() == candidate.origin());
    same.max_by_key(|other| other.order()).is_some_and(|foremost| foremost.id == candidate.id)
}

/// What becomes of a copy that is not proven: it stays as long as what it is of. `None` where that is decided otherwise, or
/// nothing else of its moment is left.
fn fate(copy: &Candidate, all: &[Candidate], verdicts: &BTreeMap<BackupId, Verdict>) -> Option<Verdict> {
    let decides = |other: &&Candidate| other.origin() == copy.origin() && (other.copy.is_none() || other.proven);
    let others: Vec<_> = all.iter().filter(decides).filter_map(|other| verdicts.get(&other.id)).collect();
    match verdicts.get(&copy.id) {
        Some(Verdict::Keep(reasons)) if *reasons != [Keep::Unproven] => None,
        _ if others.is_empty() => None,
        _ if others.iter().any(|verdict| verdict.keeps()) => Some(Verdict::Keep(vec![Keep::Copy])),
        _ => Some(Verdict::Expired),
    }
}

/// What the rules want, of the proven ones alone.
fn wanted<'c>(newest_first: &[&'c Candidate], rules: &Rules) -> BTreeMap<&'c BackupId, BTreeSet<Keep>> {
    let mut reasons: BTreeMap<_, BTreeSet<Keep>> = BTreeMap::new();
    if rules.keep_everything() {
        reasons.extend(newest_first.iter().map(|candidate| (&candidate.id, BTreeSet::from([Keep::NoRules]))));
        return reasons;
    }
    let proven: Vec<_> = newest_first.iter().copied().filter(|candidate| candidate.proven).collect();
    let all: Vec<_> = proven.iter().map(|candidate| (*candidate).clone()).collect();
    let proven: Vec<_> = proven.into_iter().filter(|candidate| is_foremost(candidate, &all)).collect();
    let mut keep = |candidate: &'c Candidate, reason: Keep| {
        reasons.entry(&candidate.id).or_default().insert(reason);
    };
    proven.iter().take(ALWAYS_PROVEN).for_each(|candidate| keep(candidate, Keep::Drilled));
    proven.iter().take(count(rules.last)).for_each(|candidate| keep(candidate, Keep::Last));
    if let (Some(within), Some(newest)) = (rules.within, proven.first()) {
        let young = proven.iter().filter(|candidate| newest.at - candidate.at <= within);
        young.for_each(|candidate| keep(candidate, Keep::Within));
    }
    for (reason, wanted, period) in periods(rules) {
        let (mut kept, mut last) = (0, None);
        for candidate in &proven {
            let period = Some(period(candidate.at.with_timezone(&rules.timezone)));
            if kept < wanted && period != last {
                keep(candidate, reason.clone());
                (kept, last) = (kept + 1, period);
            }
        }
    }
    reasons
}

/// Two numbers that are the same within a period and differ from one to the next.
type Period = fn(DateTime<Tz>) -> (i32, u32);

fn periods(rules: &Rules) -> [(Keep, u32, Period); 4] {
    [
        (Keep::Daily, rules.daily, |at| (at.year(), at.ordinal())),
        (Keep::Weekly, rules.weekly, |at| (at.iso_week().year(), at.iso_week().week())),
        (Keep::Monthly, rules.monthly, |at| (at.year(), at.month())),
        (Keep::Yearly, rules.yearly, |at| (at.year(), 0)),
    ]
}

fn count(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Strategy, any, prop};
    use proptest::{prop_assert, prop_assert_eq, proptest};

    use super::*;

    fn none() -> Rules {
        Rules {
            last: 0,
            daily: 0,
            weekly: 0,
            monthly: 0,
            yearly: 0,
            within: None,
            wal: None,
            timezone: Tz::UTC,
            undrilled: false,
        }
    }

    fn candidate(number: usize, at: DateTime<Utc>, proven: bool, needed: bool) -> Candidate {
        let digits = b"23456789abcdefghjkmnpqrstwxy";
        let suffix: String = [number / 784, number / 28, number].iter().map(|at| char::from(digits[at % 28])).collect();
        let id = format!("ledger-{}-{suffix}", at.format("%y%m%d-%H%M%S")).parse().unwrap();
        let needed = needed.then(|| "pinned".to_owned()).into_iter().collect();
        Candidate { id, at, proven, doubted: false, needed, copy: None }
    }

    /// A copy of one of them.
    fn copy(of: &Candidate, number: usize, proven: bool) -> Candidate {
        let copy = Some(CopyOf { backup: of.id.clone(), at: of.at + TimeDelta::days(i64::try_from(number).unwrap()) });
        Candidate { copy, ..candidate(number, of.at, proven, false) }
    }

    fn backups() -> impl Strategy<Value = Vec<Candidate>> {
        let hours = prop::collection::btree_set(0i64..24 * 365 * 3, 0..60);
        (hours, prop::collection::vec((any::<bool>(), 0u8..10), 60)).prop_map(|(hours, more)| {
            let begin = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
            let at = |hour: i64| begin + TimeDelta::hours(hour);
            let one = |(number, (hour, (proven, pin))): (usize, (i64, (bool, u8)))| {
                candidate(number, at(hour), proven, pin == 0)
            };
            hours.into_iter().zip(more).enumerate().map(one).collect()
        })
    }

    fn rules() -> impl Strategy<Value = Rules> {
        let counts = (0u32..5, 0u32..8, 0u32..5, 0u32..5, 0u32..3);
        let zones = prop::sample::select(vec![Tz::UTC, Tz::Europe__Berlin, Tz::Pacific__Auckland]);
        (counts, prop::option::of(0i64..90), zones).prop_map(
            |((last, daily, weekly, monthly, yearly), days, timezone)| {
                let within = days.map(TimeDelta::days);
                Rules { last, daily, weekly, monthly, yearly, within, wal: None, timezone, undrilled: false }
            },
        )
    }

    fn kept(candidates: &[Candidate], rules: &Rules) -> Vec<Candidate> {
        let verdicts = judge(candidates, rules);
        candidates.iter().filter(|candidate| verdicts[&candidate.id].keeps()).cloned().collect()
    }

    proptest! {
        #[test]
        fn what_must_stay_stays(candidates in backups(), rules in rules()) {
            let verdicts = judge(&candidates, &rules);
            prop_assert_eq!(verdicts.len(), candidates.len());
            let newest = candidates.iter().max_by_key(|candidate| candidate.at);
            prop_assert!(newest.is_none_or(|newest| verdicts[&newest.id].keeps()));
            let proven = candidates.iter().rev().filter(|candidate| candidate.proven);
            prop_assert!(proven.take(2).all(|candidate| verdicts[&candidate.id].keeps()));
            let pinned = candidates.iter().filter(|candidate| !candidate.needed.is_empty());
            prop_assert!(pinned.into_iter().all(|candidate| verdicts[&candidate.id].keeps()));
        }

        #[test]
        fn nothing_goes_without_rules(candidates in backups()) {
            prop_assert_eq!(kept(&candidates, &none()), candidates);
        }

        #[test]
        fn without_a_drill_nothing_goes(candidates in backups(), rules in rules()) {
            let unproven: Vec<_> = candidates.into_iter().map(|one| Candidate { proven: false, ..one }).collect();
            prop_assert_eq!(kept(&unproven, &rules), unproven);
        }

        #[test]
        fn an_unproven_one_goes_only_when_older_than_every_proven_one_that_stays(candidates in backups(), rules in rules()) {
            let kept = kept(&candidates, &rules);
            let oldest = kept.iter().filter(|one| one.proven).map(|one| one.at).min();
            for gone in candidates.iter().filter(|one| !one.proven && !kept.contains(one)) {
                prop_assert!(oldest.is_some_and(|oldest| gone.at < oldest));
                prop_assert_eq!(&judge(&candidates, &rules)[&gone.id], &Verdict::NeverProven);
            }
        }

        /// Nobody pushes a proven backup out by writing new ones.
        #[test]
        fn unproven_backups_change_nothing_for_proven_ones(candidates in backups(), rules in rules()) {
            let proven: Vec<_> = candidates.iter().filter(|one| one.proven).cloned().collect();
            let with: BTreeSet<_> = kept(&candidates, &rules).into_iter().filter(|one| one.proven).map(|one| one.id).collect();
            let without = kept(&proven, &rules);
            let same = proven.iter().all(|one| with.contains(&one.id) == without.contains(one));
            prop_assert!(same, "{with:?} {without:?}");
        }

        /// What is proven by a word that does not count stays, and decides of no other.
        #[test]
        fn doubted_backups_stay_and_change_nothing(candidates in backups(), rules in rules()) {
            let doubt = |one: &Candidate| Candidate { doubted: !one.proven, ..one.clone() };
            let doubted: Vec<_> = candidates.iter().map(doubt).collect();
            let (before, after) = (judge(&candidates, &rules), judge(&doubted, &rules));
            for one in &doubted {
                let same = before[&one.id] == after[&one.id];
                prop_assert!(if one.doubted { after[&one.id].keeps() } else { same }, "{one:?}");
            }
        }

        /// A drilled copy has the place that its original had, and costs nobody else one.
        #[test]
        fn a_moment_has_one_place(candidates in backups(), rules in rules(), chosen in 0usize..60, proven in any::<bool>()) {
            let Some(original) = candidates.get(chosen) else { return Ok(()) };
            let copied = copy(original, 900, proven);
            let with: Vec<_> = candidates.iter().cloned().chain([copied.clone()]).collect();
            let (before, after) = (judge(&candidates, &rules), judge(&with, &rules));
            for other in candidates.iter().filter(|other| other.id != original.id) {
                let same = before[&other.id].keeps() == after[&other.id].keeps();
                // An original that was never drilled gains a place through a drilled copy.
                prop_assert!(same || (proven && !original.proven), "{other:?}");
            }
            if proven && original.proven && original.needed.is_empty() && !rules.keep_everything() {
                let newest = candidates.iter().all(|other| other.at <= original.at);
                prop_assert_eq!(before[&original.id].keeps(), after[&copied.id].keeps());
                prop_assert!(newest || after[&original.id] == Verdict::Replaced);
            }
            if !proven {
                prop_assert_eq!(before[&original.id].keeps(), after[&original.id].keeps());
                prop_assert_eq!(after[&original.id].keeps(), after[&copied.id].keeps());
            }
        }

        #[test]
        fn what_is_left_is_left_alone(candidates in backups(), rules in rules()) {
            let kept_once = kept(&candidates, &rules);
            prop_assert_eq!(kept(&kept_once, &rules), kept_once);
        }

        #[test]
        fn no_more_is_kept_than_the_rules_offer(candidates in backups(), rules in rules()) {
            let rules = Rules { within: None, last: rules.last.max(1), ..rules };
            let proven: Vec<_> =
                candidates.into_iter().filter(|one| one.proven).map(|one| Candidate { needed: Vec::new(), ..one }).collect();
            let most = rules.last.max(2) + rules.daily + rules.weekly + rules.monthly + rules.yearly;
            prop_assert!(kept(&proven, &rules).len() <= most as usize);
        }
    }

    #[test]
    fn days_begin_where_the_owner_lives() {
        let at = |text: &str| text.parse::<DateTime<Utc>>().unwrap();
        let times = ["2026-03-01T11:00:00Z", "2026-03-02T10:30:00Z", "2026-03-02T11:30:00Z", "2026-03-03T10:30:00Z"];
        let candidates: Vec<_> =
            times.iter().enumerate().map(|(number, time)| candidate(number, at(time), true, false)).collect();
        let kept = |timezone| {
            let kept = kept(&candidates, &Rules { daily: 9, timezone, ..none() });
            kept.iter().map(|one| one.at.to_rfc3339()).collect::<Vec<_>>()
        };
        let starts = |wanted: [usize; 3]| wanted.map(|number| at(times[number]).to_rfc3339());
        assert_eq!(kept(Tz::UTC), starts([0, 2, 3]));
        // There the date changes at 11:00 UTC; the two newest proven ones stay anyhow.
        assert_eq!(kept(Tz::Pacific__Auckland), starts([1, 2, 3]));
    }
}
