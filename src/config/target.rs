//! `[targets.NAME]`.

use std::path::Path;
use std::time::Duration;

use crate::config::drill::assertions;
use crate::config::file::Section;
use crate::config::settings::{Method, Objectives, OnPressure, PostgresTarget, Source, Target};
use crate::model::{Error, Result, TargetName};

pub(super) fn target(name: &str, section: &Section<'_>, state_dir: &Path) -> Result<Target> {
    let name: TargetName = name.parse().map_err(|error| section.wrong_here(&error))?;
    let objectives = Objectives {
        rpo: section.interval("rpo")?,
        rto_restore: section.interval("rto_restore")?,
        rto_failover: section.interval("rto_failover")?,
    };
    section.choice("source", &[("postgres", ())])?.ok_or_else(|| section.missing("source"))?;
    let source = Source::Postgres(Box::new(postgres(&name, section, state_dir)?));
    let assertions = assertions(section)?;
    section.finish()?;
    Ok(Target { name, objectives, source, assertions })
}

fn postgres(name: &TargetName, section: &Section<'_>, state_dir: &Path) -> Result<PostgresTarget> {
    let method = section
        .choice("method", &[("auto", Method::Auto), ("local", Method::Local), ("stream", Method::Stream)])?
        .unwrap_or(Method::Auto);
    let on_pressure = section.choice("on_pressure", &[("keep", OnPressure::Keep), ("drop-slot", OnPressure::DropSlot)]);
    let percent = section.integer("pressure_percent", 1..=99)?.unwrap_or(90);
    let conninfo = section.converted("conninfo", without_password)?;
    let database = section.string("heartbeat_database")?.unwrap_or("postgres");
    let patterns = section.strings("config_files")?;
    if patterns.iter().any(|pattern| !pattern.starts_with('/')) {
        return Err(section.wrong("config_files", &Error::usage("a pattern must be an absolute path")));
    }
    Ok(PostgresTarget {
        conninfo: conninfo.ok_or_else(|| section.missing("conninfo"))?,
        password: section.secret("password")?,
        method,
        data_dir: section.path("data_dir")?,
        slot: section.converted("slot", slot_name)?.unwrap_or_else(|| default_slot(name)),
        ship_interval: section.interval("ship_interval")?.unwrap_or(Duration::from_secs(1)),
        max_read_rate: section.size("max_read_rate")?.filter(|rate| *rate > 0),
        on_pressure: on_pressure?,
        pressure_percent: u8::try_from(percent).unwrap_or(90),
        wal_disk_bytes: section.size("wal_disk_bytes")?,
        stream: section.boolean("stream")?.unwrap_or(true),
        heartbeat: section.boolean("heartbeat")?.unwrap_or(true),
        control_socket: section.path("control_socket")?.unwrap_or_else(|| state_dir.join(format!("{name}.sock"))),
        config_files: patterns.into_iter().map(str::to_owned).collect(),
        heartbeat_database: database.to_owned(),
    })
}

fn default_slot(name: &TargetName) -> String {
    format!("drctl_{}", name.as_str().replace('-', "_"))
}

/// PostgreSQL's own rule for the names of replication slots.
fn slot_name(text: &str) -> Result<String> {
    let letters = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if letters && (1..=63).contains(&text.len()) {
        return Ok(text.to_owned());
    }
    Err(Error::usage(format!("`{text}` is not the name of a slot")).hint("use a-z, 0-9 and _, at most 63 characters"))
}

/// Refuses a password in a connection string, in keyword form (`password = …`, also `sslpassword`) and in URI form
/// (`//user:password@`, `?password=…`). It would rather refuse a strange name than let a password through.
fn without_password(conninfo: &str) -> Result<String> {
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

    #[test]
    fn slots_are_named_after_their_target() {
        let slot = default_slot(&"ledger-eu".parse().unwrap());
        assert_eq!(slot, "drctl_ledger_eu");
        assert_eq!(slot_name(&slot).unwrap(), slot);
        for text in ["", "Ledger", "a-b", &"x".repeat(64)] {
            assert!(slot_name(text).is_err(), "{text}");
        }
    }
}
