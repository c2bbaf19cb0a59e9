//! Which names a store takes. The alphabet is the part on which S3, every file system and a shell agree without
//! quoting; anything outside of it is free for a store's own use (a directory keeps its unfinished writes there).

use std::ops::Range;

use super::StoreError;

/// Leaves half of S3's 1,024 bytes to the prefix of the store.
pub(super) const MAX_NAME: usize = 512;
/// `NAME_MAX` of every common file system.
const MAX_PART: usize = 255;

/// Whether `part` may stand between two slashes.
pub(super) fn is_part(part: &str) -> bool {
    let alphabet = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
    !matches!(part, "" | "." | "..") && part.len() <= MAX_PART && part.bytes().all(alphabet)
}

/// Whether `name` may name an object.
pub(super) fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME && name.split('/').all(is_part)
}

/// Refuses what is not a name.
pub(super) fn check(address: &str, name: &str) -> Result<(), StoreError> {
    if is_name(name) {
        return Ok(());
    }
    Err(StoreError::Invalid { address: address.to_owned(), reason: format!("{name:?} is not an object name") })
}

/// Refuses what cannot begin a name. The last part may be cut anywhere, so `.` and `..` are fine there.
pub(super) fn check_prefix(address: &str, prefix: &str) -> Result<(), StoreError> {
    let (parents, leaf) = split(prefix);
    let fits = (parents.is_empty() && !prefix.starts_with('/')) || is_name(parents);
    if fits && (matches!(leaf, "" | "." | "..") || is_part(leaf)) && prefix.len() <= MAX_NAME {
        return Ok(());
    }
    Err(StoreError::Invalid { address: address.to_owned(), reason: format!("{prefix:?} cannot begin an object name") })
}

/// Refuses a range that ends before it begins.
pub(super) fn check_range(address: &str, range: Option<&Range<u64>>) -> Result<(), StoreError> {
    match range {
        Some(range) if range.start > range.end => {
            let reason = format!("the range {}..{} ends before it begins", range.start, range.end);
            Err(StoreError::Invalid { address: address.to_owned(), reason })
        }
        _ => Ok(()),
    }
}

/// The directory of a name (empty at the root) and its last part.
pub(super) fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('/').unwrap_or(("", name))
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert, proptest};

    use super::*;

    #[test]
    fn names_that_could_leave_the_root_or_differ_between_stores_are_refused() {
        let long_part = "a".repeat(256);
        let long_name = ["a"; 257].join("/");
        for text in
            ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "A", "a b", "a\\b", "a\0", "ä", "+tmp/x"]
        {
            assert!(check("dir:/x", text).is_err(), "{text:?}");
        }
        assert!(!is_name(&long_part) && !is_name(&long_name));
        for text in ["a", ".probe/00", "...", "a-b_c.d/0", "-", "_"] {
            assert!(check("dir:/x", text).is_ok(), "{text:?}");
        }
    }

    #[test]
    fn a_prefix_may_be_cut_anywhere_but_not_leave_the_root() {
        for text in ["", "a", "a/", "a/b", ".", "a/.", "a/.."] {
            assert!(check_prefix("dir:/x", text).is_ok(), "{text:?}");
        }
        for text in ["/", "/a", "../a", "a/../b", "a//", "A"] {
            assert!(check_prefix("dir:/x", text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn every_beginning_of_a_name_is_a_prefix(name in "[a-z0-9._-]{1,4}(/[a-z0-9._-]{1,4}){0,3}", cut: usize) {
            if is_name(&name) {
                prop_assert!(check_prefix("dir:/x", &name[..cut % (name.len() + 1)]).is_ok());
            }
        }
    }
}
