//! What is kept, and how carefully the rest goes: from settings to the words of the rules.

use std::time::Duration;

use chrono::TimeDelta;

use crate::config::{self, Settings, Target as TargetSettings};
use crate::model::TargetName;
use crate::model::retention::Rules;
use crate::repository::prune::Limits;

/// What is kept of a target; `None` if its configuration does not say.
pub(super) fn rules(target: &TargetSettings) -> Option<(TargetName, Rules)> {
    let kept = target.retention.as_ref()?;
    let span = |duration: Option<Duration>| duration.and_then(|duration| TimeDelta::from_std(duration).ok());
    let rules = Rules {
        last: kept.keep_last,
        daily: kept.keep_daily,
        weekly: kept.keep_weekly,
        monthly: kept.keep_monthly,
        yearly: kept.keep_yearly,
        within: span(kept.keep_within),
        wal: span(kept.wal_keep),
        timezone: kept.zone(),
        undrilled: kept.count_undrilled,
    };
    Some((target.name.clone(), rules))
}

/// What bounds a prune.
pub(super) fn limits(settings: &Settings) -> Limits {
    let config::Prune { grace, short_grace: _, max_objects, max_bytes, max_share } = settings.prune;
    let grace = TimeDelta::from_std(grace).unwrap_or(TimeDelta::MAX);
    Limits { grace, objects: max_objects, bytes: max_bytes, percent: max_share }
}
