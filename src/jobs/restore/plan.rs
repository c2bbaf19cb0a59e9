//! The plan: which backup, which WAL, to which record, at what cost, and everything that speaks against it.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};

use crate::jobs::context::Context;
use crate::jobs::restore::Request;
use crate::jobs::restore::checks::{self, Checked};
use crate::jobs::restore::delta::Survey;
use crate::jobs::restore::route::{Follow, Route};
use crate::jobs::restore::stage::staged_bytes;
use crate::jobs::restore::target::{Finder, Pin, Point, Unreached};
use crate::jobs::restore::words::{Needs, Plan, Refusal, RegionState, WalLeg};
use crate::model::commit::{Commit, WalNeed};
use crate::model::{Error, Kind, Lsn, RegionName, Result, ResultExt};
use crate::repository::catalog::{self, Backup, Held};
use crate::repository::gaps::{self, Gap};
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::manifest::Line;
use crate::repository::restore::{Leftover, Memory, read_outline};

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
}

impl Prepared {
    pub(super) async fn new(context: &Context, request: &Request) -> Result<Self> {
        let repository = preferring(&context.repository, request.region.as_ref())?;
        let (backups, damaged) = catalog::backups(&repository, None).await.during(|| "list the backups")?;
        let candidates = candidates(&backups, request)?;
        let Chosen { commit, route, pin, newest_commit, last_commit } =
            choose(context, &repository, request, (&candidates, &backups)).await?;
        let inventory = catalog::inventory(&repository, &commit).await?;
        let mut survey = Survey::new(request);
        let look = |line: &Line| {
            if request.delta {
                survey.see(line)
            }
        };
        let (regions, outline) = tokio::join!(
            regions(&repository, &commit, &inventory),
            read_outline(&repository, &context.ring, (&commit, &inventory), look)
        );
        let outline = outline.map(|(_, outline)| outline);
        let mut plan = outset(request, (&commit, &route, pin));
        (plan.last_commit, plan.newest_commit, plan.regions) = (last_commit, newest_commit, regions);
        plan.fetch_bytes = inventory.iter().map(|line| line.size).sum();
        plan.expected_seconds = (commit.size_bytes + plan.wal_bytes) / ASSUMED_RATE + 1;
        plan.digest = digest(&plan, request, &repository)?;
        plan.warnings.extend(damaged.iter().map(|error| format!("a COMMIT is not readable: {error}")));
        plan.command = command(&plan, request);
        let outline = plan.open(context, (&commit, &inventory), outline).await?;
        plan.cross(context, &repository, &route).await?;
        let mut doomed = Vec::new();
        if request.delta && outline.is_some() {
            let (found, removed) = survey.end(plan.needs.major)?;
            (plan.reuse, doomed) = (Some(found), removed);
        }
        let checked = Checked { context, request, commit: &commit, outline: outline.as_ref() };
        checks::check(&checked, &mut plan).await?;
        let unlisted = repository.trust.unlisted();
        if !unlisted.is_empty() {
            let names = unlisted.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            plan.warnings
                .push(format!("no list of trusted signers: trusting {names} (compare with what init printed)"));
        }
        Ok(Self { plan, repository, commit, inventory, route, pin, doomed })
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
    (candidates, backups): (&[Commit], &[Backup]),
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
                route.cut(pin.end);
                return Ok(Chosen { commit: commit.clone(), route, pin, newest_commit, last_commit });
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
    let target = candidates.first().map(|commit| &commit.target);
    let of_target = backups.iter().map(|backup| &backup.commit).filter(|commit| Some(&commit.target) == target);
    let remaining = remaining(repository, request.timeline.as_ref(), of_target).await;
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

async fn regions(repository: &Repository, commit: &Commit, inventory: &[InventoryLine]) -> Vec<RegionState> {
    let states = repository.regions.all().iter().map(|region| async move {
        let debt = Held::list(region, &commit.target).await.debt(commit, inventory);
        let missing = debt.missing.len() + debt.damaged.len();
        RegionState { name: region.name.clone(), missing, unreadable: debt.unreadable }
    });
    futures::future::join_all(states).await
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
        fetch_bytes: 0,
        wal_bytes: wal.iter().map(|leg| leg.bytes).sum(),
        wal,
        write_bytes: (commit.size_bytes, staged_bytes(route)),
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
        warnings: route.beyond.iter().cloned().collect(),
        command: String::new(),
    }
}

/// SHA-256 over everything that decides what ends up on disk; no rates, no times.
fn digest(plan: &Plan, request: &Request, repository: &Repository) -> Result<String> {
    let regions: Vec<_> = repository.regions.all().iter().map(|region| &region.name).collect();
    // Keys of a JSON object are sorted, so this is one text for one plan.
    let canonical = serde_json::json!({
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
    let text = serde_json::to_vec(&canonical).map_err(|error| Error::failed("encode the plan").because(error))?;
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

fn before(at: Lsn) -> String {
    format!("restore to a point before it (--to-lsn {at}), or from a backup that began behind it: drctl list")
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

    pub(super) fn refuse_because(&mut self, what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) {
        self.refused.push(Refusal { what: what.into(), why: why.into(), next: next.into(), judges: false });
    }

    /// WAL of which two versions are stored is not crossed. Where no key opens it, the records that its writers left say so.
    async fn cross(&mut self, context: &Context, repository: &Repository, route: &Route) -> Result<()> {
        for leg in &route.legs {
            let (recorded, _) = gaps::read(repository, &leg.branch).await?;
            let crossed = |gap: &Gap| gap.contradiction && gap.from < leg.to && leg.from < gap.to;
            for gap in recorded.into_iter().filter(crossed) {
                let what = format!("the WAL from {} to {} was stored in two versions", gap.from, gap.to);
                self.refuse_because(what, gap.reason, before(gap.from));
            }
            let (found, unread) = leg.log.compare(repository, &context.ring, (leg.from, leg.to)).await;
            for contradiction in &found {
                let error = Error::from(contradiction);
                self.refuse_because(error.message(), error.causes().join("; "), before(contradiction.at));
            }
            // A key that is missing is told where the backup is opened.
            let damage = unread.iter().filter(|error| !matches!(error.kind(), Kind::NoKey | Kind::Unavailable));
            self.warnings.extend(damage.map(|error| format!("overlapping WAL was not compared: {error}")));
        }
        Ok(())
    }

    /// A key holder that is away may open it tomorrow; one that was asked and could not will not.
    fn refuse_unopened(&mut self, what: &str, error: &Error) {
        self.refused.push(Refusal {
            what: what.to_owned(),
            why: error.to_string(),
            next: "pass --age-identity FILE, or credentials for one of the KMS keys".to_owned(),
            judges: error.kind() == Kind::NoKey,
        });
    }

    /// Tries the keys. A backup that no key opens is a refusal, and the rest of the plan still shows.
    async fn open(
        &mut self,
        context: &Context,
        (commit, inventory): (&Commit, &[InventoryLine]),
        outline: Result<Leftover>,
    ) -> Result<Option<Leftover>> {
        match context.ring.try_open(&commit.target, &commit.keyset).await {
            Ok((_, by)) => self.opens_with = Some(by),
            Err(error) => {
                self.refuse_unopened("no key opens the backup", &error);
            }
        }
        for keyset in catalog::keysets(commit, inventory).into_iter().filter(|keyset| *keyset != commit.keyset) {
            if let Err(error) = context.ring.open(&commit.target, &keyset).await {
                let what = "no key opens pages that the backup shares with an earlier one";
                self.refuse_unopened(what, &error);
            }
        }
        match outline {
            Ok(outline) => Ok(Some(outline)),
            Err(error) if self.opens_with.is_none() && matches!(error.kind(), Kind::NoKey | Kind::Unavailable) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
