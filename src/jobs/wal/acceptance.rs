//! The word of an operator that WAL which only certain regions hold is given up.
//!
//! It lies in the state directory, names the regions that were away when it was given, is good for no others, and counts
//! for an hour: what is away later may be another thing.

use std::collections::BTreeSet;
use std::path::PathBuf;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::disk::place;
use crate::jobs::context::Context;
use crate::model::{Error, RegionName, Result, TargetName};

const LIFE: TimeDelta = TimeDelta::hours(1);

/// What was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acceptance {
    /// The regions.
    pub regions: BTreeSet<RegionName>,
    /// Who said so.
    pub by: String,
    /// When.
    pub at: DateTime<Utc>,
}

fn path(context: &Context, target: &TargetName) -> PathBuf {
    context.state_dir.join(format!("{target}.accept-loss.json"))
}

/// Leaves the word for the receiver.
///
/// # Errors
/// The state directory.
pub fn leave(context: &Context, target: &TargetName, acceptance: &Acceptance) -> Result<()> {
    let text = serde_json::to_vec(acceptance).map_err(|error| Error::failed("encode an acceptance").because(error))?;
    Ok(place::place(&path(context, target), &text, 0o600)?)
}

/// The word, if there is one that still counts. Whoever acts on it says so: it is no quiet matter.
pub(super) fn read(context: &Context, target: &TargetName) -> Option<Acceptance> {
    let bytes = std::fs::read(path(context, target)).ok()?;
    match serde_json::from_slice::<Acceptance>(&bytes) {
        Ok(acceptance) if context.clock.now() - acceptance.at <= LIFE => Some(acceptance),
        Ok(acceptance) => {
            tracing::warn!(%target, at = %acceptance.at, "an accepted loss is too old to count");
            None
        }
        Err(error) => {
            tracing::error!(%target, %error, "an accepted loss is not readable");
            None
        }
    }
}
