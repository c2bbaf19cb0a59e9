//! The plan: which backup, which of its streams, where to, and everything that speaks against it.

use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::directory::{is_unfinished, occupied};
use super::words::{Backup, Destination, Plan};
use super::{Database, Options, Request, To};
use crate::disk::space::{free_bytes, taken_bytes};
use crate::jobs::backup::streams::{DESCRIPTION, NOTES};
use crate::jobs::context::{Context, What};
use crate::jobs::restore::{RegionState, quoted};
use crate::model::commit::{BackupKind, Commit};
use crate::model::{Error, Result, ResultExt};
use crate::pg::conninfo::ConnInfo;
use crate::pg::instance::PgBinaries;
use crate::repository::backup::stream::StreamLine;
use crate::repository::catalog::{self, Held};
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::restore::streams::StoredStreams;
use crate::source::{dump, files};

/// What CREATE DATABASE copies.
const TEMPLATES: [&str; 2] = ["template0", "template1"];

/// The plan, and what its run needs.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) plan: Plan,
    pub(super) repository: Repository,
    pub(super) stored: StoredStreams,
    pub(super) into: Option<Target>,
}

/// A database on a server, and what goes into it.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) into: dump::Goal,
    pub(super) contents: dump::Contents,
    pub(super) database: dump::Database,
    pub(super) wishes: dump::Wishes,
}

impl Prepared {
    pub(super) async fn new(context: &Context, request: &Request) -> Result<Self> {
        let regions = match &request.region {
            Some(name) => context.repository.regions.preferring(name)?,
            None => context.repository.regions.clone(),
        };
        let repository = Repository { regions, ..context.repository.clone() };
        let (backups, damaged) = catalog::backups(&repository, None).await.during(|| "list the backups")?;
        let commit = catalog::find((&backups, &damaged), &request.what)?.commit.clone();
        if !matches!(commit.kind, BackupKind::Dump | BackupKind::Files) {
            let error = Error::refused(format!("{} is of a cluster, not of dumps or files", commit.id));
            return Err(error.hint("name a backup by its id: drctl list"));
        }
        let inventory = catalog::inventory(&repository, &commit).await?;
        let stored = StoredStreams::open(&repository, &context.ring, (&commit, &inventory)).await;
        let stored = stored.during(|| format!("read what {} holds", commit.id))?;
        let into = match &request.to {
            To::Database(wanted) => Some(target(context, &commit, wanted, &stored)?),
            To::Directory { .. } => None,
        };
        let mut plan = outset(request, (&commit, &inventory, &stored), into.as_ref())?;
        plan.regions = regions_of(&repository, &commit, &inventory).await;
        plan.opens_with = context.ring.try_open(&commit.target, &commit.keyset).await.ok().map(|(_, by)| by);
        plan.digest = digest(&plan, request, &repository)?;
        plan.warnings.extend(damaged.iter().map(|error| format!("a COMMIT is not readable: {error}")));
        plan.warnings.extend(told(&stored));
        match (&request.to, &into) {
            (To::Directory { path, .. }, _) => plan.check_directory(path),
            (To::Database(wanted), Some(target)) => plan.check_database(wanted, target).await,
            (To::Database(_), None) => {}
        }
        for region in plan.regions.iter().filter(|region| region.missing > 0) {
            let (missing, name) = (region.missing, &region.name);
            let what = format!("{missing} objects missing in {name} are taken elsewhere; afterwards: drctl repair");
            plan.warnings.push(what);
        }
        let unlisted = repository.trust.unlisted();
        if !unlisted.is_empty() {
            let names = unlisted.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let what = format!("no list of trusted signers: trusting {names} (compare with what init printed)");
            plan.warnings.push(what);
        }
        plan.command = command(&plan, request);
        Ok(Self { plan, repository, stored, into })
    }
}

/// What the backup says of itself.
fn told(stored: &StoredStreams) -> Vec<String> {
    let list = |name: &str| {
        let list = stored.documents.get(NOTES).and_then(|notes| notes.get(name)).and_then(|list| list.as_array());
        let texts = list.into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned));
        texts.collect::<Vec<_>>()
    };
    let left_out = list("left_out").into_iter().map(|text| format!("left out of the backup: {text}"));
    let notes = list("notes").into_iter().map(|text| format!("when it was taken: {text}"));
    left_out.chain(notes).collect()
}

/// Which of the dumped databases, and into which server.
fn target(context: &Context, commit: &Commit, wanted: &Database, stored: &StoredStreams) -> Result<Target> {
    if commit.kind != BackupKind::Dump {
        let error = Error::usage(format!("{} holds files, which go into a directory", commit.id));
        return Err(error.hint("--target-dir DIR instead of --into-database"));
    }
    let contents: dump::Contents = described(commit, stored)?;
    let database = match (&wanted.from, contents.databases.as_slice()) {
        (None, [one]) => one.clone(),
        (Some(name), all) if all.iter().any(|known| known.name == *name) => {
            all.iter().find(|known| known.name == *name).cloned().ok_or_else(|| Error::not_found(name.as_str()))?
        }
        (from, all) => {
            let names = all.iter().map(|known| known.name.as_str()).collect::<Vec<_>>().join(", ");
            let error = match from {
                Some(name) => Error::usage(format!("{} holds no dump of a database {name}", commit.id)),
                None => Error::usage(format!("{} holds dumps of {} databases", commit.id, all.len())),
            };
            return Err(error.hint(format!("--from-database with one of: {names}")));
        }
    };
    let configured = || -> Option<ConnInfo> {
        match &context.streamed(&commit.target)?.what {
            What::Dump(options) => Some(options.conninfo.clone()),
            What::Files(_) => None,
        }
    };
    let given = wanted.conninfo.as_deref().map(ConnInfo::from_text).transpose().map_err(Error::from)?;
    let conninfo = given.or_else(configured);
    let conninfo = conninfo.ok_or_else(|| {
        let error = Error::usage(format!("nothing says on which server {} is to stand", wanted.name));
        error.hint("--conninfo \"host=… user=… dbname=postgres\", with the password in PGPASSWORD or a password file")
    })?;
    let into = dump::Goal { conninfo, name: wanted.name.clone() };
    let Options { no_owner, no_tablespaces, many_transactions, .. } = wanted.options;
    let wishes = dump::Wishes { no_owner, no_tablespaces, many_transactions };
    Ok(Target { into, contents, database, wishes })
}

/// The document of the source.
fn described<T: serde::de::DeserializeOwned>(commit: &Commit, stored: &StoredStreams) -> Result<T> {
    let wrong = || Error::damaged(format!("{} does not say what its streams are", commit.id));
    let document = stored.documents.get(DESCRIPTION).ok_or_else(wrong)?;
    serde_json::from_value(document.clone()).map_err(|error| wrong().because(error))
}

fn outset(
    request: &Request,
    (commit, inventory, stored): (&Commit, &[InventoryLine], &StoredStreams),
    into: Option<&Target>,
) -> Result<Plan> {
    let (destination, streams) = match (&request.to, into) {
        (To::Database(_), Some(target)) => {
            let destination = Destination::Database {
                name: target.into.name.clone(),
                server: target.into.conninfo.servers().iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
                from: target.database.name.clone(),
                create: false,
                one_transaction: !target.wishes.many_transactions,
            };
            (
                destination,
                stored.streams.iter().filter(|stream| stream.name == target.database.stream).cloned().collect(),
            )
        }
        (To::Directory { path, raw }, _) => {
            let tree = commit.kind == BackupKind::Files && !raw;
            let directory = path.clone();
            let destination =
                if tree { Destination::Tree { directory } } else { Destination::StreamFiles { directory } };
            (destination, stored.streams.clone())
        }
        (To::Database(wanted), None) => return Err(Error::failed(format!("nothing goes into {}", wanted.name))),
    };
    let write_bytes = streams.iter().map(|stream: &StreamLine| stream.bytes).sum();
    let backup = Backup {
        id: commit.id.clone(),
        target: commit.target.clone(),
        kind: commit.kind.as_str(),
        finished_at: commit.finished_at,
        recovery_point: into.map_or(commit.started_at, |target| target.database.snapshot_at),
        streams,
    };
    Ok(Plan {
        digest: String::new(),
        backup,
        destination,
        regions: Vec::new(),
        fetch_bytes: inventory.iter().map(|line| line.size).sum(),
        write_bytes,
        free_bytes: None,
        opens_with: None,
        refused: Vec::new(),
        warnings: Vec::new(),
        command: String::new(),
    })
}

async fn regions_of(repository: &Repository, commit: &Commit, inventory: &[InventoryLine]) -> Vec<RegionState> {
    let states = repository.regions.all().iter().map(|region| async move {
        let debt = Held::list(region, &commit.target).await.debt(commit, inventory);
        let missing = debt.missing.len() + debt.damaged.len();
        RegionState { name: region.name.clone(), missing, unreadable: debt.unreadable }
    });
    futures::future::join_all(states).await
}

/// SHA-256 over everything that decides what comes to stand where.
fn digest(plan: &Plan, request: &Request, repository: &Repository) -> Result<String> {
    let regions: Vec<_> = repository.regions.all().iter().map(|region| &region.name).collect();
    let options = match &request.to {
        To::Directory { .. } => serde_json::Value::Null,
        To::Database(database) => serde_json::json!({
            "into_nonempty": database.options.into_nonempty,
            "no_owner": database.options.no_owner,
            "no_tablespaces": database.options.no_tablespaces,
        }),
    };
    // Keys of a JSON object are sorted, so this is one text for one plan.
    let canonical = serde_json::json!({
        "repository": repository.id,
        "backup": plan.backup.id,
        "regions": regions,
        "destination": plan.destination,
        "options": options,
    });
    let text = serde_json::to_vec(&canonical).map_err(|error| Error::failed("encode the plan").because(error))?;
    Ok(hex::encode(Sha256::digest(&text)))
}

/// The command that runs exactly this plan.
fn command(plan: &Plan, request: &Request) -> String {
    let mut words: Vec<_> = request.invocation.iter().map(|word| quoted(word)).collect();
    words.extend(["restore".to_owned(), plan.backup.id.to_string()]);
    let option = |name: &str, value: &str| format!("--{name} {}", quoted(value));
    match &request.to {
        To::Directory { path, raw } => {
            words.push(option("target-dir", &path.display().to_string()));
            words.extend(raw.then(|| "--raw".to_owned()));
        }
        To::Database(database) => {
            words.push(option("into-database", &database.name));
            words.extend(database.from.as_ref().map(|from| option("from-database", from)));
            words.extend(database.conninfo.as_ref().map(|text| option("conninfo", text)));
            let Options { into_nonempty, no_owner, no_tablespaces, many_transactions } = database.options;
            let flags = [
                ("--into-nonempty", into_nonempty),
                ("--no-owner", no_owner),
                ("--no-tablespaces", no_tablespaces),
                ("--many-transactions", many_transactions),
            ];
            words.extend(flags.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag.to_owned()));
        }
    }
    words.extend(request.region.as_ref().map(|region| format!("--region {region}")));
    words.push(format!("--plan {} --execute", plan.short_digest()));
    words.join(" ")
}

impl Plan {
    fn check_directory(&mut self, directory: &Path) {
        let shown = directory.display();
        match occupied(directory, &self.digest) {
            Ok(None) if is_unfinished(directory, &self.digest) => {
                self.warnings.push(format!("{shown} holds an unfinished run of this plan, which starts anew"));
            }
            Ok(None) => {}
            Ok(Some(example)) => self.refuse_because(
                format!("{shown} is not empty"),
                format!("it contains {example}"),
                "name a directory that is empty or does not exist",
            ),
            Err(error) => {
                self.refuse_because(format!("{shown} is not usable"), error.to_string(), "name another directory");
            }
        }
        let existing = directory.ancestors().find(|path| path.is_dir());
        let left = if is_unfinished(directory, &self.digest) { taken_bytes(directory).unwrap_or(0) } else { 0 };
        self.free_bytes = existing.and_then(|path| free_bytes(path).ok()).map(|free| free.saturating_add(left));
        let wanted = self.write_bytes;
        if let Some(free) = self.free_bytes.filter(|free| *free < wanted) {
            let why = format!("{wanted} bytes are written, {free} are free");
            let next = "free space, or name another directory";
            self.refuse_because(format!("too little space at {shown}"), why, next);
        }
        if let (Destination::Tree { .. }, false) = (&self.destination, rustix::process::geteuid().is_root()) {
            self.warnings.push("owners are not restored: drctl is not root".to_owned());
        }
    }

    async fn check_database(&mut self, wanted: &Database, target: &Target) {
        let name = &target.into.name;
        if TEMPLATES.contains(&name.as_str()) {
            let why = "every database that is made later would hold what the dump holds";
            return self.refuse_because(format!("{name} is a template"), why, "name a database of your own");
        }
        let major = target.contents.pg_dump_major;
        if let Err(error) = PgBinaries::find_client(major, None).await {
            let next = format!("install postgresql-client-{major}, or set DRCTL_PG_BIN_{major}");
            self.refuse_because(format!("pg_restore of PostgreSQL {major} is not here"), error.to_string(), next);
        }
        let place = match dump::inspect(&target.into, &target.database).await {
            Ok(place) => place,
            Err(error) => {
                let next = error.hint_text().unwrap_or("see to the server, or name another with --conninfo").to_owned();
                return self.refuse_because("the server cannot be asked", error.to_string(), next);
            }
        };
        let (theirs, ours) = (place.version / 10_000, target.contents.server_version / 10_000);
        if theirs < ours {
            let what = format!("the server has PostgreSQL {theirs}, and the dump is of {ours}");
            self.refuse_because(what, "an older server does not know all of it", "name a newer server");
        }
        let make = place.objects.is_none();
        if let Destination::Database { create, .. } = &mut self.destination {
            *create = make;
        }
        match place.objects {
            None if !place.may_create => self.refuse_because(
                format!("database {name} does not exist"),
                "our role may not create it",
                format!("ALTER ROLE … CREATEDB;   or create the database {name}, empty"),
            ),
            Some(1..) if !wanted.options.into_nonempty => self.refuse_because(
                format!("database {name} is not empty"),
                "what the dump holds might be there already",
                "name a database that does not exist; or --into-nonempty: whatever clashes then ends the restore",
            ),
            _ => {}
        }
        if !place.missing_roles.is_empty() && !wanted.options.no_owner {
            let roles = place.missing_roles.join(", ");
            self.refuse_because(
                format!("the server lacks roles: {roles}"),
                "they own what is in the dump, or are granted something",
                "create them (globals.sql names them: --target-dir DIR writes it), or --no-owner",
            );
        }
    }
}

/// The archive of a plan that unpacks one.
pub(super) const ARCHIVE: &str = files::STREAM;
