//! The stored form of a wrap: one line of JSON with one spelling, so that `jq` reads it and no flipped bit hides in it.

use super::{KeyError, Wrap, WrapContext};
use crate::model::HolderId;

/// The version of the record.
pub(super) const FORMAT: u32 = 1;
/// A wrap is well under 2 KiB; a reader takes no more than this.
const MAX_STORED: usize = 64 * 1024;

impl Wrap {
    /// The object's bytes.
    ///
    /// # Errors
    /// Never for fields that a holder fills in.
    pub fn to_bytes(&self) -> Result<Vec<u8>, KeyError> {
        let mut bytes = serde_json::to_vec(self).map_err(|error| KeyError::Invalid { reason: error.to_string() })?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads the object that is stored under the name of `holder`.
    ///
    /// What the bytes say is not proven before a holder opens them: it authenticates ciphertext, key and context. The
    /// holder's id is the one field it does not see, and is therefore compared with the object's name here.
    ///
    /// # Errors
    /// [`KeyError::Wrong`] for anything that [`Wrap::to_bytes`] does not write, or for another holder's wrap.
    pub fn from_bytes(holder: &HolderId, bytes: &[u8]) -> Result<Self, KeyError> {
        let wrong = |reason: String| KeyError::Wrong { holder: holder.to_string(), reason };
        if bytes.len() > MAX_STORED {
            return Err(wrong(format!("{} bytes are no wrap", bytes.len())));
        }
        let wrap: Self = serde_json::from_slice(bytes).map_err(|error| wrong(format!("malformed: {error}")))?;
        if wrap.format != FORMAT {
            return Err(wrong(format!("format {} is not known here", wrap.format)));
        }
        if wrap.to_bytes()? != bytes {
            return Err(wrong("not in its canonical spelling".to_owned()));
        }
        if wrap.holder != *holder {
            return Err(wrong(format!("it was made by {}", wrap.holder)));
        }
        Ok(wrap)
    }

    /// Compares what the wrap says it is bound to with what the reader looks for.
    pub(super) fn check_context(&self, context: &WrapContext) -> Result<(), KeyError> {
        if self.context == *context {
            Ok(())
        } else {
            Err(self.wrong("it is bound to another keyset, target or repository"))
        }
    }

    pub(super) fn wrong(&self, reason: impl Into<String>) -> KeyError {
        KeyError::Wrong { holder: self.holder.to_string(), reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wrap(aws_region: Option<String>, key: String, ciphertext: String) -> Wrap {
        Wrap {
            format: FORMAT,
            kind: "kms".into(),
            holder: "kms-0123456789abcdef".parse().unwrap(),
            key,
            aws_region,
            context: WrapContext {
                repository: "00112233445566778899aabbccddeeff".parse().unwrap(),
                target: "ledger".parse().unwrap(),
                keyset: "ffeeddccbbaa99887766554433221100".parse().unwrap(),
            },
            ciphertext,
        }
    }

    proptest! {
        #[test]
        fn what_was_written_reads_back(aws_region: Option<String>, key: String, ciphertext: String) {
            let wrap = wrap(aws_region, key, ciphertext);
            prop_assert_eq!(&Wrap::from_bytes(&wrap.holder, &wrap.to_bytes().unwrap()).unwrap(), &wrap);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let holder = "kms-0123456789abcdef".parse().unwrap();
            prop_assert!(Wrap::from_bytes(&holder, &bytes).is_err());
        }
    }

    #[test]
    fn there_is_one_spelling() {
        let wrap = wrap(None, "k".into(), "c".into());
        let text = String::from_utf8(wrap.to_bytes().unwrap()).unwrap();
        for other in [
            text.replace("\":", "\": "),
            text.trim_end().to_owned(),
            format!("{text}\n"),
            text.replace("\"format\":1", "\"format\":2"),
            text.replace("\"k\"", "\"\\u006b\""),
            text.replace("\"ciphertext\"", "\"more\":1,\"ciphertext\""),
            text.replace("\"target\"", "\"more\":1,\"target\""),
            text.replace("\"context\"", "\"aws_region\":null,\"context\""),
            text.replace("kms-0", "kms-1"),
        ] {
            assert_ne!(other, text);
            assert!(Wrap::from_bytes(&wrap.holder, other.as_bytes()).is_err(), "{other}");
        }
    }
}
