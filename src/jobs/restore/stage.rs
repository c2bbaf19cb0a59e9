//! Staging: WAL from frames to segment files, ahead of replay.

use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};

use tokio::task::JoinHandle;

use crate::disk::lock::{Lock, boot_id};
use crate::disk::{DiskError, place};
use crate::jobs::context::Context;
use crate::jobs::restore::feed::{LOCK_FILE, SegmentRange, Staging};
use crate::jobs::restore::route::{Leg, Route};
use crate::model::{Error, Lsn, Result, ResultExt, SegmentName, Timeline, WalSegmentSize};
use crate::observe::progress::Phase;
use crate::pg::instance::User;
use crate::repository::handle::Repository;
use crate::repository::wal::reader::Reading;

/// Asks for the first WAL of a route, which then comes while its server is prepared.
pub(super) async fn begin<'a>(
    context: &'a Context,
    repository: &'a Repository,
    route: &'a Route,
) -> Result<Option<Reading<'a>>> {
    let Some(Leg { log, from, to, .. }) = route.legs.first() else { return Ok(None) };
    log.begin(repository, &context.ring, (*from, *to)).await.map(Some)
}

/// A staging directory that is being filled.
#[derive(Debug)]
pub(super) struct Stager {
    directory: PathBuf,
    staging: Staging,
    owner: Option<User>,
    _lock: Lock,
}

impl Stager {
    /// Prepares the directory: history files and the record of what will come. From here on `recovery-fetch` works.
    pub(super) fn prepare(directory: &Path, route: &Route, owner: Option<User>) -> Result<Self> {
        let io = |error| Error::from(DiskError::new("create", directory, error));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(io)?;
        let lock = Lock::acquire(&directory.join(LOCK_FILE))?;
        let histories = place_histories(directory, route, owner)?;
        let wal_segment_size = route.need.wal_segment_size;
        let (segments, boot) = (segments(route), boot_id());
        let staging = Staging { complete: false, boot, wal_segment_size, segments, histories };
        let stager = Self { directory: directory.to_owned(), staging, owner, _lock: lock };
        stager.record()?;
        give(directory, owner)?;
        give(&directory.join(LOCK_FILE), owner)?;
        Ok(stager)
    }

    fn record(&self) -> Result<()> {
        self.staging.write(&self.directory, self.owner)
    }

    /// Writes every segment; each appears under its name when it is whole. The last one is filled up with zeros, which
    /// PostgreSQL reads as the end of WAL. The record says "complete" when all of them are durable.
    pub(super) async fn fill(
        mut self,
        (context, repository): (&Context, &Repository),
        (route, begun): (&Route, Option<Reading<'_>>),
        phase: &Arc<Phase>,
    ) -> Result<u64> {
        let flusher = Flusher::start();
        let passed = self.pass((context, repository), (route, begun), (phase, &flusher)).await;
        // What went wrong with a segment is why it could not go on.
        flusher.finish().await?;
        let bytes = passed?;
        let names: Vec<_> = self.staging.names().collect();
        for name in names {
            if !self.directory.join(&name).exists() {
                return Err(Error::failed(format!("segment {name} was not staged")));
            }
        }
        place::sync_dir(&self.directory)?;
        self.staging.complete = true;
        self.record()?;
        Ok(bytes)
    }

    /// Writes all WAL of the route into segments.
    async fn pass(
        &self,
        (context, repository): (&Context, &Repository),
        (route, mut begun): (&Route, Option<Reading<'_>>),
        (phase, flusher): (&Arc<Phase>, &Flusher),
    ) -> Result<u64> {
        let (mut bytes, mut open) = (0, None::<Segment>);
        for leg in &route.legs {
            let timeline = leg.branch.timeline;
            // A promoted server copies the segment in which it left the old timeline: the file of the new timeline
            // begins with the bytes of the old one.
            if let Some(segment) = &mut open {
                segment.name.timeline = timeline;
            }
            let mut sink = |at: Lsn, wal: &[u8]| {
                phase.advance(wal.len() as u64);
                self.write((timeline, at), wal, (&mut open, flusher))?;
                Ok(ControlFlow::Continue(()))
            };
            let reading = match begun.take() {
                Some(first) => first,
                None => leg.log.begin(repository, &context.ring, (leg.from, leg.to)).await?,
            };
            bytes += reading.hand_to(&mut sink).await?;
        }
        if let Some(segment) = open.take() {
            self.close(segment, flusher)?;
        }
        Ok(bytes)
    }

    fn write(
        &self,
        (timeline, mut at): (Timeline, Lsn),
        mut wal: &[u8],
        (open, flusher): (&mut Option<Segment>, &Flusher),
    ) -> Result<()> {
        let size = self.staging.wal_segment_size;
        while !wal.is_empty() {
            let segment = match open.take() {
                Some(segment) => open.insert(segment),
                None => {
                    open.insert(Segment::create(&self.directory, SegmentName::containing(timeline, at, size), size)?)
                }
            };
            let left = usize::try_from(segment.end.bytes_since(at)).unwrap_or(usize::MAX);
            let (now, later) = wal.split_at(left.min(wal.len()));
            segment.append(at, now)?;
            at.0 += now.len() as u64;
            wal = later;
            if at >= segment.end
                && let Some(full) = open.take()
            {
                self.close(full, flusher)?;
            }
        }
        Ok(())
    }

    /// Gives a segment its name: recovery waits for it, and reads it from memory. It is flushed meanwhile, because PostgreSQL,
    /// which flushes what it was given before it reads it, then has less to wait for.
    fn close(&self, segment: Segment, flusher: &Flusher) -> Result<()> {
        let path = self.directory.join(segment.name.file_name(self.staging.wal_segment_size));
        flusher.flush(segment.finish(self.staging.wal_segment_size, self.owner, &path)?, path)
    }
}

/// Makes segments durable while the next ones are written.
#[derive(Debug)]
struct Flusher {
    segments: SyncSender<(File, PathBuf)>,
    work: JoinHandle<Result<()>>,
}

/// Segments that wait to become durable; whoever writes more waits for the disk.
const WAITING: usize = 8;

impl Flusher {
    fn start() -> Self {
        let (segments, waiting) = sync_channel::<(File, PathBuf)>(WAITING);
        let work = tokio::task::spawn_blocking(move || {
            waiting.into_iter().try_for_each(|(file, path)| {
                Ok(file.sync_all().map_err(|error| DiskError::new("fsync", &path, error))?)
            })
        });
        Self { segments, work }
    }

    fn flush(&self, segment: File, path: PathBuf) -> Result<()> {
        self.segments.send((segment, path)).map_err(|_| Error::failed("segments are not made durable any more"))
    }

    /// Waits until every segment is durable.
    async fn finish(self) -> Result<()> {
        drop(self.segments);
        self.work.await.map_err(|error| Error::failed("staging died").because(error))?
    }
}

/// Writes every history file of the cluster, so that promotion finds their numbers taken. Returns their names.
pub(super) fn place_histories(directory: &Path, route: &Route, owner: Option<User>) -> Result<Vec<String>> {
    let mut histories = Vec::new();
    for stored in &route.histories {
        let name = stored.timeline.history_file_name();
        // Of two histories with one number recovery must read the one that leads to the point; the other only keeps its
        // number from being used again.
        let leads = |leg: &Leg| leg.branch.timeline == stored.timeline && leg.branch.branch == stored.branch;
        if route.legs.iter().any(leads) || !histories.contains(&name) {
            place::place(&directory.join(&name), &stored.content, 0o600)?;
            give(&directory.join(&name), owner)?;
        }
        if !histories.contains(&name) {
            histories.push(name);
        }
    }
    Ok(histories)
}

/// Behind the name of a segment that is being written: PostgreSQL never asks for such a file.
const UNFINISHED: &str = "tmp";

#[derive(Debug)]
struct Segment {
    name: SegmentName,
    file: File,
    at: Lsn,
    end: Lsn,
    path: PathBuf,
}

impl Segment {
    fn create(directory: &Path, name: SegmentName, size: WalSegmentSize) -> Result<Self> {
        let path = directory.join(name.file_name(size)).with_extension(UNFINISHED);
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(&path).map_err(|error| DiskError::new("create", &path, error))?;
        let start = name.start(size);
        let end = start.checked_add(size.bytes()).ok_or_else(|| Error::failed("WAL position overflow"))?;
        Ok(Self { name, file, at: start, end, path })
    }

    fn append(&mut self, at: Lsn, wal: &[u8]) -> Result<()> {
        if at != self.at {
            return Err(Error::failed(format!("WAL is not contiguous: expected {}, got {at}", self.at)));
        }
        self.file.write_all(wal).map_err(|error| DiskError::new("write", &self.path, error))?;
        self.at.0 += wal.len() as u64;
        Ok(())
    }

    /// Gives the whole segment its name, in the owner's hands before it is seen there.
    fn finish(self, size: WalSegmentSize, owner: Option<User>, path: &Path) -> Result<File> {
        // PostgreSQL refuses a segment of another size.
        self.file.set_len(size.bytes()).map_err(|error| DiskError::new("extend", &self.path, error))?;
        give(&self.path, owner)?;
        place::name(&self.path, path)?;
        Ok(self.file)
    }
}

/// Hands a file to the account that PostgreSQL runs as. Never what a link leads to: that account may have put it there.
pub(super) fn give(path: &Path, owner: Option<User>) -> Result<()> {
    let Some(User { uid, gid }) = owner else { return Ok(()) };
    lchown(path, Some(uid), Some(gid))
        .map_err(|error| DiskError::new("chown", path, error))
        .during(|| "hand over files")
}

/// The segments of the plan. Where timelines meet inside a segment it carries the name of the newer one.
fn segments(route: &Route) -> Vec<SegmentRange> {
    let size = route.need.wal_segment_size;
    let mut ranges: Vec<SegmentRange> = Vec::new();
    for leg in route.legs.iter().filter(|leg| leg.from < leg.to) {
        let number = |lsn: Lsn| lsn.0 / size.bytes();
        let (first, last) = (number(leg.from), number(Lsn(leg.to.0 - 1)));
        if let Some(previous) = ranges.last_mut() {
            previous.last = previous.last.min(first.saturating_sub(1));
        }
        ranges.retain(|range| range.first <= range.last);
        ranges.push(SegmentRange { timeline: leg.branch.timeline, first, last });
    }
    ranges
}

/// Bytes that staging takes on disk.
pub(super) fn staged_bytes(route: &Route) -> u64 {
    let size = route.need.wal_segment_size.bytes();
    segments(route).iter().map(|range| (range.last - range.first + 1) * size).sum()
}
