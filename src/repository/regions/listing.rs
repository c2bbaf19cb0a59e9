//! Lists: of one region, of each, and of all together.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::join_all;

use super::Regions;
use crate::model::{Error, RegionName, Result};
use crate::repository::layout;
use crate::store::{Depth, ListedObject, ObjectStore};

impl Regions {
    /// Everything below `prefix` in each region; a region that does not answer is an error in its place.
    pub async fn list_each(&self, prefix: &str) -> Vec<(RegionName, Result<Vec<ListedObject>>)> {
        let lists = self.list.iter().map(|region| async {
            let listed = list_all(region.store.as_ref(), prefix).await;
            (region.name.clone(), listed)
        });
        join_all(lists).await
    }

    /// The regions that cannot be listed at present, and why.
    pub async fn silent(&self) -> BTreeMap<RegionName, Error> {
        let asked = self.list.iter().map(|region| async {
            let listed = region.store.list(layout::WAL, Depth::Level, None).await;
            listed.err().map(|error| (region.name.clone(), Error::from(error)))
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// The names below `prefix` in any region that answers, sorted.
    ///
    /// # Errors
    /// No region answers.
    pub async fn list_union(&self, prefix: &str) -> Result<BTreeSet<String>> {
        let lists = self.list_each(prefix).await.into_iter().map(|(_, list)| list);
        first_error_if_none(lists, |list, union: &mut BTreeSet<String>| {
            union.extend(list.into_iter().map(|object| object.key));
        })
    }

    /// The names folded one level below `prefix` (each ends in `/`) in any region that answers.
    ///
    /// # Errors
    /// No region answers.
    pub async fn prefixes_union(&self, prefix: &str) -> Result<BTreeSet<String>> {
        let lists = self.list.iter().map(|region| list_prefixes(region.store.as_ref(), prefix));
        first_error_if_none(join_all(lists).await, |list, union: &mut BTreeSet<String>| union.extend(list))
    }
}

fn first_error_if_none<L, U: Default>(
    lists: impl IntoIterator<Item = Result<L>>,
    mut add: impl FnMut(L, &mut U),
) -> Result<U> {
    let mut union = U::default();
    let (mut answered, mut first_error) = (false, None);
    for list in lists {
        match list {
            Ok(list) => {
                answered = true;
                add(list, &mut union);
            }
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    match first_error {
        Some(error) if !answered => Err(error),
        _ => Ok(union),
    }
}

/// Every object below `prefix`, all pages.
///
/// # Errors
/// The store does not answer.
pub async fn list_all(store: &dyn ObjectStore, prefix: &str) -> Result<Vec<ListedObject>> {
    let (mut objects, mut after) = (Vec::new(), None);
    loop {
        let page = store.list(prefix, Depth::All, after.as_ref()).await?;
        objects.extend(page.objects);
        match page.next {
            Some(next) => after = Some(next),
            None => return Ok(objects),
        }
    }
}

/// The names folded one level below `prefix`, all pages; each ends in `/`.
///
/// # Errors
/// The store does not answer.
pub async fn list_prefixes(store: &dyn ObjectStore, prefix: &str) -> Result<Vec<String>> {
    let (mut prefixes, mut after) = (Vec::new(), None);
    loop {
        let page = store.list(prefix, Depth::Level, after.as_ref()).await?;
        prefixes.extend(page.prefixes);
        match page.next {
            Some(next) => after = Some(next),
            None => return Ok(prefixes),
        }
    }
}
