//! Where a server is and who we are there: libpq's connection strings, without libpq's fallbacks to clear text.
//!
//! Differences from libpq, all on purpose:
//! - `sslmode` is `verify-full` for every TCP host that is not loopback, and `disable` for loopback and sockets, unless
//!   given. `allow` and `prefer` do not exist here: they fall back to clear text without a word.
//! - `host` and `user` must be given; of the environment only PGPASSWORD, PGPASSFILE and HOME are read.
//! - A password file that others can read is an error, not a warning.

mod passfile;
mod text;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use zeroize::Zeroizing;

pub(in crate::pg) use self::passfile::read_private;
use self::passfile::{Passfile, Wanted};
use crate::pg::PgError;

const DEFAULT_PORT: u16 = 5432;
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

const KEYWORDS: [&str; 14] = [
    "application_name",
    "connect_timeout",
    "dbname",
    "host",
    "options",
    "passfile",
    "password",
    "port",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "target_session_attrs",
    "user",
];

/// Connection settings; neither `Debug` nor `Display` shows the password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnInfo {
    servers: Vec<Server>,
    user: String,
    dbname: Option<String>,
    password: Option<Secret>,
    passfile: Option<Passfile>,
    sslmode: Option<SslMode>,
    /// PEM file of trusted authorities; the system's when absent.
    pub sslrootcert: Option<PathBuf>,
    /// Client certificate chain and its key, PEM.
    pub client_cert: Option<(PathBuf, PathBuf)>,
    /// As shown in pg_stat_activity and matched by synchronous_standby_names.
    pub application_name: String,
    /// For one server, from the first packet to the end of authentication; `None` waits for ever.
    pub connect_timeout: Option<Duration>,
    /// Command-line options for the session, as `-c statement_timeout=0`.
    pub options: Option<String>,
    /// Which of several servers to take.
    pub target_session_attrs: TargetSessionAttrs,
}

/// One place to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Name, address or socket directory.
    pub host: Host,
    /// TCP port, or the number in the socket's name.
    pub port: u16,
}

/// How to reach a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A name or an address.
    Tcp(String),
    /// The directory of a Unix socket.
    Unix(PathBuf),
}

/// What TLS must prove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// Clear text.
    Disable,
    /// Encrypted; the certificate is checked only if `sslrootcert` is given, and then as by `verify-ca` (as in libpq).
    Require,
    /// The certificate is signed by a trusted authority.
    VerifyCa,
    /// And names the host.
    VerifyFull,
}

/// Which server of several is acceptable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetSessionAttrs {
    /// Any.
    Any,
    /// Accepts writes.
    ReadWrite,
    /// Does not.
    ReadOnly,
    /// Not in recovery.
    Primary,
    /// In recovery.
    Standby,
    /// In recovery if there is one, else any.
    PreferStandby,
}

/// What a session says about its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionRole {
    /// It replays WAL of another server.
    pub in_recovery: bool,
    /// It refuses writes, for whatever reason.
    pub read_only: bool,
}

#[derive(Clone, PartialEq, Eq)]
struct Secret(Zeroizing<String>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

impl ConnInfo {
    /// Reads a URI or keyword/value text; `environment` answers for PGPASSWORD, PGPASSFILE and HOME.
    ///
    /// # Errors
    /// [`PgError::Config`], whose text never repeats a value that could be a password.
    pub fn parse(text: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Self, PgError> {
        let mut given = Given { pairs: text::pairs(text)? };
        given.check_names()?;
        let servers = servers(given.take("host"), given.take("port"))?;
        let user = given.take("user").ok_or_else(|| config("no user in the connection settings"))?;
        let password = given.take("password").or_else(|| environment("PGPASSWORD").filter(|word| !word.is_empty()));
        let passfile = passfile(given.take("passfile").or_else(|| environment("PGPASSFILE")), environment("HOME"));
        let client_cert = match (given.take("sslcert"), given.take("sslkey")) {
            (None, None) => None,
            (Some(cert), Some(key)) => Some((cert.into(), key.into())),
            _ => return Err(config("sslcert and sslkey go together")),
        };
        Ok(Self {
            servers,
            user,
            dbname: given.take("dbname"),
            password: password.map(|word| Secret(Zeroizing::new(word))),
            passfile,
            sslmode: given.take("sslmode").map(|word| ssl_mode(&word)).transpose()?,
            sslrootcert: given.take("sslrootcert").filter(|path| path != "system").map(PathBuf::from),
            client_cert,
            application_name: given.take("application_name").unwrap_or_else(|| "drctl".to_owned()),
            connect_timeout: connect_timeout(given.take("connect_timeout"))?,
            options: given.take("options"),
            target_session_attrs: session_attrs(given.take("target_session_attrs"))?,
        })
    }

    /// [`Self::parse`] with the environment of this process.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn from_text(text: &str) -> Result<Self, PgError> {
        Self::parse(text, &|name| std::env::var(name).ok())
    }

    /// The servers, in the order to try them; at least one.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// The same, where only this server counts.
    #[must_use]
    pub fn at(mut self, server: Server) -> Self {
        self.servers = vec![server];
        self
    }

    /// The role to log in as.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database; PostgreSQL's own default is the one named like the user.
    pub fn dbname(&self) -> &str {
        self.dbname.as_deref().unwrap_or(&self.user)
    }

    /// The same server and credentials, another database.
    #[must_use]
    pub fn with_dbname(mut self, dbname: impl Into<String>) -> Self {
        self.dbname = Some(dbname.into());
        self
    }

    /// The same, under another name in pg_stat_activity.
    #[must_use]
    pub fn with_application_name(mut self, name: impl Into<String>) -> Self {
        self.application_name = name.into();
        self
    }

    /// The same with a password that was kept elsewhere; it goes before PGPASSWORD and password files.
    #[must_use]
    pub fn with_password(mut self, password: &str) -> Self {
        self.password = Some(Secret(Zeroizing::new(password.to_owned())));
        self
    }

    /// The mode for `server`. A given mode does not apply to Unix sockets, over which PostgreSQL has no TLS.
    pub fn ssl_mode(&self, server: &Server) -> SslMode {
        match &server.host {
            Host::Unix(_) => SslMode::Disable,
            Host::Tcp(name) if is_loopback(name) => self.sslmode.unwrap_or(SslMode::Disable),
            Host::Tcp(_) => self.sslmode.unwrap_or(SslMode::VerifyFull),
        }
    }

    /// The password for `server`, if there is one. The password file is read anew each time, so that a rotated password
    /// is found without a restart. Physical replication looks for the database `replication` there, as libpq does.
    ///
    /// # Errors
    /// The password file is missing or closed to us though named, or readable by others.
    pub fn password(&self, server: &Server, database: &str) -> Result<Option<Zeroizing<String>>, PgError> {
        if let Some(secret) = &self.password {
            return Ok(Some(secret.0.clone()));
        }
        let Some(passfile) = &self.passfile else { return Ok(None) };
        let host = server.host.to_string();
        let wanted = |host| Wanted { host, port: server.port, database, user: &self.user };
        let found = passfile.lookup(wanted(&host))?;
        match (&found, &server.host) {
            (None, Host::Unix(_)) => passfile.lookup(wanted("localhost")),
            _ => Ok(found),
        }
    }

    /// The same login at each of the servers alone, whatever its role.
    pub fn each_server(&self) -> impl Iterator<Item = Self> {
        let alone = |server: &Server| Self {
            servers: vec![server.clone()],
            target_session_attrs: TargetSessionAttrs::Any,
            ..self.clone()
        };
        self.servers.iter().map(alone)
    }

    /// The same login at whichever of several servers is the primary, for what no standby does. One server alone is taken as
    /// it is: it says itself what it is.
    #[must_use]
    pub fn primary(&self) -> Self {
        let accepted = match self.target_session_attrs {
            TargetSessionAttrs::ReadWrite => TargetSessionAttrs::ReadWrite,
            _ if self.servers.len() > 1 => TargetSessionAttrs::Primary,
            given => given,
        };
        Self { target_session_attrs: accepted, ..self.clone() }
    }

    /// The wishes to try in turn over all servers.
    pub(in crate::pg) fn passes(&self) -> Vec<TargetSessionAttrs> {
        match self.target_session_attrs {
            TargetSessionAttrs::PreferStandby => vec![TargetSessionAttrs::Standby, TargetSessionAttrs::Any],
            one => vec![one],
        }
    }
}

/// `postgresql://user@host:port,host:port/dbname`: enough to recognise the server, nothing secret.
impl fmt::Display for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "postgresql://{}@", self.user)?;
        for (number, server) in self.servers.iter().enumerate() {
            write!(f, "{}{server}", if number == 0 { "" } else { "," })?;
        }
        write!(f, "/{}", self.dbname())
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Tcp(name) if name.contains(':') => write!(f, "[{name}]:{}", self.port),
            host => write!(f, "{host}:{}", self.port),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(name) => f.write_str(name),
            Self::Unix(directory) => write!(f, "{}", directory.display()),
        }
    }
}

impl TargetSessionAttrs {
    /// Whether a server in this role will do.
    pub fn accepts(self, role: SessionRole) -> bool {
        match self {
            Self::Any | Self::PreferStandby => true,
            Self::ReadWrite => !role.read_only,
            Self::ReadOnly => role.read_only,
            Self::Primary => !role.in_recovery,
            Self::Standby => role.in_recovery,
        }
    }
}

struct Given {
    pairs: Vec<(String, String)>,
}

impl Given {
    fn check_names(&self) -> Result<(), PgError> {
        for (name, value) in &self.pairs {
            if !KEYWORDS.contains(&name.as_str()) {
                return Err(unknown(name));
            }
            // A NUL would end the value early in a packet of the protocol.
            if value.contains('\0') {
                return Err(config(&format!("{name} holds a NUL byte")));
            }
        }
        Ok(())
    }

    /// The last value given; an empty one counts as not given, as in libpq.
    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.pairs.iter().rposition(|(key, _)| key == name)?;
        Some(self.pairs.remove(at).1).filter(|value| !value.is_empty())
    }
}

fn config(what: &str) -> PgError {
    PgError::Config(what.to_owned())
}

fn unknown(name: &str) -> PgError {
    let nearest = KEYWORDS.iter().min_by_key(|known| strsim::damerau_levenshtein(known, name));
    // A mistyped separator can make part of a password look like a keyword: only short plain words are repeated.
    let plain = name.len() <= 32 && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let shown = if plain { format!(" `{name}`") } else { String::new() };
    let advice = nearest.map(|known| format!("; the nearest known one is `{known}`")).unwrap_or_default();
    PgError::Config(format!("unknown connection keyword{shown}{advice}"))
}

fn servers(hosts: Option<String>, ports: Option<String>) -> Result<Vec<Server>, PgError> {
    let hosts = hosts.ok_or_else(|| {
        config("no host in the connection settings; host=/var/run/postgresql is the usual local socket")
    })?;
    let hosts: Vec<&str> = hosts.split(',').collect();
    let ports = ports.map(|text| text.split(',').map(port).collect::<Result<Vec<_>, _>>()).transpose()?;
    let ports = ports.unwrap_or_else(|| vec![DEFAULT_PORT]);
    if ports.len() != 1 && ports.len() != hosts.len() {
        return Err(PgError::Config(format!("{} ports for {} hosts", ports.len(), hosts.len())));
    }
    let servers = hosts.iter().enumerate().map(|(number, host)| {
        let host = match *host {
            "" => return Err(config("an empty host in the connection settings")),
            path if path.starts_with('/') => Host::Unix(path.into()),
            name => Host::Tcp(name.to_owned()),
        };
        let port = ports.get(number).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
        Ok(Server { host, port })
    });
    servers.collect()
}

fn port(text: &str) -> Result<u16, PgError> {
    match text {
        "" => Ok(DEFAULT_PORT),
        text => match text.trim().parse() {
            Ok(0) | Err(_) => Err(config("port is not a number from 1 to 65535")),
            Ok(port) => Ok(port),
        },
    }
}

fn passfile(named: Option<String>, home: Option<String>) -> Option<Passfile> {
    let named = named.filter(|path| !path.is_empty()).map(|path| Passfile { path: path.into(), required: true });
    named.or_else(|| home.map(|home| Passfile { path: PathBuf::from(home).join(".pgpass"), required: false }))
}

fn ssl_mode(word: &str) -> Result<SslMode, PgError> {
    match word {
        "disable" => Ok(SslMode::Disable),
        "require" => Ok(SslMode::Require),
        "verify-ca" => Ok(SslMode::VerifyCa),
        "verify-full" => Ok(SslMode::VerifyFull),
        "allow" | "prefer" => Err(PgError::Config(format!(
            "sslmode={word} can fall back to clear text; use disable, require, verify-ca or verify-full"
        ))),
        _ => Err(config("sslmode is none of disable, require, verify-ca, verify-full")),
    }
}

fn session_attrs(word: Option<String>) -> Result<TargetSessionAttrs, PgError> {
    Ok(match word.as_deref() {
        None | Some("any") => TargetSessionAttrs::Any,
        Some("read-write") => TargetSessionAttrs::ReadWrite,
        Some("read-only") => TargetSessionAttrs::ReadOnly,
        Some("primary") => TargetSessionAttrs::Primary,
        Some("standby") => TargetSessionAttrs::Standby,
        Some("prefer-standby") => TargetSessionAttrs::PreferStandby,
        Some(_) => {
            let known = "any, read-write, read-only, primary, standby, prefer-standby";
            return Err(PgError::Config(format!("target_session_attrs is none of {known}")));
        }
    })
}

fn connect_timeout(word: Option<String>) -> Result<Option<Duration>, PgError> {
    match word.map(|word| word.trim().parse::<u32>()) {
        None => Ok(Some(DEFAULT_CONNECT_TIMEOUT)),
        Some(Ok(0)) => Ok(None),
        Some(Ok(seconds)) => Ok(Some(Duration::from_secs(seconds.into()))),
        Some(Err(_)) => Err(config("connect_timeout is not a number of seconds")),
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests;
