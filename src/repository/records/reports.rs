//! Reports: the evidence of what was done and found, in every region beside the backups.
//!
//! A report has a head in clear text, which metrics and prune read without keys, and a body sealed with the reporter's own
//! keyset, because what was found in the data is data. One signature covers both.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::future::join_all;
use serde::{Deserialize, Serialize};

use crate::codec::compress::{pack_payload, unpack_payload};
use crate::codec::seal::{Aad, Unit, open, seal};
use crate::codec::sign::{sign_text, split_text};
use crate::keys::keyset::Keyset;
use crate::model::{
    BackupId, Error, KeysetId, RegionName, ReportId, RepositoryId, Result, ResultExt, SignerId, TargetName,
};
use crate::repository::format::{self, Versioned};
use crate::repository::handle::{Repository, Writer, signer_record};
use crate::repository::keysets::{self, KeyRing};
use crate::repository::layout;
use crate::repository::regions::Region;
use crate::repository::regions::fan_out::LaneOutcome;
use crate::store::{Digest, StoreError};

/// A report is small and about the past: nobody waits for a region long.
const REGION_PATIENCE: Duration = Duration::from_secs(10);

/// What everybody may read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportHead {
    /// Version of the repository format.
    pub format: u32,
    /// The report.
    pub id: ReportId,
    /// What was done: `drill`, `restore`, `promotion`.
    pub job: String,
    /// To what.
    pub target: TargetName,
    /// With which backup.
    pub backup: Option<BackupId>,
    /// From which region.
    pub region: Option<RegionName>,
    /// `pass`, `fail`, `inconclusive`.
    pub outcome: String,
    /// The deepest level that was proven, `L4` to `L7`.
    pub level: Option<String>,
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// When it was over.
    pub finished_at: DateTime<Utc>,
    /// Recovery point objective and what was measured, in seconds.
    pub rpo: (Option<f64>, Option<f64>),
    /// Recovery time objective and what was measured, in seconds.
    pub rto: (Option<f64>, Option<f64>),
    /// The phases of the recovery time, in seconds.
    pub phases: Vec<(String, f64)>,
    /// What was looked at, by name, and whether it was as it should be. Names say nothing of what is in the data.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<(String, bool)>,
    /// Of a drill of a copy: the backups of its moment that it was compared with, page by page, and is the same as.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub same_as: Vec<BackupId>,
    /// Who did it.
    pub host: String,
    /// drctl's version.
    pub drctl: String,
}

impl ReportHead {
    /// Whether it proves its backup: a drill restored, started, replayed and opened it, and found what it looked for.
    pub fn proves(&self) -> bool {
        let deep = self.level.as_deref().is_some_and(|level| ("L4"..="L7").contains(&level));
        self.job == "drill" && self.outcome == "pass" && deep
    }
}

/// What only holders of keys read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportBody {
    /// The whole report, by the schema of its job.
    pub report: serde_json::Value,
    /// The same for people.
    pub markdown: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    head: ReportHead,
    keyset: KeysetId,
    /// Sealed, base64.
    body: String,
}

/// As much of a stored report as every version of it has.
#[derive(Deserialize)]
struct Headed {
    head: Versioned,
}

fn context(repository: &RepositoryId, id: &ReportId) -> String {
    format!("report {repository} {id}")
}

fn aad<'a>(repository: &'a RepositoryId, keyset: &'a KeysetId, id: &'a ReportId) -> Aad<'a> {
    Aad { repository, keyset, kind: Unit::Report, id: id.as_str() }
}

fn encode(
    repository: &RepositoryId,
    writer: &Writer,
    keyset: &Keyset,
    (head, body): (&ReportHead, &ReportBody),
) -> Result<Bytes> {
    let not_json = |error| Error::failed("a report is not JSON").because(error);
    let key = keyset.data().ok_or_else(|| Error::failed("the report's keyset lacks its data secret"))?;
    let plain = pack_payload(3, &serde_json::to_vec(body).map_err(not_json)?)?;
    let sealed = seal(key, &aad(repository, keyset.id(), &head.id), &plain)?;
    let stored = Stored { head: head.clone(), keyset: keyset.id().clone(), body: STANDARD.encode(sealed) };
    let mut text = serde_json::to_vec(&stored).map_err(not_json)?;
    text.push(b'\n');
    Ok(Bytes::from(sign_text(&writer.signer, &context(repository, &head.id), &text)?))
}

fn decode_stored(repository: &Repository, key: &str, bytes: &[u8]) -> Result<Stored> {
    let wrong = |why: &str| Error::damaged(format!("{key} {why}"));
    let id: ReportId = key.rsplit('/').next().unwrap_or_default().parse().map_err(|_| wrong("is no report"))?;
    let text = repository.trust.verify_text(&context(&repository.id, &id), bytes)?;
    // Its version stands in its head.
    let headed: Headed = serde_json::from_slice(text).map_err(|error| wrong("is not readable").because(error))?;
    format::known(key, &headed.head)?;
    let stored: Stored = serde_json::from_slice(text).map_err(|error| wrong("is not readable").because(error))?;
    let own = stored.head.id == id && layout::report(&stored.head.target, &id) == key;
    if own { Ok(stored) } else { Err(wrong("belongs elsewhere")) }
}

/// Reads the head of a stored report, and believes it only under its own name.
///
/// # Errors
/// It is damaged, not trusted, of a newer format, or belongs elsewhere.
pub fn decode_head(repository: &Repository, key: &str, bytes: &[u8]) -> Result<ReportHead> {
    decode_stored(repository, key, bytes).map(|stored| stored.head)
}

/// A report as it goes into every region, with everything that it takes to read it there. The same bytes may be put again
/// and again, so it waits safely in a file for a region that is away, and nobody needs a key to bring it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sealed {
    /// The report.
    pub id: ReportId,
    objects: Vec<SealedObject>,
}

impl Sealed {
    fn signer(&self) -> Option<SignerId> {
        self.objects.iter().find_map(|object| object.key.strip_prefix(layout::SIGNERS)?.parse().ok())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SealedObject {
    key: String,
    /// base64.
    body: String,
}

/// Seals and signs a report.
///
/// # Errors
/// No key holder wrapped its keyset.
pub async fn seal_report(
    repository: &Repository,
    writer: &Writer,
    head: &ReportHead,
    body: &ReportBody,
) -> Result<Sealed> {
    let drawn = keysets::draw(&repository.id, &head.target, &writer.holders, writer.rng.as_ref()).await;
    let (keyset, wraps) = drawn.during(|| "draw a keyset for the report")?;
    let bytes = encode(&repository.id, writer, &keyset, (head, body))?;
    let signer = (layout::signer(writer.signer.id()), signer_record(writer)?);
    let objects = [(signer.0, Bytes::from(signer.1))].into_iter().chain(wraps);
    let objects = objects.chain([(layout::report(&head.target, &head.id), bytes)]);
    let objects = objects.map(|(key, body)| SealedObject { key, body: STANDARD.encode(body) }).collect();
    Ok(Sealed { id: head.id.clone(), objects })
}

/// Puts a report into every region. One that holds it is enough for it to count, because a report about an outage must not
/// wait for its end.
pub async fn spread(repository: &Repository, sealed: &Sealed) -> Vec<LaneOutcome> {
    let puts = repository.regions.all().iter().map(|region| async move {
        let mut held = 0;
        let put = async {
            // The report last: what is there can be read.
            let Some((report, needed)) = sealed.objects.split_last() else { return Ok(()) };
            let puts = needed.iter().map(|object| put_object(region, object));
            for put in join_all(puts).await {
                put?;
                held += 1;
            }
            put_object(region, report).await?;
            held += 1;
            Ok::<_, Error>(())
        };
        let put = tokio::time::timeout(REGION_PATIENCE, put).await;
        let error = match put {
            Ok(put) => put.err().map(|error| error.to_string()),
            Err(_) => Some(format!("it did not answer within {} s", REGION_PATIENCE.as_secs())),
        };
        let missing_objects = (sealed.objects.len() - held) as u64;
        LaneOutcome { region: region.name.clone(), missing_objects, last_error: error }
    });
    let outcomes = join_all(puts).await;
    if outcomes.iter().any(|lane| lane.missing_objects == 0)
        && !sealed.signer().is_some_and(|signer| repository.trust.knows(&signer))
        && let Err(error) = repository.trust.refresh(&repository.regions).await
    {
        tracing::info!(%error, "the signers were not read again");
    }
    outcomes
}

async fn put_object(region: &Region, SealedObject { key, body }: &SealedObject) -> Result<()> {
    let damaged = |error| Error::damaged("a report in the state directory is not readable").because(error);
    let body = Bytes::from(STANDARD.decode(body).map_err(damaged)?);
    let digest = Digest::of(&body);
    // Another host's record of the same signer says the same, and it is there most often: a put that meets it would ask
    // twice more.
    let is_signer = key.starts_with(layout::SIGNERS);
    if is_signer && region.store.head(key).await.is_ok() {
        return Ok(());
    }
    match region.put(key, (body, digest), None).await {
        Ok(_) => Ok(()),
        Err(StoreError::Conflict { .. }) if is_signer => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The heads of all reports, oldest first, and those that no region holds intact.
///
/// # Errors
/// No region answers.
pub async fn list(repository: &Repository, target: Option<&TargetName>) -> Result<(Vec<ReportHead>, Vec<Error>)> {
    let (heads, errors) = list_signed(repository, target).await?;
    Ok((heads.into_iter().map(|(head, _)| head).collect(), errors))
}

/// The same, each with who signed it.
///
/// # Errors
/// No region answers.
pub async fn list_signed(
    repository: &Repository,
    target: Option<&TargetName>,
) -> Result<(Vec<(ReportHead, SignerId)>, Vec<Error>)> {
    let prefix = target.map_or_else(|| layout::REPORTS.to_owned(), layout::reports);
    let (mut heads, mut errors) = (Vec::new(), Vec::new());
    for key in repository.regions.list_union(&prefix).await? {
        let check = |bytes: Bytes| Ok((decode_head(repository, &key, &bytes)?, split_text(&bytes)?.signer));
        match repository.regions.read(&key, None, check).await {
            Ok((head, _)) => heads.push(head),
            Err(error) => errors.push(error),
        }
    }
    heads.sort_by(|(a, _): &(ReportHead, _), (b, _)| (a.started_at, &a.id).cmp(&(b.started_at, &b.id)));
    Ok((heads, errors))
}

/// A report with its body.
///
/// # Errors
/// No region holds it intact, or no key opens it.
pub async fn read(repository: &Repository, ring: &KeyRing, id: &ReportId) -> Result<(ReportHead, ReportBody)> {
    let key = layout::report(&id.target()?, id);
    let parse = |bytes: Bytes| decode_stored(repository, &key, &bytes);
    let (stored, _) = repository.regions.read(&key, None, parse).await?;
    let keyset: Arc<Keyset> = ring.open(&stored.head.target, &stored.keyset).await?;
    let secret = keyset.data().ok_or_else(|| Error::failed("the report's keyset lacks its data secret"))?;
    let wrong = || Error::damaged(format!("the body of report {id} is not readable"));
    let sealed = STANDARD.decode(&stored.body).map_err(|error| wrong().because(error))?;
    let payload =
        open(secret, &aad(&repository.id, &stored.keyset, id), &sealed).during(|| format!("open report {id}"))?;
    let plain = unpack_payload(&payload, None).during(|| format!("unpack report {id}"))?;
    let body = serde_json::from_slice(&plain).map_err(|error| wrong().because(error))?;
    Ok((stored.head, body))
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;
    use crate::observe::progress::Progress;
    use crate::repository::FORMAT;
    use crate::repository::mend::{Scope, mend};
    use crate::repository::testing::{Fault, tiny};

    fn head(id: &ReportId) -> ReportHead {
        let at = DateTime::UNIX_EPOCH + TimeDelta::days(20_000);
        ReportHead {
            format: FORMAT,
            id: id.clone(),
            job: "drill".into(),
            target: id.target().unwrap(),
            backup: None,
            region: Some("a".parse().unwrap()),
            outcome: "pass".into(),
            level: Some("L6".into()),
            started_at: at,
            finished_at: at + TimeDelta::minutes(7),
            rpo: (Some(5.0), Some(0.9)),
            rto: (None, Some(408.25)),
            phases: vec![("fetch".into(), 91.5)],
            checks: vec![("heartbeat".into(), true)],
            same_as: Vec::new(),
            host: "db1".into(),
            drctl: "0.1.0".into(),
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_report_reads_back_and_every_bit_of_it_counts() {
        let fixture = tiny(2, 2).await;
        let repository = fixture.reopen().await.unwrap();
        let id: ReportId = "ledger-241004-000000-q4x".parse().unwrap();
        let body = ReportBody { report: serde_json::json!({"checks": [1, 2]}), markdown: "# Passed".into() };
        let sealed = seal_report(&repository, &fixture.writer, &head(&id), &body).await.unwrap();
        let lanes = spread(&repository, &sealed).await;
        assert!(lanes.iter().all(|lane| lane.missing_objects == 0), "{lanes:?}");
        let (heads, errors) = list(&repository, None).await.unwrap();
        assert_eq!((heads.as_slice(), errors.len()), ([head(&id)].as_slice(), 0));
        assert_eq!(read(&repository, &fixture.ring, &id).await.unwrap(), (head(&id), body));

        let key = layout::report(&"ledger".parse().unwrap(), &id);
        let contents = fixture.stores[0].contents().await;
        let (_, bytes) = contents.into_iter().find(|(name, _)| *name == key).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_head(&repository, &key, &damaged).is_err(), "bit {bit}");
        }
        let elsewhere = key.replace("q4x", "q4y");
        assert!(decode_head(&repository, &elsewhere, &bytes).is_err());
    }

    /// A report on an outage does not wait for its end; repair brings it to the region that was away.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_region_is_enough_and_repair_brings_the_rest() {
        let fixture = tiny(2, 2).await;
        let id: ReportId = "ledger-241004-000000-q4x".parse().unwrap();
        let body = ReportBody { report: serde_json::json!({}), markdown: String::new() };
        fixture.stores[0].set(Fault::Deny);
        let sealed = seal_report(&fixture.repository, &fixture.writer, &head(&id), &body).await.unwrap();
        let lanes = spread(&fixture.repository, &sealed).await;
        assert!(lanes[0].missing_objects > 0 && lanes[1].missing_objects == 0, "{lanes:?}");
        fixture.stores[0].set(Fault::None);
        let repository = fixture.reopen().await.unwrap();
        let phase = Progress::new(Arc::clone(&fixture.writer.clock)).begin("mend", None);
        mend(&repository, &Scope::default(), &phase).await.unwrap();
        let alone = Repository { regions: repository.regions.only(&"a".parse().unwrap()).unwrap(), ..repository };
        let ring = fixture.ring.within(alone.regions.clone());
        assert_eq!(read(&alone, &ring, &id).await.unwrap(), (head(&id), body));

        // Whoever counts the only key holder as lost opens nothing.
        let lost = fixture.writer.holders.list.iter().map(|holder| holder.id().clone()).collect();
        let keyless = fixture.ring.within(alone.regions.clone()).without(lost);
        assert!(read(&alone, &keyless, &id).await.is_err());
    }

    /// What waits in a file is what a region gets later, without a key and as often as it takes.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_report_that_waited_is_the_same_report() {
        let fixture = tiny(2, 2).await;
        let id: ReportId = "ledger-241004-000000-q4x".parse().unwrap();
        let body = ReportBody { report: serde_json::json!({"a": 1}), markdown: String::new() };
        let sealed = seal_report(&fixture.repository, &fixture.writer, &head(&id), &body).await.unwrap();
        fixture.stores.iter().for_each(|store| store.set(Fault::Deny));
        let lanes = spread(&fixture.repository, &sealed).await;
        assert!(lanes.iter().all(|lane| lane.missing_objects > 0), "{lanes:?}");
        let waited: Sealed = serde_json::from_str(&serde_json::to_string(&sealed).unwrap()).unwrap();
        fixture.stores.iter().for_each(|store| store.set(Fault::None));
        for _ in 0..2 {
            let lanes = spread(&fixture.repository, &waited).await;
            assert!(lanes.iter().all(|lane| lane.missing_objects == 0), "{lanes:?}");
        }
        let repository = fixture.reopen().await.unwrap();
        assert_eq!(read(&repository, &fixture.ring, &id).await.unwrap(), (head(&id), body));
    }
}
