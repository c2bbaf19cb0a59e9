//! Scratch clusters: a place of their own, nothing that reaches out of it, and no trace afterwards.

use std::fs::Metadata;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, lchown};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};

use crate::disk::lock::Lock;
use crate::disk::space::free_bytes;
use crate::disk::{DiskError, place};
use crate::jobs::context::{Context, ScratchPlace};
use crate::jobs::restore::{self, Plan, SCRATCH_PORT};
use crate::model::{Error, Result, TargetName};
use crate::pg::instance::{Network, Postmaster, User, postmaster_of};

/// What the directory of every drill begins with; eight hex digits follow.
const PREFIX: &str = "drill-";
const LOCK: &str = "lock";
/// With less space left PostgreSQL cannot even begin a segment of WAL.
const FULL: u64 = 16 << 20;
/// Until when a directory is not to be reaped.
const KEEP: &str = "keep";

/// The directory of one drill; what is in it belongs to nobody else.
#[derive(Debug)]
pub(super) struct Scratch {
    root: PathBuf,
    owner: Option<User>,
    network: Network,
    /// Libraries that may be loaded.
    preload: Vec<String>,
    /// How its server was set up, once it was.
    server: Option<restore::Scratch>,
    _lock: Lock,
    gone: bool,
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
        make_place(&place.directory, owner)?;
        reap(&place.directory, context.clock.now()).await;
        let root = fresh(&place.directory, context)?;
        // Ours alone, so that nobody puts a link where the next drill looks for a lock; the server passes through.
        make(&root, if owner.is_some() { 0o711 } else { 0o700 })?;
        let lock = Lock::acquire(&root.join(LOCK))?;
        let network = Network::probe(owner).await;
        let preload = place.preload.clone();
        let scratch = Self { root, owner, network, preload, server: None, _lock: lock, gone: false };
        for part in ["s", "t"] {
            let part = scratch.root.join(part);
            make(&part, 0o700)?;
            give(&part, owner)?;
        }
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

    /// What its server sees of the network.
    pub(super) const fn network(&self) -> Network {
        self.network
    }

    /// The libraries that a scratch cluster loads, and those that are left out because they may act by themselves.
    pub(super) fn sorted(&self, preload: &str) -> (String, Vec<String>) {
        sorted(preload, &self.preload)
    }

    /// A server that reaches nothing outside: no network, no archive, no subscription, no schedule of its own, and its own
    /// rule of who may connect, which is whoever may enter its directory.
    pub(super) fn server(&mut self, plan: &Plan) -> Result<restore::Scratch> {
        let path = |name: &str| {
            let path = self.root.join(name);
            path.to_str().map(str::to_owned).ok_or_else(|| Error::usage(format!("{} is not UTF-8", path.display())))
        };
        let (preload, _) = self.sorted(&plan.needs.preload);
        let mut settings = vec![
            ("hba_file", path("hba.conf")?),
            ("ident_file", path("ident.conf")?),
            ("external_pid_file", String::new()),
            ("ssl", "off".to_owned()),
            ("archive_mode", "off".to_owned()),
            ("primary_conninfo", String::new()),
            ("primary_slot_name", String::new()),
            ("synchronous_standby_names", String::new()),
            ("max_logical_replication_workers", "0".to_owned()),
            ("shared_preload_libraries", preload),
            ("local_preload_libraries", String::new()),
            ("session_preload_libraries", String::new()),
            ("autovacuum", "off".to_owned()),
        ];
        if plan.needs.major < 15 {
            // Debian keeps it outside of the data directory, where another server of this host may have its own.
            settings.push(("stats_temp_directory", "pg_stat_tmp".to_owned()));
        }
        let server = restore::Scratch {
            socket_dir: self.socket_dir(),
            log_file: self.root.join("log"),
            settings: settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            network: self.network,
        };
        self.server = Some(server.clone());
        Ok(server)
    }

    /// Whether its disk is so full that nothing more can be found out there.
    pub(super) fn is_full(&self) -> bool {
        free_bytes(&self.root).is_ok_and(|free| free < FULL)
    }

    /// Leaves everything to be looked at until then. Started by hand it is as harmless as it was, but for the network,
    /// which only a drill keeps from it.
    pub(super) fn keep(mut self, until: DateTime<Utc>) -> Result<()> {
        if let Some(server) = &self.server {
            let conf = self.data().join("postgresql.auto.conf");
            let text = std::fs::read_to_string(&conf).unwrap_or_default() + &settings_text(server);
            place::place(&conf, text.as_bytes(), 0o600)?;
            give(&conf, self.owner)?;
        }
        place::place(&self.root.join(KEEP), until.to_rfc3339().as_bytes(), 0o600)?;
        self.gone = true;
        Ok(())
    }

    /// Removes everything.
    pub(super) fn tear_down(mut self) -> Result<()> {
        self.gone = true;
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

impl Drop for Scratch {
    /// A drill that is cancelled leaves no copy of production behind either; its server is gone by then.
    fn drop(&mut self) {
        let removed = if self.gone { Ok(()) } else { remove(&self.root) };
        if let Err(error) = removed {
            tracing::error!(%error, "a scratch cluster remains");
        }
    }
}

fn settings_text(server: &restore::Scratch) -> String {
    let quote = |value: &str| value.replace('\\', "\\\\").replace('\'', "''");
    let socket = [
        ("listen_addresses".to_owned(), String::new()),
        ("port".to_owned(), SCRATCH_PORT.to_string()),
        ("unix_socket_directories".to_owned(), format!("\"{}\"", server.socket_dir.display())),
    ];
    server
        .settings
        .iter()
        .chain(&socket)
        .fold(String::from("\n"), |text, (name, value)| text + &format!("{name} = '{}'\n", quote(value)))
}

fn sorted(preload: &str, harmless: &[String]) -> (String, Vec<String>) {
    let name = |library: &str| library.trim().trim_matches('"').rsplit('/').next().unwrap_or_default().to_owned();
    let harmless = |library: &&str| harmless.iter().any(|known| known == name(library).trim_end_matches(".so"));
    let libraries = preload.split(',').map(str::trim).filter(|library| !library.is_empty());
    let (kept, left_out): (Vec<_>, Vec<_>) = libraries.partition(harmless);
    (kept.join(","), left_out.into_iter().map(str::to_owned).collect())
}

/// A scratch cluster inside of a cluster would end up in its next backup; whose it is does not matter.
fn refuse_source(place: &ScratchPlace, target: &TargetName, context: &Context) -> Result<()> {
    let configured =
        context.targets.iter().find(|known| known.name == *target).and_then(|known| known.data_dir.as_ref());
    match around(&place.directory, configured.map(PathBuf::as_path)) {
        None => Ok(()),
        Some(source) => Err(Error::refused(format!("{} lies in a data directory", place.directory.display()))
            .because(format!("{} holds a cluster", source.display()))
            .hint("name another directory: --dir, or dir in [drill]")),
    }
}

/// The data directory that `place` is or lies in, wherever links lead: the configured one, or any that looks like one.
fn around(place: &Path, configured: Option<&Path>) -> Option<PathBuf> {
    let exists = |path: &&Path| path.exists();
    let place = std::path::absolute(place).ok()?;
    let real = place.ancestors().find(exists).and_then(|path| path.canonicalize().ok())?;
    let configured = configured.and_then(|path| path.canonicalize().ok());
    let holds = |path: &&Path| {
        configured.as_deref() == Some(*path) || path.join("PG_VERSION").is_file() && path.join("global").is_dir()
    };
    real.ancestors().find(holds).map(Path::to_owned)
}

fn fresh(directory: &Path, context: &Context) -> Result<PathBuf> {
    let mut chance = [0; 4];
    context.rng.fill(&mut chance)?;
    // Short: a socket's path has at most 107 bytes.
    Ok(directory.join(format!("{PREFIX}{}", hex::encode(chance))))
}

fn make(path: &Path, mode: u32) -> Result<(), DiskError> {
    std::fs::DirBuilder::new().mode(mode).create(path).map_err(|error| DiskError::new("create directory", path, error))
}

/// What is missing of the place is made so that the server's account passes through; what is there stays as it is.
fn make_place(path: &Path, owner: Option<User>) -> Result<()> {
    let mode = if owner.is_some() { 0o711 } else { 0o700 };
    let made = std::fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(|error| DiskError::new("create directory", path, error))?;
    let Some(owner) = owner else { return Ok(()) };
    for ancestor in path.ancestors() {
        let found = std::fs::metadata(ancestor).map_err(|error| DiskError::new("stat", ancestor, error))?;
        let passes = match () {
            () if found.uid() == owner.uid => found.mode() & 0o100 != 0,
            () if found.gid() == owner.gid => found.mode() & 0o010 != 0,
            () => found.mode() & 0o001 != 0,
        };
        if !passes {
            let error = Error::refused(format!("the scratch cluster's account cannot enter {}", ancestor.display()));
            return Err(error.hint("name a place that it can reach: --dir, or dir in [drill]"));
        }
    }
    Ok(())
}

fn give(path: &Path, owner: Option<User>) -> Result<(), DiskError> {
    let Some(owner) = owner else { return Ok(()) };
    lchown(path, Some(owner.uid), Some(owner.gid)).map_err(|error| DiskError::new("chown", path, error))
}

fn remove(root: &Path) -> Result<(), DiskError> {
    std::fs::remove_dir_all(root).map_err(|error| DiskError::new("remove", root, error))
}

/// What a killed drill left: its lock went with it, its server and its files did not.
async fn reap(directory: &Path, now: DateTime<Utc>) {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    for root in entries.map(|entry| entry.path()).filter(|root| is_ours(root)) {
        let Ok(_lock) = Lock::acquire(&root.join(LOCK)) else { continue };
        if kept_until(&root).is_some_and(|until| until > now) {
            continue;
        }
        if !stop_orphan(&root.join("data")).await {
            tracing::warn!(scratch = %root.display(), "the server that a killed drill left does not stop");
            continue;
        }
        match remove(&root) {
            Ok(()) => tracing::info!(scratch = %root.display(), "what a killed drill left was removed"),
            Err(error) => tracing::warn!(%error, "what a killed drill left remains"),
        }
    }
}

fn kept_until(root: &Path) -> Option<DateTime<Utc>> {
    std::fs::read_to_string(root.join(KEEP)).ok()?.trim().parse().ok()
}

/// Whether a drill of this account made the directory. Anything else of that name is somebody's data.
fn is_ours(root: &Path) -> bool {
    let name = root.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix(PREFIX));
    let named = name.is_some_and(|name| name.len() == 8 && name.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let own = |found: &Metadata| found.uid() == rustix::process::geteuid().as_raw();
    let directory = std::fs::symlink_metadata(root).is_ok_and(|found| found.is_dir() && own(&found));
    let lock = std::fs::symlink_metadata(root.join(LOCK)).is_ok_and(|found| found.is_file() && own(&found));
    named && directory && lock
}

/// The server of a killed drill goes on without it, and must be gone before its files are. The number in its
/// `postmaster.pid` may belong to another program by now: only a process that works in this very directory is meant.
async fn stop_orphan(data: &Path) -> bool {
    for _ in 0..100 {
        let Ok(Postmaster::Alive { pid }) = postmaster_of(data) else { return true };
        let works_here = std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == *data);
        let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).filter(|_| works_here) else {
            return true;
        };
        let _gone = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_that_may_act_by_themselves_are_left_out_and_named() {
        let harmless = ["pg_stat_statements", "auto_explain"].map(str::to_owned);
        assert_eq!(sorted("", &harmless), (String::new(), Vec::new()));
        let preload = "pg_stat_statements, pg_cron,auto_explain, \"$libdir/timescaledb.so\"";
        let (kept, left_out) = sorted(preload, &harmless);
        assert_eq!(kept, "pg_stat_statements,auto_explain");
        assert_eq!(left_out, ["pg_cron", "\"$libdir/timescaledb.so\""]);
    }

    #[test]
    fn a_place_in_a_data_directory_is_found_through_links_and_before_it_exists() {
        let place = tempfile::tempdir().unwrap();
        let data = place.path().join("data");
        std::fs::create_dir_all(data.join("global")).unwrap();
        std::fs::File::create(data.join("PG_VERSION")).unwrap();
        std::os::unix::fs::symlink(&data, place.path().join("link")).unwrap();
        let found = Some(data.canonicalize().unwrap());
        for inside in ["data", "data/drills", "data/base/new/er", "link", "link/drills"] {
            assert_eq!(around(&place.path().join(inside), None), found, "{inside}");
        }
        assert_eq!(around(&place.path().join("drills"), Some(&data)), None);
        assert_eq!(
            around(&place.path().join("drills"), Some(place.path())),
            Some(place.path().canonicalize().unwrap())
        );
    }

    #[tokio::test]
    async fn nothing_but_what_a_drill_made_is_removed() {
        let place = tempfile::tempdir().unwrap();
        let names = ["drill-reports", "drill-0123abcd", "drill-00000000", "else"];
        for name in names {
            std::fs::create_dir(place.path().join(name)).unwrap();
        }
        std::os::unix::fs::symlink("/etc/hostname", place.path().join("drill-0123abcd/lock")).unwrap();
        drop(Lock::acquire(&place.path().join("drill-00000000/lock")).unwrap());
        let now = DateTime::UNIX_EPOCH;
        for (name, until) in [("drill-11111111", 1), ("drill-22222222", 0)] {
            let root = place.path().join(name);
            std::fs::create_dir(&root).unwrap();
            drop(Lock::acquire(&root.join(LOCK)).unwrap());
            let until = now + chrono::TimeDelta::seconds(until);
            place::place(&root.join(KEEP), until.to_rfc3339().as_bytes(), 0o600).unwrap();
        }
        reap(place.path(), now).await;
        assert!(place.path().join("drill-11111111").exists() && !place.path().join("drill-22222222").exists());
        let left = |name: &&str| place.path().join(name).exists();
        assert_eq!(names.iter().copied().filter(left).collect::<Vec<_>>(), ["drill-reports", "drill-0123abcd", "else"]);
    }
}
