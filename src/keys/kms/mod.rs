//! AWS KMS: one key per region, which wraps with Encrypt alone and opens with Decrypt alone.
//!
//! The encryption context is repository, target and keyset, so KMS itself refuses a wrap that was moved, and its audit
//! log says which keyset was opened.

mod access;
mod error;

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use async_trait::async_trait;
use aws_sdk_kms::Client;
use aws_sdk_kms::primitives::Blob;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex;
use zeroize::{Zeroize as _, Zeroizing};

use self::access::client;
pub use self::access::{AwsCredentials, KmsAccess};
use super::keyset::is_bound;
use super::wrap::FORMAT;
use super::{KeyError, KeyHolder, KeyOpener, Wrap, WrapContext};
use crate::model::{HolderId, RegionName};

/// The kind of its wraps.
pub const KIND: &str = "kms";

/// Wraps with the KMS key of one region. It needs `kms:Encrypt` on that key and nothing else.
pub struct KmsHolder {
    id: HolderId,
    region: RegionName,
    key: String,
    aws_region: String,
    client: Client,
}

impl KmsHolder {
    /// Prepares a client for `key`: an ARN, `alias/…` or a key id. Nothing is sent yet: a writer starts while KMS is
    /// down.
    ///
    /// # Errors
    /// [`KeyError::Invalid`] if key and AWS region do not fit.
    pub async fn connect(
        region: &RegionName,
        key: &str,
        aws_region: &str,
        access: &KmsAccess,
    ) -> Result<Self, KeyError> {
        check_aws_region(aws_region)?;
        if let Some(other) = arn_region(key).filter(|other| *other != aws_region) {
            return Err(invalid(format!("the KMS key {key} is in {other}, not in {aws_region}")));
        }
        if key.is_empty() || (key.starts_with("arn:") && arn_region(key).is_none()) {
            return Err(invalid(format!("`{key}` is not a KMS key: use its ARN, alias/<name> or its id")));
        }
        // An alias or a bare id means another key in every account and region; only an ARN names one key for all.
        let identity = if key.starts_with("arn:") { key.to_owned() } else { format!("{region} {aws_region} {key}") };
        let id = HolderId::from_digest(KIND, &Sha256::digest(identity).into());
        let client = client(aws_region, access).await;
        Ok(Self { id, region: region.clone(), key: key.to_owned(), aws_region: aws_region.to_owned(), client })
    }
}

impl fmt::Debug for KmsHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KmsHolder({})", self.describe())
    }
}

fn invalid(reason: String) -> KeyError {
    KeyError::Invalid { reason }
}

/// The SDK builds a host name from the region, and a stored wrap names one: nothing but a label may come through.
fn check_aws_region(region: &str) -> Result<(), KeyError> {
    let label = region.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if label && !region.is_empty() && region.len() <= 40 {
        return Ok(());
    }
    Err(invalid(format!("`{region}` is not the name of an AWS region")))
}

/// The region in `arn:<partition>:kms:<region>:<account>:key/<id>` (or `alias/<name>`).
fn arn_region(arn: &str) -> Option<&str> {
    let parts: Vec<&str> = arn.splitn(6, ':').collect();
    let ["arn", partition, "kms", region, account, resource] = parts[..] else { return None };
    let partition = partition == "aws" || partition.starts_with("aws-");
    let account = account.len() == 12 && account.bytes().all(|byte| byte.is_ascii_digit());
    let resource = resource.starts_with("key/") || resource.starts_with("alias/");
    (partition && account && resource).then_some(region)
}

fn encryption_context(context: &WrapContext) -> HashMap<String, String> {
    let WrapContext { repository, target, keyset } = context;
    [("repository", repository.to_string()), ("target", target.to_string()), ("keyset", keyset.to_string())]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
}

#[async_trait]
impl KeyHolder for KmsHolder {
    fn id(&self) -> &HolderId {
        &self.id
    }

    fn describe(&self) -> String {
        format!("KMS {} {}", self.aws_region, self.key)
    }

    fn region(&self) -> Option<&RegionName> {
        Some(&self.region)
    }

    async fn wrap(&self, context: &WrapContext, secret: &[u8]) -> Result<Wrap, KeyError> {
        if !is_bound(context, secret) {
            return Err(invalid("the secret does not begin with the context of its wrap".to_owned()));
        }
        let call = self.client.encrypt().key_id(&self.key).plaintext(Blob::new(secret));
        let reply = call
            .set_encryption_context(Some(encryption_context(context)))
            .send()
            .await
            .map_err(|error| error::meaning(&self.describe(), error::Call::Wrap, &error))?;
        let broken = |reason: &str| KeyError::Unavailable { holder: self.describe(), reason: reason.to_owned() };
        let ciphertext = reply.ciphertext_blob.ok_or_else(|| broken("its reply holds no ciphertext"))?;
        // An alias moves; the ARN of the key that answered is what must open the wrap in ten years.
        let arn = reply.key_id.ok_or_else(|| broken("its reply names no key"))?;
        if arn_region(&arn) != Some(&self.aws_region) {
            return Err(invalid(format!("{} answered with the key {arn}, in another region", self.describe())));
        }
        Ok(Wrap {
            format: FORMAT,
            kind: KIND.to_owned(),
            holder: self.id.clone(),
            key: arn,
            aws_region: Some(self.aws_region.clone()),
            context: context.clone(),
            ciphertext: STANDARD.encode(ciphertext.as_ref()),
        })
    }
}

/// Opens KMS wraps of any region: the wrap says which. It needs `kms:Decrypt`.
pub struct KmsOpener {
    access: KmsAccess,
    regions: BTreeMap<String, KmsAccess>,
    clients: Mutex<HashMap<String, Client>>,
}

impl KmsOpener {
    /// With one way of access for all AWS regions, and other ways for those in `regions`.
    pub fn new(access: KmsAccess, regions: BTreeMap<String, KmsAccess>) -> Self {
        Self { access, regions, clients: Mutex::default() }
    }

    async fn client(&self, aws_region: &str) -> Client {
        let mut clients = self.clients.lock().await;
        if let Some(known) = clients.get(aws_region) {
            return known.clone();
        }
        let new = client(aws_region, self.regions.get(aws_region).unwrap_or(&self.access)).await;
        clients.insert(aws_region.to_owned(), new.clone());
        new
    }
}

impl fmt::Debug for KmsOpener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KmsOpener")
            .field("access", &self.access)
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl KeyOpener for KmsOpener {
    fn describe(&self) -> String {
        "KMS".to_owned()
    }

    fn fits(&self, wrap: &Wrap) -> bool {
        wrap.kind == KIND
    }

    async fn open(&self, context: &WrapContext, wrap: &Wrap) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        wrap.check_context(context)?;
        let aws_region = arn_region(&wrap.key)
            .filter(|region| wrap.kind == KIND && Some(*region) == wrap.aws_region.as_deref())
            .filter(|region| check_aws_region(region).is_ok())
            .ok_or_else(|| wrap.wrong("its key is not an ARN of its region"))?;
        let sealed = STANDARD.decode(&wrap.ciphertext).map_err(|_| wrap.wrong("its ciphertext is not base64"))?;
        let call = self.client(aws_region).await.decrypt().key_id(&wrap.key).ciphertext_blob(Blob::new(sealed));
        let holder = format!("KMS {aws_region} {}", wrap.key);
        let reply = call
            .set_encryption_context(Some(encryption_context(context)))
            .send()
            .await
            .map_err(|error| error::meaning(&holder, error::Call::Open, &error))?;
        let mut plain = reply.plaintext.map(Blob::into_inner).unwrap_or_default();
        if !is_bound(context, &plain) {
            plain.zeroize();
            return Err(wrap.wrong("its secret is bound to another keyset, target or repository"));
        }
        Ok(Zeroizing::new(plain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARN: &str = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";

    async fn connect(region: &str, key: &str, aws_region: &str) -> Result<KmsHolder, KeyError> {
        KmsHolder::connect(&region.parse().unwrap(), key, aws_region, &KmsAccess::default()).await
    }

    #[tokio::test]
    async fn a_key_in_another_region_is_refused_at_once() {
        connect("eu", ARN, "eu-central-1").await.unwrap();
        connect("eu", &ARN.replace("key/", "alias/"), "eu-central-1").await.unwrap();
        for (key, aws_region) in
            [(ARN, "us-east-1"), ("arn:aws:s3:::bucket", "us-east-1"), ("", "us-east-1"), ("alias/a", "x.evil/")]
        {
            assert!(matches!(connect("eu", key, aws_region).await, Err(KeyError::Invalid { .. })), "{key}");
        }
    }

    #[tokio::test]
    async fn one_alias_in_two_regions_is_two_holders() {
        let alias = connect("eu", "alias/drctl", "eu-central-1").await.unwrap();
        assert_ne!(alias.id(), connect("us", "alias/drctl", "eu-central-1").await.unwrap().id());
        assert_ne!(alias.id(), connect("eu", "alias/drctl", "us-east-1").await.unwrap().id());
        let by_arn = connect("eu", ARN, "eu-central-1").await.unwrap();
        assert_eq!(by_arn.id(), connect("other", ARN, "eu-central-1").await.unwrap().id());
        assert_eq!(alias.describe(), "KMS eu-central-1 alias/drctl");
    }
}
