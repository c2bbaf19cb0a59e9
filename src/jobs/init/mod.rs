//! Create the repository in every region. Running it again finishes what an earlier run began.

use serde::Serialize;

use crate::model::{RegionName, RepositoryId, Result, ResultExt, SignerId};
use crate::repository::escape;
use crate::repository::handle::{RegionRecord, Repository, Writer};
use crate::repository::regions::{Region, Regions};

/// What there is now.
#[derive(Debug, Clone, Serialize)]
pub struct Made {
    /// The repository.
    pub repository: RepositoryId,
    /// Where it is.
    pub regions: Vec<MadeRegion>,
    /// Fingerprint of this machine's signing key, for `signers` and `--trust-signer`.
    pub signer: SignerId,
    /// Who can open what will be written.
    pub key_holders: Vec<String>,
}

/// One region.
#[derive(Debug, Clone, Serialize)]
pub struct MadeRegion {
    /// Its name.
    pub name: RegionName,
    /// Its address.
    pub address: String,
}

/// Creates the repository in all of `regions`, or finishes it.
///
/// # Errors
/// A region cannot be written: no region begins its life in debt.
pub async fn run(regions: &Regions, writer: &Writer, siblings: &[RegionRecord]) -> Result<Made> {
    let made = Repository::init(regions, writer, siblings, &escape::FILES).await;
    let repository = made.during(|| "create the repository")?;
    let place = |region: &Region| MadeRegion { name: region.name.clone(), address: region.store.address() };
    Ok(Made {
        repository,
        regions: regions.all().iter().map(place).collect(),
        signer: writer.signer.id().clone(),
        key_holders: writer.holders.describe(),
    })
}
