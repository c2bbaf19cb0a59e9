//! What is protected: from settings to the targets of jobs.

use crate::config::{
    self, Assertion, Detection, DumpTarget, FilesTarget, Method, OnPressure, PostgresTarget, Secret, Settings, Source,
    Target as TargetSettings,
};
use crate::jobs::{self, Objectives, Streamed, Target, What};
use crate::model::{Error, Result, ResultExt, TargetName};
use crate::pg::conninfo::ConnInfo;
use crate::source::{dump, files, postgres};

pub(super) fn conninfo(name: &TargetName, text: &str, password: Option<&Secret>) -> Result<ConnInfo> {
    let conninfo = ConnInfo::from_text(text).map_err(Error::from).during(|| format!("target {name}"))?;
    Ok(match password {
        Some(password) => conninfo.with_password(password.read()?.expose()),
        None => conninfo,
    })
}

pub(super) fn objectives(target: &TargetSettings) -> Objectives {
    let config::Objectives { rpo, rto_restore, rto_failover } = target.objectives;
    Objectives { rpo, rto_restore, rto_failover }
}

/// The targets that are read as streams.
pub(super) fn streamed(settings: &Settings) -> Result<Vec<Streamed>> {
    let mut list = Vec::new();
    for target in &settings.targets {
        let what = match &target.source {
            Source::Postgres(_) => continue,
            Source::Dump(options) => What::Dump(Box::new(dump_options(&target.name, options)?)),
            Source::Files(FilesTarget { roots, include, exclude }) => {
                What::Files(files::Options { roots: roots.clone(), include: include.clone(), exclude: exclude.clone() })
            }
        };
        list.push(Streamed { name: target.name.clone(), objectives: objectives(target), what });
    }
    Ok(list)
}

pub(super) fn dump_options(name: &TargetName, target: &DumpTarget) -> Result<dump::Options> {
    let scope = dump::Scope {
        schemas: target.schemas.clone(),
        exclude_schemas: target.exclude_schemas.clone(),
        tables: target.tables.clone(),
        exclude_tables: target.exclude_tables.clone(),
        exclude_table_data: target.exclude_table_data.clone(),
    };
    Ok(dump::Options {
        conninfo: conninfo(name, &target.conninfo, target.password.as_ref())?,
        databases: target.databases.clone(),
        globals: target.globals,
        bin_dir: target.bin_dir.clone(),
        scope,
        lock_wait: target.lock_wait_timeout,
        end_with_us: true,
    })
}

/// The clusters that the configuration protects.
///
/// # Errors
/// A connection string cannot be understood, or a password not be read.
pub fn targets(settings: &Settings) -> Result<Vec<Target>> {
    let target = |target: &TargetSettings| {
        let Source::Postgres(pg) = &target.source else { return None };
        Some(cluster(target, pg))
    };
    settings.targets.iter().filter_map(target).collect()
}

pub(super) fn cluster(target: &TargetSettings, pg: &PostgresTarget) -> Result<Target> {
    let conninfo = conninfo(&target.name, &pg.conninfo, pg.password.as_ref())?;
    let method = match pg.method {
        Method::Local => postgres::Method::Local,
        Method::Stream => postgres::Method::Stream,
        Method::Auto => postgres::Method::Auto,
    };
    let detection = match pg.detection {
        Detection::Read => jobs::Detection::Read,
        Detection::Auto => jobs::Detection::Auto,
        Detection::Wal => jobs::Detection::Wal,
        Detection::Summaries => jobs::Detection::Summaries,
    };
    let standby = match &pg.standby {
        None => None,
        Some(text) => Some(postgres::Lender {
            conninfo: self::conninfo(&target.name, text, pg.password.as_ref())?,
            patience: pg.standby_patience,
        }),
    };
    let on_pressure = pg.on_pressure.as_ref().map(|policy| match policy {
        OnPressure::Keep => jobs::OnPressure::Keep,
        OnPressure::DropSlot => jobs::OnPressure::DropSlot,
    });
    Ok(Target {
        name: target.name.clone(),
        objectives: objectives(target),
        conninfo,
        method,
        detection,
        full_every: pg.full_every,
        data_dir: pg.data_dir.clone(),
        standby,
        slot: pg.slot.clone(),
        ship_interval: pg.ship_interval,
        max_read_rate: pg.max_read_rate,
        on_pressure,
        pressure_percent: pg.pressure_percent,
        wal_disk_bytes: pg.wal_disk_bytes,
        standby_slots: pg.standby_slots,
        stream: pg.stream,
        heartbeat: pg.heartbeat,
        sync: pg.sync,
        control_socket: pg.control_socket.clone(),
        config_files: pg.config_files.clone(),
        heartbeat_database: pg.heartbeat_database.clone(),
        assertions: target.assertions.iter().map(assertion).collect(),
    })
}

pub(super) fn assertion(assertion: &Assertion) -> jobs::Assertion {
    let Assertion { name, sql, expect, database, control } = assertion.clone();
    jobs::Assertion { name, sql, expect, database, control }
}
