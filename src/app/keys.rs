//! Keys: who signs, who wraps keysets, and who may open them here.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::app::stores::{access_of, resolve};
use crate::app::{Role, World, host_name};
use crate::codec::sign::Signer;
use crate::config::{Region as RegionSettings, Settings, Store};
use crate::disk::place;
use crate::keys::{
    AgeHolder, AgeOpener, AwsCredentials, KeyHolder, KeyOpener, KmsAccess, KmsHolder, KmsOpener, Metered,
    generate_identity,
};
use crate::model::{Error, Result, ResultExt, Rng};
use crate::repository::handle::Writer;
use crate::repository::keysets::Holders;
use crate::store::s3::S3Credentials;

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

/// Writes a new age identity to `path`, for its owner only, and answers the recipient.
///
/// # Errors
/// The file exists already or cannot be written.
pub fn new_recovery_key(path: &Path, world: &World) -> Result<String> {
    let (identity, recipient) = generate_identity(world.clock.now());
    place::place_new(path, identity.as_bytes(), 0o600)?;
    Ok(recipient)
}

/// The signing key is made on first use and stays in the state directory. Losing it costs an enrolment, not a backup.
pub(super) fn signer(state_dir: &Path, rng: &dyn Rng) -> Result<Signer> {
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
pub(super) fn openers(settings: &Settings, world: &World) -> Result<Vec<Arc<dyn KeyOpener>>> {
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

pub(super) fn kms_access(region: &RegionSettings, role: Role) -> Result<KmsAccess> {
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
