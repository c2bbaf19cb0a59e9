//! What the copies of one compaction have in common.

use std::collections::{BTreeSet, HashMap};

use crate::model::commit::Parts;
use crate::model::{BackupId, KeysetId, Result, TargetName};
use crate::observe::progress::Phase;
use crate::repository::backup::uploads::put_object;
use crate::repository::compact::chunks::{Entries, Place};
use crate::repository::compact::compare::Comparison;
use crate::repository::compact::numbers::Numbers;
use crate::repository::compact::{Hands, Lines, Survey};
use crate::repository::inventory::InventoryLine;
use crate::repository::pages::map::{FrameRef, MapChunk, PackId};
use crate::repository::pages::relocation::Relocation;
use crate::repository::regions::fan_out::{FanOut, LaneOutcome, Patience};

/// A map chunk that was written anew.
#[derive(Debug)]
pub(super) struct Renewed {
    pub(super) frame: FrameRef,
    /// Numbers of the packs and keysets of the frames that it names.
    frames: Vec<(u32, u32)>,
    /// Which of them each page is in.
    pages: Vec<Option<u16>>,
}

/// One compaction: what its copies have in common.
pub(super) struct Run<'a> {
    pub(super) hands: Hands<'a>,
    pub(super) survey: &'a Survey,
    pub(super) out: FanOut,
    /// The packs that are left.
    pub(super) left: BTreeSet<PackId>,
    /// Where their frames went, once the first copy has moved them.
    pub(super) relocation: Option<Relocation>,
    /// Chunks that were written anew, by where the original has them.
    renewed: HashMap<Place, Renewed>,
    packs: Numbers<PackId>,
    keysets: Numbers<KeysetId>,
    /// Everything that was put.
    pub(super) lines: Lines,
    /// The copies so far, and what sealed their chunks.
    pub(super) copies: Vec<(BackupId, KeysetId)>,
    pub(super) comparison: Comparison,
    pub(super) phase: Phase,
}

/// What a copy consists of, by the rewriter.
pub(super) struct Written {
    pub(super) manifest: Parts,
    pub(super) manifest_lines: Vec<InventoryLine>,
    pub(super) packs: BTreeSet<PackId>,
    pub(super) keysets: BTreeSet<KeysetId>,
}

impl<'a> Run<'a> {
    pub(super) fn new(hands: Hands<'a>, survey: &'a Survey) -> Self {
        let plan = &survey.plan;
        // What is moved belongs to several of them, and is locked as long as the youngest.
        let since = survey.chosen().map(|original| original.commit.started_at).max();
        let out = FanOut::new(&hands.repository.regions, Patience::BACKUP);
        Self {
            hands,
            survey,
            out: match since {
                Some(since) => out.locked_since(since),
                None => out,
            },
            left: plan.left(),
            relocation: None,
            renewed: HashMap::new(),
            packs: Numbers::default(),
            keysets: Numbers::default(),
            lines: Lines::new(),
            copies: Vec::new(),
            comparison: Comparison::default(),
            phase: hands.progress.begin("copy", Some(plan.moved_bytes + plan.renewed_bytes)),
        }
    }

    pub(super) fn target(&self) -> TargetName {
        self.survey.target.clone()
    }

    /// Everything that was put, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.lines.values().map(|line| line.size).sum()
    }

    /// Puts an object of a copy, and keeps its line.
    pub(super) async fn put(&mut self, key: String, bytes: Vec<u8>) -> Result<InventoryLine> {
        let line = put_object(&self.out, key, bytes).await?;
        self.lines.insert(line.key.clone(), line.clone());
        Ok(line)
    }

    /// A chunk was written anew.
    pub(super) fn renew(&mut self, at: Place, frame: FrameRef, chunk: &MapChunk) {
        self.phase.advance(u64::from(frame.length));
        let mut number = |frame: &FrameRef| (self.packs.of(&frame.pack), self.keysets.of(&frame.keyset));
        let frames = chunk.frames.iter().map(&mut number).collect();
        let pages = chunk.entries.iter().map(|entry| entry.place.map(|(frame, _)| frame)).collect();
        self.renewed.insert(at, Renewed { frame, frames, pages });
    }

    /// The chunk that was written for the one that the original has there.
    pub(super) fn renewed(&self, at: &Place) -> Option<&Renewed> {
        self.renewed.get(at)
    }

    /// The packs and keysets that a use of a renewed chunk names.
    pub(super) fn named(&self, renewed: &Renewed, (first, count): Entries) -> (BTreeSet<PackId>, BTreeSet<KeysetId>) {
        let pages = renewed.pages.iter().skip(usize::from(first)).take(usize::from(count)).flatten();
        let frames: BTreeSet<_> = pages.filter_map(|frame| renewed.frames.get(usize::from(*frame))).collect();
        let packs = frames.iter().filter_map(|(pack, _)| self.packs.name(*pack).cloned()).collect();
        (packs, frames.iter().filter_map(|(_, keyset)| self.keysets.name(*keyset).cloned()).collect())
    }

    /// What each region owes.
    pub(super) async fn end(self) -> Vec<LaneOutcome> {
        self.out.drain().await
    }
}
