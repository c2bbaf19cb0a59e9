//! Keysets in the repository: drawn, wrapped by every holder, stored everywhere, opened again by any one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use futures::{StreamExt, stream};
use tokio::sync::OnceCell;

use crate::keys::keyset::Keyset;
use crate::keys::{KeyError, KeyHolder, KeyOpener, Opened, Wrap, WrapContext, open_any, wrap_everywhere};
use crate::model::{Error, HolderId, KeysetId, Kind, RegionName, RepositoryId, Result, ResultExt, Rng, TargetName};
use crate::repository::inventory::InventoryLine;
use crate::repository::layout;
use crate::repository::regions::Regions;
use crate::repository::regions::fan_out::FanOut;
use crate::store::Digest;

/// How long one key holder may take; the others do not wait for it longer than this.
pub(super) const HOLDER_DEADLINE: Duration = Duration::from_secs(15);

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

    /// Those that belong to another region than `kept` and would be lost with it.
    pub fn of_others(&self, kept: &RegionName) -> BTreeSet<HolderId> {
        let other = |holder: &&Arc<dyn KeyHolder>| holder.region().is_some_and(|region| region != kept);
        self.list.iter().filter(other).map(|holder| holder.id().clone()).collect()
    }

    /// Those that are not among `wrapped`.
    #[must_use]
    pub fn without(&self, wrapped: &BTreeSet<HolderId>) -> Self {
        let list = self.list.iter().filter(|holder| !wrapped.contains(holder.id())).cloned().collect();
        Self { list, min_wraps: self.min_wraps }
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
    let keyset = Arc::new(Keyset::generate(repository, target, rng)?);
    let mut stored = StoredKeyset { keyset, wraps: Vec::new(), missing: Vec::new() };
    for (holder, wrap) in add_wraps(&stored.keyset, &holders.list, out).await? {
        match wrap {
            Ok(line) => stored.wraps.push(line),
            Err(reason) => {
                tracing::warn!(%holder, reason, "keyset is not wrapped by this holder; the wrap is owed");
                stored.missing.push((holder, reason));
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

/// Draws a keyset for something small that is stored whole or not at all, and gives its wraps as objects that are still to
/// be stored. One holder is enough: an outage of key holders must be reportable, and `rewrap` pays what is owed.
///
/// # Errors
/// No holder could wrap it.
pub(super) async fn draw(
    repository: &RepositoryId,
    target: &TargetName,
    holders: &Holders,
    rng: &dyn Rng,
) -> Result<(Keyset, Vec<(String, Bytes)>)> {
    let keyset = Keyset::generate(repository, target, rng)?;
    let (mut wraps, mut refused) = (Vec::new(), Vec::new());
    for (holder, wrap) in wrap_everywhere(&holders.list, &keyset, HOLDER_DEADLINE).await {
        match wrap {
            Ok(wrap) => wraps.push((layout::wrap(target, keyset.id(), &wrap.holder), Bytes::from(wrap.to_bytes()?))),
            Err(error) => refused.push(format!("{holder}: {error}")),
        }
    }
    if wraps.is_empty() {
        let error = Error::new(Kind::Unavailable, "no key holder wrapped a keyset");
        return Err(refused.into_iter().fold(error, Error::because));
    }
    Ok((keyset, wraps))
}

/// Asks each of `list` for a wrap of `keyset` and stores those that come, as objects of their own; for the others, why
/// they did not.
///
/// # Errors
/// A wrap did not reach the quorum, or `keyset` is only the half that `meta` opens: a wrap of it would pass for a whole
/// one.
pub async fn add_wraps(
    keyset: &Keyset,
    list: &[Arc<dyn KeyHolder>],
    out: &FanOut,
) -> Result<Vec<(HolderId, std::result::Result<InventoryLine, String>)>> {
    if keyset.data().is_none() {
        return Err(Error::new(Kind::NoKey, format!("what opened keyset {} gives its `meta` half alone", keyset.id())));
    }
    let mut outcomes = Vec::new();
    for (holder, wrap) in wrap_everywhere(list, keyset, HOLDER_DEADLINE).await {
        let outcome = match wrap {
            Ok(wrap) => Ok(store_wrap(&wrap, out).await?),
            Err(error) => Err(error.to_string()),
        };
        outcomes.push((holder, outcome));
    }
    Ok(outcomes)
}

/// Every keyset that a region holds a wrap of, and who wrapped it.
///
/// # Errors
/// No region answers.
pub async fn wrapped_by(regions: &Regions) -> Result<BTreeMap<(TargetName, KeysetId), BTreeSet<HolderId>>> {
    let mut found: BTreeMap<_, BTreeSet<HolderId>> = BTreeMap::new();
    for key in regions.list_union(layout::KEYSETS).await? {
        if let Some((target, keyset, holder)) = layout::parse_wrap(&key) {
            found.entry((target, keyset)).or_default().insert(holder);
        }
    }
    Ok(found)
}

pub(super) async fn store_wrap(wrap: &Wrap, out: &FanOut) -> Result<InventoryLine> {
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
    let read = |key: String| {
        let context = &context;
        async move {
            let holder = key.rsplit('/').next().and_then(|holder| holder.parse::<HolderId>().ok())?;
            let parse = |bytes: Bytes| {
                let wrap = Wrap::from_bytes(&holder, &bytes)?;
                let own = wrap.context == *context;
                if own { Ok(wrap) } else { Err(Error::damaged("the wrap belongs to another keyset")) }
            };
            let read = regions.read(&key, None, parse).await;
            // Another wrap may still open; if none does, the reader says which are missing.
            read.map(|(wrap, _)| wrap).inspect_err(|error| tracing::warn!(%error, "key wrap is not readable")).ok()
        }
    };
    let keys = regions.list_union(&layout::keyset(target, id)).await?;
    let wraps = join_all(keys.into_iter().map(read)).await.into_iter().flatten().collect();
    Ok((context, wraps))
}

/// Every copy of every wrap, also those that other regions hold differently. What a wrap says is proven only by opening
/// it, so when the first copies fail the others deserve a try.
async fn all_copies(regions: &Regions, context: &WrapContext) -> Result<Vec<(RegionName, Wrap)>> {
    let mut copies = Vec::new();
    for region in regions.all() {
        let Ok(alone) = regions.only(&region.name) else { continue };
        match wraps(&alone, &context.repository, &context.target, &context.keyset).await {
            Ok((_, held)) => copies.extend(held.into_iter().map(|wrap| (region.name.clone(), wrap))),
            Err(error) => tracing::warn!(region = %region.name, %error, "key wraps are not readable"),
        }
    }
    Ok(copies)
}

fn distinct(copies: &[(RegionName, Wrap)]) -> Vec<Wrap> {
    let mut wraps: Vec<Wrap> = Vec::new();
    for (_, wrap) in copies {
        if !wraps.contains(wrap) {
            wraps.push(wrap.clone());
        }
    }
    wraps
}

/// A keyset's secrets, and by whom they were opened.
type OpenedBy = (Arc<Keyset>, String);

/// Opens keysets once and keeps them for the job.
#[derive(Debug)]
pub struct KeyRing {
    repository: RepositoryId,
    regions: Regions,
    openers: Vec<Arc<dyn KeyOpener>>,
    /// Holders whose wraps are not used.
    lost: BTreeSet<HolderId>,
    opened: Mutex<BTreeMap<KeysetId, Arc<OnceCell<OpenedBy>>>>,
}

/// Keysets that are opened at the same time.
const OPENED_AT_ONCE: usize = 16;

impl KeyRing {
    /// A ring that asks `openers`.
    pub fn new(repository: RepositoryId, regions: Regions, openers: Vec<Arc<dyn KeyOpener>>) -> Self {
        Self { repository, regions, openers, lost: BTreeSet::new(), opened: Mutex::default() }
    }

    /// The same ring, as if these holders were lost.
    #[must_use]
    pub fn without(mut self, lost: BTreeSet<HolderId>) -> Self {
        self.lost = lost;
        self
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
        self.open_by(target, id).await.map(|(keyset, _)| keyset)
    }

    /// A keyset's secrets, and by whom they were opened for this job.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_by(&self, target: &TargetName, id: &KeysetId) -> Result<OpenedBy> {
        let cell = {
            let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(opened.entry(id.clone()).or_default())
        };
        cell.get_or_try_init(|| self.try_open(target, id)).await.cloned()
    }

    /// Opens many keysets, several at the same time; what each came to, in their order.
    pub async fn open_all(&self, wanted: Vec<(TargetName, KeysetId)>) -> Vec<(KeysetId, Result<Arc<Keyset>>)> {
        let open = |(target, id): (TargetName, KeysetId)| async move {
            let opened = self.open(&target, &id).await;
            (id, opened)
        };
        stream::iter(wanted).map(open).buffered(OPENED_AT_ONCE).collect().await
    }

    /// Opens a keyset and says by whom; the plan of a restore prints it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn try_open(&self, target: &TargetName, id: &KeysetId) -> Result<OpenedBy> {
        let (context, mut wraps) = wraps(&self.regions, &self.repository, target, id).await?;
        wraps.retain(|wrap| !self.lost.contains(&wrap.holder));
        let mut opened = open_any(&self.openers, &context, &wraps, HOLDER_DEADLINE).await;
        if opened.is_err() && self.regions.all().len() > 1 {
            let mut copies = all_copies(&self.regions, &context).await?;
            copies.retain(|(_, wrap)| !self.lost.contains(&wrap.holder));
            wraps = distinct(&copies);
            opened = open_any(&self.openers, &context, &wraps, HOLDER_DEADLINE).await;
            if let Ok(opened) = &opened {
                self.tell_wrong_copies(&context, &copies, &opened.opened_by).await;
            }
        }
        let Opened { keyset, opened_by, .. } = opened.during(|| format!("open keyset {id} of {target}"))?;
        let key = wraps.iter().find(|wrap| wrap.holder == opened_by).map(|wrap| wrap.key.clone());
        Ok((Arc::new(keyset), key.unwrap_or_else(|| opened_by.to_string())))
    }

    /// Of one holder's wrap there is one right copy. Where it took a second region to find it, the first holds another.
    async fn tell_wrong_copies(&self, context: &WrapContext, copies: &[(RegionName, Wrap)], holder: &HolderId) {
        let key = layout::wrap(&context.target, &context.keyset, holder);
        for (region, wrap) in copies.iter().filter(|(_, wrap)| wrap.holder == *holder) {
            let opened = open_any(&self.openers, context, std::slice::from_ref(wrap), HOLDER_DEADLINE).await;
            if let Err(error) = opened {
                self.regions.tell_damaged(region, &key, Error::from(error).to_string());
            }
        }
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
