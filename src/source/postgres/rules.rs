//! Which names of a data directory belong in a backup, and what they are; pure, by path relative to the data directory.
//!
//! The rules are those of PostgreSQL's own base backup, plus the files that it copies although they are wrong in a
//! restored cluster: signal files, the server's log, core dumps.

use std::collections::HashSet;

use crate::pg::wal::Locator;

/// What a backup does with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Copy it.
    Take,
    /// A directory that must exist but whose contents are left.
    TakeEmpty,
    /// As if it were not there.
    Leave,
}

/// A fork of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fork {
    /// The rows or index entries.
    Main,
    /// `_fsm`.
    FreeSpace,
    /// `_vm`. Clearing its bits changes the page without its LSN: it is compared whole, always.
    Visibility,
    /// `_init`: the empty relation that replaces an unlogged one after a crash.
    Init,
}

/// One file of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relation {
    /// The number in the file name, PostgreSQL's relfilenode.
    pub node: u32,
    /// Which fork.
    pub fork: Fork,
    /// Which 1 GiB part.
    pub segment: u32,
}

/// `pg_default` and `pg_global`, whose files are in `base` and `global`.
const DEFAULT_TABLESPACE: u32 = 1663;
const GLOBAL_TABLESPACE: u32 = 1664;

/// Pages in one segment file of a relation; servers built otherwise are refused.
pub const SEGMENT_PAGES: u32 = 131_072;

impl Relation {
    /// The block number of the file's first page, which enters the checksum of every page. `None` beyond what
    /// PostgreSQL can address.
    pub fn first_block(self) -> Option<u32> {
        self.segment.checked_mul(SEGMENT_PAGES)
    }
}

/// Directories that every backup keeps, empty: their contents are process state or belong to other stores.
const EMPTIED: [&str; 9] = [
    "log",
    "pg_dynshmem",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_wal",
];

/// The two directories inside `pg_wal` that PostgreSQL's own backups carry; the second since 17.
pub const WAL_DIRECTORIES: [&str; 2] = ["pg_wal/archive_status", "pg_wal/summaries"];

/// Names left out at any depth, as PostgreSQL does.
const LEFT: [&str; 7] = [
    "backup_label",
    "backup_manifest",
    "current_logfiles.tmp",
    "postgresql.auto.conf.tmp",
    "postmaster.opts",
    "postmaster.pid",
    "tablespace_map",
];

/// Names left out of the top directory beyond PostgreSQL's list. The signal files would put the restored server into the
/// wrong kind of recovery; `lost+found` belongs to the file system.
const LEFT_ON_TOP: [&str; 7] = [
    "backup_label.old",
    "core",
    "current_logfiles",
    "lost+found",
    "recovery.signal",
    "standby.signal",
    "tablespace_map.old",
];

/// Decides about a path, whatever it is on disk. Unlogged relations need their directory: see [`UnloggedFilter`].
pub fn verdict(path: &str) -> Verdict {
    if WAL_DIRECTORIES.contains(&path) || EMPTIED.contains(&path) {
        return Verdict::TakeEmpty;
    }
    let (top, below) = path.split_once('/').map_or((path, false), |(top, _)| (top, true));
    let in_emptied = below && EMPTIED.contains(&top);
    let on_top = LEFT_ON_TOP.contains(&top) || is_core(top);
    // A path below something left out is left out as well.
    let anywhere = path
        .split('/')
        .any(|name| LEFT.contains(&name) || name.starts_with("pgsql_tmp") || name.starts_with("pg_internal.init"));
    let temporary = relation_directory_and_name(path).is_some_and(|(_, name)| is_temporary(name));
    if in_emptied || on_top || anywhere || temporary { Verdict::Leave } else { Verdict::Take }
}

/// `core.1234`, as the kernel names dumps with core_uses_pid.
fn is_core(name: &str) -> bool {
    name.strip_prefix("core.").is_some_and(is_digits)
}

/// What a file is, if it is part of a relation: every page of it may carry a checksum.
pub fn relation(path: &str) -> Option<Relation> {
    relation_directory_and_name(path).and_then(|(_, name)| parse_relation(name))
}

/// The relation that a file is a part of, if it is its main fork, and the number of the file's first page: what WAL calls
/// it.
pub fn main_fork(path: &str) -> Option<(Locator, u32)> {
    let (directory, name) = relation_directory_and_name(path)?;
    let relation = parse_relation(name).filter(|relation| relation.fork == Fork::Main)?;
    let parts: Vec<&str> = directory.split('/').collect();
    let (tablespace, database) = match parts.as_slice() {
        ["global"] => (GLOBAL_TABLESPACE, 0),
        ["base", database] => (DEFAULT_TABLESPACE, parse_number(database)?),
        [_, tablespace, _, database] => (parse_number(tablespace)?, parse_number(database)?),
        _ => return None,
    };
    Some((Locator { tablespace, database, node: relation.node }, relation.first_block()?))
}

/// Splits the path of a file in a directory that holds relations: `global`, `base/<db>`, `pg_tblspc/<oid>/<PG_…>/<db>`.
fn relation_directory_and_name(path: &str) -> Option<(&str, &str)> {
    let (directory, name) = path.rsplit_once('/')?;
    let parts: Vec<&str> = directory.split('/').collect();
    let holds = match parts.as_slice() {
        ["global"] => true,
        ["base", database] => is_digits(database),
        ["pg_tblspc", oid, version, database] => is_digits(oid) && version.starts_with("PG_") && is_digits(database),
        _ => false,
    };
    holds.then_some((directory, name))
}

/// `16384`, `16384_vm`, `16384.1`, `16384_init`: the names of relations that are not temporary.
fn parse_relation(name: &str) -> Option<Relation> {
    let (stem, segment) = match name.split_once('.') {
        Some((stem, segment)) => (stem, parse_number(segment)?),
        None => (name, 0),
    };
    let (node, fork) = match stem.split_once('_') {
        None => (stem, Fork::Main),
        Some((node, "fsm")) => (node, Fork::FreeSpace),
        Some((node, "vm")) => (node, Fork::Visibility),
        Some((node, "init")) => (node, Fork::Init),
        Some(_) => return None,
    };
    let node = parse_number(node)?;
    // PostgreSQL never writes a suffix .0.
    let plain = segment > 0 || !name.contains('.');
    plain.then_some(Relation { node, fork, segment })
}

/// `t3_16384`, `t3_16384_fsm.1`: a temporary relation of one backend.
fn is_temporary(name: &str) -> bool {
    let Some((backend, rest)) = name.strip_prefix('t').and_then(|rest| rest.split_once('_')) else { return false };
    is_digits(backend) && parse_relation(rest).is_some()
}

/// An oid as a directory name.
pub fn parse_oid(name: &str) -> Option<u32> {
    parse_number(name)
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A number as PostgreSQL prints it: no sign, no leading zero.
fn parse_number(text: &str) -> Option<u32> {
    let canonical = is_digits(text) && (text == "0" || !text.starts_with('0'));
    canonical.then(|| text.parse().ok()).flatten()
}

/// Knows the unlogged relations of one directory: those with an `_init` fork. Of these only that fork is kept, because
/// recovery rebuilds the others from it.
#[derive(Debug, Default)]
pub struct UnloggedFilter {
    nodes: HashSet<u32>,
}

impl UnloggedFilter {
    /// Learns from every path of one directory.
    pub fn of<'a>(paths: impl Iterator<Item = &'a str>) -> Self {
        let init = |path| relation(path).filter(|relation| relation.fork == Fork::Init);
        Self { nodes: paths.filter_map(init).map(|relation| relation.node).collect() }
    }

    /// Whether a path of the same directory is left out.
    pub fn leaves(&self, path: &str) -> bool {
        relation(path).is_some_and(|relation| relation.fork != Fork::Init && self.nodes.contains(&relation.node))
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert_eq, proptest};

    use super::*;

    #[test]
    fn names_are_judged_as_postgresql_judges_them() {
        use Verdict::{Leave, Take, TakeEmpty};
        for (path, expected) in [
            ("PG_VERSION", Take),
            ("postgresql.conf", Take),
            ("postgresql.auto.conf", Take),
            ("postgresql.auto.conf.tmp", Leave),
            ("postmaster.pid", Leave),
            ("postmaster.opts", Leave),
            ("backup_label", Leave),
            ("backup_label.old", Leave),
            ("tablespace_map", Leave),
            ("tablespace_map.old", Leave),
            ("backup_manifest", Leave),
            ("current_logfiles", Leave),
            ("current_logfiles.tmp", Leave),
            ("recovery.signal", Leave),
            ("standby.signal", Leave),
            ("core", Leave),
            ("core.4711", Leave),
            ("core.conf", Take),
            ("lost+found", Leave),
            ("log", TakeEmpty),
            ("log/postgresql-Fri.log", Leave),
            ("pg_wal", TakeEmpty),
            ("pg_wal/archive_status", TakeEmpty),
            ("pg_wal/summaries", TakeEmpty),
            ("pg_wal/archive_status/000000010000000000000001.done", Leave),
            ("pg_wal/000000010000000000000001", Leave),
            ("pg_replslot", TakeEmpty),
            ("pg_replslot/s/state", Leave),
            ("pg_dynshmem", TakeEmpty),
            ("pg_notify/0000", Leave),
            ("pg_serial", TakeEmpty),
            ("pg_snapshots", TakeEmpty),
            ("pg_stat_tmp/global.stat", Leave),
            ("pg_subtrans/0000", Leave),
            ("pg_stat", Take),
            ("pg_stat/pgstat.stat", Take),
            ("pg_xact/0000", Take),
            ("pg_multixact/members/0000", Take),
            ("pg_logical/replorigin_checkpoint", Take),
            ("pg_twophase/000002E4", Take),
            ("global/pg_control", Take),
            ("global/pg_filenode.map", Take),
            ("global/pg_internal.init", Leave),
            ("global/pg_internal.init.4711", Leave),
            ("global/1262", Take),
            ("base/5/pg_internal.init", Leave),
            ("base/pgsql_tmp", Leave),
            ("base/pgsql_tmp/pgsql_tmp4711.0", Leave),
            ("base/5/t3_16384", Leave),
            ("base/5/t3_16384_fsm", Leave),
            ("base/5/t3_16384.1", Leave),
            ("base/5/t3_16384_vm.2", Leave),
            ("base/5/t3_", Take),
            ("base/5/t_16384", Take),
            ("base/5/tx_16384", Take),
            ("t3_16384", Take),
            ("pg_tblspc", Take),
            ("pg_tblspc/16385/PG_15_202209061/5/t10_16390", Leave),
            ("pg_tblspc/16385/PG_15_202209061/pgsql_tmp", Leave),
            ("pg_tblspc/16385/PG_15_202209061/5/16390", Take),
        ] {
            assert_eq!(verdict(path), expected, "{path}");
        }
    }

    #[test]
    fn relations_are_told_from_other_files() {
        let is = |node, fork, segment| Some(Relation { node, fork, segment });
        for (path, expected) in [
            ("base/5/16384", is(16384, Fork::Main, 0)),
            ("base/5/16384.1", is(16384, Fork::Main, 1)),
            ("base/5/16384_fsm", is(16384, Fork::FreeSpace, 0)),
            ("base/5/16384_vm.3", is(16384, Fork::Visibility, 3)),
            ("base/5/16384_init", is(16384, Fork::Init, 0)),
            ("base/5/4294967295", is(u32::MAX, Fork::Main, 0)),
            ("global/1262_vm", is(1262, Fork::Visibility, 0)),
            ("pg_tblspc/16385/PG_15_202209061/5/16390.12", is(16390, Fork::Main, 12)),
            ("base/5/4294967296", None),
            ("base/5/016384", None),
            ("base/5/16384.0", None),
            ("base/5/16384.01", None),
            ("base/5/16384.", None),
            ("base/5/16384_", None),
            ("base/5/16384_old", None),
            ("base/5/16384.1_vm", None),
            ("base/5/PG_VERSION", None),
            ("base/5/pg_filenode.map", None),
            ("base/5/t3_16384", None),
            ("base/x/16384", None),
            ("base/16384", None),
            ("global/pg_control", None),
            ("global/5/16384", None),
            ("pg_tblspc/16385/5/16384", None),
            ("pg_xact/0000", None),
            ("16384", None),
            ("", None),
        ] {
            assert_eq!(relation(path), expected, "{path}");
        }
    }

    #[test]
    fn main_forks_are_named_as_in_wal() {
        let locator = |tablespace, database, node| Locator { tablespace, database, node };
        for (path, expected) in [
            ("base/5/16384", Some((locator(1663, 5, 16384), 0))),
            ("base/5/16384.2", Some((locator(1663, 5, 16384), 262_144))),
            ("global/1262", Some((locator(1664, 0, 1262), 0))),
            ("pg_tblspc/16385/PG_15_202209061/5/16390.1", Some((locator(16385, 5, 16390), 131_072))),
            ("base/5/16384_vm", None),
            ("base/5/16384_fsm", None),
            ("base/5/16384_init", None),
            ("pg_xact/0000", None),
            ("global/pg_control", None),
        ] {
            assert_eq!(main_fork(path), expected, "{path}");
        }
    }

    #[test]
    fn only_the_init_fork_of_an_unlogged_relation_is_kept() {
        let names = ["base/5/1", "base/5/1_fsm", "base/5/1_init", "base/5/1.1", "base/5/11", "base/5/2", "base/5/1_x"];
        let filter = UnloggedFilter::of(names.into_iter());
        let kept: Vec<&str> = names.into_iter().filter(|name| !filter.leaves(name)).collect();
        assert_eq!(kept, ["base/5/1_init", "base/5/11", "base/5/2", "base/5/1_x"]);
    }

    #[test]
    fn blocks_are_numbered_across_segments() {
        let segment = |segment| Relation { node: 1, fork: Fork::Main, segment }.first_block();
        assert_eq!(segment(0), Some(0));
        assert_eq!(segment(2), Some(262_144));
        assert_eq!(segment(32_767), Some(4_294_836_224));
        assert_eq!(segment(32_768), None);
    }

    proptest! {
        #[test]
        fn a_relation_reads_back_from_its_name(node: u32, segment in 0u32..32_768, fork in 0usize..4) {
            let (fork, suffix) = [
                (Fork::Main, ""), (Fork::FreeSpace, "_fsm"), (Fork::Visibility, "_vm"), (Fork::Init, "_init"),
            ][fork];
            let part = if segment == 0 { String::new() } else { format!(".{segment}") };
            let found = relation(&format!("base/5/{node}{suffix}{part}"));
            prop_assert_eq!(found, Some(Relation { node, fork, segment }));
        }

        #[test]
        fn no_name_panics(path in ".*") {
            let _ = (verdict(&path), relation(&path));
        }
    }
}
