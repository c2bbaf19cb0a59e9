//! What the copies of one compaction have in common.

use std::collections::{BTreeSet, HashMap};

use crate::model::commit::Parts;
use crate::model::{BackupId, KeysetId, Result, TargetName};
use crate::observe::progress::Phase;
use crate::repository::compact::chunks::Place;
use crate::repository::compact::compare::Comparison;
use crate::repository::compact::{Hands, Lines, Survey};
use crate::repository::fan_out::{FanOut, LaneOutcome, Patience};
use crate::repository::inventory::InventoryLine;
use crate::repository::page_map::{FrameRef, PackId};
use crate::repository::relocation::Relocation;
use crate::repository::uploads::put_object;

/// A map chunk that was written anew, and what it names.
#[derive(Debug, Clone)]
pub(super) struct Renewed {
    pub(super) frame: FrameRef,
    pub(super) packs: BTreeSet<PackId>,
    pub(super) keysets: BTreeSet<KeysetId>,
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
    /// Chunks that an earlier copy has written anew.
    pub(super) renewed: HashMap<Place, Renewed>,
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
        Self {
            hands,
            survey,
            out: FanOut::new(&hands.repository.regions, Patience::BACKUP),
            left: plan.left(),
            relocation: None,
            renewed: HashMap::new(),
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

    /// A chunk of so many bytes was written.
    pub(super) fn advance(&self, bytes: u64) {
        self.phase.advance(bytes);
    }

    /// What each region owes.
    pub(super) async fn end(self) -> Vec<LaneOutcome> {
        self.out.drain().await
    }
}
