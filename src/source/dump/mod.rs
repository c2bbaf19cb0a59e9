//! Logical dumps: `pg_dump` of each database and `pg_dumpall` of what they share, streamed as they come.
//!
//! For servers that give nobody their data directory. What a dump holds is the moment of its snapshot, which is taken here
//! and handed to `pg_dump`, so that the moment is known. Passwords go through the environment of the child, never through
//! its arguments.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::sync::mpsc;

use crate::model::{Error, Result, ResultExt};
use crate::pg::conninfo::ConnInfo;
use crate::pg::instance::PgBinaries;
use crate::source::{Copied, StreamItem, StreamSource};

mod child;
mod look;
mod properties;
mod restore;
mod server;
#[cfg(test)]
mod tests;

pub use look::{Found, look};
pub use properties::Properties;
pub use restore::{Goal, Place, Restored, Wishes, create, dress, drop_created, inspect, restore};

use child::Child;
use server::{Choice, Server};

/// The stream of what belongs to no database: roles, their memberships, tablespaces.
pub const GLOBALS: &str = "globals.sql";

/// What is dumped, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// How to reach the server.
    pub conninfo: ConnInfo,
    /// These databases; none named means every one that may be connected to and is no template.
    pub databases: Vec<String>,
    /// Whether roles and tablespaces are dumped as well.
    pub globals: bool,
    /// Where `pg_dump` is, if not at one of the usual places of its version.
    pub bin_dir: Option<PathBuf>,
    /// What of each database.
    pub scope: Scope,
    /// How long a lock on a table is waited for.
    pub lock_wait: Option<Duration>,
    /// Whether the programs are killed with this process, which must be drctl.
    pub end_with_us: bool,
}

impl Options {
    fn command(&self, binaries: &PgBinaries, program: &str) -> Command {
        if self.end_with_us { binaries.command_beside(program) } else { binaries.command(program) }
    }
}

/// What of a database is dumped: patterns as `pg_dump` takes them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scope {
    /// Only these schemas.
    pub schemas: Vec<String>,
    /// Not these.
    pub exclude_schemas: Vec<String>,
    /// Only these tables.
    pub tables: Vec<String>,
    /// Not these.
    pub exclude_tables: Vec<String>,
    /// These without their rows.
    pub exclude_table_data: Vec<String>,
}

impl Scope {
    fn arguments(&self) -> impl Iterator<Item = String> + '_ {
        let Self { schemas, exclude_schemas, tables, exclude_tables, exclude_table_data } = self;
        let named = [
            ("schema", schemas),
            ("exclude-schema", exclude_schemas),
            ("table", tables),
            ("exclude-table", exclude_tables),
            ("exclude-table-data", exclude_table_data),
        ];
        // Without it a table that was renamed drops out of the dump, as long as any other pattern still matches.
        let strict = (!schemas.is_empty() || !tables.is_empty()).then(|| "--strict-names".to_owned());
        let named = named.into_iter().flat_map(|(name, list)| list.iter().map(move |text| format!("--{name}={text}")));
        strict.into_iter().chain(named)
    }
}

/// What a dump holds, for the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contents {
    /// `server_version_num` of the source.
    pub server_version: u32,
    /// What `pg_dump --version` printed.
    pub pg_dump: String,
    /// Its major version; a `pg_restore` of this one reads the streams.
    pub pg_dump_major: u32,
    /// What of each database.
    pub scope: Scope,
    /// The databases.
    pub databases: Vec<Database>,
    /// The stream of roles and tablespaces.
    pub globals: Option<String>,
    /// Databases that were not dumped, and why.
    pub left_out: Vec<String>,
}

/// One database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// Its stream.
    pub stream: String,
    /// The server's clock just before the snapshot was taken: everything that was committed by then is in the dump.
    pub snapshot_at: DateTime<Utc>,
    /// How an empty one of its kind is made.
    pub locale: Locale,
    /// Roles that own something in it, or are granted something.
    pub roles: Vec<String>,
    /// What `pg_restore` leaves out because it belongs to the database itself.
    #[serde(default)]
    pub properties: Properties,
}

/// Encoding and collation of a database.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Locale {
    /// `UTF8`.
    pub encoding: String,
    /// `LC_COLLATE`.
    pub collate: String,
    /// `LC_CTYPE`.
    pub ctype: String,
    /// `c` (libc), `i` (ICU) or `b` (builtin).
    pub provider: String,
    /// The locale of a provider that is not libc.
    pub locale: Option<String>,
}

/// A server whose databases are to be dumped.
#[derive(Debug)]
pub struct Dump {
    options: Options,
}

impl Dump {
    /// Nothing is connected yet.
    pub const fn new(options: Options) -> Self {
        Self { options }
    }
}

#[async_trait]
impl StreamSource for Dump {
    async fn copy(&mut self, items: mpsc::Sender<StreamItem>) -> Result<Copied> {
        let server = Server::connect(&self.options).await?;
        let Choice { chosen, closed, refused } = server.databases(&self.options).await?;
        let programs = server.programs(self.options.bin_dir.as_deref()).await?;
        let mut contents = Contents {
            server_version: server.version,
            pg_dump: programs.version.clone(),
            pg_dump_major: programs.binaries.major,
            scope: self.options.scope.clone(),
            databases: Vec::new(),
            globals: None,
            left_out: closed.iter().chain(&refused).cloned().collect(),
        };
        let (mut notes, mut as_of) = (Vec::new(), None::<DateTime<Utc>>);
        let watch = server.watch();
        for name in chosen {
            let step = || format!("dump the database {name}");
            let snapshot = server.snapshot(&name).await.during(step)?;
            let mut command = self.options.command(&programs.binaries, "pg_dump");
            command.args(["--format=custom", "--compress=0", "--no-password"]);
            command.arg(format!("--snapshot={}", snapshot.id)).args(self.options.scope.arguments());
            if let Some(limit) = self.options.lock_wait {
                command.arg(format!("--lock-wait-timeout={}", limit.as_millis()));
            }
            let stream = stream_name(&name);
            let child = Child::start("pg_dump", command, server.environment(&name)?).during(step)?;
            notes.extend(child.send(&items, &stream).await.during(step)?);
            as_of = as_of.into_iter().chain(snapshot.lagging()).min();
            contents.databases.push(snapshot.end(stream));
        }
        if self.options.globals {
            let mut command = self.options.command(&programs.binaries, "pg_dumpall");
            // Managed servers show nobody the hashes of passwords.
            command.args(["--globals-only", "--no-role-passwords", "--no-password"]);
            command.arg(format!("--database={}", as_conninfo(server.maintenance())));
            let child = Child::start("pg_dumpall", command, server.environment(server.maintenance())?)?;
            notes.extend(child.send(&items, GLOBALS).await.during(|| "dump roles and tablespaces")?);
            contents.globals = Some(GLOBALS.to_owned());
        }
        watch.over();
        notes.extend(closed);
        let document = serde_json::to_value(&contents);
        let document = document.map_err(|error| Error::failed("describe the dump").because(error))?;
        Ok(Copied { document, notes, left_out: refused, as_of })
    }

    fn method(&self) -> &'static str {
        "pg_dump"
    }
}

/// A file name that says which database: everything but letters, digits and `._-` as `%XX`.
fn stream_name(database: &str) -> String {
    let mut name = String::new();
    for (at, byte) in database.bytes().enumerate() {
        let plain = byte.is_ascii_alphanumeric() || byte == b'_' || (at > 0 && matches!(byte, b'.' | b'-'));
        if plain { name.push(char::from(byte)) } else { name.push_str(&format!("%{byte:02X}")) }
    }
    name + ".dump"
}

/// Programs that take a name of a database take a whole connection string as well; only in one is a name always a name.
fn as_conninfo(database: &str) -> String {
    format!("dbname='{}'", database.replace('\\', "\\\\").replace('\'', "\\'"))
}
