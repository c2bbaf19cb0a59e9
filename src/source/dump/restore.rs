//! A dump back into a database, through `pg_restore`.

use std::process::Stdio;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::process::ChildStdin;
use tokio::sync::mpsc;

use super::child::{complaints, judge};
use super::properties::{Properties, Statement, identifier, literal};
use super::server::Server;
use super::{Contents, Database, as_conninfo};
use crate::model::{Error, Result, ResultExt};
use crate::pg::PgError;
use crate::pg::conninfo::ConnInfo;
use crate::pg::instance::PgBinaries;
use crate::pg::libpq;
use crate::pg::sql;

/// As shown in `pg_stat_activity`.
const NAME: &str = "drctl restore";

/// The database that a dump goes into.
#[derive(Debug, Clone)]
pub struct Goal {
    /// How to reach the server; its own database is where a new one is made from.
    pub conninfo: ConnInfo,
    /// The database.
    pub name: String,
}

/// How it is restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Leave owners and grants out: everything belongs to who restores.
    pub no_owner: bool,
    /// Leave tablespaces out.
    pub no_tablespaces: bool,
    /// Not all in one transaction.
    pub many_transactions: bool,
}

/// What stands where a dump is to go.
#[derive(Debug, Clone)]
pub struct Place {
    /// `server_version_num`.
    pub version: u32,
    /// Objects in the database, if it exists.
    pub objects: Option<i64>,
    /// Roles that the server lacks.
    pub missing_roles: Vec<String>,
    /// Whether we may make a database.
    pub may_create: bool,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Restored {
    /// What `pg_restore` complained of although it ended well.
    pub notes: Vec<String>,
}

/// Looks at the place, and changes nothing.
///
/// # Errors
/// The server does not answer, or does not let us into the database.
pub async fn inspect(into: &Goal, database: &Database) -> Result<Place> {
    let server = Server::reach(into.conninfo.clone().with_application_name(NAME)).await?;
    let client = server.client();
    let exists = "SELECT EXISTS (SELECT FROM pg_catalog.pg_database WHERE datname = $1),
                         (SELECT rolcreatedb OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)";
    let row = client.query_one(exists, &[&into.name]).await.map_err(PgError::from)?;
    let (exists, may_create): (bool, bool) = (row.get(0), row.get(1));
    let missing = "SELECT name FROM unnest($1::text[]) name
                   WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = name)";
    let rows = client.query(missing, &[&database.roles]).await.map_err(PgError::from)?;
    let missing_roles = rows.iter().map(|row| row.get(0)).collect();
    let objects = match exists {
        true => Some(objects(&server.info(&into.name)).await.during(|| format!("look into database {}", into.name))?),
        false => None,
    };
    Ok(Place { version: server.version, objects, missing_roles, may_create })
}

/// Objects that somebody made there, those of extensions left out.
async fn objects(info: &ConnInfo) -> Result<i64> {
    let client = sql::connect(info).await?;
    let own = "n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%'";
    let query = format!(
        "SELECT (SELECT count(*) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE {own} AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend WHERE objid = c.oid AND deptype = 'e'))
              + (SELECT count(*) FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
                 WHERE {own} AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend WHERE objid = p.oid AND deptype = 'e'))
              + (SELECT count(*) FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
                 WHERE {own} AND t.typtype IN ('e', 'd', 'r')
                   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend WHERE objid = t.oid AND deptype = 'e'))
              + (SELECT count(*) FROM pg_catalog.pg_namespace n WHERE {own} AND n.nspname <> 'public')
              + (SELECT count(*) FROM pg_catalog.pg_largeobject_metadata)"
    );
    Ok(client.query_one(&query, &[]).await.map_err(PgError::from)?.get(0))
}

/// Makes the database, empty, with the encoding and collation of the dumped one.
///
/// # Errors
/// The server refuses, for example for want of the locale.
pub async fn create(into: &Goal, contents: &Contents, database: &Database) -> Result<()> {
    let server = Server::reach(into.conninfo.clone().with_application_name(NAME)).await?;
    let (name, locale) = (identifier(&into.name), &database.locale);
    let mut sql = format!(
        "CREATE DATABASE {name} TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {}",
        literal(&locale.encoding),
        literal(&locale.collate),
        literal(&locale.ctype)
    );
    match (locale.provider.as_str(), &locale.locale) {
        ("i", Some(icu)) => sql.push_str(&format!(" LOCALE_PROVIDER icu ICU_LOCALE {}", literal(icu))),
        ("b", Some(builtin)) => {
            sql.push_str(&format!(" LOCALE_PROVIDER builtin BUILTIN_LOCALE {}", literal(builtin)));
        }
        _ => {}
    }
    server.client().batch_execute(&sql).await.map_err(PgError::from).during(|| format!("create database {name}"))?;
    if contents.scope.schemas.is_empty() {
        return Ok(());
    }
    // A dump of chosen schemas makes each of them, also the one that every new database has.
    let made = sql::connect(&server.info(&into.name)).await?;
    Ok(made.batch_execute("DROP SCHEMA public").await.map_err(PgError::from)?)
}

/// Removes the database that [`create`] made.
///
/// # Errors
/// The server refuses.
pub async fn drop_created(into: &Goal) -> Result<()> {
    let server = Server::reach(into.conninfo.clone().with_application_name(NAME)).await?;
    let sql = format!("DROP DATABASE {} WITH (FORCE)", identifier(&into.name));
    Ok(server.client().batch_execute(&sql).await.map_err(PgError::from)?)
}

/// Feeds a dump to `pg_restore`. If the dump does not come to its end, `pg_restore` is killed before it could take what
/// came for the whole.
///
/// # Errors
/// The dump's, or whatever `pg_restore` says.
pub async fn restore(
    into: &Goal,
    wishes: Wishes,
    major: u32,
    mut dump: mpsc::Receiver<Result<Bytes>>,
) -> Result<Restored> {
    let server = Server::reach(into.conninfo.clone().with_application_name(NAME)).await?;
    let programs = PgBinaries::find_client(major, None).await?;
    let mut command = programs.binaries.command("pg_restore");
    command.args(["--exit-on-error", "--no-password"]).arg(format!("--dbname={}", as_conninfo(&into.name)));
    let chosen = [
        (!wishes.many_transactions, &["--single-transaction"][..]),
        (wishes.no_owner, &["--no-owner", "--no-privileges"][..]),
        (wishes.no_tablespaces, &["--no-tablespaces"][..]),
    ];
    command.args(chosen.into_iter().filter(|(wanted, _)| *wanted).flat_map(|(_, options)| options));
    command.envs(libpq::environment(&server.info(&into.name))?);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| Error::failed("start pg_restore").because(error))?;
    let (mut stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let (fed, complaints) = tokio::join!(
        async {
            let fed = feed(&mut dump, &mut stdin).await;
            if fed.is_err() {
                // Before its input is closed: it must not see an end.
                let _ = child.kill().await;
            }
            drop(stdin);
            fed
        },
        complaints(stderr)
    );
    fed?;
    let status = child.wait().await.map_err(|error| Error::failed("wait for pg_restore").because(error))?;
    judge("pg_restore", status, &complaints)?;
    Ok(Restored { notes: complaints })
}

/// Hands on all of it. A `pg_restore` that has enough, or has failed, closes its end; the rest is read all the same, so that
/// damage anywhere in the dump is found.
async fn feed(dump: &mut mpsc::Receiver<Result<Bytes>>, stdin: &mut Option<ChildStdin>) -> Result<()> {
    while let Some(bytes) = dump.recv().await {
        let bytes = bytes?;
        if let Some(open) = stdin
            && open.write_all(&bytes).await.is_err()
        {
            *stdin = None;
        }
    }
    Ok(())
}

/// Gives a database that was made for a dump what was its own. Says what could not be given: the data is whole without it.
///
/// # Errors
/// The server does not answer.
pub async fn dress(into: &Goal, properties: &Properties, wishes: Wishes) -> Result<Vec<String>> {
    let server = Server::reach(into.conninfo.clone().with_application_name(NAME)).await?;
    let client = server.client();
    let mut notes = Vec::new();
    for Statement { what, role, sql, .. } in properties.statements(&into.name, wishes.no_owner) {
        let known = "SELECT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = $1)";
        let absent = match &role {
            Some(role) => !client.query_one(known, &[role]).await.map_err(PgError::from)?.get::<_, bool>(0),
            None => false,
        };
        let given = match (absent, &role) {
            (true, Some(role)) => Err(format!("the server has no role {role}")),
            _ => client.batch_execute(&sql).await.map_err(|error| PgError::from(error).to_string()),
        };
        if let Err(why) = given {
            notes.push(format!("database {} lacks {what}: {why}", into.name));
        }
    }
    Ok(notes)
}
