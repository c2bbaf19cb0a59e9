//! Pins and holds: what must stay, whatever retention says.
//!
//! A pin is of one backup, a hold of a whole target with its WAL. Neither is ever changed: it ends with a second record of
//! its own, or at the moment that it names itself. So regions that were apart agree again by having both.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::codec::sign::split_text;
use crate::model::{BackupId, Error, PinId, Result, ResultExt, SignerId, TargetName};
use crate::repository::FORMAT;
use crate::repository::handle::{Repository, Writer};
use crate::repository::layout;
use crate::repository::records;
use crate::repository::regions::fan_out::{FanOut, LaneOutcome, Patience};
use crate::store::Digest;

const PIN: &str = "pin";
const UNPIN: &str = "unpin";

/// What must stay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// Version of the repository format.
    pub format: u32,
    /// Which.
    pub id: PinId,
    /// Of what.
    pub target: TargetName,
    /// The backup; `null` holds the whole target.
    pub backup: Option<BackupId>,
    /// Why.
    pub reason: String,
    /// When it ends by itself.
    pub until: Option<DateTime<Utc>>,
    /// When it was made.
    pub at: DateTime<Utc>,
    /// Where.
    pub host: String,
}

impl Pin {
    /// Whether it keeps the backup `id` of `target`.
    pub fn keeps(&self, target: &TargetName, id: &BackupId) -> bool {
        self.target == *target && self.backup.as_ref().is_none_or(|pinned| pinned == id)
    }

    /// What it does, in a few words.
    pub fn words(&self) -> String {
        let what = if self.backup.is_some() { "pinned" } else { "held" };
        format!("{what}: {}", self.reason)
    }
}

/// The end of a pin or a hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unpin {
    /// Version of the repository format.
    pub format: u32,
    /// Which.
    pub id: PinId,
    /// Of what.
    pub target: TargetName,
    /// Why.
    pub reason: String,
    /// When.
    pub at: DateTime<Utc>,
    /// Where.
    pub host: String,
}

/// Makes a pin or (without a backup) a hold; it counts from when this returns.
///
/// # Errors
/// The quorum was not reached.
pub async fn pin(
    repository: &Repository,
    writer: &Writer,
    (target, backup): (TargetName, Option<BackupId>),
    (reason, until): (String, Option<DateTime<Utc>>),
) -> Result<(Pin, Vec<LaneOutcome>)> {
    let at = writer.clock.now();
    let (id, host) = (PinId::new(at, writer.rng.as_ref())?, writer.host.clone());
    let pin = Pin { format: FORMAT, id, target, backup, reason, until, at, host };
    let key = layout::pin(&pin.target, &pin.id);
    let lanes = put(repository, writer, (PIN, key), &pin).await?;
    Ok((pin, lanes))
}

/// Ends a pin or a hold.
///
/// # Errors
/// The quorum was not reached.
pub async fn unpin(repository: &Repository, writer: &Writer, pin: &Pin, reason: String) -> Result<Vec<LaneOutcome>> {
    let (target, id, at, host) = (pin.target.clone(), pin.id.clone(), writer.clock.now(), writer.host.clone());
    let end = Unpin { format: FORMAT, id, target, reason, at, host };
    put(repository, writer, (UNPIN, layout::unpin(&pin.target, &pin.id)), &end).await
}

async fn put<T: Serialize>(
    repository: &Repository,
    writer: &Writer,
    (kind, key): (&str, String),
    record: &T,
) -> Result<Vec<LaneOutcome>> {
    let out = FanOut::new(&repository.regions, Patience::PUSH);
    repository.enroll(writer, &out).await.during(|| "enrol the signer")?;
    let body = records::encode(&repository.id, writer, (kind, &key), record)?;
    let digest = Digest::of(&body);
    out.put(key, body, digest).await?;
    Ok(out.drain().await)
}

/// The pins and holds that count at `now`, oldest first. One whose end is not readable still counts; one that is itself not
/// readable is an error in the second list, since nobody knows what it keeps.
///
/// # Errors
/// No region answers.
pub async fn active(
    repository: &Repository,
    target: Option<&TargetName>,
    now: DateTime<Utc>,
) -> Result<(Vec<Pin>, Vec<Error>)> {
    active_by(repository, target, (now, |_: &SignerId| true)).await
}

/// The same for whoever takes away what no pin keeps: only somebody on whom it relies ends one.
///
/// # Errors
/// No region answers.
pub async fn active_by(
    repository: &Repository,
    target: Option<&TargetName>,
    (now, relies_on): (DateTime<Utc>, impl Fn(&SignerId) -> bool),
) -> Result<(Vec<Pin>, Vec<Error>)> {
    let prefix = target.map_or_else(|| layout::PINS.to_owned(), layout::pins);
    let (mut pins, mut errors) = (Vec::new(), Vec::new());
    for key in repository.regions.list_union(&prefix).await? {
        match records::read::<Pin>(repository, (PIN, &key)).await {
            Ok(pin) if layout::pin(&pin.target, &pin.id) != key => {
                errors.push(Error::damaged(format!("{key} belongs elsewhere")));
            }
            Ok(pin) if pin.until.is_some_and(|until| until <= now) => {}
            Ok(pin) => match ended_by(repository, &pin).await {
                Some(signer) if relies_on(&signer) => {}
                Some(signer) => {
                    tracing::warn!(pin = %pin.id, %signer, "a pin was ended by a signer who is not listed, and keeps what it kept");
                    pins.push(pin);
                }
                None => pins.push(pin),
            },
            Err(error) => errors.push(error),
        }
    }
    pins.sort_by(|a, b| (a.at, &a.id).cmp(&(b.at, &b.id)));
    Ok((pins, errors))
}

/// Who ended it, if somebody did.
async fn ended_by(repository: &Repository, pin: &Pin) -> Option<SignerId> {
    let key = layout::unpin(&pin.target, &pin.id);
    let read = |bytes: Bytes| {
        let end: Unpin = records::decode(repository, (UNPIN, &key), &bytes)?;
        Ok((end, split_text(&bytes)?.signer))
    };
    let ((end, signer), _) = repository.regions.read(&key, None, read).await.ok()?;
    (end.id == pin.id && end.target == pin.target).then_some(signer)
}

/// Whether these bytes are the record of this name; for repair.
///
/// # Errors
/// They are not.
pub fn check(repository: &Repository, key: &str, bytes: &[u8]) -> Result<()> {
    let wrong = || Error::damaged(format!("{key} belongs elsewhere"));
    let right = match key.starts_with(layout::PINS) {
        true => {
            let pin: Pin = records::decode(repository, (PIN, key), bytes)?;
            layout::pin(&pin.target, &pin.id) == key
        }
        false => {
            let end: Unpin = records::decode(repository, (UNPIN, key), bytes)?;
            layout::unpin(&end.target, &end.id) == key
        }
    };
    if right { Ok(()) } else { Err(wrong()) }
}
