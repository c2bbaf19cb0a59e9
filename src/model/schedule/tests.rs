//! All of cron(5), and what clocks do to it.

use std::collections::BTreeSet;

use chrono::{Datelike, NaiveDate, NaiveDateTime, TimeZone, Timelike};
use proptest::prelude::*;

use super::*;

fn cron(text: &str) -> Cron {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn utc(text: &str) -> DateTime<Utc> {
    NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M").unwrap().and_utc()
}

/// The first `count` slots after `after` (both in the zone's own time), as `MM-DD HH:MM +offset`.
fn slots(text: &str, zone: Tz, after: &str, count: usize) -> Vec<String> {
    let naive = NaiveDateTime::parse_from_str(after, "%Y-%m-%d %H:%M").unwrap();
    let after = zone.from_local_datetime(&naive).earliest().unwrap().to_utc();
    let cron = cron(text);
    let slots = cron.slots_after(zone, after).take(count);
    slots.map(|slot| slot.with_timezone(&zone).format("%m-%d %H:%M %:z").to_string()).collect()
}

/// The same in UTC, without the offset.
fn plain(text: &str, after: &str, count: usize) -> Vec<String> {
    let cron = cron(text);
    let slots = cron.slots_after(Tz::UTC, utc(after)).take(count);
    slots.map(|slot| slot.format("%a %m-%d %H:%M").to_string()).collect()
}

#[test]
fn every_spelling_of_cron5_means_what_the_manual_says() {
    // 2026-11-20 is a Friday.
    let table: [(&str, &[&str]); 19] = [
        ("* * * * *", &["Fri 11-20 10:31", "Fri 11-20 10:32"]),
        ("30 3 * * *", &["Sat 11-21 03:30", "Sun 11-22 03:30"]),
        ("*/20 * * * *", &["Fri 11-20 10:40", "Fri 11-20 11:00", "Fri 11-20 11:20"]),
        ("10-30/10 10 * * *", &["Sat 11-21 10:10", "Sat 11-21 10:20", "Sat 11-21 10:30", "Sun 11-22 10:10"]),
        ("5,35,50 10 * * *", &["Fri 11-20 10:35", "Fri 11-20 10:50", "Sat 11-21 10:05"]),
        ("05 07 * * *", &["Sat 11-21 07:05"]),
        ("0 */7 * * *", &["Fri 11-20 14:00", "Fri 11-20 21:00", "Sat 11-21 00:00"]),
        ("0 22-23,0 * * *", &["Fri 11-20 22:00", "Fri 11-20 23:00", "Sat 11-21 00:00"]),
        ("0 0 31 * *", &["Thu 12-31 00:00", "Sun 01-31 00:00", "Wed 03-31 00:00"]),
        ("0 0 29 2 *", &["Tue 02-29 00:00"]),
        ("0 0 1 jan,JUL *", &["Fri 01-01 00:00", "Thu 07-01 00:00"]),
        ("0 0 1 Mar-may *", &["Mon 03-01 00:00", "Thu 04-01 00:00", "Sat 05-01 00:00", "Wed 03-01 00:00"]),
        ("0 0 1 */6 *", &["Fri 01-01 00:00", "Thu 07-01 00:00"]),
        ("\t0  12 * *\tmon-fri ", &["Fri 11-20 12:00", "Mon 11-23 12:00"]),
        ("0 0 * * Fri-sun", &["Sat 11-21 00:00", "Sun 11-22 00:00", "Fri 11-27 00:00"]),
        ("0 0 * * sun-mon", &["Sun 11-22 00:00", "Mon 11-23 00:00", "Sun 11-29 00:00"]),
        ("0 0 * * 5-7", &["Sat 11-21 00:00", "Sun 11-22 00:00", "Fri 11-27 00:00"]),
        ("0 0 * * 1-5/2", &["Mon 11-23 00:00", "Wed 11-25 00:00", "Fri 11-27 00:00", "Mon 11-30 00:00"]),
        ("0 0 * * */2", &["Sat 11-21 00:00", "Sun 11-22 00:00", "Tue 11-24 00:00", "Thu 11-26 00:00"]),
    ];
    for (text, expected) in table {
        assert_eq!(plain(text, "2026-11-20 10:30", expected.len()), expected, "{text}");
    }
}

#[test]
fn nicknames_mean_their_five_fields() {
    let pairs = [
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
        ("@monthly", "0 0 1 * *"),
        ("@weekly", "0 0 * * 0"),
        ("@daily", "0 0 * * *"),
        ("@midnight", "0 0 * * *"),
        ("@hourly", "0 * * * *"),
    ];
    for (nickname, fields) in pairs {
        assert_eq!(plain(nickname, "2026-11-20 10:30", 5), plain(fields, "2026-11-20 10:30", 5), "{nickname}");
        assert_eq!(cron(nickname).to_string(), nickname);
    }
}

#[test]
fn zero_to_seven_name_the_seven_days_and_sunday_twice() {
    let days = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
    for (number, day) in days.iter().enumerate() {
        for spelled in [number.to_string(), day.to_string(), day.to_uppercase(), format!("{number}-{number}")] {
            let slots = plain(&format!("0 0 * * {spelled}"), "2026-11-20 10:30", 3);
            assert!(slots.iter().all(|slot| slot.starts_with(day)), "{spelled}: {slots:?}");
        }
    }
    for every in ["0-6", "1-7", "0-7", "*", "sun-sat", "mon-sun", "*/1"] {
        let slots = plain(&format!("0 0 * * {every}"), "2026-11-20 10:30", 7);
        let found: BTreeSet<_> = slots.iter().map(|slot| &slot[..3]).collect();
        assert_eq!((found.len(), slots[6].as_str()), (7, "Fri 11-27 00:00"), "{every}");
    }
}

#[test]
fn two_restricted_day_fields_are_alternatives_and_others_conditions() {
    let table: [(&str, &[&str]); 6] = [
        ("0 0 1 * mon", &["Mon 11-23 00:00", "Mon 11-30 00:00", "Tue 12-01 00:00", "Mon 12-07 00:00"]),
        ("0 0 23 * mon", &["Mon 11-23 00:00", "Mon 11-30 00:00"]),
        // A field that begins with * is not restricted, also with a step: both must fit.
        ("0 0 */10 * mon", &["Mon 12-21 00:00", "Mon 01-11 00:00"]),
        ("0 0 13 * */5", &["Sun 12-13 00:00", "Sun 06-13 00:00", "Fri 08-13 00:00"]),
        ("0 0 1-31 * mon", &["Sat 11-21 00:00", "Sun 11-22 00:00"]),
        ("0 0 13 * *", &["Sun 12-13 00:00", "Wed 01-13 00:00"]),
    ];
    for (text, expected) in table {
        assert_eq!(plain(text, "2026-11-20 10:30", expected.len()), expected, "{text}");
    }
}

#[test]
fn what_cron5_does_not_know_is_refused_with_a_reason() {
    let table = [
        ("", "has 0 fields"),
        ("* * * *", "has 4 fields"),
        ("0 30 3 * * 0", "has 6 fields"),
        ("* * * * * *", "has 6 fields"),
        ("60 * * * *", "`60` is not a minute"),
        ("* 24 * * *", "`24` is not a hour"),
        ("* * 0 * *", "`0` is not a day of month"),
        ("* * 32 * *", "`32` is not a day of month"),
        ("* * * 13 *", "`13` is not a month"),
        ("* * * 0 *", "`0` is not a month"),
        ("* * * * 8", "`8` is not a day of week"),
        ("* * * * monday", "`monday` is not a day of week"),
        ("* * * mon *", "`mon` is not a month"),
        ("jan * * * *", "`jan` is not a minute"),
        ("30-10 * * * *", "the range ends before it begins"),
        ("* * * * sat-fri", "the range ends before it begins"),
        ("*/0 * * * *", "`0` is no step"),
        ("*/90 * * * *", "`90` is no step"),
        ("5/15 * * * *", "`5/15` is not a minute"),
        ("1,,2 * * * *", "`` is not a minute"),
        ("+5 * * * *", "`+5` is not a minute"),
        ("-5 * * * *", "`` is not a minute"),
        ("? * * * *", "`?` is not a minute"),
        ("* * L * *", "`L` is not a day of month"),
        ("* * * * 5#2", "`5#2` is not a day of week"),
        ("0 0 30 2 *", "never comes"),
        ("0 0 31 2,4,6,9,11 *", "never comes"),
        ("@reboot", "is no time of cron(5) that has slots"),
        ("@every 5m", "is no time of cron(5) that has slots"),
    ];
    for (text, expected) in table {
        let error = text.parse::<Cron>().unwrap_err();
        assert!(
            error.to_string().contains(expected) && (error.hint_text().is_some() || expected.contains("the range")),
            "{text}: {error}"
        );
    }
}

#[test]
fn a_named_hour_runs_once_after_a_gap_and_once_in_a_fold() {
    use chrono_tz::{America::New_York, Australia::Lord_Howe, Europe::Berlin, Pacific::Apia};
    let table: [(&str, Tz, &str, &[&str]); 14] = [
        // Berlin: 02:00 to 03:00 do not exist on 03-29, and exist twice on 10-25.
        ("30 2 * * *", Berlin, "2026-03-28 01:00", &["03-28 02:30 +01:00", "03-29 03:00 +02:00", "03-30 02:30 +02:00"]),
        ("0,15,30 2 * * *", Berlin, "2026-03-28 12:00", &["03-29 03:00 +02:00", "03-30 02:00 +02:00"]),
        ("0 2,3 * * *", Berlin, "2026-03-28 12:00", &["03-29 03:00 +02:00", "03-30 02:00 +02:00"]),
        ("0 2,4 * * *", Berlin, "2026-03-28 12:00", &["03-29 03:00 +02:00", "03-29 04:00 +02:00"]),
        ("30 2 * * *", Berlin, "2026-10-24 12:00", &["10-25 02:30 +02:00", "10-26 02:30 +01:00"]),
        (
            "*/30 2-3 * * *",
            Berlin,
            "2026-10-24 12:00",
            &["10-25 02:00 +02:00", "10-25 02:30 +02:00", "10-25 03:00 +01:00"],
        ),
        ("30 2 * * sun", Berlin, "2026-03-28 12:00", &["03-29 03:00 +02:00", "04-05 02:30 +02:00"]),
        // New York: 02:00 to 03:00 on 03-08; 01:00 to 02:00 twice on 11-01.
        ("30 2 * * *", New_York, "2026-03-07 12:00", &["03-08 03:00 -04:00", "03-09 02:30 -04:00"]),
        ("30 1 * * *", New_York, "2026-10-31 12:00", &["11-01 01:30 -04:00", "11-02 01:30 -05:00"]),
        // Lord Howe moves by half an hour: 02:00 to 02:30 on 10-04; 01:30 to 02:00 twice on 04-05.
        ("15 2 * * *", Lord_Howe, "2026-10-03 12:00", &["10-04 02:30 +11:00", "10-05 02:15 +11:00"]),
        ("*/15 2 * * *", Lord_Howe, "2026-10-03 12:00", &["10-04 02:30 +11:00", "10-04 02:45 +11:00"]),
        ("45 1 * * *", Lord_Howe, "2026-04-04 12:00", &["04-05 01:45 +11:00", "04-06 01:45 +10:30"]),
        // Apia had no 2011-12-30, which was a Friday.
        ("0 12 * * *", Apia, "2011-12-29 11:00", &["12-29 12:00 -10:00", "12-31 00:00 +14:00", "12-31 12:00 +14:00"]),
        ("0 12 * * fri", Apia, "2011-12-29 11:00", &["12-31 00:00 +14:00", "01-06 12:00 +14:00"]),
    ];
    for (text, zone, after, expected) in table {
        assert_eq!(slots(text, zone, after, expected.len()), expected, "{text} in {zone} after {after}");
    }
}

#[test]
fn stars_and_steps_follow_elapsed_time() {
    use chrono_tz::{America::New_York, America::St_Johns, Australia::Lord_Howe, Europe::Berlin, Pacific::Apia};
    let table: [(&str, Tz, &str, &[&str]); 9] = [
        ("30 * * * *", Berlin, "2026-03-29 01:00", &["03-29 01:30 +01:00", "03-29 03:30 +02:00", "03-29 04:30 +02:00"]),
        ("30 * * * *", Berlin, "2026-10-25 01:45", &["10-25 02:30 +02:00", "10-25 02:30 +01:00", "10-25 03:30 +01:00"]),
        ("0 */2 * * *", Berlin, "2026-03-28 23:00", &["03-29 00:00 +01:00", "03-29 04:00 +02:00"]),
        (
            "0 0-23/2 * * *",
            Berlin,
            "2026-10-25 01:00",
            &["10-25 02:00 +02:00", "10-25 02:00 +01:00", "10-25 04:00 +01:00"],
        ),
        ("*/30 * * * *", New_York, "2026-03-08 01:15", &["03-08 01:30 -05:00", "03-08 03:00 -04:00"]),
        (
            "*/30 * * * *",
            New_York,
            "2026-11-01 01:15",
            &["11-01 01:30 -04:00", "11-01 01:00 -05:00", "11-01 01:30 -05:00", "11-01 02:00 -05:00"],
        ),
        (
            "*/15 * * * *",
            Lord_Howe,
            "2026-04-05 01:40",
            &["04-05 01:45 +11:00", "04-05 01:30 +10:30", "04-05 01:45 +10:30", "04-05 02:00 +10:30"],
        ),
        ("0 */6 * * *", Apia, "2011-12-29 17:00", &["12-29 18:00 -10:00", "12-31 00:00 +14:00", "12-31 06:00 +14:00"]),
        // The clock went back at one minute past midnight, into the day before.
        (
            "0,30 * * * *",
            St_Johns,
            "2010-11-06 23:25",
            &["11-06 23:30 -02:30", "11-07 00:00 -02:30", "11-06 23:30 -03:30", "11-07 00:00 -03:30"],
        ),
    ];
    for (text, zone, after, expected) in table {
        assert_eq!(slots(text, zone, after, expected.len()), expected, "{text} in {zone} after {after}");
    }
}

#[test]
fn a_share_of_the_jitter_never_changes() {
    let name: ScheduleName = "ledger-base".parse().unwrap();
    let longest = Duration::from_secs(600);
    let shares: Vec<_> = (1..=4).map(|day| jitter(&name, utc(&format!("2026-11-0{day} 01:00")), longest)).collect();
    // Another version that drew others would start slots a second time after an upgrade.
    assert_eq!(shares.iter().map(Duration::as_millis).collect::<Vec<_>>(), PINNED);
    assert!(shares.iter().all(|share| *share <= longest));
    assert_eq!(jitter(&name, utc("2026-11-01 01:00"), Duration::ZERO), Duration::ZERO);
    let other = jitter(&"orders-base".parse().unwrap(), utc("2026-11-01 01:00"), longest);
    assert_ne!(other, shares[0]);
}

const PINNED: [u128; 4] = [557_374, 291_118, 56_224, 121_297];

/// A field as text, beside the values that it names.
fn field(low: u8, high: u8) -> impl Strategy<Value = (String, BTreeSet<u8>)> {
    let whole = (low..=high).collect::<BTreeSet<_>>();
    let star = Just(("*".to_owned(), whole));
    let stepped = (1..=high).prop_map(move |step| (format!("*/{step}"), (low..=high).step_by(step.into()).collect()));
    let element = (low..=high, low..=high, 1..=high).prop_map(|(a, b, step)| {
        let (a, b) = (a.min(b), a.max(b));
        match step % 3 {
            0 => (format!("{a}"), BTreeSet::from([a])),
            1 => (format!("{a}-{b}"), (a..=b).collect()),
            _ => (format!("{a}-{b}/{step}"), (a..=b).step_by(step.into()).collect()),
        }
    });
    let list = proptest::collection::vec(element, 1..3).prop_map(|elements| {
        let texts: Vec<_> = elements.iter().map(|(text, _)| text.clone()).collect();
        (texts.join(","), elements.into_iter().flat_map(|(_, set)| set).collect())
    });
    prop_oneof![2 => star, 1 => stepped, 3 => list]
}

/// Five fields, and a plain reading of the manual beside them.
#[derive(Debug, Clone)]
struct Reading {
    text: String,
    sets: Vec<BTreeSet<u8>>,
    either_day: bool,
    fixed_hours: bool,
}

impl Reading {
    fn fits(&self, civil: NaiveDateTime) -> bool {
        let has = |index: usize, value: u32| self.sets[index].contains(&u8::try_from(value).unwrap());
        let weekday = civil.weekday().num_days_from_sunday();
        let (day, weekday) = (has(2, civil.day()), has(4, weekday) || weekday == 0 && has(4, 7));
        let days = if self.either_day { day || weekday } else { day && weekday };
        days && has(0, civil.minute()) && has(1, civil.hour()) && has(3, civil.month())
    }
}

fn reading() -> impl Strategy<Value = Reading> {
    // Months are left whole, so that windows of days hold slots.
    (field(0, 59), field(0, 23), field(1, 31), field(0, 7)).prop_map(|(minute, hour, day, weekday)| Reading {
        either_day: !day.0.starts_with('*') && !weekday.0.starts_with('*'),
        fixed_hours: !hour.0.starts_with('*') && !hour.0.contains('/'),
        text: format!("{} {} {} * {}", minute.0, hour.0, day.0, weekday.0),
        sets: vec![minute.1, hour.1, day.1, (1..=12).collect(), weekday.1],
    })
}

/// Days on which some clock does something, and one on which none does.
fn window() -> impl Strategy<Value = (Tz, DateTime<Utc>)> {
    let places = [
        (Tz::UTC, "2026-03-28 00:00"),
        (Tz::Europe__Berlin, "2026-03-28 12:07"),
        (Tz::Europe__Berlin, "2026-10-24 12:00"),
        (Tz::America__New_York, "2026-03-07 12:00"),
        (Tz::America__New_York, "2026-10-31 12:30"),
        (Tz::Australia__Lord_Howe, "2026-10-02 20:00"),
        (Tz::Australia__Lord_Howe, "2026-04-03 20:00"),
        (Tz::Pacific__Apia, "2011-12-29 12:00"),
        (Tz::America__St_Johns, "2010-11-06 12:00"),
        (Tz::Africa__Casablanca, "2026-02-14 12:00"),
        (Tz::Asia__Kathmandu, "2026-11-20 12:00"),
    ];
    (0..places.len(), 0..600i64).prop_map(move |(place, minutes)| {
        let (zone, start) = places[place];
        (zone, utc(start) + TimeDelta::minutes(minutes))
    })
}

/// Looks at the clock on the wall every minute, as cron does.
fn by_the_clock(reading: &Reading, zone: Tz, after: DateTime<Utc>, until: DateTime<Utc>) -> Vec<DateTime<Utc>> {
    let minute = TimeDelta::minutes(1);
    let shown = |instant: DateTime<Utc>| instant.with_timezone(&zone).naive_local();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    let mut instant = after - TimeDelta::days(1);
    while instant <= until {
        let (before, now) = (shown(instant - minute), shown(instant));
        let first_time = seen.insert(now);
        let skipped = std::iter::successors(Some(before + minute), |civil| Some(*civil + minute));
        let made_up = reading.fixed_hours && skipped.take_while(|civil| *civil < now).any(|civil| reading.fits(civil));
        let fits = reading.fits(now) && (first_time || !reading.fixed_hours);
        if instant > after && (fits || made_up) {
            found.push(instant);
        }
        instant += minute;
    }
    found
}

proptest! {
    #[test]
    fn slots_are_what_a_clock_on_the_wall_shows(reading in reading(), (zone, start) in window()) {
        let Ok(cron) = reading.text.parse::<Cron>() else {
            return Err(TestCaseError::reject("a day that never comes"));
        };
        let until = start + TimeDelta::hours(60);
        let expected = by_the_clock(&reading, zone, start, until);
        let slots: Vec<_> = cron.slots_after(zone, start).take_while(|slot| *slot <= until).collect();
        prop_assert_eq!(&slots, &expected, "{} in {}", reading.text, zone);
        prop_assert!(slots.is_sorted_by(|a, b| a < b));
        // One after the other gives the same as all together.
        let mut last = start;
        for slot in slots.iter().take(50) {
            last = cron.slots_after(zone, last).next().unwrap();
            prop_assert_eq!(last, *slot);
        }
    }

    #[test]
    fn far_slots_fit_their_fields(reading in reading(), month in 1u8..=12, year in 2000i32..2090) {
        let mut reading = reading;
        reading.sets[3] = BTreeSet::from([month]);
        let fields: Vec<_> = reading.text.split(' ').collect();
        let text = format!("{} {} {} {month} {}", fields[0], fields[1], fields[2], fields[4]);
        let start = NaiveDate::from_ymd_opt(year, 1, 31).unwrap().and_hms_opt(23, 59, 59).unwrap();
        if let Ok(cron) = text.parse::<Cron>() {
            for slot in cron.slots_after(Tz::UTC, start.and_utc()).take(20) {
                prop_assert!(reading.fits(slot.naive_utc()), "{text}: {slot}");
            }
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "[-0-9a-z*/,@ ?#]{0,24}") {
        let _ = text.parse::<Cron>();
        let _ = format!("{text} * * * *").parse::<Cron>();
    }
}
