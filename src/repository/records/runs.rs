//! Records of runs: what became of every slot of every schedule. Signed and in clear text, so that metrics and people
//! read them without keys.

use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::future::join_all;

use crate::codec::sign::sign_text;
use crate::model::run::{FORMAT, Run, parse_slot};
use crate::model::{Error, RegionName, RepositoryId, Result, ScheduleName};
use crate::repository::handle::{Repository, Writer, enroll_at};
use crate::repository::layout;
use crate::store::{Digest, StoreError};

fn context(repository: &RepositoryId, key: &str) -> String {
    format!("run {repository} {key}")
}

fn encode(repository: &RepositoryId, writer: &Writer, run: &Run) -> Result<(String, Bytes)> {
    let key = layout::run(&run.schedule, run.slot);
    let mut body = serde_json::to_vec(run).map_err(|error| Error::failed("a run is not JSON").because(error))?;
    body.push(b'\n');
    let body = sign_text(&writer.signer, &context(repository, &key), &body)?;
    Ok((key, Bytes::from(body)))
}

/// Reads a record, and believes it only under its own name.
///
/// # Errors
/// It is damaged, not trusted, of a newer format, or belongs elsewhere.
pub fn decode(repository: &Repository, key: &str, bytes: &[u8]) -> Result<Run> {
    let wrong = |why: &str| Error::damaged(format!("{key} {why}"));
    let body = repository.trust.verify_text(&context(&repository.id, key), bytes)?;
    let run: Run = serde_json::from_slice(body).map_err(|error| wrong("is not readable").because(error))?;
    if run.format != FORMAT {
        return Err(wrong("was written by a newer drctl"));
    }
    if layout::run(&run.schedule, run.slot) == key { Ok(run) } else { Err(wrong("belongs elsewhere")) }
}

/// What a region made of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spread {
    /// It holds it.
    Held,
    /// It holds another record of this slot, which stays: somebody else ran the schedule too.
    Other,
    /// It could not be reached.
    Owed(String),
}

/// Puts a record into every region. The same record gives the same bytes, so it may be repeated until all hold it.
///
/// # Errors
/// The record cannot be signed. What a region says is in the result.
pub async fn spread(repository: &Repository, writer: &Writer, run: &Run) -> Result<Vec<(RegionName, Spread)>> {
    let (key, body) = encode(&repository.id, writer, run)?;
    let digest = Digest::of(&body);
    let puts = repository.regions.all().iter().map(|region| {
        let (key, body) = (key.as_str(), body.clone());
        async move {
            let put = async {
                // A record that nobody can verify would be worth nothing.
                enroll_at(region, writer).await?;
                match region.put(key, (body, digest), None).await {
                    Ok(_) => Ok(Spread::Held),
                    Err(StoreError::Conflict { .. }) => Ok(Spread::Other),
                    Err(error) => Err(Error::from(error)),
                }
            };
            (region.name.clone(), put.await.unwrap_or_else(|error| Spread::Owed(error.to_string())))
        }
    });
    Ok(join_all(puts).await)
}

/// The newest recorded slot of every schedule, from names alone.
///
/// # Errors
/// No region answers.
pub async fn newest_slots(repository: &Repository) -> Result<BTreeMap<ScheduleName, DateTime<Utc>>> {
    let mut newest = BTreeMap::new();
    for key in repository.regions.list_union(layout::RUNS).await? {
        let parsed = key.strip_prefix(layout::RUNS).and_then(|rest| rest.split_once('/'));
        let parsed = parsed.and_then(|(name, slot)| Some((name.parse::<ScheduleName>().ok()?, parse_slot(slot)?)));
        if let Some((name, slot)) = parsed {
            newest.entry(name).and_modify(|newest: &mut DateTime<Utc>| *newest = slot.max(*newest)).or_insert(slot);
        }
    }
    Ok(newest)
}

/// The newest `count` records of one schedule or of all, newest first, and those that no region holds intact.
///
/// # Errors
/// No region answers.
pub async fn newest(
    repository: &Repository,
    only: Option<&ScheduleName>,
    count: usize,
) -> Result<(Vec<Run>, Vec<Error>)> {
    let prefix = only.map_or_else(|| layout::RUNS.to_owned(), layout::runs);
    let mut keys: Vec<_> = repository.regions.list_union(&prefix).await?.into_iter().collect();
    // The last part is the slot, and slots sort by time.
    keys.sort_by(|a, b| b.rsplit('/').next().cmp(&a.rsplit('/').next()).then_with(|| a.cmp(b)));
    keys.truncate(count);
    let (mut runs, mut errors) = (Vec::new(), Vec::new());
    for key in keys {
        match repository.regions.read(&key, None, |bytes| decode(repository, &key, &bytes)).await {
            Ok((run, _)) => runs.push(run),
            Err(error) => errors.push(error),
        }
    }
    Ok((runs, errors))
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;
    use crate::model::run::Outcome;
    use crate::model::schedule::Job;
    use crate::repository::testing::tiny;

    fn run(slot: DateTime<Utc>) -> Run {
        Run {
            format: FORMAT,
            schedule: "ledger-base".parse().unwrap(),
            slot,
            first_slot: slot,
            slots: 1,
            job: Job::Backup,
            target: Some("ledger".parse().unwrap()),
            outcome: Outcome::Success,
            caught_up: false,
            attempts: 1,
            started_at: Some(slot),
            ended_at: slot + TimeDelta::minutes(3),
            detail: None,
            host: "db1".into(),
            drctl: "0.1.0".into(),
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_record_is_create_only_signed_and_bound_to_its_name() {
        let fixture = tiny(2, 1).await;
        let repository = fixture.reopen().await.unwrap();
        let run = run(DateTime::UNIX_EPOCH + TimeDelta::days(20_000));
        for _ in 0..2 {
            let spread = spread(&repository, &fixture.writer, &run).await.unwrap();
            assert!(spread.iter().all(|(_, spread)| *spread == Spread::Held), "{spread:?}");
        }
        let other = Run { outcome: Outcome::Failed, ..run.clone() };
        let refused = spread(&repository, &fixture.writer, &other).await.unwrap();
        assert!(refused.iter().all(|(_, spread)| *spread == Spread::Other), "{refused:?}");
        let (runs, errors) = newest(&repository, None, 5).await.unwrap();
        assert_eq!((runs, errors.len()), (vec![run.clone()], 0));
        assert_eq!(newest_slots(&repository).await.unwrap(), BTreeMap::from([(run.schedule.clone(), run.slot)]));

        let (key, bytes) = encode(&repository.id, &fixture.writer, &run).unwrap();
        let elsewhere = layout::run(&run.schedule, run.slot + TimeDelta::days(1));
        assert!(decode(&repository, &elsewhere, &bytes).is_err());
        for at in 0..bytes.len() {
            let mut damaged = bytes.to_vec();
            damaged[at] ^= 1;
            assert!(decode(&repository, &key, &damaged).is_err(), "byte {at}");
        }
    }
}
