//! The WAL between start and stop of a backup. Without it the pages are not consistent, so COMMIT waits for it.

use crate::jobs::context::{Context, Target};
use crate::model::{Branch, Error, Result, ResultExt};
use crate::pg::replication::{ReplicationClient, WalEvent};
use crate::pg::wal::{Expect, RecordWalker, magic_of};
use crate::repository::fan_out::{FanOut, Patience};
use crate::repository::wal_frame::EpochKind;
use crate::repository::wal_log::{Epoch, Log, Marks, store_history};
use crate::source::{Begun, Finished};

/// How the WAL of this backup becomes durable.
#[derive(Debug)]
pub(super) struct WalCover {
    client: ReplicationClient,
    slot: String,
}

impl WalCover {
    /// Makes the server keep its WAL, before the backup begins.
    pub(super) async fn prepare(context: &Context, target: &Target) -> Result<Self> {
        let conninfo = target.conninfo.clone().with_application_name("drctl backup wal");
        let mut client = ReplicationClient::connect(&conninfo).await?;
        let mut random = [0; 4];
        context.rng.fill(&mut random)?;
        let slot = format!("{}_backup_{}", target.slot, hex::encode(random));
        client.create_physical_slot(&slot, true, true).await?;
        Ok(Self { client, slot })
    }

    /// Returns once all WAL from start to stop is durable at the write quorum.
    pub(super) async fn secure(
        mut self,
        context: &Context,
        target: &Target,
        begun: &Begun,
        finished: &Finished,
    ) -> Result<(Branch, &'static str)> {
        let cluster = &begun.cluster;
        let out = std::sync::Arc::new(FanOut::new(&context.repository.regions, Patience::BACKUP));
        let branch = match begun.timeline.0 {
            1 => Branch::root(),
            _ => {
                let history = self.client.timeline_history(begun.timeline).await?;
                store_history(&context.repository, (cluster.system_id, begun.timeline), &history, &out).await?
            }
        };
        let log = Log {
            target: target.name.clone(),
            system_id: cluster.system_id,
            timeline: begun.timeline,
            branch: branch.clone(),
            wal_segment_size: cluster.wal_segment_size,
        };
        let start = cluster.wal_segment_size.segment_start(begun.start_lsn);
        let writer = context.writer()?;
        let mut epoch =
            Epoch::open(&context.repository, writer, (log, EpochKind::Backup, start), context.levels.wal, out).await?;
        let mut stream = self.client.start_physical(Some(&self.slot), start, begun.timeline).await?;
        let expect =
            Expect { magic: magic_of(cluster.version / 10_000), system_id: Some(cluster.system_id), history: None };
        let mut walker = RecordWalker::new(start, cluster.wal_segment_size).map_err(walk_error)?.expecting(expect);
        let (mut wal, mut marks, mut at) = (Vec::new(), Marks::default(), start);
        while epoch.durable() < finished.stop_lsn {
            let event = stream.next().await.during(|| "receive WAL")?;
            let WalEvent::Wal { start, data, .. } = event else { continue };
            let pushed = walker.push(start, &data, |_| ()).map_err(walk_error)?;
            marks.first_record = marks.first_record.or(pushed.first);
            marks.last_record = pushed.last.or(marks.last_record);
            wal.extend_from_slice(&data);
            let end = at.0 + wal.len() as u64;
            if wal.len() >= 4 * 1024 * 1024 || end >= finished.stop_lsn.0 {
                at = epoch.append(at, std::mem::take(&mut wal), std::mem::take(&mut marks)).await?;
            }
        }
        epoch.close().await?;
        Ok((branch, "own"))
    }
}

fn walk_error(error: crate::pg::wal::WalError) -> Error {
    Error::from(error).during("read WAL")
}
