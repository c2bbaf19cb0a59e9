//! Whether bytes are what their name promises: every kind of object proves itself in its own way.

use bytes::Bytes;

use super::Mender;
use super::items::{Item, Proof};
use crate::keys::{Wrap, WrapContext};
use crate::model::{Branch, Error, HolderId, Result, SignerId};
use crate::repository::catalog;
use crate::repository::inventory;
use crate::repository::layout;
use crate::repository::prune;
use crate::repository::records::{pins, reports, runs};
use crate::repository::regions::identity::RepositoryRecord;
use crate::repository::trust::SignerRecord;
use crate::repository::wal::bundling::check_bundle;
use crate::repository::wal::frame::{Frame, FramePlace};
use crate::repository::wal::gaps::Gap;
use crate::store::Digest;

impl Mender<'_> {
    /// Whether these bytes are what this name promises.
    pub(super) fn judge(&self, item: &Item, bytes: &Bytes) -> Result<()> {
        let wrong = |why: &str| Error::damaged(format!("{}: {why}", item.key));
        match &item.proof {
            Proof::Listed(line) => {
                let right = bytes.len() as u64 == line.size && Digest::of(bytes) == line.digest();
                if right { Ok(()) } else { Err(wrong("its digest is not the one in the inventory")) }
            }
            Proof::Majority => self.judge_record(&item.key, bytes).unwrap_or(Ok(())),
            Proof::Own => self.judge_record(&item.key, bytes).ok_or_else(|| wrong("it does not prove itself"))?,
        }
    }

    /// `None` for a name that is not one of ours.
    fn judge_record(&self, key: &str, bytes: &Bytes) -> Option<Result<()>> {
        let repository = self.repository;
        let parts: Vec<_> = key.split('/').collect();
        Some(match parts.as_slice() {
            [layout::REPOSITORY] => RepositoryRecord::parse(bytes).and_then(|record| {
                let own = record.repository == repository.id;
                if own { Ok(()) } else { Err(Error::damaged("it belongs to another repository")) }
            }),
            ["regions", _, digest] => {
                let right = Digest::of(bytes).to_string().starts_with(digest);
                if right { Ok(()) } else { Err(Error::damaged("its digest is not the one in its name")) }
            }
            ["signers", id] => SignerRecord::decode(&id.parse::<SignerId>().ok()?, bytes).map(|_| ()),
            ["keysets", target, keyset, holder] => {
                let target = target.parse().ok()?;
                let keyset = keyset.parse().ok()?;
                let context = WrapContext { repository: repository.id.clone(), target, keyset };
                let damaged = |error| Error::damaged("it is not a wrap of this holder").because(error);
                Wrap::from_bytes(&holder.parse::<HolderId>().ok()?, bytes).map_err(damaged).and_then(|wrap| {
                    let own = wrap.context == context;
                    if own { Ok(()) } else { Err(Error::damaged("it belongs to another keyset")) }
                })
            }
            ["history", _, name] => {
                let branch: Branch = layout::parse_branch(name)?.1;
                let right = Branch::from_history_digest(&Digest::of(bytes).0) == branch;
                if right { Ok(()) } else { Err(Error::damaged("its digest is not the one in its name")) }
            }
            ["wal", system, branch, epoch, seq] => {
                let (timeline, branch) = layout::parse_branch(branch)?;
                let (epoch, bundle) = (epoch.parse().ok()?, layout::parse_bundle(seq));
                let seq = bundle.map(|(first, _)| first).or_else(|| layout::parse_seq(seq))?;
                let place = FramePlace { system_id: system.parse().ok()?, timeline, branch, epoch, seq };
                if let Some(numbers) = bundle {
                    return Some(check_bundle(bytes, numbers, repository, &place));
                }
                Frame::decode(bytes, &repository.id, &place, &repository.trust).map(|_| ())
            }
            ["inventories", _, id, part] => {
                let (id, part) = (id.parse().ok()?, part.parse().ok()?);
                inventory::decode_part(bytes, &repository.id, (&id, part), &repository.trust).map(|_| ())
            }
            ["gaps", ..] => Gap::decode(repository, key, bytes).map(|_| ()),
            ["reports", ..] => reports::decode_head(repository, key, bytes).map(|_| ()),
            ["commits", ..] => catalog::parse_commit(repository, key, bytes).map(|_| ()),
            ["runs", ..] => runs::decode(repository, key, bytes).map(|_| ()),
            ["pins" | "unpins", ..] => pins::check(repository, key, bytes),
            ["pruned" | "sweeps", ..] => prune::check_record(repository, key, bytes),
            _ => return None,
        })
    }
}
