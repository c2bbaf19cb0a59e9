//! Whether a timeline was left. A standby that was promoted begins a new one, and a SEAL fences nobody who begins again: the
//! old server's receiver may open another epoch on the old timeline and acknowledge beside its successor. What fences it is
//! that the successor is stored.

use std::collections::BTreeSet;

use crate::model::{Error, Lsn, Result, ResultExt, Timeline};
use crate::pg::history::History;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::wal::claim::{Known, is_stream, must_be_readable};
use crate::repository::wal::index::{BranchId, WalIndex};
use crate::repository::wal::log::read_history;

/// A timeline that goes on where another was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Successor {
    /// Its branch.
    pub branch: BranchId,
    /// The first position that the older timeline no longer owns.
    pub switch: Lsn,
}

impl Successor {
    /// What to tell whoever would stream the timeline that was left.
    pub fn refuses(&self, older: &BranchId) -> Error {
        let text = self.words(older);
        let because =
            "this server is still on the old one: it was not fenced, or the target's conninfo leads to it again";
        let hint = "nothing of it is acknowledged. Point the target at the promoted server and stop this one; if this is \
                    the one to go on, give it a timeline of its own: standby.signal, restart, SELECT pg_promote()";
        Error::refused(text).because(because).hint(hint)
    }

    /// What ends an epoch on the timeline that was left.
    pub fn ends(&self, older: &BranchId) -> Error {
        Error::failed(self.words(older))
    }

    fn words(&self, older: &BranchId) -> String {
        let (left, newer) = (older.timeline, self.branch.timeline);
        format!("timeline {left} was left at {}: timeline {newer} is stored, which goes on there", self.switch)
    }
}

/// Where a branch was left, for whoever has an epoch on it that is to be seen at the write quorum: of it and its successor, each
/// of which looks for the other then, at least one sees the other.
///
/// # Errors
/// As of [`successor`]; or the branch's own history is not readable.
pub async fn left(repository: &Repository, branch: &BranchId, known: &Known) -> Result<Option<Successor>> {
    let BranchId { system_id, timeline, branch: name } = branch;
    let own = match *timeline {
        Timeline::FIRST => History::without_ancestors(Timeline::FIRST),
        timeline => {
            let file = read_history(repository, *system_id, timeline, name).await?;
            History::parse(timeline, &String::from_utf8_lossy(&file))?
        }
    };
    successor(repository, (branch, &own), Lsn(u64::MAX), known).await
}

/// The timeline that is streamed in place of `branch`, which was left at or before `at`; of several the one that left it
/// first. `own` is the branch's own history.
/// One of which no stream is stored took nobody's place: a copy that was promoted for a test may archive its history, too.
///
/// # Errors
/// `Unavailable` and transient while too few regions answer.
pub async fn successor(
    repository: &Repository,
    (branch, own): (&BranchId, &History),
    at: Lsn,
    known: &Known,
) -> Result<Option<Successor>> {
    let mut first = None::<Successor>;
    for candidate in histories(repository, branch, known).await? {
        let BranchId { system_id, timeline, branch: name } = &candidate;
        let file = read_history(repository, *system_id, *timeline, name).await;
        let file = file.during(|| format!("look whether timeline {} was left", branch.timeline))?;
        let history = History::parse(*timeline, &String::from_utf8_lossy(&file))?;
        // The same number may be another server's: what went before must be the same, too.
        let descends = history.entries().get(..own.entries().len()) == Some(own.entries());
        let switch = history.reign_of(branch.timeline).and_then(|reign| reign.end);
        let Some(switch) = switch.filter(|switch| descends && *switch <= at) else { continue };
        let is_earlier = first.as_ref().is_none_or(|first| switch < first.switch);
        if is_earlier && is_streamed(repository, &candidate).await? {
            first = Some(Successor { branch: candidate, switch });
        }
    }
    Ok(first)
}

/// Stored histories of newer timelines. A history is at the write quorum before its timeline is streamed.
async fn histories(repository: &Repository, branch: &BranchId, known: &Known) -> Result<Vec<BranchId>> {
    let prefix = layout::histories(branch.system_id);
    let (mut names, mut unreadable) = (BTreeSet::new(), Vec::new());
    for (region, list) in repository.regions.list_each(&prefix).await {
        match list {
            Ok(objects) => names.extend(objects.into_iter().map(|object| object.key)),
            Err(error) => unreadable.push((region, error.to_string())),
        }
    }
    must_be_readable(repository, &unreadable, known.read_quorum(repository, &unreadable))?;
    let parsed = names.iter().filter_map(|key| layout::parse_branch(key.strip_prefix(&prefix)?));
    let newer = parsed.filter(|(timeline, _)| *timeline > branch.timeline);
    Ok(newer.map(|(timeline, branch_name)| BranchId { timeline, branch: branch_name, ..branch.clone() }).collect())
}

async fn is_streamed(repository: &Repository, branch: &BranchId) -> Result<bool> {
    repository.trust.refresh(&repository.regions).await?;
    let index = WalIndex::load(&repository.regions, branch.clone()).await;
    for epoch in index.epochs().keys() {
        if is_stream(repository, &index, epoch).await? {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::Kind;
    use crate::repository::regions::fan_out::{FanOut, Patience};
    use crate::repository::testing::{Fault, Fixture, HISTORY, log};
    use crate::repository::wal::adopt::{Era, TakeOver, take_over};
    use crate::repository::wal::frame::EpochKind;
    use crate::repository::wal::log::{Epoch, Log, branch_of, store_history};

    async fn begin(fixture: &Fixture, kind: EpochKind, start: Lsn) {
        let newer = Log { timeline: Timeline(2), branch: branch_of(HISTORY), ..log() };
        let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
        let opening = (newer, kind, start);
        let mut epoch = Epoch::open(&fixture.repository, &fixture.writer, opening, 1, Arc::clone(&out)).await.unwrap();
        match kind {
            EpochKind::Stream => epoch.claim(&Known::default()).await.unwrap(),
            _ => drop(epoch.append(start, vec![1; 8], crate::repository::wal::log::Marks::default()).await.unwrap()),
        }
        drop(epoch);
        Arc::into_inner(out).unwrap().drain().await;
    }

    /// A SEAL closes an epoch and keeps nobody from opening the next one on the same timeline.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_timeline_is_left_where_another_that_is_streamed_goes_on() {
        let fixture = Fixture::memory(3, 2).await;
        let (switch, older) = (Lsn(0x300_0000), log().branch_id());
        let own = History::without_ancestors(Timeline::FIRST);
        let look = async |at| successor(&fixture.repository, (&older, &own), at, &Known::default()).await;
        assert_eq!(look(switch).await.unwrap(), None);
        let out = FanOut::new(&fixture.repository.regions, Patience::BACKUP);
        store_history(&fixture.repository, (older.system_id, Timeline(2)), HISTORY, &out).await.unwrap();
        out.drain().await;
        begin(&fixture, EpochKind::Push, switch).await;
        assert_eq!(look(switch).await.unwrap(), None, "whoever only archives takes nobody's place");
        begin(&fixture, EpochKind::Stream, switch).await;
        let found = look(switch).await.unwrap().unwrap();
        assert_eq!((found.branch.timeline, found.switch), (Timeline(2), switch));
        assert_eq!(look(Lsn(switch.0 - 8)).await.unwrap(), None, "up to there both are one");
        // Its own successors are not those of another timeline of the same number.
        let newer = BranchId { timeline: Timeline(2), branch: branch_of(HISTORY), ..older.clone() };
        let own = History::parse(Timeline(2), std::str::from_utf8(HISTORY).unwrap()).unwrap();
        let look = successor(&fixture.repository, (&newer, &own), Lsn(u64::MAX), &Known::default()).await;
        assert_eq!(look.unwrap(), None);
        let refused = found.refuses(&older);
        assert_eq!(refused.kind(), Kind::Refused);
        assert!(refused.message().contains("timeline 1 was left at 0/3000000"), "{refused:?}");
        for region in [0, 1] {
            fixture.stores[region].set(Fault::Fail);
        }
        let own = History::without_ancestors(Timeline::FIRST);
        let unknown = successor(&fixture.repository, (&older, &own), switch, &Known::default()).await.unwrap_err();
        assert_eq!(unknown.kind(), Kind::Unavailable, "not to know is not to be alone");
    }

    /// Who took over is not who streams: a receiver that was asleep in between begins on a timeline that was left meanwhile.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn of_two_that_begin_on_a_timeline_and_on_its_successor_one_sees_the_other() {
        let fixture = Fixture::memory(3, 2).await;
        let (switch, older) = (Lsn(0x300_0000), log().branch_id());
        let newer = Log { timeline: Timeline(2), branch: branch_of(HISTORY), ..log() };
        let lineage = [(newer.branch_id(), None), (older.clone(), Some(switch))];
        let lineage = lineage.map(|(branch, end)| Era { branch, end });
        let (known, out) = (Known::default(), Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL)));
        let (repository, writer) = (&fixture.repository, &fixture.writer);
        let owner = TakeOver { repository, writer, own: None, known: &known };
        assert_eq!(take_over(&owner, (&lineage, None)).await.unwrap(), None);
        store_history(repository, (older.system_id, Timeline(2)), HISTORY, &out).await.unwrap();
        let open = async |log: Log| {
            let opening = (log, EpochKind::Stream, switch);
            Epoch::open(repository, writer, opening, 1, Arc::clone(&out)).await.unwrap()
        };

        let (asleep, mut begun) = (Known::default(), open(log()).await);
        begun.claim(&asleep).await.unwrap();
        assert_eq!(left(repository, &older, &asleep).await.unwrap(), None);
        let mut successor = open(newer.clone()).await;
        let beside = successor.claim(&known).await.unwrap_err();
        assert!(beside.message().contains(begun.id().as_str()), "{beside:?}");
        known.clear();
        assert_eq!(take_over(&owner, (&lineage, None)).await.unwrap(), None);
        let mut successor = open(newer).await;
        successor.claim(&known).await.unwrap();

        let mut late = open(log()).await;
        late.claim(&asleep).await.unwrap();
        let found = left(repository, &older, &asleep).await.unwrap().unwrap();
        assert_eq!((found.branch.timeline, found.switch), (Timeline(2), switch));
    }
}
