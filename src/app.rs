//! The composition root: from settings to the hands of a job. The one place that knows every adapter, and the one
//! function that stacks the wrappers around a store.

use std::ffi::OsString;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;

use futures::future::{Either, select};

use crate::codec::random::SystemRng;
use crate::config::{Drill, Settings};
use crate::disk::place;
use crate::jobs::check::Subject;
use crate::jobs::{Context, Levels, ScratchPlace};
use crate::model::{Clock, Error, Result, ResultExt, Rng};
use crate::notify::Courier;
use crate::observe::clock::SystemClock;
use crate::observe::metrics::Meters;
use crate::observe::progress::Progress;
use crate::pg::instance::beside;
use crate::repository::handle::{Repository, Writer};
use crate::repository::keysets::KeyRing;
use crate::repository::regions::Regions;

mod away;
mod keys;
mod retention;
mod stores;
mod targets;
mod told;

pub use away::drill_context;
use keys::openers;
pub use keys::{holders, new_recovery_key, writer};
use retention::{limits, rules};
use stores::shared_roles;
pub use stores::{create_directories, region, regions, siblings};
use targets::streamed;
pub use targets::targets;
pub use told::{dead_man, notifiers, willing_notifiers};

/// On whose behalf stores and keys are used; each has credentials of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Backup, WAL, repair, init.
    Write,
    /// Restore, verify, list.
    Restore,
    /// Prune: the only one that deletes.
    Prune,
}

/// What a process has once: the real clock, the real source of chance, its meters, and whom it tells.
#[derive(Debug, Clone)]
pub struct World {
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Chance.
    pub rng: Arc<dyn Rng>,
    /// What it counts.
    pub meters: Arc<Meters>,
    /// Whom it tells.
    pub courier: Courier,
}

impl World {
    /// The world outside of simulations.
    pub fn real() -> Self {
        Self {
            clock: Arc::new(SystemClock::default()),
            rng: Arc::new(SystemRng),
            meters: Arc::default(),
            courier: Courier::default(),
        }
    }
}

/// Opens the repository and everything around it.
///
/// # Errors
/// The settings do not fit together, or no region answers. A region or key holder that is down is not an error here.
pub async fn context(settings: &Settings, role: Role, world: &World) -> Result<Context> {
    let regions = regions(settings, role, world).await?;
    open(settings, regions, role, world).await
}

async fn open(settings: &Settings, regions: Regions, role: Role, world: &World) -> Result<Context> {
    let listed = settings.repository.signers.iter().cloned().collect();
    let repository = Repository::open(regions, listed).await.during(|| "open the repository")?;
    away::remember(&settings.repository.state_dir, &repository.id);
    let writer = match role {
        Role::Write | Role::Prune => Some(writer(settings, role, world).await?),
        Role::Restore => None,
    };
    assemble(settings, repository, writer, world)
}

/// Connections that a restore makes while the repository is opened.
const CONNECTIONS: usize = 8;

/// The same for a restore, which is going to ask every region for much at the same time.
///
/// # Errors
/// As [`context`].
pub async fn restore_context(settings: &Settings, world: &World) -> Result<Context> {
    let regions = regions(settings, Role::Restore, world).await?;
    let connecting = regions.clone();
    let opening = pin!(open(settings, regions, Role::Restore, world));
    // What is opened does not wait for connections.
    match select(opening, pin!(connecting.connect(CONNECTIONS))).await {
        Either::Left((opened, _)) => opened,
        Either::Right(((), opening)) => opening.await,
    }
}

fn assemble(settings: &Settings, repository: Repository, writer: Option<Writer>, world: &World) -> Result<Context> {
    let openers = openers(settings, world)?;
    let ring = KeyRing::new(repository.id.clone(), repository.regions.clone(), openers);
    Ok(Context {
        ring: Arc::new(ring),
        repository,
        writer,
        targets: targets(settings)?,
        streamed: streamed(settings)?,
        retention: settings.targets.iter().filter_map(rules).collect(),
        prune: limits(settings),
        levels: levels(settings),
        pack_size: settings.repository.pack_size,
        state_dir: settings.repository.state_dir.clone(),
        scratch: scratch_place(settings),
        guests: settings.daemon.allow.clone(),
        progress: Progress::new(Arc::clone(&world.clock)),
        meters: Arc::clone(&world.meters),
        courier: world.courier.clone(),
        clock: Arc::clone(&world.clock),
        rng: Arc::clone(&world.rng),
    })
}

/// Writes a first configuration, durably; a file that exists stays.
///
/// # Errors
/// The file exists or cannot be written.
pub fn write_new(path: &Path, text: &str) -> Result<()> {
    Ok(place::place_new(path, text.as_bytes(), 0o644)?)
}

/// What `check` examines: nothing is opened, since it serves where opening does not work.
///
/// # Errors
/// The settings contradict themselves.
pub async fn subject(settings: &Settings, world: &World) -> Result<Subject> {
    let configured = settings.keys.iter().filter_map(|key| key.identity.as_ref());
    let identities = settings.openers.age_identities.iter().chain(configured);
    Ok(Subject {
        regions: regions(settings, Role::Write, world).await?,
        addresses: siblings(settings),
        shared_roles: settings.regions.iter().filter_map(shared_roles).collect(),
        writer: writer(settings, Role::Write, world).await,
        listed_signers: settings.repository.signers.iter().cloned().collect(),
        identities: identities.filter_map(|secret| secret.file()).map(Path::to_owned).collect(),
        secret_files: settings.secrets().filter_map(|secret| secret.file()).map(Path::to_owned).collect(),
        targets: targets(settings)?,
        streamed: streamed(settings)?,
        retention: settings.targets.iter().filter_map(rules).collect(),
        state_dir: settings.repository.state_dir.clone(),
        scratch: scratch_place(settings),
        progress: Progress::new(Arc::clone(&world.clock)),
        clock: Arc::clone(&world.clock),
        rng: Arc::clone(&world.rng),
    })
}

/// Writes a file anew, as a whole: whoever reads it meets the old one or the new one.
///
/// # Errors
/// The file cannot be written.
pub fn replace(path: &Path, text: &str) -> Result<()> {
    Ok(place::place(path, text.as_bytes(), 0o644)?)
}

/// The word with which drctl starts itself to become another program that ends with it.
pub const WITH_PARENT: &str = beside::VERB;

/// Becomes the program that stands behind [`WITH_PARENT`]; returns only if that fails.
pub fn become_program(words: &[OsString]) -> Error {
    Error::failed("the program cannot be started").because(beside::become_it(words))
}

/// The machine's name, for provenance.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn levels(settings: &Settings) -> Levels {
    let levels = &settings.repository.compression_level;
    Levels { pages: levels.pages, dumps: levels.dumps, wal: levels.wal }
}

fn scratch_place(settings: &Settings) -> ScratchPlace {
    let Drill { dir, run_as, preload } = settings.drill.clone();
    ScratchPlace { directory: dir, run_as, preload }
}
