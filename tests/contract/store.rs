//! One set of promises, kept by every store.

use std::sync::Arc;
use std::time::Duration;

use drctl::store::ObjectStore;
use drctl::store::dir::DirStore;
use drctl::store::memory::MemoryStore;

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../support/faulty_store.rs"]
mod faulty_store;

mod faults;
mod locks;
mod promises;
mod s3;
mod servers;

use servers::{Server, Wall};

/// A store under test and what must live as long as it does.
struct Subject {
    store: Arc<dyn ObjectStore>,
    _directory: Option<tempfile::TempDir>,
}

async fn memory() -> Subject {
    Subject { store: Arc::new(MemoryStore::new("test", Arc::new(Wall::default()))), _directory: None }
}

async fn dir() -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::create(&directory.path().join("region/one")).await.unwrap();
    Subject { store: Arc::new(store), _directory: Some(directory) }
}

async fn localstack() -> Subject {
    Subject { store: Arc::new(Server::localstack().store().await), _directory: None }
}

async fn rgw() -> Subject {
    Subject { store: Arc::new(Server::rgw().store().await), _directory: None }
}

async fn localstack_with_locks() -> Subject {
    Subject { store: Arc::new(Server::localstack().locked_store().await), _directory: None }
}

async fn rgw_with_locks() -> Subject {
    Subject { store: Arc::new(Server::rgw().locked_store().await), _directory: None }
}

/// Every promise as a test of its own, for every store.
macro_rules! promises {
    ($($store:ident: $suite:ident: $($promise:ident)*;)*) => { $(
        mod $store {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $promise() {
                    let subject = super::$store().await;
                    let kept = super::$suite::$promise(Arc::clone(&subject.store));
                    tokio::time::timeout(super::PATIENCE, kept).await.expect("the promise takes too long");
                }
            )*
            use std::sync::Arc;
        }
    )* };
}

const PATIENCE: Duration = Duration::from_secs(120);

macro_rules! for_every_store {
    ($($promise:ident)*) => { for_every_store!(@ [memory dir localstack rgw] [$($promise)*]); };
    (@ [$($store:ident)*] $all:tt) => { $( for_every_store!(@one $store $all); )* };
    (@one $store:ident [$($promise:ident)*]) => { promises!($store: promises: $($promise)*;); };
}

for_every_store! {
    of_racing_writers_exactly_one_wins
    racing_writers_of_the_same_bytes_all_succeed
    the_same_bytes_again_are_already_there
    other_bytes_are_a_conflict_and_change_nothing
    a_lost_reply_is_settled_by_repetition
    ranges_are_exact
    a_range_beyond_the_end_is_truncated
    an_empty_object_is_an_object
    a_large_object_comes_back
    every_allowed_character_may_stand_in_a_name
    names_outside_of_the_contract_are_refused
    what_is_absent_is_not_found
    a_deleted_object_is_gone_and_its_name_free
    listing_goes_past_one_page
    versions_are_listed_past_one_page_and_deleted_one_by_one
    a_name_that_was_put_again_is_another_version
    a_level_folds_what_lies_deeper
    a_level_of_many_folders_goes_past_one_page
    names_come_in_byte_order
    a_prefix_may_end_inside_of_a_name
    the_clock_is_told_or_unknown
}

/// Memory locks always; its promises have a name of their own here.
async fn memory_with_locks() -> Subject {
    memory().await
}

macro_rules! for_every_store_with_locks {
    ($($promise:ident)*) => {
        for_every_store_with_locks!(@ [memory_with_locks localstack_with_locks rgw_with_locks] [$($promise)*]);
    };
    (@ [$($store:ident)*] $all:tt) => { $( for_every_store_with_locks!(@one $store $all); )* };
    (@one $store:ident [$($promise:ident)*]) => { promises!($store: locks: $($promise)*;); };
}

for_every_store_with_locks! {
    a_lock_holds_from_the_put_on
    a_lock_is_made_longer_and_never_shorter
    the_same_bytes_again_get_the_lock_that_was_asked_for
    what_has_no_lock_has_none
    when_a_lock_is_over_the_object_goes
}
