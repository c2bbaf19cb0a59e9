//! A client that remembers what PostgreSQL acknowledged, so that a restore can be judged without trusting the server.
//!
//! Each transaction moves money between two accounts and writes one numbered row that says so. A row's amount and
//! accounts follow from its number, so a restored row can be checked too.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use drctl::model::Lsn;
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
    /// The commit record ends at or before this position.
    pub lsn: Lsn,
    /// The client's clock before the commit was sent.
    pub sent_at: SystemTime,
    /// The client's clock when the commit was acknowledged.
    pub acknowledged_at: SystemTime,
}

#[derive(Debug, Default)]
struct Shared {
    entries: Mutex<Vec<Entry>>,
    sent: AtomicU64,
    stop: AtomicBool,
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
        let schema = format!(
            "CREATE TABLE account (id bigint PRIMARY KEY, balance bigint NOT NULL);
             CREATE TABLE transfer (number bigint PRIMARY KEY, writer int NOT NULL, source bigint NOT NULL,
                                    destination bigint NOT NULL, amount bigint NOT NULL);
             INSERT INTO account SELECT id, {OPENING} FROM generate_series(0, {ACCOUNTS} - 1) id"
        );
        cluster.execute(&schema).await;
        let shared = Arc::new(Shared::default());
        let start = |writer| tokio::spawn(write(cluster.conninfo(), writer, shared.clone()));
        Self { writers: (0..writers).map(start).collect(), shared }
    }

    /// How many commits were acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.shared.entries.lock().unwrap().len()
    }

    /// Waits for more acknowledged commits.
    pub async fn wait_for(&self, more: usize) {
        let goal = self.acknowledged() + more;
        process::eventually("commits", Duration::from_secs(60), async || self.acknowledged() >= goal).await;
    }

    /// What is known now; the writers go on.
    pub fn book(&self) -> Book {
        // The list first: a number that is on it has been counted as sent.
        let entries = self.shared.entries.lock().unwrap().clone();
        Book { entries, sent: self.shared.sent.load(Ordering::SeqCst) }
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
        match tokio::time::timeout(Duration::from_secs(20), transfer(client, number, writer)).await {
            Ok(Ok(entry)) => shared.entries.lock().unwrap().push(entry),
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

async fn transfer(client: &Client, number: u64, writer: u32) -> Result<Entry, tokio_postgres::Error> {
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
    let xid: String = client.query_one("SELECT pg_current_xact_id()::text", &[]).await?.get(0);
    let sent_at = SystemTime::now();
    client.batch_execute("COMMIT").await?;
    let acknowledged_at = SystemTime::now();
    let lsn: String = client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await?.get(0);
    Ok(Entry { number, writer, xid: xid.parse().unwrap(), lsn: lsn.parse().unwrap(), sent_at, acknowledged_at })
}

/// What the client knows.
#[derive(Debug, Clone)]
pub struct Book {
    /// Acknowledged commits.
    pub entries: Vec<Entry>,
    /// The highest number that was ever sent.
    pub sent: u64,
}

/// What a restored cluster holds of the book.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Acknowledged commits whose WAL was durable: all of them are there.
    pub durable: usize,
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
        self.check_rows(&there, durable)?;
        let balances = client.query("SELECT id, balance FROM account ORDER BY id", &[]).await;
        let balances = balances.map_err(|error| format!("the accounts cannot be read: {error:?}"))?;
        check_balances(&there, &balances.iter().map(|row| (row.get(0), row.get(1))).collect::<Vec<(i64, i64)>>())?;
        let durable = self.entries.iter().filter(|entry| entry.lsn <= durable).count();
        Ok(Verdict { durable, restored: there.len() })
    }

    fn check_rows(&self, there: &BTreeMap<u64, Row>, durable: Lsn) -> Result<(), String> {
        let mut last_of_writer: BTreeMap<u32, u64> = BTreeMap::new();
        for (number, row) in there {
            if *number > self.sent {
                return Err(format!("row {number} was never sent"));
            }
            if row.terms != terms(*number) {
                return Err(format!("row {number} says {:?}, sent was {:?}", row.terms, terms(*number)));
            }
            // Numbers ascend, so the last one stays.
            last_of_writer.insert(row.writer, *number);
        }
        for entry in self.entries.iter().filter(|entry| !there.contains_key(&entry.number)) {
            if entry.lsn <= durable {
                return Err(format!("row {} (commit at {}) is lost; durable was {durable}", entry.number, entry.lsn));
            }
            if last_of_writer.get(&entry.writer).is_some_and(|last| *last > entry.number) {
                return Err(format!("row {} is missing before later rows of its writer", entry.number));
            }
        }
        Ok(())
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
