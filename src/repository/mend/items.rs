//! Which names there are, in which regions, and what proves the bytes under each.

use std::collections::{BTreeMap, BTreeSet};

use super::{Mender, displaced};
use crate::model::{RegionName, Result};
use crate::repository::inventory::InventoryLine;
use crate::repository::layout;

/// What makes bytes right.
#[derive(Debug, Clone)]
pub(super) enum Proof {
    /// A signed inventory names size and digest.
    Listed(InventoryLine),
    /// The bytes speak for themselves.
    Own,
    /// Nothing but agreement: more than half of the regions that hold the name hold these bytes.
    Majority,
}

#[derive(Debug)]
pub(super) struct Item {
    pub(super) key: String,
    pub(super) proof: Proof,
    /// Region → listed size.
    pub(super) held: BTreeMap<RegionName, u64>,
    /// Regions that hold it in a bundle, and need it nowhere else.
    pub(super) bundled: BTreeSet<RegionName>,
}

impl Mender<'_> {
    /// The objects of one class: those that a region lists, and those that an inventory names.
    pub(super) async fn items(&self, class: &str) -> Result<Vec<Item>> {
        let prefix = self.prefix(class);
        let mut items: BTreeMap<String, Item> = BTreeMap::new();
        let mut answered = false;
        let mut last_error = None;
        for (region, list) in self.repository.regions.list_each(&prefix).await {
            match list {
                Ok(list) => {
                    answered = true;
                    // What lies beside a SEAL is made of the frame and comes last.
                    for object in list.into_iter().filter(|object| !displaced::is_beside(&object.key)) {
                        let Some(proof) = self.proof(&object.key) else { continue };
                        let item = |key: String| Item { key, proof, held: BTreeMap::new(), bundled: BTreeSet::new() };
                        let item = items.entry(object.key.clone()).or_insert_with(|| item(object.key));
                        item.held.insert(region.clone(), object.size);
                    }
                }
                Err(error) => {
                    self.still(&region, &prefix, error.to_string());
                    last_error = Some(error);
                }
            }
        }
        if let (false, Some(error)) = (answered, last_error) {
            return Err(error);
        }
        for (key, line) in self.closure.lines.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix)) {
            let new = || Item {
                key: key.clone(),
                proof: Proof::Listed(line.clone()),
                held: BTreeMap::new(),
                bundled: BTreeSet::new(),
            };
            items.entry(key.clone()).or_insert_with(new);
        }
        note_bundled(&mut items);
        items.retain(|key, item| !self.is_gone(key, item));
        Ok(items.into_values().collect())
    }

    fn prefix(&self, class: &str) -> String {
        let of_target = ["keysets/", "packs/", "manifests/", "inventories/", layout::COMMITS];
        match &self.scope.target {
            Some(target) if of_target.contains(&class) => format!("{class}{target}/"),
            _ => class.to_owned(),
        }
    }

    /// What proves an object; `None` for one that nothing needs: packs of backups that were never committed.
    fn proof(&self, key: &str) -> Option<Proof> {
        if let Some(line) = self.closure.lines.get(key) {
            return Some(Proof::Listed(line.clone()));
        }
        if self.pruned.is_idle(key) {
            return None;
        }
        let class = key.split('/').next().unwrap_or_default();
        match class {
            "packs" | "manifests" => None,
            "inventories" => {
                let needed = self.closure.needs.values().any(|needs| needs.iter().any(|need| need == key));
                needed.then_some(Proof::Own)
            }
            // A wrap is authenticated by its holder alone, and no key is at hand here. A gap that two writers met has two
            // signed records of it.
            "escape" | "gaps" | "keysets" => Some(Proof::Majority),
            _ => Some(Proof::Own),
        }
    }

    /// What prune left in one region is not lacking in the others. What as many regions hold as have to hold what is acknowledged
    /// may be garbage that the next prune takes; or whoever may write said that it is gone, and another region lost it.
    fn is_gone(&self, key: &str, item: &Item) -> bool {
        let held = item.held.keys().chain(&item.bundled).collect::<BTreeSet<_>>().len();
        let few = held < self.repository.regions.lowest_quorum();
        few && self.pruned.covers(key, |keyset| self.closure.has_keyset(keyset))
    }
}

/// Branches have a `-` in their names, too.
fn is_frame(key: &str) -> bool {
    key.rsplit('/').next().and_then(layout::parse_seq).is_some()
}

/// What prune took out of one region because it lies there in a bundle is not lacking.
fn note_bundled(items: &mut BTreeMap<String, Item>) {
    let bundle = |key: &String, item: &Item| {
        let (prefix, numbers) = key.split_at_checked(key.rfind('/')? + 1)?;
        let (first, last) = layout::parse_bundle(numbers)?;
        key.starts_with(layout::WAL).then(|| (prefix.to_owned(), first, last, item.held.keys().cloned().collect()))
    };
    let bundles: Vec<(_, _, _, BTreeSet<_>)> = items.iter().filter_map(|(key, item)| bundle(key, item)).collect();
    for (prefix, first, last, held) in bundles {
        let frames = layout::wal_frame(&prefix, first)..=layout::wal_frame(&prefix, last);
        // The bundles' own names sort among those of their frames.
        for (_, item) in items.range_mut(frames).filter(|(key, _)| is_frame(key)) {
            item.bundled.extend(held.iter().cloned());
        }
    }
}
