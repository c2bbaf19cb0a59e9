//! Figures as people read them: sizes, durations, moments.

use std::time::Duration;

use chrono::{DateTime, Datelike, SubsecRound, Utc};

const SIZE_UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];

/// `1.65 GB`: three digits, decimal units.
pub fn bytes(value: u64) -> String {
    let (divisor, unit) = size_unit(value);
    format!("{} {unit}", three_digits(value, divisor))
}

/// `1.30/1.65 GB`: a part of a whole, in the unit of the whole.
pub fn bytes_of(part: u64, whole: u64) -> String {
    let (divisor, unit) = size_unit(whole);
    format!("{}/{} {unit}", three_digits(part, divisor), three_digits(whole, divisor))
}

fn size_unit(value: u64) -> (u64, &'static str) {
    let mut divisor = 1;
    let mut units = SIZE_UNITS.into_iter();
    let mut unit = units.next().unwrap_or_default();
    // 999.5 rounds to 1000, which belongs to the next unit.
    while u128::from(value) * 2 >= u128::from(divisor) * 1999 {
        let Some(next) = units.next() else { break };
        (divisor, unit) = (divisor * 1000, next);
    }
    (divisor, unit)
}

/// Three significant digits of `value / divisor`, rounded half up; a whole number when nothing is divided.
fn three_digits(value: u64, divisor: u64) -> String {
    let rounded =
        |scale: u64| (u128::from(value) * u128::from(scale) * 2 + u128::from(divisor)) / (u128::from(divisor) * 2);
    match (divisor, rounded(100), rounded(10)) {
        (1, ..) => value.to_string(),
        (_, hundredths @ 0..1000, _) => format!("{}.{:02}", hundredths / 100, hundredths % 100),
        (_, _, tenths @ 0..1000) => format!("{}.{}", tenths / 10, tenths % 10),
        _ => rounded(1).to_string(),
    }
}

/// `1 212`: thousands set apart by spaces.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped
}

/// `40 ms`, `0.8 s`, `48 s`, `6 min 48 s`, `2 h 14 min`, `3 d 4 h`: at most two units.
pub fn duration(value: Duration) -> String {
    let milliseconds = value.as_millis();
    let (tenths, seconds) = ((milliseconds + 50) / 100, (milliseconds + 500) / 1000);
    let minutes = (seconds + 30) / 60;
    let pair = |large: u128, large_unit: &str, small: u128, small_unit: &str| match small {
        0 => format!("{large} {large_unit}"),
        _ => format!("{large} {large_unit} {small} {small_unit}"),
    };
    match seconds {
        0 if milliseconds == 0 => "0 s".to_owned(),
        _ if milliseconds < 100 => format!("{milliseconds} ms"),
        _ if tenths < 100 && !milliseconds.is_multiple_of(1000) => format!("{}.{} s", tenths / 10, tenths % 10),
        0..60 => format!("{seconds} s"),
        60..3600 => pair(seconds / 60, "min", seconds % 60, "s"),
        _ if minutes < 1440 => pair(minutes / 60, "h", minutes % 60, "min"),
        _ => pair(minutes / 1440, "d", minutes % 1440 / 60, "h"),
    }
}

/// `3 h ago`, `in 12 min`, `2 days ago`: one unit, cut off rather than rounded, so that nothing looks older than it is.
pub fn relative(now: DateTime<Utc>, moment: DateTime<Utc>) -> String {
    let seconds = (now - moment).num_seconds();
    let (amount, unit) = match seconds.unsigned_abs() {
        near @ 0..60 => (near, "s"),
        near @ 60..3600 => (near / 60, "min"),
        near @ 3600..172_800 => (near / 3600, "h"),
        far => (far / 86_400, "days"),
    };
    match seconds {
        0 => "now".to_owned(),
        1.. => format!("{amount} {unit} ago"),
        _ => format!("in {amount} {unit}"),
    }
}

/// `3 h ago  01:04 UTC`: relative, with the absolute time beside it; the date stands there when the day is not obvious.
pub fn moment(now: DateTime<Utc>, moment: DateTime<Utc>) -> String {
    let format = match (now - moment).num_hours().abs() {
        0..24 => "%H:%M UTC",
        _ if now.year() == moment.year() => "%m-%d %H:%M UTC",
        _ => "%Y-%m-%d %H:%M UTC",
    };
    format!("{}  {}", relative(now, moment), moment.format(format))
}

/// `2026-11-20 03:54:59.981 UTC`: to the microsecond, as PostgreSQL keeps it, without zeros at the end.
pub fn utc(moment: DateTime<Utc>) -> String {
    let text = moment.trunc_subsecs(6).format("%Y-%m-%d %H:%M:%S%.6f").to_string();
    let (seconds, fraction) = text.split_once('.').unwrap_or((&text, ""));
    match fraction.trim_end_matches('0') {
        "" => format!("{seconds} UTC"),
        fraction => format!("{seconds}.{fraction} UTC"),
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone;
    use proptest::{prop_assert, proptest};

    use super::*;

    #[test]
    fn sizes() {
        let shown = [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.00 kB"),
            (999_499, "999 kB"),
            (999_500, "1.00 MB"),
            (18_240_000, "18.2 MB"),
            (254_000_000, "254 MB"),
            (1_645_000_000, "1.65 GB"),
            (9_996_000_000, "10.0 GB"),
            (u64::MAX, "18.4 EB"),
        ];
        for (value, text) in shown {
            assert_eq!(bytes(value), text);
        }
        assert_eq!(bytes_of(1_300_000_000, 1_650_000_000), "1.30/1.65 GB");
        assert_eq!([0, 999, 1_212, 913_345, 1_000_000].map(count), ["0", "999", "1 212", "913 345", "1 000 000"]);
    }

    #[test]
    fn durations() {
        let shown = [
            (0, "0 s"),
            (40, "40 ms"),
            (840, "0.8 s"),
            (5_000, "5 s"),
            (9_949, "9.9 s"),
            (9_950, "10 s"),
            (59_400, "59 s"),
            (59_600, "1 min"),
            (408_000, "6 min 48 s"),
            (8_040_000, "2 h 14 min"),
            (86_399_000, "1 d"),
            (273_600_000, "3 d 4 h"),
        ];
        for (milliseconds, text) in shown {
            assert_eq!(duration(Duration::from_millis(milliseconds)), text);
        }
    }

    #[test]
    fn moments() {
        let now = Utc.with_ymd_and_hms(2026, 11, 20, 4, 4, 0).unwrap();
        let shown = [
            (now, "now  04:04 UTC"),
            (now - chrono::Duration::seconds(12), "12 s ago  04:03 UTC"),
            (now - chrono::Duration::hours(3), "3 h ago  01:04 UTC"),
            (now - chrono::Duration::hours(27), "27 h ago  11-19 01:04 UTC"),
            (now - chrono::Duration::days(2), "2 days ago  11-18 04:04 UTC"),
            (now - chrono::Duration::days(400), "400 days ago  2025-10-16 04:04 UTC"),
            (now + chrono::Duration::minutes(12), "in 12 min  04:16 UTC"),
        ];
        for (then, text) in shown {
            assert_eq!(moment(now, then), text);
        }
        assert_eq!(utc(now), "2026-11-20 04:04:00 UTC");
        assert_eq!(utc(now + chrono::Duration::milliseconds(981)), "2026-11-20 04:04:00.981 UTC");
    }

    proptest! {
        #[test]
        fn no_figure_is_wider_than_its_column(value: u64) {
            prop_assert!(bytes(value).len() <= 7);
            prop_assert!(duration(Duration::from_millis(value % (1 << 40))).len() <= 12);
        }
    }
}
