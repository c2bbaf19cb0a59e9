//! Keysets in the repository: drawn, wrapped by every holder, stored everywhere, opened again by any one of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Mutex;

use crate::keys::keyset::Keyset;
use crate::keys::{KeyError, KeyHolder, KeyOpener, Opened, Wrap, WrapContext, open_any, wrap_everywhere};
use crate::model::{Error, HolderId, KeysetId, Kind, RegionName, RepositoryId, Result, ResultExt, Rng, TargetName};
use crate::repository::fan_out::FanOut;
use crate::repository::inventory::InventoryLine;
use crate::repository::layout;
use crate::repository::regions::Regions;
use crate::store::Digest;

/// How long one key holder may take; the others do not wait for it longer than this.
const HOLDER_DEADLINE: Duration = Duration::from_secs(15);

/// Who wraps, and how many wraps make a keyset safe.
#[derive(Debug, Clone)]
pub struct Holders {
    /// Every configured holder.
    pub list: Vec<Arc<dyn KeyHolder>>,
    /// With fewer wraps a keyset is not used.
    pub min_wraps: usize,
}

impl Holders {
    /// Each of them, for people.
    pub fn describe(&self) -> Vec<String> {
        self.list.iter().map(|holder| holder.describe()).collect()
    }

    /// Whether one of them belongs to no region.
    pub fn has_offline(&self) -> bool {
        self.list.iter().any(|holder| holder.region().is_none())
    }

    /// How many remain when `lost` is lost together with the holders that belong to it.
    pub fn left_without(&self, lost: &RegionName) -> usize {
        self.list.iter().filter(|holder| holder.region() != Some(lost)).count()
    }
}

/// A keyset that the repository holds.
#[derive(Debug)]
pub struct StoredKeyset {
    /// Its secrets.
    pub keyset: Arc<Keyset>,
    /// Its wraps as objects.
    pub wraps: Vec<InventoryLine>,
    /// Holders that could not wrap it now: debts.
    pub missing: Vec<(HolderId, String)>,
}

/// Draws a keyset and stores its wraps at the write quorum, before anything is sealed with it.
///
/// # Errors
/// Fewer than `min_wraps` holders could wrap it, or the wraps did not reach the quorum.
pub async fn create(
    repository: &RepositoryId,
    target: &TargetName,
    holders: &Holders,
    rng: &dyn Rng,
    out: &FanOut,
) -> Result<StoredKeyset> {
    let keyset = Keyset::generate(repository, target, rng)?;
    let mut stored = StoredKeyset { keyset: Arc::new(keyset), wraps: Vec::new(), missing: Vec::new() };
    for (holder, wrap) in wrap_everywhere(&holders.list, &stored.keyset, HOLDER_DEADLINE).await {
        match wrap {
            Ok(wrap) => stored.wraps.push(store_wrap(&wrap, out).await?),
            Err(error) => {
                tracing::warn!(%holder, %error, "keyset is not wrapped by this holder; the wrap is owed");
                stored.missing.push((holder, error.to_string()));
            }
        }
    }
    if stored.wraps.len() < holders.min_wraps {
        let (got, wanted) = (stored.wraps.len(), holders.min_wraps);
        let error =
            Error::new(Kind::Unavailable, format!("only {got} of at least {wanted} key holders wrapped a keyset"));
        return Err(stored
            .missing
            .iter()
            .fold(error, |error, (holder, reason)| error.because(format!("{holder}: {reason}"))));
    }
    Ok(stored)
}

async fn store_wrap(wrap: &Wrap, out: &FanOut) -> Result<InventoryLine> {
    let key = layout::wrap(&wrap.context.target, &wrap.context.keyset, &wrap.holder);
    let body = wrap.to_bytes()?;
    let (size, digest) = (body.len() as u64, Digest::of(&body));
    out.put(key.clone(), Bytes::from(body), digest).await?;
    Ok(InventoryLine { key, size, sha256: digest.0 })
}

/// The wraps of one keyset, from any region that holds them intact.
///
/// # Errors
/// No region answers.
pub async fn wraps(
    regions: &Regions,
    repository: &RepositoryId,
    target: &TargetName,
    id: &KeysetId,
) -> Result<(WrapContext, Vec<Wrap>)> {
    let context = WrapContext { repository: repository.clone(), target: target.clone(), keyset: id.clone() };
    let mut wraps = Vec::new();
    for key in regions.list_union(&layout::keyset(target, id)).await? {
        let Some(holder) = key.rsplit('/').next().and_then(|holder| holder.parse::<HolderId>().ok()) else { continue };
        let parse = |bytes: Bytes| {
            let wrap = Wrap::from_bytes(&holder, &bytes)?;
            if wrap.context == context { Ok(wrap) } else { Err(Error::damaged("the wrap belongs to another keyset")) }
        };
        match regions.read(&key, None, parse).await {
            Ok((wrap, _)) => wraps.push(wrap),
            // Another wrap may still open; if none does, the reader says which are missing.
            Err(error) => tracing::warn!(%error, "key wrap is not readable"),
        }
    }
    Ok((context, wraps))
}

/// Every copy of every wrap, also those that other regions hold differently. What a wrap says is proven only by opening
/// it, so when the first copies fail the others deserve a try.
async fn all_copies(regions: &Regions, context: &WrapContext) -> Result<Vec<Wrap>> {
    let mut copies = Vec::new();
    for region in regions.all() {
        let Ok(alone) = regions.only(&region.name) else { continue };
        match wraps(&alone, &context.repository, &context.target, &context.keyset).await {
            Ok((_, held)) => copies.extend(held.into_iter().filter(|wrap| !copies.contains(wrap)).collect::<Vec<_>>()),
            Err(error) => tracing::warn!(region = %region.name, %error, "key wraps are not readable"),
        }
    }
    Ok(copies)
}

/// Opens keysets once and keeps them for the job.
#[derive(Debug)]
pub struct KeyRing {
    repository: RepositoryId,
    regions: Regions,
    openers: Vec<Arc<dyn KeyOpener>>,
    opened: Mutex<BTreeMap<KeysetId, Arc<Keyset>>>,
}

impl KeyRing {
    /// A ring that asks `openers`.
    pub fn new(repository: RepositoryId, regions: Regions, openers: Vec<Arc<dyn KeyOpener>>) -> Self {
        Self { repository, regions, openers, opened: Mutex::default() }
    }

    /// The same openers for wraps from `regions` alone.
    pub fn within(&self, regions: Regions) -> Self {
        Self::new(self.repository.clone(), regions, self.openers.clone())
    }

    /// Where it looks for wraps.
    pub const fn regions(&self) -> &Regions {
        &self.regions
    }

    /// A keyset's secrets.
    ///
    /// # Errors
    /// No opener could open any of its wraps; the error says what each said.
    pub async fn open(&self, target: &TargetName, id: &KeysetId) -> Result<Arc<Keyset>> {
        let mut opened = self.opened.lock().await;
        if let Some(keyset) = opened.get(id) {
            return Ok(Arc::clone(keyset));
        }
        let (keyset, _) = self.try_open(target, id).await?;
        opened.insert(id.clone(), Arc::clone(&keyset));
        Ok(keyset)
    }

    /// Opens a keyset and says by whom; the plan of a restore prints it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn try_open(&self, target: &TargetName, id: &KeysetId) -> Result<(Arc<Keyset>, String)> {
        let (context, mut wraps) = wraps(&self.regions, &self.repository, target, id).await?;
        let mut opened = open_any(&self.openers, &context, &wraps, HOLDER_DEADLINE).await;
        if opened.is_err() && self.regions.all().len() > 1 {
            wraps = all_copies(&self.regions, &context).await?;
            opened = open_any(&self.openers, &context, &wraps, HOLDER_DEADLINE).await;
        }
        let Opened { keyset, opened_by, .. } = opened.during(|| format!("open keyset {id} of {target}"))?;
        let key = wraps.iter().find(|wrap| wrap.holder == opened_by).map(|wrap| wrap.key.clone());
        Ok((Arc::new(keyset), key.unwrap_or_else(|| opened_by.to_string())))
    }

    /// The wraps of a keyset that a holder at hand says are wrong, by holder and reason. Wraps that nobody here may open
    /// are not judged.
    ///
    /// # Errors
    /// No region answers.
    pub async fn wrong_wraps(&self, target: &TargetName, id: &KeysetId) -> Result<Vec<(HolderId, String)>> {
        let (context, wraps) = wraps(&self.regions, &self.repository, target, id).await?;
        let mut wrong = Vec::new();
        for wrap in &wraps {
            let opened = open_any(&self.openers, &context, std::slice::from_ref(wrap), HOLDER_DEADLINE).await;
            let refusals = opened.err().map(|error| error.refusals).unwrap_or_default();
            let judged = refusals.into_iter().filter(|refusal| matches!(refusal.error, KeyError::Wrong { .. }));
            wrong.extend(judged.map(|refusal| (refusal.holder, refusal.error.to_string())));
        }
        Ok(wrong)
    }
}
