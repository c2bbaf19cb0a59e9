//! A client that remembers what PostgreSQL acknowledged, so that a restore can be judged without trusting the server.
//!
//! Each transaction moves money between two accounts and writes one numbered row that says so. A row's amount and
//! accounts follow from its number, so a restored row can be checked too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use drctl::model::{Lsn, Timeline};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

use super::pg::Cluster;
use super::process;

const ACCOUNTS: u64 = 100;
const OPENING: i64 = 1_000_000;

/// A commit that was acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The row's number.
    pub number: u64,
    /// Which writer sent it.
    pub writer: u32,
    /// Its transaction id, as `--to-xid` takes it.
    pub xid: u64,
    /// Where it was written.
    pub timeline: Timeline,
    /// The commit record begins at or behind this position.
    pub from: Lsn,
    /// The commit record ends at or before this position; the highest one there is if nobody answered.
    pub lsn: Lsn,
    /// The client's clock before the commit was sent.
    pub sent_at: SystemTime,
    /// The client's clock when the commit was acknowledged.
    pub acknowledged_at: SystemTime,
}

#[derive(Debug, Default)]
struct Shared {
    kept: Mutex<Kept>,
    sent: AtomicU64,
    stop: AtomicBool,
    /// What a writer waits between two transactions.
    pause: Duration,
}

#[derive(Debug, Default)]
struct Kept {
    entries: Vec<Entry>,
    /// By number. Each of them may become an entry yet.
    unanswered: BTreeMap<u64, Entry>,
}

/// Writers at work. They reconnect when the server goes away, and never send a number twice.
#[derive(Debug)]
pub struct Ledger {
    shared: Arc<Shared>,
    writers: Vec<JoinHandle<()>>,
}

impl Ledger {
    /// Makes the tables and starts `writers` tasks.
    pub async fn start(cluster: &Cluster, writers: u32) -> Self {
        Self::make_tables(cluster).await;
        Self::write_at(&cluster.conninfo(), writers, Duration::ZERO)
    }

    /// Makes the tables.
    pub async fn make_tables(cluster: &Cluster) {
        let schema = format!(
            "CREATE TABLE account (id bigint PRIMARY KEY, balance bigint NOT NULL);
             CREATE TABLE transfer (number bigint PRIMARY KEY, writer int NOT NULL, source bigint NOT NULL,
                                    destination bigint NOT NULL, amount bigint NOT NULL);
             INSERT INTO account SELECT id, {OPENING} FROM generate_series(0, {ACCOUNTS} - 1) id"
        );
        cluster.execute(&schema).await;
    }

    /// Starts `writers` tasks where the tables are, each of which rests for `pause` after a transaction. If `conninfo` names
    /// several servers, they go where writing is allowed.
    pub fn write_at(conninfo: &str, writers: u32, pause: Duration) -> Self {
        let shared = Arc::new(Shared { pause, ..Shared::default() });
        let start = |writer| tokio::spawn(write(conninfo.to_owned(), writer, shared.clone()));
        Self { writers: (0..writers).map(start).collect(), shared }
    }

    /// How many commits were acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.shared.kept.lock().unwrap().entries.len()
    }

    /// Waits for more acknowledged commits.
    pub async fn wait_for(&self, more: usize) {
        let goal = self.acknowledged() + more;
        process::eventually("commits", Duration::from_secs(60), async || self.acknowledged() >= goal).await;
    }

    /// A look at the book from elsewhere.
    pub fn glance(&self) -> Glance {
        Glance(Arc::clone(&self.shared))
    }

    /// What is known now; the writers go on.
    pub fn book(&self) -> Book {
        // The lists first: a number that is on them has been counted as sent.
        let (entries, unanswered) = {
            let kept = self.shared.kept.lock().unwrap();
            (kept.entries.clone(), kept.unanswered.clone())
        };
        Book { entries, unanswered, sent: self.shared.sent.load(Ordering::SeqCst) }
    }

    /// Stops the writers.
    pub async fn stop(mut self) -> Book {
        self.shared.stop.store(true, Ordering::SeqCst);
        for writer in self.writers.drain(..) {
            writer.await.unwrap();
        }
        self.book()
    }
}

/// Reads the end of the book without copying it.
#[derive(Debug)]
pub struct Glance(Arc<Shared>);

impl Glance {
    /// The oldest acknowledged commit that is not `covered`. Whatever covers one covers those long before it.
    pub fn oldest(&self, covered: impl Fn(&Entry) -> bool) -> Option<Entry> {
        const ENOUGH: usize = 200;
        let (kept, mut in_a_row) = (self.0.kept.lock().unwrap(), 0);
        let newest_first = kept.entries.iter().rev().map(|entry| (covered(entry), entry));
        let recent = newest_first.take_while(|(covered, _)| {
            in_a_row = if *covered { in_a_row + 1 } else { 0 };
            in_a_row < ENOUGH
        });
        let behind = recent.filter(|(covered, _)| !covered).map(|(_, entry)| entry);
        behind.min_by_key(|entry| entry.acknowledged_at).cloned()
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        for writer in &self.writers {
            writer.abort();
        }
    }
}

async fn write(conninfo: String, writer: u32, shared: Arc<Shared>) {
    let mut connection: Option<Client> = None;
    while !shared.stop.load(Ordering::SeqCst) {
        let Some(client) = &connection else {
            connection = connect(&conninfo).await;
            if connection.is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            continue;
        };
        let number = shared.sent.fetch_add(1, Ordering::SeqCst) + 1;
        // A kill between the commit and its acknowledgement can leave a client waiting for ever behind a proxy.
        match tokio::time::timeout(Duration::from_secs(20), transfer(client, (number, writer), &shared)).await {
            Ok(Ok(())) => tokio::time::sleep(shared.pause).await,
            Ok(Err(_)) | Err(_) => connection = None,
        }
    }
}

async fn connect(conninfo: &str) -> Option<Client> {
    let (client, connection) = tokio_postgres::connect(conninfo, NoTls).await.ok()?;
    tokio::spawn(connection);
    Some(client)
}

/// From, to and how much: all of it follows from the number.
fn terms(number: u64) -> (u64, u64, u64) {
    let source = number * 7 % ACCOUNTS;
    (source, (source + 1 + number % (ACCOUNTS - 1)) % ACCOUNTS, 1 + number % 500)
}

async fn transfer(client: &Client, (number, writer): (u64, u32), shared: &Shared) -> Result<(), tokio_postgres::Error> {
    let (source, destination, amount) = terms(number);
    // Accounts are locked in ascending order, so that writers do not deadlock.
    let (first, second) = (source.min(destination), source.max(destination));
    let change = |account| if account == source { format!("- {amount}") } else { format!("+ {amount}") };
    client
        .batch_execute(&format!(
            "BEGIN;
             UPDATE account SET balance = balance {} WHERE id = {first};
             UPDATE account SET balance = balance {} WHERE id = {second};
             INSERT INTO transfer VALUES ({number}, {writer}, {source}, {destination}, {amount})",
            change(first),
            change(second)
        ))
        .await?;
    let before =
        "SELECT pg_current_xact_id()::text, lsn::text, pg_walfile_name(lsn) FROM pg_current_wal_insert_lsn() lsn";
    let before = client.query_one(before, &[]).await?;
    let text = |column| before.get::<_, String>(column);
    let (sent_at, timeline) = (SystemTime::now(), Timeline(u32::from_str_radix(&text(2)[..8], 16).unwrap()));
    let (xid, from, lsn) = (text(0).parse().unwrap(), text(1).parse().unwrap(), Lsn(u64::MAX));
    let mut entry = Entry { number, writer, xid, timeline, from, lsn, sent_at, acknowledged_at: sent_at };
    shared.kept.lock().unwrap().unanswered.insert(number, entry.clone());
    client.batch_execute("COMMIT").await?;
    entry.acknowledged_at = SystemTime::now();
    let after = client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await;
    // Acknowledged is acknowledged, also when the server dies before it says where.
    if let Ok(row) = &after {
        entry.lsn = row.get::<_, String>(0).parse().unwrap();
    }
    let mut kept = shared.kept.lock().unwrap();
    kept.unanswered.remove(&number);
    kept.entries.push(entry);
    after.map(drop)
}

/// What the client knows.
#[derive(Debug, Clone)]
pub struct Book {
    /// Acknowledged commits.
    pub entries: Vec<Entry>,
    /// Commits that were sent and not answered so far, by number.
    pub unanswered: BTreeMap<u64, Entry>,
    /// The highest number that was ever sent.
    pub sent: u64,
}

/// What a restored cluster has to hold of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It must be there.
    There,
    /// It must not be there.
    Absent,
    /// It may be missing; then what its writer did later is missing, too.
    Open,
    /// Nothing is known of it.
    Unknown,
}

/// What a restored cluster holds of the book.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Acknowledged commits that had to be there: all of them are.
    pub durable: usize,
    /// Acknowledged commits that had to be missing: all of them are.
    pub absent: usize,
    /// Rows there.
    pub restored: usize,
}

/// A row that is there.
struct Row {
    writer: u32,
    terms: (u64, u64, u64),
}

impl Book {
    /// Judges a restored cluster: every acknowledged commit up to `durable` is there; nothing is there that was not sent
    /// or says something else; no writer has a hole; every balance follows from the rows.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub async fn verify(&self, restored: &Cluster, durable: Lsn) -> Result<Verdict, String> {
        let fate = |entry: &Entry| if entry.lsn <= durable { Fate::There } else { Fate::Open };
        self.judge(restored, fate).await.map_err(|wrong| format!("{wrong}; durable was {durable}"))
    }

    /// The same, where `fate` says of each commit what has to be.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub async fn judge(&self, restored: &Cluster, fate: impl Fn(&Entry) -> Fate) -> Result<Verdict, String> {
        let client = restored.client().await;
        let rows = client
            .query("SELECT number, source, destination, amount, writer FROM transfer", &[])
            .await
            .map_err(|error| format!("the ledger cannot be read: {error:?}"))?;
        let mut there = BTreeMap::new();
        for row in rows {
            let column = |n| u64::try_from(row.get::<_, i64>(n)).unwrap();
            let writer = u32::try_from(row.get::<_, i32>(4)).unwrap();
            there.insert(column(0), Row { writer, terms: (column(1), column(2), column(3)) });
        }
        self.check_rows(&there)?;
        let (durable, absent) = self.check_fates(&there, fate)?;
        let balances = client.query("SELECT id, balance FROM account ORDER BY id", &[]).await;
        let balances = balances.map_err(|error| format!("the accounts cannot be read: {error:?}"))?;
        check_balances(&there, &balances.iter().map(|row| (row.get(0), row.get(1))).collect::<Vec<(i64, i64)>>())?;
        Ok(Verdict { durable, absent, restored: there.len() })
    }

    /// Every row is one that was sent, with its COMMIT.
    fn check_rows(&self, there: &BTreeMap<u64, Row>) -> Result<(), String> {
        let known: BTreeSet<u64> =
            self.entries.iter().map(|entry| entry.number).chain(self.unanswered.keys().copied()).collect();
        for (number, row) in there {
            if *number > self.sent {
                return Err(format!("row {number} was never sent"));
            }
            if !known.contains(number) {
                return Err(format!("row {number} is there, and its COMMIT was never sent"));
            }
            if row.terms != terms(*number) {
                return Err(format!("row {number} says {:?}, sent was {:?}", row.terms, terms(*number)));
            }
        }
        Ok(())
    }

    /// How many had to be there, and how many had to be missing.
    fn check_fates(&self, there: &BTreeMap<u64, Row>, fate: impl Fn(&Entry) -> Fate) -> Result<(usize, usize), String> {
        // Numbers ascend, so the last one stays.
        let last_of_writer: BTreeMap<u32, u64> = there.iter().map(|(number, row)| (row.writer, *number)).collect();
        let (mut durable, mut absent) = (0, 0);
        for entry in &self.entries {
            let Entry { number, timeline, from, lsn, .. } = entry;
            let told = || format!("row {number} (commit between {from} and {lsn} of timeline {timeline})");
            let later = || last_of_writer.get(&entry.writer).is_some_and(|last| *last > *number);
            match (fate(entry), there.contains_key(number)) {
                (Fate::There, true) => durable += 1,
                (Fate::There, false) => return Err(format!("{} is lost", told())),
                (Fate::Absent, true) => return Err(format!("{} is there and lies behind the point", told())),
                (Fate::Absent, false) => absent += 1,
                (Fate::Open, false) if later() => {
                    return Err(format!("{} is missing before later rows of its writer", told()));
                }
                (Fate::Open | Fate::Unknown, _) => {}
            }
        }
        let beyond =
            self.unanswered.values().find(|entry| there.contains_key(&entry.number) && fate(entry) == Fate::Absent);
        match beyond {
            Some(entry) => {
                Err(format!("row {} (unanswered, behind {}) lies behind the point", entry.number, entry.from))
            }
            None => Ok((durable, absent)),
        }
    }
}

fn check_balances(there: &BTreeMap<u64, Row>, balances: &[(i64, i64)]) -> Result<(), String> {
    let mut expected = vec![OPENING; usize::try_from(ACCOUNTS).unwrap()];
    for Row { terms: (source, destination, amount), .. } in there.values() {
        let amount = i64::try_from(*amount).unwrap();
        expected[usize::try_from(*source).unwrap()] -= amount;
        expected[usize::try_from(*destination).unwrap()] += amount;
    }
    let expected: Vec<(i64, i64)> = (0..).zip(expected).collect();
    match expected.iter().zip(balances).find(|(expected, found)| expected != found) {
        Some((expected, found)) => Err(format!("account and balance are {found:?}, the rows say {expected:?}")),
        None if expected.len() == balances.len() => Ok(()),
        None => Err(format!("{} accounts of {}", balances.len(), expected.len())),
    }
}
