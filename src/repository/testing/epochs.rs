//! Epochs of made-up WAL, and taking over from their writers.

use std::sync::Arc;

use super::{Fixture, log};
use crate::model::{Clock, Lsn, Result};
use crate::repository::handle::Writer;
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::wal::adopt::{Era, Tail, TakeOver, take_over};
use crate::repository::wal::claim::Known;
use crate::repository::wal::frame::EpochKind;
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::{Epoch, Marks};

impl Fixture {
    /// Takes over from every earlier writer.
    pub async fn take_over(&self, lineage: &[Era], back_to: Option<&BranchId>) -> Result<Option<Tail>> {
        let (known, repository, writer) = (Known::default(), &self.repository, &self.writer);
        let owner = TakeOver { repository, writer, own: None, known: &known };
        take_over(&owner, (lineage, back_to)).await
    }

    /// Writes an epoch whose frames hold `lengths` bytes each; END too if `close`.
    pub async fn epoch(&self, start: u64, lengths: &[usize], close: bool) {
        self.epoch_by(&self.writer, start, lengths, close).await;
    }

    /// The same, by a writer of choice.
    pub async fn epoch_by(&self, writer: &Writer, start: u64, lengths: &[usize], close: bool) {
        self.epoch_of(writer, (EpochKind::Stream, start), lengths, close).await;
    }

    /// The same, of a kind of choice.
    pub async fn epoch_of(&self, writer: &Writer, (kind, start): (EpochKind, u64), lengths: &[usize], close: bool) {
        self.epoch_holding(writer, (kind, start), (lengths, close), |at| at as u8).await;
    }

    /// The same, with bytes of choice by position.
    pub async fn epoch_holding(
        &self,
        writer: &Writer,
        (kind, start): (EpochKind, u64),
        (lengths, close): (&[usize], bool),
        byte: impl Fn(u64) -> u8,
    ) {
        let out = Arc::new(FanOut::new(&self.repository.regions, Patience::WAL));
        let opening = (log(), kind, Lsn(start));
        let mut epoch = Epoch::open(&self.repository, writer, opening, 1, Arc::clone(&out)).await.unwrap();
        let mut at = start;
        for length in lengths {
            let end = at + *length as u64;
            let time = self.clock.now();
            let marks = Marks {
                first_record: Some(Lsn(at)),
                last_record: Some((Lsn(at), Lsn(end))),
                commits: Some((time, time)),
            };
            epoch.append(Lsn(at), (at..end).map(&byte).collect(), marks).await.unwrap();
            at = end;
        }
        if close {
            epoch.close().await.unwrap();
        } else {
            drop(epoch);
        }
        Arc::into_inner(out).unwrap().drain().await;
    }
}
