//! One PostgreSQL server: both ways in, its facts, and what this machine needs to read it.

use std::path::PathBuf;
use std::time::Duration;

use super::facts::{self, Facts};
use super::finding::{Finding, Findings};
use super::rules::{self, Setup};
use crate::disk::space;
use crate::jobs::context::Target;
use crate::model::{Clock, Error};
use crate::pg::PgError;
use crate::pg::instance::PgBinaries;
use crate::pg::replication::ReplicationClient;
use crate::pg::sql;
use crate::source::postgres::Method;
use crate::source::postgres::room::belongs;

pub(super) async fn check(target: &Target, clock: &dyn Clock, deadline: Duration) -> Vec<Finding> {
    let mut findings = Findings::about("postgres", &target.name);
    let (facts, replication) =
        tokio::join!(bounded(deadline, gather(target, clock)), bounded(deadline, replicate(target)));
    match facts {
        Err(error) => refused(&mut findings, "no SQL connection", error, "the server, and conninfo of the target"),
        Ok(facts) => {
            findings.ok("answers SQL");
            let local = Local::find(target, &facts);
            local.check(&mut findings, target);
            let setup = Setup {
                method: target.method,
                slot: &target.slot,
                receiver: &target.receiver_name(),
                sync: target.sync,
                on_pressure: target.on_pressure,
                free_bytes: local.free_bytes,
                wal_disk_bytes: target.wal_disk_bytes,
            };
            rules::judge(&mut findings, &facts, &setup);
            // Without the attribute no pg_hba line helps; the missing grant is told already.
            if matches!(replication, Ok(true)) && !facts.in_recovery {
                source(&mut findings, target);
            }
            if facts.role.replication || facts.role.superuser {
                entry_for_replication(&mut findings, replication.map(drop), &facts);
            }
            programs(&mut findings, facts.major()).await;
        }
    }
    findings.into_list()
}

async fn bounded<T>(deadline: Duration, work: impl Future<Output = Result<T, PgError>>) -> Result<T, PgError> {
    let late = |_| Err(PgError::Timeout(format!("no answer within {} s", deadline.as_secs())));
    tokio::time::timeout(deadline, work).await.unwrap_or_else(late)
}

async fn gather(target: &Target, clock: &dyn Clock) -> Result<Facts, PgError> {
    let client = sql::connect(&target.conninfo.primary()).await?;
    let clock_ahead = facts::clock_ahead(&client, clock).await?;
    Ok(Facts { clock_ahead, ..facts::gather(&client, &target.slot).await? })
}

/// Says whether the server that would stream is a standby.
async fn replicate(target: &Target) -> Result<bool, PgError> {
    let mut client = ReplicationClient::connect(&target.conninfo).await?;
    client.identify_system().await?;
    let role = client.role().await?;
    client.close().await;
    Ok(role.in_recovery)
}

/// A server that is a standby as far as SQL goes, too, is told already.
fn source(findings: &mut Findings, target: &Target) {
    if target.sync {
        findings.fail(
            "WAL is streamed from a standby, and sync = true: no commit can wait for us there",
            "target_session_attrs=primary in conninfo, or sync = false",
        );
        return;
    }
    if target.standby_slots {
        findings.ok("WAL is streamed from a standby; exposure counts from its primary, where our slot is kept, too");
    } else {
        findings.warn(
            "WAL is streamed from a standby, and the primary keeps none for us: if the standby is lost, some may be missing",
            "standby_slots = true in the target's configuration",
        );
    }
}

fn refused(findings: &mut Findings, what: &str, error: PgError, fix: &str) {
    let what = format!("{what}: {error}");
    let error = Error::from(error);
    findings.fail(what, error.hint_text().unwrap_or(fix));
}

fn entry_for_replication(findings: &mut Findings, replication: Result<(), PgError>, facts: &Facts) {
    match replication {
        Ok(()) => findings.ok("answers replication connections"),
        Err(error) => findings.fail(
            format!("no replication connection: {error}"),
            format!(
                "in pg_hba.conf: host replication {} OUR_ADDRESS scram-sha-256   then SELECT pg_reload_conf();",
                facts.role.quoted
            ),
        ),
    }
}

/// The server's data directory, where it is on this machine.
struct Local {
    directory: Option<PathBuf>,
    reason: String,
    free_bytes: Option<u64>,
}

impl Local {
    fn find(target: &Target, facts: &Facts) -> Self {
        let named = target.data_dir.clone();
        let directory = named.unwrap_or_else(|| PathBuf::from(facts.setting("data_directory")));
        match belongs(&directory, facts.system_id) {
            Ok(()) => {
                // pg_wal may be a link to another file system.
                let free_bytes = space::free_bytes(&directory.join("pg_wal")).ok();
                Self { directory: Some(directory), reason: String::new(), free_bytes }
            }
            Err(reason) => Self { directory: None, reason, free_bytes: None },
        }
    }

    fn check(&self, findings: &mut Findings, target: &Target) {
        match (&self.directory, target.method) {
            (Some(directory), Method::Local | Method::Auto) => {
                findings.ok(format!("data directory {} can be read here", directory.display()));
            }
            (Some(_), Method::Stream) => {}
            (None, Method::Local) => findings.fail(
                format!("the data directory cannot be read here: {}", self.reason),
                "run drctl on the server's machine as the server's user, or in its group after initdb -g; or method = \"stream\"",
            ),
            (None, Method::Auto | Method::Stream) => findings.ok("backups are read through the replication protocol"),
        }
    }
}

async fn programs(findings: &mut Findings, major: u32) {
    let fix = format!("install postgresql-{major}, or set DRCTL_PG_BIN_{major}; the machine that restores needs it");
    match PgBinaries::find(major, None).await {
        Err(error) => findings.warn(format!("PostgreSQL {major} cannot be started here: {error}"), fix),
        Ok(binaries) if !binaries.directory.join("pg_verifybackup").exists() => {
            findings.warn(format!("pg_verifybackup is not in {}", binaries.directory.display()), fix);
        }
        Ok(binaries) => findings.ok(format!("PostgreSQL {major} programs in {}", binaries.directory.display())),
    }
}
