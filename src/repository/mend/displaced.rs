//! Bringing a frame to regions in which a SEAL has its name: beside the SEAL, which stays.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{Mender, lock};
use crate::model::Error;
use crate::repository::bundle::form;
use crate::repository::layout;
use crate::repository::regions::Region;
use crate::repository::wal::closing::key_beside;
use crate::repository::wal::frame::FramePlace;
use crate::repository::wal::frames::fetch_object;
use crate::repository::wal::index::{BranchId, WalIndex};
use crate::store::Digest;

/// Whether this is the name of a frame beside a SEAL.
pub(super) fn is_beside(key: &str) -> bool {
    let numbers = key.strip_prefix(layout::WAL).and_then(|rest| layout::parse_bundle(rest.rsplit('/').next()?));
    numbers.is_some_and(|(first, last)| first == last)
}

impl Mender<'_> {
    /// After all frames: what was copied just now may be what is brought.
    pub(super) async fn put_beside(&self) {
        let branch = |FramePlace { system_id, timeline, branch, .. }| BranchId { system_id, timeline, branch };
        let beaten: Vec<_> = lock(&self.beaten).iter().filter_map(|key| FramePlace::parse(key)).collect();
        for branch in beaten.iter().cloned().map(branch).collect::<BTreeSet<_>>() {
            let index = WalIndex::load(&self.repository.regions, branch).await;
            let lacking = index.displaced(self.repository).await;
            let lacking: BTreeSet<_> = lacking.into_iter().map(|displaced| displaced.place.key()).collect();
            // Where it was brought once, it counted.
            let counts = |place: &&FramePlace| {
                let bundle = (place.epoch.clone(), (place.seq, place.seq));
                lacking.contains(&place.key()) || index.bundles().contains_key(&bundle)
            };
            for place in beaten.iter().filter(counts) {
                match fetch_object(self.repository, place).await {
                    Ok(frame) => self.put_one(place, &Bytes::from(form::pack(&[frame]))).await,
                    Err(error) => tracing::warn!(%error, "a frame is not brought to where a SEAL has its name"),
                }
            }
        }
    }

    /// Regions are alike as far as they can be: all of them get it.
    async fn put_one(&self, place: &FramePlace, bundle: &Bytes) {
        let key = key_beside(place);
        let names: Vec<_> = lock(&self.done).keys().cloned().collect();
        for region in self.repository.regions.all().iter().filter(|region| names.contains(&region.name)) {
            let put = match self.stands(region, &key, bundle).await {
                Ok(Some(wrong)) => self.bring(region, &key, bundle, wrong).await.map(|()| Some(wrong)),
                Ok(None) => Ok(None),
                Err(error) => Err(error),
            };
            match put {
                Ok(Some(wrong)) => self.note_done(&region.name, &key, bundle.len() as u64, wrong),
                Ok(None) => {}
                Err(error) => self.still(&region.name, &key, error.to_string()),
            }
        }
    }

    /// Whether the region holds other bytes under the name; `None` if it holds these.
    async fn stands(&self, region: &Region, key: &str, right: &Bytes) -> Result<Option<bool>, Error> {
        match region.store.get(key, None).await {
            Ok(bytes) if Digest::of(&bytes) == Digest::of(right) => Ok(None),
            Ok(_) => Ok(Some(true)),
            Err(error) if error.is_not_found() => Ok(Some(false)),
            Err(error) => Err(error.into()),
        }
    }
}
