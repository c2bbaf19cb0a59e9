//! `[targets.NAME.retention]` and `[prune]`: what is kept, and how carefully the rest goes.

use std::time::Duration;

use chrono_tz::{TZ_VARIANTS, Tz};
use serde::Serialize;

use crate::config::file::{Section, nearest};
use crate::config::show;
use crate::model::{Error, Result};

/// `[targets.NAME.retention]`: a backup stays if any of these wants it. Without any, everything stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Retention {
    /// The newest ones.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_last: u32,
    /// One for each of so many days.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_daily: u32,
    /// Of so many weeks.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_weekly: u32,
    /// Of so many months.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_monthly: u32,
    /// Of so many years.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_yearly: u32,
    /// All that are at most so much older than the newest.
    #[serde(serialize_with = "show::optional_duration", skip_serializing_if = "Option::is_none")]
    pub keep_within: Option<Duration>,
    /// WAL that is older goes, except what a kept backup is not consistent without.
    #[serde(serialize_with = "show::optional_duration", skip_serializing_if = "Option::is_none")]
    pub wal_keep: Option<Duration>,
    /// Where days begin.
    pub timezone: String,
    /// Count backups that no drill proved: those of dumps and files, which no drill can start.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub count_undrilled: bool,
}

impl Retention {
    /// The time zone.
    pub fn zone(&self) -> Tz {
        self.timezone.parse().unwrap_or(Tz::UTC)
    }
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            keep_last: 0,
            keep_daily: 0,
            keep_weekly: 0,
            keep_monthly: 0,
            keep_yearly: 0,
            keep_within: None,
            wal_keep: None,
            timezone: Tz::UTC.name().to_owned(),
            count_undrilled: false,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Whether a target has WAL and can be drilled.
pub(super) fn retention(section: &Section<'_>, is_cluster: bool) -> Result<Option<Retention>> {
    let number = |key| -> Result<u32> {
        Ok(section.integer(key, 0..=100_000)?.and_then(|number| u32::try_from(number).ok()).unwrap_or_default())
    };
    let retention = Retention {
        keep_last: number("keep_last")?,
        keep_daily: number("keep_daily")?,
        keep_weekly: number("keep_weekly")?,
        keep_monthly: number("keep_monthly")?,
        keep_yearly: number("keep_yearly")?,
        keep_within: section.interval("keep_within")?,
        wal_keep: if is_cluster { section.interval("wal_keep")? } else { None },
        timezone: section.converted("timezone", zone)?.unwrap_or_else(|| Tz::UTC.name().to_owned()),
        count_undrilled: !is_cluster && section.boolean("count_undrilled")?.unwrap_or(false),
    };
    section.finish()?;
    Ok(section.is_present().then_some(retention))
}

fn zone(text: &str) -> Result<String> {
    let unknown = |_| {
        let error = Error::usage(format!("there is no time zone `{text}`"));
        match nearest(text, TZ_VARIANTS.iter().map(|zone| zone.name())) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error.hint("write a name of the IANA database: Europe/Berlin, UTC"),
        }
    };
    text.parse::<Tz>().map(|zone| zone.name().to_owned()).map_err(unknown)
}

/// `[prune]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Prune {
    /// How long what nobody needs stays nevertheless.
    #[serde(serialize_with = "show::duration")]
    pub grace: Duration,
    /// Whether it may be shorter than the least that is safe: where nothing is protected in earnest.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub short_grace: bool,
    /// Objects of all regions together that one run removes at most.
    pub max_objects: u64,
    /// Their bytes.
    #[serde(serialize_with = "show::bytes")]
    pub max_bytes: u64,
    /// The share of a target's backups, in percent, that a schedule removes at most at once.
    pub max_share: u8,
}

impl Default for Prune {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(24 * 3600),
            short_grace: false,
            max_objects: 200_000,
            max_bytes: 4 << 40,
            max_share: 34,
        }
    }
}

/// Restores, drills and verifications announce themselves nowhere: what they read must not have been planned away since they
/// chose it. An hour is beyond what most of them take, and twelve times what the clocks of regions may differ by.
pub const LEAST_GRACE: Duration = Duration::from_secs(3600);

pub(super) fn prune(section: &Section<'_>) -> Result<Prune> {
    let usual = Prune::default();
    let objects = section.integer("max_objects", 1..=i32::MAX)?.and_then(|count| u64::try_from(count).ok());
    let share = section.integer("max_share", 1..=100)?.and_then(|share| u8::try_from(share).ok());
    let grace = section.interval("grace")?.unwrap_or(usual.grace);
    let short_grace = section.boolean("short_grace")?.unwrap_or(false);
    if grace < LEAST_GRACE && !short_grace {
        let error = Error::usage("`grace` is shorter than an hour: a restore that runs could lose what it reads");
        return Err(section.wrong_here(&error.hint("1h or more; in a test of drctl itself also: short_grace = true")));
    }
    let prune = Prune {
        grace,
        short_grace,
        max_objects: objects.unwrap_or(usual.max_objects),
        max_bytes: section.size("max_bytes")?.unwrap_or(usual.max_bytes),
        max_share: share.unwrap_or(usual.max_share),
    };
    section.finish()?;
    Ok(prune)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Settings, parse};

    fn read(target: &str) -> Result<Settings> {
        let text = format!("[prune]\ngrace = \"2d\"\n[regions.a]\nurl = \"a\"\n[targets.t]\n{target}");
        parse(&text, "drctl.toml", Path::new("/etc/drctl"))
    }

    #[test]
    fn what_is_read_reads_back() {
        let text = "source = \"files\"\nroots = [\"/etc\"]\n[targets.t.retention]\nkeep_last = 3\nkeep_daily = 7\n\
                    keep_within = \"36h\"\ntimezone = \"Europe/Berlin\"\ncount_undrilled = true\n";
        let settings = read(text).unwrap();
        let kept = settings.targets[0].retention.clone().unwrap();
        assert_eq!((kept.keep_last, kept.keep_daily, kept.keep_weekly), (3, 7, 0));
        assert_eq!((kept.keep_within, kept.zone()), (Some(Duration::from_secs(36 * 3600)), Tz::Europe__Berlin));
        assert_eq!(settings.prune, Prune { grace: Duration::from_secs(2 * 24 * 3600), ..Prune::default() });
        let again = parse(&settings.to_toml().unwrap(), "shown", Path::new("/")).unwrap();
        assert_eq!((&again.targets, &again.prune), (&settings.targets, &settings.prune));
        assert_eq!(read("source = \"files\"\nroots = [\"/etc\"]\n").unwrap().targets[0].retention, None);
    }

    #[test]
    fn a_grace_period_that_protects_nobody_is_refused() {
        let text = |prune: &str| format!("[prune]\n{prune}\n[regions.a]\nurl = \"a\"\n");
        let read = |prune: &str| parse(&text(prune), "drctl.toml", Path::new("/etc/drctl"));
        let told = read("grace = \"59m\"").unwrap_err().to_string();
        assert!(told.contains("shorter than an hour"), "{told}");
        assert_eq!(read("grace = \"1h\"").unwrap().prune.grace, LEAST_GRACE);
        let short = read("grace = \"1s\"\nshort_grace = true").unwrap();
        assert_eq!((short.prune.grace, short.prune.short_grace), (Duration::from_secs(1), true));
        let again = parse(&short.to_toml().unwrap(), "shown", Path::new("/")).unwrap();
        assert_eq!(again.prune, short.prune);
    }

    #[test]
    fn what_would_keep_less_than_meant_is_refused() {
        let files = "source = \"files\"\nroots = [\"/etc\"]\n[targets.t.retention]\n";
        let cluster = "source = \"postgres\"\nconninfo = \"host=a\"\n[targets.t.retention]\n";
        for (text, expected) in [
            (format!("{files}keep_dayly = 7\n"), "unknown key `keep_dayly`"),
            (format!("{files}keep_daily = -1\n"), "expected a whole number from 0"),
            (format!("{files}wal_keep = \"1d\"\n"), "unknown key `wal_keep`"),
            (format!("{files}timezone = \"Europe/Berln\"\n"), "there is no time zone"),
            // A cluster can be drilled.
            (format!("{cluster}count_undrilled = true\n"), "unknown key `count_undrilled`"),
        ] {
            let told = read(&text).unwrap_err().to_string();
            assert!(told.contains(expected), "{text}: {told}");
        }
    }
}
