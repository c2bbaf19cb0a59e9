//! Durations and sizes as people write them: `250ms`, `5s`, `10m`, `4h`, `30d`; `200MB`, `64GiB`.
//!
//! One number and one unit, no fractions: what is written is what is meant, and it reads back exactly.

use std::time::Duration;

use crate::model::{Error, Result};

const DURATIONS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

const SIZES: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("kB", 1_000),
    ("B", 1),
];

/// Reads a duration.
///
/// # Errors
/// Not a whole number followed by ms, s, m, h or d, or beyond 64 bits of milliseconds.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let milliseconds = split(text).and_then(|(number, unit)| {
        let (_, factor) = DURATIONS.iter().find(|(name, _)| *name == unit)?;
        number.checked_mul(*factor)
    });
    milliseconds.map(Duration::from_millis).ok_or_else(|| {
        Error::usage(format!("`{text}` is not a duration"))
            .hint("write a whole number and a unit: 250ms, 5s, 10m, 4h, 30d")
    })
}

/// Reads a size in bytes; a number without a unit counts bytes.
///
/// # Errors
/// Not a whole number followed by B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024), or beyond
/// 64 bits.
pub fn parse_size(text: &str) -> Result<u64> {
    let bytes = split(text).and_then(|(number, unit)| {
        let fits = |name: &str| name.eq_ignore_ascii_case(unit) || (name == "B" && unit.is_empty());
        let (_, factor) = SIZES.iter().find(|(name, _)| fits(name))?;
        number.checked_mul(*factor)
    });
    bytes.ok_or_else(|| {
        Error::usage(format!("`{text}` is not a size"))
            .hint("write a whole number and a unit: 200MB, 64GB, 16MiB, 64GiB")
    })
}

/// Writes a duration so that [`parse_duration`] reads it back; parts of a millisecond are cut off.
pub fn format_duration(duration: Duration) -> String {
    let milliseconds = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if milliseconds == 0 {
        return "0s".to_owned();
    }
    shortest(milliseconds, &DURATIONS)
}

/// Writes a size so that [`parse_size`] reads it back, in the unit with the smallest whole number.
pub fn format_size(bytes: u64) -> String {
    if bytes == 0 {
        return "0B".to_owned();
    }
    shortest(bytes, &SIZES)
}

/// The largest unit that divides the value; each table is sorted by falling factor and ends with 1.
fn shortest(value: u64, units: &[(&str, u64)]) -> String {
    let unit = units.iter().find(|(_, factor)| value.is_multiple_of(*factor));
    unit.map_or_else(String::new, |(name, factor)| format!("{}{name}", value / factor))
}

fn split(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    Some((number.parse().ok()?, unit.trim_start()))
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert_eq, proptest};

    use super::*;

    #[test]
    fn examples() {
        let duration = |text: &str| parse_duration(text).unwrap().as_millis();
        assert_eq!(["250ms", "5s", "10m", "4h", "1d"].map(duration), [250, 5_000, 600_000, 14_400_000, 86_400_000]);
        let size = |text: &str| parse_size(text).unwrap();
        assert_eq!(
            ["7", "7B", "200MB", "200 mb", "64GiB", "1kB"].map(size),
            [7, 7, 200_000_000, 200_000_000, 64 << 30, 1_000]
        );
        assert_eq!(format_size(64 << 30), "64GiB");
        assert_eq!(format_size(64_000_000_000), "64GB");
        assert_eq!(format_duration(Duration::from_secs(90)), "90s");
        assert_eq!(format_duration(Duration::from_secs(86_400)), "1d");
    }

    #[test]
    fn what_is_not_meant_is_refused() {
        for text in ["", "5", "s", "-5s", "1.5h", "5 parsecs", "5M", "99999999999999999999s", "18446744073709551615d"] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
        for text in ["", "MB", "-1MB", "1.5GB", "5XB", "99999999TiB"] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn durations_read_back(milliseconds: u64) {
            let duration = Duration::from_millis(milliseconds);
            prop_assert_eq!(parse_duration(&format_duration(duration)).unwrap(), duration);
        }

        #[test]
        fn sizes_read_back(number in 0u64..1 << 20, shift in 0u32..40) {
            prop_assert_eq!(parse_size(&format_size(number << shift)).unwrap(), number << shift);
        }

        #[test]
        fn no_text_makes_the_parsers_panic(text in ".{0,20}") {
            let _ = parse_duration(&text);
            let _ = parse_size(&text);
        }
    }
}
