//! What the facts about a server mean for backups of it; pure.

use chrono::TimeDelta;

use super::facts::Facts;
use super::finding::{Findings, size};
use super::regions::SKEW_WARN;
use crate::jobs::context::OnPressure;
use crate::source::postgres::Method;

/// What the configuration and this machine add to the server's facts.
#[derive(Debug, Clone)]
pub(super) struct Setup<'a> {
    pub(super) method: Method,
    pub(super) slot: &'a str,
    /// Our receiver's name in synchronous_standby_names.
    pub(super) receiver: &'a str,
    /// Whether commits are meant to wait for the regions.
    pub(super) sync: bool,
    pub(super) on_pressure: Option<OnPressure>,
    /// Free bytes beside pg_wal, if it is on this machine.
    pub(super) free_bytes: Option<u64>,
    /// The space for WAL, as configured.
    pub(super) wal_disk_bytes: Option<u64>,
}

impl Setup<'_> {
    /// The most that WAL may grow to, as far as anybody knows.
    fn room(&self, facts: &Facts) -> Option<u64> {
        let measured = self.free_bytes.map(|free| free.saturating_add(facts.wal_bytes.unwrap_or(0)));
        measured.or(self.wal_disk_bytes)
    }
}

pub(super) fn judge(findings: &mut Findings, facts: &Facts, setup: &Setup<'_>) {
    build(findings, facts);
    clock(findings, facts);
    if facts.in_recovery {
        findings.fail("the server is a standby", "name its primary in conninfo, or set target_session_attrs=primary");
        return;
    }
    wal_settings(findings, facts);
    headroom(findings, facts);
    grants(findings, facts, setup);
    slot(findings, facts, setup);
    pressure(findings, facts, setup);
    synchronous(findings, facts, setup);
    archiving(findings, facts);
}

fn build(findings: &mut Findings, facts: &Facts) {
    match facts.major() {
        major @ 13..=18 => findings.ok(format!("PostgreSQL {major}")),
        major => findings.fail(format!("PostgreSQL {major} is not supported"), "13 to 18 are"),
    }
    match (facts.setting("block_size"), facts.setting("wal_block_size")) {
        ("8192", "8192") => findings.ok("pages of 8192 bytes"),
        (data, wal) => findings.fail(
            format!("the server has pages of {data} and WAL pages of {wal} bytes, not 8192"),
            "this build cannot be backed up by page",
        ),
    }
}

/// Commits carry the server's time: what is asked for by time, and how old a recovery point is, depends on it.
fn clock(findings: &mut Findings, facts: &Facts) {
    let Some(ahead) = facts.clock_ahead else { return };
    if ahead.abs() <= SKEW_WARN {
        findings.ok("the server's clock agrees with ours");
        return;
    }
    let direction = if ahead < TimeDelta::zero() { "behind" } else { "ahead of" };
    let what = format!("the server's clock is {} s {direction} ours", ahead.abs().num_seconds());
    findings.warn(what, "run chrony or ntpd on both sides; --to-time goes by the server's clock");
}

fn wal_settings(findings: &mut Findings, facts: &Facts) {
    match facts.setting("wal_level") {
        "minimal" => findings.fail(
            "wal_level is minimal: WAL does not hold what a restore needs",
            "ALTER SYSTEM SET wal_level = 'replica';   then restart the server",
        ),
        level => findings.ok(format!("wal_level is {level}")),
    }
    match facts.setting("full_page_writes") {
        "off" => findings.fail(
            "full_page_writes is off: a page torn while it was copied could not be repaired by WAL",
            "ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf();",
        ),
        _ => findings.ok("full_page_writes is on"),
    }
    if facts.setting("fsync") == "off" {
        let fix = "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf();";
        findings.warn(
            "fsync is off: a crash of the server's machine damages the cluster, and backups copy the damage",
            fix,
        );
    }
    match facts.setting("data_checksums") {
        "off" => findings.warn(
            "page checksums are off: damage on the server's disk is copied into backups unseen",
            "pg_checksums --enable -D DATA_DIRECTORY   while the server is stopped",
        ),
        _ => findings.ok("page checksums are on"),
    }
}

fn headroom(findings: &mut Findings, facts: &Facts) {
    let active = facts.slot.as_ref().is_some_and(|slot| slot.active);
    // The receiver, and a backup that streams or brings a receiver of its own.
    let senders = if active { 1 } else { 2 };
    let slots = if facts.slot.is_some() { 1 } else { 2 };
    for (name, used, needed) in
        [("max_wal_senders", facts.walsenders, senders), ("max_replication_slots", facts.slots, slots)]
    {
        let limit = facts.number(name).and_then(|limit| u64::try_from(limit).ok()).unwrap_or(0);
        let free = limit.saturating_sub(used);
        let wanted = used + needed;
        let fix = format!("ALTER SYSTEM SET {name} = {};   then restart the server", wanted.max(10));
        match free {
            0 => findings.fail(format!("{name} is {limit}, and {used} are in use: none is left for us"), fix),
            free if free < needed => {
                findings.warn(format!("{name} is {limit}, and {used} are in use: we may need {needed} more"), fix);
            }
            _ => findings.ok(format!("{name} is {limit}, {used} in use")),
        }
    }
}

fn grants(findings: &mut Findings, facts: &Facts, setup: &Setup<'_>) {
    let role = &facts.role;
    let name = &role.quoted;
    if role.superuser {
        findings.warn(
            format!("drctl logs in as superuser {name}: it never needs that"),
            "CREATE ROLE drctl LOGIN REPLICATION; GRANT pg_monitor TO drctl;   then drctl check names the rest",
        );
        return;
    }
    if !role.replication {
        findings.fail(format!("role {name} may not stream WAL"), format!("ALTER ROLE {name} REPLICATION;"));
    }
    if !role.reads_settings || !role.monitor {
        let what = format!("role {name} may not see all settings and the size of pg_wal");
        findings.fail(what, format!("GRANT pg_monitor TO {name};"));
    }
    if setup.method != Method::Stream {
        for function in &facts.forbidden {
            let what = format!("role {name} may not call {function}");
            let fix = format!("GRANT EXECUTE ON FUNCTION {function} TO {name};   (in the database of conninfo)");
            // `auto` may still take the other way.
            if setup.method == Method::Local { findings.fail(what, fix) } else { findings.warn(what, fix) }
        }
    }
    if role.replication && role.monitor && facts.forbidden.is_empty() {
        findings.ok(format!("role {name} has every right that it needs"));
    }
}

fn slot(findings: &mut Findings, facts: &Facts, setup: &Setup<'_>) {
    let name = setup.slot;
    let Some(slot) = &facts.slot else {
        findings.ok(format!("slot {name} does not exist yet: the WAL receiver makes it"));
        return;
    };
    let drop = format!("SELECT pg_drop_replication_slot('{name}');   then take a new backup: the WAL between is gone");
    if !slot.physical {
        let fix = "name another slot in the target's configuration: slot = \"…\"";
        findings.fail(format!("slot {name} is a logical one and belongs to somebody else"), fix);
        return;
    }
    let retained = slot.retained_bytes.map(|bytes| format!(", holds {} of WAL", size(bytes))).unwrap_or_default();
    match slot.wal_status.as_deref() {
        Some("lost") => {
            findings.fail(format!("slot {name} is lost: the server removed WAL that we had not read"), drop)
        }
        Some("unreserved") => {
            let fix =
                format!("start drctl wal stream now: the server will remove the WAL of {name} at its next checkpoint");
            findings.fail(format!("slot {name} is about to be lost{retained}"), fix);
        }
        _ if slot.active => findings.ok(format!("slot {name} is in use{retained}")),
        _ => findings.warn(
            format!("slot {name} exists and nobody reads from it{retained}"),
            "drctl wal stream TARGET   or, if it is not wanted any more, drop it: it fills pg_wal",
        ),
    }
}

/// A slot without a guard fills production's disk.
fn pressure(findings: &mut Findings, facts: &Facts, setup: &Setup<'_>) {
    let room = setup.room(facts);
    let limit = facts.number("max_slot_wal_keep_size").unwrap_or(-1);
    let shown = match (setup.free_bytes, room) {
        (Some(free), _) => format!("{} free", size(free)),
        (None, Some(room)) => format!("{} in all", size(room)),
        (None, None) => "of unknown size".to_owned(),
    };
    if limit < 0 {
        match setup.on_pressure {
            Some(policy) => findings.ok(format!("on_pressure is {}", policy.as_str())),
            None => findings.fail(
                format!("max_slot_wal_keep_size is -1 and no on_pressure is set: our slot can fill pg_wal ({shown})"),
                format!(
                    "ALTER SYSTEM SET max_slot_wal_keep_size = '{}GB'; SELECT pg_reload_conf();   or  on_pressure = \"drop-slot\"",
                    suggested_gigabytes(room)
                ),
            ),
        }
    } else {
        let bytes = limit.unsigned_abs().saturating_mul(1 << 20);
        match room {
            Some(room) if bytes > room => findings.warn(
                format!("max_slot_wal_keep_size allows {}, more than pg_wal has room for ({shown})", size(bytes)),
                format!(
                    "ALTER SYSTEM SET max_slot_wal_keep_size = '{}GB'; SELECT pg_reload_conf();",
                    suggested_gigabytes(Some(room))
                ),
            ),
            _ => findings.ok(format!("max_slot_wal_keep_size guards pg_wal at {}", size(bytes))),
        }
    }
    match room {
        Some(_) => findings.ok(format!("room for WAL: {shown}")),
        None if setup.on_pressure == Some(OnPressure::DropSlot) => findings.fail(
            "the room for WAL on the server is unknown: on_pressure = \"drop-slot\" can never act",
            "wal_disk_bytes = \"…\" in the target's configuration",
        ),
        None => findings.warn(
            "the room for WAL on the server is unknown: nobody can warn before it is full",
            "wal_disk_bytes = \"…\" in the target's configuration",
        ),
    }
}

/// Two thirds of the room; where it is unknown, enough for an outage of a day at 1 MB/s.
fn suggested_gigabytes(room: Option<u64>) -> u64 {
    room.map_or(64, |room| (room / 3 * 2) >> 30).max(1)
}

fn synchronous(findings: &mut Findings, facts: &Facts, setup: &Setup<'_>) {
    let names = facts.setting("synchronous_standby_names");
    if !names_us(names, setup.receiver) {
        if setup.sync {
            let what = format!(
                "sync = true, and synchronous_standby_names = '{names}' does not count our receiver: no commit waits"
            );
            let fix = format!("ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 (\"{}\")';", setup.receiver);
            findings.fail(what, fix);
        }
        return;
    }
    if facts.setting("synchronous_commit") == "remote_apply" || facts.remote_apply_elsewhere {
        let what = format!(
            "synchronous_standby_names = '{names}' counts our receiver, and commits with remote_apply would wait for ever: it stores WAL and applies none"
        );
        findings.fail(
            what,
            "ALTER SYSTEM SET synchronous_commit = 'on';   or take our receiver off synchronous_standby_names",
        );
    } else {
        findings.ok(format!(
            "synchronous_standby_names = '{names}' counts our receiver: commits wait for the write quorum"
        ));
    }
}

/// `FIRST 2 (a, "b c")`, `ANY 1 (*)`, `a, b`.
fn names_us(setting: &str, receiver: &str) -> bool {
    let is_us = |name: &str| name == "*" || name.eq_ignore_ascii_case(receiver);
    setting.split('"').enumerate().any(|(number, part)| match number % 2 {
        0 => part.split(|c: char| c.is_whitespace() || ",()".contains(c)).any(is_us),
        // Between quotes.
        _ => is_us(part),
    })
}

fn archiving(findings: &mut Findings, facts: &Facts) {
    let command = ["archive_command", "archive_library"]
        .into_iter()
        .find(|name| !matches!(facts.setting(name), "" | "(disabled)"));
    findings.ok(match (facts.setting("archive_mode"), command) {
        ("off" | "", _) => "archive_mode is off: the slot alone carries WAL to us".to_owned(),
        (mode, Some(name)) => format!("archive_mode is {mode}, and {name} is set: another party archives as well"),
        (mode, None) => format!("archive_mode is {mode} without a command: WAL stays on the server until there is one"),
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::check::facts::{Role, Slot};
    use crate::jobs::check::finding::Level;

    fn healthy() -> Facts {
        let settings = [
            ("server_version_num", "150008"),
            ("block_size", "8192"),
            ("wal_block_size", "8192"),
            ("wal_level", "replica"),
            ("max_wal_senders", "10"),
            ("max_replication_slots", "10"),
            ("full_page_writes", "on"),
            ("fsync", "on"),
            ("data_checksums", "on"),
            ("max_slot_wal_keep_size", "20480"),
            ("archive_mode", "off"),
        ];
        Facts {
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            role: Role {
                quoted: "drctl".into(),
                superuser: false,
                replication: true,
                monitor: true,
                reads_settings: true,
            },
            slot: Some(Slot {
                physical: true,
                active: true,
                wal_status: Some("reserved".into()),
                retained_bytes: Some(1),
            }),
            wal_bytes: Some(1 << 30),
            ..Facts::default()
        }
    }

    fn setup() -> Setup<'static> {
        Setup {
            method: Method::Local,
            slot: "drctl_ledger",
            receiver: "drctl wal ledger",
            sync: false,
            on_pressure: None,
            free_bytes: Some(41_000_000_000),
            wal_disk_bytes: None,
        }
    }

    fn worst(facts: &Facts, setup: &Setup<'_>) -> Vec<(Level, String, String)> {
        let mut findings = Findings::about("postgres", "ledger");
        judge(&mut findings, facts, setup);
        let bad = findings.into_list().into_iter().filter(|finding| finding.level > Level::Ok);
        bad.map(|finding| (finding.level, finding.what, finding.fix.unwrap())).collect()
    }

    #[track_caller]
    fn only(facts: &Facts, setup: &Setup<'_>, level: Level, what: &str, fix: &str) {
        let found = worst(facts, setup);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].0 == level && found[0].1.contains(what) && found[0].2.contains(fix), "{found:#?}");
    }

    fn with(name: &str, value: &str) -> Facts {
        let mut facts = healthy();
        facts.settings.insert(name.to_owned(), value.to_owned());
        facts
    }

    #[test]
    fn a_healthy_server_has_nothing_to_fix() {
        assert_eq!(worst(&healthy(), &setup()), []);
    }

    #[test]
    fn each_wrong_setting_is_told_with_its_fix() {
        for (name, value, level, fix) in [
            ("server_version_num", "120011", Level::Fail, "13 to 18"),
            ("block_size", "32768", Level::Fail, "page"),
            ("wal_level", "minimal", Level::Fail, "wal_level = 'replica'"),
            ("full_page_writes", "off", Level::Fail, "full_page_writes = on"),
            ("fsync", "off", Level::Warn, "fsync = on"),
            ("data_checksums", "off", Level::Warn, "pg_checksums --enable"),
            ("max_wal_senders", "0", Level::Fail, "max_wal_senders = 10"),
        ] {
            only(&with(name, value), &setup(), level, "", fix);
        }
    }

    #[test]
    fn a_server_that_lets_no_commit_wait_is_not_synchronous() {
        let sync = Setup { sync: true, ..setup() };
        let fix = "FIRST 1 (\"drctl wal ledger\")";
        only(&with("synchronous_standby_names", "other"), &sync, Level::Fail, "no commit waits", fix);
        assert_eq!(worst(&with("synchronous_standby_names", "\"drctl wal ledger\""), &sync), []);
    }

    #[test]
    fn a_slot_without_a_guard_fails_until_somebody_decides() {
        let unguarded = with("max_slot_wal_keep_size", "-1");
        let what = "our slot can fill pg_wal (41.0 GB free)";
        only(&unguarded, &setup(), Level::Fail, what, "max_slot_wal_keep_size = '26GB'");
        only(&unguarded, &setup(), Level::Fail, what, "on_pressure = \"drop-slot\"");
        assert_eq!(worst(&unguarded, &Setup { on_pressure: Some(OnPressure::Keep), ..setup() }), []);
        let unknown = Setup { free_bytes: None, ..setup() };
        only(&healthy(), &unknown, Level::Warn, "unknown", "wal_disk_bytes");
        let blind = Setup { on_pressure: Some(OnPressure::DropSlot), ..unknown.clone() };
        only(&healthy(), &blind, Level::Fail, "can never act", "wal_disk_bytes");
        assert_eq!(worst(&healthy(), &Setup { wal_disk_bytes: Some(1 << 40), ..unknown }), []);
        let small = Setup { free_bytes: Some(5_000_000_000), ..setup() };
        only(&healthy(), &small, Level::Warn, "more than pg_wal has room for", "'3GB'");
    }

    #[test]
    fn missing_rights_are_told_as_sql() {
        let mut facts = healthy();
        facts.role = Role { quoted: "\"Dr\"".into(), ..Role::default() };
        facts.forbidden = vec!["pg_catalog.pg_backup_start(text,boolean)".into()];
        let fixes: Vec<_> = worst(&facts, &setup()).into_iter().map(|found| found.2).collect();
        assert_eq!(fixes[..2], ["ALTER ROLE \"Dr\" REPLICATION;", "GRANT pg_monitor TO \"Dr\";"]);
        assert!(fixes[2].starts_with("GRANT EXECUTE ON FUNCTION pg_catalog.pg_backup_start(text,boolean) TO \"Dr\";"));
        let stream = worst(&facts, &Setup { method: Method::Stream, ..setup() });
        assert_eq!(stream.len(), 2, "{stream:#?}");
    }

    #[test]
    fn a_lost_or_foreign_or_idle_slot_is_told() {
        let slot = |change: fn(&mut Slot)| {
            let mut facts = healthy();
            facts.slot.iter_mut().for_each(change);
            facts
        };
        only(
            &slot(|slot| slot.wal_status = Some("lost".into())),
            &setup(),
            Level::Fail,
            "is lost",
            "pg_drop_replication_slot",
        );
        only(&slot(|slot| slot.physical = false), &setup(), Level::Fail, "logical", "slot =");
        only(&slot(|slot| slot.active = false), &setup(), Level::Warn, "nobody reads", "wal stream");
        assert_eq!(worst(&Facts { slot: None, ..healthy() }, &setup()), []);
    }

    #[test]
    fn a_clock_that_is_off_is_told_with_its_direction() {
        let off = |seconds| Facts { clock_ahead: Some(TimeDelta::seconds(seconds)), ..healthy() };
        assert_eq!(worst(&off(2), &setup()), []);
        only(&off(86_400), &setup(), Level::Warn, "86400 s ahead of ours", "chrony");
        only(&off(-90), &setup(), Level::Warn, "90 s behind ours", "--to-time");
    }

    #[test]
    fn remote_apply_that_waits_for_us_fails() {
        for names in ["*", "ANY 1 (a, *)", "FIRST 1 (b, \"DRCTL wal ledger\")", "\"drctl wal ledger\""] {
            let mut facts = with("synchronous_standby_names", names);
            assert_eq!(worst(&facts, &setup()), [], "{names}");
            facts.settings.insert("synchronous_commit".into(), "remote_apply".into());
            only(&facts, &setup(), Level::Fail, "wait for ever", "synchronous_commit");
        }
        let mut facts = with("synchronous_standby_names", "ANY 1 (drctl, wal, ledger, \"drctl wal orders\")");
        facts.remote_apply_elsewhere = true;
        assert_eq!(worst(&facts, &setup()), []);
    }
}
