//! Whether a dump would work: connect, see what would be dumped, find the programs.

use super::Options;
use super::server::{Choice, Server};
use crate::model::Result;

/// What was found.
#[derive(Debug)]
pub struct Found {
    /// `server_version_num`.
    pub version: u32,
    /// The databases that would be dumped.
    pub databases: Vec<String>,
    /// Those that nobody can connect to, in words.
    pub closed: Vec<String>,
    /// Those that lack a grant, in words.
    pub refused: Vec<String>,
    /// What `pg_dump --version` prints, or why there is none that fits.
    pub pg_dump: Result<String>,
    /// Tables with row security that would end the dump, because we do not see all of their rows.
    pub hidden_rows: bool,
}

/// Looks, and changes nothing.
///
/// # Errors
/// The server does not answer, or a database that was named does not exist.
pub async fn look(options: &Options) -> Result<Found> {
    let server = Server::connect(options).await?;
    let Choice { chosen: databases, closed, refused } = server.databases(options).await?;
    let pg_dump = server.programs(options.bin_dir.as_deref()).await.map(|programs| programs.version);
    let query = "SELECT NOT (rolsuper OR rolbypassrls) FROM pg_catalog.pg_roles WHERE rolname = current_user";
    let row = server.client().query_one(query, &[]).await.map_err(crate::pg::PgError::from)?;
    Ok(Found { version: server.version, databases, closed, refused, pg_dump, hidden_rows: row.get(0) })
}
