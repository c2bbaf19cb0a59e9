//! The way through runs from one position to another.

use super::WalIndex;
use crate::model::{EpochId, Lsn, Result};
use crate::repository::handle::Repository;
use crate::repository::wal::index::runs::Run;

/// A step of reading: these frames of one epoch, of which only the bytes in `[from, to)` count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// The epoch.
    pub epoch: EpochId,
    /// First frame.
    pub first_seq: u64,
    /// Last frame of the run; reading stops earlier, at `to`.
    pub last_seq: u64,
    /// First byte wanted.
    pub from: Lsn,
    /// Byte after the last one wanted.
    pub to: Lsn,
}

/// Chooses runs that cover `[from, to)` together, as few as possible.
///
/// At the end of a run the next one takes over at the last complete record: what stands behind it is the torso of a
/// record that a crashed server may have written differently afterwards.
///
/// # Errors
/// Where the first hole is.
pub async fn cover(
    index: &WalIndex,
    repository: &Repository,
    runs: &[Run],
    (from, to): (Lsn, Lsn),
) -> Result<std::result::Result<Vec<Stretch>, Lsn>> {
    let mut stretches: Vec<Stretch> = Vec::new();
    let mut at = from;
    loop {
        let candidates = runs.iter().filter(|run| run.start() <= at && run.end() > at);
        let Some(run) = candidates.max_by_key(|run| run.end()) else { return Ok(Err(at)) };
        let first_seq = index.locate(repository, run, at).await?;
        let reaches = run.end().min(to);
        let (epoch, last_seq) = (run.first.place.epoch.clone(), run.last.place.seq);
        stretches.push(Stretch { epoch, first_seq, last_seq, from: at, to: reaches });
        let safe = run.last.span.last_record_end.filter(|end| *end > at).unwrap_or(run.end());
        let goes_on = |position: Lsn| runs.iter().any(|next| next.start() <= position && next.end() > run.end());
        // A range may end inside the torso, as the end of a segment may.
        if reaches >= to && (to <= safe || !goes_on(safe)) {
            return Ok(Ok(stretches));
        }
        at = match () {
            () if goes_on(safe) => safe,
            () if goes_on(run.end()) => run.end(),
            () => return Ok(Err(run.end())),
        };
        if let Some(last) = stretches.last_mut() {
            last.to = at;
        }
    }
}
