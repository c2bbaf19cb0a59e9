//! `--start`: PostgreSQL replays while WAL is still being staged, and is promoted.

use std::io::ErrorKind;
use std::os::unix::fs::lchown;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use futures::future::{Either, select};

use crate::disk::DiskError;
use crate::jobs::context::Context;
use crate::jobs::restore::conf;
use crate::jobs::restore::files::Site;
use crate::jobs::restore::plan::Prepared;
use crate::jobs::restore::report::{PhaseTime, Report, Started};
use crate::jobs::restore::stage::give;
use crate::jobs::restore::supply::Source;
use crate::jobs::restore::words::Feed;
use crate::jobs::restore::{Request, SCRATCH_PORT, STAGING, Scratch};
use crate::model::{Error, Result, ResultExt};
use crate::pg::instance::{Instance, InstanceError, InstanceOptions, Network, PgBinaries, Readiness, User};

const POLL: Duration = Duration::from_millis(50);
/// PostgreSQL says this when replay has ended.
const REDO_DONE: &str = "redo done at";

/// Starts PostgreSQL and returns when it is promoted. If anything fails the server is stopped before the error is told.
pub(super) async fn start(
    context: &Context,
    (request, prepared, owner): (&Request, &Prepared, Option<User>),
    (site, source): (Site, Source<'_>),
    (scratch, report): (Option<&Scratch>, &mut Report),
) -> Result<Instance> {
    let binaries = PgBinaries::find(prepared.plan.needs.major, None).await?;
    site.make_startable()?;
    let options = options(request, scratch, owner);
    let log = options.log_file.clone();
    let mut instance = Instance::start(&binaries, options).during(|| "start PostgreSQL")?;
    let phase = context.progress.begin("replay", None);
    let times = {
        let staging = pin!(source.fill(context, prepared, report));
        let promotion = pin!(promoted(context, &mut instance, &prepared.plan.command));
        match select(staging, promotion).await {
            // The server ends by itself when its restore_command finds nobody staging.
            Either::Left((staged, promotion)) => {
                staged?;
                promotion.await
            }
            Either::Right((times, staging)) => {
                let times = times?;
                if prepared.plan.feed == Feed::Staged {
                    staging.await?;
                }
                Ok(times)
            }
        }
    };
    drop(phase);
    let (replay, open) = times.during(|| "recover")?;
    report.phases.push(PhaseTime::new("replay", replay).of(prepared.plan.wal_bytes));
    report.phases.push(PhaseTime::new("open", open));
    give(&log, owner)?;
    report.warnings.extend(tidy(&request.directory, owner).err().map(|error| format!("not tidied up: {error}")));
    site.release()?;
    report.started = Some(Started { pid: instance.pid(), log });
    Ok(instance)
}

fn options(request: &Request, scratch: Option<&Scratch>, owner: Option<User>) -> InstanceOptions {
    let data_dir = request.directory.clone();
    match scratch {
        Some(Scratch { socket_dir, log_file, settings, network }) => InstanceOptions {
            data_dir,
            socket_dir: socket_dir.clone(),
            port: SCRATCH_PORT,
            settings: settings.clone(),
            log_file: log_file.clone(),
            as_user: owner,
            listens: false,
            network: *network,
        },
        None => InstanceOptions {
            socket_dir: data_dir.clone(),
            port: 0,
            settings: Vec::new(),
            log_file: data_dir.join("drctl-recovery.log"),
            as_user: owner,
            listens: true,
            network: Network::Shared,
            data_dir,
        },
    }
}

/// Waits until the server accepts writes. Returns how long replay and opening took.
async fn promoted(context: &Context, instance: &mut Instance, command: &str) -> Result<(Duration, Duration)> {
    let began = context.clock.monotonic();
    let mut replayed = None;
    loop {
        let now = context.clock.monotonic();
        if replayed.is_none() && instance.log_tail().contains(REDO_DONE) {
            replayed = Some(now);
        }
        match instance.readiness() {
            Ok(Readiness::Ready) => {
                let replayed = replayed.unwrap_or(now);
                return Ok((replayed - began, now - replayed));
            }
            Ok(Readiness::Stopping) => return Err(Error::failed("PostgreSQL shuts down instead of recovering")),
            Ok(_) => tokio::time::sleep(POLL).await,
            Err(error @ InstanceError::Exited { .. }) => {
                // WAL may not be staged to its end, and nobody goes on with it: PostgreSQL alone would not come up.
                let hint = format!("mend the cause, then run the restore again, which begins anew: {command}");
                return Err(Error::from(error).hint(hint));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Recovery is over: its settings and the staged WAL go.
fn tidy(directory: &Path, owner: Option<User>) -> Result<()> {
    conf::remove(directory)?;
    give(&directory.join(conf::AUTO_CONF), owner)?;
    let staging = directory.join(STAGING);
    match std::fs::remove_dir_all(&staging) {
        // What was streamed was not staged.
        Err(error) if error.kind() != ErrorKind::NotFound => Err(DiskError::new("remove", &staging, error).into()),
        _ => Ok(()),
    }
}

/// Gives a whole tree to the account that PostgreSQL runs as; links are given, never followed.
pub(super) fn hand_over(path: &Path, owner: User) -> Result<()> {
    let io = |error| DiskError::new("chown", path, error);
    lchown(path, Some(owner.uid), Some(owner.gid)).map_err(io)?;
    if std::fs::symlink_metadata(path).map_err(io)?.is_dir() {
        for entry in std::fs::read_dir(path).map_err(io)? {
            hand_over(&entry.map_err(io)?.path(), owner)?;
        }
    }
    Ok(())
}
