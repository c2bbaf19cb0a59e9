//! Whose signatures count.
//!
//! A signer is named by the fingerprint of its public key, and the key itself is an object of the repository, so anyone
//! who may write can add one. What makes a signer *known* is the list in the configuration or on the command line. With a
//! list, anything signed by another is refused; without one it is read, and the fingerprints are shown.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use futures::future::join_all;
use serde::{Deserialize, Serialize};

use crate::codec::sign::{PublicKey, Signature, Signer, sign_text, split_text};
use crate::model::{Error, Kind, Result, SignerId};
use crate::repository::layout;
use crate::repository::regions::Regions;

/// A signer's public key as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignerRecord {
    /// Ed25519 public key, hex.
    pub public_key: String,
    /// The host that enrolled it.
    pub host: String,
}

const CONTEXT: &str = "signer";

impl SignerRecord {
    /// The object: signed by the key that it publishes, so that no bit of it can change unseen.
    ///
    /// # Errors
    /// None in practice: the record is plain data.
    pub fn encode(signer: &Signer, host: &str) -> Result<Vec<u8>> {
        let record = Self { public_key: hex::encode(signer.public_key().as_bytes()), host: host.to_owned() };
        let mut body = serde_json::to_vec(&record).map_err(|error| Error::failed("encode a signer").because(error))?;
        body.push(b'\n');
        Ok(sign_text(signer, CONTEXT, &body)?)
    }

    /// Reads the object that is named after `id`.
    ///
    /// # Errors
    /// It is not that signer's own record.
    pub fn decode(id: &SignerId, bytes: &[u8]) -> Result<(Self, PublicKey)> {
        let wrong = || Error::damaged(format!("the record of signer {id} is not its public key"));
        let text = split_text(bytes).map_err(|error| wrong().because(error))?;
        let record: Self = serde_json::from_slice(text.body).map_err(|error| wrong().because(error))?;
        let key = hex::decode(&record.public_key).map_err(|error| wrong().because(error))?;
        let key = PublicKey::from_bytes(&key)?;
        if key.id() != id {
            return Err(wrong());
        }
        text.verify(CONTEXT, &key).map_err(|error| wrong().because(error))?;
        Ok((record, key))
    }
}

/// The signers of a repository.
#[derive(Debug)]
pub struct Trust {
    listed: BTreeSet<SignerId>,
    keys: Mutex<BTreeMap<SignerId, PublicKey>>,
    unlisted: Mutex<BTreeSet<SignerId>>,
    /// Whether regions did not give every key that they list.
    lacks: AtomicBool,
}

impl Trust {
    /// Reads every public key that any region holds. An empty `listed` trusts all of them, and says so in
    /// [`unlisted`](Self::unlisted).
    ///
    /// # Errors
    /// No region answers.
    pub async fn load(regions: &Regions, listed: BTreeSet<SignerId>) -> Result<Self> {
        let lacks = AtomicBool::new(false);
        let trust = Self { listed, keys: Mutex::default(), unlisted: Mutex::default(), lacks };
        trust.refresh(regions).await?;
        Ok(trust)
    }

    /// Trust in one signer, for a writer that reads back its own records.
    pub fn in_signer(signer: &Signer) -> Self {
        let keys = BTreeMap::from([(signer.id().clone(), signer.public_key().clone())]);
        let (keys, lacks) = (Mutex::new(keys), AtomicBool::new(false));
        Self { listed: BTreeSet::new(), keys, unlisted: Mutex::default(), lacks }
    }

    /// Reads keys that were enrolled since.
    ///
    /// # Errors
    /// No region answers.
    pub async fn refresh(&self, regions: &Regions) -> Result<()> {
        let unknown = |key: String| {
            let id = key.strip_prefix(layout::SIGNERS)?.parse::<SignerId>().ok()?;
            (!self.knows(&id)).then_some((key, id))
        };
        let reads = regions.list_union(layout::SIGNERS).await?.into_iter().filter_map(unknown).map(|(key, id)| {
            async move {
                // The name is the hash of the key: a damaged or forged record fails here and is taken from another region.
                let decode = |bytes: Bytes| SignerRecord::decode(&id, &bytes).map(|(_, key)| key);
                let read = regions.read(&key, None, decode).await;
                read.map(|(public, _)| (id, public))
            }
        });
        let mut lacks = false;
        for read in join_all(reads).await {
            match read {
                Ok((id, public)) => drop(self.lock().insert(id, public)),
                Err(error) => {
                    lacks |= error.kind() == Kind::Unavailable;
                    tracing::warn!(%error, "signer is not readable");
                }
            }
        }
        self.lacks.store(lacks, Ordering::Relaxed);
        Ok(())
    }

    /// Whether a key that a region lists could not be read: what its owner signed looks damaged, and need not be.
    pub fn lacks_keys(&self) -> bool {
        self.lacks.load(Ordering::Relaxed)
    }

    /// Whether the configuration or the command line lists signers.
    pub fn has_list(&self) -> bool {
        !self.listed.is_empty()
    }

    /// Whether there is a list of trusted signers that this one is not on.
    pub fn refuses(&self, id: &SignerId) -> bool {
        !self.listed.is_empty() && !self.listed.contains(id)
    }

    /// Whether what this signer says may cost something that is stored. Reading forgives more: without a list whoever may write
    /// to one region is read, and repair brings it to the others. So without one our own word alone counts here.
    pub fn relies_on(&self, own: Option<&SignerId>, id: &SignerId) -> bool {
        own == Some(id) || (self.has_list() && !self.refuses(id))
    }

    /// Whether this signer's key is at hand.
    pub fn knows(&self, id: &SignerId) -> bool {
        self.lock().contains_key(id)
    }

    /// Signers that were met without being on any list; restore prints them.
    pub fn unlisted(&self) -> Vec<SignerId> {
        self.unlisted.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Checks a signature over raw bytes.
    ///
    /// # Errors
    /// The signer is not trusted or unknown, or the signature is wrong.
    pub fn verify_bytes(&self, id: &SignerId, context: &str, bytes: &[u8], signature: &Signature) -> Result<()> {
        let key = self.key(id)?;
        key.verify_bytes(context, bytes, signature).map_err(Error::from)
    }

    /// Checks a signed text and returns its body.
    ///
    /// # Errors
    /// As [`verify_bytes`](Self::verify_bytes), or the text is not a signed one.
    pub fn verify_text<'a>(&self, context: &str, bytes: &'a [u8]) -> Result<&'a [u8]> {
        let text = split_text(bytes)?;
        let key = self.key(&text.signer)?;
        text.verify(context, &key)?;
        Ok(text.body)
    }

    fn key(&self, id: &SignerId) -> Result<PublicKey> {
        if !self.listed.is_empty() && !self.listed.contains(id) {
            let error = Error::new(Kind::Damaged, format!("signer {id} is not trusted"));
            return Err(error.hint(format!("if you know it: add it to `signers`, or pass --trust-signer {id}")));
        }
        if self.listed.is_empty() {
            self.unlisted.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
        }
        let missing = || Error::damaged(format!("the public key of signer {id} is in no region"));
        self.lock().get(id).cloned().ok_or_else(missing)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<SignerId, PublicKey>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
