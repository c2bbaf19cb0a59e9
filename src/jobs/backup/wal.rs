//! The WAL between start and stop of a backup. Without it the pages are not consistent, so COMMIT waits for it.

use std::time::Duration;

use crate::jobs::context::{Context, Target};
use crate::jobs::wal::position::reaches;
use crate::jobs::wal::{Position, Receiver, State, control, wait_durable_at};
use crate::model::{Branch, Error, Kind, Result, ResultExt};
use crate::repository::regions::fan_out::LaneOutcome;
use crate::repository::wal::index::{BranchId, WalIndex, windows};
use crate::source::{Begun, Finished};

/// As long as a backup waits for its write quorum.
const LIMIT: Duration = Duration::from_secs(600);

/// Who makes the WAL of this backup durable.
#[derive(Debug)]
pub(super) enum WalCover {
    /// A running `drctl wal stream` of the target.
    Running(Option<Branch>),
    /// The backup's own receiver, in an epoch of its own.
    Own(Box<Receiver>),
}

/// The WAL of a backup, durable.
#[derive(Debug)]
pub(super) struct Secured {
    /// The branch that it is on.
    pub(super) branch: Branch,
    /// Who made it durable: `receiver` or `own`.
    pub(super) by: &'static str,
    /// What each region lacks of it, as far as this backup wrote it.
    pub(super) regions: Vec<LaneOutcome>,
}

impl WalCover {
    /// Finds or starts a receiver, before the backup begins. From here on the server keeps its WAL for it.
    pub(super) async fn prepare(context: &Context, target: &Target) -> Result<Self> {
        let position = control::position(&target.control_socket, &target.name).await?;
        let works = |position: &Position| position.state == State::Streaming && position.branch.is_some();
        if let Some(position) = position.filter(works) {
            return Ok(Self::Running(position.branch));
        }
        let receiver = Receiver::for_backup(context, target).await?;
        Ok(Self::Own(Box::new(receiver)))
    }

    /// Whether WAL passes a receiver that was there before.
    pub(super) const fn is_streaming(&self) -> bool {
        matches!(self, Self::Running(_))
    }

    /// The branch of the timeline that the server is on, as the receiver knows it.
    pub(super) fn branch(&self) -> Option<Branch> {
        match self {
            Self::Running(branch) => branch.clone(),
            Self::Own(receiver) => receiver.position().branch,
        }
    }

    /// Returns once all WAL from start to stop is durable at the write quorum.
    pub(super) async fn secure(
        self,
        context: &Context,
        target: &Target,
        begun: &Begun,
        finished: &Finished,
    ) -> Result<Secured> {
        let (position, by, lanes) = match self {
            Self::Running(_) => {
                let position = wait_durable_at(target, finished.stop_lsn, LIMIT).await?;
                let gone =
                    || Error::failed("the WAL receiver went away during the backup").hint("run the backup again");
                (position.ok_or_else(gone)?, "receiver", Vec::new())
            }
            Self::Own(mut receiver) => {
                receiver.wait_durable(finished.stop_lsn, LIMIT).await?;
                let position = receiver.position();
                let lanes = receiver.stop().await.during(|| "close the backup's WAL epoch")?;
                (position, "own", lanes)
            }
        };
        let branch = branch_of(&position, begun)?;
        check_stored(context, begun, finished, &branch).await?;
        Ok(Secured { branch, by, regions: lanes })
    }
}

fn branch_of(position: &Position, begun: &Begun) -> Result<Branch> {
    if position.system_id != Some(begun.cluster.system_id) {
        let text = "the WAL receiver streams another cluster than the one that is backed up";
        return Err(Error::failed(text).hint("check the target's conninfo and control_socket"));
    }
    let same = position.timeline == Some(begun.timeline);
    let branch = same.then(|| position.branch.clone()).flatten();
    branch
        .ok_or_else(|| Error::failed("the server changed its timeline during the backup").hint("run the backup again"))
}

/// What the receiver reports is checked against what the regions list: a receiver that began too late, or behind a
/// gap, would leave a backup that cannot be made consistent.
async fn check_stored(context: &Context, begun: &Begun, finished: &Finished, branch: &Branch) -> Result<()> {
    let (system_id, timeline) = (begun.cluster.system_id, begun.timeline);
    let regions = &context.repository.regions;
    let index = WalIndex::load(regions, BranchId { system_id, timeline, branch: branch.clone() }).await;
    let mut covered = 0;
    for region in regions.all() {
        let (runs, _) = index.runs(&context.repository, Some(&region.name)).await;
        let whole = windows(&runs)
            .iter()
            .any(|window| window.start <= begun.start_lsn && reaches(window.end, finished.stop_lsn));
        covered += usize::from(whole);
    }
    if covered >= regions.quorum() {
        return Ok(());
    }
    let (start, stop, quorum) = (begun.start_lsn, finished.stop_lsn, regions.quorum());
    let text = format!("WAL {start} to {stop} of the backup is in {covered} regions, fewer than {quorum}");
    let unreadable = index.unreadable().iter();
    let error = unreadable
        .fold(Error::new(Kind::Unavailable, text), |error, (region, why)| error.because(format!("{region}: {why}")));
    Err(error.hint("run the backup again; if it stays, see: drctl wal status"))
}
