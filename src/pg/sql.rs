//! Plain SQL connections.

use std::error::Error as _;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage, config};

use crate::observe::task;
use crate::pg::PgError;
use crate::pg::conninfo::{ConnInfo, Host, Server, SessionRole, TargetSessionAttrs};
use crate::pg::error::ServerReport;
use crate::pg::tls::{Tls, handshake_reason};

/// A connection that ends when it is dropped; use it as a [`tokio_postgres::Client`].
#[derive(Debug)]
pub struct SqlClient {
    client: Client,
}

impl Deref for SqlClient {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for SqlClient {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

/// Connects to the first server of `info` that is reachable and in the wanted role.
///
/// # Errors
/// Of the last server tried. A refused password ends the search at once, as in libpq: it would be refused elsewhere too,
/// and three tries may lock an account.
pub async fn connect(info: &ConnInfo) -> Result<SqlClient, PgError> {
    let mut last = PgError::Config("no host".to_owned());
    for wanted in info.passes() {
        for server in info.servers() {
            last = match connect_server(info, server, wanted).await {
                Ok(client) => return Ok(client),
                Err(error @ (PgError::Auth(_) | PgError::Config(_))) => return Err(error),
                Err(error) => error,
            };
        }
    }
    Err(last)
}

async fn connect_server(info: &ConnInfo, server: &Server, wanted: TargetSessionAttrs) -> Result<SqlClient, PgError> {
    let attempt = async {
        let client = open(info, server).await.map_err(|error| at(server, error))?;
        if wanted != TargetSessionAttrs::Any && !wanted.accepts(role(&client).await?) {
            let reason = format!("not in the wanted role ({wanted:?})");
            return Err(PgError::Connect { server: server.to_string(), reason });
        }
        Ok(client)
    };
    match info.connect_timeout {
        None => attempt.await,
        Some(limit) => tokio::time::timeout(limit, attempt)
            .await
            .unwrap_or_else(|_| Err(PgError::Timeout(format!("{server} did not let us in within {limit:?}")))),
    }
}

/// Puts the name of the server where tokio-postgres knows none.
fn at(server: &Server, error: PgError) -> PgError {
    let server = server.to_string();
    match error {
        PgError::Connect { reason, .. } => PgError::Connect { server, reason },
        PgError::Tls { reason, .. } => PgError::Tls { server, reason },
        other => other,
    }
}

async fn open(info: &ConnInfo, server: &Server) -> Result<SqlClient, PgError> {
    let tls = Tls::new(info, server)?;
    let mut config = Config::new();
    config
        .user(info.user())
        .dbname(info.dbname())
        .application_name(&info.application_name)
        .port(server.port)
        .keepalives_idle(Duration::from_secs(30))
        .keepalives_interval(Duration::from_secs(10))
        .keepalives_retries(3);
    match &server.host {
        Host::Tcp(name) => config.host(name),
        Host::Unix(directory) => config.host_path(directory),
    };
    if let Some(options) = &info.options {
        config.options(options);
    }
    if let Some(password) = info.password(server, info.dbname())? {
        config.password(password.as_bytes());
    }
    let client = match tls {
        None => {
            let (client, connection) = config.ssl_mode(config::SslMode::Disable).connect(NoTls).await?;
            drive(connection);
            client
        }
        Some(tls) => {
            let (client, connection) = config.ssl_mode(config::SslMode::Require).connect(tls).await?;
            drive(connection);
            client
        }
    };
    Ok(SqlClient { client })
}

/// Moves the bytes until the client is dropped; what ends it early reaches the caller through the client.
fn drive<F>(connection: F)
where
    F: Future<Output = Result<(), tokio_postgres::Error>> + Send + 'static,
{
    task::spawn("sql-connection", async move {
        if let Err(error) = connection.await {
            tracing::debug!(error = %PgError::from(error), "sql connection ended");
        }
    });
}

async fn role(client: &Client) -> Result<SessionRole, PgError> {
    let query = "SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('transaction_read_only')";
    // The simple protocol gives text, and works through poolers that do not prepare statements.
    for message in client.simple_query(query).await? {
        if let SimpleQueryMessage::Row(row) = message {
            return Ok(SessionRole { in_recovery: row.get(0) == Some("t"), read_only: row.get(1) == Some("on") });
        }
    }
    Err(PgError::Protocol("no row for the role of the server".to_owned()))
}

impl From<tokio_postgres::Error> for PgError {
    fn from(error: tokio_postgres::Error) -> Self {
        if let Some(report) = error.as_db_error() {
            return Self::from_server(ServerReport {
                sqlstate: report.code().code().to_owned(),
                message: report.message().to_owned(),
                detail: report.detail().map(str::to_owned),
                hint: report.hint().map(str::to_owned),
            });
        }
        if error.is_closed() {
            return Self::Closed("the server or the network ended it".to_owned());
        }
        let reason = match error.source() {
            Some(source) => source.downcast_ref().map_or_else(|| source.to_string(), handshake_reason),
            None => error.to_string(),
        };
        // tokio-postgres keeps its kind private; the fixed texts of its Display are the only way to tell them apart.
        let server = || "of the connection settings".to_owned();
        match error.to_string().as_str() {
            "error communicating with the server" => Self::Closed(reason),
            "error connecting to server" => Self::Connect { server: server(), reason },
            "error performing TLS handshake" => Self::Tls { server: server(), reason },
            "authentication error" => Self::Auth(reason),
            "timeout waiting for server" => Self::Timeout(reason),
            "invalid configuration" if reason == "password missing" => {
                Self::Auth("the server wants a password and none is configured".to_owned())
            }
            "invalid configuration" | "invalid connection string" => Self::Config(reason),
            other => Self::Protocol(if reason == other { reason } else { format!("{other}: {reason}") }),
        }
    }
}
