//! `[targets.NAME]`.

use std::path::Path;
use std::time::Duration;

use crate::config::conninfo::without_password;
use crate::config::drill::assertions;
use crate::config::file::Section;
use crate::config::retention::retention;
use crate::config::settings::{Detection, Method, Objectives, OnPressure, PostgresTarget, Source, Target};
use crate::config::streamed;
use crate::model::{Error, Result, TargetName};

/// Longer than the checkpoint that a backup begins with takes by default on a standby that follows closely.
const STANDBY_PATIENCE: Duration = Duration::from_secs(600);

pub(super) fn target(name: &str, section: &Section<'_>, state_dir: &Path) -> Result<Target> {
    let name: TargetName = name.parse().map_err(|error| section.wrong_here(&error))?;
    let objectives = Objectives {
        rpo: section.interval("rpo")?,
        rto_restore: section.interval("rto_restore")?,
        rto_failover: section.interval("rto_failover")?,
    };
    let kinds = [("postgres", Kind::Postgres), ("dump", Kind::Dump), ("files", Kind::Files)];
    let kind = section.choice("source", &kinds)?.ok_or_else(|| section.missing("source"))?;
    let (source, assertions) = match kind {
        // Drills ask them, and drills are of clusters.
        Kind::Postgres => (Source::Postgres(Box::new(postgres(&name, section, state_dir)?)), assertions(section)?),
        Kind::Dump => (Source::Dump(Box::new(streamed::dump(section)?)), Vec::new()),
        Kind::Files => (Source::Files(streamed::files(section)?), Vec::new()),
    };
    let retention = retention(&section.section("retention")?, matches!(source, Source::Postgres(_)))?;
    section.finish()?;
    Ok(Target { name, objectives, source, retention, assertions })
}

#[derive(Clone, Copy)]
enum Kind {
    Postgres,
    Dump,
    Files,
}

fn postgres(name: &TargetName, section: &Section<'_>, state_dir: &Path) -> Result<PostgresTarget> {
    let method = section
        .choice("method", &[("auto", Method::Auto), ("local", Method::Local), ("stream", Method::Stream)])?
        .unwrap_or(Method::Auto);
    let detections = [
        ("read", Detection::Read),
        ("auto", Detection::Auto),
        ("wal", Detection::Wal),
        ("summaries", Detection::Summaries),
    ];
    let detection = section.choice("detection", &detections)?.unwrap_or(Detection::Read);
    let full_every = section.interval("full_every")?.unwrap_or(FULL_EVERY);
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
        detection,
        full_every,
        data_dir: section.path("data_dir")?,
        standby: section.converted("standby", without_password)?,
        standby_patience: section.interval("standby_patience")?.unwrap_or(STANDBY_PATIENCE),
        slot: section.converted("slot", slot_name)?.unwrap_or_else(|| default_slot(name)),
        ship_interval: section.interval("ship_interval")?.unwrap_or(Duration::from_secs(1)),
        max_read_rate: section.size("max_read_rate")?.filter(|rate| *rate > 0),
        on_pressure: on_pressure?,
        pressure_percent: u8::try_from(percent).unwrap_or(90),
        wal_disk_bytes: section.size("wal_disk_bytes")?,
        standby_slots: section.boolean("standby_slots")?.unwrap_or(false),
        stream: section.boolean("stream")?.unwrap_or(true),
        heartbeat: section.boolean("heartbeat")?.unwrap_or(true),
        sync: section.boolean("sync")?.unwrap_or(false),
        control_socket: section.path("control_socket")?.unwrap_or_else(|| state_dir.join(format!("{name}.sock"))),
        config_files: patterns.into_iter().map(str::to_owned).collect(),
        heartbeat_database: database.to_owned(),
    })
}

/// One generation of pages is not trusted for ever.
const FULL_EVERY: Duration = Duration::from_hours(30 * 24);

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

#[cfg(test)]
mod tests {
    use super::*;

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
