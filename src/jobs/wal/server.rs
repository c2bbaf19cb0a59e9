//! What a receiver must know of a server before it asks for WAL: who it is, its history, its slot.

use crate::jobs::context::{Context, Target};
use crate::model::{Branch, Error, Lsn, Result, ResultExt, SystemId, Timeline, WalSegmentSize};
use crate::pg::PgError;
use crate::pg::history::{History, Reign};
use crate::pg::replication::ReplicationClient;
use crate::pg::wal::{Expect, RecordWalker, magic_of};
use crate::repository::wal::adopt::{Commits, Era, Tail};
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::{Log, branch_of};

/// A server, as it introduced itself.
#[derive(Debug, Clone)]
pub(super) struct Server {
    /// The cluster.
    pub(super) system_id: SystemId,
    /// The end of its WAL.
    pub(super) flush_lsn: Lsn,
    /// Whether it is a standby.
    pub(super) in_recovery: bool,
    /// `server_version_num`.
    pub(super) version: u32,
    /// Bytes per segment.
    pub(super) segment_size: WalSegmentSize,
    /// The timelines of its history that it can still describe, newest first.
    pub(super) lineage: Vec<Descent>,
}

/// One timeline of a server's history.
#[derive(Debug, Clone)]
pub(super) struct Descent {
    /// The part of the WAL that it owns in this history.
    pub(super) reign: Reign,
    /// Its branch.
    pub(super) branch: Branch,
    /// Its own history.
    pub(super) history: History,
    /// Its history file; timeline 1 has none.
    pub(super) file: Option<Vec<u8>>,
}

/// Where to stream from.
#[derive(Debug, Clone)]
pub(super) struct Start {
    /// The branch.
    pub(super) branch: BranchId,
    /// The position.
    pub(super) lsn: Lsn,
    /// Whether it lies between two records; if not, it is the start of a page.
    pub(super) at_record: bool,
    /// Where the stored record begins that ends there, if that is known.
    pub(super) last: Option<Lsn>,
    /// The last commits before it, if they are known.
    pub(super) commits: Option<Commits>,
}

impl From<Tail> for Start {
    fn from(Tail { branch, end, at_record, last_record, commits, .. }: Tail) -> Self {
        Self { branch, lsn: end, at_record, last: last_record, commits }
    }
}

/// Connects to a target's walsender.
pub(super) async fn connect(target: &Target) -> Result<ReplicationClient, PgError> {
    ReplicationClient::connect(&target.conninfo.clone().with_application_name(target.receiver_name())).await
}

impl Server {
    /// Asks the server everything.
    pub(super) async fn identify(client: &mut ReplicationClient) -> Result<Self> {
        let id = client.identify_system().await.during(|| "identify the server")?;
        let size = client.show("wal_segment_size").await.during(|| "read wal_segment_size")?;
        let in_recovery = client.role().await.during(|| "ask whether the server is a standby")?.in_recovery;
        let (system_id, flush_lsn) = (id.system_id, id.flush_lsn);
        let (version, segment_size) = (client.server_version(), segment_size(&size)?);
        let lineage = lineage(client, id.timeline).await?;
        Ok(Self { system_id, flush_lsn, in_recovery, version, segment_size, lineage })
    }

    /// The first byte of the segment that the server writes now.
    pub(super) fn current_segment(&self) -> Result<Start> {
        let newest = self.lineage.first().ok_or_else(|| Error::failed("the server has no timeline"))?;
        let lsn = self.segment_size.segment_start(self.flush_lsn);
        Ok(Start { branch: self.branch(newest), lsn, at_record: false, last: None, commits: None })
    }

    /// The branches of its history, newest first.
    pub(super) fn branches(&self) -> Vec<BranchId> {
        self.lineage.iter().map(|descent| self.branch(descent)).collect()
    }

    /// The same, each with where it was left.
    pub(super) fn eras(&self) -> Vec<Era> {
        self.lineage.iter().map(|descent| Era { branch: self.branch(descent), end: descent.reign.end }).collect()
    }

    /// Where streaming continues after `cursor`: there, or at the switch if the server's history left that timeline
    /// before. `None` if this history does not know the cursor's branch at all.
    pub(super) fn continue_at(&self, cursor: &Start) -> Option<Start> {
        let at = self.lineage.iter().position(|descent| self.branch(descent) == cursor.branch)?;
        let switch = self.lineage.get(at).and_then(|descent| descent.reign.end);
        let Some(switch) = switch.filter(|switch| cursor.lsn >= *switch) else { return Some(cursor.clone()) };
        let last = cursor.last.filter(|_| cursor.lsn == switch);
        let older = Start { branch: cursor.branch.clone(), lsn: switch, at_record: true, last, commits: None };
        let Some(child) = at.checked_sub(1).and_then(|child| self.lineage.get(child)) else { return Some(older) };
        // A child that left in the same place wrote nothing; the next one decides.
        self.continue_at(&Start { branch: self.branch(child), ..older })
    }

    /// What this server lacks if it has nothing at `cursor`: of a timeline that it left before, it never had that.
    pub(super) fn lacks_from(&self, cursor: Start) -> Start {
        self.continue_at(&cursor).unwrap_or(cursor)
    }

    /// The first position of a branch of its history.
    pub(super) fn begin_of(&self, branch: &BranchId) -> Option<Lsn> {
        self.lineage.iter().find(|descent| self.branch(descent) == *branch).map(|descent| descent.reign.begin)
    }

    /// The log of a branch of this server.
    pub(super) fn log(&self, target: &Target, branch: &BranchId) -> Log {
        Log {
            target: target.name.clone(),
            system_id: branch.system_id,
            timeline: branch.timeline,
            branch: branch.branch.clone(),
            wal_segment_size: self.segment_size,
        }
    }

    /// Reads WAL from there, and accepts only what this server can have written.
    pub(super) fn walker(&self, start: &Start) -> Result<RecordWalker> {
        let walker = match start.at_record {
            true => RecordWalker::at_record(start.lsn, self.segment_size).map(|walker| walker.following(start.last)),
            false => RecordWalker::new(start.lsn, self.segment_size),
        };
        let descent = self.lineage.iter().find(|descent| self.branch(descent) == start.branch);
        let expect = Expect {
            magic: magic_of(self.version / 10_000),
            system_id: Some(self.system_id),
            history: descent.map(|descent| descent.history.clone()),
        };
        Ok(walker.map_err(Error::from)?.expecting(expect))
    }

    fn branch(&self, descent: &Descent) -> BranchId {
        let (timeline, branch) = (descent.reign.timeline, descent.branch.clone());
        BranchId { system_id: self.system_id, timeline, branch }
    }
}

/// The history of `timeline`, newest first, as far back as the server still has the files: one that it lacks ends it,
/// because the branch before cannot be named.
async fn lineage(client: &mut ReplicationClient, timeline: Timeline) -> Result<Vec<Descent>> {
    let file = history_file(client, timeline).await.during(|| format!("read the history of timeline {timeline}"))?;
    let history = parse(timeline, file.as_deref())?;
    let mut lineage = Vec::new();
    for reign in history.ancestry().collect::<Vec<_>>().into_iter().rev() {
        let file = match reign.timeline == timeline {
            true => file.clone(),
            false => match history_file(client, reign.timeline).await {
                Ok(file) => file,
                Err(error @ (PgError::Server { .. } | PgError::WalRemoved { .. })) => {
                    tracing::info!(%error, timeline = reign.timeline.0, "the server no longer knows this ancestor");
                    break;
                }
                Err(error) => return Err(error.into()),
            },
        };
        let history = parse(reign.timeline, file.as_deref())?;
        let branch = file.as_deref().map_or_else(Branch::root, branch_of);
        lineage.push(Descent { reign, branch, history, file });
    }
    Ok(lineage)
}

async fn history_file(client: &mut ReplicationClient, timeline: Timeline) -> Result<Option<Vec<u8>>, PgError> {
    if timeline == Timeline::FIRST { Ok(None) } else { client.timeline_history(timeline).await.map(Some) }
}

fn parse(timeline: Timeline, file: Option<&[u8]>) -> Result<History> {
    let Some(file) = file else { return Ok(History::without_ancestors(timeline)) };
    let text = std::str::from_utf8(file);
    let text = text.map_err(|error| Error::damaged(format!("the history of timeline {timeline}")).because(error))?;
    Ok(History::parse(timeline, text)?)
}

/// Reads `16MB`, `1GB`, as `SHOW wal_segment_size` prints it.
fn segment_size(text: &str) -> Result<WalSegmentSize> {
    let wrong = || Error::failed(format!("the server's wal_segment_size is `{text}`"));
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?);
    let unit = match unit {
        "kB" => 1024,
        "MB" => 1024 * 1024,
        "GB" => 1024 * 1024 * 1024,
        _ => return Err(wrong()),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit)).ok_or_else(wrong)?;
    WalSegmentSize::try_from(bytes)
}

/// SQLSTATE of a slot that does not exist.
const UNDEFINED_OBJECT: &str = "42704";
/// SQLSTATE of a slot that exists already.
const DUPLICATE_OBJECT: &str = "42710";
/// SQLSTATE of a slot that was invalidated.
const WRONG_STATE: &str = "55000";

/// Whether the server has no such slot.
pub(super) fn is_missing_slot(error: &PgError) -> bool {
    error.sqlstate() == Some(UNDEFINED_OBJECT)
}

/// Whether the server gave the slot up: it lets nobody stream through it any more. A logical slot of this name, which is
/// somebody else's, has the same SQLSTATE and only another text.
pub(super) fn is_invalidated_slot(error: &PgError) -> bool {
    matches!(error, PgError::Server { sqlstate, message, .. } if sqlstate == WRONG_STATE && message.contains("can no longer"))
}

/// Makes the permanent slot unless it exists.
pub(super) async fn ensure_slot(client: &mut ReplicationClient, slot: &str) -> Result<(), PgError> {
    match client.create_physical_slot(slot, false, true).await {
        Err(error) if error.sqlstate() == Some(DUPLICATE_OBJECT) => Ok(()),
        other => other,
    }
}

/// Makes the permanent slot anew: one that lost its WAL never gets it back, and some versions let it go on as if nothing
/// had happened.
pub(super) async fn renew_slot(client: &mut ReplicationClient, slot: &str) -> Result<(), PgError> {
    match client.drop_slot(slot, false).await {
        Err(error) if !is_missing_slot(&error) => return Err(error),
        _ => {}
    }
    ensure_slot(client, slot).await
}

/// A name that no other slot has, for a slot that lives as long as its connection.
pub(super) fn temporary_slot(context: &Context, target: &Target) -> Result<String> {
    const LONGEST_NAME: usize = 63;
    let mut random = [0; 4];
    context.rng.fill(&mut random)?;
    let end = format!("_{}", hex::encode(random));
    let start: String = target.slot.chars().take(LONGEST_NAME - end.len()).collect();
    Ok(start + &end)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::jobs::wal) fn server(file: &str, timeline: u32) -> Server {
        let timeline = Timeline(timeline);
        let history = History::parse(timeline, file).unwrap();
        let descent = |reign: Reign| Descent {
            reign,
            branch: if reign.timeline.0 == 1 {
                Branch::root()
            } else {
                branch_of(&[u8::try_from(reign.timeline.0).unwrap()])
            },
            history: History::without_ancestors(reign.timeline),
            file: None,
        };
        let lineage: Vec<_> = history.ancestry().map(descent).collect();
        Server {
            system_id: SystemId(7),
            flush_lsn: Lsn(0x600_0000),
            in_recovery: false,
            version: 150_000,
            segment_size: WalSegmentSize::DEFAULT,
            lineage: lineage.into_iter().rev().collect(),
        }
    }

    #[test]
    fn streaming_continues_on_the_timeline_that_owns_the_next_byte() {
        let server = server("1\t0/3000000\tx\n2\t0/3000000\tx\n3\t0/5000000\tx\n", 4);
        let branches = server.branches();
        let at = |index: usize, lsn: u64| Start {
            branch: branches[index].clone(),
            lsn: Lsn(lsn),
            at_record: true,
            last: None,
            commits: None,
        };
        let next = |start: Start| server.continue_at(&start).map(|start| (start.branch.timeline.0, start.lsn.0));
        assert_eq!(next(at(3, 0x200_0000)), Some((1, 0x200_0000)));
        assert_eq!(next(at(3, 0x300_0000)), Some((3, 0x300_0000)), "timeline 2 wrote nothing");
        assert_eq!(next(at(3, 0x3F0_0000)), Some((3, 0x300_0000)), "what is beyond the switch is not this history");
        assert_eq!(next(at(1, 0x500_0000)), Some((4, 0x500_0000)));
        assert_eq!(next(at(0, 0x900_0000)), Some((4, 0x900_0000)));
        // A gap begins there as well: one from the end of what was stored beyond the switch would end before it begins.
        let lacks = server.lacks_from(at(3, 0x3F0_0000));
        assert_eq!((lacks.branch.timeline.0, lacks.lsn.0), (3, 0x300_0000));
        let mut other = at(0, 0x900_0000);
        other.branch.branch = Branch::root();
        assert_eq!(next(other.clone()), None);
        assert_eq!(server.lacks_from(other.clone()).lsn, other.lsn);
    }

    #[test]
    fn segment_sizes_are_read_as_postgresql_prints_them() {
        for (text, megabytes) in [("1MB", 1), ("16MB", 16), ("1GB", 1024)] {
            assert_eq!(segment_size(text).unwrap().bytes(), megabytes << 20);
        }
        for text in ["", "16", "MB", "16mb", "3MB", "99999999999999999999MB"] {
            assert!(segment_size(text).is_err(), "{text}");
        }
    }
}
