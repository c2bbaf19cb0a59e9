//! `global/pg_control`: what a cluster says about itself.

use chrono::{DateTime, Utc};

use super::le::{i64_at, u32_at, u64_at};
use crate::model::{Error, Lsn, SystemId, Timeline, WalSegmentSize};

/// The file's path in a data directory.
pub const PATH: &str = "global/pg_control";

/// The size of the file; all behind the CRC is zero.
pub const FILE_SIZE: usize = 8192;

/// Why a control file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The CRC is wrong. A running server overwrites the file in place, and a reader may see half of it: read again.
    #[error("pg_control has a wrong CRC")]
    Torn,
    /// Written by a version that is not supported.
    #[error("pg_control has format {0}, not that of PostgreSQL 13 to 18")]
    UnknownVersion(u32),
    /// The CRC is right and the contents are impossible, or the file has another size.
    #[error("pg_control is damaged: {0}")]
    Damaged(&'static str),
    /// Valid, but of a build that drctl does not read.
    #[error("pg_control is of an unsupported build: {0}")]
    Unsupported(&'static str),
}

impl ControlError {
    /// Whether reading again may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Torn)
    }
}

impl From<ControlError> for Error {
    fn from(error: ControlError) -> Self {
        let transient = error.is_transient();
        match error {
            ControlError::Unsupported(_) | ControlError::UnknownVersion(_) => Self::refused(error.to_string()),
            ControlError::Torn | ControlError::Damaged(_) => Self::damaged(error.to_string()).transient(transient),
        }
    }
}

/// The life of a cluster, in the order of PostgreSQL's `DBState`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Initialised, never started.
    Startup,
    /// Shut down cleanly.
    ShutDown,
    /// A standby, shut down cleanly.
    ShutDownInRecovery,
    /// Being shut down.
    ShuttingDown,
    /// Replays after a crash.
    InCrashRecovery,
    /// Replays a backup or is a standby.
    InArchiveRecovery,
    /// Running (or crashed while it was).
    InProduction,
}

/// The parameters that a standby must not undercut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StandbyLimits {
    /// `max_connections`.
    pub max_connections: u32,
    /// `max_worker_processes`.
    pub max_worker_processes: u32,
    /// `max_wal_senders`.
    pub max_wal_senders: u32,
    /// `max_prepared_transactions`.
    pub max_prepared_transactions: u32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_transaction: u32,
}

/// The control file's fields that backup and restore need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// The cluster.
    pub system_id: SystemId,
    /// The format: 1300 for versions 13 to 16, 1700, 1800.
    pub control_version: u32,
    /// `catalog_version_no`, which names the major version exactly.
    pub catalog_version: u32,
    /// Where the cluster is in its life.
    pub state: State,
    /// When the file was last written.
    pub modified: DateTime<Utc>,
    /// The latest checkpoint record.
    pub checkpoint: Lsn,
    /// Where replay from that checkpoint begins.
    pub redo: Lsn,
    /// The timeline of that checkpoint.
    pub timeline: Timeline,
    /// When that checkpoint was taken.
    pub checkpoint_time: DateTime<Utc>,
    /// Replay must reach this before the cluster is consistent; zero unless in archive recovery.
    pub min_recovery_end: Lsn,
    /// The timeline of [`Self::min_recovery_end`], 0 if that is zero.
    pub min_recovery_timeline: Timeline,
    /// The redo position of the backup being recovered, zero once its end was reached.
    pub backup_start: Lsn,
    /// The end of a backup taken from a standby, zero once it was reached.
    pub backup_end: Lsn,
    /// Whether a backup-end record must be seen before the cluster may open.
    pub backup_end_required: bool,
    /// What a standby must not undercut.
    pub limits: StandbyLimits,
    /// Bytes per page.
    pub block_size: u32,
    /// Pages per file of a relation.
    pub relation_segment_pages: u32,
    /// Bytes per WAL segment.
    pub wal_segment_size: WalSegmentSize,
    /// 0 for none; pages carry checksums of this version.
    pub data_checksum_version: u32,
}

impl ControlFile {
    /// Reads the whole file.
    ///
    /// # Errors
    /// [`ControlError::Torn`] for any wrong bit under the CRC; the rest are wrong for good.
    pub fn parse(bytes: &[u8]) -> Result<Self, ControlError> {
        if bytes.len() != FILE_SIZE {
            return Err(ControlError::Damaged("its size is not 8192"));
        }
        let short = ControlError::Damaged("too short");
        let version = u32_at(bytes, 8).ok_or(short.clone())?;
        // The fields read here lie at the same offsets in all of these: 18 inserted one byte in front of the nonce,
        // and 17 filled a hole in the checkpoint.
        let crc_offset = match version {
            1300 | 1700 => 288,
            1800 => 292,
            other => return Err(ControlError::UnknownVersion(other)),
        };
        let (covered, rest) = bytes.split_at(crc_offset);
        if u32_at(rest, 0) != Some(crc32c::crc32c(covered)) {
            return Err(ControlError::Torn);
        }
        if rest.iter().skip(4).any(|byte| *byte != 0) {
            return Err(ControlError::Damaged("bytes behind its end"));
        }
        if u32_at(covered, 224) != Some(8192) {
            return Err(ControlError::Unsupported("WAL pages are not 8192 bytes"));
        }
        Self::fields(covered).ok_or(short)?
    }

    fn fields(bytes: &[u8]) -> Option<Result<Self, ControlError>> {
        let state = match u32_at(bytes, 16)? {
            0 => State::Startup,
            1 => State::ShutDown,
            2 => State::ShutDownInRecovery,
            3 => State::ShuttingDown,
            4 => State::InCrashRecovery,
            5 => State::InArchiveRecovery,
            6 => State::InProduction,
            _ => return Some(Err(ControlError::Damaged("unknown state"))),
        };
        let Ok(wal_segment_size) = WalSegmentSize::try_from(u64::from(u32_at(bytes, 228)?)) else {
            return Some(Err(ControlError::Damaged("impossible WAL segment size")));
        };
        let (Some(modified), Some(checkpoint_time)) = (time_at(bytes, 24), time_at(bytes, 104)) else {
            return Some(Err(ControlError::Damaged("impossible time")));
        };
        Some(Ok(Self {
            system_id: SystemId(u64_at(bytes, 0)?),
            control_version: u32_at(bytes, 8)?,
            catalog_version: u32_at(bytes, 12)?,
            state,
            modified,
            checkpoint: Lsn(u64_at(bytes, 32)?),
            redo: Lsn(u64_at(bytes, 40)?),
            timeline: Timeline(u32_at(bytes, 48)?),
            checkpoint_time,
            min_recovery_end: Lsn(u64_at(bytes, 136)?),
            min_recovery_timeline: Timeline(u32_at(bytes, 144)?),
            backup_start: Lsn(u64_at(bytes, 152)?),
            backup_end: Lsn(u64_at(bytes, 160)?),
            backup_end_required: *bytes.get(168)? != 0,
            limits: StandbyLimits {
                max_connections: u32_at(bytes, 180)?,
                max_worker_processes: u32_at(bytes, 184)?,
                max_wal_senders: u32_at(bytes, 188)?,
                max_prepared_transactions: u32_at(bytes, 192)?,
                max_locks_per_transaction: u32_at(bytes, 196)?,
            },
            block_size: u32_at(bytes, 216)?,
            relation_segment_pages: u32_at(bytes, 220)?,
            wal_segment_size,
            data_checksum_version: u32_at(bytes, 252)?,
        }))
    }
}

/// A `pg_time_t`: seconds since 1970.
fn time_at(bytes: &[u8], offset: usize) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp(i64_at(bytes, offset)?, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::testing::{Cluster, block_on, installed};

    /// The value behind a label of `pg_controldata`.
    fn value<'a>(text: &'a str, label: &str) -> &'a str {
        let line = text.lines().find_map(|line| line.strip_prefix(label)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {label:?} in {text}")).trim()
    }

    fn assert_like_controldata(control: &ControlFile, text: &str) {
        let limits = control.limits;
        let state = match control.state {
            State::Startup => "starting up",
            State::ShutDown => "shut down",
            State::ShutDownInRecovery => "shut down in recovery",
            State::ShuttingDown => "shutting down",
            State::InCrashRecovery => "in crash recovery",
            State::InArchiveRecovery => "in archive recovery",
            State::InProduction => "in production",
        };
        let time = |time: DateTime<Utc>| time.format("%a %b %e %H:%M:%S %Y").to_string();
        for (label, expected) in [
            ("pg_control version number", control.control_version.to_string()),
            ("Catalog version number", control.catalog_version.to_string()),
            ("Database system identifier", control.system_id.to_string()),
            ("Database cluster state", state.to_owned()),
            ("pg_control last modified", time(control.modified)),
            ("Latest checkpoint's TimeLineID", control.timeline.to_string()),
            ("Time of latest checkpoint", time(control.checkpoint_time)),
            ("Min recovery ending loc's timeline", control.min_recovery_timeline.to_string()),
            ("End-of-backup record required", if control.backup_end_required { "yes" } else { "no" }.to_owned()),
            ("max_connections setting", limits.max_connections.to_string()),
            ("max_worker_processes setting", limits.max_worker_processes.to_string()),
            ("max_wal_senders setting", limits.max_wal_senders.to_string()),
            ("max_prepared_xacts setting", limits.max_prepared_transactions.to_string()),
            ("max_locks_per_xact setting", limits.max_locks_per_transaction.to_string()),
            ("Database block size", control.block_size.to_string()),
            ("Blocks per segment of large relation", control.relation_segment_pages.to_string()),
            ("Bytes per WAL segment", control.wal_segment_size.bytes().to_string()),
            ("Data page checksum version", control.data_checksum_version.to_string()),
        ] {
            assert_eq!(value(text, label), expected, "{label}");
        }
        // Some versions print the lower half with leading zeros.
        for (label, expected) in [
            ("Latest checkpoint location", control.checkpoint),
            ("Latest checkpoint's REDO location", control.redo),
            ("Minimum recovery ending location", control.min_recovery_end),
            ("Backup start location", control.backup_start),
            ("Backup end location", control.backup_end),
        ] {
            assert_eq!(value(text, label).parse::<Lsn>().unwrap(), expected, "{label}");
        }
    }

    #[test]
    fn every_version_is_read_as_pg_controldata_reads_it() {
        block_on(async {
            for binaries in installed().await {
                let cluster = Cluster::create(&binaries, &["--data-checksums", "--wal-segsize=4"]).await;
                let data = cluster.data().display().to_string();
                let settings =
                    [("max_connections", "33"), ("max_prepared_transactions", "7"), ("max_wal_senders", "4")];
                for signal in [None, Some("standby.signal")] {
                    signal.map(|name| std::fs::File::create(cluster.data().join(name)).unwrap());
                    let instance = cluster.start(&settings).await;
                    let running = std::fs::read(cluster.data().join(PATH)).unwrap();
                    assert_like_controldata(
                        &ControlFile::parse(&running).unwrap(),
                        &cluster.run("pg_controldata", &[&data]).await,
                    );
                    cluster.stop(instance).await;
                    let stopped = std::fs::read(cluster.data().join(PATH)).unwrap();
                    assert_like_controldata(
                        &ControlFile::parse(&stopped).unwrap(),
                        &cluster.run("pg_controldata", &[&data]).await,
                    );
                    every_flipped_bit_is_an_error(stopped);
                }
            }
        });
    }

    fn every_flipped_bit_is_an_error(mut bytes: Vec<u8>) {
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(ControlFile::parse(&bytes).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        for length in [0, 8, 300, FILE_SIZE - 1] {
            assert!(ControlFile::parse(&bytes[..length]).is_err(), "{length} bytes");
        }
    }
}
