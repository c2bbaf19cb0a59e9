//! The way into a scratch cluster.

use std::time::Duration;

use crate::jobs::context::Assertion;
use crate::jobs::drill::scratch::Scratch;
use crate::jobs::restore::SCRATCH_PORT;
use crate::model::{Error, Result, ResultExt};
use crate::pg::conninfo::ConnInfo;
use crate::pg::sql::{self, SqlClient};

/// An assertion that takes longer has not been answered.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(600);

/// A way into the scratch cluster, as one of its superusers.
#[derive(Debug)]
pub(super) struct Login {
    socket_dir: String,
    /// The superuser.
    pub(super) user: String,
}

impl Login {
    /// Everybody may log in, so the role that the target is known by asks who the superusers are.
    pub(super) async fn find(scratch: &Scratch, known: &str, database: &str) -> Result<Self> {
        let directory = scratch.socket_dir();
        let socket_dir = directory.to_str().ok_or_else(|| Error::usage("the scratch directory is not UTF-8"))?;
        let mut login = Self { socket_dir: socket_dir.to_owned(), user: known.to_owned() };
        let client = login.connect(database).await.during(|| "log in to the scratch cluster")?;
        let query = "SELECT rolname::text FROM pg_roles WHERE rolsuper AND rolcanlogin ORDER BY oid LIMIT 1";
        let row = client.query_opt(query, &[]).await.map_err(crate::pg::PgError::from)?;
        let superuser = row.ok_or_else(|| Error::refused("the restored cluster has no superuser who may log in"))?;
        login.user = superuser.get(0);
        Ok(login)
    }

    /// The directory of the socket.
    pub(super) fn socket_dir(&self) -> &str {
        &self.socket_dir
    }

    pub(super) async fn connect(&self, database: &str) -> Result<SqlClient> {
        let quote = |value: &str| format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"));
        let (host, user) = (quote(&self.socket_dir), quote(&self.user));
        let text = format!("host={host} port={SCRATCH_PORT} user={user} dbname={}", quote(database));
        // Whoever may enter the directory may log in: no password file is looked at, whoever may read it.
        let info = ConnInfo::from_text(&text)?.with_password("").with_application_name("drctl drill");
        Ok(sql::connect(&info).await?)
    }

    /// What a query gives, as text.
    pub(super) async fn ask(&self, assertion: &Assertion) -> Result<String> {
        self.answer(assertion, "SET default_transaction_read_only = on").await
    }

    /// What it gives after these statements, which nobody else ever sees: they end with the connection.
    pub(super) async fn ask_broken(&self, assertion: &Assertion, statements: &str) -> Result<String> {
        self.answer(assertion, &format!("BEGIN; {statements}")).await
    }

    async fn answer(&self, assertion: &Assertion, before: &str) -> Result<String> {
        let Assertion { name, sql, database, .. } = assertion;
        let client = self.connect(database).await.during(|| format!("connect to database {database}"))?;
        let timeout = STATEMENT_TIMEOUT.as_millis();
        let settings = format!("SET statement_timeout = {timeout}; {before}");
        let failed = |error| Error::from(crate::pg::PgError::from(error)).during(format!("ask {name}"));
        client.batch_execute(&settings).await.map_err(failed)?;
        let rows = client.simple_query(sql).await.map_err(failed)?;
        let rows: Vec<_> = rows
            .iter()
            .filter_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
                _ => None,
            })
            .collect();
        match rows.as_slice() {
            [row] if row.len() == 1 => Ok(row.get(0).unwrap_or("NULL").to_owned()),
            rows => Err(Error::failed(format!("{name} gives {} rows, not one value", rows.len()))),
        }
    }
}
