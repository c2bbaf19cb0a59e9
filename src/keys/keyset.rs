//! A keyset: the two secrets that seal one backup or one WAL epoch, and the exact text that holders wrap.

use zeroize::Zeroizing;

use super::WrapContext;
use crate::codec::SealingKey;
use crate::model::{KeysetId, RepositoryId, Result as ModelResult, Rng, TargetName};

const HEX_LEN: usize = 2 * SealingKey::LEN;

/// Two random secrets: `data` seals pages, WAL and parts; `meta` seals maps, manifests and reports. A reader may hold
/// `meta` alone.
///
/// Its secret text is `{"repository":"…","target":"…","keyset":"…","data":"<hex>","meta":"<hex>"}`, `data` left out
/// when it is not to be opened. The text begins with the context because age has no associated data.
#[derive(Debug, Clone)]
pub struct Keyset {
    context: WrapContext,
    data: Option<SealingKey>,
    meta: SealingKey,
}

/// Why an opened secret is not the keyset that was asked for. It never repeats the secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeysetError {
    /// It begins with another repository, target or keyset.
    #[error("its secret is bound to another keyset, target or repository")]
    OtherContext,
    /// It is not the text that [`Keyset::to_secret`] writes.
    #[error("its secret is malformed")]
    Malformed,
}

impl Keyset {
    /// Draws a new keyset for a target.
    ///
    /// # Errors
    /// No randomness.
    pub fn generate(repository: &RepositoryId, target: &TargetName, rng: &dyn Rng) -> ModelResult<Self> {
        let context =
            WrapContext { repository: repository.clone(), target: target.clone(), keyset: KeysetId::new(rng)? };
        Ok(Self { context, data: Some(SealingKey::generate(rng)?), meta: SealingKey::generate(rng)? })
    }

    /// The same keyset without `data`, for a holder who may read maps and manifests only.
    #[must_use]
    pub fn meta_only(&self) -> Self {
        Self { data: None, ..self.clone() }
    }

    /// Its id.
    pub const fn id(&self) -> &KeysetId {
        &self.context.keyset
    }

    /// The target whose data it seals.
    pub const fn target(&self) -> &TargetName {
        &self.context.target
    }

    /// What its wraps are bound to.
    pub const fn context(&self) -> &WrapContext {
        &self.context
    }

    /// The key of pages, WAL and parts; none if it was opened for `meta` only.
    pub const fn data(&self) -> Option<&SealingKey> {
        self.data.as_ref()
    }

    /// The key of maps, manifests and reports.
    pub const fn meta(&self) -> &SealingKey {
        &self.meta
    }

    /// The text that holders wrap.
    pub fn to_secret(&self) -> Zeroizing<Vec<u8>> {
        let binding = binding(&self.context);
        // Reserved in full: a vector that grows leaves copies of secrets behind that nobody wipes.
        let mut secret = Zeroizing::new(Vec::with_capacity(binding.len() + 2 * HEX_LEN + 32));
        secret.extend_from_slice(binding.as_bytes());
        if let Some(data) = &self.data {
            push_key(&mut secret, b",\"data\":\"", data);
        }
        push_key(&mut secret, b",\"meta\":\"", &self.meta);
        secret.push(b'}');
        secret
    }

    /// Reads an opened secret, its context first.
    ///
    /// # Errors
    /// [`KeysetError`].
    pub fn from_secret(context: &WrapContext, secret: &[u8]) -> Result<Self, KeysetError> {
        let keys = secret.strip_prefix(binding(context).as_bytes()).ok_or(KeysetError::OtherContext)?;
        let (data, keys) = match take_key(keys, b",\"data\":\"") {
            Some((data, rest)) => (Some(data), rest),
            None => (None, keys),
        };
        let (meta, end) = take_key(keys, b",\"meta\":\"").ok_or(KeysetError::Malformed)?;
        if end != b"}" {
            return Err(KeysetError::Malformed);
        }
        Ok(Self { context: context.clone(), data, meta })
    }
}

/// How every secret of this context begins.
fn binding(context: &WrapContext) -> String {
    let WrapContext { repository, target, keyset } = context;
    format!("{{\"repository\":\"{repository}\",\"target\":\"{target}\",\"keyset\":\"{keyset}\"")
}

/// Whether a secret is bound to `context`.
pub(super) fn is_bound(context: &WrapContext, secret: &[u8]) -> bool {
    secret.starts_with(binding(context).as_bytes())
}

fn push_key(secret: &mut Vec<u8>, field: &[u8], key: &SealingKey) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    secret.extend_from_slice(field);
    for byte in key.expose() {
        secret.extend([DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
    }
    secret.push(b'"');
}

fn take_key<'a>(secret: &'a [u8], field: &[u8]) -> Option<(SealingKey, &'a [u8])> {
    let (digits, rest) = secret.strip_prefix(field)?.split_at_checked(HEX_LEN)?;
    if digits.iter().any(u8::is_ascii_uppercase) {
        return None;
    }
    let mut bytes = Zeroizing::new([0; SealingKey::LEN]);
    hex::decode_to_slice(digits, bytes.as_mut_slice()).ok()?;
    Some((SealingKey::from_bytes(&bytes), rest.strip_prefix(b"\"")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::SystemRng;

    fn keyset() -> Keyset {
        let repository = RepositoryId::new(&SystemRng).unwrap();
        Keyset::generate(&repository, &"ledger".parse().unwrap(), &SystemRng).unwrap()
    }

    #[test]
    fn a_keyset_reads_back_whole_or_for_meta_only() {
        let keyset = keyset();
        let whole = Keyset::from_secret(keyset.context(), &keyset.to_secret()).unwrap();
        assert_eq!(whole.data().unwrap().expose(), keyset.data().unwrap().expose());
        assert_eq!(whole.meta().expose(), keyset.meta().expose());
        assert_ne!(keyset.meta().expose(), keyset.data().unwrap().expose());

        let meta = Keyset::from_secret(keyset.context(), &keyset.meta_only().to_secret()).unwrap();
        assert!(meta.data().is_none());
        assert_eq!(meta.meta().expose(), keyset.meta().expose());
    }

    #[test]
    fn the_secret_is_plain_json() {
        let context = WrapContext {
            repository: "00112233445566778899aabbccddeeff".parse().unwrap(),
            target: "ledger".parse().unwrap(),
            keyset: "ffeeddccbbaa99887766554433221100".parse().unwrap(),
        };
        let key = |byte| SealingKey::from_bytes(&[byte; 32]);
        let keyset = Keyset { context, data: Some(key(0xab)), meta: key(0x1c) };
        let expected = format!(
            r#"{{"repository":"00112233445566778899aabbccddeeff","target":"ledger","keyset":"ffeeddccbbaa99887766554433221100","data":"{}","meta":"{}"}}"#,
            "ab".repeat(32),
            "1c".repeat(32)
        );
        assert_eq!(String::from_utf8(keyset.to_secret().to_vec()).unwrap(), expected);
        serde_json::from_str::<serde_json::Value>(&expected).unwrap();
        let debug = format!("{keyset:?}");
        assert!(!debug.contains("abab") && !debug.contains("171") && !debug.contains("1c1c"), "{debug}");
    }

    #[test]
    fn the_secret_never_grows_out_of_its_reservation() {
        let secret = keyset().to_secret();
        assert!(secret.len() <= binding(keyset().context()).len() + 2 * HEX_LEN + 32);
        assert!(secret.capacity() >= secret.len());
    }

    #[test]
    fn every_cut_extension_and_other_context_is_an_error() {
        let keyset = keyset();
        let secret = keyset.to_secret();
        for cut in 0..secret.len() {
            assert!(Keyset::from_secret(keyset.context(), &secret[..cut]).is_err(), "cut {cut}");
        }
        for tail in ["}", " ", "\n"] {
            let extended = [&secret[..], tail.as_bytes()].concat();
            assert_eq!(Keyset::from_secret(keyset.context(), &extended).unwrap_err(), KeysetError::Malformed);
        }
        let text = std::str::from_utf8(&secret).unwrap();
        let at = text.find("\"data\"").unwrap();
        let upper = text[..at].to_owned() + &text[at..].to_uppercase();
        assert_eq!(Keyset::from_secret(keyset.context(), upper.as_bytes()).unwrap_err(), KeysetError::Malformed);

        let other = keyset_with_other_fields(keyset.context());
        for context in other {
            assert_eq!(Keyset::from_secret(&context, &secret).unwrap_err(), KeysetError::OtherContext);
        }
    }

    fn keyset_with_other_fields(context: &WrapContext) -> [WrapContext; 3] {
        [
            WrapContext { repository: RepositoryId::new(&SystemRng).unwrap(), ..context.clone() },
            WrapContext { target: "ledge".parse().unwrap(), ..context.clone() },
            WrapContext { keyset: KeysetId::new(&SystemRng).unwrap(), ..context.clone() },
        ]
    }
}
