//! The wrappers against stores that fail on command.

use std::sync::Arc;
use std::time::Duration;

use drctl::store::memory::MemoryStore;
use drctl::store::wrap::{Limit, Retry, RetryPolicy};
use drctl::store::{ObjectStore, Put, StoreError};
use futures::future::join_all;
use tokio::time::Instant;

use super::faulty_store::{Call, Fault, FaultyStore};
use super::promises::put;
use super::servers::{Chance, Wall};

fn faulty() -> Arc<FaultyStore> {
    Arc::new(FaultyStore::new(Arc::new(MemoryStore::new("faulty", Arc::new(Wall::default())))))
}

fn retry(inner: Arc<FaultyStore>) -> Retry {
    Retry::new(inner, RetryPolicy::default(), Arc::new(Chance))
}

#[tokio::test(start_paused = true)]
async fn transient_failures_are_repeated_and_bounded() {
    let inner = faulty();
    inner.always(Call::Put, Fault::Fail);
    let begun = Instant::now();
    let error = put(&retry(inner.clone()), "a", "x").await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert_eq!(inner.calls(Call::Put), u64::from(RetryPolicy::default().attempts));
    // 0.2 + 0.4 + … + 6.4 + 10 s, at least half of each.
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(11) && took < Duration::from_secs(25), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn what_will_not_change_is_not_repeated() {
    let inner = faulty();
    let store = retry(inner.clone());
    assert!(store.get("absent", None).await.unwrap_err().is_not_found());
    assert!(store.head("absent").await.unwrap_err().is_not_found());
    assert!(store.delete("absent").await.unwrap_err().is_not_found());
    put(&store, "a", "x").await.unwrap();
    assert!(matches!(put(&store, "a", "y").await.unwrap_err(), StoreError::Conflict { .. }));
    assert_eq!((inner.calls(Call::Get), inner.calls(Call::Head), inner.calls(Call::Put)), (1, 1, 2));
}

#[tokio::test(start_paused = true)]
async fn a_dead_region_ends_at_the_deadline() {
    let inner = faulty();
    inner.everywhere(Fault::Hang);
    let store = retry(inner.clone());
    let begun = Instant::now();
    let error = put(&store, "a", "x").await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    assert_eq!(begun.elapsed().as_secs(), RetryPolicy::default().deadline.as_secs());
    assert!(store.server_time().await.unwrap_err().is_transient());
    inner.heal();
    assert_eq!(put(&store, "a", "x").await.unwrap(), Put::Created);
}

#[tokio::test(start_paused = true)]
async fn a_limit_holds_back_the_rest() {
    let inner = faulty();
    inner.everywhere(Fault::Slow(Duration::from_secs(1)));
    let store = Limit::new(inner, 3);
    let begun = Instant::now();
    let keys: Vec<String> = (0..9).map(|at| format!("k{at}")).collect();
    for done in join_all(keys.iter().map(|key| put(&store, key, "x"))).await {
        done.unwrap();
    }
    assert_eq!(begun.elapsed().as_secs(), 3);
}

#[tokio::test(start_paused = true)]
async fn injected_damage_reaches_the_reader() {
    let inner = faulty();
    inner.on(Call::Get, 1, Fault::FlipBit(9)).on(Call::Get, 2, Fault::Truncate(1)).on(Call::Put, 2, Fault::FlipBit(0));
    put(inner.as_ref(), "a", "xyz").await.unwrap();
    put(inner.as_ref(), "b", "xyz").await.unwrap();
    assert_eq!(inner.get("a", None).await.unwrap(), "x{z");
    assert_eq!(inner.get("a", None).await.unwrap(), "x");
    assert_eq!(inner.get("a", None).await.unwrap(), "xyz");
    assert_eq!(inner.get("b", None).await.unwrap(), "yyz");
}
