//! The run of a plan: streams come in, and go into a tree, into files or into a database.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;

use super::directory::Site;
use super::plan::{ARCHIVE, Prepared, Target};
use super::words::{Destination, Report};
use super::{Request, To};
use crate::disk::{DiskError, place};
use crate::jobs::context::Context;
use crate::jobs::restore::{PhaseTime, quoted};
use crate::model::{Error, Result, ResultExt};
use crate::observe::progress::Phase;
use crate::repository::backup::stream::StreamLine;
use crate::source::{dump, files};

/// Pieces of at most 8 MiB on their way.
const QUEUE: usize = 2;

/// Runs the plan.
pub(super) async fn run(context: &Context, request: &Request, prepared: Prepared) -> Result<Report> {
    let begun = context.clock.monotonic();
    let plan = &prepared.plan;
    let mut report = Report {
        plan: plan.digest.clone(),
        backup: plan.backup.clone(),
        destination: plan.destination.clone(),
        phases: Vec::new(),
        seconds: 0.0,
        incidents: Vec::new(),
        warnings: plan.warnings.clone(),
        next: Vec::new(),
    };
    let (fetched, warnings) = match (&plan.destination, &request.to, &prepared.into) {
        (Destination::Tree { directory }, ..) => tree(context, &prepared, directory).await?,
        (Destination::StreamFiles { directory }, ..) => {
            report.next = by_hand(&prepared, directory);
            (stream_files(context, &prepared, directory).await?, Vec::new())
        }
        (Destination::Database { create, .. }, To::Database(_), Some(target)) => {
            report.next.push(format!("vacuumdb --analyze-only --dbname={}", quoted(&target.into.name)));
            database(context, &prepared, target, *create).await?
        }
        (Destination::Database { .. }, ..) => return Err(Error::failed("the plan names no database")),
    };
    let took = context.clock.monotonic() - begun;
    let mut time = PhaseTime::new("restore", took);
    (time.bytes, time.fetched_bytes) = (Some(plan.write_bytes), Some(fetched));
    report.phases.push(time);
    report.warnings.extend(warnings);
    report.incidents = prepared.repository.regions.incidents();
    report.seconds = took.as_secs_f64();
    Ok(report)
}

/// What stock tools do with the files.
fn by_hand(prepared: &Prepared, directory: &Path) -> Vec<String> {
    let word = |name: &str| quoted(&directory.join(name).display().to_string());
    let next = |stream: &StreamLine| match stream.name.as_str() {
        ARCHIVE => format!("tar --xattrs '--xattrs-include=*' -xpf {} -C DIR", word(ARCHIVE)),
        dump::GLOBALS => format!("psql -X -d postgres -f {}", word(dump::GLOBALS)),
        name => format!("pg_restore --exit-on-error --dbname=DATABASE {}", word(name)),
    };
    prepared.plan.backup.streams.iter().map(next).collect()
}

/// Sends one stream into `into`; returns the bytes fetched and what `into` gave. A stream that fails reaches the reader as
/// an error, never as an end.
async fn through<T>(
    context: &Context,
    prepared: &Prepared,
    stream: &StreamLine,
    into: impl AsyncFnOnce(mpsc::Receiver<Result<Bytes>>) -> Result<T>,
) -> Result<(u64, T)> {
    let (out, pieces) = mpsc::channel(QUEUE);
    let phase = context.progress.begin("restore", Some(stream.bytes));
    phase.note(stream.name.clone());
    let (counted, counting) = mpsc::channel(1);
    let send = async {
        let sent = prepared.stored.send((&prepared.repository, &context.ring), &stream.name, &out).await;
        if let Err(error) = &sent {
            // A reader that is gone has an error of its own.
            let _ = out.send(Err(error.clone())).await;
        }
        drop(out);
        sent
    };
    let (sent, (), took) = tokio::join!(send, count(pieces, counted, &phase), into(counting));
    match (sent, took) {
        (Ok(fetched), Ok(took)) => Ok((fetched, took)),
        // The reader stopped first, and the sender noticed; or the reader was told why.
        (_, Err(error)) => Err(error),
        (Err(error), Ok(_)) => Err(error),
    }
}

async fn count(mut pieces: mpsc::Receiver<Result<Bytes>>, counted: mpsc::Sender<Result<Bytes>>, phase: &Phase) {
    while let Some(piece) = pieces.recv().await {
        phase.advance(piece.as_ref().map_or(0, |bytes| bytes.len() as u64));
        if counted.send(piece).await.is_err() {
            return;
        }
    }
}

/// An archive becomes a tree.
async fn tree(context: &Context, prepared: &Prepared, directory: &Path) -> Result<(u64, Vec<String>)> {
    let plan = &prepared.plan;
    let stream = plan.backup.streams.iter().find(|stream| stream.name == ARCHIVE);
    let stream = stream.ok_or_else(|| Error::damaged(format!("{} holds no archive", plan.backup.id)))?;
    let site = Site::take(directory, (&plan.digest, &plan.backup.id), context.clock.now())?;
    let unpack = async |pieces: mpsc::Receiver<Result<Bytes>>| {
        let directory = directory.to_owned();
        let work = tokio::task::spawn_blocking(move || {
            let mut input = Pieces { pieces, piece: Bytes::new(), failed: None };
            let unpacked = files::unpack(&mut input, &directory);
            // What the stream said goes before what the reader of the archive makes of its end.
            input.failed.map_or(unpacked, Err)
        });
        work.await.map_err(|error| Error::failed("the restore of files died").because(error))?
    };
    let unfinished = || format!("restore {}; what is in {} is a part of it", plan.backup.id, directory.display());
    let (fetched, unpacked) = through(context, prepared, stream, unpack).await.during(unfinished)?;
    site.release()?;
    Ok((fetched, unpacked.notes))
}

/// Each stream becomes a file, which has its name when it is whole.
async fn stream_files(context: &Context, prepared: &Prepared, directory: &Path) -> Result<u64> {
    let plan = &prepared.plan;
    let site = Site::take(directory, (&plan.digest, &plan.backup.id), context.clock.now())?;
    let mut fetched = 0;
    for stream in &plan.backup.streams {
        let path = site.directory.join(&stream.name);
        let write = async |pieces: mpsc::Receiver<Result<Bytes>>| {
            let path = path.clone();
            let work = tokio::task::spawn_blocking(move || write_file(&path, pieces));
            work.await.map_err(|error| Error::failed("the writer of a file died").because(error))?
        };
        let step = || format!("restore {} of {}", stream.name, plan.backup.id);
        fetched += through(context, prepared, stream, write).await.during(step)?.0;
    }
    site.release()?;
    Ok(fetched)
}

fn write_file(path: &Path, mut pieces: mpsc::Receiver<Result<Bytes>>) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".unfinished");
    let unfinished = PathBuf::from(name);
    let mut options = std::fs::File::options();
    std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create_new(true), 0o600);
    let mut file = options.open(&unfinished).map_err(|error| DiskError::new("create", &unfinished, error))?;
    while let Some(piece) = pieces.blocking_recv() {
        file.write_all(&piece?).map_err(|error| DiskError::new("write", &unfinished, error))?;
    }
    Ok(place::rename(&unfinished, path)?)
}

/// A dump becomes a database.
async fn database(context: &Context, prepared: &Prepared, target: &Target, create: bool) -> Result<(u64, Vec<String>)> {
    let Target { into, contents, database, wishes } = target;
    let plan = &prepared.plan;
    let stream = plan.backup.streams.first();
    let stream = stream.ok_or_else(|| Error::damaged(format!("{} holds no {}", plan.backup.id, database.stream)))?;
    if create {
        dump::create(into, contents, database).await?;
    }
    let restore = async |pieces: mpsc::Receiver<Result<Bytes>>| {
        dump::restore(into, *wishes, contents.pg_dump_major, pieces).await
    };
    let restored = through(context, prepared, stream, restore).await;
    let error = match restored {
        Ok((fetched, mut restored)) => {
            if create {
                restored.notes.extend(dump::dress(into, &database.properties, *wishes).await?);
            }
            return Ok((fetched, restored.notes));
        }
        Err(error) => error,
    };
    let name = &into.name;
    Err(match (create, wishes.many_transactions) {
        (true, _) => match dump::drop_created(into).await {
            Ok(()) => error.during(format!("restore into {name}, which was made for it and is gone again")),
            Err(why) => {
                let left = format!("restore into {name}, which was made for it and IS LEFT HALF RESTORED");
                error.during(left).hint(format!("drop it: {why}"))
            }
        },
        (false, false) => error.during(format!("restore into {name}, which is as it was: all of it was rolled back")),
        (false, true) => {
            let left = format!("restore into {name}, WHICH IS LEFT HALF RESTORED");
            error.during(left).hint(format!("look through {name}; without --many-transactions nothing would be left"))
        }
    })
}

/// Pieces as a reader; an error of the stream is kept apart.
struct Pieces {
    pieces: mpsc::Receiver<Result<Bytes>>,
    piece: Bytes,
    failed: Option<Error>,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                None => return Ok(0),
                Some(Ok(piece)) => self.piece = piece,
                Some(Err(error)) => {
                    let text = error.to_string();
                    self.failed = Some(error);
                    return Err(io::Error::other(text));
                }
            }
        }
        let length = buffer.len().min(self.piece.len());
        buffer[..length].copy_from_slice(&self.piece[..length]);
        self.piece.advance(length);
        Ok(length)
    }
}
