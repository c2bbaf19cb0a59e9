//! The standby's PostgreSQL: its settings, its life, and the end of its recovery.

use std::fs::Metadata;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, Utc};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use crate::disk::{DiskError, place};
use crate::jobs::feed;
use crate::jobs::restore;
use crate::jobs::standby::record::{LOG, RECORD, Record};
use crate::model::{Error, Result, ResultExt, Timeline};
use crate::pg::control::{self, ControlFile, StandbyLimits, State};
use crate::pg::instance::{Instance, InstanceOptions, Network, PgBinaries, Postmaster, StopMode, User, postmaster_of};

/// A checkpoint is written first.
const STOP_LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);
/// A server takes an order within a second, and waits for its walreceiver then.
const FOLLOWS: Duration = Duration::from_secs(10);
/// A server that finds this when it is signalled ends recovery.
const PROMOTE: &str = "promote";
/// Reading while the server overwrites the file.
const TORN: u32 = 20;

/// A server that this process started, or found running.
#[derive(Debug)]
pub(super) struct Server {
    record: Record,
    owner: Option<User>,
    binaries: PgBinaries,
    started: Option<Instance>,
    limits: Option<StandbyLimits>,
}

impl Server {
    /// The server of a standby, as it is: running or not.
    pub(super) async fn of(record: &Record) -> Result<Self> {
        let owner = record.run_as.as_deref().map(User::named).transpose()?;
        let binaries = PgBinaries::find(record.origin.server_version / 10_000, None).await?;
        let mut server = Self { record: record.clone(), owner, binaries, started: None, limits: None };
        if server.is_running()? {
            server.limits = Some(server.control().await?.limits);
        }
        Ok(server)
    }

    pub(super) const fn owner(&self) -> Option<User> {
        self.owner
    }

    /// Starts it with settings for what its WAL needs by now.
    pub(super) async fn start(&mut self) -> Result<()> {
        must_be_standby(&self.record.directory).await?;
        let limits = self.control().await?.limits;
        let archive_mode = self.setting("archive_mode").await?;
        let settings = settings(&self.record, limits, &archive_mode);
        restore::configure(&self.record.directory, &settings, self.owner)?;
        let data_dir = self.record.directory.clone();
        let options = InstanceOptions {
            socket_dir: data_dir.clone(),
            port: self.record.port,
            settings: Vec::new(),
            log_file: data_dir.join(LOG),
            as_user: self.owner,
            listens: true,
            network: Network::Shared,
            data_dir,
        };
        self.started = Some(Instance::start(&self.binaries, options).during(|| "start PostgreSQL")?);
        self.limits = Some(limits);
        Ok(())
    }

    /// Whether it runs; one that ended says how.
    pub(super) fn is_running(&mut self) -> Result<bool> {
        if let Some(instance) = &mut self.started {
            if let Err(error) = instance.readiness() {
                self.started = None;
                return Err(error.into());
            }
            return Ok(true);
        }
        Ok(matches!(postmaster_of(&self.record.directory)?, Postmaster::Alive { .. }))
    }

    /// The process, if it runs.
    pub(super) fn pid(&self) -> Option<u32> {
        match postmaster_of(&self.record.directory) {
            Ok(Postmaster::Alive { pid }) => Some(pid),
            _ => None,
        }
    }

    /// Whether the primary's WAL announced more connections, locks, workers… than this server was started with: replay
    /// stops there until it is started with as many.
    pub(super) async fn is_outgrown(&self) -> bool {
        let Ok(control) = self.control().await else { return false };
        self.limits.is_some_and(|had| {
            let StandbyLimits {
                max_connections,
                max_worker_processes,
                max_wal_senders,
                max_prepared_transactions,
                max_locks_per_transaction,
            } = control.limits;
            max_connections > had.max_connections
                || max_worker_processes > had.max_worker_processes
                || max_wal_senders > had.max_wal_senders
                || max_prepared_transactions > had.max_prepared_transactions
                || max_locks_per_transaction > had.max_locks_per_transaction
        })
    }

    /// Stops it in order.
    pub(super) async fn stop(&mut self) -> Result<()> {
        if let Some(mut instance) = self.started.take() {
            return Ok(instance.stop(StopMode::Fast, STOP_LIMIT).await?);
        }
        stop_found(&self.record.directory).await
    }

    /// Lets it run without this process.
    pub(super) fn leave(&mut self) {
        self.started.take().map(Instance::leave_running);
    }

    /// What the control file says.
    pub(super) async fn control(&self) -> Result<ControlFile> {
        read_control(&self.record.directory).await
    }

    /// Ends recovery, as `pg_ctl promote` does.
    pub(super) fn promote(&self) -> Result<()> {
        let path = self.record.directory.join(PROMOTE);
        place::place(&path, b"", 0o600)?;
        restore::give(&path, self.owner)?;
        self.tell(Signal::USR1)
    }

    /// Reads its configuration again.
    pub(super) fn reload(&self) -> Result<()> {
        self.tell(Signal::HUP)
    }

    fn tell(&self, signal: Signal) -> Result<()> {
        let gone = || Error::failed("the standby's server does not run");
        let pid = process_of(&self.record.directory)?.ok_or_else(gone)?;
        kill_process(pid, signal).map_err(|error| gone().because(error))
    }

    /// Waits until it accepts writes.
    pub(super) async fn opened(&mut self, limit: Duration) -> Result<()> {
        let opened = async {
            loop {
                if !self.is_running()? {
                    return Err(Error::failed("PostgreSQL ended while it was promoted"));
                }
                if self.control().await?.state == State::InProduction {
                    return Ok(());
                }
                tokio::time::sleep(POLL).await;
            }
        };
        let late = || Error::failed(format!("PostgreSQL is not open after {} s", limit.as_secs()));
        tokio::time::timeout(limit, opened).await.unwrap_or_else(|_| Err(late()))
    }

    /// The timeline that an open server writes: until its first checkpoint there only the end of recovery names it.
    pub(super) async fn timeline(&self) -> Result<Timeline> {
        let control = self.control().await?;
        Ok(control.timeline.max(control.min_recovery_timeline))
    }

    /// A setting as the configuration files have it.
    pub(super) async fn setting(&self, name: &str) -> Result<String> {
        let mut command = self.binaries.command("postgres");
        command.args(["-C", name, "-D"]).arg(&self.record.directory);
        if let Some(owner) = self.owner {
            owner.apply(&mut command);
        }
        let cannot = |why: String| Error::failed(format!("read the setting {name} of the standby")).because(why);
        let output = command.output().await.map_err(|error| cannot(error.to_string()))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false => Err(cannot(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
        }
    }
}

/// Stops a server that another process started.
pub(super) async fn stop_found(directory: &Path) -> Result<()> {
    let Some(process) = process_of(directory)? else { return Ok(()) };
    let pid = process.as_raw_nonzero();
    kill_process(process, Signal::INT)
        .map_err(|error| Error::failed(format!("stop the server (pid {pid})")).because(error))?;
    let ended = async {
        while matches!(postmaster_of(directory)?, Postmaster::Alive { .. }) {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    };
    let late = || Error::failed(format!("the server (pid {pid}) still runs after {} s", STOP_LIMIT.as_secs()));
    tokio::time::timeout(STOP_LIMIT, ended).await.unwrap_or_else(|_| Err(late()))
}

/// The server of a data directory, if it runs. After a crash another program may have its process id, and must not get its
/// signals: a postmaster works in its data directory.
fn process_of(directory: &Path) -> Result<Option<Pid>> {
    let Postmaster::Alive { pid } = postmaster_of(directory)? else { return Ok(None) };
    let same = |one: &Metadata, other: &Metadata| (one.dev(), one.ino()) == (other.dev(), other.ino());
    let own = std::fs::metadata(directory).map_err(|error| DiskError::new("look at", directory, error))?;
    let is_ours = match std::fs::metadata(format!("/proc/{pid}/cwd")) {
        Ok(place) => same(&place, &own),
        // Where root may not look into processes of others, name and account must do.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let account = std::fs::metadata(format!("/proc/{pid}")).map(|process| process.uid()).ok();
            name.trim_end() == "postgres" && account == Some(own.uid())
        }
        Err(_) => return Ok(None),
    };
    if is_ours {
        return Ok(i32::try_from(pid).ok().and_then(Pid::from_raw));
    }
    let text = format!("process {pid} is not the server of {}", directory.display());
    let error = Error::refused(text).because("postmaster.pid names it, and it works elsewhere");
    Err(error.hint("if no server runs there, remove postmaster.pid"))
}

/// Takes back an order that the server did not follow.
pub(super) fn withdraw_promotion(directory: &Path) -> Result<()> {
    let path = directory.join(PROMOTE);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(DiskError::new("remove", &path, error).into()),
        _ => Ok(()),
    }
}

/// Refuses a server that ended recovery, whoever made it: started here it would take writes, and stopped it would take none.
pub(super) async fn must_be_standby(directory: &Path) -> Result<()> {
    let promoted = |why: &str| {
        let error = Error::refused(format!("{} is no standby any more", directory.display())).because(why);
        Err(error.hint(format!(
            "it was promoted, and is nobody's but yours: start and stop it with pg_ctl, and remove {} from it",
            directory.join(RECORD).display()
        )))
    };
    let is_there = |name: &str| {
        let path = directory.join(name);
        path.try_exists().map_err(|error| DiskError::new("look at", &path, error))
    };
    if !is_there(restore::STANDBY_SIGNAL)? {
        return promoted("it has no standby.signal");
    }
    // The control file in a backup is that of the primary, until recovery has begun.
    if !is_there("backup_label")? && read_control(directory).await?.state == State::InProduction {
        return promoted("its control file says that it takes writes");
    }
    Ok(())
}

/// When the promotion was ordered that the server has followed, if it has. One that runs may be about to.
///
/// # Errors
/// The directory is not readable.
pub(super) async fn followed(record: &Record) -> Result<Option<DateTime<Utc>>> {
    let Some(at) = record.promotion else { return Ok(None) };
    let until = Instant::now() + FOLLOWS;
    while must_be_standby(&record.directory).await.is_ok() {
        let runs = matches!(postmaster_of(&record.directory)?, Postmaster::Alive { .. });
        if !runs || Instant::now() >= until {
            return Ok(None);
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(Some(at))
}

/// The control file, which a running server overwrites in place.
pub(super) async fn read_control(directory: &Path) -> Result<ControlFile> {
    let path = directory.join(control::PATH);
    let mut tries = 0;
    loop {
        let bytes = std::fs::read(&path).map_err(|error| DiskError::new("read", &path, error))?;
        match ControlFile::parse(&bytes) {
            Err(error) if error.is_transient() && tries < TORN => tries += 1,
            parsed => return parsed.during(|| format!("read {}", path.display())),
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Settings that make a standby of the restored cluster: it reads from the feed alone, ends recovery only when it is told
/// to, listens where it was told to, and sends nothing anywhere.
pub(super) fn settings(record: &Record, limits: StandbyLimits, archive_mode: &str) -> Vec<(String, String)> {
    let conninfo = feed::conninfo(&record.socket_dir, "drctl standby");
    let quoted = record.directory.display().to_string().replace('"', "\"\"");
    let StandbyLimits {
        max_connections,
        max_worker_processes,
        max_wal_senders,
        max_prepared_transactions,
        max_locks_per_transaction,
    } = limits;
    // A value for each name that could end recovery or read from elsewhere. Targets are emptied: PostgreSQL would stop there.
    let mut settings: Vec<(&str, String)> = [
        "recovery_target",
        "recovery_target_name",
        "recovery_target_time",
        "recovery_target_xid",
        "recovery_target_lsn",
        "restore_command",
        "archive_cleanup_command",
        "recovery_end_command",
        "primary_slot_name",
    ]
    .map(|name| (name, String::new()))
    .to_vec();
    settings.extend([
        ("recovery_target_timeline", "latest".to_owned()),
        ("recovery_min_apply_delay", "0".to_owned()),
        ("primary_conninfo", conninfo),
        ("wal_receiver_create_temp_slot", "off".to_owned()),
        ("wal_receiver_status_interval", "1s".to_owned()),
        ("wal_retrieve_retry_interval", "1s".to_owned()),
        ("hot_standby", "on".to_owned()),
        ("hot_standby_feedback", "off".to_owned()),
        ("listen_addresses", record.listen.clone().unwrap_or_default()),
        ("port", record.port.to_string()),
        ("unix_socket_directories", format!("\"{quoted}\"")),
        // With fewer than its primary had a standby does not replay on.
        ("max_connections", max_connections.to_string()),
        ("max_worker_processes", max_worker_processes.to_string()),
        ("max_wal_senders", max_wal_senders.to_string()),
        ("max_prepared_transactions", max_prepared_transactions.to_string()),
        ("max_locks_per_transaction", max_locks_per_transaction.to_string()),
    ]);
    if archive_mode == "always" {
        settings.push(("archive_mode", "on".to_owned()));
    }
    if record.origin.server_version >= 170_000 {
        settings.push(("sync_replication_slots", "off".to_owned()));
    }
    settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_has_no_signal_is_no_standby() {
        let directory = tempfile::tempdir().unwrap();
        let error = must_be_standby(directory.path()).await.unwrap_err();
        assert_eq!(error.kind(), crate::model::Kind::Refused);
        assert!(error.to_string().contains("no standby.signal"), "{error}");
        for name in [restore::STANDBY_SIGNAL, "backup_label"] {
            place::place(&directory.path().join(name), b"", 0o600).unwrap();
        }
        must_be_standby(directory.path()).await.unwrap();
    }

    #[test]
    fn a_process_that_works_elsewhere_gets_no_signal() {
        let directory = tempfile::tempdir().unwrap();
        let own = format!("{}\n", std::process::id());
        place::place(&directory.path().join("postmaster.pid"), own.as_bytes(), 0o600).unwrap();
        let error = process_of(directory.path()).unwrap_err();
        assert!(error.to_string().contains("is not the server of"), "{error}");
        let mut child = std::process::Command::new("sleep").arg("60").current_dir(directory.path()).spawn().unwrap();
        let own = format!("{}\n", child.id());
        place::place(&directory.path().join("postmaster.pid"), own.as_bytes(), 0o600).unwrap();
        let found = process_of(directory.path()).unwrap().unwrap();
        assert_eq!(found.as_raw_nonzero().get().unsigned_abs(), child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(process_of(directory.path()).unwrap(), None);
    }
}
