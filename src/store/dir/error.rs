//! What the operating system's errors mean to a directory region.

use rustix::io::Errno;

use crate::store::StoreError;

/// One call, for the text of its error.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) operation: &'static str,
    pub(super) key: &'a str,
    pub(super) address: &'a str,
}

impl Call<'_> {
    pub(super) fn failed(self, errno: Errno) -> StoreError {
        let (operation, key, address) = (self.operation, self.key.to_owned(), self.address.to_owned());
        match errno {
            Errno::NOENT | Errno::NOTDIR => StoreError::NotFound { key, address },
            Errno::NOSPC | Errno::DQUOT => StoreError::Full { key, address },
            Errno::ACCESS | Errno::PERM | Errno::ROFS => {
                StoreError::Denied { operation, key, address, reason: errno.to_string() }
            }
            // A directory stands where the name of an object should.
            Errno::ISDIR | Errno::NAMETOOLONG | Errno::LOOP => self.invalid(&errno.to_string()),
            _ => StoreError::Unavailable { operation, key, address, reason: errno.to_string() },
        }
    }

    pub(super) fn invalid(self, reason: &str) -> StoreError {
        StoreError::Invalid { address: self.address.to_owned(), reason: format!("{}: {reason}", self.key) }
    }

    pub(super) fn unavailable(self, reason: &str) -> StoreError {
        StoreError::Unavailable {
            operation: self.operation,
            key: self.key.to_owned(),
            address: self.address.to_owned(),
            reason: reason.to_owned(),
        }
    }
}
