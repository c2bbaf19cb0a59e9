//! A real cluster with everything in it that a base backup must treat specially.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use drctl::pg::conninfo::ConnInfo;
use drctl::pg::instance::{Instance, InstanceOptions, Network, PgBinaries, StopMode, User};
use drctl::pg::sql::{self, SqlClient};
use tempfile::TempDir;

const MAJOR: u32 = 15;
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server and the directory that holds all of it; both end with it.
pub struct Cluster {
    // Before the directory: fields are dropped in this order.
    instance: Instance,
    pub dir: TempDir,
}

/// An empty directory that the unprivileged account owns.
pub fn room() -> TempDir {
    let dir = tempfile::Builder::new().prefix("drctl-source-").tempdir_in("/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    give(dir.path());
    dir
}

/// Makes the unprivileged account the owner of everything below `path`.
pub fn give(path: &Path) {
    let Some(user) = account() else { return };
    std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid)).unwrap();
    if fs::symlink_metadata(path).unwrap().is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| give(&entry.unwrap().path()));
    }
}

fn account() -> Option<User> {
    rustix::process::geteuid().is_root().then(|| User::named("postgres").unwrap())
}

async fn run(program: &str, arguments: &[&str]) -> String {
    let mut command = PgBinaries::find(MAJOR, None).await.unwrap().command(program);
    if let Some(user) = account() {
        user.apply(&mut command);
    }
    let output = command.args(arguments).output().await.unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program}: {text}");
    text
}

impl Cluster {
    /// initdb and start.
    pub async fn create() -> Self {
        let dir = room();
        let data = dir.path().join("data");
        run("initdb", &["-D", data.to_str().unwrap(), "-k", "-A", "trust", "-U", "postgres", "--no-sync"]).await;
        Self::start(dir).await
    }

    /// Starts what is in `dir/data`.
    pub async fn start(dir: TempDir) -> Self {
        let settings = [
            ("allow_in_place_tablespaces", "on"),
            ("autovacuum", "off"),
            ("fsync", "off"),
            ("shared_buffers", "16MB"),
            ("max_wal_size", "4GB"),
            // The load's checkpoints would remove what recovery needs; in life a slot holds it.
            ("wal_keep_size", "4GB"),
        ];
        let options = InstanceOptions {
            data_dir: dir.path().join("data"),
            socket_dir: dir.path().to_owned(),
            port: 5432,
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            log_file: dir.path().join("server.log"),
            as_user: account(),
            listens: false,
            network: Network::Shared,
        };
        let binaries = PgBinaries::find(MAJOR, None).await.unwrap();
        let mut instance = Instance::start(&binaries, options).unwrap();
        instance.wait_ready(PATIENCE).await.unwrap();
        Self { instance, dir }
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn conninfo(&self, user: &str) -> ConnInfo {
        let text = format!("host={} port=5432 user={user} dbname=postgres", self.dir.path().display());
        ConnInfo::from_text(&text).unwrap()
    }

    pub async fn sql(&self) -> SqlClient {
        sql::connect(&self.conninfo("postgres").with_application_name("test")).await.unwrap()
    }

    /// One value, as text.
    pub async fn value(&self, query: &str) -> String {
        let row = self.sql().await.query_one(&format!("SELECT ({query})::text"), &[]).await.unwrap();
        row.get::<_, Option<String>>(0).unwrap_or_default()
    }

    /// Stops in order, and checks every page checksum of what is left.
    pub async fn stop_and_check(mut self) {
        self.instance.stop(StopMode::Fast, PATIENCE).await.unwrap();
        run("pg_checksums", &["--check", "-D", self.data().to_str().unwrap()]).await;
    }

    /// Roles with the documented privileges and nothing else.
    pub async fn least_privilege(&self) {
        let grants = "CREATE ROLE local_backup LOGIN;
            GRANT pg_read_all_settings TO local_backup;
            GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO local_backup;
            CREATE ROLE stream_backup LOGIN REPLICATION;
            CREATE ROLE nobody_special LOGIN";
        self.sql().await.batch_execute(grants).await.unwrap();
    }

    /// Tables of all kinds, and files that belong in no backup.
    pub async fn furnish(&self) {
        let outside = self.dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        give(&outside);
        let client = self.sql().await;
        client.batch_execute(&format!("CREATE TABLESPACE outside LOCATION '{}'", outside.display())).await.unwrap();
        client.batch_execute("CREATE TABLESPACE in_place LOCATION ''").await.unwrap();
        client
            .batch_execute(
                "CREATE EXTENSION amcheck;
                 CREATE TABLE steady AS SELECT g AS id, repeat(md5(g::text), 10) AS text FROM generate_series(1, 40000) g;
                 ALTER TABLE steady ADD PRIMARY KEY (id);
                 CREATE TABLE far TABLESPACE outside AS SELECT generate_series(1, 5000) AS id;
                 CREATE TABLE near TABLESPACE in_place AS SELECT generate_series(1, 6000) AS id;
                 CREATE UNLOGGED TABLE fleeting AS SELECT generate_series(1, 7000) AS id;
                 CREATE TABLE ledger (id bigserial PRIMARY KEY, note text);
                 CREATE TABLE empty_one (id int)",
            )
            .await
            .unwrap();
        // Fills the visibility map.
        client.batch_execute("VACUUM steady").await.unwrap();
        fs::create_dir(self.data().join("log")).unwrap();
        for name in ["log/server.log", "standby.signal", "core", "core.17", "backup_label.old"] {
            fs::write(self.data().join(name), b"x").unwrap();
        }
        let user = account();
        for name in ["log", "log/server.log", "standby.signal", "core", "core.17", "backup_label.old"] {
            chown(self.data().join(name), user.map(|user| user.uid), user.map(|user| user.gid)).unwrap();
        }
    }
}
