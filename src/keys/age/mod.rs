//! age: recipients whose identity lies offline, in a safe or on a token's paper copy.
//!
//! A wrap's ciphertext is a binary age file in base64, so `jq -r .ciphertext | base64 -d | age -d -i FILE` opens it
//! without drctl. Only X25519 recipients (`age1…`) are taken.

mod identity;

use std::fmt;
use std::io::Read as _;
use std::path::PathBuf;

use ::age::x25519;
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use self::identity::OwnIdentity;
pub use self::identity::generate_identity;
use super::keyset::is_bound;
use super::wrap::FORMAT;
use super::{KeyError, KeyHolder, KeyOpener, Wrap, WrapContext};
use crate::model::{HolderId, RegionName};

/// The kind of its wraps.
pub const KIND: &str = "age";
/// As the seam promises for every holder.
const MAX_SECRET: usize = 4096;

/// Wraps to one recipient. It reaches nobody and cannot be down.
#[derive(Debug, Clone)]
pub struct AgeHolder {
    id: HolderId,
    recipient: x25519::Recipient,
}

impl AgeHolder {
    /// From a recipient, `age1…`.
    ///
    /// # Errors
    /// [`KeyError::Invalid`] for anything else.
    pub fn new(recipient: &str) -> Result<Self, KeyError> {
        let parsed: x25519::Recipient = recipient.parse().map_err(|reason| KeyError::Invalid {
            reason: format!(
                "`{recipient}` is not an age recipient ({reason}); one looks like age1… with 62 characters"
            ),
        })?;
        Ok(Self { id: holder_id(&parsed.to_string()), recipient: parsed })
    }
}

fn holder_id(recipient: &str) -> HolderId {
    HolderId::from_digest(KIND, &Sha256::digest(recipient).into())
}

/// `age1q7xk…`: enough to recognise, short enough for a table.
fn shorten(recipient: &str) -> String {
    recipient.chars().take(12).chain(['…']).collect()
}

#[async_trait]
impl KeyHolder for AgeHolder {
    fn id(&self) -> &HolderId {
        &self.id
    }

    fn describe(&self) -> String {
        format!("{} (offline)", shorten(&self.recipient.to_string()))
    }

    fn region(&self) -> Option<&RegionName> {
        None
    }

    async fn wrap(&self, context: &WrapContext, secret: &[u8]) -> Result<Wrap, KeyError> {
        // age binds nothing itself: a secret that does not say what it is for could never be checked again.
        if secret.len() > MAX_SECRET || !is_bound(context, secret) {
            return Err(KeyError::Invalid { reason: "the secret does not begin with the context of its wrap".into() });
        }
        let sealed = ::age::encrypt(&self.recipient, secret)
            .map_err(|error| KeyError::Invalid { reason: format!("{}: {error}", self.describe()) })?;
        Ok(Wrap {
            format: FORMAT,
            kind: KIND.to_owned(),
            holder: self.id.clone(),
            key: self.recipient.to_string(),
            aws_region: None,
            context: context.clone(),
            ciphertext: STANDARD.encode(sealed),
        })
    }
}

/// Opens with identities at hand.
pub struct AgeOpener {
    identities: Vec<OwnIdentity>,
}

impl AgeOpener {
    /// Reads identity files as `age-keygen` and [`generate_identity`] write them.
    ///
    /// # Errors
    /// [`KeyError::Invalid`] for a file that others may read, that cannot be read, or that holds something else.
    pub fn from_files(paths: &[PathBuf]) -> Result<Self, KeyError> {
        let mut identities = Vec::new();
        for path in paths {
            identities.extend(identity::read_file(path)?);
        }
        Ok(Self { identities })
    }

    fn find(&self, wrap: &Wrap) -> Option<&OwnIdentity> {
        self.identities.iter().find(|own| wrap.kind == KIND && own.recipient == wrap.key)
    }
}

impl fmt::Debug for AgeOpener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AgeOpener({})", self.describe())
    }
}

#[async_trait]
impl KeyOpener for AgeOpener {
    fn describe(&self) -> String {
        let names: Vec<_> = self.identities.iter().map(|own| shorten(&own.recipient)).collect();
        format!("{} (offline)", names.join(", "))
    }

    fn fits(&self, wrap: &Wrap) -> bool {
        self.find(wrap).is_some()
    }

    async fn open(&self, context: &WrapContext, wrap: &Wrap) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        wrap.check_context(context)?;
        let own = self.find(wrap).ok_or_else(|| wrap.wrong(format!("no identity here belongs to {}", wrap.key)))?;
        if wrap.holder != holder_id(&wrap.key) || wrap.aws_region.is_some() {
            return Err(wrap.wrong("its fields contradict each other"));
        }
        let sealed = STANDARD.decode(&wrap.ciphertext).map_err(|_| wrap.wrong("its ciphertext is not base64"))?;
        let secret = decrypt(own, &sealed).map_err(|reason| wrap.wrong(reason))?;
        if !is_bound(context, &secret) {
            return Err(wrap.wrong("its secret is bound to another keyset, target or repository"));
        }
        Ok(secret)
    }
}

/// One age file. Its stream is authenticated in chunks, and a secret fits into the first: nothing is used before the
/// end has been seen.
fn decrypt(own: &OwnIdentity, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, String> {
    let decryptor = ::age::Decryptor::new_buffered(sealed).map_err(|error| error.to_string())?;
    let mut reader =
        decryptor.decrypt(std::iter::once(&own.identity as &dyn ::age::Identity)).map_err(|error| error.to_string())?;
    let mut secret = Zeroizing::new(vec![0; MAX_SECRET + 1]);
    let mut len = 0;
    loop {
        match reader.read(&mut secret[len..]) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) => return Err(error.to_string()),
        }
    }
    if len > MAX_SECRET {
        return Err("it holds more than a keyset".to_owned());
    }
    secret.truncate(len);
    Ok(secret)
}
