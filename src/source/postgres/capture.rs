//! What surrounds the data: configuration files wherever they live, settings, roles, versions of what the data depends on.
//!
//! A restore on another machine needs them, and some of them (Debian's `/etc/postgresql`) are in no data directory. What
//! the role may not see is reported with the statement that would allow it, never left out in silence. Passwords are
//! not captured: they are in the data.

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::conffiles::{self, Contents};
use super::error::SourceError;
use crate::pg::PgError;
use crate::pg::sql::SqlClient;

/// Everything around one cluster, as seen from one of its databases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    /// `server_version_num`.
    pub version: u32,
    /// Configuration files.
    pub files: Vec<CapturedFile>,
    /// Settings that are not at their defaults.
    pub settings: Vec<Setting>,
    /// SQL that recreates roles, memberships and their settings, without passwords.
    pub roles: Vec<String>,
    /// All databases.
    pub databases: Vec<Database>,
    /// Extensions of the database that was asked.
    pub extensions: Vec<Extension>,
    /// Collations of the database that was asked, by version.
    pub collations: Vec<Collation>,
    /// Libraries that must exist where this cluster is to start.
    pub shared_preload_libraries: String,
    /// All tablespaces.
    pub tablespaces: Vec<Tablespace>,
    /// What could not be seen.
    pub missing: Vec<Missing>,
}

/// A file and its contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturedFile {
    /// `config_file`, `hba_file`, `ident_file`, `include`, or `extra`.
    pub name: String,
    /// Where it is on the source.
    pub path: String,
    /// What is in it, or why that is unknown.
    pub contents: Contents,
}

/// A setting of the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its name.
    pub name: String,
    /// Its value, with its unit.
    pub value: String,
    /// `configuration file`, `command line`, ….
    pub source: String,
    /// The file that set it.
    pub file: Option<String>,
}

/// A database and the locale that its indexes depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// Its owner.
    pub owner: String,
    /// As in `UTF8`.
    pub encoding: String,
    /// `c` libc, `i` ICU, `b` built in. Always libc before 15.
    pub provider: String,
    /// `LC_COLLATE`.
    pub collate: String,
    /// `LC_CTYPE`.
    pub ctype: String,
    /// Of ICU or the built-in provider.
    pub locale: Option<String>,
    /// The provider's version when the database was made; 15 and later.
    pub recorded_version: Option<String>,
    /// The provider's version on the source now.
    pub actual_version: Option<String>,
}

/// An extension; its library must exist where the cluster is restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extension {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its schema.
    pub schema: String,
}

/// Collations that share provider and versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collation {
    /// `c` libc, `i` ICU, `b` built in.
    pub provider: String,
    /// When they were made.
    pub recorded_version: Option<String>,
    /// On the source now. Another one where the cluster is restored means: reindex.
    pub actual_version: Option<String>,
    /// How many.
    pub count: u64,
    /// One of them.
    pub example: String,
}

/// A tablespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its oid.
    pub oid: u32,
    /// Its name.
    pub name: String,
    /// Its owner.
    pub owner: String,
    /// Where it is; empty for the two built-in ones.
    pub location: String,
}

/// Something that the role may not see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// What.
    pub what: String,
    /// What a superuser must run so that it can be seen.
    pub grant: String,
}

/// How to capture.
#[derive(Debug, Clone, Default)]
pub struct CaptureOptions {
    /// Whether this host's files are the server's. Never guess: another server's file may have the same path here.
    pub local: bool,
    /// More files of this host, as paths whose last part may contain `*`; only with `local`.
    pub extra: Vec<String>,
}

const READ_SETTINGS: &str = "GRANT pg_read_all_settings TO <role>;";
const FILE_SETTINGS: &str =
    "GRANT EXECUTE ON FUNCTION pg_show_all_file_settings() TO <role>; GRANT SELECT ON pg_file_settings TO <role>;";

/// Asks the server, and reads its files.
///
/// # Errors
/// The connection is lost, or an answer makes no sense; a missing privilege is no error but [`Captured::missing`].
pub async fn capture(client: &SqlClient, options: &CaptureOptions) -> Result<Captured, SourceError> {
    let mut missing = Vec::new();
    let version: u32 = one(client, "SELECT current_setting('server_version_num')::int AS value").await?;
    let sees_settings = "SELECT pg_has_role(current_user, 'pg_read_all_settings', 'USAGE') AS value";
    if !one::<bool>(client, sees_settings).await? {
        missing.push(Missing { what: "settings that only superusers see".to_owned(), grant: READ_SETTINGS.to_owned() });
    }
    let settings: Vec<Setting> = rows(client, SETTINGS).await?;
    let mut roles = rows::<Statement>(client, &roles_query(version)).await?;
    roles.extend(rows::<Statement>(client, ROLE_SETTINGS).await?);
    let mut files = Vec::new();
    for (name, path) in configuration_files(client, version, &mut missing).await? {
        let contents = conffiles::read(client, &path, options.local).await?;
        files.push(CapturedFile { name, path, contents });
    }
    for (path, contents) in conffiles::extra(&options.extra, options.local).await {
        files.push(CapturedFile { name: "extra".to_owned(), path, contents });
    }
    Ok(Captured {
        version,
        files,
        shared_preload_libraries: preloaded(&settings),
        settings,
        roles: roles.into_iter().map(|statement| statement.sql).collect(),
        databases: rows(client, &databases_query(version)).await?,
        extensions: rows(client, EXTENSIONS).await?,
        collations: rows(client, COLLATIONS).await?,
        tablespaces: rows(client, TABLESPACES).await?,
        missing,
    })
}

fn preloaded(settings: &[Setting]) -> String {
    let found = settings.iter().find(|setting| setting.name == "shared_preload_libraries");
    found.map(|setting| setting.value.clone()).unwrap_or_default()
}

/// The three main files, and every file that they include.
async fn configuration_files(
    client: &SqlClient,
    version: u32,
    missing: &mut Vec<Missing>,
) -> Result<Vec<(String, String)>, SourceError> {
    let main = "SELECT name, setting AS path FROM pg_catalog.pg_settings
        WHERE name IN ('config_file', 'hba_file', 'ident_file') AND setting <> ''";
    let main: Vec<Named> = rows(client, main).await?;
    let mut included = BTreeSet::new();
    let file_settings =
        "SELECT DISTINCT sourcefile AS path FROM pg_catalog.pg_file_settings WHERE sourcefile IS NOT NULL";
    match rows::<Path>(client, file_settings).await {
        Ok(found) => included.extend(found),
        Err(error) if error.is_denied() => {
            let what = "configuration files of which no setting is in force".to_owned();
            missing.push(Missing { what, grant: FILE_SETTINGS.to_owned() });
            let in_force =
                "SELECT DISTINCT sourcefile AS path FROM pg_catalog.pg_settings WHERE sourcefile IS NOT NULL";
            included.extend(rows::<Path>(client, in_force).await?);
        }
        Err(error) => return Err(error),
    }
    // Since 16 these files can include others too.
    for view in ["pg_hba_file_rules", "pg_ident_file_mappings"].into_iter().filter(|_| version >= 160_000) {
        let query = format!("SELECT DISTINCT file_name AS path FROM pg_catalog.{view} WHERE file_name IS NOT NULL");
        match rows::<Path>(client, &query).await {
            Ok(found) => included.extend(found),
            Err(error) if error.is_denied() => {
                let grant = format!("GRANT EXECUTE ON FUNCTION {view}() TO <role>; GRANT SELECT ON {view} TO <role>;");
                missing.push(Missing { what: format!("files included according to {view}"), grant });
            }
            Err(error) => return Err(error),
        }
    }
    included.retain(|file| main.iter().all(|known| known.path != file.path));
    let main = main.into_iter().map(|file| (file.name, file.path));
    Ok(main.chain(included.into_iter().map(|file| ("include".to_owned(), file.path))).collect())
}

#[derive(Deserialize)]
struct One<T> {
    value: T,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    path: String,
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Deserialize)]
struct Path {
    path: String,
}

#[derive(Deserialize)]
struct Statement {
    sql: String,
}

async fn one<T: DeserializeOwned>(client: &SqlClient, query: &str) -> Result<T, SourceError> {
    let first = rows::<One<T>>(client, query).await?.into_iter().next();
    first.map(|row| row.value).ok_or_else(|| SourceError::Answer(format!("no row for `{query}`")))
}

/// Runs a query and reads its rows by the names of their columns.
async fn rows<T: DeserializeOwned>(client: &SqlClient, query: &str) -> Result<Vec<T>, SourceError> {
    let query = format!("SELECT coalesce(pg_catalog.json_agg(t), '[]')::text FROM ({query}) t");
    let row = client.query_one(&query, &[]).await.map_err(PgError::from)?;
    let text: &str = row.try_get(0).map_err(PgError::from)?;
    serde_json::from_str(text).map_err(|error| SourceError::Answer(format!("{error} in the answer to `{query}`")))
}

/// What the session or the role itself sets says nothing about the server.
const SETTINGS: &str = "
    SELECT name, pg_catalog.current_setting(name) AS value, source, sourcefile AS file FROM pg_catalog.pg_settings
    WHERE source NOT IN ('default', 'client', 'user', 'database', 'database user', 'interactive', 'test', 'session')
    ORDER BY name";

const EXTENSIONS: &str = "
    SELECT extname AS name, extversion AS version, extnamespace::pg_catalog.regnamespace::text AS schema
    FROM pg_catalog.pg_extension ORDER BY extname";

const COLLATIONS: &str = "
    SELECT provider, recorded_version, actual_version, count(*) AS count, min(name) AS example
    FROM (SELECT collprovider::text AS provider, collversion AS recorded_version, collname::text AS name,
                 pg_catalog.pg_collation_actual_version(oid) AS actual_version
          FROM pg_catalog.pg_collation WHERE collversion IS NOT NULL) c
    GROUP BY 1, 2, 3 ORDER BY 1, 2, 3";

const TABLESPACES: &str = "
    SELECT oid::bigint AS oid, spcname AS name, pg_catalog.pg_get_userbyid(spcowner) AS owner,
           pg_catalog.pg_tablespace_location(oid) AS location
    FROM pg_catalog.pg_tablespace ORDER BY oid";

/// `ALTER ROLE … SET`, for all databases and for one. Lists of names are stored quoted and must not be quoted again.
const ROLE_SETTINGS: &str = "
    SELECT pg_catalog.format('ALTER %s%s SET %I TO %s;',
               CASE WHEN r.rolname IS NULL THEN pg_catalog.format('DATABASE %I', d.datname)
                    ELSE pg_catalog.format('ROLE %I', r.rolname) END,
               CASE WHEN r.rolname IS NULL OR d.datname IS NULL THEN ''
                    ELSE pg_catalog.format(' IN DATABASE %I', d.datname) END,
               pg_catalog.split_part(setting, '=', 1),
               CASE WHEN pg_catalog.split_part(setting, '=', 1) IN ('search_path', 'temp_tablespaces',
                    'session_preload_libraries', 'local_preload_libraries')
                    THEN coalesce(nullif(pg_catalog.substr(setting, pg_catalog.strpos(setting, '=') + 1), ''), '''''')
                    ELSE pg_catalog.quote_literal(pg_catalog.substr(setting, pg_catalog.strpos(setting, '=') + 1)) END) AS sql
    FROM pg_catalog.pg_db_role_setting s
    CROSS JOIN LATERAL pg_catalog.unnest(s.setconfig) AS setting
    LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole
    LEFT JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase
    WHERE r.rolname IS NOT NULL OR d.datname IS NOT NULL
    ORDER BY 1";

/// Roles before memberships. The bootstrap superuser (oid 10) exists in every cluster, and so do the `pg_` roles.
fn roles_query(version: u32) -> String {
    // One role may be granted by several others, each time with other options.
    let options = if version >= 160_000 {
        "pg_catalog.format(' WITH ADMIN %s, INHERIT %s, SET %s', m.admin_option, m.inherit_option, m.set_option)"
    } else {
        "CASE WHEN m.admin_option THEN ' WITH ADMIN OPTION' ELSE '' END"
    };
    format!(
        "SELECT sql FROM (
            SELECT 1 AS step, pg_catalog.format('%s ROLE %I WITH %s%s%s;',
                CASE WHEN oid = 10 THEN 'ALTER' ELSE 'CREATE' END, rolname,
                pg_catalog.concat_ws(' ',
                    CASE WHEN rolsuper THEN 'SUPERUSER' ELSE 'NOSUPERUSER' END,
                    CASE WHEN rolinherit THEN 'INHERIT' ELSE 'NOINHERIT' END,
                    CASE WHEN rolcreaterole THEN 'CREATEROLE' ELSE 'NOCREATEROLE' END,
                    CASE WHEN rolcreatedb THEN 'CREATEDB' ELSE 'NOCREATEDB' END,
                    CASE WHEN rolcanlogin THEN 'LOGIN' ELSE 'NOLOGIN' END,
                    CASE WHEN rolreplication THEN 'REPLICATION' ELSE 'NOREPLICATION' END,
                    CASE WHEN rolbypassrls THEN 'BYPASSRLS' ELSE 'NOBYPASSRLS' END),
                CASE WHEN rolconnlimit >= 0 THEN ' CONNECTION LIMIT ' || rolconnlimit ELSE '' END,
                CASE WHEN rolvaliduntil IS NOT NULL
                     THEN ' VALID UNTIL ' || pg_catalog.quote_literal(rolvaliduntil) ELSE '' END) AS sql
            FROM pg_catalog.pg_roles WHERE rolname !~ '^pg_'
            UNION ALL
            SELECT 2, pg_catalog.format('GRANT %I TO %I%s;', r.rolname, u.rolname, {options})
            FROM pg_catalog.pg_auth_members m
            JOIN pg_catalog.pg_roles r ON r.oid = m.roleid JOIN pg_catalog.pg_roles u ON u.oid = m.member
            WHERE u.rolname !~ '^pg_') s
         ORDER BY step, sql"
    )
}

/// Columns that came with 15 and changed their name in 17 are taken from the row as JSON, which has them or not.
fn databases_query(version: u32) -> String {
    let actual = if version >= 150_000 { "pg_catalog.pg_database_collation_actual_version(d.oid)" } else { "NULL" };
    format!(
        "SELECT d.datname AS name, pg_catalog.pg_get_userbyid(d.datdba) AS owner,
                pg_catalog.pg_encoding_to_char(d.encoding) AS encoding, coalesce(j ->> 'datlocprovider', 'c') AS provider,
                d.datcollate AS collate, d.datctype AS ctype, coalesce(j ->> 'datlocale', j ->> 'daticulocale') AS locale,
                j ->> 'datcollversion' AS recorded_version, {actual} AS actual_version
         FROM pg_catalog.pg_database d, LATERAL (SELECT pg_catalog.to_jsonb(d) AS j) x ORDER BY d.datname"
    )
}
