//! One object in every region: the right bytes, and how each region stands to them.

use bytes::Bytes;

use super::items::{Item, Proof};
use super::{Mender, lock};
use crate::model::{Error, Kind, RegionName, Result};
use crate::repository::escape;
use crate::repository::layout;
use crate::repository::regions::Region;
use crate::repository::wal::frame::{Frame, FrameKind};
use crate::store::Digest;

/// What one region has under a name.
pub(super) enum Found {
    Good,
    Wrong,
    Nothing,
    Unknown(String),
}

impl Mender<'_> {
    /// The right bytes, and how each region of the scope stands to them.
    pub(super) async fn compare(&self, item: &Item, wanted: &[RegionName]) -> (Option<Bytes>, Vec<(&Region, Found)>) {
        let regions = self.repository.regions.all();
        let is_bundled = |region: &Region| item.bundled.contains(&region.name) && !item.held.contains_key(&region.name);
        let whole =
            |region: &&Region| is_bundled(region) || self.scope.quick && self.has_listed_size(item, &region.name);
        // With names and sizes alone nothing is read as long as every region agrees.
        if regions.iter().filter(|region| wanted.contains(&region.name)).all(|region| whole(&region)) {
            return (None, Vec::new());
        }
        let mut good: Option<(Bytes, Digest)> = None;
        let (mut seen, mut seals) = (Vec::new(), Vec::new());
        for region in regions {
            let read = match item.held.contains_key(&region.name) {
                true => region.store.get(&item.key, None).await.map_err(Error::from),
                false => Err(Error::not_found("not there")),
            };
            let judged = read.and_then(|bytes| self.judge(item, &bytes).map(|()| bytes));
            seen.push((region, judged.as_ref().map(|bytes| Digest::of(bytes)).map_err(Clone::clone)));
            if let (Ok(bytes), Proof::Listed(_) | Proof::Own) = (&judged, &item.proof) {
                let is_seal = is_seal(&item.key, bytes);
                seals.extend(is_seal.then_some(&region.name));
                if good.as_ref().is_none_or(|(first, _)| !is_seal && self::is_seal(&item.key, first)) {
                    good = Some((bytes.clone(), Digest::of(bytes)));
                }
            }
        }
        if !seals.is_empty() && good.as_ref().is_some_and(|(bytes, _)| !is_seal(&item.key, bytes)) {
            lock(&self.beaten).insert(item.key.clone());
        }
        if matches!(item.proof, Proof::Majority) {
            good = self.majority(item, &seen).await;
        }
        let right = good.as_ref().map(|(_, digest)| *digest);
        let found =
            |(region, read): (&Region, Result<Digest>)| match is_bundled(region) || seals.contains(&&region.name) {
                true => Found::Good,
                false => stand(read, right, &item.proof),
            };
        let found = |(region, read)| (region, found((region, read)));
        let found = seen.into_iter().filter(|(region, _)| wanted.contains(&region.name)).map(found);
        (good.map(|(bytes, _)| bytes), found.collect())
    }

    fn has_listed_size(&self, item: &Item, region: &RegionName) -> bool {
        let Some(size) = item.held.get(region) else { return false };
        match &item.proof {
            Proof::Listed(line) => line.size == *size,
            Proof::Own | Proof::Majority => item.held.values().all(|other| other == size),
        }
    }

    async fn majority(&self, item: &Item, seen: &[(&Region, Result<Digest>)]) -> Option<(Bytes, Digest)> {
        let held: Vec<_> = seen.iter().filter_map(|(region, read)| Some((*region, *read.as_ref().ok()?))).collect();
        let votes = |digest: Digest| held.iter().filter(|(_, other)| *other == digest).count();
        let most = held.iter().copied().find(|(_, digest)| votes(*digest) * 2 > held.len());
        // Of the files that drctl itself brings along, this program knows one right copy.
        let own = escape::FILES.iter().find(|(name, _)| item.key == format!("{}{name}", layout::ESCAPE));
        let own = own.map(|(_, bytes)| Digest::of(bytes));
        let (region, digest) = most.or_else(|| held.iter().copied().find(|(_, digest)| Some(*digest) == own))?;
        let bytes = region.store.get(&item.key, None).await.ok()?;
        (Digest::of(&bytes) == digest).then_some((bytes, digest))
    }
}

/// A SEAL may stand under the name of a frame that another region took first, or of another SEAL. It is right where it is,
/// and the frame is what other regions need; how the region itself comes to it, see [`displaced`](super::displaced).
fn is_seal(key: &str, bytes: &[u8]) -> bool {
    key.starts_with(layout::WAL) && Frame::kind(bytes) == Some(FrameKind::Seal)
}

fn stand(read: Result<Digest>, right: Option<Digest>, proof: &Proof) -> Found {
    match read {
        Ok(digest) if Some(digest) == right => Found::Good,
        // Both prove themselves: which of them is right cannot be told without a key, so neither is touched.
        Ok(_) if right.is_none() || matches!(proof, Proof::Own) => {
            Found::Unknown("regions hold different copies, and nothing tells which is right".to_owned())
        }
        Ok(_) => Found::Wrong,
        Err(error) if error.kind() == Kind::NotFound => Found::Nothing,
        Err(error) if error.kind() == Kind::Damaged => Found::Wrong,
        Err(error) => Found::Unknown(error.to_string()),
    }
}
