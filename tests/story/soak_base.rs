//! Random changes of rows and schema, an incremental after each round of them, a random third of the backups pruned, and
//! every one that is left brought back. The suite runs eight rounds; `scripts/soak base` as many as you like.

#![allow(clippy::print_stdout, reason = "the runner shows it when the story fails")]

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use rand::Rng as _;
use rand::rngs::StdRng;

use crate::restore::Protected;
use crate::support::drctl::Background;
use crate::support::pg::Cluster;
use crate::support::seed::{self, Seed};

mod thirds;

use thirds::Thirds;

/// Rounds between two runs of prune that plan.
const ROUNDS_PER_PRUNE: u64 = 5;

/// A backup, and what the cluster held that nobody changed while it was taken.
struct Survivor {
    id: String,
    finished_at: DateTime<Utc>,
    digests: BTreeMap<String, String>,
}

/// A cluster and the choices of this run.
struct Soak {
    protected: Protected,
    /// WAL is received all the time, and tells which pages changed.
    stream: Background,
    chance: StdRng,
    /// Names are never used twice.
    serial: u32,
    tables: Vec<String>,
    databases: Vec<String>,
    space: String,
}

#[tokio::test]
async fn whatever_happens_between_them_every_backup_that_is_not_pruned_comes_back() {
    let rounds = seed::number("DRCTL_SOAK_BASE_ROUNDS").unwrap_or(8);
    let seed = Seed::of_run(&format!("scripts/soak base --rounds {rounds}"));
    let began = Instant::now();
    let mut soak = Soak::new(seed.chance()).await;
    let mut survivors = vec![soak.backup().await];
    let mut thirds = Thirds::default();
    thirds.taken = 1;
    for round in 0..rounds {
        let load = soak.protected.cluster.pgbench(2);
        for _ in 0..soak.chance.random_range(3..8) {
            soak.change().await;
        }
        survivors.push(soak.backup().await);
        thirds.taken += 1;
        // What the last plan found goes beside the load, behind a backup that shares pages with it.
        thirds.sweep(&soak.protected, &mut survivors).await;
        if (round + 1) % ROUNDS_PER_PRUNE == 0 {
            thirds.plan(&soak.protected, &survivors, &mut soak.chance).await;
        }
        drop(load);
        println!("round {round}: {}, {:.0?}", survivors[survivors.len() - 1].id, began.elapsed());
    }
    tokio::time::sleep(Duration::from_millis(2200)).await;
    thirds.sweep(&soak.protected, &mut survivors).await;
    for (number, survivor) in survivors.iter().enumerate() {
        soak.comes_back(survivor, number % 2 == 1).await;
    }
    soak.stream.terminate().await.ok();
    let Thirds { taken, copies, pruned, drills, .. } = thirds;
    let (left, took) = (survivors.len(), began.elapsed());
    println!(
        "{rounds} rounds: {taken} backups ({copies} of them copies), {pruned} pruned after {drills} drills, {left} restored, {took:.0?}"
    );
}

impl Soak {
    async fn new(chance: StdRng) -> Self {
        let protected = Protected::new().await;
        let path = protected.home().join("drctl.toml");
        let drills =
            format!("[drill]\ndir = \"{}\"\nrun_as = \"postgres\"\n", protected.scratch.join("drills").display());
        let text = fs::read_to_string(&path).unwrap() + "detection = \"auto\"\n" + thirds::RULES + &drills;
        fs::write(path, text).unwrap();
        let stream = protected.stream();
        let cluster = &protected.cluster;
        let space = cluster.extra_dir("space").display().to_string();
        cluster.execute(&format!("CREATE TABLESPACE space LOCATION '{space}'")).await;
        cluster.pgbench_init(1).await;
        let mut soak = Self { protected, stream, chance, serial: 0, tables: Vec::new(), databases: Vec::new(), space };
        for _ in 0..4 {
            soak.create_table().await;
        }
        soak
    }

    async fn sql(&self, text: &str) {
        println!("  {text}");
        self.protected.cluster.execute(text).await;
    }

    fn name(&mut self, kind: &str) -> String {
        self.serial += 1;
        format!("{kind}_{}", self.serial)
    }

    fn table(&mut self) -> String {
        self.tables[self.chance.random_range(0..self.tables.len())].clone()
    }

    /// One statement of PostgreSQL that a backup must survive.
    async fn change(&mut self) {
        let (table, part) = (self.table(), self.chance.random_range(2..20));
        match self.chance.random_range(0..16) {
            0..4 => self.sql(&format!("UPDATE {table} SET body = body || 'x' WHERE id % {part} = 0")).await,
            4 => self.sql(&format!("DELETE FROM {table} WHERE id % {part} = 1")).await,
            5 | 6 => self.insert(&table).await,
            7 => self.create_table().await,
            8 => self.drop_table().await,
            9 => self.sql(&format!("TRUNCATE {table}")).await,
            10 => self.sql(&format!("VACUUM FULL {table}")).await,
            11 => self.sql(&format!("VACUUM (FREEZE) {table}")).await,
            12 => self.sql(&format!("REINDEX TABLE {table}")).await,
            13 => self.create_database().await,
            14 => self.drop_database().await,
            _ => self.move_table(&table).await,
        }
    }

    async fn insert(&mut self, table: &str) {
        let rows = self.chance.random_range(100..8000);
        let body = "repeat(md5(i::text), 1 + i % 4)";
        self.sql(&format!("INSERT INTO {table} SELECT i, {body} FROM generate_series(1, {rows}) AS i")).await;
    }

    async fn create_table(&mut self) {
        let name = self.name("t");
        let space = if self.chance.random_bool(0.3) { "TABLESPACE space" } else { "" };
        self.sql(&format!("CREATE TABLE {name} (id int, body text) {space}")).await;
        self.sql(&format!("CREATE INDEX ON {name} (id)")).await;
        self.insert(&name).await;
        self.tables.push(name);
    }

    async fn drop_table(&mut self) {
        if self.tables.len() > 2 {
            let name = self.tables.remove(self.chance.random_range(0..self.tables.len()));
            self.sql(&format!("DROP TABLE {name}")).await;
        }
    }

    /// There are few of them at a time: each costs every restore a check of its catalogs.
    async fn create_database(&mut self) {
        if self.databases.len() >= 3 {
            self.drop_database().await;
        }
        let name = self.name("d");
        let strategy = if self.chance.random_bool(0.5) { "file_copy" } else { "wal_log" };
        self.sql(&format!("CREATE DATABASE {name} STRATEGY {strategy}")).await;
        let inside = self.protected.cluster.client_of(&name).await;
        inside
            .batch_execute("CREATE TABLE inside AS SELECT i, md5(i::text) FROM generate_series(1, 500) AS i")
            .await
            .unwrap();
        self.databases.push(name);
    }

    async fn drop_database(&mut self) {
        if let Some(name) = self.databases.pop() {
            self.sql(&format!("DROP DATABASE {name} WITH (FORCE)")).await;
        }
    }

    async fn move_table(&mut self, table: &str) {
        let space = if self.chance.random_bool(0.5) { "space" } else { "pg_default" };
        self.sql(&format!("ALTER TABLE {table} SET TABLESPACE {space}")).await;
    }

    /// Of everything but pgbench's tables nobody writes from here on until the backup stops. Now and then it reads every
    /// page and proves that no change would have been missed.
    async fn backup(&mut self) -> Survivor {
        let digests = digests(&self.protected.cluster).await;
        let mut words = vec!["backup", "ledger", "--fast", "--json"];
        words.extend(self.chance.random_bool(0.3).then_some("--verify-detection"));
        let backup = self.protected.drctl(&words).run().await;
        // 4: there was nothing to prove, as in a full backup.
        assert!(matches!((backup.code, words.len()), (Some(0), _) | (Some(4), 5)), "{backup}");
        let commit = &backup.json()["backup"];
        Survivor { id: commit["id"].as_str().unwrap().to_owned(), finished_at: thirds::finished_at(commit), digests }
    }

    /// At its stop: the same rows, no row in two states of a transaction, indexes and visibility maps that tell the truth.
    /// Every other one comes back over what the one before left.
    async fn comes_back(&self, survivor: &Survivor, delta: bool) {
        let directory = self.protected.scratch.join("restored");
        let tablespace = format!("{}={}", self.space, self.protected.scratch.join("restored-space").display());
        let directory_text = directory.display().to_string();
        let mut words = vec!["restore", &survivor.id, "--target-dir", &directory_text, "--immediate", "--json"];
        words.extend(["--tablespace", &tablespace]);
        words.extend(delta.then_some("--delta"));
        let plan = self.protected.drctl(&words).run().await.ok().json();
        words.extend(["--execute", "--plan", plan["digest"].as_str().unwrap()]);
        self.protected.drctl(&words).run().await.ok();
        let restored = Cluster::start_restored(&directory, self.protected.cluster.major()).await;
        assert_eq!(digests(&restored).await, survivor.digests, "{}", survivor.id);
        let balances =
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(tbalance) FROM pgbench_tellers)
            AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)
            AND (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(bbalance) FROM pgbench_branches)";
        assert_eq!(restored.query(balances).await, "t", "{}", survivor.id);
        restored.amcheck().await;
        restored.execute("CREATE EXTENSION pg_visibility").await;
        for check in ["pg_check_visible", "pg_check_frozen"] {
            let wrong =
                format!("SELECT count(*) FROM pg_class c, {check}(c.oid::regclass) WHERE relkind IN ('r', 'm', 't')");
            assert_eq!(restored.query(&wrong).await, "0", "{check}: {}", survivor.id);
        }
        drop(restored);
        if delta {
            for place in ["restored", "restored-space"] {
                fs::remove_dir_all(self.protected.scratch.join(place)).unwrap();
            }
        }
    }
}

/// The rows of every table that is not pgbench's, whatever their order, and the databases.
async fn digests(cluster: &Cluster) -> BTreeMap<String, String> {
    let of = |name: &str| {
        format!("SELECT count(*) || ' ' || coalesce(sum(hash_record_extended(r, 0)::numeric), 0) FROM {name} r")
    };
    let list = async |query: &str| {
        let names =
            cluster.query(&format!("SELECT coalesce(string_agg(name, ' '), '') FROM ({query}) AS n (name)")).await;
        names.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let mut digests = BTreeMap::new();
    for table in list(r"SELECT tablename FROM pg_tables WHERE tablename LIKE 't\_%'").await {
        let digest = cluster.query(&of(&table)).await;
        digests.insert(table, digest);
    }
    for database in list(r"SELECT datname FROM pg_database WHERE datname LIKE 'd\_%'").await {
        let inside = cluster.client_of(&database).await;
        let row = inside.query_one(&of("inside"), &[]).await.unwrap();
        digests.insert(database, row.get(0));
    }
    digests
}
