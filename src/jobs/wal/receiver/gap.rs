//! WAL that the server no longer has, or has in another version: looked for elsewhere, and written down if it is nowhere.

use crate::jobs::wal::fill::fill;
use crate::jobs::wal::run::{Run, Trouble};
use crate::jobs::wal::server::{self, Server, Start};
use crate::model::{Error, Lsn, Result};
use crate::repository::wal::gaps::{self, Gap};

impl Run {
    /// Others may have stored what the server no longer has. If not, that is written down at the quorum before anything
    /// else, so that no reader takes what follows for a continuation.
    pub(super) async fn close_gap(&mut self, reason: &str) -> Result<(), Trouble> {
        let mut client = server::connect(&self.target).await?;
        let server = Server::identify(&mut client).await?;
        self.check_identity(&server)?;
        let Some(cursor) = self.cursor.clone() else { return Ok(()) };
        let cursor = server.lacks_from(cursor);
        self.ship_pending().await?;
        // Before the slot is dropped, which lets the server remove what it still keeps: regions that do not answer now may
        // hold all that is missing.
        if self.is_filled(&cursor, &server).await? {
            return Ok(());
        }
        server::renew_slot(&mut client, &self.target.slot).await?;
        let server = Server::identify(&mut client).await?;
        self.check_identity(&server)?;
        let next = server.current_segment()?;
        if cursor.branch == next.branch && next.lsn <= cursor.lsn {
            return Err(Error::failed(format!("the server lacks WAL at {} that it still writes", cursor.lsn)).into());
        }
        self.read_files(&server, (&cursor, next.lsn)).await;
        if self.is_filled(&cursor, &server).await? {
            return Ok(());
        }
        Ok(self.record_gap(&cursor, next, reason).await?)
    }

    async fn record_gap(&mut self, cursor: &Start, next: Start, reason: &str) -> Result<()> {
        let now = self.context.clock.now();
        let reason = &self.given_up.as_ref().map_or_else(|| reason.to_owned(), |why| format!("{why}; {reason}"));
        let gap = Gap::new(&self.target.name, &cursor.branch, (cursor.lsn, next.lsn), reason, now);
        tracing::error!(target = %self.target.name, from = %gap.from, to = %gap.to, reason, "WAL is missing: a new base backup is needed");
        gaps::record(&self.context.repository, self.context.writer()?, &gap, &self.means.out).await?;
        let text = format!("gap from {} to {}: {reason}", gap.from, gap.to);
        self.shared.view.send_modify(|view| (view.gap, view.last_error) = (true, Some(text)));
        self.shared.stand_at(&next);
        self.cursor = Some(next);
        Ok(())
    }

    async fn read_files(&self, server: &Server, range: (&Start, Lsn)) {
        let target = &self.target.name;
        match fill((&self.context, &self.target), &self.filler, server, range).await {
            Ok(0) => tracing::info!(%target, "the server's directory does not hold what it lacks"),
            Ok(segments) => tracing::warn!(%target, segments, "files were read of WAL that the server does not stream"),
            Err(error) => tracing::warn!(%target, %error, "the server's files do not fill the gap"),
        }
    }

    /// Whether others stored what the server no longer has, from the cursor on without a hole. Then it goes on behind that.
    async fn is_filled(&mut self, cursor: &Start, server: &Server) -> Result<bool> {
        let tail = self.take_over(server, Some(&cursor.branch)).await?;
        let tail = tail.filter(|tail| tail.branch != cursor.branch || tail.end > cursor.lsn);
        let Some(tail) = tail.filter(|tail| tail.is_reached_from(&cursor.branch, cursor.lsn)) else { return Ok(false) };
        let filled = Start::from(tail);
        tracing::info!(target = %self.target.name, from = %cursor.lsn, to = %filled.lsn, "archived WAL takes the place of what the server lacks");
        self.shared.stand_at(&filled);
        self.cursor = Some(filled);
        Ok(true)
    }

    /// Two servers wrote one branch. The one that is stored stays, and whoever looks for it is told.
    pub(super) async fn contradict(&mut self, at: Lsn, error: &Error) -> Result<()> {
        let Some(branch) = self.cursor.as_ref().map(|cursor| cursor.branch.clone()) else { return Ok(()) };
        let (name, now) = (&self.target.name, self.context.clock.now());
        let gap = Gap::new(name, &branch, (at, Lsn(at.0 + 1)), error.message(), now).contradicted();
        tracing::error!(target = %name, %at, timeline = branch.timeline.0, %error, "WAL contradicts what is stored: two servers write one timeline");
        self.tell(&error.to_string());
        let recorded = gaps::record(&self.context.repository, self.context.writer()?, &gap, &self.means.out).await;
        if let Err(error) = recorded {
            // It is met again before anything is acknowledged.
            tracing::warn!(%error, "that WAL contradicts itself is not recorded yet");
        }
        Ok(())
    }
}
