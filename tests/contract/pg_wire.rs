//! The wire clients against a real PostgreSQL: authentication, TLS, streaming, timelines, base backups.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::disallowed_methods)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use drctl::model::{Lsn, SegmentName, Timeline, WalSegmentSize};
use drctl::pg::PgError;
use drctl::pg::conninfo::ConnInfo;
use drctl::pg::replication::{
    BaseBackupEvent, BaseBackupOptions, ReplicationClient, StandbyStatus, WalEvent, WalStream,
};
use drctl::pg::sql::{self, SqlClient};

const BIN: &str = "/usr/lib/postgresql/15/bin";

/// A cluster of its own, stopped and removed when dropped.
struct Rig {
    root: tempfile::TempDir,
    port: u16,
}

impl Rig {
    fn new(hba: &str, settings: &str) -> Self {
        let rig = Self::empty();
        rig.tool(&format!("{BIN}/initdb"), &["-D", &rig.data(), "-A", "trust", "-U", "postgres", "-k", "-N"]);
        rig.write("data/pg_hba.conf", &format!("local all postgres trust\nlocal replication postgres trust\n{hba}"));
        rig.start(settings);
        rig
    }

    fn empty() -> Self {
        let root = tempfile::Builder::new().prefix("drctl-wire").tempdir_in("/tmp").unwrap();
        run("chown", &["postgres", root.path().to_str().unwrap()]);
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { root, port }
    }

    fn start(&self, settings: &str) {
        let (port, root) = (self.port, self.root.path().display());
        let common = "fsync=off\nlisten_addresses='127.0.0.1,127.0.0.2'\nmax_wal_senders=10\nwal_keep_size=0\n";
        self.write(
            "data/postgresql.auto.conf",
            &format!(
                "{}{common}port={port}\nunix_socket_directories='{root}'\n{settings}",
                self.read("data/postgresql.auto.conf")
            ),
        );
        let log = self.path("log");
        self.tool(&format!("{BIN}/pg_ctl"), &["-D", &self.data(), "-w", "-l", log.to_str().unwrap(), "start"]);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn data(&self) -> String {
        self.path("data").to_str().unwrap().to_owned()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
        run("chown", &["postgres", self.path(name).to_str().unwrap()]);
    }

    fn tool(&self, program: &str, arguments: &[&str]) -> Output {
        let mut all = vec!["-u", "postgres", "--", program];
        all.extend(arguments);
        run("runuser", &all)
    }

    fn socket(&self) -> ConnInfo {
        info(&format!("host={} port={} user=postgres", self.root.path().display(), self.port))
    }

    fn tcp(&self, settings: &str) -> ConnInfo {
        info(&format!("host=127.0.0.1 port={} dbname=postgres {settings}", self.port))
    }

    async fn sql(&self) -> SqlClient {
        sql::connect(&self.socket()).await.unwrap()
    }

    async fn replication(&self) -> ReplicationClient {
        ReplicationClient::connect(&self.socket()).await.unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = Command::new("runuser")
            .args([
                "-u",
                "postgres",
                "--",
                &format!("{BIN}/pg_ctl"),
                "-D",
                &self.data(),
                "-m",
                "immediate",
                "-w",
                "stop",
            ])
            .output();
    }
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/tmp").stdin(Stdio::null()).stdout(Stdio::null());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn info(text: &str) -> ConnInfo {
    ConnInfo::parse(text, &|_| None).unwrap()
}

async fn lsn(sql: &SqlClient, expression: &str) -> Lsn {
    let row = sql.query_one(&format!("SELECT ({expression})::text"), &[]).await.unwrap();
    row.get::<_, String>(0).parse().unwrap()
}

/// An authority, a certificate for localhost and 127.0.0.1, one for the role `u_cert`, and a stranger's authority.
fn make_certificates(directory: &Path) {
    let file = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    let authority = |name: &str| {
        let (key, cert) = (file(&format!("{name}.key")), file(&format!("{name}.crt")));
        let subject = format!("/CN={name}");
        run(
            "openssl",
            &[
                "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", &subject, "-keyout", &key,
                "-out", &cert,
            ],
        );
    };
    authority("ca");
    authority("stranger");
    std::fs::write(directory.join("server.ext"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n").unwrap();
    std::fs::write(directory.join("client.ext"), "extendedKeyUsage=clientAuth\n").unwrap();
    for (name, subject) in [("server", "/CN=server"), ("client", "/CN=u_cert")] {
        let (key, request, cert) =
            (file(&format!("{name}.key")), file(&format!("{name}.csr")), file(&format!("{name}.crt")));
        run("openssl", &["req", "-newkey", "rsa:2048", "-nodes", "-subj", subject, "-keyout", &key, "-out", &request]);
        let (ca, ca_key, ext) = (file("ca.crt"), file("ca.key"), file(&format!("{name}.ext")));
        run(
            "openssl",
            &[
                "x509",
                "-req",
                "-in",
                &request,
                "-CA",
                &ca,
                "-CAkey",
                &ca_key,
                "-CAcreateserial",
                "-days",
                "2",
                "-sha384",
                "-extfile",
                &ext,
                "-out",
                &cert,
            ],
        );
        run("chmod", &["600", &key]);
    }
    run("chown", &["postgres", &file("server.key")]);
}

const HBA: &str = "host all,replication u_trust samenet trust
host all,replication u_md5 samenet md5
host all,replication u_scram samenet scram-sha-256
host all,replication u_clear samenet password
hostssl all,replication u_cert samenet cert
";

async fn both(info: &ConnInfo) -> (Option<PgError>, Option<PgError>) {
    let sql = match sql::connect(info).await {
        Ok(client) => client.simple_query("SELECT 1").await.err().map(PgError::from),
        Err(error) => Some(error),
    };
    let replication = match ReplicationClient::connect(info).await {
        Ok(mut client) => {
            let outcome = client.identify_system().await.err();
            client.close().await;
            outcome
        }
        Err(error) => Some(error),
    };
    (sql, replication)
}

async fn authenticated_rig() -> Rig {
    let rig = Rig::empty();
    rig.tool(&format!("{BIN}/initdb"), &["-D", &rig.data(), "-A", "trust", "-U", "postgres", "-N"]);
    rig.write("data/pg_hba.conf", &format!("local all postgres trust\nlocal replication postgres trust\n{HBA}"));
    make_certificates(rig.root.path());
    let root = rig.root.path().display().to_string();
    rig.start(&format!(
        "ssl=on\nssl_ca_file='{root}/ca.crt'\nssl_cert_file='{root}/server.crt'\nssl_key_file='{root}/server.key'\n"
    ));
    let roles = "CREATE ROLE u_trust LOGIN REPLICATION;
        CREATE ROLE u_cert LOGIN REPLICATION;
        CREATE ROLE u_scram LOGIN REPLICATION PASSWORD 'pa ss';
        CREATE ROLE u_clear LOGIN REPLICATION PASSWORD 'pa ss';
        SET password_encryption = 'md5';
        CREATE ROLE u_md5 LOGIN REPLICATION PASSWORD 'pa ss';";
    rig.sql().await.batch_execute(roles).await.unwrap();
    rig
}

#[tokio::test]
async fn every_login_works_and_every_wrong_one_says_why() {
    let rig = authenticated_rig().await;
    let root = rig.root.path().display().to_string();
    let full = format!("sslmode=verify-full sslrootcert={root}/ca.crt");

    for user in ["u_trust", "u_md5", "u_scram", "u_clear"] {
        for tls in ["sslmode=disable", "sslmode=require", full.as_str()] {
            let (sql, replication) = both(&rig.tcp(&format!("user={user} password='pa ss' {tls}"))).await;
            assert_eq!(sql, None, "{user} {tls}");
            if user == "u_clear" && tls == "sslmode=disable" {
                assert!(matches!(replication, Some(PgError::Auth(_))), "clear text password without TLS");
            } else {
                assert_eq!(replication, None, "{user} {tls}");
            }
        }
        if user != "u_trust" {
            for password in ["password=wrong", ""] {
                let (sql, replication) = both(&rig.tcp(&format!("user={user} {password} {full}"))).await;
                assert!(matches!(sql, Some(PgError::Auth(_))), "{user} {password}: {sql:?}");
                assert!(matches!(replication, Some(PgError::Auth(_))), "{user} {password}: {replication:?}");
            }
        }
    }
    let certificate = format!("user=u_cert {full} sslcert={root}/client.crt sslkey={root}/client.key");
    assert_eq!(both(&rig.tcp(&certificate)).await, (None, None));
    let (sql, replication) = both(&rig.tcp(&format!("user=u_cert {full}"))).await;
    assert!(
        matches!((&sql, &replication), (Some(PgError::Auth(_)), Some(PgError::Auth(_)))),
        "{sql:?} {replication:?}"
    );
}

#[tokio::test]
async fn certificates_and_hosts_are_checked() {
    let rig = authenticated_rig().await;
    let root = rig.root.path().display().to_string();
    let (port, user) = (rig.port, "user=u_scram password='pa ss' dbname=postgres");
    let at = |host: &str, rest: &str| info(&format!("host={host} port={port} {user} {rest}"));

    let named = format!("sslmode=verify-full sslrootcert={root}/ca.crt");
    assert_eq!(both(&at("localhost", &named)).await, (None, None));
    for refused in [
        at("127.0.0.1", &format!("sslmode=verify-full sslrootcert={root}/stranger.crt")),
        at("127.0.0.1", &format!("sslmode=verify-ca sslrootcert={root}/stranger.crt")),
        at("127.0.0.1", &format!("sslmode=require sslrootcert={root}/stranger.crt")),
        at("127.0.0.2", &named),
    ] {
        let (sql, replication) = both(&refused).await;
        assert!(
            matches!((&sql, &replication), (Some(PgError::Tls { .. }), Some(PgError::Tls { .. }))),
            "{sql:?} {replication:?}"
        );
    }
    assert_eq!(both(&at("127.0.0.2", &format!("sslmode=verify-ca sslrootcert={root}/ca.crt"))).await, (None, None));

    let several = |rest: &str| info(&format!("host=127.0.0.1,127.0.0.1 port=1,{port} {user} {rest}"));
    assert_eq!(both(&several("target_session_attrs=read-write")).await, (None, None));
    assert_eq!(both(&several("target_session_attrs=prefer-standby")).await, (None, None));
    let (sql, replication) = both(&several("target_session_attrs=standby")).await;
    assert!(matches!((sql, replication), (Some(PgError::Connect { .. }), Some(PgError::Connect { .. }))));
}

async fn collect(stream: &mut WalStream, until: Lsn) -> Vec<u8> {
    let mut bytes = Vec::new();
    while stream.position() < until {
        // Cancelled over and over: no byte may be lost or come twice.
        match tokio::time::timeout(Duration::from_micros(200), stream.next()).await {
            Err(_elapsed) => {}
            Ok(event) => {
                if let WalEvent::Wal { data, .. } = event.unwrap() {
                    bytes.extend_from_slice(&data);
                }
            }
        }
    }
    bytes
}

#[tokio::test]
async fn wal_arrives_whole_and_the_status_is_believed() {
    let rig = Rig::new("", "");
    let sql = rig.sql().await;
    let mut client = rig.replication().await;
    assert_eq!(client.server_version() / 10_000, 15);
    assert_eq!(client.show("wal_segment_size").await.unwrap(), "16MB");
    assert!(matches!(client.show("no_such_setting").await, Err(PgError::Server { .. })));
    assert!(client.show("a; DROP").await.is_err());
    let identity = client.identify_system().await.unwrap();
    let id: i64 = sql.query_one("SELECT system_identifier FROM pg_control_system()", &[]).await.unwrap().get(0);
    assert_eq!((identity.system_id.0, identity.timeline), (u64::try_from(id).unwrap(), Timeline::FIRST));

    client.create_physical_slot("drctl_a", false, true).await.unwrap();
    let again = client.create_physical_slot("drctl_a", false, true).await.unwrap_err();
    assert_eq!(again.sqlstate(), Some("42710"));
    client.create_physical_slot("drctl_t", true, false).await.unwrap();

    let size = WalSegmentSize::DEFAULT;
    let start = size.segment_start(identity.flush_lsn);
    let mut stream = client.start_physical(Some("drctl_a"), start, Timeline::FIRST).await.unwrap();
    sql.batch_execute("CREATE TABLE t AS SELECT i, repeat('x', 500) FROM generate_series(1, 40000) i").await.unwrap();
    let end = lsn(&sql, "pg_switch_wal()").await;
    let end = Lsn(size.segment_start(end).0 + size.bytes());
    sql.batch_execute("INSERT INTO t VALUES (0)").await.unwrap();

    let bytes = collect(&mut stream, end).await;
    let (mut at, mut rest) = (start, bytes.as_slice());
    while at < end {
        let name = SegmentName::containing(Timeline::FIRST, at, size).file_name(size);
        let file = std::fs::read(rig.path("data/pg_wal").join(name)).unwrap();
        assert!(rest.starts_with(&file), "segment at {at}");
        rest = &rest[file.len()..];
        at = Lsn(at.0 + size.bytes());
    }

    let status = StandbyStatus { write: end, flush: start, apply: start, reply_requested: true };
    stream.send_status(status, chrono::Utc::now()).await.unwrap();
    loop {
        if let WalEvent::KeepAlive { server_time, .. } = stream.next().await.unwrap() {
            assert!((chrono::Utc::now() - server_time).num_seconds().abs() < 60);
            break;
        }
    }
    let query = "SELECT write_lsn::text, flush_lsn::text FROM pg_stat_replication WHERE application_name = 'drctl'";
    let row = sql.query_one(query, &[]).await.unwrap();
    assert_eq!((row.get::<_, String>(0), row.get::<_, String>(1)), (end.to_string(), start.to_string()));

    let other = rig.replication().await.start_physical(Some("drctl_a"), start, Timeline::FIRST).await;
    assert!(matches!(other, Err(PgError::SlotInUse(_))), "{other:?}");
    let mut client = stream.stop().await.unwrap();
    client.drop_slot("drctl_a", true).await.unwrap();
    let gone = client.drop_slot("drctl_a", false).await.unwrap_err();
    assert_eq!(gone.sqlstate(), Some("42704"));
    assert_eq!(client.identify_system().await.unwrap().system_id, identity.system_id);
}

#[tokio::test]
async fn removed_wal_is_a_gap_and_a_shutdown_is_not() {
    let rig = Rig::new("", "min_wal_size='32MB'\nmax_wal_size='32MB'\n");
    let sql = rig.sql().await;
    for _ in 0..3 {
        sql.batch_execute("CREATE TABLE IF NOT EXISTS t (i int); INSERT INTO t VALUES (1)").await.unwrap();
        sql.simple_query("SELECT pg_switch_wal()").await.unwrap();
        sql.batch_execute("CHECKPOINT").await.unwrap();
    }
    let start = Lsn(0x100_0000);
    let outcome = match rig.replication().await.start_physical(None, start, Timeline::FIRST).await {
        Ok(mut stream) => stream.next().await.err(),
        Err(error) => Some(error),
    };
    assert!(matches!(outcome, Some(PgError::WalRemoved { start: at, .. }) if at == start), "{outcome:?}");

    let mut client = rig.replication().await;
    let now = client.identify_system().await.unwrap().flush_lsn;
    let mut stream = client.start_physical(None, now, Timeline::FIRST).await.unwrap();
    drop(sql);
    let data = rig.data();
    let stop = tokio::task::spawn_blocking(move || {
        run("runuser", &["-u", "postgres", "--", &format!("{BIN}/pg_ctl"), "-D", &data, "-m", "fast", "-w", "stop"])
    });
    let error = loop {
        match stream.next().await {
            // A server that shuts down waits until everything it sent is confirmed.
            Ok(WalEvent::Wal { .. } | WalEvent::KeepAlive { .. }) => {
                let at = stream.position();
                let status = StandbyStatus { write: at, flush: at, apply: at, reply_requested: false };
                // The server may hang up in between; the reason comes from next().
                let _ = stream.send_status(status, chrono::Utc::now()).await;
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    assert!(error.is_transient(), "{error:?}");
    stop.await.unwrap();
}

#[tokio::test]
async fn a_promotion_ends_the_timeline() {
    let primary = Rig::new("", "");
    let standby = Rig::empty();
    let host = primary.root.path().to_str().unwrap();
    let port = primary.port.to_string();
    let arguments =
        ["-D", &standby.data(), "-h", host, "-p", &port, "-U", "postgres", "-R", "-c", "fast", "-X", "stream"];
    standby.tool(&format!("{BIN}/pg_basebackup"), &arguments);
    standby.start("");

    let prefer = info(&format!(
        "host={host},{} port={port},{} user=postgres target_session_attrs=prefer-standby",
        standby.root.path().display(),
        standby.port
    ));
    let mut client = ReplicationClient::connect(&prefer).await.unwrap();
    assert_eq!(client.show("in_hot_standby").await.unwrap(), "on");
    let start = WalSegmentSize::DEFAULT.segment_start(client.identify_system().await.unwrap().flush_lsn);
    let mut stream = client.start_physical(None, start, Timeline::FIRST).await.unwrap();
    primary.sql().await.batch_execute("CREATE TABLE t (i int)").await.unwrap();
    standby.tool(&format!("{BIN}/pg_ctl"), &["-D", &standby.data(), "-w", "promote"]);

    let (next, switch) = loop {
        if let WalEvent::TimelineEnd { next_timeline, switch_lsn } = stream.next().await.unwrap() {
            break (next_timeline, switch_lsn);
        }
    };
    assert_eq!((next, switch), (Timeline(2), stream.position()));
    let again = stream.next().await.unwrap();
    assert_eq!(again, WalEvent::TimelineEnd { next_timeline: next, switch_lsn: switch });

    let mut client = stream.stop().await.unwrap();
    let history = String::from_utf8(client.timeline_history(next).await.unwrap()).unwrap();
    assert!(history.contains(&switch.to_string()), "{history}");
    assert!(client.timeline_history(Timeline(7)).await.is_err());

    // At the very end of the old timeline there is no copy at all.
    let mut stream = client.start_physical(None, switch, Timeline::FIRST).await.unwrap();
    assert_eq!(stream.next().await.unwrap(), again);
    let mut stream = stream.stop().await.unwrap().start_physical(None, switch, next).await.unwrap();
    let WalEvent::Wal { start, .. } = stream.next().await.unwrap() else { panic!("no WAL on the new timeline") };
    assert_eq!(start, switch);
}

struct Received {
    archives: Vec<(String, Option<String>, Vec<u8>)>,
    manifest: Option<Vec<u8>>,
    notices: Vec<String>,
    start: Option<Lsn>,
    end: Option<Lsn>,
    outcome: Result<ReplicationClient, PgError>,
}

async fn back_up(client: ReplicationClient, manifest: bool) -> Received {
    let label = "it's a test".to_owned();
    let options = BaseBackupOptions { label, fast: true, max_rate: Some(1_048_576), manifest, verify_checksums: true };
    let mut stream = client.base_backup(options).await.unwrap();
    let (mut archives, mut manifest, mut notices) = (Vec::new(), None::<Vec<u8>>, Vec::new());
    let (mut start, mut end) = (None, None);
    let outcome = loop {
        match stream.next().await {
            Ok(Some(BaseBackupEvent::Start { lsn, timeline, tablespaces })) => {
                assert_eq!((timeline, tablespaces.len()), (Timeline::FIRST, 2));
                assert!(tablespaces[0].oid.is_some() && tablespaces[1].oid.is_none());
                assert!(tablespaces[1].size_kib.unwrap() > 1000);
                start = Some(lsn);
            }
            Ok(Some(BaseBackupEvent::Archive { name, location })) => archives.push((name, location, Vec::new())),
            Ok(Some(BaseBackupEvent::ManifestBegin)) => manifest = Some(Vec::new()),
            Ok(Some(BaseBackupEvent::Data(data))) => {
                let sink = manifest.as_mut().unwrap_or_else(|| &mut archives.last_mut().unwrap().2);
                sink.extend_from_slice(&data);
            }
            Ok(Some(BaseBackupEvent::Progress(_))) => {}
            Ok(Some(BaseBackupEvent::Notice(text))) => notices.push(text),
            Ok(Some(BaseBackupEvent::End { lsn, .. })) => end = Some(lsn),
            Ok(None) => break stream.finish(),
            Err(error) => break Err(error),
        }
    };
    Received { archives, manifest, notices, start, end, outcome }
}

#[tokio::test]
async fn a_base_backup_is_complete_and_a_damaged_page_fails_it_after_its_end() {
    let rig = Rig::new("", "");
    let sql = rig.sql().await;
    let space = rig.path("space");
    rig.tool("mkdir", &[space.to_str().unwrap()]);
    sql.batch_execute(&format!("CREATE TABLESPACE s LOCATION '{}'", space.display())).await.unwrap();
    sql.batch_execute("CREATE TABLE t AS SELECT i FROM generate_series(1, 10000) i").await.unwrap();

    let good = back_up(rig.replication().await, true).await;
    let mut client = good.outcome.unwrap();
    assert!(client.identify_system().await.unwrap().flush_lsn >= good.end.unwrap());
    assert!(good.start.unwrap() < good.end.unwrap());
    let names: Vec<_> = good.archives.iter().map(|(name, location, _)| (name.as_str(), location.as_deref())).collect();
    assert_eq!(names.last(), Some(&("base.tar", None)));
    assert!(names[0].0.ends_with(".tar") && names[0].1 == space.to_str());
    let mut base = tar::Archive::new(good.archives[1].2.as_slice());
    let files: Vec<_> = base.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect();
    for file in ["backup_label", "global/pg_control", "PG_VERSION"] {
        assert!(files.iter().any(|name| name == file), "{file}");
    }
    let manifest: serde_json::Value = serde_json::from_slice(&good.manifest.unwrap()).unwrap();
    assert_eq!(manifest["PostgreSQL-Backup-Manifest-Version"], 1);

    let path: String = sql.query_one("SELECT pg_relation_filepath('t')", &[]).await.unwrap().get(0);
    sql.batch_execute("CHECKPOINT").await.unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(rig.path("data").join(path)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"damaged", 8192 + 5000).unwrap();

    let bad = back_up(client, false).await;
    assert!(bad.manifest.is_none());
    assert!(bad.end.is_some(), "the end comes before the error");
    assert!(bad.notices.iter().any(|text| text.contains("checksum")), "{:?}", bad.notices);
    assert_eq!(bad.outcome.unwrap_err().sqlstate(), Some("XX001"));
}

#[tokio::test]
async fn a_command_after_a_cancelled_one_is_refused() {
    let rig = Rig::new("", "");
    let mut client = rig.replication().await;
    client.create_physical_slot("drctl_a", false, true).await.unwrap();
    let mut holder = rig.replication().await;
    let now = holder.identify_system().await.unwrap().flush_lsn;
    let stream = holder.start_physical(Some("drctl_a"), now, Timeline::FIRST).await.unwrap();
    // The server waits for the slot as long as the stream holds it, so the answer cannot win the race.
    let waiting = tokio::time::timeout(Duration::from_millis(50), client.drop_slot("drctl_a", true));
    assert!(waiting.await.is_err());
    assert!(matches!(client.identify_system().await, Err(PgError::Closed(_))));
    client.close().await;
    stream.stop().await.unwrap().close().await;
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let info = info(&format!("host=127.0.0.1 port={port} user=u connect_timeout=1"));
    assert!(matches!(ReplicationClient::connect(&info).await, Err(PgError::Timeout(_))));
    assert!(matches!(sql::connect(&info).await, Err(PgError::Timeout(_))));
}
