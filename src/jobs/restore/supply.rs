//! How WAL reaches the server that recovers: staged beside it, or streamed to it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::jobs::context::Context;
use crate::jobs::feed::{self, Feed as Walsender, Options, Way};
use crate::jobs::restore::STAGING;
use crate::jobs::restore::conf::{self, RecoverySettings, Supply};
use crate::jobs::restore::plan::Prepared;
use crate::jobs::restore::report::{PhaseTime, Report};
use crate::jobs::restore::stage::{self, Stager, place_histories};
use crate::jobs::restore::words::Feed;
use crate::model::{Error, Result, ResultExt};
use crate::pg::instance::User;
use crate::repository::wal::reader::Reading;

/// How often a feed is asked whether it is in doubt.
const LOOK: Duration = Duration::from_millis(200);

/// What a server that recovers reads from.
#[derive(Debug)]
pub(super) enum Source<'a> {
    /// A staging directory that is to be filled, and its first WAL, if that was asked for already.
    Staged(Stager, Option<Box<Reading<'a>>>),
    /// A walsender.
    Streamed(Walsender),
}

/// The first WAL that is to be staged, on its way.
pub(super) async fn begin<'a>(context: &'a Context, prepared: &'a Prepared) -> Result<Option<Box<Reading<'a>>>> {
    if prepared.plan.feed == Feed::Streamed {
        return Ok(None);
    }
    let first = stage::begin(context, &prepared.repository, &prepared.route).await.during(|| "stage WAL")?;
    Ok(first.map(Box::new))
}

impl<'a> Source<'a> {
    /// Prepares it, and tells the server's configuration about it.
    pub(super) async fn prepare(
        context: &Context,
        (prepared, begun): (&Prepared, Option<Box<Reading<'a>>>),
        directory: &Path,
        owner: Option<User>,
    ) -> Result<Self> {
        match prepared.plan.feed {
            Feed::Staged => Self::stage((prepared, begun), directory, owner),
            Feed::Streamed => Self::stream(context, prepared, directory, owner).await,
        }
    }

    fn stage(
        (prepared, begun): (&Prepared, Option<Box<Reading<'a>>>),
        directory: &Path,
        owner: Option<User>,
    ) -> Result<Self> {
        let staging = directory.join(STAGING);
        configure(prepared, directory, Supply::Staged { drctl: &this_program()?, staging: &staging })?;
        let stager = Stager::prepare(&staging, &prepared.route, owner).during(|| "stage WAL")?;
        Ok(Self::Staged(stager, begun))
    }

    async fn stream(context: &Context, prepared: &Prepared, directory: &Path, owner: Option<User>) -> Result<Self> {
        let Prepared { route, pin, .. } = prepared;
        let socket_dir = feed::place_in(directory, context.rng.as_ref())?;
        place_histories(&directory.join("pg_wal"), route, owner)?;
        let branches = route.legs.iter().map(|leg| (leg.branch.timeline, leg.branch.branch.clone()));
        let branches: BTreeMap<_, _> = branches.collect();
        let way = Way::planned(route.need.system_id, route.history.clone(), branches, pin.end);
        let context = Context { repository: prepared.repository.clone(), ..context.clone() };
        let options = Options { socket_dir: socket_dir.clone(), owner, origin: route.need.clone(), way: Some(way) };
        let feed = Walsender::open(&context, options).await.during(|| "serve WAL")?;
        let conninfo = feed::conninfo(&socket_dir, "drctl restore");
        configure(prepared, directory, Supply::Streamed { conninfo: &conninfo })?;
        Ok(Self::Streamed(feed))
    }

    /// Stages to the end, or serves until the feed is in doubt: its WAL is stored, and cannot be given out.
    pub(super) async fn fill(self, context: &Context, prepared: &Prepared, report: &mut Report) -> Result<()> {
        let feed = match self {
            Self::Staged(stager, begun) => return fill(context, prepared, (stager, begun), report).await,
            Self::Streamed(feed) => feed,
        };
        loop {
            if let Some(doubt) = feed.position().doubt {
                let error = Error::damaged(format!("the WAL from {} on is not given to recovery", doubt.at));
                let hint = format!("restore to a point before it: --to-lsn {}", doubt.at);
                return Err(error.because(doubt.why).hint(hint));
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn configure(prepared: &Prepared, directory: &Path, supply: Supply<'_>) -> Result<()> {
    let (record, timeline) = (prepared.pin.record, prepared.route.timeline());
    conf::append(directory, &RecoverySettings { supply, record, timeline }.block()?)
}

/// Writes the WAL of the plan as segments.
async fn fill(
    context: &Context,
    prepared: &Prepared,
    (stager, begun): (Stager, Option<Box<Reading<'_>>>),
    report: &mut Report,
) -> Result<()> {
    let phase = Arc::new(context.progress.begin("stage", Some(prepared.plan.wal_bytes)));
    let began = context.clock.monotonic();
    let route = (&prepared.route, begun.map(|first| *first));
    let bytes = stager.fill((context, &prepared.repository), route, &phase).await.during(|| "stage WAL")?;
    report.phases.push(PhaseTime::new("stage", context.clock.monotonic() - began).of(bytes));
    Ok(())
}

/// The program that `restore_command` calls: this one, by its absolute path.
fn this_program() -> Result<PathBuf> {
    std::env::current_exe().map_err(|error| Error::failed("find the path of this program").because(error))
}
