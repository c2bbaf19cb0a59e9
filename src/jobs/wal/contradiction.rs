//! Two versions of one segment: both are stored, and nobody here can say which one the server means. It is written down in
//! every region, so that it is alarmed until a base backup begins behind it and no recovery crosses it unseen.

use crate::jobs::wal::segments::{Contradiction, SegmentDigest, SegmentKey};
use crate::model::{Lsn, Result, ResultExt};
use crate::repository::handle::{Repository, Writer};
use crate::repository::regions::fan_out::FanOut;
use crate::repository::wal::gaps::{self, Gap};
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::Log;

/// Records one, and tells it. Returns what is to be said of it.
///
/// # Errors
/// The write quorum was not reached.
pub(super) async fn record(
    (repository, writer): (&Repository, &Writer),
    log: &Log,
    found: &Contradiction,
    brought: &str,
    out: &FanOut,
) -> Result<String> {
    let Contradiction { key, before, now } = found;
    let SegmentKey { system_id, timeline, branch, start } = key.clone();
    let end = Lsn(start.0 + log.wal_segment_size.bytes());
    let digest = |digest: &SegmentDigest| hex::encode(digest).chars().take(16).collect::<String>();
    let reason = format!("{brought} other bytes ({}) than were stored before ({})", digest(now), digest(before));
    let branch = BranchId { system_id, timeline, branch };
    let range = (start, end);
    let gap = Gap::new(&log.target, &branch, range, &reason, writer.clock.now()).contradicted();
    tracing::error!(target = %log.target, from = %start, to = %end, timeline = timeline.0, reason, "WAL contradicts itself: two servers write one timeline, or a file was damaged");
    gaps::record(repository, writer, &gap, out).await.during(|| "record that WAL contradicts itself")?;
    Ok(format!("WAL from {start} to {end} is stored in two versions: {reason}"))
}
