//! What speaks against a plan on this machine.

use std::path::Path;

use crate::disk::empty::{Contents, contents};
use crate::disk::space::{free_bytes, taken_bytes};
use crate::jobs::context::{Context, Target};
use crate::jobs::restore::marker::{is_free, is_unfinished};
use crate::jobs::restore::words::{Feed, Plan};
use crate::jobs::restore::{Primary, Request, delta, primary};
use crate::model::commit::Commit;
use crate::model::{Result, SystemId};
use crate::pg::instance::{PgBinaries, Postmaster, User, postmaster_of};
use crate::repository::restore::{CONTROL_FILE, Leftover};

/// What is checked.
#[derive(Debug)]
pub(super) struct Checked<'a> {
    pub(super) context: &'a Context,
    pub(super) request: &'a Request,
    pub(super) commit: &'a Commit,
    pub(super) outline: Option<&'a Leftover>,
}

/// Adds refusals and warnings.
pub(super) async fn check(checked: &Checked<'_>, plan: &mut Plan) -> Result<()> {
    let Checked { context, request, commit, outline } = checked;
    let system = commit.wal.as_ref().map(|need| need.system_id);
    directory(request, system, plan)?;
    space(request, *outline, plan);
    if let Some(outline) = outline {
        tablespaces(request, outline, plan)?;
        needs(outline, plan);
        let damaged: usize = outline.damaged.iter().map(|(_, blocks)| blocks.len()).sum();
        if damaged > 0 {
            plan.warnings
                .push(format!("{damaged} pages were damaged on the source already; see: drctl show {}", commit.id));
        }
    }
    programs(request, plan).await;
    if let (Ok(target), Some(need)) = (context.target(&commit.target), &commit.wal)
        && !request.standby
    {
        primary(target, need.system_id, plan).await;
    }
    for region in plan.regions.iter().filter(|region| region.missing > 0) {
        let note = format!(
            "{} objects missing in {} are taken elsewhere; afterwards: drctl repair",
            region.missing, region.name
        );
        plan.warnings.push(note);
    }
    Ok(())
}

fn directory(request: &Request, system: Option<SystemId>, plan: &mut Plan) -> Result<()> {
    let directory = request.directory.as_path();
    let shown = directory.display();
    if let Postmaster::Alive { pid } = postmaster_of(directory)? {
        plan.refuse_because(
            format!("a server (pid {pid}) runs on {shown}"),
            "its files would be overwritten",
            "name another directory, or stop it",
        );
        return Ok(());
    }
    match contents(directory) {
        Ok(Contents::Missing | Contents::Empty) => plan.reuse = None,
        Ok(Contents::Occupied(_)) if request.delta && !is_free(directory)? => standing(directory, system, plan)?,
        Ok(Contents::Occupied(_)) if is_unfinished(directory, &plan.digest) => {
            plan.warnings.push(format!("{shown} holds an unfinished run of this plan, which starts anew"));
        }
        Ok(Contents::Occupied(_)) if is_free(directory)? => {}
        Ok(Contents::Occupied(example)) => {
            plan.refuse_because(
                format!("{shown} is not empty"),
                format!("it contains {example}"),
                "name a directory that is empty or does not exist",
            );
        }
        Err(error) => {
            plan.refuse_because(format!("{shown} is not usable"), error.to_string(), "name another directory")
        }
    }
    Ok(())
}

/// What is to be reused must be this cluster's, and stopped.
fn standing(directory: &Path, system: Option<SystemId>, plan: &mut Plan) -> Result<()> {
    let shown = directory.display();
    match delta::owner_of(directory) {
        Some(owner) if Some(owner) == system => {}
        Some(owner) => plan.refuse_because(
            format!("{shown} is the data directory of another cluster"),
            format!("its system identifier is {owner}"),
            "name another directory",
        ),
        None => plan.refuse_because(
            format!("{shown} does not say which cluster it is of"),
            format!("it has no readable {CONTROL_FILE}, and everything in it would be replaced"),
            "name a directory that is empty or does not exist",
        ),
    }
    if std::fs::symlink_metadata(directory.join("pg_wal")).is_ok_and(|found| found.is_symlink()) {
        let next = "put an empty directory in its place, or name another directory";
        plan.refuse_because(format!("{shown}/pg_wal is a link"), "a restore writes nothing through links", next);
    }
    if let Postmaster::Stale { pid } = postmaster_of(directory)? {
        let warning =
            format!("a server (pid {pid}) did not stop cleanly there: make sure that none in another container runs");
        plan.warnings.push(warning);
    }
    let logs = plan.reuse.as_ref().map_or(0, |reuse| reuse.remove_logs);
    if logs > 0 {
        plan.warnings
            .push(format!("{logs} files in {shown}/log are removed: copy them first if somebody is to read them"));
    }
    Ok(())
}

fn space(request: &Request, outline: Option<&Leftover>, plan: &mut Plan) {
    let room = streamed_room(outline);
    let directory = request.directory.as_path();
    let existing = directory.ancestors().find(|path| path.is_dir());
    // What an unfinished run of this plan left is wiped before anything is written; what is reused takes no new space.
    let left_over = match plan.reuse.is_some() || is_unfinished(directory, &plan.digest) {
        true => taken_bytes(directory).unwrap_or(0),
        false => 0,
    };
    feed(request, room, plan);
    plan.free_bytes = existing.and_then(|path| free_bytes(path).ok()).map(|free| free.saturating_add(left_over));
    let staged = plan.write_bytes.1;
    let is_short = |plan: &Plan| plan.free_bytes.is_some_and(|free| free < plan.write_bytes.0 + plan.write_bytes.1);
    if is_short(plan) && request.start && request.feed.is_none() {
        plan.stream_wal(room, false);
        if !is_short(plan) {
            plan.warnings.push(format!("there is no room to stage {staged} bytes of WAL: it is streamed"));
        }
    }
    let wanted = plan.write_bytes.0 + plan.write_bytes.1;
    if let Some(free) = plan.free_bytes.filter(|free| *free < wanted) {
        let why = format!("{wanted} bytes are written, {free} are free");
        plan.refuse_because(
            format!("too little space at {}", directory.display()),
            why,
            "free space, or name another directory",
        );
    }
}

/// What a server that recovers from a stream keeps in `pg_wal`: by PostgreSQL's word up to a checkpoint's worth more than
/// `max_wal_size`, which it brings along.
fn streamed_room(outline: Option<&Leftover>) -> u64 {
    const DEFAULT: u64 = 1 << 30;
    let configured = outline.and_then(configuration).and_then(|document| {
        let settings = document.get("settings")?.as_array()?;
        let named = settings.iter().find(|setting| setting.get("name").is_some_and(|name| name == "max_wal_size"))?;
        bytes_of(named.get("value")?.as_str()?)
    });
    configured.unwrap_or(DEFAULT).saturating_mul(2)
}

/// `64MB`, `1GB`, as the server shows a setting that it keeps in megabytes.
fn bytes_of(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at_checked(text.find(|c: char| !c.is_ascii_digit())?)?;
    let unit = match unit {
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        "TB" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

fn configuration(outline: &Leftover) -> Option<&serde_json::Value> {
    let document = outline.documents.iter().find(|(name, _)| name == crate::jobs::backup::CONFIGURATION);
    document.map(|(_, document)| document)
}

/// How WAL is asked to reach recovery.
fn feed(request: &Request, room: u64, plan: &mut Plan) {
    if request.standby || request.feed == Some(Feed::Streamed) {
        plan.stream_wal(room, request.standby);
    }
    if plan.feed == Feed::Streamed && !request.start {
        let why = "WAL is streamed while drctl watches the recovery";
        plan.refuse_because("WAL cannot be streamed to a server that somebody else starts", why, "add --start");
    }
}

/// Every tablespace needs a new place, even if it is the old one: writing outside of the data directory is never
/// implied.
fn tablespaces(request: &Request, outline: &Leftover, plan: &mut Plan) -> Result<()> {
    for (_, location) in &outline.tablespaces {
        let place = request.tablespaces.get(location);
        plan.tablespaces.push((location.clone(), place.cloned()));
        let Some(place) = place else {
            let next = format!("--tablespace {location}=/new/empty/directory");
            plan.refuse_because(
                format!("tablespace {location} has no place here"),
                "it lies outside of the data directory",
                next,
            );
            continue;
        };
        let unfinished = is_unfinished(&request.directory, &plan.digest);
        match contents(place) {
            Ok(Contents::Missing | Contents::Empty) => {}
            Ok(Contents::Occupied(_)) if unfinished => {}
            Ok(Contents::Occupied(_)) if request.delta && delta::is_tablespace_of(&request.directory, place) => {}
            Ok(Contents::Occupied(example)) => {
                let next = "name a directory that is empty or does not exist";
                plan.refuse_because(
                    format!("{} is not empty", place.display()),
                    format!("it contains {example}"),
                    next,
                );
            }
            Err(error) => plan.refuse_because(
                format!("{} is not usable", place.display()),
                error.to_string(),
                "name another directory",
            ),
        }
        if place.starts_with(&request.directory) {
            let why = "a tablespace inside of the data directory would be backed up twice";
            plan.refuse_because(
                format!("{} lies in the data directory", place.display()),
                why,
                "name a directory beside it",
            );
        }
    }
    let unknown: Vec<_> = request
        .tablespaces
        .keys()
        .filter(|old| !outline.tablespaces.iter().any(|(_, location)| location == *old))
        .collect();
    for old in unknown {
        plan.refuse_because(format!("the backup has no tablespace at {old}"), "--tablespace names it", "leave it out");
    }
    Ok(())
}

fn needs(outline: &Leftover, plan: &mut Plan) {
    let Some(document) = configuration(outline) else {
        plan.warnings.push("the backup holds no configuration around the cluster".to_owned());
        return;
    };
    let list = |key: &str| document.get(key).and_then(serde_json::Value::as_array).cloned().unwrap_or_default();
    let text =
        |value: &serde_json::Value, key: &str| value.get(key).and_then(|value| value.as_str()).unwrap_or("").to_owned();
    plan.needs.extensions = list("extensions").iter().map(|extension| text(extension, "name")).collect();
    plan.needs.preload = text(document, "shared_preload_libraries");
    let collation = |value: &serde_json::Value| {
        let version = text(value, "actual_version");
        (!version.is_empty()).then(|| format!("{} {version}", text(value, "provider")))
    };
    plan.needs.collations = list("collations").iter().filter_map(collation).collect();
    plan.needs.collations.dedup();
    let archives = list("settings")
        .iter()
        .any(|setting| text(setting, "name") == "archive_mode" && text(setting, "value") != "off");
    if archives {
        plan.warnings.push("archive_mode is on: the restored server archives as soon as it is promoted".to_owned());
    }
}

async fn programs(request: &Request, plan: &mut Plan) {
    let major = plan.needs.major;
    match PgBinaries::find(major, None).await {
        Ok(found) => plan.needs.found_at = Some(found.directory),
        Err(error) if request.start => {
            let next = format!("install PostgreSQL {major}, or set DRCTL_PG_BIN_{major}");
            plan.refuse_because(format!("PostgreSQL {major} is not installed here"), error.to_string(), next);
        }
        Err(_) => plan
            .warnings
            .push(format!("PostgreSQL {major} is not installed here; nothing else reads this data directory")),
    }
    let is_root = rustix::process::geteuid().is_root();
    match &request.run_as {
        Some(name) => {
            if let Err(error) = User::named(name) {
                plan.refuse_because(format!("--run-as {name}"), error.to_string(), "name an account of this machine");
            }
        }
        None if is_root && request.start => {
            plan.refuse_because("PostgreSQL does not run as root", "drctl does", "add --run-as postgres");
        }
        None if is_root => {
            plan.warnings.push("the files will belong to root: chown them, or add --run-as USER".to_owned())
        }
        None => {}
    }
}

/// A primary that still answers would take writes that nobody restores.
async fn primary(target: &Target, system: SystemId, plan: &mut Plan) {
    if primary::ask(target, system).await == Primary::Answers {
        let servers = target.conninfo.servers().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let warning = format!(
            "the primary at {servers} still answers with this system identifier: fence it before clients reconnect"
        );
        plan.warnings.push(warning);
    }
}
