//! The five fields of cron(5), and the civil times that they name.
//!
//! The `cron` crate walks civil time: it is given every field as a plain list, with a seconds field in front and week
//! days by name. What it would read differently never reaches it: its own grammar (six fields, `?`, Sunday as 1, a step
//! behind a single number), its AND of the two day fields, and its idea of a clock that is put forward or back.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::{Serialize, Serializer};

use crate::model::{Error, Result};

/// When, as cron(5) says it. It reads back as it was written.
///
/// # Contract
/// - Minute, hour, day of month, month, day of week; `*`, numbers, ranges, lists, steps behind `*` or a range; names of
///   months and week days by their first three letters in any case; 0 and 7 are Sunday. `@yearly`, `@annually`,
///   `@monthly`, `@weekly`, `@daily`, `@midnight`, `@hourly`.
/// - When both day fields are restricted, which means that they do not begin with `*`, a day that fits either counts.
/// - Civil times end with the year 2100.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cron {
    text: String,
    /// One, or two of which either counts.
    walks: Vec<cron::Schedule>,
    fixed_hours: bool,
}

struct Field {
    name: &'static str,
    low: u8,
    high: u8,
    names: &'static [&'static str],
    /// The value of the first of `names`.
    first_name: u8,
}

const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

const FIELDS: [Field; 5] = [
    Field { name: "minute", low: 0, high: 59, names: &[], first_name: 0 },
    Field { name: "hour", low: 0, high: 23, names: &[], first_name: 0 },
    Field { name: "day of month", low: 1, high: 31, names: &[], first_name: 0 },
    Field { name: "month", low: 1, high: 12, names: &MONTHS, first_name: 1 },
    Field { name: "day of week", low: 0, high: 7, names: &DAYS, first_name: 0 },
];

const NICKNAMES: [(&str, &str); 7] = [
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
    ("@monthly", "0 0 1 * *"),
    ("@weekly", "0 0 * * 0"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@hourly", "0 * * * *"),
];

impl Cron {
    /// Whether its hours are named. Such a time happens once a day whatever is done to the clock; one whose hour field is
    /// `*` or a step follows elapsed time.
    pub(super) const fn has_fixed_hours(&self) -> bool {
        self.fixed_hours
    }

    /// The civil times after `after`, ascending.
    pub(super) fn civil_after(&self, after: NaiveDateTime) -> Civil {
        // UTC has no gap and no fold, so in it the crate walks civil time.
        let walks = self.walks.iter().map(|walk| walk.after_owned(after.and_utc()).peekable()).collect();
        Civil { walks }
    }
}

/// The civil times of a [`Cron`], ascending.
pub(super) struct Civil {
    walks: Vec<std::iter::Peekable<cron::OwnedScheduleIterator<Utc>>>,
}

impl fmt::Debug for Civil {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Civil").field("walks", &self.walks.len()).finish()
    }
}

impl Iterator for Civil {
    type Item = NaiveDateTime;

    fn next(&mut self) -> Option<NaiveDateTime> {
        let next = self.walks.iter_mut().filter_map(|walk| walk.peek().copied()).min()?;
        for walk in &mut self.walks {
            walk.next_if_eq(&next);
        }
        Some(next.naive_utc())
    }
}

impl FromStr for Cron {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let spelled = match text.trim() {
            nickname if nickname.starts_with('@') => meaning(nickname)?,
            fields => fields,
        };
        let fields: Vec<_> = spelled.split([' ', '\t']).filter(|field| !field.is_empty()).collect();
        let [minute, hour, day, month, weekday] = fields.as_slice() else { return Err(miscounted(text, fields.len())) };
        let mut sets = Vec::new();
        for (field, text) in FIELDS.iter().zip([minute, hour, day, month, weekday]) {
            sets.push(field.parse(text)?);
        }
        let restricted = |text: &str| !text.starts_with('*');
        let walks = match restricted(day) && restricted(weekday) {
            false => vec![walk(&sets, true, true)?],
            true => vec![walk(&sets, true, false)?, walk(&sets, false, true)?],
        };
        let fixed_hours = restricted(hour) && !hour.contains('/');
        let cron = Self { text: text.trim().to_owned(), walks, fixed_hours };
        let first = cron.civil_after(DateTime::<Utc>::UNIX_EPOCH.naive_utc()).next();
        let never = || Error::usage(format!("`{text}` never comes")).hint("no year has such a day");
        first.map(|_| cron).ok_or_else(never)
    }
}

fn meaning(nickname: &str) -> Result<&'static str> {
    let found = NICKNAMES.iter().find(|(name, _)| *name == nickname).map(|(_, meaning)| *meaning);
    found.ok_or_else(|| {
        let names = NICKNAMES.map(|(name, _)| name).join(", ");
        Error::usage(format!("`{nickname}` is no time of cron(5) that has slots")).hint(format!("there are {names}"))
    })
}

fn miscounted(text: &str, count: usize) -> Error {
    let error = Error::usage(format!("`{text}` has {count} fields instead of five"));
    error.hint(match count {
        6 => "there is no field for seconds: minute, hour, day of month, month, day of week",
        _ => "write minute, hour, day of month, month, day of week: `30 3 * * 0` is Sundays at 03:30",
    })
}

/// Every field as a plain list, which the crate cannot read in another way.
fn walk(sets: &[BTreeSet<u8>], days: bool, weekdays: bool) -> Result<cron::Schedule> {
    let [minutes, hours, days_of_month, months, days_of_week] = sets else {
        return Err(Error::usage("a time of cron(5) has five fields"));
    };
    let list = |set: &BTreeSet<u8>| set.iter().map(u8::to_string).collect::<Vec<_>>().join(",");
    let names = |set: &BTreeSet<u8>| {
        let named = DAYS.iter().zip(0..).filter(|(_, day)| set.contains(day) || (*day == 0 && set.contains(&7)));
        named.map(|(name, _)| *name).collect::<Vec<_>>().join(",")
    };
    let (minutes, hours, months) = (list(minutes), list(hours), list(months));
    let days = if days { list(days_of_month) } else { "*".to_owned() };
    let weekdays = if weekdays { names(days_of_week) } else { "*".to_owned() };
    let spelled = format!("0 {minutes} {hours} {days} {months} {weekdays}");
    spelled.parse().map_err(|error| Error::failed(format!("`{spelled}` is not understood")).because(error))
}

impl Field {
    fn parse(&self, text: &str) -> Result<BTreeSet<u8>> {
        let mut set = BTreeSet::new();
        for element in text.split(',') {
            set.extend(self.element(element)?);
        }
        Ok(set)
    }

    /// `*`, `5`, `1-5`, `*/2`, `1-5/2`.
    fn element(&self, text: &str) -> Result<impl Iterator<Item = u8> + use<>> {
        let (range, step) = match text.split_once('/') {
            Some((range, step)) => (range, Some(step)),
            None => (text, None),
        };
        let (low, high) = match range.split_once('-') {
            _ if range == "*" => (self.low, self.high),
            Some((low, high)) => (self.value(low)?, self.end(high)?),
            None if step.is_some() => {
                let hint = format!("a step stands behind * or a range: {range}-{}/{}", self.high, step.unwrap_or("2"));
                return Err(self.wrong(text).hint(hint));
            }
            None => (self.value(range)?, self.value(range)?),
        };
        if low > high {
            return Err(self.wrong(text).because("the range ends before it begins"));
        }
        let step = step.map_or(Ok(1), |step| self.step(text, step))?;
        Ok((low..=high).step_by(step.into()))
    }

    fn step(&self, element: &str, step: &str) -> Result<u8> {
        let number = digits(step).filter(|step| (1..=self.high).contains(step));
        number.ok_or_else(|| {
            // `*/90` minutes would silently mean once an hour.
            let hint = format!("a step counts {}s within one turn: 1 to {}", self.name, self.high);
            self.wrong(element).because(format!("`{step}` is no step")).hint(hint)
        })
    }

    /// The end of a range: there `sun` is the day behind Saturday.
    fn end(&self, text: &str) -> Result<u8> {
        let last = self.names == DAYS && text.eq_ignore_ascii_case(DAYS[0]);
        if last { Ok(self.high) } else { self.value(text) }
    }

    fn value(&self, text: &str) -> Result<u8> {
        let named = self.names.iter().zip(self.first_name..).find(|(name, _)| name.eq_ignore_ascii_case(text));
        let value = named.map(|(_, value)| value).or_else(|| digits(text));
        value.filter(|value| (self.low..=self.high).contains(value)).ok_or_else(|| self.wrong(text))
    }

    fn wrong(&self, text: &str) -> Error {
        let names = match self.names {
            [first, .., last] => format!(" or {first} to {last}"),
            _ => String::new(),
        };
        Error::usage(format!("`{text}` is not a {}", self.name))
            .hint(format!("write {} to {}{names}; `*`, lists, ranges, and steps behind a range", self.low, self.high))
    }
}

/// Digits alone: `+5` is a number to the standard library and none to cron.
fn digits(text: &str) -> Option<u8> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

impl fmt::Display for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

impl Serialize for Cron {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}
