//! The server of a dump: which one of several, its databases, and the snapshots.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, Utc};

use super::properties::Properties;
use super::{Database, Locale, Options};
use crate::model::{Error, Result, ResultExt};
use crate::observe::task;
use crate::pg::PgError;
use crate::pg::conninfo::ConnInfo;
use crate::pg::instance::{ClientPrograms, PgBinaries};
use crate::pg::libpq;
use crate::pg::sql::{self, SqlClient};

/// As shown in `pg_stat_activity`.
const NAME: &str = "drctl dump";
/// How long the server may take to end what killed programs left.
const END_BACKENDS: Duration = Duration::from_secs(30);

/// A server that answered; every connection and every program goes to this one, because a snapshot is known nowhere else.
#[derive(Debug)]
pub(super) struct Server {
    info: ConnInfo,
    client: SqlClient,
    /// The name of the programs that run for us, in `pg_stat_activity`.
    programs: String,
    /// `server_version_num`.
    pub(super) version: u32,
}

/// Which databases are dumped.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// These.
    pub(super) chosen: Vec<String>,
    /// Nobody can connect to these, and the server wants it so.
    pub(super) closed: Vec<String>,
    /// These lack a grant: the dump is not what was asked for.
    pub(super) refused: Vec<String>,
}

impl Server {
    pub(super) async fn connect(options: &Options) -> Result<Self> {
        Self::reach(options.conninfo.clone().with_application_name(NAME)).await
    }

    pub(super) async fn reach(info: ConnInfo) -> Result<Self> {
        let mut last = PgError::Config("no host".to_owned());
        for server in info.servers() {
            let info = info.clone().at(server.clone());
            match sql::connect(&info).await {
                Ok(client) => {
                    let query = "SELECT pg_catalog.current_setting('server_version_num')::pg_catalog.int4,
                                        pg_catalog.pg_backend_pid()";
                    let row = client.query_one(query, &[]).await.map_err(PgError::from)?;
                    let (version, pid): (i32, i32) = (row.get(0), row.get(1));
                    // As long as we are connected no other client of the server has this number.
                    let programs = format!("{} {pid}", info.application_name);
                    return Ok(Self { info, client, programs, version: version.unsigned_abs() });
                }
                Err(error) => last = error,
            }
        }
        Err(last.into())
    }

    pub(super) const fn client(&self) -> &SqlClient {
        &self.client
    }

    /// The database that is asked about the others.
    pub(super) fn maintenance(&self) -> &str {
        self.info.dbname()
    }

    pub(super) fn info(&self, database: &str) -> ConnInfo {
        self.info.clone().with_dbname(database)
    }

    pub(super) fn environment(&self, database: &str) -> Result<Vec<(&'static str, OsString)>> {
        Ok(libpq::environment(&self.info(database).with_application_name(self.programs.clone()))?)
    }

    /// Watches over the programs that are started from now on.
    pub(super) fn watch(&self) -> Watch {
        Watch { info: self.info.clone(), programs: self.programs.clone(), over: false }
    }

    /// The programs of its version.
    pub(super) async fn programs(&self, explicit: Option<&Path>) -> Result<ClientPrograms> {
        Ok(PgBinaries::find_client(self.version / 10_000, explicit).await?)
    }

    /// The databases that are to be dumped; and those that nobody named and are not, with the reason.
    pub(super) async fn databases(&self, options: &Options) -> Result<Choice> {
        let query = "SELECT datname, datallowconn, pg_catalog.has_database_privilege(oid, 'CONNECT')
                     FROM pg_catalog.pg_database WHERE NOT datistemplate ORDER BY datname";
        let rows = self.client.query(query, &[]).await.map_err(PgError::from)?;
        let known: Vec<(String, bool, bool)> = rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
        if !options.databases.is_empty() {
            let missing = options.databases.iter().find(|name| !known.iter().any(|(known, ..)| known == *name));
            return match missing {
                None => Ok(Choice { chosen: options.databases.clone(), ..Choice::default() }),
                Some(name) => Err(Error::not_found(format!("the server has no database `{name}`"))
                    .hint("mend `databases` of the target, or leave it out to dump all of them")),
            };
        }
        let mut choice = Choice::default();
        for (name, allows, may) in known {
            match (allows, may) {
                (true, true) => choice.chosen.push(name),
                (false, _) => choice.closed.push(format!("database {name} is not dumped: it allows no connections")),
                (true, false) => {
                    choice.refused.push(format!("database {name} is not dumped: we may not connect to it"))
                }
            }
        }
        if choice.chosen.is_empty() {
            let error =
                Error::refused("there is no database that we may connect to").because(choice.refused.join("; "));
            return Err(error.hint("GRANT CONNECT ON DATABASE … TO the role of the target's conninfo"));
        }
        Ok(choice)
    }

    /// Takes a snapshot of a database and keeps it until [`Snapshot::end`].
    pub(super) async fn snapshot(&self, database: &str) -> Result<Snapshot> {
        let client = sql::connect(&self.info(database)).await?;
        let begin = "SET idle_in_transaction_session_timeout = 0; SET statement_timeout = 0;
                     BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
        client.batch_execute(begin).await.map_err(PgError::from)?;
        // The time of BEGIN: the snapshot is taken by the first statement behind it, so nothing committed before is missed.
        // A standby knows what it has replayed, and not what the primary has committed since.
        let query = "SELECT pg_catalog.pg_export_snapshot(), pg_catalog.pg_is_in_recovery(), CASE WHEN pg_catalog.pg_is_in_recovery()
                       THEN least(pg_catalog.now(), pg_catalog.pg_last_xact_replay_timestamp()) ELSE pg_catalog.now() END";
        let row = client.query_one(query, &[]).await.map_err(PgError::from).during(|| "export a snapshot")?;
        let (id, lags, at): (String, bool, DateTime<Utc>) = (row.get(0), row.get(1), row.get(2));
        let database = Database {
            name: database.to_owned(),
            stream: String::new(),
            snapshot_at: at,
            locale: self.locale(&client).await?,
            roles: roles(&client).await?,
            properties: Properties::read(&client).await?,
        };
        Ok(Snapshot { id, lags, database, _client: client })
    }

    async fn locale(&self, client: &SqlClient) -> Result<Locale> {
        // The columns came and went with the versions.
        let more = match self.version / 10_000 {
            ..=14 => "'c', NULL",
            15 | 16 => "datlocprovider::text, daticulocale",
            _ => "datlocprovider::text, datlocale",
        };
        let query = format!(
            "SELECT pg_catalog.pg_encoding_to_char(encoding)::text, datcollate::text, datctype::text, {more}
             FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()"
        );
        let row = client.query_one(&query, &[]).await.map_err(PgError::from)?;
        Ok(Locale {
            encoding: row.get(0),
            collate: row.get(1),
            ctype: row.get(2),
            provider: row.get(3),
            locale: row.get(4),
        })
    }
}

/// Every role without which a restore with owners and grants would fail. The first superuser stands in no dependency.
async fn roles(client: &SqlClient) -> Result<Vec<String>> {
    let query = "SELECT rolname::text FROM pg_catalog.pg_roles r WHERE r.oid = 10 OR EXISTS (
                     SELECT FROM pg_catalog.pg_shdepend d JOIN pg_catalog.pg_database b ON b.oid = d.dbid
                     WHERE b.datname = pg_catalog.current_database() AND d.refobjid = r.oid
                       AND d.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass)
                 ORDER BY 1";
    let rows = client.query(query, &[]).await.map_err(PgError::from)?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Ends what our programs left on the server, unless they came to their end: a backend that waits for a lock does not see
/// that its client was killed.
#[derive(Debug)]
pub(super) struct Watch {
    info: ConnInfo,
    programs: String,
    over: bool,
}

impl Watch {
    /// All of them have ended by themselves.
    pub(super) fn over(mut self) {
        self.over = true;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.over || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let (info, programs) = (self.info.clone(), std::mem::take(&mut self.programs));
        // Nobody waits for it: whoever dropped this has no time left.
        drop(task::spawn("end-backends", async move {
            match tokio::time::timeout(END_BACKENDS, end_backends(&info, &programs)).await {
                Ok(Ok(0)) => {}
                Ok(Ok(count)) => tracing::info!(count, programs, "backends of killed programs were ended"),
                Ok(Err(error)) => tracing::warn!(%error, programs, "backends of killed programs may remain"),
                Err(_) => {
                    tracing::warn!(programs, "backends of killed programs may remain: the server does not answer")
                }
            }
        }));
    }
}

async fn end_backends(info: &ConnInfo, programs: &str) -> Result<u64> {
    let client = sql::connect(info).await?;
    let query = "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
                 WHERE application_name = $1 AND usename = current_user AND pid <> pg_catalog.pg_backend_pid()";
    Ok(client.execute(query, &[&programs]).await.map_err(PgError::from)?)
}

/// A snapshot that others may use, as long as this lives.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) id: String,
    /// It is a standby's, which may be behind its primary by any time.
    lags: bool,
    database: Database,
    _client: SqlClient,
}

impl Snapshot {
    /// The moment of what it shows, where that may be long ago.
    pub(super) fn lagging(&self) -> Option<DateTime<Utc>> {
        self.lags.then_some(self.database.snapshot_at)
    }

    pub(super) fn end(self, stream: String) -> Database {
        Database { stream, ..self.database }
    }
}
