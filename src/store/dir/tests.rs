use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::time::Duration;

use proptest::prelude::*;
use rustix::io::Errno;

use super::error::Call;
use super::*;

async fn region() -> (tempfile::TempDir, DirStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::create(&directory.path().join("region")).await.unwrap();
    (directory, store)
}

async fn put(store: &DirStore, key: &str, body: &'static str) -> Result<Put, StoreError> {
    store.put(key, body.into(), Digest::of(body.as_bytes()), &PutOptions::default()).await
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[tokio::test]
async fn nobody_else_may_read_and_nothing_unfinished_stays() {
    let (directory, store) = region().await;
    put(&store, "a/b", "x").await.unwrap();
    let root = directory.path().join("region");
    assert_eq!([mode(&root), mode(&root.join("a")), mode(&root.join("+tmp"))], [0o700; 3]);
    assert_eq!(mode(&root.join("a/b")), 0o600);
    put(&store, "a/b", "y").await.unwrap_err();
    assert_eq!(fs::read_dir(root.join("+tmp")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_missing_root_is_not_found_and_a_removed_one_is_not_empty() {
    let (directory, store) = region().await;
    assert!(DirStore::open(&directory.path().join("other")).await.unwrap_err().is_not_found());
    put(&store, "a", "x").await.unwrap();
    fs::remove_dir_all(directory.path().join("region")).unwrap();
    for error in [
        store.get("a", None).await.unwrap_err(),
        store.list("", Depth::All, None).await.unwrap_err(),
        put(&store, "b", "x").await.unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    }
}

#[tokio::test]
async fn links_are_refused_aloud() {
    let (directory, store) = region().await;
    let (root, outside) = (directory.path().join("region"), directory.path().join("outside"));
    fs::create_dir(&outside).unwrap();
    File::create(outside.join("secret")).unwrap();
    fs::create_dir(root.join("real")).unwrap();
    symlink(&outside, root.join("linked")).unwrap();
    symlink(outside.join("secret"), root.join("real/file")).unwrap();
    for key in ["linked/secret", "real/file"] {
        for error in [
            store.get(key, None).await.unwrap_err(),
            store.head(key).await.unwrap_err(),
            put(&store, key, "x").await.unwrap_err(),
            store.delete(key).await.unwrap_err(),
        ] {
            assert!(matches!(error, StoreError::Invalid { .. }), "{error}");
            assert!(error.to_string().contains("symbolic link"), "{error}");
        }
    }
    for (prefix, depth) in [("", Depth::All), ("", Depth::Level), ("linked/", Depth::All), ("real/", Depth::Level)] {
        assert!(matches!(store.list(prefix, depth, None).await, Err(StoreError::Invalid { .. })), "{prefix}");
    }
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[tokio::test]
async fn a_name_is_an_object_or_a_directory() {
    let (_directory, store) = region().await;
    put(&store, "a/b", "x").await.unwrap();
    for key in ["a", "a/b/c"] {
        let error = put(&store, key, "x").await.unwrap_err();
        assert!(matches!(error, StoreError::Invalid { .. }), "{key}: {error}");
    }
}

#[tokio::test]
async fn only_abandoned_writes_are_swept_and_none_is_listed() {
    let (directory, store) = region().await;
    let unfinished = directory.path().join("region/+tmp");
    fs::create_dir(&unfinished).unwrap();
    let own = format!("{}-0", std::process::id());
    for (name, age) in [("1-7", 25), ("1-8", 23), (own.as_str(), 0)] {
        let file = File::create(unfinished.join(name)).unwrap();
        let written = file.metadata().unwrap().modified().unwrap();
        file.set_modified(written - Duration::from_secs(age * 3600)).unwrap();
    }
    put(&store, "a", "x").await.unwrap();
    let mut left: Vec<_> = fs::read_dir(&unfinished).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort_unstable();
    let mut expected = ["1-8", own.as_str()];
    expected.sort_unstable();
    assert_eq!(left, expected);
    assert_eq!(store.list("", Depth::All, None).await.unwrap().objects.len(), 1);
}

#[tokio::test]
async fn an_empty_directory_is_nothing() {
    let (directory, store) = region().await;
    fs::create_dir_all(directory.path().join("region/a/b")).unwrap();
    assert_eq!(store.list("", Depth::Level, None).await.unwrap(), ListPage::default());
    put(&store, "a/b/c", "x").await.unwrap();
    assert_eq!(store.list("", Depth::Level, None).await.unwrap().prefixes, ["a/"]);
}

#[test]
fn full_disks_quotas_and_permissions_keep_their_meaning() {
    let call = Call { operation: "put", key: "a", address: "dir:/x" };
    for errno in [Errno::NOSPC, Errno::DQUOT] {
        assert!(matches!(call.failed(errno), StoreError::Full { .. }));
    }
    for errno in [Errno::ACCESS, Errno::PERM, Errno::ROFS] {
        assert!(matches!(call.failed(errno), StoreError::Denied { .. }));
    }
    for errno in [Errno::IO, Errno::STALE, Errno::TIMEDOUT, Errno::MFILE] {
        assert!(matches!(call.failed(errno), StoreError::Unavailable { .. }));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A directory lists any set of names exactly as a sorted map of them would.
    #[test]
    fn a_listing_is_the_sorted_names(names in prop::collection::btree_set("[ab.-]{1,2}(/[ab.-]{1,2}){0,2}", 1..12), prefix in "[ab.-]{0,2}(/[ab]{0,1})?") {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (_directory, store) = region().await;
            let mut stored = Vec::new();
            for name in &names {
                if put(&store, name, "x").await.is_ok() {
                    stored.push(name.clone());
                }
            }
            let expected: Vec<_> = stored.iter().filter(|name| name.starts_with(&prefix)).collect();
            let Ok(page) = store.list(&prefix, Depth::All, None).await else {
                return assert!(name::check_prefix("", &prefix).is_err(), "{prefix:?}");
            };
            assert!(page.objects.iter().map(|object| &object.key).eq(expected), "{prefix:?}: {page:?}");
            for (at, object) in page.objects.iter().enumerate() {
                let rest = store.list(&prefix, Depth::All, Some(&ListToken(object.key.clone()))).await.unwrap();
                assert_eq!(&rest.objects[..], &page.objects[at + 1..]);
            }
        });
    }
}

/// Below and above the size from which bytes go past the page cache, and with every kind of rest behind whole blocks.
#[tokio::test]
async fn objects_of_all_lengths_come_back() {
    let (directory, store) = region().await;
    for length in [0, 1, 4095, 65_535, 65_536, 65_537, 69_632, 1_048_575, 1_048_576, 1_052_673, 3_145_728, 3_149_825] {
        let body: Vec<u8> = (0..length).map(|at: u32| u8::try_from(at % 251).unwrap()).collect();
        let (key, digest) = (format!("lengths/{length}"), Digest::of(&body));
        let body = Bytes::from(body);
        assert_eq!(store.put(&key, body.clone(), digest, &PutOptions::default()).await.unwrap(), Put::Created);
        assert_eq!(store.get(&key, None).await.unwrap(), body, "{length}");
        let again = store.put(&key, body, digest, &PutOptions::default()).await.unwrap();
        assert_eq!(again, Put::AlreadyThere, "{length}");
    }
    assert_eq!(mode(&directory.path().join("region/lengths/3149825")), 0o600);
}
