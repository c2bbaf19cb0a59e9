//! Key holders: any one of three opens everything, none of them opens nothing, and the writer needs only Encrypt.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::rig3::{Rig3, debts};
use crate::support::process;
use crate::support::proxy::Mode;

#[tokio::test]
async fn any_one_of_three_key_holders_restores_and_none_writes_nothing() {
    let rig = Rig3::new().await;
    rig.fill(1).await;
    rig.backup().run().await.ok();
    let identity = rig.identity().display().to_string();

    rig.alpha.keys.set(Mode::Refuse).await;
    rig.assert_restores("by-beta", &[]).await;

    rig.beta.keys.set(Mode::Refuse).await;
    rig.assert_restores("by-age", &["--age-identity", &identity]).await;

    // The plan was made while somebody could open; without anybody it refuses, and its run does.
    let directory = rig.target_dir("by-nobody");
    let plan = rig.plan(&directory, &["--age-identity", &identity]).await.ok().json();
    let refused = rig.plan(&directory, &[]).await.code(5).json()["refused"].to_string();
    assert!(refused.contains("no key opens the backup"), "{refused}");
    for holder in [&rig.alpha, &rig.beta] {
        assert!(refused.contains(&holder.key), "{} is not named: {refused}", holder.name);
    }
    assert!(refused.contains("age1"), "{refused}");
    let ended = rig.execute(&directory, &[], plan["digest"].as_str().unwrap()).run().await.code(5);
    assert!(ended.stdout.contains("no key opens the backup"), "{ended}");
    assert!(!directory.exists(), "{ended}");

    rig.alpha.keys.set(Mode::Pass).await;
    rig.assert_restores("by-alpha", &[]).await;
}

#[tokio::test]
async fn a_key_holder_that_is_down_owes_a_wrap() {
    let rig = Rig3::new().await;
    rig.fill(1).await;
    rig.alpha.keys.set(Mode::Refuse).await;
    let report = rig.backup().run().await.code(4).json();
    assert_eq!(debts(&report), BTreeMap::new());
    assert_eq!(report["wrap_debts"].as_array().unwrap().len(), 1, "{report}");
    rig.alpha.keys.set(Mode::Pass).await;

    // The backup's keyset and that of its WAL. Whoever may open them pays for the holder that was away.
    let owed = rig.drctl(["keys", "rewrap", "--dry-run", "--json"]).run().await.ok().json();
    assert_eq!((owed["keysets"].as_u64(), owed["added"].as_array().unwrap().len()), (Some(2), 2), "{owed}");
    rig.beta.keys.set(Mode::Refuse).await;
    let closed = rig.drctl(["keys", "rewrap", "--json"]).run().await.code(4).json();
    assert_eq!(
        (closed["added"].as_array().unwrap().len(), closed["owed"].as_array().unwrap().len()),
        (0, 2),
        "{closed}"
    );
    rig.beta.keys.set(Mode::Pass).await;
    let paid = rig.drctl(["keys", "rewrap", "--json"]).run().await.ok().json();
    assert_eq!((paid["added"].as_array().unwrap().len(), paid["owed"].as_array().unwrap().len()), (2, 0), "{paid}");
    let again = rig.drctl(["keys", "rewrap"]).run().await.ok();
    assert!(again.stdout.contains("no wrap was owed"), "{again}");
    rig.beta.keys.set(Mode::Refuse).await;
    rig.assert_restores("restored", &[]).await;
}

#[tokio::test]
async fn a_key_holder_that_comes_back_during_a_backup_owes_nothing() {
    let rig = Rig3::new().await;
    rig.fill(16).await;
    rig.alpha.keys.set(Mode::Refuse).await;
    let before = rig.alpha.objects.passed();
    let backup = rig.backup().spawn();
    process::eventually("pages arrive", Duration::from_secs(60), async || {
        rig.alpha.objects.passed() >= before + 1024 * 1024
    })
    .await;
    rig.alpha.keys.set(Mode::Pass).await;
    let report = backup.wait().await.ok().json();
    assert_eq!(report["wrap_debts"].as_array().unwrap().len(), 0, "{report}");
    rig.beta.keys.set(Mode::Refuse).await;
    rig.assert_restores("restored", &[]).await;
}

#[tokio::test]
async fn a_receiver_asks_again_while_it_holds_the_secret() {
    let rig = Rig3::new().await;
    rig.alpha.keys.set(Mode::Refuse).await;
    let stream = rig.stream().await;
    // Wraps arrive one after the other.
    process::eventually("one wrap is owed", Duration::from_secs(20), async || {
        let owed = rig.drctl(["keys", "rewrap", "--dry-run", "--json"]).run().await.ok().json();
        owed["keysets"] == 1 && owed["added"].as_array().unwrap().len() == 1
    })
    .await;
    rig.alpha.keys.set(Mode::Pass).await;
    stream.terminate().await.ok();
    let owed = rig.drctl(["keys", "rewrap", "--dry-run", "--json"]).run().await.ok().json();
    assert_eq!((owed["keysets"].as_u64(), owed["added"].as_array().unwrap().len()), (Some(1), 0), "{owed}");
}

#[tokio::test]
async fn too_few_key_holders_stop_a_backup() {
    let rig = Rig3::new().await;
    for site in [&rig.alpha, &rig.beta] {
        site.keys.set(Mode::Refuse).await;
    }
    let ended = rig.backup().run().await.code(1);
    assert!(ended.stderr.contains("only 1 of at least 2 key holders"), "{ended}");
    assert_eq!(ended.stderr.matches("kms").count().min(2), 2, "both holders are named: {ended}");
    for region in ["alpha", "beta", "cellar"] {
        assert_eq!(rig.commits(region).await, 0);
    }
}

/// Stands before a server and lets through only what a writer may do, by the request's first line and its action.
#[derive(Debug)]
struct Guard {
    url: String,
    seen: Arc<Mutex<BTreeSet<String>>>,
}

impl Guard {
    async fn before(url: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = format!("http://{}", listener.local_addr().unwrap());
        let upstream = url.strip_prefix("http://").unwrap().to_owned();
        let seen = Arc::new(Mutex::new(BTreeSet::new()));
        let noted = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(watch(client, upstream.clone(), Arc::clone(&noted)));
            }
        });
        Self { url: own, seen }
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().cloned().collect()
    }
}

/// What a request asks for, if `bytes` begin one: `TrentService.Encrypt`, or the method.
fn action(bytes: &[u8]) -> Option<String> {
    let methods = ["GET ", "HEAD ", "PUT ", "POST ", "DELETE "];
    let method = methods.into_iter().find(|method| bytes.starts_with(method.as_bytes()))?.trim();
    let head = String::from_utf8_lossy(bytes);
    let target = head
        .lines()
        .find_map(|line| line.to_lowercase().strip_prefix("x-amz-target:").map(str::trim).map(str::to_owned));
    Some(target.unwrap_or_else(|| method.to_owned()))
}

async fn watch(mut client: TcpStream, upstream: String, seen: Arc<Mutex<BTreeSet<String>>>) {
    let Ok(mut server) = TcpStream::connect(upstream).await else { return };
    let (mut up, mut down) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        let moved = tokio::select! {
            read = client.read(&mut up) => match read {
                Ok(read) if read > 0 => {
                    if let Some(action) = action(&up[..read]) {
                        let allowed = ["GET", "HEAD", "PUT", "trentservice.encrypt"].contains(&action.as_str());
                        seen.lock().unwrap().insert(action);
                        if !allowed {
                            let denied = "HTTP/1.1 403 Forbidden\r\nconnection: close\r\ncontent-length: 35\r\n\
                                          content-type: application/x-amz-json-1.1\r\n\r\n\
                                          {\"__type\": \"AccessDeniedException\"} ";
                            let _closed = client.write_all(denied.as_bytes()).await;
                            return;
                        }
                    }
                    server.write_all(&up[..read]).await
                }
                _ => return,
            },
            read = server.read(&mut down) => match read {
                Ok(read) if read > 0 => client.write_all(&down[..read]).await,
                _ => return,
            },
        };
        if moved.is_err() {
            return;
        }
    }
}

/// The emulators check no policy, so a guard in between does: it denies Decrypt and every deletion.
#[tokio::test]
async fn a_writer_needs_encrypt_only() {
    let (mut alpha, mut beta) = (crate::rig3::Site::alpha().await, crate::rig3::Site::beta().await);
    let mut guards = Vec::new();
    for site in [&mut alpha, &mut beta] {
        let (s3, kms) = (Guard::before(&site.s3_url).await, Guard::before(&site.kms_url).await);
        (site.s3_url, site.kms_url) = (s3.url.clone(), kms.url.clone());
        guards.push((s3, kms));
    }
    let rig = Rig3::of(alpha, beta).await;
    rig.fill(1).await;
    let stream = rig.stream().await;
    rig.backup().run().await.ok();
    stream.terminate().await.ok();
    rig.drctl(["backup", "ledger", "--fast"]).run().await.ok();
    for (s3, kms) in &guards {
        assert!(s3.seen().iter().all(|action| ["GET", "HEAD", "PUT"].contains(&action.as_str())), "{s3:?}");
        assert_eq!(kms.seen(), ["trentservice.encrypt"], "a writer asked for more");
    }
    // The guard bites, and the offline key opens what such a writer wrote.
    let directory = rig.target_dir("restored");
    let denied = rig.plan(&directory, &[]).await.code(5);
    assert!(denied.stdout.contains("no key opens the backup"), "{denied}");
    rig.assert_restores("restored", &["--age-identity", &rig.identity().display().to_string()]).await;
}
