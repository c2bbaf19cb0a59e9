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

    /// Everything below `prefix` in each region that answers.
    ///
    /// # Errors
    /// No region answers; or one does not, and all [have to](Self::unanimous).
    pub async fn list_answered(&self, prefix: &str) -> Result<Vec<(RegionName, Vec<ListedObject>)>> {
        self.answered(self.list_each(prefix).await, prefix)
    }

    /// The names below `prefix` in any region that answers, sorted.
    ///
    /// # Errors
    /// As [`list_answered`](Self::list_answered).
    pub async fn list_union(&self, prefix: &str) -> Result<BTreeSet<String>> {
        let lists = self.list_answered(prefix).await?.into_iter().flat_map(|(_, list)| list);
        Ok(lists.map(|object| object.key).collect())
    }

    /// The names folded one level below `prefix` (each ends in `/`) in any region that answers.
    ///
    /// # Errors
    /// As [`list_answered`](Self::list_answered).
    pub async fn prefixes_union(&self, prefix: &str) -> Result<BTreeSet<String>> {
        let lists = self
            .list
            .iter()
            .map(|region| async { (region.name.clone(), list_prefixes(region.store.as_ref(), prefix).await) });
        let lists = self.answered(join_all(lists).await, prefix)?;
        Ok(lists.into_iter().flat_map(|(_, list)| list).collect())
    }

    fn answered<L>(&self, lists: Vec<(RegionName, Result<L>)>, prefix: &str) -> Result<Vec<(RegionName, L)>> {
        let (mut answered, mut first_error) = (Vec::new(), None);
        for (region, list) in lists {
            match list {
                Ok(list) => answered.push((region, list)),
                Err(error) if first_error.is_none() => {
                    let step = || format!("list {prefix} of region {region}");
                    first_error = Some(if self.unanimous { error.during(step()) } else { error });
                }
                Err(_) => {}
            }
        }
        match first_error {
            Some(error) if answered.is_empty() || self.unanimous => Err(error),
            _ => Ok(answered),
        }
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
