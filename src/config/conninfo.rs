//! Connection strings without secrets.

use crate::model::{Error, Result};

/// Refuses a password in a connection string, in keyword form (`password = …`, also `sslpassword`) and in URI form
/// (`//user:password@`, `?password=…`). It would rather refuse a strange name than let a password through.
///
/// # Errors
/// It holds one.
pub fn without_password(conninfo: &str) -> Result<String> {
    let squeezed: String = conninfo.to_lowercase().split_whitespace().collect();
    // Up to the last @: an unescaped one, or a slash, may be part of the password.
    let user = conninfo.split_once("://").and_then(|(_, rest)| rest.rsplit_once('@')).map(|(user, _)| user);
    if squeezed.contains("password=") || user.is_some_and(|user| user.contains(':')) {
        return Err(Error::usage("a password must not stand in the configuration")
            .hint("leave it out here and add password = \"env:VARIABLE\" or \"file:/path\" (mode 600)"));
    }
    Ok(conninfo.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_spelling_lets_a_password_through() {
        let refused = [
            "host=a password=hunter2",
            "host=a password = 'hunter2'",
            "host=a PASSWORD=hunter2",
            "sslkey=k sslpassword=hunter2",
            "postgresql://u:hunter2@h/db",
            "postgresql://u:hun/ter2@h/db",
            "postgresql://u:hun@ter2@h/db",
            "postgresql://h/db?password=hunter2",
        ];
        for conninfo in refused {
            let error = without_password(conninfo).unwrap_err();
            assert!(!format!("{error:?}").contains("hun"), "{conninfo}");
        }
        let accepted = [
            "",
            "host=/run/postgresql user=drctl dbname=postgres",
            "host=a passfile=/etc/drctl/pgpass",
            "postgresql://u@h:5432,h2:5433/db?target_session_attrs=primary",
        ];
        for conninfo in accepted {
            assert_eq!(without_password(conninfo).unwrap(), conninfo);
        }
    }
}
