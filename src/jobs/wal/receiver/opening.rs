//! One connection, opened: the slot, who answers there, and the place to begin at.
//!
//! It goes on from what is stored, never from what the server would offer: a slot that was lost and made again starts at
//! the server's present, and whoever believes it skips WAL without a word.

use std::sync::atomic::Ordering;

use crate::jobs::wal::buffer::Buffer;
use crate::jobs::wal::run::{Past, Run, SlotCare, Trouble};
use crate::jobs::wal::seam::Seam;
use crate::jobs::wal::server::{self, Server, Start};
use crate::jobs::wal::session::Session;
use crate::model::{Error, Result};
use crate::pg::replication::ReplicationClient;
use crate::repository::wal::frame::EpochKind;

impl Run {
    pub(super) async fn open(&mut self) -> Result<Session, Trouble> {
        let mut client = server::connect(&self.target).await?;
        let slot = self.prepare_slot(&mut client).await?;
        let asked = self.context.clock.monotonic();
        let server = Server::identify(&mut client).await?;
        self.check_identity(&server)?;
        self.note_role(&server);
        let (start, reason) = self.place(&mut client, &server).await?;
        self.store_histories(&server);
        let stored = start.lsn;
        let compares = self.kind == EpochKind::Stream && self.past != Past::Trust;
        let seam = compares.then(|| Seam::before(&start, &server)).flatten();
        self.past = if seam.is_some() { Past::Comparing } else { Past::Compare };
        let start = seam.as_ref().map_or(start, |seam| seam.begin().clone());
        let durable = self.settle(&start, seam.is_some()).await?;
        self.shared.sample(server.flush_lsn);
        self.shared.saw_all(asked);
        let mut walker = server.walker(&start)?;
        if self.tracker.is_some() {
            walker = walker.reading_blocks();
        }
        let stream = client.start_physical(Some(&slot), start.lsn, start.branch.timeline).await?;
        tracing::info!(target = %self.target.name, lsn = %start.lsn, timeline = start.branch.timeline.0, reason, "streaming");
        self.shared.view.send_modify(|view| {
            view.system_id = Some(server.system_id);
            view.branch = Some(start.branch.clone());
            view.received = start.lsn;
            view.start.get_or_insert((stored, reason.to_owned()));
        });
        self.sessions += 1;
        let log = server.log(&self.target, &start.branch);
        if let Some(tracker) = &mut self.tracker {
            tracker.begin(&log, stored);
        }
        let is_newest = server.branches().first() == Some(&start.branch);
        let session = Session::new((self.sessions, log), start, stream, Buffer::new(walker), durable).newest(is_newest);
        Ok(session.towards(seam).synchronous(self.target.sync && self.kind == EpochKind::Stream))
    }

    async fn prepare_slot(&mut self, client: &mut ReplicationClient) -> Result<String, Trouble> {
        let slot = self.target.slot.clone();
        match (self.kind, self.slot) {
            (EpochKind::Backup | EpochKind::Push, _) => {
                let slot = server::temporary_slot(&self.context, &self.target)?;
                client.create_physical_slot(&slot, true, true).await?;
                return Ok(slot);
            }
            (EpochKind::Stream, SlotCare::Trust) => {}
            (EpochKind::Stream, SlotCare::Ensure) => server::ensure_slot(client, &slot).await?,
            (EpochKind::Stream, SlotCare::Renew) => server::renew_slot(client, &slot).await?,
        }
        self.slot = SlotCare::Trust;
        Ok(slot)
    }

    /// A name that leads to another cluster all of a sudden must not mix two logs.
    pub(super) fn check_identity(&mut self, server: &Server) -> Result<()> {
        let known = *self.system_id.get_or_insert(server.system_id);
        if known == server.system_id {
            return Ok(());
        }
        let text = format!("{} is system {} now and was {known} before", self.target.name, server.system_id);
        Err(Error::refused(text).hint("if this is meant, start the receiver again"))
    }

    fn note_role(&self, server: &Server) {
        let was = self.shared.from_standby.swap(server.in_recovery, Ordering::Relaxed);
        if server.in_recovery && !was {
            let target = &self.target.name;
            tracing::info!(%target, "WAL is streamed from a standby: exposure counts from what its primary says");
            if self.target.sync {
                tracing::error!(%target, "sync = true, and no commit waits for a receiver that streams from a standby");
            }
        }
    }

    /// Where to begin, and why there.
    async fn place(
        &mut self,
        client: &mut ReplicationClient,
        server: &Server,
    ) -> Result<(Start, &'static str), Trouble> {
        let cursor = match &self.cursor {
            // Also of a backup's own receiver, whose timeline ended: what it skips is missing from the backup.
            Some(cursor) => Some(cursor.clone()),
            None if self.kind != EpochKind::Stream => {
                return Ok((server.current_segment()?, "the segment that the server writes now"));
            }
            None => {
                let tail = self.take_over_alone(server).await?;
                tail.map(Start::from)
            }
        };
        let Some(cursor) = cursor else {
            // The slot first: from here on the server keeps what it writes now.
            server::ensure_slot(client, &self.target.slot).await?;
            let mut server = server.clone();
            server.flush_lsn = client.identify_system().await?.flush_lsn;
            return Ok((server.current_segment()?, "no WAL of this cluster is stored yet"));
        };
        let start = server.continue_at(&cursor).ok_or_else(|| {
            let timeline = cursor.branch.timeline;
            Error::refused(format!("timeline {timeline}, which is stored, is not in the history of this server"))
        })?;
        self.cursor = Some(cursor);
        Ok((start, "where stored WAL ends"))
    }

    fn store_histories(&mut self, server: &Server) {
        for (branch, descent) in server.branches().into_iter().zip(&server.lineage) {
            if let (Some(file), true) = (&descent.file, self.stored_histories.insert(branch.clone())) {
                self.shipper.history(branch.system_id, branch.timeline, file.clone());
            }
        }
    }
}
