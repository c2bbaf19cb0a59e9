//! The plan: which backup, which WAL, to which record, at what cost, and everything that speaks against it.

use std::path::PathBuf;
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use sha2::{Digest as _, Sha256};

use crate::jobs::context::Context;
use crate::jobs::lineage::Follow;
use crate::jobs::restore::checks::{self, Checked};
use crate::jobs::restore::contents::Contents;
use crate::jobs::restore::crossed::Crossed;
use crate::jobs::restore::route::Route;
use crate::jobs::restore::stage::staged_bytes;
use crate::jobs::restore::target::{Finder, Pin, Point, Unreached};
use crate::jobs::restore::words::{Feed, Needs, Plan, Refusal, WalLeg};
use crate::jobs::restore::{Known, Request};
use crate::model::commit::{Commit, WalNeed};
use crate::model::{Error, Kind, Lsn, RegionName, Result, ResultExt};
use crate::repository::catalog::{self, Backup};
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::restore::{KeptParts, Memory};

/// What restore and replay are assumed to manage per second before any drill has measured it.
const ASSUMED_RATE: u64 = 150_000_000;

/// The plan, and what its run needs.
#[derive(Debug)]
pub struct Prepared {
    /// What is going to be done.
    pub plan: Plan,
    pub(super) repository: Repository,
    pub(super) commit: Commit,
    pub(super) inventory: Vec<InventoryLine>,
    /// Parts of the manifest that were read for the plan.
    pub(super) parts: KeptParts,
    pub(super) route: Route,
    pub(super) pin: Pin,
    /// Paths that are removed first.
    pub(super) doomed: Vec<PathBuf>,
}

/// A backup that leads to the point.
struct Chosen {
    commit: Commit,
    route: Route,
    pin: Pin,
    newest_commit: Option<DateTime<Utc>>,
    last_commit: Option<DateTime<Utc>>,
    /// How far the server's clock was ahead of that of whoever stored its WAL.
    clock_ahead: Option<TimeDelta>,
}

impl Prepared {
    pub(super) async fn new(context: &Context, request: &Request) -> Result<Self> {
        let repository = preferring(&context.repository, request.region.as_ref())?;
        let known = match &request.known {
            Some(known) => Arc::clone(known),
            None => Arc::new(Known::load(context, &repository, &request.what).await?),
        };
        let candidates = candidates(&known.backups, request)?;
        // Most often the first one is the one: what it holds is read while its WAL is looked for.
        let (way, likely) = tokio::join!(
            Self::way(context, &repository, request, &candidates),
            Contents::read_first(context, &repository, (&candidates, request))
        );
        let (Chosen { commit, route, pin, newest_commit, last_commit, clock_ahead }, crossed) = way?;
        let contents = match likely {
            Some((likely, contents)) if likely == commit.id => contents,
            _ => Contents::read(context, &repository, (&commit, request)).await,
        };
        let mut contents = contents?;
        let mut plan = outset(request, (&commit, &route, pin));
        (plan.last_commit, plan.newest_commit) = (last_commit, newest_commit);
        plan.regions = std::mem::take(&mut contents.regions);
        plan.fetch_bytes = contents.inventory.iter().map(|line| line.size).sum();
        plan.expected_seconds = (commit.size_bytes + plan.wal_bytes) / ASSUMED_RATE + 1;
        plan.digest = digest(&plan, request, &repository)?;
        plan.warnings.extend(clock_ahead.map(|ahead| {
            let ahead = ahead.num_seconds();
            format!("the server's clock was {ahead} s ahead of that of whoever stored its WAL: times are the server's")
        }));
        plan.warnings.extend(known.damaged.iter().map(|error| format!("a COMMIT is not readable: {error}")));
        contents.tell(&mut plan);
        crossed.tell(&mut plan);
        let Contents { inventory, outline, parts, survey, .. } = contents;
        let mut doomed = Vec::new();
        if request.delta && outline.is_some() {
            let (found, removed) = survey.end(plan.needs.major)?;
            (plan.reuse, doomed) = (Some(found), removed);
        }
        let checked = Checked { context, request, commit: &commit, outline: outline.as_ref() };
        checks::check(&checked, &mut plan).await?;
        plan.command = command(&plan, request);
        let unlisted = repository.trust.unlisted();
        if !unlisted.is_empty() {
            let names = unlisted.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            plan.warnings
                .push(format!("no list of trusted signers: trusting {names} (compare with what init printed)"));
        }
        Ok(Self { plan, repository, commit, inventory, parts, route, pin, doomed })
    }

    /// The backup that leads to the point, and what its WAL is up against.
    async fn way(
        context: &Context,
        repository: &Repository,
        request: &Request,
        candidates: &[Commit],
    ) -> Result<(Chosen, Crossed)> {
        let chosen = choose(context, repository, request, candidates).await?;
        let crossed = Crossed::read(context, repository, &chosen.route).await?;
        Ok((chosen, crossed))
    }
}

impl Prepared {
    /// The WAL that the backup needs, and where it began.
    pub fn need(&self) -> &WalNeed {
        &self.route.need
    }
}

fn preferring(repository: &Repository, region: Option<&RegionName>) -> Result<Repository> {
    let regions = match region {
        Some(name) => repository.regions.preferring(name)?,
        None => repository.regions.clone(),
    };
    Ok(Repository { regions, ..repository.clone() })
}

/// The backups that may lead to the point, best first: the one that was named, or for a target every one of it, the
/// newest that ends before the point first.
fn candidates(backups: &[Backup], request: &Request) -> Result<Vec<Commit>> {
    let selected = &catalog::select(backups, &request.what)?.commit;
    let is_target = request.what == selected.target.as_str() || request.what == "latest";
    let ends_before = |commit: &Commit| match (&request.point, &commit.wal) {
        (Point::Time(time), _) => commit.finished_at <= *time,
        (Point::Lsn(lsn), Some(need)) => need.stop_lsn <= *lsn,
        _ => true,
    };
    if !is_target {
        return Ok(vec![selected.clone()]);
    }
    let of_target = backups.iter().rev().map(|backup| &backup.commit);
    let mut of_target = of_target.filter(|commit| commit.target == selected.target && commit.wal.is_some());
    let fitting: Vec<_> = of_target.clone().filter(|commit| ends_before(commit)).cloned().collect();
    // The clocks of writer and server may differ: when none seems to fit, the oldest is asked all the same.
    if fitting.is_empty() { Ok(of_target.next_back().into_iter().cloned().collect()) } else { Ok(fitting) }
}

async fn choose(
    context: &Context,
    repository: &Repository,
    request: &Request,
    candidates: &[Commit],
) -> Result<Chosen> {
    let mut first_problem = None;
    for commit in candidates {
        let need = wal_of(commit)?;
        let mut route = Route::find(repository, need, request.timeline.as_ref())
            .await
            .during(|| format!("find the WAL of {}", commit.id))?;
        let finder = Finder { context, repository, route: &route, began: commit.started_at };
        match finder.find(&request.point).await? {
            Ok(pin) => {
                let newest_commit = finder.last_commit(route.end()).await?;
                let last_commit = match pin.end == route.end() {
                    true => newest_commit,
                    false => finder.last_commit(pin.end).await?,
                };
                let clock_ahead = finder.clock_ahead(pin.end).await?;
                route.cut(pin.end);
                return Ok(Chosen { commit: commit.clone(), route, pin, newest_commit, last_commit, clock_ahead });
            }
            Err(Unreached::TooEarly(why)) => {
                first_problem.get_or_insert_with(|| too_early(commit, &why));
            }
            // What is missing in the WAL of this backup may stand in that of an older one, before this one began.
            Err(Unreached::NotFound(error)) => {
                first_problem.get_or_insert(error);
                if !matches!(request.point, Point::Xid(_) | Point::Name(_)) {
                    break;
                }
            }
        }
    }
    let problem = first_problem.unwrap_or_else(|| Error::not_found("there is no backup with WAL"));
    let Some(target) = candidates.first().map(|commit| &commit.target) else { return Err(problem) };
    let Ok((backups, _)) = catalog::backups(repository, Some(target)).await else { return Err(problem) };
    let remaining = remaining(repository, request.timeline.as_ref(), backups.iter().map(|backup| &backup.commit)).await;
    Err(if remaining.is_empty() {
        problem
    } else {
        problem.because(format!("can be restored: {}", remaining.join(", ")))
    })
}

/// Backups whose windows are told when a point is refused.
const TOLD: usize = 12;

/// What can be reached from the newest backups, oldest first; backups of one window say it once.
async fn remaining<'a>(
    repository: &Repository,
    timeline: Option<&Follow>,
    backups: impl DoubleEndedIterator<Item = &'a Commit>,
) -> Vec<String> {
    let mut windows: Vec<(Lsn, Lsn)> = Vec::new();
    let newest: Vec<_> = backups.filter_map(|commit| commit.wal.as_ref()).rev().take(TOLD).collect();
    for need in newest.into_iter().rev() {
        let Ok(route) = Route::find(repository, need, timeline).await else { continue };
        match windows.last_mut() {
            Some((from, to)) if *to == route.end() => *from = (*from).min(need.stop_lsn),
            _ => windows.push((need.stop_lsn, route.end())),
        }
    }
    windows.into_iter().map(|(from, to)| format!("{from} to {to}")).collect()
}

fn too_early(commit: &Commit, why: &str) -> Error {
    let error = Error::refused(format!("the point cannot be reached from {}", commit.id)).because(why);
    error.hint(format!("an older backup may lead there: drctl list {}", commit.target))
}

fn wal_of(commit: &Commit) -> Result<&WalNeed> {
    commit.wal.as_ref().ok_or_else(|| Error::refused(format!("{} is not a physical backup of PostgreSQL", commit.id)))
}

/// The plan as far as backup and WAL decide it.
fn outset(request: &Request, (commit, route, pin): (&Commit, &Route, Pin)) -> Plan {
    let leg = |leg: &super::route::Leg| WalLeg {
        system_id: leg.branch.system_id,
        timeline: leg.branch.timeline,
        branch: leg.branch.branch.clone(),
        from: leg.from,
        to: leg.to,
        bytes: leg.to.bytes_since(leg.from),
    };
    let wal: Vec<_> = route.legs.iter().map(leg).collect();
    Plan {
        digest: String::new(),
        backup: commit.id.clone(),
        target: commit.target.clone(),
        backup_finished_at: commit.finished_at,
        point: request.point.clone(),
        regions: Vec::new(),
        consistent_at: route.need.stop_lsn,
        last_record: pin.record,
        end_lsn: pin.end,
        timeline: route.timeline(),
        last_commit: None,
        newest_commit: None,
        unreachable: route.beyond.clone(),
        not_followed: route.not_followed.clone(),
        fetch_bytes: 0,
        wal_bytes: wal.iter().map(|leg| leg.bytes).sum(),
        wal,
        write_bytes: (commit.size_bytes, staged_bytes(route)),
        feed: Feed::Staged,
        reuse: None,
        free_bytes: None,
        expected_seconds: 0,
        predicted: None,
        assumed_rate: ASSUMED_RATE,
        opens_with: None,
        needs: Needs {
            major: route.need.server_version / 10_000,
            server_version: route.need.server_version,
            ..Needs::default()
        },
        directory: request.directory.clone(),
        tablespaces: Vec::new(),
        start: request.start,
        refused: Vec::new(),
        warnings: route.beyond.iter().chain(&route.not_followed).cloned().collect(),
        command: String::new(),
    }
}

/// SHA-256 over everything that decides what ends up on disk; no rates, no times.
fn digest(plan: &Plan, request: &Request, repository: &Repository) -> Result<String> {
    let regions: Vec<_> = repository.regions.all().iter().map(|region| &region.name).collect();
    // A standby goes on from wherever WAL ends: what was begun for one end is good for the next.
    let standby = serde_json::json!({
        "repository": repository.id,
        "target": plan.target,
        "directory": request.directory,
        "tablespaces": request.tablespaces,
        "action": "standby",
    });
    // Keys of a JSON object are sorted, so this is one text for one plan.
    let restore = serde_json::json!({
        "repository": repository.id,
        "backup": plan.backup,
        "regions": regions,
        "directory": request.directory,
        "tablespaces": request.tablespaces,
        "last_record": plan.last_record,
        "end_lsn": plan.end_lsn,
        "timeline": plan.timeline,
        "branch": plan.wal.last().map(|leg| &leg.branch),
        "action": "promote",
        "delta": request.delta,
    });
    let canonical = if request.standby { &standby } else { &restore };
    let text = serde_json::to_vec(canonical).map_err(|error| Error::failed("encode the plan").because(error))?;
    Ok(hex::encode(Sha256::digest(&text)))
}

/// The command that runs exactly this plan: the backup by its id, the end pinned.
fn command(plan: &Plan, request: &Request) -> String {
    let mut words: Vec<_> = request.invocation.iter().map(|word| quoted(word)).collect();
    words.extend(["restore".to_owned(), plan.backup.to_string()]);
    words.push(format!("--target-dir {}", quoted(&request.directory.display().to_string())));
    words.push(format!("--to-lsn {}", plan.end_lsn));
    words.extend(request.timeline.as_ref().map(|timeline| format!("--timeline {timeline}")));
    words.extend(request.region.as_ref().map(|region| format!("--region {region}")));
    words.extend(request.tablespaces.iter().map(|(old, new)| {
        let escape = |path: &str| path.replace('=', "\\=");
        format!("--tablespace {}", quoted(&format!("{}={}", escape(old), escape(&new.display().to_string()))))
    }));
    words.extend(request.delta.then(|| "--delta".to_owned()));
    words.extend(
        match plan.feed {
            Feed::Streamed => Some("--feed stream"),
            Feed::Staged => request.feed.map(|_| "--feed stage"),
        }
        .map(str::to_owned),
    );
    if request.memory != Memory::default() {
        words.push(format!("--memory {}", request.memory.bytes()));
    }
    words.push(format!("--plan {} --execute", plan.short_digest()));
    if request.start {
        words.push("--start".to_owned());
    }
    words.extend(request.run_as.as_ref().map(|user| format!("--run-as {user}")));
    words.join(" ")
}

/// A word as a shell reads it.
pub fn quoted(text: &str) -> String {
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+:=@,".contains(c));
    if plain { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

impl Plan {
    /// As people type it.
    pub fn short_digest(&self) -> &str {
        self.digest.get(..6).unwrap_or(&self.digest)
    }

    /// An error if something stands in the way.
    ///
    /// # Errors
    /// The refusals.
    pub fn refuse(&self) -> Result<()> {
        let Some(first) = self.refused.first() else { return Ok(()) };
        let error = Error::refused(format!("{} is not restored: {}", self.backup, first.what));
        let rest = self.refused.iter().map(|refusal| format!("{}: {}", refusal.what, refusal.why));
        Err(rest.fold(error, |error, refusal| error.because(refusal)).hint(first.next.clone()))
    }

    /// WAL goes to the server as a primary would send it, and stays there back to the last restartpoint.
    /// Where more comes all the time, it comes to `room` whatever is stored now.
    pub(super) fn stream_wal(&mut self, room: u64, goes_on: bool) {
        self.feed = Feed::Streamed;
        self.write_bytes.1 = if goes_on { room } else { self.write_bytes.1.min(room) };
    }

    pub(super) fn refuse_because(&mut self, what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) {
        self.refused.push(Refusal { what: what.into(), why: why.into(), next: next.into(), judges: false });
    }

    /// A key holder that is away may open it tomorrow; one that was asked and could not will not.
    pub(super) fn refuse_unopened(&mut self, what: &str, error: &Error) {
        self.refused.push(Refusal {
            what: what.to_owned(),
            why: error.to_string(),
            next: "pass --age-identity FILE, or credentials for one of the KMS keys".to_owned(),
            judges: error.kind() == Kind::NoKey,
        });
    }
}
