//! Every metric that drctl produces: the one list of names, types, labels and meanings. `docs/metrics.md`, the dashboards
//! and the alert rules are checked against it.

/// What a value means over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A state that may go either way.
    Gauge,
    /// Events of this process since its start; a restart is an ordinary counter reset.
    Counter,
    /// A distribution of durations.
    Histogram,
}

impl Shape {
    /// As Prometheus writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gauge => "gauge",
            Self::Counter => "counter",
            Self::Histogram => "histogram",
        }
    }
}

/// A declared metric with `N` labels.
#[derive(Debug, Clone, Copy)]
pub struct Metric<const N: usize> {
    /// What it says, whatever the number of its labels.
    pub declared: Declared,
}

/// What is declared of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Declared {
    /// Its name, with its unit.
    pub name: &'static str,
    /// Its type.
    pub shape: Shape,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it means.
    pub help: &'static str,
    /// When there is no series; what is unknown is absent, and never 0.
    pub absent: &'static str,
}

macro_rules! table {
    ($($id:ident = $shape:ident $name:literal [$($label:literal),*] $help:literal, absent $absent:literal;)*) => {
        $(
            #[doc = $help]
            pub const $id: Metric<{ <[&str]>::len(&[$($label),*]) }> = Metric {
                declared: Declared {
                    name: $name,
                    shape: Shape::$shape,
                    labels: &[$($label),*],
                    help: $help,
                    absent: $absent,
                },
            };
        )*

        /// The whole list, in the order of `docs/metrics.md`.
        pub const ALL: &[Declared] = &[$($id.declared),*];
    };
}

table! {
    BACKUP_LAST_SUCCESS = Gauge "drctl_backup_last_success_timestamp_seconds" ["target", "kind", "region"]
        "When the newest backup that is complete in the region was finished",
        absent "the region holds no complete backup of that kind, or does not answer";
    BACKUP_LAST_ATTEMPT = Gauge "drctl_backup_last_attempt_timestamp_seconds" ["target"]
        "When a backup was begun last, by schedule or to its end, whatever became of it",
        absent "none was ever begun";
    BACKUP_LAST_DURATION = Gauge "drctl_backup_last_duration_seconds" ["target", "kind"]
        "How long the newest backup took, from start to COMMIT",
        absent "there is no backup of that kind";
    BACKUP_DURATION = Histogram "drctl_backup_duration_seconds" ["target", "kind"]
        "How long the backups took that this process completed, from start to COMMIT",
        absent "this process completed no backup of that kind";
    BACKUP_LAST_SIZE = Gauge "drctl_backup_last_size_bytes" ["target", "kind", "stage"]
        "Size of the newest backup: stage=\"source\" is what a restore writes, stage=\"stored\" what it added to each region",
        absent "there is no backup of that kind";
    BACKUP_RUNS = Counter "drctl_backup_runs_total" ["target", "outcome"]
        "Slots of backup schedules that ended, by outcome; it counts since the start of this process",
        absent "no backup of that target is scheduled, or this is no daemon";
    BACKUP_IN_PROGRESS = Gauge "drctl_backup_in_progress" ["target"]
        "1 while this daemon runs a backup of the target",
        absent "no backup of that target is scheduled, or this is no daemon";
    BACKUPS = Gauge "drctl_backups" ["target", "kind", "region", "state"]
        "Backups in the region by state: complete, debt, damaged, unreachable",
        absent "there is no backup of that kind in any region";
    BACKUPS_UNPROVEN = Gauge "drctl_backups_unproven_expiring" ["target"]
        "Backups that retention lets go although no drill ever proved them",
        absent "the target has no retention";
    RECOVERY_WINDOW_START = Gauge "drctl_recovery_window_start_timestamp_seconds" ["target", "region"]
        "The oldest point in time to which the region alone can restore",
        absent "the region alone restores nothing";
    RECOVERABLE_POINT = Gauge "drctl_recoverable_point_timestamp_seconds" ["target", "region"]
        "The newest point in time to which the region alone can restore",
        absent "the region alone restores nothing";
    RPO_TARGET = Gauge "drctl_rpo_target_seconds" ["target"]
        "Recovery point objective of the configuration",
        absent "none is configured";
    RPO_EXPOSURE = Gauge "drctl_rpo_exposure_seconds" ["target", "region"]
        "For how long the oldest commit that is not durable in the region has been waiting: what would be lost now. 0 when all is durable. Of a target without WAL: the age of its newest recovery point there",
        absent "it is unknown: no WAL receiver answers on this host, it has not seen the server lately, or the region lags behind it; of a target without WAL: the region restores nothing";
    RPO_ACHIEVED = Gauge "drctl_rpo_achieved_seconds" ["target", "region"]
        "Recovery point measured by the newest drill from the region that measured one",
        absent "no drill measured one";
    RTO_TARGET = Gauge "drctl_rto_target_seconds" ["target", "path"]
        "Recovery time objective of the configuration: path=\"restore\" or path=\"failover\"",
        absent "none is configured";
    RTO_ACHIEVED = Gauge "drctl_rto_achieved_seconds" ["target", "path", "region"]
        "Technical recovery time measured by the newest drill from the region that measured one, without detecting and deciding",
        absent "no drill measured one";
    RECOVERY_PHASE = Gauge "drctl_recovery_phase_duration_seconds" ["target", "region", "phase"]
        "A phase of that recovery time",
        absent "no drill measured one";
    WAL_STREAM_UP = Gauge "drctl_wal_stream_up" ["target"]
        "1 while WAL flows from the server into the regions, 0 while the receiver waits for either",
        absent "no WAL receiver of the target answers on this host";
    WAL_UNSHIPPED = Gauge "drctl_wal_unshipped_bytes" ["target", "region"]
        "WAL that the running stream has received and that the region does not hold",
        absent "no WAL receiver of the target answers on this host";
    WAL_SHIPPED = Counter "drctl_wal_shipped_bytes_total" ["target"]
        "WAL that became durable at the write quorum since this process looks",
        absent "no WAL receiver of the target answered since, or this is no daemon";
    WAL_SHIP_FAILURES = Counter "drctl_wal_ship_failures_total" ["target", "region"]
        "Objects of the running WAL stream that the region did not take in time, since this process looks",
        absent "no WAL receiver of the target answered since, or this is no daemon";
    WAL_OBJECTS_MISSING = Gauge "drctl_wal_objects_missing" ["target", "region"]
        "Objects of the running WAL stream that the region does not hold",
        absent "no WAL receiver of the target answers on this host";
    SLOT_RETAINED = Gauge "drctl_slot_retained_bytes" ["target"]
        "WAL that the server keeps for our replication slot",
        absent "no WAL receiver of the target answers on this host, the server does not answer it, or there is no slot";
    SLOT_ROOM = Gauge "drctl_slot_room_bytes" ["target"]
        "How much more WAL the slot may keep before the server gives it up (max_slot_wal_keep_size) or its disk is full, whichever comes first",
        absent "no limit is known: none is set, the server is on another host, and wal_disk_bytes is not configured";
    SLOT_GIVEN_UP = Gauge "drctl_slot_given_up" ["target"]
        "1 while our replication slot is dropped because it filled the server's disk, until regions take WAL again",
        absent "no WAL receiver of the target answers on this host";
    STANDBY_UP = Gauge "drctl_standby_up" ["target"]
        "1 while the standby that drctl keeps on this host replays stored WAL, 0 while it does not: nobody feeds it, its server is down, or something stored is in doubt",
        absent "this host keeps no standby of the target";
    STANDBY_LAG = Gauge "drctl_standby_lag_seconds" ["target"]
        "How long the oldest stored WAL that the standby has not replayed has been stored",
        absent "this host keeps no standby of the target, or nobody feeds it";
    STANDBY_LAG_BYTES = Gauge "drctl_standby_lag_bytes" ["target"]
        "Stored WAL that the standby has not replayed",
        absent "this host keeps no standby of the target, or nobody feeds it";
    WAL_GAPS = Gauge "drctl_wal_gaps" ["target"]
        "Gaps that nothing filled (recorded, or because frames are in no region any more), and WAL stored in two versions, behind which no backup was begun yet: what came after cannot be restored until one is",
        absent "the target has no WAL in any region, or none could be read";
    WAL_CONFLICTS = Gauge "drctl_wal_conflicts" ["target"]
        "Timelines that servers which were promoted independently both chose, and behind which no backup was begun yet: a restore must be told which one counts",
        absent "the target has no WAL in any region";
    VERIFY_LAST_SUCCESS = Gauge "drctl_verify_last_success_timestamp_seconds" ["target", "region", "level"]
        "When the level was last proven in the region: L0 to L2 by a scheduled verify, L4 and above by a drill, which proves the levels below it too",
        absent "it was never proven";
    VERIFY_LAST_RUN = Gauge "drctl_verify_last_run_timestamp_seconds" ["target", "region", "outcome"]
        "When the newest drill from the region with that outcome was over: pass, fail, inconclusive",
        absent "no drill ended so";
    VERIFY_RUNS = Counter "drctl_verify_runs_total" ["target", "region", "outcome"]
        "Drills that ended, by outcome; it counts since the start of this process",
        absent "this process ran no drill of the target";
    VERIFY_CHECK_PASSED = Gauge "drctl_verify_check_passed" ["target", "region", "check"]
        "1 if the check passed in the newest drill from the region, 0 if not",
        absent "no drill from the region got as far as the check";
    NEGATIVE_CONTROL = Gauge "drctl_verify_negative_control_timestamp_seconds" ["target"]
        "When a deliberately wrong expectation was last caught: a drill passes only then",
        absent "no drill ever passed";
    SCHEDULE_NEXT_RUN = Gauge "drctl_schedule_next_run_timestamp_seconds" ["schedule", "target", "kind"]
        "The next slot",
        absent "there is none, or this is no daemon";
    SCHEDULE_LAST_RUN = Gauge "drctl_schedule_last_run_timestamp_seconds" ["schedule", "target", "kind"]
        "When the newest slot ended, whatever its outcome",
        absent "no slot ended yet";
    SCHEDULE_LAST_SUCCESS = Gauge "drctl_schedule_last_success_timestamp_seconds" ["schedule", "target", "kind"]
        "When the newest slot ended that did what the schedule is for",
        absent "none of the newest twenty slots did";
    SCHEDULE_INTERVAL = Gauge "drctl_schedule_expected_interval_seconds" ["schedule", "target", "kind"]
        "The longest time between two of the next slots",
        absent "it has no slots";
    SCHEDULE_MAX_AGE = Gauge "drctl_schedule_max_age_seconds" ["schedule", "target", "kind"]
        "How old the newest success may become, as the schedule says",
        absent "it does not say";
    SCHEDULE_PAUSED = Gauge "drctl_schedule_paused" ["schedule", "target", "kind"]
        "1 while the schedule is paused",
        absent "this is no daemon";
    SCHEDULE_RUNNING = Gauge "drctl_schedule_running" ["schedule", "target", "kind"]
        "1 while a slot runs or is between two attempts",
        absent "this is no daemon";
    SCHEDULE_RUNS = Counter "drctl_schedule_runs_total" ["schedule", "target", "kind", "outcome"]
        "Slots that ended, by outcome; it counts since the start of this process",
        absent "this is no daemon";
    REGION_UP = Gauge "drctl_region_up" ["region"]
        "1 if the region answered when it was asked last, 0 if not",
        absent "it was not asked yet";
    REGION_STORED = Gauge "drctl_region_stored_bytes" ["region"]
        "Bytes of all objects in the region",
        absent "the region was not listed yet";
    REGION_COPIES_MISSING = Gauge "drctl_region_copies_missing" ["target", "region"]
        "Objects of backups that the region lacks or holds damaged; repair brings them",
        absent "the region does not answer";
    REGION_REQUEST_DURATION = Histogram "drctl_region_request_duration_seconds" ["region", "op"]
        "How long requests of this process took, each attempt by itself, failed ones too",
        absent "no such request was made";
    REGION_REQUEST_FAILURES = Counter "drctl_region_request_failures_total" ["region", "op"]
        "Requests of this process that found no answer, or a refusal",
        absent "no such request was made";
    KMS_WRAP_SUCCESS = Gauge "drctl_kms_wrap_success" ["key", "region"]
        "1 if the key holder wrapped a keyset when this process asked it last, 0 if not",
        absent "this process did not ask it";
    KMS_UNWRAP_SUCCESS = Gauge "drctl_kms_unwrap_success" ["key"]
        "1 if the key opened a keyset when this process asked it last, 0 if not",
        absent "this process did not ask it";
    RELOAD_SUCCESSFUL = Gauge "drctl_config_last_reload_successful" []
        "1 if the schedules that were read last are in use, 0 if they were wrong and the older ones stay",
        absent "this is no daemon";
    RELOAD_TIME = Gauge "drctl_config_last_reload_success_timestamp_seconds" []
        "When schedules that are in use were read",
        absent "this is no daemon";
    SNAPSHOT_TIME = Gauge "drctl_snapshot_timestamp_seconds" []
        "When the figures that come from the regions were read last; they are served until a newer reading is complete",
        absent "no reading is complete yet";
    SNAPSHOT_DURATION = Gauge "drctl_snapshot_duration_seconds" []
        "How long that reading took",
        absent "no reading is complete yet";
    LOOP_TURNED = Gauge "drctl_daemon_loop_timestamp_seconds" []
        "When the daemon's loop turned last",
        absent "this is no daemon";
    BUILD_INFO = Gauge "drctl_build_info" ["version"]
        "Always 1",
        absent "never";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_follow_the_conventions_of_prometheus() {
        let mut names = BTreeSet::new();
        for Declared { name, shape, labels, help, absent } in ALL {
            assert!(names.insert(*name), "{name} twice");
            assert!(name.starts_with("drctl_") && !help.is_empty() && !absent.is_empty(), "{name}");
            assert_eq!(name.ends_with("_total"), *shape == Shape::Counter, "{name}");
            assert!(!name.contains("timestamp") || name.ends_with("_timestamp_seconds"), "{name}");
            assert!(labels.iter().all(|label| !["repo", "host", "backup", "le"].contains(label)), "{name}");
        }
    }
}
