//! The rig itself: a test tool that lies would make every other test worthless.

use std::process::Command;
use std::time::{Duration, Instant};

use drctl::model::Lsn;

use crate::support::dirs::{Scratch, postgres_user, size_of};
use crate::support::drctl::Drctl;
use crate::support::ledger::{Entry, Fate, Ledger};
use crate::support::pg::{self, Cluster, MAJORS, Until};
use crate::support::proxy::{Mode, TcpProxy};
use crate::support::s3::{Endpoint, LocalStack, Rgw};
use crate::support::{kms, process};

mod dirs {
    use super::*;

    #[test]
    fn a_scratch_directory_is_open_to_postgres_and_goes_away() {
        let scratch = Scratch::new();
        let own = scratch.postgres_dir("own");
        let mut touch = pg::tool(15, "postgres");
        process::run(touch.arg("--version"));
        if let Some((uid, _)) = postgres_user() {
            use std::os::unix::fs::MetadataExt as _;
            assert_eq!(std::fs::metadata(&own).unwrap().uid(), uid);
        }
        std::fs::create_dir(scratch.join("deep")).unwrap();
        std::fs::write(scratch.join("deep/file"), "12345").unwrap();
        assert_eq!(size_of(scratch.path()), 5);
        let path = scratch.path().to_owned();
        drop(scratch);
        assert!(!path.exists());
    }
}

mod postgres {
    use super::*;

    #[tokio::test]
    async fn every_major_starts_with_its_settings() {
        for major in MAJORS {
            let cluster = Cluster::builder(major)
                .wal_segsize(1)
                .checksums(major != 18)
                .setting("application_name", "it's a rig")
                .start()
                .await;
            let version: u32 = cluster.query("SHOW server_version_num").await.parse().unwrap();
            assert_eq!(version / 10_000, major);
            assert_eq!(cluster.query("SHOW wal_segment_size").await, "1MB");
            assert_eq!(cluster.query("SHOW data_checksums").await, if major == 18 { "off" } else { "on" });
            assert_eq!(
                cluster.query("SELECT reset_val FROM pg_settings WHERE name = 'application_name'").await,
                "it's a rig"
            );
            assert_eq!(cluster.psql("SELECT 1, NULL, 'a'").await.trim(), "1||a");
            assert!(std::fs::read(cluster.data_dir().join("global/pg_control")).unwrap().len() >= 8192);
            cluster.amcheck().await;
        }
    }

    #[tokio::test]
    async fn a_stop_a_kill_and_a_crash_keep_what_was_committed() {
        let mut cluster = Cluster::start_new(15).await;
        cluster.execute("CREATE TABLE t (n int)").await;
        for n in 0..3 {
            cluster.execute(&format!("INSERT INTO t VALUES ({n})")).await;
            match n {
                0 => cluster.restart().await,
                1 => cluster.crash().await,
                _ => {
                    cluster.kill9().await;
                    cluster.start().await;
                }
            }
        }
        assert_eq!(cluster.query("SELECT n FROM t ORDER BY n").await, "0\n1\n2");
        assert_eq!(cluster.log().matches("was not properly shut down").count(), 2);
    }

    #[tokio::test]
    async fn dropping_a_cluster_leaves_nothing() {
        for kill in [false, true] {
            let mut cluster = Cluster::start_new(17).await;
            let lock = std::fs::read_to_string(cluster.data_dir().join("postmaster.pid")).unwrap();
            let pid: u32 = lock.lines().next().unwrap().parse().unwrap();
            let memory = lock.lines().nth(6).unwrap().split_whitespace().nth(1).unwrap().to_owned();
            let segments = || process::run(Command::new("ipcs").arg("-m"));
            let listed =
                |text: String| text.lines().any(|line| line.split_whitespace().nth(1) == Some(memory.as_str()));
            assert!(process::is_alive(pid) && listed(segments()));
            if kill {
                cluster.kill9().await;
            }
            let path = cluster.data_dir().to_owned();
            drop(cluster);
            assert!(!process::is_alive(pid) && !path.exists() && !listed(segments()));
        }
    }

    #[tokio::test]
    async fn a_copy_of_the_data_starts_as_a_restored_cluster() {
        let mut cluster = Cluster::start_new(16).await;
        cluster.pgbench_init(1).await;
        let load = cluster.pgbench(2);
        process::eventually("pgbench writes", Duration::from_secs(20), async || {
            cluster.query("SELECT count(*) > 20 FROM pgbench_history").await == "t"
        })
        .await;
        let lsn = cluster.flush_lsn().await;
        assert!(cluster.insert_lsn().await >= lsn);
        cluster.kill9().await;
        drop(load);
        let scratch = Scratch::new();
        let copy = scratch.join("restored");
        process::run(Command::new("cp").arg("-r").arg(cluster.data_dir()).arg(&copy));
        std::fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        // The rig waits for the end of an archive recovery that finds nothing in the archive.
        std::fs::write(copy.join("recovery.signal"), "").unwrap();
        let settings = [("restore_command", "false")];
        let restored = Cluster::try_start_restored(&copy, 16, &settings, Until::Promoted).await.unwrap();
        assert_eq!(restored.query("SELECT count(*) > 20 FROM pgbench_history").await, "t");
        assert_eq!(restored.query("SELECT timeline_id FROM pg_control_checkpoint()").await, "2");
        restored.amcheck().await;
        let start = restored.query("SELECT redo_wal_file FROM pg_control_checkpoint()").await;
        let path = copy.join("pg_wal").join(start);
        let records = restored.waldump(&["--limit=3", path.to_str().unwrap()]).await;
        assert_eq!(records.lines().count(), 3, "{records}");
        drop(restored);
        assert!(copy.exists(), "a restored directory belongs to the test");
        std::fs::write(copy.join("global/pg_control"), [0; 8192]).unwrap();
        let refused = Cluster::try_start_restored(&copy, 16, &[], Until::Ready).await.unwrap_err();
        assert!(refused.contains("does not start"), "{refused}");
    }
}

mod s3 {
    use super::*;

    #[tokio::test]
    async fn every_shared_server_has_buckets_that_can_be_damaged() {
        for endpoint in [Endpoint::localstack_a(), Endpoint::localstack_b(), Endpoint::rgw_a(), Endpoint::rgw_b()] {
            let bucket = endpoint.bucket().await;
            bucket.put("a/1", vec![0_u8; 3]).await;
            bucket.put("a/2", vec![]).await;
            bucket.put("b", "b").await;
            assert_eq!(bucket.keys("a/").await, ["a/1", "a/2"]);
            bucket.flip_bit("a/1", 9).await;
            assert_eq!(bucket.get("a/1").await.unwrap().as_ref(), [0, 2, 0]);
            bucket.delete("a/1").await;
            assert_eq!(bucket.get("a/1").await, None);
            bucket.wipe().await;
            assert!(bucket.keys("").await.is_empty());
            let locked = endpoint.locked_bucket().await;
            locked.put("x", "1").await;
            assert_ne!(locked.name, bucket.name);
        }
    }

    #[tokio::test]
    async fn rgw_keeps_what_it_acknowledged_through_kill_9_and_freezes() {
        let rgw = Rgw::start().await;
        let bucket = rgw.endpoint.bucket().await;
        bucket.put("before", "kill").await;
        rgw.freeze();
        let frozen = tokio::time::timeout(Duration::from_millis(500), bucket.get("before")).await;
        assert!(frozen.is_err(), "a frozen gateway answers");
        rgw.thaw();
        assert_eq!(bucket.get("before").await.unwrap(), "kill");
        rgw.kill9(false).await;
        rgw.restart().await;
        bucket.put("between", "kills").await;
        rgw.kill9(true).await;
        rgw.restart().await;
        assert_eq!(bucket.keys("").await, ["before", "between"]);
        assert_eq!(bucket.get("between").await.unwrap(), "kills");
    }

    #[tokio::test]
    async fn localstack_forgets_when_killed_but_its_keys_can_be_made_again() {
        let local = LocalStack::start().await;
        let bucket = local.endpoint.bucket().await;
        bucket.put("a", "1").await;
        local.freeze();
        assert!(tokio::time::timeout(Duration::from_millis(500), bucket.get("a")).await.is_err());
        local.thaw();
        assert_eq!(bucket.get("a").await.unwrap(), "1");
        let key = kms::create_key(&local.endpoint, "wiped").await;
        let client = kms::client(&local.endpoint);
        let secret = aws_smithy_types::Blob::new("secret");
        let sealed = client.encrypt().key_id(&key).plaintext(secret.clone()).encryption_context("a", "b").send().await;
        let sealed = sealed.unwrap().ciphertext_blob.unwrap();
        local.restart_empty().await;
        assert!(local.endpoint.client().head_bucket().bucket(&bucket.name).send().await.is_err());
        let open = || client.decrypt().ciphertext_blob(sealed.clone()).encryption_context("a", "b").send();
        assert!(open().await.is_err(), "no key, no plaintext");
        assert_eq!(kms::create_key(&local.endpoint, "wiped").await, key);
        assert_eq!(open().await.unwrap().plaintext.unwrap(), secret);
        let other = client.decrypt().ciphertext_blob(sealed.clone()).encryption_context("a", "c").send().await;
        assert!(other.is_err(), "another context opens it");
    }

    #[tokio::test]
    async fn two_regions_have_their_own_keys() {
        let (a, b) = (Endpoint::localstack_a(), Endpoint::localstack_b());
        let name = crate::support::unique();
        let key_a = kms::create_key(&a, &name).await;
        let key_b = kms::create_key(&b, &name).await;
        assert!(key_a.contains(":us-east-1:") && key_b.contains(":eu-central-1:"), "{key_a} {key_b}");
        let foreign = kms::create_key(&a, &crate::support::unique()).await;
        let blob = aws_smithy_types::Blob::new("x");
        assert!(kms::client(&b).encrypt().key_id(&foreign).plaintext(blob).send().await.is_err());
    }
}

mod proxy {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    /// A proxy before a server that sends back what it gets.
    async fn echo() -> TcpProxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _end = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        TcpProxy::before(port).await
    }

    async fn ask(stream: &mut TcpStream, bytes: usize) -> std::io::Result<usize> {
        stream.write_all(&vec![7; bytes]).await?;
        stream.read_exact(&mut vec![0; bytes]).await
    }

    #[tokio::test]
    async fn each_mode_does_what_it_says_also_to_open_connections() {
        let proxy = echo().await;
        let connect = async || TcpStream::connect(("127.0.0.1", proxy.port())).await;
        let mut open = connect().await.unwrap();
        assert_eq!(ask(&mut open, 1000).await.unwrap(), 1000);
        assert_eq!(proxy.passed(), 2000);

        proxy.set(Mode::Hang).await;
        let limit = Duration::from_millis(200);
        assert!(tokio::time::timeout(limit, ask(&mut open, 10)).await.is_err());
        assert_eq!(proxy.passed(), 2000);
        let mut late = connect().await.unwrap();
        assert!(tokio::time::timeout(limit, ask(&mut late, 10)).await.is_err());
        proxy.set(Mode::Pass).await;
        assert_eq!(open.read(&mut [0; 10]).await.unwrap(), 10, "what hung goes on");

        proxy.set(Mode::Delay(Duration::from_millis(100))).await;
        let before = Instant::now();
        ask(&mut open, 10).await.unwrap();
        assert!(before.elapsed() >= Duration::from_millis(200), "{:?}", before.elapsed());

        proxy.set(Mode::CutAfter(150)).await;
        let mut cut = connect().await.unwrap();
        assert_eq!(ask(&mut cut, 50).await.unwrap(), 50);
        assert!(ask(&mut cut, 50).await.is_err());
        assert!(ask(&mut open, 10).await.is_err(), "it had carried too much already when the cut began");

        proxy.set(Mode::Pass).await;
        let mut open = connect().await.unwrap();
        ask(&mut open, 10).await.unwrap();
        proxy.set(Mode::Refuse).await;
        assert_eq!(connect().await.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        assert!(ask(&mut open, 10).await.is_err());
        proxy.set(Mode::Pass).await;
        ask(&mut connect().await.unwrap(), 10).await.unwrap();
    }

    #[tokio::test]
    async fn s3_goes_through_it() {
        let (proxy, endpoint) = Endpoint::rgw_a().proxied().await;
        let bucket = endpoint.bucket().await;
        bucket.put("a", vec![1; 100_000]).await;
        assert_eq!(bucket.get("a").await.unwrap().len(), 100_000);
        assert!(proxy.passed() > 200_000);
    }
}

mod binary {
    use super::*;

    fn shell(script: &str) -> Drctl {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Drctl::of(command)
    }

    #[tokio::test]
    async fn the_binary_is_found_and_runs() {
        let finished = Drctl::new(["--help"]).run().await;
        assert!(finished.code.is_some(), "{finished}");
    }

    #[tokio::test]
    async fn output_exit_code_and_environment_are_kept() {
        let script = r#"echo "{\"key\": \"$AWS_ACCESS_KEY_ID\", \"x\": \"$DRCTL_X\"}"; echo two >&2; exit 4"#;
        let finished = shell(script).env("DRCTL_X", "y").run().await.code(4);
        assert_eq!(finished.json(), serde_json::json!({"key": "AKTEST", "x": "y"}));
        assert_eq!(finished.stderr, "two\n");
    }

    #[tokio::test]
    async fn a_flood_of_output_holds_nothing_up_and_kill_9_is_seen() {
        let flood = shell("yes | head -c 1000000").run().await.ok();
        assert_eq!(flood.stdout.len(), 1_000_000);
        let mut sleeper = shell("exec sleep 60").spawn();
        assert!(sleeper.is_running());
        assert_eq!(sleeper.kill9().code, None);
        let finished = shell("trap 'exit 9' TERM; echo go; sleep 60 >/dev/null 2>&1 & wait").spawn();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let children = process::children(finished.pid());
        finished.terminate().await.code(9);
        for child in children {
            process::signal(child, rustix::process::Signal::KILL);
        }
    }

    #[tokio::test]
    #[should_panic(expected = "unexpected in the log:")]
    async fn a_warning_that_nobody_announced_fails_the_test() {
        shell("echo '2026-01-01T00:00:00Z  WARN a region lags' >&2").run().await;
    }

    #[tokio::test]
    async fn an_announced_warning_does_not() {
        shell("echo '2026-01-01T00:00:00Z  WARN a region lags' >&2").expect_log("lags").run().await.ok();
    }

    #[tokio::test]
    #[should_panic(expected = "panicked")]
    async fn a_panic_fails_the_test() {
        shell("echo \"thread 'main' panicked at x\" >&2").run().await;
    }
}

mod ledger {
    use super::*;

    #[tokio::test]
    async fn it_finds_a_loss_an_invention_a_change_and_a_hole() {
        let mut cluster = Cluster::start_new(15).await;
        let ledger = Ledger::start(&cluster, 3).await;
        ledger.wait_for(50).await;
        let between = ledger.book();
        assert!(between.entries.len() >= 50 && between.sent >= between.entries.len() as u64);
        // Writers survive the death of the server; its crash recovery is a restore that loses nothing.
        cluster.crash().await;
        ledger.wait_for(50).await;
        let book = ledger.stop().await;
        let everything = Lsn(u64::MAX);
        let verdict = book.verify(&cluster, everything).await.unwrap();
        assert_eq!(verdict.durable, book.entries.len());
        assert!(verdict.restored >= verdict.durable && verdict.restored as u64 <= book.sent);
        // The server may have died between a commit and the word where it is.
        let placed = || book.entries.iter().filter(|entry| entry.lsn < everything);
        let durable = placed().map(|entry| entry.lsn).max().unwrap();
        assert!(durable <= cluster.insert_lsn().await);
        let last = placed().max_by_key(|entry| entry.lsn).unwrap();
        let except = |number: u64, fate| move |entry: &Entry| if entry.number == number { fate } else { Fate::There };
        let wrong = book.judge(&cluster, except(last.number, Fate::Absent)).await.unwrap_err();
        assert!(wrong.contains("behind the point"), "{wrong}");
        let mut torn = book.clone();
        let unanswered = torn.entries.remove(0);
        let wrong = torn.judge(&cluster, except(0, Fate::There)).await.unwrap_err();
        assert!(wrong.contains("COMMIT was never sent"), "{wrong}");
        torn.unanswered.insert(unanswered.number, unanswered.clone());
        torn.judge(&cluster, except(0, Fate::There)).await.unwrap();
        let wrong = torn.judge(&cluster, except(unanswered.number, Fate::Absent)).await.unwrap_err();
        assert!(wrong.contains("unanswered"), "{wrong}");
        let xid = format!("SELECT xmin = '{}'::xid FROM transfer WHERE number = {}", last.xid, last.number);
        assert_eq!(cluster.query(&xid).await, "t");

        let undo = |number: u64| {
            format!(
                "WITH gone AS (DELETE FROM transfer WHERE number = {number} RETURNING *),
                      a AS (UPDATE account SET balance = balance + amount FROM gone WHERE id = source)
                 UPDATE account SET balance = balance - amount FROM gone WHERE id = destination"
            )
        };
        let first = &book.entries[0];
        // The last commit of a writer may be missing if it was not durable, and only then.
        cluster.execute(&undo(last.number)).await;
        book.verify(&cluster, Lsn(last.lsn.0 - 1)).await.unwrap();
        assert!(book.verify(&cluster, last.lsn).await.unwrap_err().contains("is lost"));
        cluster.execute("UPDATE account SET balance = balance + 1 WHERE id = 5").await;
        assert!(book.verify(&cluster, Lsn(0)).await.unwrap_err().contains("account and balance"));
        cluster.execute("UPDATE account SET balance = balance - 1 WHERE id = 5").await;
        cluster.execute(&undo(first.number)).await;
        assert!(book.verify(&cluster, Lsn(0)).await.unwrap_err().contains("before later rows"));
        cluster
            .execute(&format!("UPDATE transfer SET amount = amount + 1 WHERE number = {}", book.entries[9].number))
            .await;
        assert!(book.verify(&cluster, Lsn(0)).await.unwrap_err().contains("says"));
        cluster
            .execute(&format!(
                "UPDATE transfer SET number = {} WHERE number = {}",
                book.sent + 1,
                book.entries[9].number
            ))
            .await;
        assert!(book.verify(&cluster, Lsn(0)).await.unwrap_err().contains("never sent"));
    }
}
