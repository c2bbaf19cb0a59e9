//! Real PostgreSQL clusters of any major version, as child processes that belong to one test.

use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drctl::model::Lsn;
use rustix::process::Signal;
use tokio_postgres::{NoTls, SimpleQueryMessage};

use super::clock::FakeClock;
use super::dirs::{Scratch, give_to_postgres, postgres_user};
use super::process;

mod pair;

pub use pair::{End, Pair};

/// Every major version under test.
pub const MAJORS: [u32; 5] = [14, 15, 16, 17, 18];
/// The oldest that is protected. It is past its end of life, and its package has no client programs: one story is enough.
pub const OLDEST: u32 = 13;

/// A cluster to be made.
#[derive(Debug, Clone)]
pub struct Builder {
    major: u32,
    wal_segsize_mb: u32,
    checksums: bool,
    settings: Vec<(String, String)>,
    clock: Option<FakeClock>,
    overrides: Vec<(String, String)>,
}

impl Builder {
    /// Bytes per WAL segment in MiB; 16 by default.
    pub fn wal_segsize(mut self, mb: u32) -> Self {
        self.wal_segsize_mb = mb;
        self
    }

    /// Page checksums; on by default.
    pub fn checksums(mut self, on: bool) -> Self {
        self.checksums = on;
        self
    }

    /// A line of postgresql.conf.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A clock that can be set while the server runs.
    pub fn clock(mut self, clock: &FakeClock) -> Self {
        self.clock = Some(clock.clone());
        self
    }

    /// A setting of the command line, which no copy of the data directory has.
    pub fn override_with(mut self, name: &str, value: &str) -> Self {
        self.overrides.push((name.to_owned(), value.to_owned()));
        self
    }

    /// initdb and a running server.
    pub async fn start(self) -> Cluster {
        let scratch = Scratch::new();
        let data = scratch.postgres_dir("data");
        let mut cluster = Cluster::at(self.major, scratch, data.clone());
        cluster.clock = self.clock;
        cluster.overrides = self.overrides;
        let mut initdb = cluster.tool("initdb");
        initdb.args(["--username=postgres", "--auth=trust", "--locale=C", "--encoding=UTF8", "--no-sync"]);
        initdb.arg(format!("--wal-segsize={}", self.wal_segsize_mb)).arg("--pgdata").arg(&data);
        if self.checksums {
            initdb.arg("--data-checksums");
        } else if self.major >= 18 {
            initdb.arg("--no-data-checksums");
        }
        process::run_async(initdb).await;
        let conf = data.join("postgresql.conf");
        let mut text = fs::read_to_string(&conf).unwrap();
        text.push_str("\nshared_buffers = '32MB'\nmax_wal_senders = 10\nmax_replication_slots = 10\n");
        for (name, value) in &self.settings {
            text.push_str(&format!("{name} = '{}'\n", value.replace('\'', "''")));
        }
        fs::write(&conf, text).unwrap();
        cluster.start().await;
        cluster
    }
}

/// What to wait for after a restored server was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// It answers queries; it may still be in recovery.
    Ready,
    /// It has finished recovery.
    Promoted,
}

/// A PostgreSQL cluster. Dropping it ends the server and removes what [`Builder::start`] made.
#[derive(Debug)]
pub struct Cluster {
    major: u32,
    scratch: Scratch,
    data: PathBuf,
    port: u16,
    database: String,
    overrides: Vec<(String, String)>,
    clock: Option<FakeClock>,
    postmaster: Option<Child>,
}

impl Cluster {
    /// A new cluster of a major version.
    pub fn builder(major: u32) -> Builder {
        Builder { major, wal_segsize_mb: 16, checksums: true, settings: Vec::new(), clock: None, overrides: Vec::new() }
    }

    /// A running cluster with the defaults.
    pub async fn start_new(major: u32) -> Self {
        Self::builder(major).start().await
    }

    /// Starts a restored data directory, which is handed to PostgreSQL's user and stays when this is dropped, and waits
    /// until it is promoted.
    pub async fn start_restored(data: &Path, major: u32) -> Self {
        Self::try_start_restored(data, major, &[], Until::Promoted).await.unwrap_or_else(|log| panic!("{log}"))
    }

    /// As [`start_restored`](Self::start_restored), for a cluster that has no database `postgres`.
    pub async fn start_restored_database(data: &Path, major: u32, database: &str) -> Self {
        give_to_postgres(data);
        let mut cluster = Self::at(major, Scratch::new(), data.to_owned());
        database.clone_into(&mut cluster.database);
        cluster.start().await;
        cluster.wait_promoted(Duration::from_secs(120)).await.unwrap_or_else(|log| panic!("{log}"));
        cluster
    }

    /// As [`start_restored`](Self::start_restored), with settings of the command line.
    ///
    /// # Errors
    /// The server's log, if it ends or does not get there in time.
    pub async fn try_start_restored(
        data: &Path,
        major: u32,
        settings: &[(&str, &str)],
        until: Until,
    ) -> Result<Self, String> {
        give_to_postgres(data);
        let mut cluster = Self::at(major, Scratch::new(), data.to_owned());
        cluster.overrides = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        cluster.try_start().await?;
        if until == Until::Promoted {
            cluster.wait_promoted(Duration::from_secs(120)).await?;
        }
        Ok(cluster)
    }

    fn at(major: u32, scratch: Scratch, data: PathBuf) -> Self {
        scratch.postgres_dir("s");
        Self {
            major,
            scratch,
            data,
            port: process::free_ports(1),
            database: "postgres".to_owned(),
            overrides: Vec::new(),
            clock: None,
            postmaster: None,
        }
    }

    /// The major version.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    /// A directory for tablespaces and the like, owned by PostgreSQL's user and removed with the cluster.
    pub fn extra_dir(&self, name: &str) -> PathBuf {
        self.scratch.postgres_dir(name)
    }

    /// The directory of the unix socket.
    pub fn socket_dir(&self) -> PathBuf {
        self.scratch.join("s")
    }

    /// The port, on 127.0.0.1 and in the socket's name.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A libpq connection string through the unix socket.
    pub fn conninfo(&self) -> String {
        let Self { port, database, .. } = self;
        format!("host={} port={port} user=postgres dbname={database}", self.socket_dir().display())
    }

    /// A libpq connection string over TCP, fit for a proxy in between.
    pub fn tcp_conninfo(&self, port: u16) -> String {
        format!("host=127.0.0.1 port={port} user=postgres dbname=postgres")
    }

    /// What the server wrote since it was made.
    pub fn log(&self) -> String {
        fs::read_to_string(self.scratch.join("log")).unwrap_or_default()
    }

    /// Where the commands of this version are.
    pub fn bin_dir(&self) -> PathBuf {
        bin_dir(self.major)
    }

    /// A command of this version, run as PostgreSQL's user and pointed at this server.
    pub fn tool(&self, name: &str) -> Command {
        let mut command = tool(self.major, name);
        command.current_dir(self.scratch.path()).env("PGHOST", self.socket_dir()).env("PGPORT", self.port.to_string());
        command.env("PGDATABASE", &self.database);
        command
    }

    /// Starts a server that does not run.
    pub async fn start(&mut self) {
        self.try_start().await.unwrap_or_else(|log| panic!("{log}"));
    }

    async fn try_start(&mut self) -> Result<(), String> {
        assert!(self.postmaster.is_none(), "the server runs already");
        for _ in 0..5 {
            let logged = self.log().len();
            self.spawn_postmaster();
            match self.wait_ready().await {
                Ok(()) => return Ok(()),
                Err(log) if log[logged.min(log.len())..].contains("Address already in use") => {
                    self.port = process::free_ports(1);
                }
                Err(log) => return Err(format!("PostgreSQL {} does not start:\n{log}", self.major)),
            }
        }
        Err("no free port for PostgreSQL".to_owned())
    }

    fn spawn_postmaster(&mut self) {
        let log = OpenOptions::new().create(true).append(true).open(self.scratch.join("log")).unwrap();
        let mut command = self.tool("postgres");
        command.arg("-D").arg(&self.data);
        command.envs(self.clock.iter().flat_map(FakeClock::environment));
        // Files instead of /dev/shm, which a killed server would leave filled.
        let rig = [
            ("port".to_owned(), self.port.to_string()),
            ("listen_addresses".to_owned(), "127.0.0.1".to_owned()),
            ("unix_socket_directories".to_owned(), self.socket_dir().display().to_string()),
            ("dynamic_shared_memory_type".to_owned(), "mmap".to_owned()),
            ("logging_collector".to_owned(), "off".to_owned()),
        ];
        for (name, value) in rig.iter().chain(&self.overrides) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let postmaster = command.spawn().unwrap();
        self.clock.iter().for_each(|clock| clock.used_by(postmaster.id()));
        self.postmaster = Some(postmaster);
    }

    async fn wait_ready(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            if self.try_client().await.is_ok() {
                return Ok(());
            }
            let ended = self.postmaster.as_mut().is_some_and(|child| child.try_wait().unwrap().is_some());
            if ended {
                self.postmaster = None;
                return Err(self.log());
            }
            if Instant::now() > deadline {
                return Err(self.log());
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// Waits for the end of recovery.
    ///
    /// # Errors
    /// The server's log, if it ends or the time is over.
    pub async fn wait_promoted(&mut self, limit: Duration) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Ok(client) = self.try_client().await
                && let Ok(row) = client.query_one("SELECT pg_is_in_recovery()", &[]).await
                && !row.get::<_, bool>(0)
            {
                return Ok(());
            }
            let ended = self.postmaster.as_mut().is_none_or(|child| child.try_wait().unwrap().is_some());
            if ended || Instant::now() > deadline {
                return Err(format!("recovery does not end:\n{}", self.log()));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Fast shutdown, with a checkpoint.
    pub async fn stop(&mut self) {
        let mut child = self.postmaster.take().expect("the server does not run");
        process::signal(child.id(), Signal::INT);
        let status = process::wait(&mut child, Duration::from_secs(60)).await;
        assert!(status.is_some_and(|status| status.success()), "stop: {status:?}\n{}", self.log());
    }

    /// Stops and starts.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.start().await;
    }

    /// SIGKILL for the postmaster and every backend; returns when none of them runs.
    pub async fn kill9(&mut self) {
        let pids = self.kill_all();
        process::eventually("killed backends end", Duration::from_secs(20), async || {
            !pids.iter().any(|pid| process::is_alive(*pid))
        })
        .await;
    }

    /// [`kill9`](Self::kill9) and a start, which recovers from the crash.
    pub async fn crash(&mut self) {
        self.kill9().await;
        self.start().await;
    }

    fn kill_all(&mut self) -> Vec<u32> {
        let Some(mut child) = self.postmaster.take() else { return Vec::new() };
        // Stopped first, so that it starts no further child between the look and the kill.
        process::signal(child.id(), Signal::STOP);
        let pids = process::children(child.id());
        process::signal(child.id(), Signal::KILL);
        for pid in &pids {
            process::signal(*pid, Signal::KILL);
        }
        let _status = child.wait();
        pids
    }

    async fn try_client(&self) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::connect(&self.conninfo(), NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// A connection of its own.
    pub async fn client(&self) -> tokio_postgres::Client {
        self.try_client().await.unwrap_or_else(|error| panic!("connect: {error:?}\n{}", self.log()))
    }

    /// A connection of its own to another database.
    pub async fn client_of(&self, database: &str) -> tokio_postgres::Client {
        let conninfo = format!("{} dbname={database}", self.conninfo());
        let (client, connection) = tokio_postgres::connect(&conninfo, NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Runs statements.
    pub async fn execute(&self, sql: &str) {
        self.client().await.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// The rows of a query as `psql -At` prints them: columns apart by `|`, rows by line ends, null as nothing.
    pub async fn query(&self, sql: &str) -> String {
        let client = self.client().await;
        let messages = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        let rows = messages.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|column| row.get(column).unwrap_or("")).collect::<Vec<_>>().join("|"))
            }
            _ => None,
        });
        rows.collect::<Vec<_>>().join("\n")
    }

    /// Runs psql with a script, for what is not plain SQL.
    pub async fn psql(&self, script: &str) -> String {
        let mut psql = self.tool("psql");
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-c", script]);
        process::run_async(psql).await
    }

    /// Where the next WAL record will go.
    pub async fn insert_lsn(&self) -> Lsn {
        self.query("SELECT pg_current_wal_insert_lsn()").await.parse().unwrap()
    }

    /// Up to where WAL is on disk.
    pub async fn flush_lsn(&self) -> Lsn {
        self.query("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap()
    }

    /// Begins a new WAL segment.
    pub async fn switch_wal(&self) {
        self.execute("SELECT pg_switch_wal()").await;
    }

    /// Makes pgbench's tables.
    pub async fn pgbench_init(&self, scale: u32) {
        let mut command = self.tool("pgbench");
        command.args(["--initialize", "--quiet", &format!("--scale={scale}")]);
        process::run_async(command).await;
    }

    /// pgbench's write load in the background, until it is dropped or the server dies.
    pub fn pgbench(&self, clients: u32) -> Load {
        let mut command = self.tool("pgbench");
        command.args(["--no-vacuum", "--time=3600", &format!("--client={clients}")]);
        Load { child: command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap() }
    }

    /// pg_waldump's words.
    pub async fn waldump(&self, arguments: &[&str]) -> String {
        let mut command = self.tool("pg_waldump");
        command.args(arguments);
        process::run_async(command).await
    }

    /// pg_amcheck of every database: heap and index pages, and that every row is in its indexes.
    pub async fn amcheck(&self) {
        if self.major == OLDEST {
            let checks = "CREATE EXTENSION IF NOT EXISTS amcheck; SELECT bt_index_parent_check(index.oid, true) FROM \
                          pg_class index JOIN pg_am ON pg_am.oid = relam WHERE relkind = 'i' AND amname = 'btree'";
            return self.execute(checks).await;
        }
        let mut command = self.tool("pg_amcheck");
        command.args(["--all", "--install-missing", "--heapallindexed", "--parent-check"]);
        process::run_async(command).await;
    }

    fn end(&mut self) {
        let Some(child) = &mut self.postmaster else { return };
        // Immediate shutdown gives the shared memory back, which a kill would leave behind.
        process::signal(child.id(), Signal::QUIT);
        process::signal(child.id(), Signal::CONT);
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if child.try_wait().is_ok_and(|status| status.is_some()) {
                self.postmaster = None;
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill_all();
    }

    /// A killed server leaves the shared memory that its lock file names, a few bytes that nobody else would free.
    fn free_shared_memory(&self) {
        let lock = fs::read_to_string(self.data.join("postmaster.pid")).unwrap_or_default();
        if let Some(id) = lock.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) {
            let _freed = Command::new("ipcrm").args(["-m", id]).stderr(Stdio::null()).status();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.end();
        self.free_shared_memory();
    }
}

/// A load in the background, killed on drop.
#[derive(Debug)]
pub struct Load {
    child: Child,
}

impl Drop for Load {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Where the commands of a major version are.
pub fn bin_dir(major: u32) -> PathBuf {
    PathBuf::from(super::from_environment(&format!("DRCTL_TEST_PG_{major}")))
}

/// A command of a major version, run as PostgreSQL's user.
pub fn tool(major: u32, name: &str) -> Command {
    let bin = bin_dir(major);
    let mut command = Command::new(bin.join(name));
    for variable in ["PGDATA", "PGOPTIONS", "PGPASSWORD", "PGSERVICE", "PGSSLMODE", "LANG", "LC_ALL"] {
        command.env_remove(variable);
    }
    command.env("PGUSER", "postgres").env("PGDATABASE", "postgres").env("TZ", "UTC").current_dir("/");
    // A server that is not the system's own must not load the system's libraries.
    let libraries = bin.join("../lib");
    if libraries.join("libpq.so.5").exists() {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    if let Some((uid, gid)) = postgres_user() {
        command.uid(uid).gid(gid);
    }
    command
}
