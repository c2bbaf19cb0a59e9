//! Moments as people type them.

use chrono::{DateTime, FixedOffset, NaiveDateTime, Timelike, Utc};

use crate::model::{Error, Result};

/// Reads `2026-11-20 03:55`, with seconds, a fraction and an offset (`Z`, `UTC`, `+02`, `+02:00`) if wanted. Without an
/// offset it is UTC: the local zone of whoever types is not the one of whoever reads the plan.
///
/// # Errors
/// Anything else.
pub fn parse(text: &str) -> Result<DateTime<Utc>> {
    read(text).ok_or_else(|| {
        Error::usage(format!("`{text}` is not a time"))
            .hint("write '2026-11-20 03:55' (UTC), with seconds and an offset if wanted: '2026-11-20 03:55:07.5+02'")
    })
}

fn read(text: &str) -> Option<DateTime<Utc>> {
    let (date, clock) = text.trim().split_once(['T', 't', ' '])?;
    let (clock, offset) = split_offset(clock.trim())?;
    let spelled = format!("{date} {}", clock.trim());
    let formats = ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M"];
    let naive = formats.iter().find_map(|format| NaiveDateTime::parse_from_str(&spelled, format).ok())?;
    // PostgreSQL has no leap seconds, so no commit bears one.
    let plain = naive.nanosecond() < 1_000_000_000;
    plain.then(|| naive.and_local_timezone(offset).single()).flatten().map(|moment| moment.to_utc())
}

fn split_offset(clock: &str) -> Option<(&str, FixedOffset)> {
    let utc = FixedOffset::east_opt(0)?;
    if let Some(clock) = ["Z", "z", "UTC", "utc"].iter().find_map(|zone| clock.strip_suffix(zone)) {
        return Some((clock, utc));
    }
    let Some(sign) = clock.find(['+', '-']) else { return Some((clock, utc)) };
    let (clock, offset) = clock.split_at_checked(sign)?;
    let digits: String = offset.get(1..)?.chars().filter(|c| *c != ':').collect();
    let (hours, minutes) = digits.split_at_checked(2)?;
    let minutes = if minutes.is_empty() { "00" } else { minutes };
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<i32>().ok()).flatten();
    let (hours, minutes) = (number(hours)?, Some(number(minutes)?).filter(|m| *m < 60 && digits.len() <= 4)?);
    let seconds = hours * 3600 + minutes * 60;
    let offset = FixedOffset::east_opt(if offset.starts_with('-') { -seconds } else { seconds })?;
    Some((clock, offset))
}

#[cfg(test)]
mod tests {
    use chrono::{SecondsFormat, TimeZone};
    use proptest::{prop_assert_eq, proptest};

    use super::*;

    #[test]
    fn every_spelling_means_one_moment() {
        let spellings = [
            "2026-11-20 03:55",
            " 2026-11-20  03:55:00 ",
            "2026-11-20T03:55:00Z",
            "2026-11-20 03:55:00 UTC",
            "2026-11-20 03:55:00+00",
            "2026-11-20 05:55:00.000+02",
            "2026-11-20 05:55+0200",
            "2026-11-19 22:25:00-05:30",
        ];
        for text in spellings {
            assert_eq!(parse(text).unwrap().to_rfc3339_opts(SecondsFormat::Millis, true), "2026-11-20T03:55:00.000Z");
        }
        assert_eq!(parse("2026-11-20 03:55:07.123456").unwrap().timestamp_subsec_micros(), 123_456);
    }

    #[test]
    fn what_is_not_meant_is_refused() {
        for text in [
            "",
            "now",
            "2026-11-20",
            "03:55",
            "2026-11-20 25:00",
            "2026-11-20 03:55:60",
            "2026-11-20 03:55 CET",
            "2026-11-20 03:55+1",
            "2026-11-20 03:55+02:99",
            "2026-11-20 03:55+020000",
            "20.11.2026 03:55",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn a_moment_reads_back(micros in 0i64..4_000_000_000_000_000) {
            let moment = Utc.timestamp_micros(micros).unwrap();
            prop_assert_eq!(parse(&moment.to_rfc3339()).unwrap(), moment);
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,40}") {
            let _ = parse(&text);
            let _ = parse(&format!("2026-11-20 {text}"));
        }
    }
}
