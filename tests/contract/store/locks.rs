//! What the contract of `ObjectStore` says of locks, as checks that any store with locks must pass.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, SubsecRound as _, TimeDelta, Utc};
use drctl::store::{Digest, ObjectStore, Put, PutOptions, StoreError};

use super::promises::{all_versions, put};

type Store = Arc<dyn ObjectStore>;

async fn put_locked(store: &Store, key: &str, until: DateTime<Utc>) -> Put {
    let body = Bytes::from(key.to_owned());
    let options = PutOptions { retain_until: Some(until) };
    store.put(key, body.clone(), Digest::of(&body), &options).await.unwrap()
}

fn within(seconds: i64) -> DateTime<Utc> {
    Utc::now().trunc_subsecs(0) + TimeDelta::seconds(seconds)
}

async fn is_retained(store: &Store, key: &str) -> bool {
    let version = all_versions(store.as_ref(), key).await.0.remove(0).version;
    match store.delete_version(key, &version).await {
        Ok(()) => false,
        Err(StoreError::Retained { until, .. }) => {
            assert_eq!(until, store.locked_until(key, Some(&version)).await.unwrap());
            true
        }
        Err(error) => panic!("{error}"),
    }
}

pub(super) async fn a_lock_holds_from_the_put_on(store: Store) {
    let until = within(600);
    assert_eq!(put_locked(&store, "a/locked", until).await, Put::Created);
    assert_eq!(store.locked_until("a/locked", None).await.unwrap(), Some(until));
    assert!(is_retained(&store, "a/locked").await);
    assert!(matches!(store.delete("a/locked").await, Err(StoreError::Retained { .. })));
    assert_eq!(store.get("a/locked", None).await.unwrap(), "a/locked");
    // A part of a second would be cut off: the lock ends after it rather than before.
    let odd = until + TimeDelta::milliseconds(1);
    put_locked(&store, "a/odd", odd).await;
    assert!(store.locked_until("a/odd", None).await.unwrap() >= Some(odd));
}

pub(super) async fn a_lock_is_made_longer_and_never_shorter(store: Store) {
    let (until, later) = (within(600), within(1200));
    put_locked(&store, "x", until).await;
    store.extend("x", later).await.unwrap();
    assert_eq!(store.locked_until("x", None).await.unwrap(), Some(later));
    // Somebody else needs it for longer than we do: nothing to do, and nothing wrong.
    store.extend("x", until).await.unwrap();
    assert_eq!(store.locked_until("x", None).await.unwrap(), Some(later));
    // What was never locked is locked from now on.
    put(store.as_ref(), "free", "x").await.unwrap();
    store.extend("free", until).await.unwrap();
    assert_eq!(store.locked_until("free", None).await.unwrap(), Some(until));
    assert!(is_retained(&store, "free").await);
    assert!(store.extend("nothing", until).await.unwrap_err().is_not_found());
}

pub(super) async fn the_same_bytes_again_get_the_lock_that_was_asked_for(store: Store) {
    let (until, later) = (within(600), within(1200));
    put(store.as_ref(), "twice", "twice").await.unwrap();
    assert_eq!(put_locked(&store, "twice", until).await, Put::AlreadyThere);
    assert_eq!(store.locked_until("twice", None).await.unwrap(), Some(until));
    assert_eq!(put_locked(&store, "twice", later).await, Put::AlreadyThere);
    assert_eq!(put_locked(&store, "twice", until).await, Put::AlreadyThere);
    assert_eq!(put(store.as_ref(), "twice", "twice").await.unwrap(), Put::AlreadyThere);
    assert_eq!(store.locked_until("twice", None).await.unwrap(), Some(later));
    assert_eq!(all_versions(store.as_ref(), "twice").await.0.len(), 1);
}

pub(super) async fn what_has_no_lock_has_none(store: Store) {
    put(store.as_ref(), "free", "x").await.unwrap();
    assert_eq!(store.locked_until("free", None).await.unwrap(), None);
    assert!(store.locked_until("nothing", None).await.unwrap_err().is_not_found());
    assert!(!is_retained(&store, "free").await);
}

pub(super) async fn when_a_lock_is_over_the_object_goes(store: Store) {
    put_locked(&store, "short", within(3)).await;
    assert!(is_retained(&store, "short").await);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(store.locked_until("short", None).await.unwrap().is_some_and(|until| until < Utc::now()));
    assert!(!is_retained(&store, "short").await);
    assert!(store.get("short", None).await.unwrap_err().is_not_found());
}
