//! The run of a plan.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;

use futures::future::{Either, join, select};

use crate::disk::place;
use crate::jobs::context::Context;
use crate::jobs::restore::files::{Filesystems, Manifest, RECOVERY_SIGNAL, STANDBY_SIGNAL, Site};
use crate::jobs::restore::plan::{Prepared, quoted};
use crate::jobs::restore::recover;
use crate::jobs::restore::report::{PhaseTime, Report};
use crate::jobs::restore::supply::{self, Source};
use crate::jobs::restore::words::{Feed, Plan};
use crate::jobs::restore::{Request, STAGING, Scratch};
use crate::model::commit::WalNeed;
use crate::model::{Result, ResultExt};
use crate::pg::instance::{Instance, User};
use crate::repository::restore::{Destination, Leftover, restore_files};

/// Runs the plan; gives the server if the request is to start one.
pub(super) async fn run(
    context: &Context,
    request: &Request,
    prepared: Prepared,
    scratch: Option<&Scratch>,
) -> Result<(Report, Option<Instance>)> {
    let begun = context.clock.monotonic();
    let owner = request.run_as.as_deref().map(User::named).transpose()?;
    let site = Site::take(request, &prepared, context.clock.now())?;
    let mut report = report(&prepared.plan);
    let (leftover, manifest) = fetch(context, (request, &prepared), site.filesystems(), &mut report).await?;
    let first_wal = supply::begin(context, &prepared).await?;
    let signal = match prepared.plan.feed {
        Feed::Staged => RECOVERY_SIGNAL,
        Feed::Streamed => STANDBY_SIGNAL,
    };
    let notes = site
        .complete(&leftover, manifest, (&prepared.commit, &prepared.route.need), signal)
        .during(|| "complete the data directory")?;
    report.warnings.extend(notes);
    let source = Source::prepare(context, (&prepared, first_wal), &site.directory, owner).await?;
    if let Some(owner) = owner {
        recover::hand_over(&site.directory, owner)?;
        request.tablespaces.values().try_for_each(|place| recover::hand_over(place, owner))?;
    }
    let instance = if request.start {
        let subject = (request, &prepared, owner);
        Some(recover::start(context, subject, (site, source), (scratch, &mut report)).await?)
    } else {
        source.fill(context, &prepared, &mut report).await?;
        site.make_startable()?;
        site.release()?;
        report.next = by_hand(request, &prepared.plan);
        None
    };
    report.incidents = prepared.repository.regions.incidents();
    report.seconds = (context.clock.monotonic() - begun).as_secs_f64();
    Ok((report, instance))
}

/// Restores everything of a standby but its server's settings.
pub(super) async fn lay(
    context: &Context,
    request: &Request,
    prepared: Prepared,
    (name, document): (&str, Vec<u8>),
) -> Result<Report> {
    let begun = context.clock.monotonic();
    let owner = request.run_as.as_deref().map(User::named).transpose()?;
    let site = Site::take(request, &prepared, context.clock.now())?;
    let mut report = report(&prepared.plan);
    let (leftover, manifest) = fetch(context, (request, &prepared), site.filesystems(), &mut report).await?;
    let notes = site
        .complete(&leftover, manifest, (&prepared.commit, &prepared.route.need), STANDBY_SIGNAL)
        .during(|| "complete the data directory")?;
    report.warnings.extend(notes);
    place::place(&site.directory.join(name), &document, 0o600)?;
    if let Some(owner) = owner {
        recover::hand_over(&site.directory, owner)?;
        request.tablespaces.values().try_for_each(|place| recover::hand_over(place, owner))?;
    }
    site.make_startable()?;
    site.release()?;
    report.incidents = prepared.repository.regions.incidents();
    report.seconds = (context.clock.monotonic() - begun).as_secs_f64();
    Ok(report)
}

fn report(plan: &Plan) -> Report {
    Report {
        plan: plan.digest.clone(),
        backup: plan.backup.clone(),
        target: plan.target.clone(),
        directory: plan.directory.clone(),
        recovered_to: plan.end_lsn,
        timeline: plan.timeline,
        last_commit: plan.last_commit,
        phases: Vec::new(),
        seconds: 0.0,
        started: None,
        incidents: Vec::new(),
        warnings: plan.warnings.clone(),
        next: Vec::new(),
        stored_as: None,
        record: None,
    }
}

/// Fetches and writes every file of the backup.
async fn fetch(
    context: &Context,
    (request, prepared): (&Request, &Prepared),
    filesystems: &Filesystems,
    report: &mut Report,
) -> Result<(Leftover, Manifest)> {
    let Prepared { plan, repository, commit, inventory, parts, route, .. } = prepared;
    let need: &WalNeed = &route.need;
    let mut manifest = Manifest::begin(&request.directory, need, context.clock.now())?;
    let phase = Arc::new(context.progress.begin("fetch", Some(commit.size_bytes)));
    let began = context.clock.monotonic();
    let destination = Destination {
        reuse: request.delta,
        memory: request.memory,
        ..Destination::empty(request.directory.clone(), request.tablespaces.clone())
    };
    let mut written = |file| manifest.add(&file);
    let backup = (commit, inventory.as_slice(), parts.clone());
    let restored = {
        let restoring = pin!(restore_files(repository, &context.ring, backup, &destination, (&phase, &mut written)));
        // What staging and the record of the run need is asked for meanwhile; a region that hangs is not waited for.
        let meanwhile = pin!(join(filesystems.flush_meanwhile(), prepare_the_end(context, prepared)));
        match select(restoring, meanwhile).await {
            Either::Left((restored, _)) => restored,
            Either::Right(((failed, ()), _)) => Err(failed),
        }
    };
    let leftover = restored.during(|| format!("restore {}", plan.backup))?;
    let mut time = PhaseTime::new("fetch", context.clock.monotonic() - began).of(leftover.bytes);
    time.fetched_bytes = Some(leftover.fetched);
    time.reused_bytes = request.delta.then_some(leftover.reused);
    report.phases.push(time);
    Ok((leftover, manifest))
}

/// Opens the keys of the WAL, and lets regions that will take the record prove what they can. What fails here is told where
/// it is needed.
async fn prepare_the_end(context: &Context, Prepared { repository, route, .. }: &Prepared) {
    let stretches = route.legs.iter().flat_map(|leg| leg.stretches.iter().map(move |stretch| (leg, stretch)));
    let mut keysets = Vec::new();
    for (leg, stretch) in stretches {
        if let Ok(header) = leg.log.header(repository, &stretch.epoch, stretch.first_seq).await {
            keysets.push((header.target, header.keyset));
        }
    }
    let probe = async {
        if context.writer.is_some() {
            repository.regions.probe().await;
        }
    };
    tokio::join!(context.ring.open_all(keysets), probe);
}

fn by_hand(request: &Request, plan: &Plan) -> Vec<String> {
    let word = |path: &Path| quoted(&path.display().to_string());
    let (directory, staged) = (word(&request.directory), word(&request.directory.join(STAGING)));
    let program = plan.needs.found_at.as_ref().map_or_else(|| "pg_ctl".to_owned(), |path| word(&path.join("pg_ctl")));
    vec![
        format!("start it as the PostgreSQL user: {program} -D {directory} start"),
        format!("after promotion: rm -r {staged}"),
    ]
}
