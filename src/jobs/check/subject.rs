//! What is examined. Nothing here has been opened yet: `check` serves where opening does not work.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use crate::jobs::context::{ScratchPlace, Streamed, Target};
use crate::model::retention::Rules;
use crate::model::{Clock, RegionName, Result, Rng, SignerId, TargetName};
use crate::observe::progress::Progress;
use crate::repository::handle::{RegionRecord, Writer};
use crate::repository::regions::Regions;

/// A machine's whole configuration, as `check` sees it.
#[derive(Debug)]
pub struct Subject {
    /// The regions, with the credentials of a writer.
    pub regions: Regions,
    /// Where the configuration says they are.
    pub addresses: Vec<RegionRecord>,
    /// Regions where one set of credentials serves several roles, and which roles.
    pub shared_roles: Vec<(RegionName, String)>,
    /// The signer and the key holders, or why there are none.
    pub writer: Result<Writer>,
    /// The signers that the configuration trusts.
    pub listed_signers: BTreeSet<SignerId>,
    /// Files with identities that open every backup.
    pub identities: Vec<PathBuf>,
    /// Every file that holds a secret.
    pub secret_files: Vec<PathBuf>,
    /// The clusters that are protected.
    pub targets: Vec<Target>,
    /// What else is protected.
    pub streamed: Vec<Streamed>,
    /// What is kept of each target; absent for those that keep everything.
    pub retention: BTreeMap<TargetName, Rules>,
    /// Caches, locks, the signing key.
    pub state_dir: PathBuf,
    /// Where drills restore to.
    pub scratch: ScratchPlace,
    /// Who looks on.
    pub progress: Progress,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Chance.
    pub rng: Arc<dyn Rng>,
}
