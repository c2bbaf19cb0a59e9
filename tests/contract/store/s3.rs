//! What only a server can do wrong.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_s3::types::{ObjectLockLegalHold, ObjectLockLegalHoldStatus};
use bytes::Bytes;
use chrono::{TimeDelta, Utc};
use drctl::store::s3::{S3Checksum, S3Options, S3Store};
use drctl::store::wrap::{Retry, RetryPolicy};
use drctl::store::{Depth, Digest, ObjectStore, Put, PutOptions, StoreError};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::promises::{all_versions, put};
use super::servers::{Chance, SECRET, Server, Wall, connect, keys};

/// Runs a check against both kinds of server.
async fn on_both<F: Future<Output = ()>>(check: impl Fn(Server) -> F) {
    check(Server::localstack()).await;
    check(Server::rgw()).await;
}

#[tokio::test]
async fn the_probe_proves_create_only() {
    on_both(|server| async move {
        let store = server.store().await;
        assert!(!store.capabilities().create_only);
        let proven = store.probe().await.unwrap();
        assert!(proven.create_only && !proven.versions && !proven.retention, "{proven:?}");
        assert_eq!(store.capabilities(), proven);
        let probes = store.list(".probe/", Depth::All, None).await.unwrap();
        assert_eq!(probes.objects.len(), 1);
        put(&store, "a", "x").await.unwrap();
        assert_eq!(store.list("", Depth::All, None).await.unwrap().objects.len(), 2);
    })
    .await;
}

/// LocalStack behind a proxy that renames the condition's header, so that a real server ignores it.
async fn unconditional() -> Server {
    let server = Server::localstack();
    let upstream = address_of(&server);
    let endpoint = proxy(move |client| rename_condition(client, upstream.clone())).await;
    Server { endpoint, ..server }
}

#[tokio::test]
async fn a_server_that_ignores_the_condition_is_refused() {
    let store = unconditional().await.store().await;
    let refused = store.probe().await.unwrap_err();
    assert!(matches!(refused, StoreError::Invalid { .. }) && !refused.is_transient(), "{refused}");
    assert!(refused.to_string().contains("If-None-Match"), "{refused}");
    let refused = put(&store, "a", "x").await.unwrap_err();
    assert!(matches!(refused, StoreError::Invalid { .. }), "{refused}");
    assert!(store.head("a").await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn a_server_that_ignores_the_condition_where_versions_are_kept_is_refused() {
    let server = Server::rgw();
    server.make_bucket(true).await;
    let refused = connect(server.options()).await.probe().await.unwrap_err();
    assert!(matches!(refused, StoreError::Invalid { .. }), "{refused}");
}

#[tokio::test]
async fn a_single_writer_may_use_it_and_is_protected_from_itself() {
    let server = unconditional().await;
    server.make_bucket(false).await;
    let store = connect(S3Options { single_writer: true, ..server.options() }).await;
    assert!(!store.probe().await.unwrap().create_only);
    assert_eq!(put(&store, "a", "x").await.unwrap(), Put::Created);
    assert_eq!(put(&store, "a", "x").await.unwrap(), Put::AlreadyThere);
    assert!(matches!(put(&store, "a", "y").await.unwrap_err(), StoreError::Conflict { .. }));
    assert_eq!(store.get("a", None).await.unwrap(), "x");
}

#[tokio::test]
async fn without_checksum_headers_a_lost_reply_is_settled_by_reading() {
    on_both(|server| async move {
        server.make_bucket(false).await;
        let store = connect(S3Options { checksum: S3Checksum::WhenRequired, ..server.options() }).await;
        assert_eq!(put(&store, "a", "xyz").await.unwrap(), Put::Created);
        assert_eq!(store.head("a").await.unwrap().digest, None);
        assert_eq!(put(&store, "a", "xyz").await.unwrap(), Put::AlreadyThere);
        assert!(matches!(put(&store, "a", "xyy").await.unwrap_err(), StoreError::Conflict { .. }));
    })
    .await;
}

#[tokio::test]
async fn a_server_that_keeps_checksums_tells_the_digest() {
    let store = Server::localstack().store().await;
    put(&store, "a", "xyz").await.unwrap();
    assert_eq!(store.head("a").await.unwrap().digest, Some(Digest::of(b"xyz")));
}

#[tokio::test]
async fn a_wrong_digest_is_refused_by_a_server_that_checks() {
    let store = Server::localstack().store().await;
    let refused = store.put("a", Bytes::from("x"), Digest::of(b"y"), &PutOptions::default()).await.unwrap_err();
    assert!(!matches!(refused, StoreError::Conflict { .. }), "{refused}");
    assert!(store.head("a").await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn two_prefixes_of_one_bucket_do_not_see_each_other() {
    on_both(|server| async move {
        let one = server.store().await;
        let whole = connect(S3Options { prefix: String::new(), ..server.options() }).await;
        let other = connect(S3Options { prefix: "some/prefix2/".to_owned(), ..server.options() }).await;
        put(&one, "a", "1").await.unwrap();
        put(&other, "a", "2").await.unwrap();
        assert_eq!(one.get("a", None).await.unwrap(), "1");
        assert_eq!(whole.get("some/prefix2/a", None).await.unwrap(), "2");
        let listed = one.list("a", Depth::All, None).await.unwrap();
        assert_eq!(listed.objects.len(), 1);
        assert!(one.address().ends_with("/some/prefix") && other.address().ends_with("/some/prefix2"));
    })
    .await;
}

#[tokio::test]
async fn a_missing_bucket_is_not_found() {
    on_both(|server| async move {
        let store = connect(server.options()).await;
        for error in [
            put(&store, "a", "x").await.unwrap_err(),
            store.get("a", None).await.unwrap_err(),
            store.head("a").await.unwrap_err(),
            store.list("", Depth::All, None).await.unwrap_err(),
            store.delete("a").await.unwrap_err(),
            store.server_time().await.unwrap_err(),
        ] {
            assert!(error.is_not_found() && error.to_string().contains(&server.bucket), "{error}");
        }
    })
    .await;
}

#[tokio::test]
async fn wrong_credentials_are_denied_and_never_shown() {
    let server = Server::rgw();
    server.make_bucket(false).await;
    for (id, secret) in [("AKTEST", "WRONGSECRETWRONGSECRET"), ("AKNOBODY", SECRET)] {
        let store = connect(S3Options { credentials: Some(keys(id, secret)), ..server.options() }).await;
        for error in [
            put(&store, "a", "x").await.unwrap_err(),
            store.get("a", None).await.unwrap_err(),
            store.head("a").await.unwrap_err(),
            store.list("", Depth::All, None).await.unwrap_err(),
            store.delete("a").await.unwrap_err(),
        ] {
            let text = format!("{error} {error:?}");
            assert!(matches!(error, StoreError::Denied { .. }) && !error.is_transient(), "{text}");
            assert!(text.contains("SignatureDoesNotMatch") || text.contains("InvalidAccessKeyId"), "{text}");
            assert!(!text.contains(secret) && !text.to_lowercase().contains("authorization"), "{text}");
        }
        assert!(store.server_time().await.unwrap().is_some());
        assert!(!format!("{store:?} {:?}", keys(id, secret)).contains(secret));
    }
}

#[tokio::test]
async fn a_clock_that_is_off_is_learned_from_the_server() {
    let server = Server::rgw();
    server.make_bucket(false).await;
    for hours in [-2, 2] {
        let skewed = async || {
            let clock = Arc::new(Wall { off: TimeDelta::hours(hours) });
            S3Store::connect(server.options(), clock, Arc::new(Chance)).await.unwrap()
        };
        let error = skewed().await.head("absent").await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        let told = skewed().await.server_time().await.unwrap().unwrap();
        assert!((Utc::now() - told).num_seconds().abs() < 60, "{told}");
        let store = Retry::new(Arc::new(skewed().await), RetryPolicy::default(), Arc::new(Chance));
        put(&store, &format!("skew{}", hours + 2), "x").await.unwrap();
    }
}

#[tokio::test]
async fn a_server_that_is_down_is_unavailable_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let store = connect(Server { endpoint, ..Server::localstack() }.options()).await;
    let begun = Instant::now();
    let error = put(&store, "a", "x").await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }) && error.to_string().contains("refused"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn a_server_that_hangs_ends_within_the_attempt_timeout() {
    let endpoint = proxy(|mut client| async move {
        let mut ignored = Vec::new();
        let _end = client.read_to_end(&mut ignored).await;
    })
    .await;
    let server = Server { endpoint, ..Server::localstack() };
    let store = connect(S3Options { attempt_timeout: Duration::from_secs(1), ..server.options() }).await;
    for call in ["put", "head", "get", "list", "delete", "time"] {
        let begun = Instant::now();
        let error = match call {
            "put" => put(&store, "a", vec![1; 1 << 20]).await.unwrap_err(),
            "head" => store.head("a").await.unwrap_err(),
            "get" => store.get("a", None).await.unwrap_err(),
            "list" => store.list("", Depth::All, None).await.unwrap_err(),
            "delete" => store.delete("a").await.unwrap_err(),
            _ => store.server_time().await.unwrap_err(),
        };
        assert!(matches!(error, StoreError::Unavailable { .. }), "{call}: {error}");
        assert!(begun.elapsed() < Duration::from_secs(2), "{call}: {:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn a_body_that_stops_in_the_middle_is_truncated_or_late() {
    on_both(|server| async move {
        let store = server.store().await;
        put(&store, "a", vec![1; 1 << 20]).await.unwrap();
        let upstream = address_of(&server);
        for (then_hang, truncated) in [(false, true), (true, false)] {
            let upstream = upstream.clone();
            let endpoint = proxy(move |client| cut_reply(client, upstream.clone(), 300_000, then_hang)).await;
            let options = Server { endpoint, ..server.clone() }.options();
            let cut = connect(S3Options { attempt_timeout: Duration::from_secs(2), ..options }).await;
            for range in [None, Some(1000..900_000)] {
                let error = cut.get("a", range).await.unwrap_err();
                assert_eq!(matches!(error, StoreError::Truncated { .. }), truncated, "{error}");
                assert!(error.is_transient(), "{error}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_locked_object_is_retained() {
    on_both(|server| async move {
        server.make_bucket(true).await;
        // RGW 16 does not honour the condition in a bucket with versions, and a lock needs versions.
        let single_writer = server.endpoint == Server::rgw().endpoint;
        let store = connect(S3Options { single_writer, ..server.options() }).await;
        let proven = store.probe().await.unwrap();
        assert!(proven.versions && proven.retention, "{proven:?}");
        let until = Utc::now() + TimeDelta::minutes(10);
        let lock = PutOptions { retain_until: Some(until) };
        let body = Bytes::from("locked");
        let digest = Digest::of(&body);
        assert_eq!(store.put("a", body.clone(), digest, &lock).await.unwrap(), Put::Created);
        assert_eq!(store.put("a", body, digest, &lock).await.unwrap(), Put::AlreadyThere);
        let error = store.delete("a").await.unwrap_err();
        assert!(matches!(error, StoreError::Retained { .. }) && !error.is_transient(), "{error}");
        assert_eq!(store.get("a", None).await.unwrap(), "locked");
        put(&store, "b", "free").await.unwrap();
        store.delete("b").await.unwrap();
        let left = server.client().list_object_versions().bucket(&server.bucket).prefix("some/prefix/b").send().await;
        let left = left.unwrap();
        assert!(left.versions().is_empty() && left.delete_markers().is_empty(), "{left:?}");
    })
    .await;
}

/// A hold has no end, and an object may have it without a lock.
#[tokio::test]
async fn a_legal_hold_is_told_before_it_refuses_a_delete() {
    on_both(|server| async move {
        let store = server.locked_store().await;
        put(&store, "a", "held").await.unwrap();
        let version = all_versions(&store, "a").await.0.remove(0).version;
        let hold = async |status| {
            let hold = ObjectLockLegalHold::builder().status(status).build();
            let request = server.client().put_object_legal_hold().bucket(&server.bucket).key("some/prefix/a");
            request.legal_hold(hold).send().await.unwrap();
        };
        assert!(!store.is_held("a", &version).await.unwrap());
        hold(ObjectLockLegalHoldStatus::On).await;
        assert!(store.is_held("a", &version).await.unwrap());
        assert_eq!(store.locked_until("a", Some(&version)).await.unwrap(), None);
        let error = store.delete_version("a", &version).await.unwrap_err();
        assert!(matches!(error, StoreError::Retained { until: None, .. }), "{error}");
        hold(ObjectLockLegalHoldStatus::Off).await;
        assert!(!store.is_held("a", &version).await.unwrap());
        store.delete_version("a", &version).await.unwrap();

        let free = Server { bucket: format!("{}-free", server.bucket), ..server }.store().await;
        put(&free, "a", "free").await.unwrap();
        let version = all_versions(&free, "a").await.0.remove(0).version;
        assert!(!free.is_held("a", &version).await.unwrap());
    })
    .await;
}

#[tokio::test]
async fn where_versions_are_kept_each_is_listed_and_deleted_by_itself() {
    on_both(|server| async move {
        server.make_bucket(true).await;
        let single_writer = server.endpoint == Server::rgw().endpoint;
        let store = connect(S3Options { single_writer, ..server.options() }).await;
        let ours = put(&store, "a", "ours").await;
        assert_eq!(ours.unwrap(), Put::Created);
        let (first, _) = all_versions(&store, "a").await;
        // Somebody with more rights than drctl writes over it, and hides both.
        let (client, bucket) = (server.client(), &server.bucket);
        let body = aws_sdk_s3::primitives::ByteStream::from_static(b"theirs");
        client.put_object().bucket(bucket).key("some/prefix/a").body(body).send().await.unwrap();
        client.delete_object().bucket(bucket).key("some/prefix/a").send().await.unwrap();
        assert!(store.get("a", None).await.unwrap_err().is_not_found());
        let (all, _) = all_versions(&store, "a").await;
        assert_eq!(all.len(), 3, "{all:?}");
        assert!(all.contains(&first[0]));
        for listed in all.iter().filter(|listed| **listed != first[0]) {
            store.delete_version("a", &listed.version).await.unwrap();
        }
        assert_eq!(store.get("a", None).await.unwrap(), "ours");
        assert_eq!(all_versions(&store, "a").await.0, first);
        store.delete_version("a", &first[0].version).await.unwrap();
        assert_eq!(all_versions(&store, "a").await.0, []);

        let lock = PutOptions { retain_until: Some(Utc::now() + TimeDelta::minutes(10)) };
        store.put("locked", Bytes::from("x"), Digest::of(b"x"), &lock).await.unwrap();
        let (locked, _) = all_versions(&store, "locked").await;
        let error = store.delete_version("locked", &locked[0].version).await.unwrap_err();
        assert!(matches!(error, StoreError::Retained { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_lock_that_the_bucket_cannot_keep_is_refused() {
    on_both(|server| async move {
        let store = server.store().await;
        let lock = PutOptions { retain_until: Some(Utc::now() + TimeDelta::minutes(10)) };
        let error = store.put("a", Bytes::from("x"), Digest::of(b"x"), &lock).await.unwrap_err();
        assert!(matches!(error, StoreError::Invalid { .. }), "{error}");
        assert!(store.head("a").await.unwrap_err().is_not_found());
    })
    .await;
}

#[tokio::test]
async fn names_that_are_not_ours_are_not_listed() {
    on_both(|server| async move {
        let store = server.store().await;
        put(&store, "x/a", "1").await.unwrap();
        for foreign in ["some/prefix/x/B", "some/prefix/x/", "some/prefix/x/a b&<", "some/prefix-x/a"] {
            let body = aws_sdk_s3::primitives::ByteStream::from_static(b"x");
            server.client().put_object().bucket(&server.bucket).key(foreign).body(body).send().await.unwrap();
        }
        let listed = store.list("x/", Depth::All, None).await.unwrap();
        assert_eq!(listed.objects.len(), 1, "{listed:?}");
    })
    .await;
}

#[tokio::test]
async fn options_that_cannot_work_are_refused_before_any_call() {
    let options = S3Options { prefix: "a/../b".to_owned(), ..Server::localstack().options() };
    let refused = S3Store::connect(options, Arc::new(Wall::default()), Arc::new(Chance)).await.unwrap_err();
    assert!(matches!(refused, StoreError::Invalid { .. }), "{refused}");
}

fn address_of(server: &Server) -> String {
    server.endpoint.trim_start_matches("http://").to_owned()
}

/// Listens on a free port and hands every connection to `serve`, as long as the test's runtime lives.
async fn proxy<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> String
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(serve(client));
        }
    });
    endpoint
}

/// Passes everything on, with another name of the same length for the condition's header.
async fn rename_condition(client: TcpStream, upstream: String) {
    let server = TcpStream::connect(upstream).await.unwrap();
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let back = tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
        let header = b"\r\nif-none-match:";
        if let Some(at) = buffer[..read].windows(header.len()).position(|window| window == header) {
            buffer[at + 2..at + 4].copy_from_slice(b"xx");
        }
        to_server.write_all(&buffer[..read]).await.unwrap();
    }
    back.abort();
}

/// Passes on the request and the first bytes of the reply, and then closes or falls silent.
async fn cut_reply(client: TcpStream, upstream: String, bytes: u64, then_hang: bool) {
    let server = TcpStream::connect(upstream).await.unwrap();
    let ((mut from_client, mut to_client), (from_server, mut to_server)) = (client.into_split(), server.into_split());
    let forth = tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
    let _cut = tokio::io::copy(&mut from_server.take(bytes), &mut to_client).await;
    if then_hang {
        std::future::pending::<()>().await;
    }
    forth.abort();
}
