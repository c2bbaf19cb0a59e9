//! Scratch clusters: a place of their own, nothing that reaches out of it, and no trace afterwards.

use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use crate::disk::DiskError;
use crate::disk::lock::Lock;
use crate::jobs::context::{Context, ScratchPlace};
use crate::jobs::restore::{self, Plan};
use crate::model::{Error, Result, TargetName};
use crate::pg::instance::{Postmaster, User, postmaster_of};

/// What the directory of every drill begins with.
const PREFIX: &str = "drill-";
const LOCK: &str = "lock";
/// Libraries that work by themselves, on a clock or on the network; a copy of production must not do that.
const SCHEDULERS: [&str; 8] =
    ["pg_cron", "pg_partman_bgw", "pglogical", "bdr", "pg_squeeze", "pg_net", "pgagent", "pg_prewarm"];

/// The directory of one drill; what is in it belongs to nobody else.
#[derive(Debug)]
pub(super) struct Scratch {
    root: PathBuf,
    owner: Option<User>,
    _lock: Lock,
}

impl Scratch {
    /// Makes the directory, and removes those that drills left which were killed.
    pub(super) async fn create(place: &ScratchPlace, target: &TargetName, context: &Context) -> Result<Self> {
        let is_root = rustix::process::geteuid().is_root();
        let owner = match (&place.run_as, is_root) {
            (Some(name), true) => Some(User::named(name)?),
            (None, true) => {
                return Err(Error::usage("PostgreSQL does not run as root, and drctl does")
                    .hint("name the account for scratch clusters: --run-as postgres, or run_as in [drill]"));
            }
            (_, false) => None,
        };
        refuse_source(place, target, context)?;
        make(&place.directory, None)?;
        if owner.is_some() {
            allow_passage(&place.directory)?;
        }
        reap(&place.directory).await;
        let root = fresh(&place.directory, context)?;
        make(&root, owner)?;
        let lock = Lock::acquire(&root.join(LOCK))?;
        for part in ["s", "t"] {
            make(&root.join(part), owner)?;
        }
        let scratch = Self { root, owner, _lock: lock };
        scratch.write("hba.conf", "local all all trust\n")?;
        scratch.write("ident.conf", "")?;
        scratch.write("log", "")?;
        Ok(scratch)
    }

    /// The data directory.
    pub(super) fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    /// The place of a tablespace.
    pub(super) fn tablespace(&self, number: usize) -> PathBuf {
        self.root.join("t").join(number.to_string())
    }

    /// Where the server's only socket is.
    pub(super) fn socket_dir(&self) -> PathBuf {
        self.root.join("s")
    }

    /// The directory, for people.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// A server that reaches nothing outside: no network, no archive, no subscription, no schedule of its own, and its own
    /// rule of who may connect, which is whoever may enter its directory.
    pub(super) fn server(&self, plan: &Plan) -> Result<restore::Scratch> {
        let path = |name: &str| {
            let path = self.root.join(name);
            path.to_str().map(str::to_owned).ok_or_else(|| Error::usage(format!("{} is not UTF-8", path.display())))
        };
        let settings = [
            ("hba_file", path("hba.conf")?),
            ("ident_file", path("ident.conf")?),
            ("external_pid_file", String::new()),
            ("ssl", "off".to_owned()),
            ("archive_mode", "off".to_owned()),
            ("primary_conninfo", String::new()),
            ("primary_slot_name", String::new()),
            ("synchronous_standby_names", String::new()),
            ("max_logical_replication_workers", "0".to_owned()),
            ("shared_preload_libraries", inert(&plan.needs.preload)),
            ("local_preload_libraries", String::new()),
            ("session_preload_libraries", String::new()),
            ("autovacuum", "off".to_owned()),
            ("event_source", "drctl drill".to_owned()),
        ];
        Ok(restore::Scratch {
            socket_dir: self.socket_dir(),
            log_file: self.root.join("log"),
            settings: settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        })
    }

    /// Removes everything.
    pub(super) fn tear_down(self) -> Result<()> {
        Ok(remove(&self.root)?)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.root.join(name);
        let mut options = std::fs::File::options();
        let file = options.write(true).create_new(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|error| DiskError::new("write", &path, error))?;
        Ok(give(&path, self.owner)?)
    }
}

/// Without the libraries that would act by themselves.
fn inert(preload: &str) -> String {
    let name = |library: &str| library.trim().trim_matches('"').rsplit('/').next().unwrap_or_default().to_owned();
    let acts = |library: &&str| SCHEDULERS.contains(&name(library).trim_end_matches(".so"));
    let kept: Vec<_> = preload.split(',').filter(|library| !library.trim().is_empty() && !acts(library)).collect();
    kept.join(",")
}

/// A scratch cluster inside of the cluster that it is a copy of would end up in its next backup.
fn refuse_source(place: &ScratchPlace, target: &TargetName, context: &Context) -> Result<()> {
    let source = context.targets.iter().find(|known| known.name == *target).and_then(|target| target.data_dir.clone());
    match source.filter(|source| place.directory.starts_with(source)) {
        None => Ok(()),
        Some(source) => Err(Error::refused(format!("{} lies in the data directory", place.directory.display()))
            .because(format!("{} is what is protected", source.display()))
            .hint("name another directory: --dir, or dir in [drill]")),
    }
}

fn fresh(directory: &Path, context: &Context) -> Result<PathBuf> {
    let mut chance = [0; 4];
    context.rng.fill(&mut chance)?;
    // Short: a socket's path has at most 107 bytes.
    Ok(directory.join(format!("{PREFIX}{}", hex::encode(chance))))
}

fn make(path: &Path, owner: Option<User>) -> Result<(), DiskError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| DiskError::new("create directory", path, error))?;
    give(path, owner)
}

/// The account of the server must pass through a directory of root's to reach its own.
fn allow_passage(path: &Path) -> Result<(), DiskError> {
    let permissions = std::fs::Permissions::from_mode(0o711);
    std::fs::set_permissions(path, permissions).map_err(|error| DiskError::new("set the mode of", path, error))
}

fn give(path: &Path, owner: Option<User>) -> Result<(), DiskError> {
    let Some(owner) = owner else { return Ok(()) };
    lchown(path, Some(owner.uid), Some(owner.gid)).map_err(|error| DiskError::new("chown", path, error))
}

fn remove(root: &Path) -> Result<(), DiskError> {
    std::fs::remove_dir_all(root).map_err(|error| DiskError::new("remove", root, error))
}

/// What a killed drill left: its lock went with it, its server and its files did not.
async fn reap(directory: &Path) {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let roots = entries.map(|entry| entry.path());
    for root in roots.filter(|root| root.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX))) {
        let Ok(_lock) = Lock::acquire(&root.join(LOCK)) else { continue };
        stop_orphan(&root.join("data")).await;
        match remove(&root) {
            Ok(()) => tracing::info!(scratch = %root.display(), "what a killed drill left was removed"),
            Err(error) => tracing::warn!(%error, "what a killed drill left remains"),
        }
    }
}

/// The server of a killed drill goes on without it; it must be gone before its files are.
async fn stop_orphan(data: &Path) {
    for _ in 0..100 {
        let Ok(Postmaster::Alive { pid }) = postmaster_of(data) else { return };
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        let _gone = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::QUIT));
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_that_act_by_themselves_are_left_out() {
        assert_eq!(inert(""), "");
        assert_eq!(inert("pg_stat_statements, pg_cron,auto_explain"), "pg_stat_statements,auto_explain");
        assert_eq!(inert("\"$libdir/pg_cron.so\""), "");
    }
}
