//! Names of accounts and groups, as `/etc/passwd` and `/etc/group` know them.

use std::collections::HashMap;
use std::fs;

/// Both directions of one file; a directory service is not asked.
#[derive(Debug, Default)]
pub(super) struct Names {
    by_id: HashMap<u32, Vec<u8>>,
    by_name: HashMap<Vec<u8>, u32>,
}

impl Names {
    pub(super) fn of_users() -> Self {
        Self::parse(&fs::read("/etc/passwd").unwrap_or_default())
    }

    pub(super) fn of_groups() -> Self {
        Self::parse(&fs::read("/etc/group").unwrap_or_default())
    }

    /// `name:password:id:…`; the first line of a name or an id counts.
    fn parse(text: &[u8]) -> Self {
        let mut names = Self::default();
        for line in text.split(|byte| *byte == b'\n') {
            let mut fields = line.split(|byte| *byte == b':');
            let (name, id) = (fields.next().unwrap_or_default(), fields.nth(1).unwrap_or_default());
            let Some(id) = std::str::from_utf8(id).ok().and_then(|id| id.parse().ok()) else { continue };
            if !name.is_empty() {
                names.by_id.entry(id).or_insert_with(|| name.to_owned());
                names.by_name.entry(name.to_owned()).or_insert(id);
            }
        }
        names
    }

    pub(super) fn name(&self, id: u32) -> Vec<u8> {
        self.by_id.get(&id).cloned().unwrap_or_default()
    }

    pub(super) fn id(&self, name: &[u8]) -> Option<u32> {
        self.by_name.get(name).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_of_a_name_counts() {
        let names = Names::parse(b"root:x:0:0:root:/root:/bin/sh\ntoor:x:0:0::/:/\nroot:x:7::\nbroken\n:x:3\n");
        assert_eq!((names.name(0), names.id(b"root"), names.id(b"toor")), (b"root".to_vec(), Some(0), Some(0)));
        assert_eq!((names.name(3), names.id(b"nobody")), (Vec::new(), None));
    }
}
