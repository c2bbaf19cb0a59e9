//! One file of a schedule, read to its end whatever is wrong with it.

use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use chrono_tz::{TZ_VARIANTS, Tz};

use crate::config::file::{Position, Section, nearest};
use crate::config::schedules::{Mistake, mistake};
use crate::config::settings::Settings;
use crate::model::schedule::{CatchUp, Cron, Depth, Job, Overlap, Pick, Retry, Schedule, Work};
use crate::model::{Error, RegionName, Result, ScheduleName, TargetName};

/// Longer than any job should take; without an end one that hangs would hold up all that wait for it.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
const DEFAULT_PAUSE: Duration = Duration::from_secs(60);
/// Slots that are looked at to learn how far apart they are.
const LOOKED_AT: usize = 60;

/// Reads one table to its end, whatever is wrong with it.
pub(super) struct Reader<'f, 'd> {
    file: &'f Path,
    section: Section<'d>,
    mistakes: Vec<Mistake>,
}

impl<'f, 'd> Reader<'f, 'd> {
    pub(super) const fn new(file: &'f Path, section: Section<'d>) -> Self {
        Self { file, section, mistakes: Vec::new() }
    }

    /// What `after` names, and every mistake.
    pub(super) fn end(self) -> (Option<(ScheduleName, Position)>, Vec<Mistake>) {
        let after = self.section.string("after").ok().flatten().and_then(|after| after.parse().ok());
        (after.map(|after| (after, self.section.position_of("after"))), self.mistakes)
    }

    pub(super) fn schedule(&mut self, name: &ScheduleName, settings: &Settings) -> Option<Schedule> {
        let description = self.take("description", Section::string).map(str::to_owned);
        let enabled = self.take("enabled", Section::boolean).unwrap_or(true);
        let job = self.needed("job", |section, key| section.converted(key, job));
        let target = self.take("target", |section, key| section.converted(key, |text| target(text, settings)));
        let cron = self.needed("cron", |section, key| section.converted(key, str::parse::<Cron>));
        let timezone = self.take("timezone", |section, key| section.converted(key, zone)).unwrap_or(Tz::UTC);
        let jitter = self.take("jitter", Section::duration).unwrap_or_default();
        let catch_up = [("none", CatchUp::None), ("one", CatchUp::One)];
        let catch_up = self.take("catch_up", |section, key| section.choice(key, &catch_up)).unwrap_or_default();
        let overlap = [("skip", Overlap::Skip), ("queue-one", Overlap::QueueOne)];
        let overlap = self.take("overlap", |section, key| section.choice(key, &overlap)).unwrap_or_default();
        let timeout = self.take("timeout", Section::interval).unwrap_or(DEFAULT_TIMEOUT);
        let retry = self.retry();
        let after = self.take("after", |section, key| section.converted(key, str::parse::<ScheduleName>));
        let max_age = self.take("max_age", Section::interval);
        let target = target.filter(|target| self.fits(job, target, settings));
        let work = self.work(job, target, settings);
        self.finish();
        if let Some(cron) = &cron {
            self.distances(cron, timezone, jitter, max_age);
        }
        let (work, cron, name) = (work?, cron?, name.clone());
        Some(Schedule {
            name,
            description,
            enabled,
            work,
            cron,
            timezone,
            jitter,
            catch_up,
            overlap,
            timeout,
            retry,
            after,
            max_age,
        })
    }

    fn retry(&mut self) -> Retry {
        let Some(mut inner) = self.inner("retry") else { return Retry { max: 0, pause: DEFAULT_PAUSE } };
        let max = inner.take("max", |section, key| section.integer(key, 0..=20)).unwrap_or(0);
        let pause = inner.take("pause", Section::interval).unwrap_or(DEFAULT_PAUSE);
        self.close(inner);
        Retry { max: u32::try_from(max).unwrap_or(0), pause }
    }

    /// A job that makes or rehearses backups is of one kind of target.
    fn fits(&mut self, job: Option<Job>, target: &TargetName, settings: &Settings) -> bool {
        let wanted = match job {
            Some(Job::Backup | Job::Drill | Job::Compact | Job::Bundle) => "postgres",
            Some(Job::Dump) => "dump",
            Some(Job::Files) => "files",
            _ => return true,
        };
        let (Some(job), Ok(known)) = (job, settings.target(target)) else { return true };
        let source = known.source.as_str();
        if source == wanted {
            return true;
        }
        let error = Error::usage(format!("`target`: {target} has source = \"{source}\", which `{job}` does not read"));
        let right = if source == "postgres" { "backup" } else { source };
        self.wrong("target", &error.hint(format!("job = \"{right}\"")));
        false
    }

    fn work(&mut self, job: Option<Job>, target: Option<TargetName>, settings: &Settings) -> Option<Work> {
        let mut params = self.inner("params")?;
        let region = |params: &mut Reader<'_, 'd>| {
            params.take("region", |section, key| section.converted(key, |text| known_region(text, settings)))
        };
        let work = match job {
            Some(Job::Backup) => {
                let fast = params.take("fast", Section::boolean).unwrap_or(false);
                let verify_detection = params.take("verify_detection", Section::boolean).unwrap_or(false);
                if target.is_none() && !self.has("target") {
                    self.missing("target", "a backup has one");
                }
                target.map(|target| Work::Backup { target, fast, verify_detection })
            }
            Some(job @ (Job::Dump | Job::Files)) => {
                if target.is_none() && !self.has("target") {
                    self.missing("target", &format!("a {job} job has one"));
                }
                target.map(|target| if job == Job::Dump { Work::Dump { target } } else { Work::Files { target } })
            }
            Some(Job::Compact) => {
                if target.is_none() && !self.has("target") {
                    self.missing("target", "a compaction has one");
                }
                target.map(|target| Work::Compact { target })
            }
            Some(Job::Verify) => {
                let levels = [("l0", Depth::L0), ("l1", Depth::L1), ("l2", Depth::L2)];
                let level = params.take("level", |section, key| section.choice(key, &levels)).unwrap_or(Depth::L1);
                let scrub = params.take("scrub", Section::boolean).unwrap_or(false);
                let region = region(&mut params);
                Some(Work::Verify { target, level, scrub, region })
            }
            Some(Job::Drill) => {
                let region = region(&mut params);
                if target.is_none() && !self.has("target") {
                    self.missing("target", "a drill has one");
                }
                let picks = [("latest", Pick::Latest), ("random", Pick::Random), ("oldest", Pick::Oldest)];
                let select = params.take("select", |section, key| section.choice(key, &picks)).unwrap_or_default();
                target.map(|target| Work::Drill { target, region, select })
            }
            Some(Job::Repair) => {
                let quick = params.take("quick", Section::boolean).unwrap_or(false);
                let region = region(&mut params);
                Some(Work::Repair { target, region, quick })
            }
            Some(Job::Prune) => {
                if self.has("target") {
                    let error = Error::usage("`target`: a prune is of every target that has a retention");
                    self.wrong("target", &error.hint("leave it out"));
                }
                Some(Work::Prune)
            }
            Some(Job::Bundle) => {
                let older_than = params.take("older_than", Section::interval);
                Some(Work::Bundle { target, older_than })
            }
            // What its parameters mean is not known, so they are not looked at.
            _ => return None,
        };
        self.close(params);
        work
    }

    /// A jitter beyond the next slot would change their order, and a `max_age` within one slot would always alarm.
    fn distances(&mut self, cron: &Cron, zone: Tz, jitter: Duration, max_age: Option<Duration>) {
        let anchor = DateTime::<Utc>::UNIX_EPOCH + TimeDelta::days(365 * 56);
        let slots: Vec<_> = cron.slots_after(zone, anchor).take(LOOKED_AT).collect();
        let distances = slots.windows(2).filter_map(|pair| pair.last().zip(pair.first()).map(|(b, a)| *b - *a));
        let Some(shortest) = distances.min().and_then(|shortest| shortest.to_std().ok()) else { return };
        let apart = format!("slots are only {} min apart", shortest.as_secs() / 60);
        if jitter >= shortest {
            self.wrong("jitter", &Error::usage(format!("`jitter` reaches the next slot: {apart}")));
        }
        if max_age.is_some_and(|age| age < shortest) {
            let what = format!("`max_age` is over before the next slot comes, {} min later", shortest.as_secs() / 60);
            self.wrong("max_age", &Error::usage(what));
        }
    }

    /// The value of a key; a wrong one is noted and counts as absent.
    fn take<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&Section<'d>, &'static str) -> Result<Option<T>>,
    ) -> Option<T> {
        let position = self.section.position_of(key);
        read(&self.section, key).unwrap_or_else(|error| {
            // The section tells the line in words; here it stands in front.
            let line = format!("line {}: ", position.line);
            let causes = error.causes().iter().map(|cause| cause.strip_prefix(&line).unwrap_or(cause));
            let mut told = causes.fold(Error::usage(format!("`{key}`")), Error::because);
            told = error.hint_text().map_or(told.clone(), |hint| told.hint(hint));
            self.wrong(key, &told);
            None
        })
    }

    fn needed<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&Section<'d>, &'static str) -> Result<Option<T>>,
    ) -> Option<T> {
        let value = self.take(key, read);
        if value.is_none() && !self.has(key) {
            self.missing(key, "every schedule has one");
        }
        value
    }

    fn has(&self, key: &str) -> bool {
        self.section.has(key)
    }

    fn missing(&mut self, key: &str, why: &str) {
        self.wrong(key, &Error::usage(format!("`{key}` is missing: {why}")));
    }

    fn wrong(&mut self, key: &str, error: &Error) {
        self.mistakes.push(mistake(self.file, Some(self.section.position_of(key)), error));
    }

    /// The table under a key; an absent one has no keys.
    fn inner(&mut self, key: &'static str) -> Option<Self> {
        let section = self.take(key, |section, key| section.section(key).map(Some))?;
        Some(Self { file: self.file, section, mistakes: Vec::new() })
    }

    fn close(&mut self, mut inner: Self) {
        inner.finish();
        self.mistakes.append(&mut inner.mistakes);
    }

    fn finish(&mut self) {
        for unknown in self.section.unknown_keys() {
            let error = Error::usage(format!("unknown key `{}`", unknown.key)).hint(unknown.hint);
            self.mistakes.push(mistake(self.file, Some(unknown.position), &error));
        }
    }
}

fn job(text: &str) -> Result<Job> {
    let runnable = Job::RUNNABLE.map(Job::as_str);
    match Job::ALL.into_iter().find(|job| job.as_str() == text) {
        Some(Job::Wal) => Err(Error::usage("WAL has no schedule")
            .hint("the daemon streams the WAL of every postgres target all the time")),
        Some(job) => Ok(job),
        None => {
            let error = Error::usage(format!("there is no job `{text}`"));
            Err(match nearest(text, runnable) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint(format!("there are {}", runnable.join(", "))),
            })
        }
    }
}

fn target(text: &str, settings: &Settings) -> Result<TargetName> {
    let name: TargetName = text.parse()?;
    settings.target(&name)?;
    Ok(name)
}

fn known_region(text: &str, settings: &Settings) -> Result<RegionName> {
    let name: RegionName = text.parse()?;
    settings.region(&name)?;
    Ok(name)
}

fn zone(text: &str) -> Result<Tz> {
    text.parse().map_err(|_| {
        let error = Error::usage(format!("there is no time zone `{text}`"));
        match nearest(text, TZ_VARIANTS.iter().map(|zone| zone.name())) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error.hint("write a name of the IANA database: Europe/Berlin, UTC"),
        }
    })
}
