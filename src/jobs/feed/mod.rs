//! The recovery feed: a walsender of this host that serves what the repository holds, byte by byte, and goes on as more is
//! stored. A server that recovers from it needs no space for staged WAL, never takes an interruption for the end of WAL,
//! and follows timeline switches.
//!
//! `way` decides which timelines are served, `stock` up to where, `look` keeps both current, and `serve` speaks with one
//! walreceiver. Whatever is in doubt ends the connection with an error that says why; PostgreSQL then waits and asks again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{RwLock, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::disk::DiskError;
use crate::jobs::context::Context;
use crate::jobs::lineage;
use crate::model::commit::WalNeed;
use crate::model::{Error, Lsn, Result, ResultExt, Rng, Timeline};
use crate::observe::task;
use crate::pg::instance::User;

mod look;
mod serve;
mod stock;
#[cfg(test)]
mod tests;
mod way;

use look::Depth;
pub use stock::End;
use stock::Stock;
pub use way::Way;

/// Part of the socket's name; nothing listens on the network.
pub const PORT: u16 = 5432;
/// What the name of a directory with a feed's socket begins with.
const PLACE: &str = "drctl-feed-";
/// `sun_path` on Linux, less the final zero.
const MAX_SOCKET_PATH: usize = 107;

/// What a feed serves, and to whom.
#[derive(Debug, Clone)]
pub struct Options {
    /// A directory for the socket alone. It is made, and it goes with the feed.
    pub socket_dir: PathBuf,
    /// The account of the server that reads, when drctl is root.
    pub owner: Option<User>,
    /// The cluster, and where its reader stands: timeline, branch, and as `stop_lsn` the position that it has replayed.
    pub origin: WalNeed,
    /// A way that was planned; else whatever descends from the reader's position is followed.
    pub way: Option<Way>,
}

/// Where feed and reader stand.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Whether a walreceiver is connected.
    pub connected: bool,
    /// The timeline that is streamed.
    pub timeline: Option<Timeline>,
    /// Behind the last byte that was given to it.
    pub sent: Option<Lsn>,
    /// What it has on its disk.
    pub flushed: Option<Lsn>,
    /// What it has replayed.
    pub replayed: Option<Lsn>,
    /// The end of all that can be served.
    pub end: Option<End>,
    /// The timeline that is followed; the end is on an older one where WAL between the two is missing.
    pub newest: Option<Timeline>,
    /// When the newest frame of a stream that nobody closed was written, by its writer's clock.
    pub streaming: Option<chrono::DateTime<chrono::Utc>>,
    /// When the oldest WAL that is stored and not replayed was written; `None` when all is replayed.
    pub waiting_since: Option<chrono::DateTime<chrono::Utc>>,
    /// Why the newest WAL may not be seen.
    pub trouble: Option<String>,
    /// WAL that is stored and not given out.
    pub doubt: Option<Doubt>,
    /// Regions that did not answer the last time.
    pub silent: Vec<crate::model::RegionName>,
}

/// Why WAL is not given out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doubt {
    /// From here on.
    pub at: Lsn,
    /// What is wrong with it.
    pub why: String,
}

/// What tasks of a feed share.
#[derive(Debug)]
struct Shared {
    context: Context,
    options: Options,
    /// Where the reader stands by now, with its timeline and branch.
    origin: Mutex<WalNeed>,
    stock: RwLock<Stock>,
    position: Mutex<Position>,
    /// Moves with whatever is new in the stock.
    changed: watch::Sender<u64>,
    /// A hole that the last whole look met: where frames are on their way it is none by the next.
    suspected: Mutex<Option<String>>,
    sight: Mutex<look::Sight>,
    /// One look at a time.
    looking: tokio::sync::Mutex<()>,
}

/// A feed at work; it ends when it is dropped.
#[derive(Debug)]
pub struct Feed {
    shared: Arc<Shared>,
    _serving: AbortOnDropHandle<()>,
    _looking: AbortOnDropHandle<()>,
}

impl Feed {
    /// Looks at what is stored, and listens.
    ///
    /// # Errors
    /// No region answers, or the socket cannot be made.
    pub async fn open(context: &Context, options: Options) -> Result<Self> {
        let histories = lineage::histories(&context.repository, &options.origin, &[]).await;
        let histories = histories.during(|| "read the timeline histories")?;
        let way = match &options.way {
            Some(way) => way.clone(),
            None => Way::newest(&histories, &options.origin)?,
        };
        let stock = Stock { way, histories, shelves: BTreeMap::new() };
        let (changed, _) = watch::channel(0);
        let shared = Arc::new(Shared {
            context: context.clone(),
            stock: RwLock::new(stock),
            position: Mutex::default(),
            changed,
            suspected: Mutex::default(),
            sight: Mutex::default(),
            looking: tokio::sync::Mutex::default(),
            origin: Mutex::new(options.origin.clone()),
            options,
        });
        shared.look(Depth::New).await.during(|| "look at the stored WAL")?;
        let listener = listen(&shared.options)?;
        let serving = task::spawn("feed", serve_all(Arc::clone(&shared), listener));
        let looking = task::spawn("feed-look", look::keep_looking(Arc::clone(&shared)));
        let (_serving, _looking) = (AbortOnDropHandle::new(serving), AbortOnDropHandle::new(looking));
        Ok(Self { shared, _serving, _looking })
    }

    /// Where everything stands.
    pub fn position(&self) -> Position {
        self.shared.position().clone()
    }

    /// Looks into every region now, for everything that is new.
    ///
    /// # Errors
    /// No region answers, or the way is in doubt.
    pub async fn look(&self) -> Result<()> {
        self.shared.look(Depth::New).await
    }

    /// Lists every region now, whatever is known.
    ///
    /// # Errors
    /// As [`Self::look`].
    pub async fn look_anew(&self) -> Result<()> {
        self.shared.look(Depth::All).await
    }

    /// Grows whenever something that was not known is seen, whether it can be served or not.
    pub fn growth(&self) -> u64 {
        *self.shared.changed.borrow()
    }

    /// What lies behind the end, also if it was met by one look alone; see [`Position::trouble`].
    pub async fn hole(&self) -> Option<String> {
        let end = self.position().end?;
        self.shared.stock.read().await.hole(&end)
    }

    /// The history files of the cluster that are stored: a server that is promoted must find the numbers of all of them
    /// taken.
    pub async fn histories(&self) -> Vec<lineage::StoredHistory> {
        self.shared.stock.read().await.histories.clone()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        remove(&self.shared.options.socket_dir);
    }
}

impl Shared {
    fn position(&self) -> MutexGuard<'_, Position> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the reader stands by now.
    fn origin(&self) -> WalNeed {
        self.origin.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Follows the reader: what descends from where it stood once need not descend from where it stands.
    fn move_origin(&self, way: &Way) {
        let Position { timeline, replayed, .. } = *self.position();
        let Some((timeline, replayed)) = timeline.zip(replayed) else { return };
        let mut origin = self.origin.lock().unwrap_or_else(PoisonError::into_inner);
        match way.branches.get(&timeline) {
            Some(branch) if timeline > origin.timeline => {
                (origin.timeline, origin.branch, origin.stop_lsn) = (timeline, branch.clone(), replayed);
            }
            _ if timeline == origin.timeline => origin.stop_lsn = origin.stop_lsn.max(replayed),
            _ => {}
        }
    }
}

/// The value of `primary_conninfo` for a server that reads from the feed in `socket_dir`. Every word that a server's
/// environment could set otherwise is said.
pub fn conninfo(socket_dir: &Path, application: &str) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
    let host = quoted(&socket_dir.display().to_string());
    format!(
        "host={host} port={PORT} user=drctl dbname=replication application_name={} sslmode=disable gssencmode=disable \
         channel_binding=disable target_session_attrs=any connect_timeout=30",
        quoted(application)
    )
}

/// The socket of a feed in this directory.
fn socket(socket_dir: &Path) -> PathBuf {
    socket_dir.join(format!(".s.PGSQL.{PORT}"))
}

/// A place for a feed's socket below a data directory, with a name that nobody guesses.
///
/// # Errors
/// Its path would be too long, or there is no randomness.
pub fn place_in(directory: &Path, rng: &dyn Rng) -> Result<PathBuf> {
    let mut bytes = [0; 4];
    rng.fill(&mut bytes)?;
    let place = directory.join(format!("{PLACE}{}", hex::encode(bytes)));
    check_place(&place).map(|()| place)
}

/// Whether that is how [`place_in`] names a place in this directory.
pub fn is_place_in(directory: &Path, place: &Path) -> bool {
    let name = place.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix(PLACE));
    let is_named = name.is_some_and(|name| name.len() == 8 && name.bytes().all(|byte| byte.is_ascii_hexdigit()));
    is_named && *place == directory.join(place.file_name().unwrap_or_default())
}

/// Refuses a directory below which no socket fits.
fn check_place(socket_dir: &Path) -> Result<()> {
    if socket(socket_dir).as_os_str().len() <= MAX_SOCKET_PATH {
        return Ok(());
    }
    let error = Error::refused(format!("{} is too long for a socket", socket_dir.display()));
    Err(error.hint("a socket's path has at most 107 bytes: use a shorter directory"))
}

/// Only the reader's account reaches the socket; that account could read all of the cluster anyway. The directory stays this
/// account's: it lies among files of the other one, which could put anything in place of what is there, and therefore is
/// looked at and used by a handle.
fn listen(Options { socket_dir, owner, .. }: &Options) -> Result<UnixListener> {
    check_place(socket_dir)?;
    remove(socket_dir);
    let io = |what, path: &Path| {
        let path = path.to_owned();
        move |error| Error::from(DiskError::new(what, &path, error))
    };
    match std::fs::DirBuilder::new().mode(0o700).create(socket_dir) {
        // Of a feed that was killed.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        made => made.map_err(io("create", socket_dir))?,
    }
    let place = only_ours(socket_dir)?;
    let inside = PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
    let path = socket(&inside);
    if let Err(error) = std::fs::remove_file(&path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(io("remove", &socket(socket_dir))(error));
    }
    let listener = UnixListener::bind(&path).map_err(io("listen on", &socket(socket_dir)))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .map_err(io("protect", &socket(socket_dir)))?;
    let mode = if owner.is_some() { 0o755 } else { 0o700 };
    place.set_permissions(std::fs::Permissions::from_mode(mode)).map_err(io("protect", socket_dir))?;
    if let Some(User { uid, gid }) = *owner {
        lchown(&path, Some(uid), Some(gid)).map_err(io("chown", &socket(socket_dir)))?;
    }
    Ok(listener)
}

/// A directory of this account; no link.
fn only_ours(directory: &Path) -> Result<File> {
    let io = |error| DiskError::new("open", directory, error);
    let flags = (OFlags::NOFOLLOW | OFlags::DIRECTORY).bits().cast_signed();
    let place = OpenOptions::new().read(true).custom_flags(flags).open(directory).map_err(io)?;
    if place.metadata().map_err(io)?.uid() == rustix::process::geteuid().as_raw() {
        return Ok(place);
    }
    let error = Error::refused(format!("{} belongs to another account", directory.display()));
    Err(error.hint("remove it"))
}

/// Removes the socket that an earlier feed left, and its directory, if nothing else is in it.
pub fn remove(socket_dir: &Path) {
    let gone = std::fs::remove_file(socket(socket_dir)).and_then(|()| std::fs::remove_dir(socket_dir));
    if let Err(error) = gone.map_err(|error| error.kind())
        && error != std::io::ErrorKind::NotFound
    {
        tracing::debug!(%error, path = %socket_dir.display(), "the feed's socket is not removed");
    }
}

async fn serve_all(shared: Arc<Shared>, listener: UnixListener) {
    let mut sessions = FuturesUnordered::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if shared.admits(&stream) => sessions.push(serve::serve(Arc::clone(&shared), stream)),
                Ok(_) => tracing::warn!("somebody else's process asked the feed"),
                Err(error) => {
                    tracing::warn!(%error, "the feed cannot accept a connection");
                    tokio::time::sleep(look::POLL).await;
                }
            },
            Some(()) = sessions.next() => {}
        }
    }
}

impl Shared {
    /// The reader's account, this one, and root.
    fn admits(&self, stream: &UnixStream) -> bool {
        let own = [0, rustix::process::geteuid().as_raw()];
        let owner = self.options.owner.map(|owner| owner.uid);
        stream.peer_cred().is_ok_and(|peer| own.contains(&peer.uid()) || owner == Some(peer.uid()))
    }
}
