//! How programs of PostgreSQL reach the server that we reach: settings in their environment, where neither a shell nor
//! `ps` sees them.

use std::ffi::OsString;
use std::path::Path;

use super::PgError;
use super::conninfo::{ConnInfo, Host, SslMode, TargetSessionAttrs};

/// Where the system keeps its trusted authorities; libpq before version 16 does not know by itself.
const AUTHORITIES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// A password file that is not there.
const NO_PASSFILE: &str = "/nonexistent/pgpass";

/// The environment with which libpq connects to the first server of `info` as this process does, the password included.
///
/// # Errors
/// There is no server, the password file is not usable, or no trusted authorities are known though a certificate is to be
/// checked.
pub fn environment(info: &ConnInfo) -> Result<Vec<(&'static str, OsString)>, PgError> {
    let server = info.servers().first().ok_or_else(|| PgError::Config("no host".to_owned()))?;
    let host = match &server.host {
        Host::Tcp(name) => OsString::from(name),
        Host::Unix(directory) => directory.clone().into_os_string(),
    };
    let mode = info.ssl_mode(server);
    let word = match mode {
        SslMode::Disable => "disable",
        SslMode::Require => "require",
        SslMode::VerifyCa => "verify-ca",
        SslMode::VerifyFull => "verify-full",
    };
    let mut set: Vec<(&'static str, OsString)> = vec![
        ("PGHOST", host),
        ("PGPORT", server.port.to_string().into()),
        ("PGUSER", info.user().into()),
        ("PGDATABASE", info.dbname().into()),
        ("PGAPPNAME", info.application_name.clone().into()),
        ("PGSSLMODE", word.into()),
        // Nobody's password but ours; a file that does not exist is passed over without a word.
        ("PGPASSFILE", NO_PASSFILE.into()),
    ];
    let wanted = match info.target_session_attrs {
        TargetSessionAttrs::Any | TargetSessionAttrs::PreferStandby => None,
        TargetSessionAttrs::ReadWrite => Some("read-write"),
        TargetSessionAttrs::ReadOnly => Some("read-only"),
        TargetSessionAttrs::Primary => Some("primary"),
        TargetSessionAttrs::Standby => Some("standby"),
    };
    set.extend(wanted.map(|word| ("PGTARGETSESSIONATTRS", word.into())));
    set.extend(info.options.clone().map(|options| ("PGOPTIONS", options.into())));
    // libpq waits at least two seconds whatever it is told; 0 means for ever, as `None` does.
    set.push(("PGCONNECT_TIMEOUT", info.connect_timeout.map_or(0, |limit| limit.as_secs().max(2)).to_string().into()));
    match &info.sslrootcert {
        Some(path) => set.push(("PGSSLROOTCERT", path.clone().into_os_string())),
        None if matches!(mode, SslMode::VerifyCa | SslMode::VerifyFull) => {
            let known = AUTHORITIES.into_iter().find(|path| Path::new(path).exists());
            let known = known.ok_or_else(|| PgError::Config("no trusted authorities: set sslrootcert".to_owned()))?;
            set.push(("PGSSLROOTCERT", known.into()));
        }
        None => {}
    }
    if let Some((cert, key)) = &info.client_cert {
        set.push(("PGSSLCERT", cert.clone().into_os_string()));
        set.push(("PGSSLKEY", key.clone().into_os_string()));
    }
    if let Some(password) = info.password(server, info.dbname())? {
        set.push(("PGPASSWORD", OsString::from(password.as_str())));
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_what_the_settings_say() {
        let text = "host=db.example,other port=5433 user=dr dbname=app password='s=1' sslmode=verify-full \
                    sslrootcert=/ca.pem options='-c work_mem=1MB' target_session_attrs=standby";
        let info = ConnInfo::parse(text, &|_| None).unwrap();
        let set = environment(&info).unwrap();
        let value = |name: &str| set.iter().find(|(known, _)| *known == name).and_then(|(_, value)| value.to_str());
        for (name, expected) in [
            ("PGHOST", "db.example"),
            ("PGPORT", "5433"),
            ("PGUSER", "dr"),
            ("PGDATABASE", "app"),
            ("PGPASSWORD", "s=1"),
            ("PGSSLMODE", "verify-full"),
            ("PGSSLROOTCERT", "/ca.pem"),
            ("PGOPTIONS", "-c work_mem=1MB"),
            ("PGTARGETSESSIONATTRS", "standby"),
            ("PGPASSFILE", NO_PASSFILE),
        ] {
            assert_eq!(value(name), Some(expected), "{name}");
        }
        let socket = ConnInfo::parse("host=/run/pg user=dr", &|_| None).unwrap();
        let set = environment(&socket).unwrap();
        assert!(!set.iter().any(|(name, _)| *name == "PGPASSWORD" || *name == "PGSSLROOTCERT"), "{set:?}");
    }
}
