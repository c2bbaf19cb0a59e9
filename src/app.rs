//! The composition root: from settings to the hands of a job. The one place that knows every adapter, and the one
//! function that stacks the wrappers around a store.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;

use crate::codec::random::SystemRng;
use crate::codec::sign::Signer;
use crate::config::{
    self, Assertion, AwsAccess, Checksum, Drill, DumpTarget, FilesTarget, Method, OnPressure, PostgresTarget,
    Region as RegionSettings, S3Settings, Secret, Settings, Source, Store, Target as TargetSettings,
};
use crate::disk::place;
use crate::jobs::check::Subject;
use crate::jobs::{self, Context, Levels, Objectives, ScratchPlace, Streamed, Target, What};
use crate::keys::{
    AgeHolder, AgeOpener, AwsCredentials, KeyHolder, KeyOpener, KmsAccess, KmsHolder, KmsOpener, Metered,
    generate_identity,
};
use crate::model::retention::Rules;
use crate::model::{Clock, Error, RegionName, Result, ResultExt, Rng, TargetName};
use crate::notify::Courier;
use crate::observe::clock::SystemClock;
use crate::observe::metrics::Meters;
use crate::observe::progress::Progress;
use crate::pg::conninfo::ConnInfo;
use crate::repository::handle::{RegionRecord, Repository, Writer};
use crate::repository::keysets::{Holders, KeyRing};
use crate::repository::prune::Limits;
use crate::repository::regions::{Region, Regions};
use crate::source::{dump, files, postgres};
use crate::store::absent::AbsentStore;
use crate::store::dir::DirStore;
use crate::store::s3::{S3Checksum, S3Credentials, S3Options, S3Store};
use crate::store::wrap::meter::Meter;
use crate::store::wrap::retry::{Retry, RetryPolicy};
use crate::store::{ObjectStore, StoreError};

mod told;

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
    let listed = settings.repository.signers.iter().cloned().collect();
    let repository = Repository::open(regions, listed).await.during(|| "open the repository")?;
    let openers = openers(settings, world)?;
    let ring = KeyRing::new(repository.id.clone(), repository.regions.clone(), openers);
    let writer = match role {
        Role::Write | Role::Prune => Some(writer(settings, role, world).await?),
        Role::Restore => None,
    };
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

/// All regions; one that cannot be opened stands in its place and says why.
///
/// # Errors
/// The settings contradict themselves.
pub async fn regions(settings: &Settings, role: Role, world: &World) -> Result<Regions> {
    let mut list = Vec::new();
    for region in &settings.regions {
        list.push(self::region(settings, region, role, world).await?);
    }
    let repository = &settings.repository;
    let regions = Regions::new(list, repository.write_quorum, repository.lowest_quorum())?;
    Ok(regions.detached_after(repository.detach_after))
}

/// One region of `settings`; if it cannot be opened, one stands in its place that says why.
///
/// # Errors
/// The settings contradict themselves.
pub async fn region(settings: &Settings, region: &RegionSettings, role: Role, world: &World) -> Result<Region> {
    let store = match connect(region, role, world).await? {
        Ok(store) => stacked(store, (&region.name, settings.regions.len()), world),
        Err(error) => Arc::new(AbsentStore::new(region.place().to_string(), &error)),
    };
    Ok(Region { name: region.name.clone(), store })
}

/// The wrappers around a store, in their order.
fn stacked(store: Arc<dyn ObjectStore>, (name, regions): (&RegionName, usize), world: &World) -> Arc<dyn ObjectStore> {
    // With several regions the next one is asked sooner than the same one a third time; alone, patience is all there is.
    let policy = match regions {
        1 => RetryPolicy::default(),
        _ => RetryPolicy { attempts: 2, deadline: Duration::from_secs(30), ..RetryPolicy::default() },
    };
    let (meters, clock) = (Arc::clone(&world.meters), Arc::clone(&world.clock));
    let store = Arc::new(Meter::new(store, name.to_string(), meters, clock));
    Arc::new(Retry::new(store, policy, Arc::clone(&world.rng)))
}

/// One store: configuration errors are outside, a store that does not open is inside.
async fn connect(
    region: &RegionSettings,
    role: Role,
    world: &World,
) -> Result<Result<Arc<dyn ObjectStore>, StoreError>> {
    Ok(match &region.store {
        Store::Directory { path } => DirStore::open(path).await.map(|store| Arc::new(store) as Arc<dyn ObjectStore>),
        Store::S3(s3) => {
            let (clock, rng) = (Arc::clone(&world.clock), Arc::clone(&world.rng));
            let store = S3Store::connect(s3_options(s3, role)?, clock, rng).await;
            store.map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
    })
}

/// Makes the directories of directory regions; buckets must exist.
///
/// # Errors
/// A directory cannot be made.
pub async fn create_directories(settings: &Settings) -> Result<()> {
    for region in &settings.regions {
        if let Store::Directory { path } = &region.store {
            DirStore::create(path).await.map_err(Error::from).during(|| format!("create region {}", region.name))?;
        }
    }
    Ok(())
}

/// Writes a first configuration, durably; a file that exists stays.
///
/// # Errors
/// The file exists or cannot be written.
pub fn write_new(path: &Path, text: &str) -> Result<()> {
    Ok(place::place_new(path, text.as_bytes(), 0o644)?)
}

/// The regions' addresses, which every region stores.
pub fn siblings(settings: &Settings) -> Vec<RegionRecord> {
    let record = |region: &RegionSettings| {
        let (endpoint, aws_region, path_style) = match &region.store {
            Store::S3(s3) => (s3.endpoint.clone(), s3.aws_region.clone(), s3.path_style),
            Store::Directory { .. } => (None, None, false),
        };
        RegionRecord { name: region.name.clone(), url: region.place().to_string(), endpoint, aws_region, path_style }
    };
    settings.regions.iter().map(record).collect()
}

/// Signer and key holders of this machine.
///
/// # Errors
/// The signer's key cannot be read or made, or a key holder is not usable as configured.
pub async fn writer(settings: &Settings, role: Role, world: &World) -> Result<Writer> {
    let signer = signer(&settings.repository.state_dir, world.rng.as_ref())?;
    let holders = holders(settings, role, world).await?;
    let (clock, rng) = (Arc::clone(&world.clock), Arc::clone(&world.rng));
    Ok(Writer { signer: Arc::new(signer), holders, clock, rng, host: host_name() })
}

/// Everyone who is to wrap keysets, asked on behalf of `role`.
///
/// # Errors
/// A key holder is not usable as configured.
pub async fn holders(settings: &Settings, role: Role, world: &World) -> Result<Holders> {
    let mut list: Vec<Arc<dyn KeyHolder>> = Vec::new();
    for region in &settings.regions {
        if let Some(kms) = &region.kms {
            let access = KmsAccess { endpoint: kms.endpoint.clone(), ..kms_access(region, role)? };
            let holder = KmsHolder::connect(&region.name, &kms.key, &kms.aws_region, &access).await?;
            let holder: Arc<dyn KeyHolder> = Arc::new(holder);
            list.push(Arc::new(Metered::new(holder, Arc::clone(&world.meters))));
        }
    }
    for key in &settings.keys {
        list.push(Arc::new(AgeHolder::new(&key.recipient)?));
    }
    Ok(Holders { list, min_wraps: settings.repository.min_wraps })
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
        state_dir: settings.repository.state_dir.clone(),
        scratch: scratch_place(settings),
        clock: Arc::clone(&world.clock),
        rng: Arc::clone(&world.rng),
    })
}

/// The roles beside `write` that its credentials serve as well.
fn shared_roles(region: &RegionSettings) -> Option<(RegionName, String)> {
    let Store::S3(s3) = &region.store else { return None };
    let others = [("restore", &s3.credentials.restore), ("prune", &s3.credentials.prune)];
    let shared: Vec<_> =
        others.into_iter().filter(|(_, access)| **access == s3.credentials.write).map(|(role, _)| role).collect();
    let roles = ["write"].into_iter().chain(shared.iter().copied()).collect::<Vec<_>>().join(" and ");
    (!shared.is_empty()).then(|| (region.name.clone(), roles))
}

/// Writes a new age identity to `path`, for its owner only, and answers the recipient.
///
/// # Errors
/// The file exists already or cannot be written.
pub fn new_recovery_key(path: &Path, world: &World) -> Result<String> {
    let (identity, recipient) = generate_identity(world.clock.now());
    place::place_new(path, identity.as_bytes(), 0o600)?;
    Ok(recipient)
}

/// Writes a file anew, as a whole: whoever reads it meets the old one or the new one.
///
/// # Errors
/// The file cannot be written.
pub fn replace(path: &Path, text: &str) -> Result<()> {
    Ok(place::place(path, text.as_bytes(), 0o644)?)
}

/// The machine's name, for provenance.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The signing key is made on first use and stays in the state directory. Losing it costs an enrolment, not a backup.
fn signer(state_dir: &Path, rng: &dyn Rng) -> Result<Signer> {
    use std::os::unix::fs::DirBuilderExt;
    let path = state_dir.join("signer.p8");
    match std::fs::read(&path) {
        Ok(bytes) => {
            return Signer::from_pkcs8(&bytes).map_err(Error::from).during(|| format!("read {}", path.display()));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::failed(format!("read {}", path.display())).because(error)),
    }
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir);
    made.map_err(|error| {
        let error = Error::failed(format!("create the state directory {}", state_dir.display())).because(error);
        error.hint("set [repository] state_dir to a directory that drctl may write")
    })?;
    let signer = Signer::generate(rng)?;
    match place::place_new(&path, &signer.to_pkcs8()?, 0o600) {
        Ok(()) => Ok(signer),
        // Another process made one at the same moment: that one counts.
        Err(error) => match std::fs::read(&path) {
            Ok(bytes) => Ok(Signer::from_pkcs8(&bytes)?),
            Err(_) => Err(error.into()),
        },
    }
}

/// Everyone who may open keysets here.
fn openers(settings: &Settings, world: &World) -> Result<Vec<Arc<dyn KeyOpener>>> {
    let mut openers: Vec<Arc<dyn KeyOpener>> = Vec::new();
    let configured = settings.keys.iter().filter_map(|key| key.identity.as_ref());
    let files: Vec<_> =
        settings.openers.age_identities.iter().chain(configured).filter_map(|secret| secret.file()).collect();
    let mut by_region = BTreeMap::new();
    for region in &settings.regions {
        if let Some(kms) = &region.kms {
            let access = KmsAccess { endpoint: kms.endpoint.clone(), ..kms_access(region, Role::Restore)? };
            by_region.insert(kms.aws_region.clone(), access);
        }
    }
    for endpoint in &settings.openers.kms_endpoints {
        let known: &mut KmsAccess = by_region.entry(endpoint.aws_region.clone()).or_default();
        known.endpoint = Some(endpoint.endpoint.clone());
    }
    let kms: Arc<dyn KeyOpener> = Arc::new(KmsOpener::new(KmsAccess::default(), by_region));
    openers.push(Arc::new(Metered::new(kms, Arc::clone(&world.meters))));
    for file in files {
        // An identity that was moved away, as it should be, is no reason to refuse the KMS.
        match AgeOpener::from_files(&[file.to_owned()]) {
            Ok(opener) => openers.push(Arc::new(opener)),
            Err(error) if file.exists() => return Err(error.into()),
            Err(error) => tracing::info!(%error, "offline identity is not here"),
        }
    }
    Ok(openers)
}

fn kms_access(region: &RegionSettings, role: Role) -> Result<KmsAccess> {
    let credentials = match &region.store {
        Store::S3(s3) => match resolve(access_of(s3, role))? {
            None => AwsCredentials::Chain,
            Some(S3Credentials::Profile(name)) => AwsCredentials::Profile(name),
            Some(S3Credentials::Static { access_key_id, secret_access_key, session_token }) => {
                AwsCredentials::Static { access_key_id, secret_access_key, session_token }
            }
        },
        Store::Directory { .. } => AwsCredentials::Chain,
    };
    Ok(KmsAccess { credentials, ..KmsAccess::default() })
}

fn s3_options(s3: &S3Settings, role: Role) -> Result<S3Options> {
    let checksum = match s3.checksum {
        Checksum::WhenSupported => S3Checksum::WhenSupported,
        Checksum::WhenRequired => S3Checksum::WhenRequired,
    };
    Ok(S3Options {
        prefix: s3.bucket.prefix.clone(),
        endpoint: s3.endpoint.clone(),
        region: s3.aws_region.clone(),
        path_style: s3.path_style,
        credentials: resolve(access_of(s3, role))?,
        checksum,
        attempt_timeout: s3.timeout,
        single_writer: s3.single_writer,
        ..S3Options::new(s3.bucket.bucket.clone())
    })
}

const fn access_of(s3: &S3Settings, role: Role) -> &AwsAccess {
    match role {
        Role::Write => &s3.credentials.write,
        Role::Restore => &s3.credentials.restore,
        Role::Prune => &s3.credentials.prune,
    }
}

fn resolve(access: &AwsAccess) -> Result<Option<S3Credentials>> {
    Ok(match access {
        AwsAccess::Chain => None,
        AwsAccess::Profile { profile } => Some(S3Credentials::Profile(profile.clone())),
        AwsAccess::Keys { access_key_id, secret_access_key, session_token } => Some(S3Credentials::Static {
            access_key_id: access_key_id.read()?.expose().to_owned(),
            secret_access_key: secret_access_key.read()?.expose().to_owned(),
            session_token: session_token
                .as_ref()
                .map(|token| token.read())
                .transpose()?
                .map(|text| text.expose().to_owned()),
        }),
    })
}

fn rules(target: &TargetSettings) -> Option<(TargetName, Rules)> {
    let kept = target.retention.as_ref()?;
    let span = |duration: Option<Duration>| duration.and_then(|duration| TimeDelta::from_std(duration).ok());
    let rules = Rules {
        last: kept.keep_last,
        daily: kept.keep_daily,
        weekly: kept.keep_weekly,
        monthly: kept.keep_monthly,
        yearly: kept.keep_yearly,
        within: span(kept.keep_within),
        wal: span(kept.wal_keep),
        timezone: kept.zone(),
        undrilled: kept.count_undrilled,
    };
    Some((target.name.clone(), rules))
}

fn limits(settings: &Settings) -> Limits {
    let config::Prune { grace, max_objects, max_bytes, max_share } = settings.prune;
    let grace = TimeDelta::from_std(grace).unwrap_or(TimeDelta::MAX);
    Limits { grace, objects: max_objects, bytes: max_bytes, percent: max_share }
}

fn levels(settings: &Settings) -> Levels {
    let levels = &settings.repository.compression_level;
    Levels { pages: levels.pages, dumps: levels.dumps, wal: levels.wal }
}

fn conninfo(name: &TargetName, text: &str, password: Option<&Secret>) -> Result<ConnInfo> {
    let conninfo = ConnInfo::from_text(text).map_err(Error::from).during(|| format!("target {name}"))?;
    Ok(match password {
        Some(password) => conninfo.with_password(password.read()?.expose()),
        None => conninfo,
    })
}

fn objectives(target: &TargetSettings) -> Objectives {
    let config::Objectives { rpo, rto_restore, rto_failover } = target.objectives;
    Objectives { rpo, rto_restore, rto_failover }
}

/// The targets that are read as streams.
fn streamed(settings: &Settings) -> Result<Vec<Streamed>> {
    let mut list = Vec::new();
    for target in &settings.targets {
        let what = match &target.source {
            Source::Postgres(_) => continue,
            Source::Dump(options) => What::Dump(Box::new(dump_options(&target.name, options)?)),
            Source::Files(FilesTarget { roots, include, exclude }) => {
                What::Files(files::Options { roots: roots.clone(), include: include.clone(), exclude: exclude.clone() })
            }
        };
        list.push(Streamed { name: target.name.clone(), objectives: objectives(target), what });
    }
    Ok(list)
}

fn dump_options(name: &TargetName, target: &DumpTarget) -> Result<dump::Options> {
    let scope = dump::Scope {
        schemas: target.schemas.clone(),
        exclude_schemas: target.exclude_schemas.clone(),
        tables: target.tables.clone(),
        exclude_tables: target.exclude_tables.clone(),
        exclude_table_data: target.exclude_table_data.clone(),
    };
    Ok(dump::Options {
        conninfo: conninfo(name, &target.conninfo, target.password.as_ref())?,
        databases: target.databases.clone(),
        globals: target.globals,
        bin_dir: target.bin_dir.clone(),
        scope,
        lock_wait: target.lock_wait_timeout,
    })
}

/// The clusters that the configuration protects.
///
/// # Errors
/// A connection string cannot be understood, or a password not be read.
pub fn targets(settings: &Settings) -> Result<Vec<Target>> {
    let target = |target: &TargetSettings| {
        let Source::Postgres(pg) = &target.source else { return None };
        Some(cluster(target, pg))
    };
    settings.targets.iter().filter_map(target).collect()
}

fn cluster(target: &TargetSettings, pg: &PostgresTarget) -> Result<Target> {
    let conninfo = conninfo(&target.name, &pg.conninfo, pg.password.as_ref())?;
    let method = match pg.method {
        Method::Local => postgres::Method::Local,
        Method::Stream => postgres::Method::Stream,
        Method::Auto => postgres::Method::Auto,
    };
    let standby = match &pg.standby {
        None => None,
        Some(text) => Some(postgres::Lender {
            conninfo: self::conninfo(&target.name, text, pg.password.as_ref())?,
            patience: pg.standby_patience,
        }),
    };
    let on_pressure = pg.on_pressure.as_ref().map(|policy| match policy {
        OnPressure::Keep => "keep".to_owned(),
        OnPressure::DropSlot => "drop-slot".to_owned(),
    });
    Ok(Target {
        name: target.name.clone(),
        objectives: objectives(target),
        conninfo,
        method,
        data_dir: pg.data_dir.clone(),
        standby,
        slot: pg.slot.clone(),
        ship_interval: pg.ship_interval,
        max_read_rate: pg.max_read_rate,
        on_pressure,
        wal_disk_bytes: pg.wal_disk_bytes,
        stream: pg.stream,
        heartbeat: pg.heartbeat,
        control_socket: pg.control_socket.clone(),
        config_files: pg.config_files.clone(),
        heartbeat_database: pg.heartbeat_database.clone(),
        assertions: target.assertions.iter().map(assertion).collect(),
    })
}

fn scratch_place(settings: &Settings) -> ScratchPlace {
    let Drill { dir, run_as, preload } = settings.drill.clone();
    ScratchPlace { directory: dir, run_as, preload }
}

fn assertion(assertion: &Assertion) -> jobs::Assertion {
    let Assertion { name, sql, expect, database, control } = assertion.clone();
    jobs::Assertion { name, sql, expect, database, control }
}
