//! Records that a later drctl wrote: not damage, and not to be touched by one that does not understand them.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::model::{Error, Kind, Result};
use crate::repository::FORMAT;

/// What every record says of itself, whatever else a later version of it says.
#[derive(Debug, Deserialize)]
pub struct Versioned {
    format: u32,
}

/// Reads a record whose signature is good. Its version is looked at first: what a later one says besides need not be readable
/// here, nor mean what it seems to.
///
/// # Errors
/// [`Kind::Newer`] if a later drctl wrote it; [`Kind::Damaged`] if it is not readable. `key` is its name.
pub fn parse<T: DeserializeOwned>(key: &str, body: &[u8]) -> Result<T> {
    let wrong = || Error::damaged(format!("{key} is not readable"));
    known(key, &serde_json::from_slice(body).map_err(|error| wrong().because(error))?)?;
    serde_json::from_slice(body).map_err(|error| wrong().because(error))
}

/// Whether this program knows what a record of this version says.
///
/// # Errors
/// As [`parse`].
pub fn known(key: &str, Versioned { format }: &Versioned) -> Result<()> {
    match *format {
        FORMAT => Ok(()),
        0..FORMAT => Err(Error::damaged(format!("{key} is not readable")).because("no drctl ever wrote its format")),
        _ => {
            let error = Error::new(Kind::Newer, format!("{key} was written by a newer drctl"));
            Err(error.because(format!("it is of format {format}, and this drctl knows {FORMAT}")).hint(HINT))
        }
    }
}

/// What to do about it.
pub const HINT: &str = "use the drctl that wrote it, or a newer one";

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Record {
        #[allow(dead_code, reason = "read by its name")]
        format: u32,
    }

    #[test]
    fn a_later_version_is_told_from_damage_whatever_it_says() {
        let kind = |text: &str| parse::<Record>("pins/x", text.as_bytes()).map_err(|error| error.kind());
        assert!(kind(r#"{"format":1}"#).is_ok());
        for newer in [r#"{"format":2}"#, r#"{"format":2,"more":[]}"#, r#"{"more":{"format":1},"format":4294967295}"#] {
            assert_eq!(kind(newer).unwrap_err(), Kind::Newer, "{newer}");
        }
        for damaged in
            [r#"{"format":1,"more":[]}"#, r#"{"format":0}"#, r#"{"format":-2}"#, r#"{"format":"2"}"#, "{}", "2", ""]
        {
            assert_eq!(kind(damaged).unwrap_err(), Kind::Damaged, "{damaged}");
        }
        let error = parse::<Record>("pins/x", br#"{"format":2}"#).unwrap_err();
        assert!(error.to_string().starts_with("pins/x was written by a newer drctl"), "{error}");
    }
}
