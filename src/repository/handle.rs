//! The repository itself: its record, its regions, its signers.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{Either, FutureExt as _, ready, select};
use futures::stream::{FuturesUnordered, Stream, StreamExt as _};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use crate::codec::sign::Signer;
use crate::model::{Clock, Error, Kind, RegionName, RepositoryId, Result, ResultExt, Rng, SignerId};
use crate::repository::keysets::Holders;
use crate::repository::layout;
use crate::repository::regions::fan_out::FanOut;
use crate::repository::regions::identity::{RepositoryRecord, to_json};
use crate::repository::regions::{Region, Regions, Shown};
use crate::repository::trust::{SignerRecord, Trust};
use crate::store::Digest;

/// While others have answered, a region is waited for this long. The record is small, and nothing else is on the way yet.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where one region is, for a machine that knows only a sibling.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionRecord {
    /// Its name.
    pub name: RegionName,
    /// `s3://bucket/prefix` or `dir:///path`.
    pub url: String,
    /// The endpoint, if it is not AWS itself.
    pub endpoint: Option<String>,
    /// The AWS region.
    pub aws_region: Option<String>,
    /// Whether the bucket is in the path.
    pub path_style: bool,
}

/// An open repository.
#[derive(Debug, Clone)]
pub struct Repository {
    /// Its identity, the same in every region.
    pub id: RepositoryId,
    /// Its copies.
    pub regions: Regions,
    /// Whose signatures count.
    pub trust: Arc<Trust>,
}

/// What a writer needs beyond the repository.
#[derive(Debug, Clone)]
pub struct Writer {
    /// Signs.
    pub signer: Arc<Signer>,
    /// Wrap keysets.
    pub holders: Holders,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Chance.
    pub rng: Arc<dyn Rng>,
    /// This host's name, for provenance.
    pub host: String,
}

impl Repository {
    /// Opens the repository that `regions` hold together.
    ///
    /// # Errors
    /// No region answers; none holds a repository; two hold different ones; or its format is newer than this program.
    pub async fn open(regions: Regions, listed_signers: BTreeSet<SignerId>) -> Result<Self> {
        let keys = |regions: Regions| {
            let listed = listed_signers.clone();
            async move { Trust::load(&regions, listed).await.during(|| "read the signers' public keys") }
        };
        let early = pin!(keys(regions.clone()));
        let (record, early) = match select(pin!(Self::identify(&regions)), early).await {
            Either::Left((record, early)) => (record, early.left_future()),
            Either::Right((trust, record)) => (record.await, ready(trust).right_future()),
        };
        let (RepositoryRecord { repository: id, .. }, shown) = record?;
        let is_silent = shown.values().any(|shown| *shown == Shown::Silent);
        let regions = regions.proven(&id, &shown);
        // Whoever reads the keys already waits for the region that is silent, too.
        let trust = if is_silent { keys(regions.clone()).await? } else { early.await? };
        Ok(Self { id, regions, trust: Arc::new(trust) })
    }

    /// A repository that was opened before, while none of its regions answers: what is sealed for it here waits for them.
    /// Nothing in it can be read, so nobody's signature counts but our own.
    pub fn remembered(id: RepositoryId, regions: Regions, signer: &Signer) -> Self {
        let regions = regions.proven(&id, &BTreeMap::new());
        Self { id, regions, trust: Arc::new(Trust::in_signer(signer)) }
    }

    /// The record, and which regions show it. Nobody waits long for one while another has answered.
    async fn identify(regions: &Regions) -> Result<(RepositoryRecord, BTreeMap<RegionName, Shown>)> {
        let mut found: Option<(RepositoryRecord, RegionName)> = None;
        let mut shown: BTreeMap<_, _> =
            regions.all().iter().map(|region| (region.name.clone(), Shown::Silent)).collect();
        let mut errors = Vec::new();
        let mut answers: FuturesUnordered<_> = regions.all().iter().map(read_record).collect();
        let mut until = None;
        while let Some((region, record)) = next_until(&mut answers, until).await {
            shown.insert(region.clone(), if record.is_ok() { Shown::Yes } else { Shown::No });
            match (record, &found) {
                (Ok(record), Some((first, other))) if first.repository != record.repository => {
                    let text = format!("regions {other} and {region} hold different repositories");
                    let why = format!("{} and {}", first.repository, record.repository);
                    return Err(Error::usage(text).because(why));
                }
                (Ok(_), Some(_)) => {}
                (Ok(record), None) => (found, until) = (Some((record, region)), Some(Instant::now() + PATIENCE)),
                (Err(error), _) => errors.push((region, error)),
            }
        }
        if let Some((record, _)) = found {
            for (region, error) in errors.iter().filter(|(_, error)| error.kind() == Kind::Damaged) {
                regions.tell_damaged(region, layout::REPOSITORY, error.to_string());
            }
            return Ok((record, shown));
        }
        let all_empty = errors.iter().all(|(_, error)| error.kind() == Kind::NotFound);
        let error = match all_empty {
            true => Error::not_found("there is no repository yet").hint("make one: drctl init"),
            false => Error::new(Kind::Unavailable, "no region could be opened"),
        };
        Err(errors.into_iter().fold(error, |error, (region, why)| error.because(format!("{region}: {why}"))))
    }

    /// Makes a repository in every region that has none yet. Running it again finishes what an earlier run began.
    ///
    /// # Errors
    /// A region cannot be written: init wants all of them, so that no region begins its life in debt.
    pub async fn init(
        regions: &Regions,
        writer: &Writer,
        siblings: &[RegionRecord],
        escape: &[(&str, &[u8])],
    ) -> Result<RepositoryId> {
        let record = match Self::identify(regions).await {
            // A region that is added later gets the same bytes.
            Ok((record, _)) => record,
            Err(error) if error.kind() == Kind::NotFound => {
                RepositoryRecord::new(RepositoryId::new(writer.rng.as_ref())?, writer.clock.now())
            }
            Err(error) => return Err(error),
        };
        for region in regions.all() {
            if !matches!(read_record(region).await.1, Ok(found) if found.repository == record.repository) {
                put_json(region, layout::REPOSITORY, &record).await?;
            }
            for (name, bytes) in escape {
                put_unless_there(region, &format!("{}{name}", layout::ESCAPE), bytes).await?;
            }
            for sibling in siblings {
                let (key, body) = sibling_object(sibling)?;
                put_unless_there(region, &key, &body).await?;
            }
            enroll_at(region, writer).await?;
        }
        // Two inits at once may have won one region each; the loser learns it here, before anything is sealed.
        Self::identify(regions).await.map(|(record, _)| record.repository)
    }

    /// Publishes the writer's public key, create-only, at the write quorum.
    ///
    /// # Errors
    /// The quorum was not reached.
    pub async fn enroll(&self, writer: &Writer, out: &FanOut) -> Result<()> {
        if !self.trust.knows(writer.signer.id()) {
            let body = signer_record(writer)?;
            let digest = Digest::of(&body);
            out.put(layout::signer(writer.signer.id()), Bytes::from(body), digest).await?;
            self.trust.refresh(&self.regions).await?;
        }
        Ok(())
    }
}

async fn next_until<S: Stream + Unpin>(answers: &mut S, until: Option<Instant>) -> Option<S::Item> {
    match until {
        Some(until) => timeout_at(until, answers.next()).await.ok().flatten(),
        None => answers.next().await,
    }
}

/// Name and bytes of a sibling's address.
pub(super) fn sibling_object(record: &RegionRecord) -> Result<(String, Vec<u8>)> {
    let body = to_json(record)?;
    let digest = Digest::of(&body).to_string();
    Ok((layout::region(&record.name, &digest[..8]), body))
}

pub(super) async fn enroll_at(region: &Region, writer: &Writer) -> Result<()> {
    put_unless_there(region, &layout::signer(writer.signer.id()), &signer_record(writer)?).await
}

pub(super) fn signer_record(writer: &Writer) -> Result<Vec<u8>> {
    SignerRecord::encode(&writer.signer, &writer.host)
}

/// The record of one region.
pub(super) async fn read_record(region: &Region) -> (RegionName, Result<RepositoryRecord>) {
    let read = async {
        let bytes = region.store.get(layout::REPOSITORY, None).await?;
        RepositoryRecord::parse(&bytes).during(|| format!("read region {}", region.name))
    };
    (region.name.clone(), read.await)
}

/// The addresses that the regions know of each other.
///
/// # Errors
/// No region answers.
pub async fn siblings(regions: &Regions) -> Result<Vec<RegionRecord>> {
    let mut records = Vec::new();
    for key in regions.list_union(layout::REGIONS).await? {
        let parse = |bytes: Bytes| parse_sibling(&key, &bytes);
        match regions.read(&key, None, parse).await {
            Ok((record, _)) => records.push(record),
            Err(error) => tracing::warn!(%error, "sibling address is not readable"),
        }
    }
    Ok(records)
}

/// The name ends in the digest of the record, which nobody signs.
fn parse_sibling(key: &str, bytes: &[u8]) -> Result<RegionRecord> {
    let wrong = || Error::damaged(format!("{key} is not the address of a region"));
    let record = serde_json::from_slice(bytes).map_err(|error| wrong().because(error))?;
    if sibling_object(&record)? != (key.to_owned(), bytes.to_vec()) {
        return Err(wrong().because("its digest is not the one in its name"));
    }
    Ok(record)
}

async fn put_json<T: Serialize>(region: &Region, key: &str, value: &T) -> Result<()> {
    put_unless_there(region, key, &to_json(value)?).await
}

/// For records that say the same whoever writes them: one that is there already stays.
async fn put_unless_there(region: &Region, key: &str, body: &[u8]) -> Result<()> {
    let put = region.put(key, (Bytes::copy_from_slice(body), Digest::of(body)), None).await;
    match put {
        Ok(_) | Err(crate::store::StoreError::Conflict { .. }) => Ok(()),
        Err(error) => Err(Error::from(error).during(format!("write {key} to {}", region.name))),
    }
}
