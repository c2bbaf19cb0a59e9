//! Finds a WAL file in the repository, for one cluster that asks.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Mutex;

use crate::jobs::context::Context;
use crate::jobs::wal::fetch::asker::{Asker, history_of};
use crate::jobs::wal::position::reaches;
use crate::model::{Branch, Error, Kind, Lsn, RegionName, Result, ResultExt, SegmentName, SystemId};
use crate::model::{Timeline, WalSegmentSize};
use crate::pg::history::{History, Reign};
use crate::repository::layout;
use crate::repository::wal::gaps::{self, Barrier};
use crate::repository::wal::index::{self, BranchId, Window};
use crate::repository::wal::log::{branch_of, read_history};
use crate::repository::wal::reader::BranchLog;

/// What was found.
pub(super) enum Found {
    /// Nothing, for sure.
    Absent,
    /// A history file.
    History(Bytes),
    /// A segment.
    Segment(Extract),
}

/// WAL of one timeline that goes into the file.
struct Part {
    log: Arc<BranchLog>,
    from: Lsn,
    to: Lsn,
}

/// The parts of a segment.
pub(super) struct Extract {
    parts: Vec<Part>,
    /// Whether it is stored to its end. What is not will grow.
    pub(super) is_whole: bool,
}

/// The stored WAL, as one cluster needs it. It lists each branch once: what is stored later is for the next library.
pub(super) struct Library<'a> {
    context: &'a Context,
    system_id: SystemId,
    size: WalSegmentSize,
    own: &'a BTreeMap<Timeline, Branch>,
    /// Where the asking cluster's own history files are, if they can be read here.
    data_dir: Option<&'a Path>,
    logs: Mutex<BTreeMap<BranchId, Arc<BranchLog>>>,
    /// What their writers recorded of them.
    gaps: Mutex<BTreeMap<BranchId, Arc<[Barrier]>>>,
}

impl<'a> Library<'a> {
    pub(super) fn new(context: &'a Context, asker: &'a Asker, data_dir: Option<&'a Path>) -> Result<Self> {
        let (size, logs, gaps) = (asker.size()?, Mutex::default(), Mutex::default());
        Ok(Self { context, system_id: asker.system_id, size, own: &asker.own, data_dir, logs, gaps })
    }

    /// A file by PostgreSQL's name for it.
    pub(super) async fn find(&self, file: &str) -> Result<Found> {
        if let Some(timeline) = history_of(file) {
            return self.history(timeline).await;
        }
        let name = SegmentName::parse(file, self.size);
        let name = name.ok_or_else(|| Error::usage(format!("`{file}` is no WAL file")))?;
        let found = self.segment(name).await.during(|| format!("fetch {file}"))?;
        Ok(found.map_or(Found::Absent, Found::Segment))
    }

    async fn history(&self, timeline: Timeline) -> Result<Found> {
        // The first one has none, and PostgreSQL asks for it all the same when a promotion leaves that timeline.
        if timeline == Timeline::FIRST {
            return Ok(Found::Absent);
        }
        let (found, silent) = self.branches(timeline).await;
        match found.as_slice() {
            [] => self.must_be_unknown(timeline, &silent).await.map(|()| Found::Absent),
            [branch] => {
                let content = read_history(&self.context.repository, self.system_id, timeline, branch).await?;
                Ok(Found::History(content))
            }
            _ => Err(ambiguous(timeline)),
        }
    }

    /// The branches of a timeline whose history is stored, and the regions that do not tell.
    async fn branches(&self, timeline: Timeline) -> (Vec<Branch>, Vec<RegionName>) {
        let (found, silent) = self.histories().await;
        (found.into_iter().filter(|(known, _)| *known == timeline).map(|(_, branch)| branch).collect(), silent)
    }

    /// Every stored history, and the regions that do not tell.
    async fn histories(&self) -> (Vec<(Timeline, Branch)>, Vec<RegionName>) {
        let prefix = layout::histories(self.system_id);
        let (mut found, mut silent) = (Vec::new(), Vec::new());
        for (region, listed) in self.context.repository.regions.list_each(&prefix).await {
            let Ok(objects) = listed else {
                silent.push(region);
                continue;
            };
            let parsed = objects.iter().filter_map(|object| layout::parse_branch(object.key.strip_prefix(&prefix)?));
            found.extend(parsed);
        }
        found.sort_unstable();
        found.dedup();
        (found, silent)
    }

    /// Every acknowledged write is in a quorum of regions, so that all but one less than that must have been asked.
    fn must_be_all(&self, silent: &[RegionName]) -> Result<()> {
        if silent.len() < self.context.repository.regions.lowest_quorum() {
            return Ok(());
        }
        let names = silent.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let error = Error::new(Kind::Unavailable, "whether the repository has it cannot be told");
        Err(error.because(format!("{names}: no answer")).transient(true))
    }

    /// A repository without any WAL of the cluster is the wrong one, or one that lost it: nobody knows where its WAL ends,
    /// and PostgreSQL would open the database where its backup stopped.
    async fn must_hold_something(&self) -> Result<()> {
        let stored = index::branches(&self.context.repository.regions, self.system_id).await?;
        if !stored.is_empty() {
            return Ok(());
        }
        let error = Error::refused(format!("no region holds any WAL of system {}", self.system_id));
        Err(error.hint("is this its repository? drctl wal status shows what is stored"))
    }

    /// WAL without the history of its timeline is one that is still to come, and not the end of the archive.
    async fn must_be_unknown(&self, timeline: Timeline, silent: &[RegionName]) -> Result<()> {
        self.must_be_all(silent)?;
        let stored = index::branches(&self.context.repository.regions, self.system_id).await?;
        if stored.iter().all(|branch| branch.timeline != timeline) {
            return Ok(());
        }
        let error = Error::refused(format!("WAL of timeline {timeline} is stored, and its history is in no region"));
        Err(error.hint(format!("hand `{}` of the server's pg_wal to `drctl wal push`", timeline.history_file_name())))
    }

    /// PostgreSQL takes the end of a timeline for the end of recovery. It is not, if a newer one left it behind `end`: the
    /// WAL in between is missing, and all that the newer one holds would be dropped.
    async fn must_be_last(&self, history: &History, end: Lsn) -> Result<()> {
        let (known, silent) = self.histories().await;
        self.must_be_all(&silent)?;
        for stored in index::branches(&self.context.repository.regions, self.system_id).await? {
            let BranchId { system_id, timeline, branch } = stored;
            if timeline <= history.timeline() || !known.contains(&(timeline, branch.clone())) {
                continue;
            }
            let content = read_history(&self.context.repository, system_id, timeline, &branch).await?;
            let newer = parse(timeline, &content)?;
            let left = newer.reign_of(history.timeline()).and_then(|reign| reign.end);
            let descends = newer.entries().starts_with(history.entries());
            if descends && left.is_some_and(|left| !reaches(end, left)) {
                let error = hole(history.timeline(), end);
                return Err(error.because(format!("timeline {timeline}, which is stored, goes on behind it")));
            }
        }
        Ok(())
    }

    /// The history of a timeline: the asking cluster's own file decides between two of one number.
    async fn lineage(&self, timeline: Timeline) -> Result<Option<(Branch, History)>> {
        if timeline == Timeline::FIRST {
            return Ok(Some((Branch::root(), History::without_ancestors(timeline))));
        }
        let own = self.data_dir.map(|directory| directory.join("pg_wal").join(timeline.history_file_name()));
        let own = own.map(std::fs::read).transpose();
        let own = match own {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            own => own.map_err(|error| Error::failed(timeline.history_file_name()).because(error))?,
        };
        let content = match (own, self.own.get(&timeline)) {
            (Some(content), _) => content,
            (None, Some(branch)) => {
                read_history(&self.context.repository, self.system_id, timeline, branch).await?.to_vec()
            }
            (None, None) => {
                let (found, silent) = self.branches(timeline).await;
                match found.as_slice() {
                    [] => return self.must_be_unknown(timeline, &silent).await.map(|()| None),
                    [branch] => {
                        read_history(&self.context.repository, self.system_id, timeline, branch).await?.to_vec()
                    }
                    _ => return Err(ambiguous(timeline)),
                }
            }
        };
        Ok(Some((branch_of(&content), parse(timeline, &content)?)))
    }

    async fn log(&self, branch: BranchId) -> Arc<BranchLog> {
        let mut logs = self.logs.lock().await;
        if let Some(log) = logs.get(&branch) {
            return Arc::clone(log);
        }
        let log = Arc::new(BranchLog::load(&self.context.repository, branch.clone()).await);
        logs.insert(branch, Arc::clone(&log));
        log
    }

    /// WAL of which two versions were stored is not crossed, whichever of them is to be had now.
    async fn must_be_one_version(&self, part: &Part) -> Result<()> {
        let branch = part.log.index.branch();
        let mut known = self.gaps.lock().await;
        let recorded = match known.get(branch) {
            Some(recorded) => Arc::clone(recorded),
            None => {
                let barriers = gaps::barriers(&self.context.repository, branch).await?;
                barriers.tell();
                Arc::clone(known.entry(branch.clone()).or_insert_with(|| barriers.standing.into()))
            }
        };
        drop(known);
        let crossed = |gap: &&Barrier| gap.contradiction && gap.from < part.to && part.from < gap.to;
        let Some(Barrier { from, to, reason, .. }) = recorded.iter().find(crossed) else { return Ok(()) };
        let error = Error::refused(format!("the WAL from {from} to {to} was stored in two versions")).because(reason);
        Err(error.hint("recovery must not cross it: begin with a backup behind it, drctl list"))
    }

    /// A segment; `None` = there is none of this name.
    pub(super) async fn segment(&self, name: SegmentName) -> Result<Option<Extract>> {
        let Some((_, history)) = self.lineage(name.timeline).await? else { return Ok(None) };
        let (start, end) = (name.start(self.size), Lsn(name.start(self.size).0 + self.size.bytes()));
        let mut parts = Vec::new();
        for Reign { timeline, begin, end: switch } in history.ancestry() {
            let (from, to) = (begin.max(start), switch.map_or(end, |switch| switch.min(end)));
            if from >= to {
                continue;
            }
            let Some((branch, _)) = self.lineage(timeline).await? else {
                return Err(Error::refused(format!("the history of timeline {timeline} is in no region")));
            };
            let log = self.log(BranchId { system_id: self.system_id, timeline, branch }).await;
            parts.push(Part { log, from, to });
        }
        // The timeline begins behind this segment: there never was such a file.
        if parts.last().is_none_or(|part| part.log.index.branch().timeline != name.timeline) {
            return Ok(None);
        }
        // Streaming that began on this timeline stored its first segment whole, the part of the older timeline with it.
        if parts.last().is_some_and(|part| part.log.window(start).is_some()) {
            parts.drain(..parts.len().saturating_sub(1));
            parts.iter_mut().for_each(|part| part.from = start);
        }
        let Some(last) = parts.last_mut() else { return Ok(None) };
        let Some(to) = self.extent(last, &history).await? else { return Ok(None) };
        let is_whole = to == last.to;
        last.to = to;
        for part in &parts {
            self.must_be_one_version(part).await?;
        }
        Ok(Some(Extract { parts, is_whole }))
    }

    /// Up to where a part can be given; `None` = nothing of it exists.
    async fn extent(&self, part: &Part, history: &History) -> Result<Option<Lsn>> {
        let window = part.log.window(part.from);
        if window.is_some_and(|window| window.end >= part.to) {
            return Ok(Some(part.to));
        }
        let end = window.map_or(part.from, |window| window.end);
        if part.log.runs.iter().any(|run| run.end() > end) {
            return Err(hole(part.log.index.branch().timeline, end));
        }
        if let Some(damage) = part.log.damaged.first() {
            return Err(damage.clone().during("find the end of stored WAL"));
        }
        let silent: Vec<_> = part.log.index.unreadable().iter().map(|(region, _)| region.clone()).collect();
        self.must_be_all(&silent)?;
        self.must_be_last(history, end).await?;
        if part.log.runs.is_empty() {
            self.must_hold_something().await?;
        }
        // The end of all WAL: up to the last complete record it is right, and zeros behind it say so to PostgreSQL.
        let complete = window.and_then(|Window { last_record_end, .. }| last_record_end);
        Ok(complete.filter(|complete| *complete > part.from))
    }

    /// Hands a segment to `sink`, filled up with zeros.
    pub(super) async fn copy(
        &self,
        extract: &Extract,
        sink: &mut (dyn FnMut(&[u8]) -> Result<()> + Send),
    ) -> Result<()> {
        let mut written = 0;
        for part in &extract.parts {
            let mut pass = |_: Lsn, wal: &[u8]| sink(wal).map(|()| ControlFlow::Continue(()));
            let (repository, ring) = (&self.context.repository, &self.context.ring);
            written += part.log.read(repository, ring, (part.from, part.to), &mut pass).await?;
        }
        let zeros = vec![0; 64 * 1024];
        while written < self.size.bytes() {
            let length = usize::try_from(self.size.bytes() - written).unwrap_or(usize::MAX).min(zeros.len());
            sink(zeros.get(..length).unwrap_or_default())?;
            written += length as u64;
        }
        Ok(())
    }
}

fn ambiguous(timeline: Timeline) -> Error {
    let error = Error::refused(format!("several histories call themselves timeline {timeline}"));
    error.hint(
        "two servers were promoted independently: `drctl restore --timeline` restores to a point before they parted",
    )
}

fn hole(timeline: Timeline, at: Lsn) -> Error {
    let error = Error::refused(format!("the WAL of timeline {timeline} has a hole at {at}"));
    error.hint("recovery must not end here: drctl wal status shows what is missing")
}

fn parse(timeline: Timeline, content: &[u8]) -> Result<History> {
    let text = std::str::from_utf8(content);
    let text = text.map_err(|error| Error::damaged(format!("the history of timeline {timeline}")).because(error))?;
    Ok(History::parse(timeline, text)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::tests::context;
    use crate::repository::regions::fan_out::{FanOut, Patience};
    use crate::repository::testing::{Fixture, log};
    use crate::repository::wal::gaps::Gap;
    use crate::store::{Digest, ObjectStore, PutOptions};

    const SEGMENT: u64 = 1 << 20;

    fn name(from: Lsn, to: Lsn) -> String {
        layout::gap("", from, to) + "-contradiction"
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_segment_of_which_two_versions_were_stored_is_not_given() {
        let fixture = Fixture::memory(2, 2).await;
        fixture.epoch(SEGMENT, &[1 << 20, 1 << 20, 1 << 20], true).await;
        let (branch, repository) = (log().branch_id(), &fixture.repository);
        let out = FanOut::new(&repository.regions, Patience::WAL);
        let at = |segments: u64| Lsn(segments * SEGMENT + 100);
        let hole = Gap::new(&log().target, &branch, (at(1), at(2)), "it came later", fixture.writer.clock.now());
        let two = Gap::new(&log().target, &branch, (at(2), at(2)), "two servers", fixture.writer.clock.now());
        let two = Gap { to: Lsn(two.to.0 + 1), ..two }.contradicted();
        for gap in [hole, two] {
            gaps::record(repository, &fixture.writer, &gap, &out).await.unwrap();
        }
        out.drain().await;
        // Bytes that nobody signed: under no name of a record, in fewer regions than acknowledge one, and in as many.
        let prefix = layout::gaps(branch.system_id, branch.timeline, &branch.branch);
        let names = ["garbage".to_owned(), name(at(1), at(2)), name(at(3), at(4))];
        for (garbage, stores) in names.iter().zip([2, 1, 2]) {
            for store in &fixture.stores[..stores] {
                let (key, body) = (format!("{prefix}{garbage}"), Bytes::from_static(b"{}\n"));
                let digest = Digest::of(&body);
                store.put(&key, body, digest, &PutOptions::default()).await.unwrap();
            }
        }

        let context = context(&fixture).await;
        let asker = Asker { system_id: log().system_id, segment_size: SEGMENT, own: BTreeMap::new() };
        let library = Library::new(&context, &asker, None).unwrap();
        let find = async |number| {
            let name = SegmentName { timeline: Timeline::FIRST, number }.file_name(library.size);
            library.find(&name).await
        };
        let whole = find(1).await;
        assert!(matches!(whole, Ok(Found::Segment(Extract { is_whole: true, .. }))), "{:?}", whole.err());
        let forged = find(3).await.err().unwrap();
        assert!(forged.to_string().contains(&names[2]) && forged.kind() == Kind::Refused, "{forged:?}");
        let refused = find(2).await.err().unwrap();
        assert!(refused.to_string().contains("was stored in two versions") && refused.kind() == Kind::Refused);
    }
}
