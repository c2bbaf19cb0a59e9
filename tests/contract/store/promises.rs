//! What the contract of `ObjectStore` says, as checks that any store must pass.

use std::sync::Arc;

use bytes::Bytes;
use drctl::store::wrap::{Retry, RetryPolicy};
use drctl::store::{Depth, Digest, ListPage, ListedVersion, ObjectStore, Put, PutOptions, StoreError, VersionId};
use futures::StreamExt as _;
use futures::future::join_all;

use super::faulty_store::{Call, Fault, FaultyStore};
use super::servers::Chance;

type Store = Arc<dyn ObjectStore>;

pub(super) async fn put(store: &dyn ObjectStore, key: &str, body: impl Into<Bytes>) -> Result<Put, StoreError> {
    let body = body.into();
    let digest = Digest::of(&body);
    store.put(key, body, digest, &PutOptions::default()).await
}

/// A put of many: servers under a race may ask to come again.
async fn put_patiently(store: &dyn ObjectStore, key: &str, body: &Bytes) -> Result<Put, StoreError> {
    loop {
        match put(store, key, body.clone()).await {
            Err(error) if error.is_transient() => {}
            done => return done,
        }
    }
}

/// Every page to the end.
async fn list_all(store: &dyn ObjectStore, prefix: &str, depth: Depth) -> (Vec<String>, Vec<String>, usize) {
    let (mut objects, mut prefixes, mut pages, mut after) = (Vec::new(), Vec::new(), 0, None);
    loop {
        let page: ListPage = store.list(prefix, depth, after.as_ref()).await.unwrap();
        objects.extend(page.objects.into_iter().map(|object| object.key));
        prefixes.extend(page.prefixes);
        pages += 1;
        after = page.next;
        if after.is_none() {
            return (objects, prefixes, pages);
        }
    }
}

async fn fill(store: &dyn ObjectStore, keys: &[String]) {
    let puts = futures::stream::iter(keys).map(|key| async move {
        let body = Bytes::from(key.clone());
        assert_eq!(put_patiently(store, key, &body).await.unwrap(), Put::Created, "{key}");
    });
    puts.buffer_unordered(16).collect::<Vec<()>>().await;
}

pub(super) async fn of_racing_writers_exactly_one_wins(store: Store) {
    for round in 0..5 {
        let key = format!("race/{round}");
        let bodies: Vec<Bytes> = (0..8u8).map(|writer| Bytes::from(vec![writer; 100_000])).collect();
        let outcomes = join_all(bodies.iter().map(|body| {
            let (store, key, body) = (Arc::clone(&store), key.clone(), body.clone());
            tokio::spawn(async move { put_patiently(store.as_ref(), &key, &body).await })
        }))
        .await;
        let outcomes: Vec<_> = outcomes.into_iter().map(Result::unwrap).collect();
        let winners: Vec<usize> = (0..8).filter(|at| outcomes[*at].is_ok()).collect();
        assert_eq!(winners.len(), 1, "{outcomes:?}");
        for outcome in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
            assert!(matches!(outcome, StoreError::Conflict { .. }), "{outcome}");
        }
        assert_eq!(store.get(&key, None).await.unwrap(), bodies[winners[0]]);
    }
}

pub(super) async fn racing_writers_of_the_same_bytes_all_succeed(store: Store) {
    let body = Bytes::from(vec![7; 100_000]);
    let outcomes = join_all((0..8).map(|_| {
        let (store, body) = (Arc::clone(&store), body.clone());
        tokio::spawn(async move { put_patiently(store.as_ref(), "same", &body).await.unwrap() })
    }))
    .await;
    let created = outcomes.into_iter().filter(|outcome| *outcome.as_ref().unwrap() == Put::Created).count();
    assert_eq!(created, 1);
    assert_eq!(store.get("same", None).await.unwrap(), body);
}

pub(super) async fn the_same_bytes_again_are_already_there(store: Store) {
    assert_eq!(put(store.as_ref(), "a/b", "once").await.unwrap(), Put::Created);
    assert_eq!(put(store.as_ref(), "a/b", "once").await.unwrap(), Put::AlreadyThere);
    let info = store.head("a/b").await.unwrap();
    assert_eq!(info.size, 4);
    assert!(info.digest.is_none_or(|digest| digest == Digest::of(b"once")));
    assert!(info.modified.is_some());
}

pub(super) async fn other_bytes_are_a_conflict_and_change_nothing(store: Store) {
    put(store.as_ref(), "a", "first").await.unwrap();
    for other in ["other", "longer than first", ""] {
        let refused = put(store.as_ref(), "a", other).await.unwrap_err();
        assert!(matches!(refused, StoreError::Conflict { .. }), "{refused}");
        assert!(!refused.is_transient());
    }
    assert_eq!(store.get("a", None).await.unwrap(), "first");
}

pub(super) async fn a_lost_reply_is_settled_by_repetition(store: Store) {
    let faulty = Arc::new(FaultyStore::new(store));
    faulty.on(Call::Put, 1, Fault::LoseReply).on(Call::Delete, 1, Fault::LoseReply).on(Call::Get, 1, Fault::Fail);
    let retry = Retry::new(faulty.clone(), RetryPolicy::default(), Arc::new(Chance));
    assert_eq!(put(&retry, "lost", "bytes").await.unwrap(), Put::AlreadyThere);
    assert_eq!(faulty.calls(Call::Put), 2);
    assert_eq!(retry.get("lost", None).await.unwrap(), "bytes");
    let other = put(&retry, "lost", "other").await.unwrap_err();
    assert!(matches!(other, StoreError::Conflict { .. }), "{other}");
    retry.delete("lost").await.unwrap();
    assert!(retry.head("lost").await.unwrap_err().is_not_found());
}

pub(super) async fn ranges_are_exact(store: Store) {
    let body: Vec<u8> = (0..=255).collect();
    put(store.as_ref(), "range", body.clone()).await.unwrap();
    for (start, end) in [(0, 1), (255, 256), (0, 256), (100, 200), (17, 17), (0, 0), (256, 256)] {
        let got = store.get("range", Some(start as u64..end as u64)).await.unwrap();
        assert_eq!(got, body[start..end], "{start}..{end}");
    }
}

pub(super) async fn a_range_beyond_the_end_is_truncated(store: Store) {
    put(store.as_ref(), "range", vec![1; 100]).await.unwrap();
    for (range, wanted) in [(99..101, 2), (0..200, 200), (100..101, 1), (500..600, 100), (101..101, 0)] {
        match store.get("range", Some(range.clone())).await.unwrap_err() {
            StoreError::Truncated { expected, got, .. } => {
                assert_eq!(expected, wanted, "{range:?}");
                assert_eq!(got, 100u64.saturating_sub(range.start), "{range:?}");
            }
            other => panic!("{range:?}: {other}"),
        }
    }
    assert!(store.get("absent", Some(0..1)).await.unwrap_err().is_not_found());
    assert!(store.get("absent", Some(0..0)).await.unwrap_err().is_not_found());
}

pub(super) async fn an_empty_object_is_an_object(store: Store) {
    assert_eq!(put(store.as_ref(), "empty", "").await.unwrap(), Put::Created);
    assert_eq!(put(store.as_ref(), "empty", "").await.unwrap(), Put::AlreadyThere);
    assert_eq!(store.head("empty").await.unwrap().size, 0);
    assert_eq!(store.get("empty", None).await.unwrap(), "");
    assert_eq!(store.get("empty", Some(0..0)).await.unwrap(), "");
    let beyond = store.get("empty", Some(0..1)).await.unwrap_err();
    assert!(matches!(beyond, StoreError::Truncated { got: 0, expected: 1, .. }), "{beyond}");
    let listed = store.list("empty", Depth::All, None).await.unwrap();
    assert_eq!((listed.objects.len(), listed.objects[0].size), (1, 0));
}

pub(super) async fn a_large_object_comes_back(store: Store) {
    let body: Bytes = (0..16u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    assert_eq!(put(store.as_ref(), "large", body.clone()).await.unwrap(), Put::Created);
    assert_eq!(put(store.as_ref(), "large", body.clone()).await.unwrap(), Put::AlreadyThere);
    assert!(store.get("large", None).await.unwrap() == body);
    let middle = 5_000_000..13_000_000;
    let part = store.get("large", Some(middle.start as u64..middle.end as u64)).await.unwrap();
    assert!(part == body.slice(middle));
    assert_eq!(store.head("large").await.unwrap().size, 16 << 20);
}

pub(super) async fn every_allowed_character_may_stand_in_a_name(store: Store) {
    let key = "abcdefghijklmnopqrstuvwxyz/0123456789/._-/.../-/_/.hidden";
    put(store.as_ref(), key, "here").await.unwrap();
    assert_eq!(store.get(key, None).await.unwrap(), "here");
    assert_eq!(list_all(store.as_ref(), "abc", Depth::All).await.0, [key]);
}

pub(super) async fn names_outside_of_the_contract_are_refused(store: Store) {
    for key in ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "A", "a b", "ä", "+tmp/1-0"] {
        let refused = put(store.as_ref(), key, "x").await.unwrap_err();
        assert!(matches!(refused, StoreError::Invalid { .. }) && !refused.is_transient(), "{key:?}: {refused}");
        assert!(matches!(store.head(key).await.unwrap_err(), StoreError::Invalid { .. }), "{key:?}");
        assert!(matches!(store.get(key, None).await.unwrap_err(), StoreError::Invalid { .. }), "{key:?}");
        assert!(matches!(store.delete(key).await.unwrap_err(), StoreError::Invalid { .. }), "{key:?}");
    }
    put(store.as_ref(), "a", "x").await.unwrap();
    #[expect(clippy::reversed_empty_ranges, reason = "the mistake under test")]
    let backwards = store.get("a", Some(1..0)).await.unwrap_err();
    assert!(matches!(backwards, StoreError::Invalid { .. }), "{backwards}");
}

pub(super) async fn what_is_absent_is_not_found(store: Store) {
    put(store.as_ref(), "a/b/c", "x").await.unwrap();
    for key in ["b", "a/c", "a/b", "a", "a/b/c/d", "a/b/cc"] {
        assert!(store.head(key).await.unwrap_err().is_not_found(), "{key}");
        assert!(store.get(key, None).await.unwrap_err().is_not_found(), "{key}");
        assert!(store.delete(key).await.unwrap_err().is_not_found(), "{key}");
    }
    for prefix in ["b", "a/b/c/", "x/y/"] {
        for depth in [Depth::All, Depth::Level] {
            assert_eq!(store.list(prefix, depth, None).await.unwrap(), ListPage::default(), "{prefix}");
        }
    }
}

pub(super) async fn a_deleted_object_is_gone_and_its_name_free(store: Store) {
    put(store.as_ref(), "d/one", "1").await.unwrap();
    put(store.as_ref(), "d/one-more", "2").await.unwrap();
    store.delete("d/one").await.unwrap();
    assert!(store.head("d/one").await.unwrap_err().is_not_found());
    assert_eq!(list_all(store.as_ref(), "d/", Depth::All).await.0, ["d/one-more"]);
    assert_eq!(put(store.as_ref(), "d/one", "again").await.unwrap(), Put::Created);
    store.delete("d/one").await.unwrap();
    store.delete("d/one-more").await.unwrap();
    assert_eq!(list_all(store.as_ref(), "d", Depth::Level).await, (vec![], vec![], 1));
}

pub(super) async fn listing_goes_past_one_page(store: Store) {
    let keys: Vec<String> = (0..2100).map(|at| format!("many/{}/{at:06}", at % 3)).collect();
    fill(store.as_ref(), &keys).await;
    put(store.as_ref(), "other", "x").await.unwrap();
    let mut expected = keys.clone();
    expected.sort_unstable();
    let (listed, prefixes, pages) = list_all(store.as_ref(), "many/", Depth::All).await;
    assert_eq!(listed, expected);
    assert!(prefixes.is_empty() && pages >= 3, "{pages} pages");
    let level = list_all(store.as_ref(), "many/", Depth::Level).await;
    assert_eq!(level, (vec![], vec!["many/0/".into(), "many/1/".into(), "many/2/".into()], 1));
}

pub(super) async fn a_level_folds_what_lies_deeper(store: Store) {
    let keys = ["l/a", "l/b/1", "l/b/2/3", "l/c", "l/d/1", "m"].map(str::to_owned);
    fill(store.as_ref(), &keys).await;
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let level = async |prefix| {
        let (objects, prefixes, _) = list_all(store.as_ref(), prefix, Depth::Level).await;
        (objects, prefixes)
    };
    assert_eq!(level("l/").await, (owned(&["l/a", "l/c"]), owned(&["l/b/", "l/d/"])));
    assert_eq!(level("l/b").await, (vec![], owned(&["l/b/"])));
    assert_eq!(level("l").await, (vec![], owned(&["l/"])));
    assert_eq!(level("l/b/").await, (owned(&["l/b/1"]), owned(&["l/b/2/"])));
    let root = store.list("", Depth::Level, None).await.unwrap();
    let objects: Vec<_> = root.objects.iter().map(|object| object.key.as_str()).collect();
    assert_eq!(objects, ["m"]);
    // A bucket also holds the probe's object.
    assert!(root.prefixes.iter().filter(|prefix| *prefix != ".probe/").eq(["l/"]), "{:?}", root.prefixes);
}

pub(super) async fn a_level_of_many_folders_goes_past_one_page(store: Store) {
    let mut keys: Vec<String> = (0..1050).map(|at| format!("f/{at:06}/x")).collect();
    keys.extend((0..20).map(|at| format!("f/{:06}-file", at * 50)));
    fill(store.as_ref(), &keys).await;
    let (objects, prefixes, pages) = list_all(store.as_ref(), "f/", Depth::Level).await;
    assert_eq!((objects.len(), prefixes.len()), (20, 1050));
    assert!(objects.is_sorted() && prefixes.is_sorted() && pages >= 2, "{pages} pages");
}

pub(super) async fn names_come_in_byte_order(store: Store) {
    let mut keys = ["o/a-b", "o/a.b", "o/a/b", "o/a0", "o/a_b", "o/aa", "o/-", "o/a/-", "o/a/b.c/d", "o/a/b-c"]
        .map(str::to_owned)
        .to_vec();
    fill(store.as_ref(), &keys).await;
    keys.sort_unstable();
    assert_eq!(list_all(store.as_ref(), "o/", Depth::All).await.0, keys);
}

pub(super) async fn a_prefix_may_end_inside_of_a_name(store: Store) {
    fill(store.as_ref(), &["p/abc/1", "p/abd", "p/b", "pq"].map(str::to_owned)).await;
    assert_eq!(list_all(store.as_ref(), "p/ab", Depth::All).await.0, ["p/abc/1", "p/abd"]);
    assert_eq!(list_all(store.as_ref(), "p", Depth::All).await.0, ["p/abc/1", "p/abd", "p/b", "pq"]);
    assert_eq!(list_all(store.as_ref(), "p/abc/1", Depth::All).await.0, ["p/abc/1"]);
    for prefix in ["/", "/p", "p//", "p/../p/"] {
        let refused = store.list(prefix, Depth::All, None).await.unwrap_err();
        assert!(matches!(refused, StoreError::Invalid { .. }), "{prefix}: {refused}");
    }
}

pub(super) async fn the_clock_is_told_or_unknown(store: Store) {
    if let Some(time) = store.server_time().await.unwrap() {
        assert!((chrono::Utc::now() - time).num_seconds().abs() < 60, "{time}");
    }
}

/// Every version below a prefix.
pub(super) async fn all_versions(store: &dyn ObjectStore, prefix: &str) -> (Vec<ListedVersion>, usize) {
    let (mut versions, mut pages, mut after) = (Vec::new(), 0, None);
    loop {
        let page = store.list_versions(prefix, after.as_ref()).await.unwrap();
        versions.extend(page.versions);
        pages += 1;
        after = page.next;
        if after.is_none() {
            return (versions, pages);
        }
    }
}

pub(super) async fn versions_are_listed_past_one_page_and_deleted_one_by_one(store: Store) {
    let keys: Vec<String> = (0..2100).map(|at| format!("v/{}/{at:06}", at % 3)).collect();
    fill(store.as_ref(), &keys).await;
    put(store.as_ref(), "w", "x").await.unwrap();
    let (versions, pages) = all_versions(store.as_ref(), "v/").await;
    let mut expected = keys.clone();
    expected.sort_unstable();
    // How many come at once is the server's business; that all of them come is not.
    let names: Vec<_> = versions.iter().map(|version| version.key.clone()).collect();
    assert_eq!(names, expected, "{pages} pages");
    assert!(versions.iter().all(|version| version.size == version.key.len() as u64 && version.modified.is_some()));
    let (kept, gone) = versions.split_at(1);
    let deletes = futures::stream::iter(gone).map(|gone| store.delete_version(&gone.key, &gone.version));
    deletes.buffer_unordered(32).for_each(|done| async { done.unwrap() }).await;
    // Once more is once: the reply of the first may have been lost.
    store.delete_version(&gone[0].key, &gone[0].version).await.unwrap();
    assert_eq!(all_versions(store.as_ref(), "v/").await.0, kept);
    assert_eq!(list_all(store.as_ref(), "", Depth::All).await.0.len(), 2 + usize::from(has_probe(&store).await));
}

async fn has_probe(store: &Store) -> bool {
    !list_all(store.as_ref(), ".probe/", Depth::All).await.0.is_empty()
}

pub(super) async fn a_name_that_was_put_again_is_another_version(store: Store) {
    let one = async || all_versions(store.as_ref(), "again").await.0;
    put(store.as_ref(), "again", "first").await.unwrap();
    let first = one().await.remove(0);
    store.delete("again").await.unwrap();
    store.delete_version("again", &first.version).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    put(store.as_ref(), "again", "second time").await.unwrap();
    let second = one().await.remove(0);
    // A bucket without versions has one name for all of them, `null`; every other store tells them apart.
    if second.version != VersionId("null".to_owned()) {
        store.delete_version("again", &first.version).await.unwrap();
        assert_eq!(store.get("again", None).await.unwrap(), "second time");
    }
    store.delete_version("again", &second.version).await.unwrap();
    assert_eq!(one().await, []);
}
