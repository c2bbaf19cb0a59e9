//! Names of objects. Pure; the only place that spells a key.
//!
//! Every name is create-only. Nothing that a reader needs is found through a pointer that moves: readers list.

use chrono::{DateTime, Utc};

use crate::model::run::slot_text;
use crate::model::{
    BackupId, Branch, EpochId, HolderId, KeysetId, Lsn, PinId, PruneId, RegionName, ReportId, ScheduleName, SignerId,
    SystemId, TargetName, Timeline,
};

/// The record that names the repository; the first object of every region.
pub const REPOSITORY: &str = "drctl.json";

/// Everything below is one region's own copy of the escape hatch.
pub const ESCAPE: &str = "escape/1/";

/// Where sibling regions are: one record per address that a region ever had.
pub const REGIONS: &str = "regions/";

/// Public keys of the signers.
pub const SIGNERS: &str = "signers/";

/// Pages.
const PACKS: &str = "packs/";

/// What backups contain.
const MANIFESTS: &str = "manifests/";

/// Which objects backups need.
const INVENTORIES: &str = "inventories/";

/// Every COMMIT of every target.
pub const COMMITS: &str = "commits/";

/// WAL frames.
pub const WAL: &str = "wal/";

/// Timeline history files.
pub const HISTORY: &str = "history/";

/// Keysets, wrapped by their holders.
pub const KEYSETS: &str = "keysets/";

/// Recorded gaps in the WAL.
pub const GAPS: &str = "gaps/";

/// What jobs found.
pub const REPORTS: &str = "reports/";

/// What became of every slot of every schedule.
pub const RUNS: &str = "runs/";

/// What stores write to prove themselves.
const PROBES: &str = ".probe/";

/// Backups in progress.
pub const INTENTS: &str = "intents/";

/// Pins and holds.
pub const PINS: &str = "pins/";

/// The ends of pins and holds.
pub const UNPINS: &str = "unpins/";

/// What prune took away, so that no other region brings it back.
pub const PRUNED: &str = "pruned/";

/// Plans of prune: what is to go after the grace period.
pub const PRUNES: &str = "prunes/";

/// Sweeps of prune: one record when each begins, another when it ends.
pub const SWEEPS: &str = "sweeps/";

/// The kinds of top-level names that repair copies from region to region, COMMIT last: a backup exists in a region only
/// when all of it is there.
pub const REPAIR_ORDER: [&str; 18] = [
    ESCAPE,
    REGIONS,
    SIGNERS,
    PRUNED,
    PINS,
    UNPINS,
    KEYSETS,
    HISTORY,
    WAL,
    GAPS,
    PACKS,
    MANIFESTS,
    INVENTORIES,
    COMMITS,
    REPORTS,
    RUNS,
    SWEEPS,
    // With it a region counts: what is not found there is believed to be nowhere.
    REPOSITORY,
];

/// Whether readers find an object by listing, maybe while it is on its way to the other regions. The parts of a backup are
/// found through its COMMIT alone, which comes after them.
pub fn may_be_read_on_its_way(key: &str) -> bool {
    ![PACKS, MANIFESTS, INVENTORIES].iter().any(|prefix| key.starts_with(prefix))
}

/// Whether a lock on an object serves anything. What a store writes to prove itself, an intent and a plan of prune are worth
/// nothing when they are over, and would pile up.
pub fn is_locked(key: &str) -> bool {
    ![INTENTS, PRUNES, PROBES].iter().any(|prefix| key.starts_with(prefix))
}

/// One sibling's address; `digest` tells its successive addresses apart.
pub fn region(name: &RegionName, digest: &str) -> String {
    format!("{REGIONS}{name}/{digest}")
}

/// A signer's public key.
pub fn signer(id: &SignerId) -> String {
    format!("{SIGNERS}{id}")
}

/// All wraps of one keyset.
pub fn keyset(target: &TargetName, keyset: &KeysetId) -> String {
    format!("{KEYSETS}{target}/{keyset}/")
}

/// One holder's wrap of a keyset.
pub fn wrap(target: &TargetName, id: &KeysetId, holder: &HolderId) -> String {
    format!("{}{holder}", keyset(target, id))
}

/// The target, keyset and holder that a wrap's name gives; `None` for a name that is not one of ours.
pub fn parse_wrap(key: &str) -> Option<(TargetName, KeysetId, HolderId)> {
    let mut parts = key.strip_prefix(KEYSETS)?.split('/');
    let wrap = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then_some(wrap)
}

/// The commits of one target.
pub fn commits(target: &TargetName) -> String {
    format!("{COMMITS}{target}/")
}

/// A backup's COMMIT.
pub fn commit(target: &TargetName, id: &BackupId) -> String {
    format!("{COMMITS}{target}/{id}")
}

/// A part of a backup's manifest.
pub fn manifest(target: &TargetName, id: &BackupId, part: u32) -> String {
    format!("manifests/{target}/{id}/{part:06}")
}

/// A part of a backup's inventory.
pub fn inventory(target: &TargetName, id: &BackupId, part: u32) -> String {
    format!("inventories/{target}/{id}/{part:06}")
}

/// The packs of one target, also those of backups that never finished.
pub fn packs(target: &TargetName) -> String {
    format!("packs/{target}/")
}

/// A pack.
pub fn pack(target: &TargetName, id: &BackupId, ordinal: u32) -> String {
    format!("packs/{target}/{id}/{ordinal:06}")
}

/// The reports on one target.
pub fn reports(target: &TargetName) -> String {
    format!("{REPORTS}{target}/")
}

/// A report.
pub fn report(target: &TargetName, id: &ReportId) -> String {
    format!("{}{id}", reports(target))
}

/// The records of one schedule.
pub fn runs(schedule: &ScheduleName) -> String {
    format!("{RUNS}{schedule}/")
}

/// What became of a slot.
pub fn run(schedule: &ScheduleName, slot: DateTime<Utc>) -> String {
    format!("{RUNS}{schedule}/{}", slot_text(slot))
}

/// The record that a backup is under way.
pub fn intent(id: &BackupId) -> String {
    format!("{INTENTS}{id}")
}

/// The pins and holds of one target.
pub fn pins(target: &TargetName) -> String {
    format!("{PINS}{target}/")
}

/// A pin or a hold.
pub fn pin(target: &TargetName, id: &PinId) -> String {
    format!("{PINS}{target}/{id}")
}

/// Its end.
pub fn unpin(target: &TargetName, id: &PinId) -> String {
    format!("{UNPINS}{target}/{id}")
}

/// The record that a sweep takes a backup. Each sweep has its own, so that the end of one says nothing of another.
pub fn tomb(target: &TargetName, id: &BackupId, sweep: &PruneId) -> String {
    format!("{PRUNED}backups/{target}/{id}.{sweep}")
}

/// The name of a record that has none of its sweep's.
pub fn nameless_tomb(target: &TargetName, id: &BackupId) -> String {
    format!("{PRUNED}backups/{target}/{id}")
}

/// Reads the last part of [`tomb`] or [`nameless_tomb`].
pub fn parse_tomb(key: &str) -> Option<(BackupId, Option<PruneId>)> {
    let name = key.rsplit('/').next()?;
    let named = name.rsplit_once('.').and_then(|(id, sweep)| Some((id.parse().ok()?, Some(sweep.parse().ok()?))));
    named.or_else(|| Some((name.parse().ok()?, None)))
}

/// The record that this sweep left a backup alone after all.
pub fn spared(target: &TargetName, id: &BackupId, sweep: &PruneId) -> String {
    format!("{PRUNED}spared/{target}/{id}.{sweep}")
}

/// These records, of one target or of all.
pub fn all_spared(target: Option<&TargetName>) -> String {
    target.map_or_else(|| format!("{PRUNED}spared/"), |target| format!("{PRUNED}spared/{target}/"))
}

/// The records of pruned backups, of one target or of all.
pub fn tombs(target: Option<&TargetName>) -> String {
    target.map_or_else(|| format!("{PRUNED}backups/"), |target| format!("{PRUNED}backups/{target}/"))
}

/// The records of pruned WAL of one branch.
pub fn wal_cuts(system: SystemId, timeline: Timeline, branch: &Branch) -> String {
    format!("{PRUNED}wal/{system}/{:08x}-{branch}/", timeline.0)
}

/// The record that the frames of an epoch before `seq` were pruned.
pub fn wal_cut(branch_prefix: &str, epoch: &EpochId, seq: u64) -> String {
    format!("{branch_prefix}{epoch}/{seq:010}")
}

/// A part of a prune's plan.
pub fn plan_part(id: &PruneId, part: u32) -> String {
    format!("{PRUNES}{id}/{part:06}")
}

/// The record that a sweep began.
pub fn sweep(id: &PruneId) -> String {
    format!("{SWEEPS}{id}/begun")
}

/// The record that a sweep ended.
pub fn sweep_end(id: &PruneId) -> String {
    format!("{SWEEPS}{id}/ended")
}

/// Everything that a cluster ever wrote.
pub fn wal_system(system: SystemId) -> String {
    format!("{WAL}{system}/")
}

/// One branch of one timeline.
pub fn wal_branch(system: SystemId, timeline: Timeline, branch: &Branch) -> String {
    format!("{WAL}{system}/{:08x}-{branch}/", timeline.0)
}

/// Reads the last part of [`wal_branch`] (`0000000a-5f0c11aa/`).
pub fn parse_branch(part: &str) -> Option<(Timeline, Branch)> {
    let (timeline, branch) = part.trim_end_matches('/').split_once('-')?;
    let digits = timeline.len() == 8 && timeline.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let timeline = digits.then(|| u32::from_str_radix(timeline, 16).ok()).flatten()?;
    Some((Timeline(timeline), Branch::try_from(branch.to_owned()).ok()?))
}

/// One epoch's frames.
pub fn wal_epoch(system: SystemId, timeline: Timeline, branch: &Branch, epoch: &EpochId) -> String {
    format!("{}{epoch}/", wal_branch(system, timeline, branch))
}

/// A frame. The key is the sequence number alone: a name that carried the LSN or the writer would let two writers both
/// succeed at one position of the log.
pub fn wal_frame(epoch_prefix: &str, seq: u64) -> String {
    format!("{epoch_prefix}{seq:010}")
}

/// More frames than a bundle has room for: a name that promises more is none of ours.
pub const MOST_FRAMES: u64 = 40_000;

/// A bundle of the frames `first` to `last` of an epoch.
pub fn wal_bundle(epoch_prefix: &str, first: u64, last: u64) -> String {
    format!("{epoch_prefix}{first:010}-{last:010}")
}

/// Reads the last part of [`wal_bundle`].
pub fn parse_bundle(part: &str) -> Option<(u64, u64)> {
    let (first, last) = part.split_once('-')?;
    let (first, last) = (parse_seq(first)?, parse_seq(last)?);
    (first <= last && last - first < MOST_FRAMES).then_some((first, last))
}

/// Whether an object of this size can be a bundle of these frames: each has a head with a signature. A name alone could else
/// stand for frames that nobody wrote, tens of thousands of them.
pub const fn can_be_bundle((first, last): (u64, u64), size: u64) -> bool {
    const LEAST_FRAME: u64 = 128;
    size >= (last - first + 1) * LEAST_FRAME
}

/// Reads the last part of [`wal_frame`].
pub fn parse_seq(part: &str) -> Option<u64> {
    let digits = part.len() == 10 && part.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| part.parse().ok()).flatten()
}

/// A timeline's history file.
pub fn history(system: SystemId, timeline: Timeline, branch: &Branch) -> String {
    format!("{HISTORY}{system}/{:08x}-{branch}", timeline.0)
}

/// The histories of one cluster.
pub fn histories(system: SystemId) -> String {
    format!("{HISTORY}{system}/")
}

/// The recorded gaps of one branch.
pub fn gaps(system: SystemId, timeline: Timeline, branch: &Branch) -> String {
    format!("{GAPS}{system}/{:08x}-{branch}/", timeline.0)
}

/// A recorded gap `[from, to)`.
pub fn gap(prefix: &str, from: Lsn, to: Lsn) -> String {
    format!("{prefix}{:016x}-{:016x}", from.0, to.0)
}

/// The range in the name of a recorded gap.
pub fn parse_gap(name: &str) -> Option<(Lsn, Lsn)> {
    let position = |text: &str| {
        let is_hex = text.len() == 16 && text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c));
        is_hex.then(|| u64::from_str_radix(text, 16).ok()).flatten().map(Lsn)
    };
    let (from, to) = name.split_once('-')?;
    position(from).zip(position(to)).filter(|(from, to)| from <= to)
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert_eq, proptest};

    use super::*;

    proptest! {
        #[test]
        fn names_read_back(timeline: u32, seq in 0u64..10_000_000_000) {
            let branch = Branch::root();
            let key = wal_branch(SystemId(7), Timeline(timeline), &branch);
            let part = key.strip_prefix("wal/7/").unwrap();
            prop_assert_eq!(parse_branch(part), Some((Timeline(timeline), branch)));
            let frame = wal_frame("e/", seq);
            prop_assert_eq!(parse_seq(frame.strip_prefix("e/").unwrap()), Some(seq));
            prop_assert_eq!(parse_bundle(frame.strip_prefix("e/").unwrap()), None);
            let bundle = wal_bundle("e/", seq, seq + 7);
            prop_assert_eq!(parse_bundle(bundle.strip_prefix("e/").unwrap()), Some((seq, seq + 7)).filter(|_| seq + 7 < 10_000_000_000));
            prop_assert_eq!(parse_seq(bundle.strip_prefix("e/").unwrap()), None);
        }

        #[test]
        fn frames_sort_by_sequence(a in 0u64..10_000_000_000, b in 0u64..10_000_000_000) {
            prop_assert_eq!(a.cmp(&b), wal_frame("e/", a).cmp(&wal_frame("e/", b)));
        }
    }
}
