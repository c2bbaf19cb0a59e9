//! A primary and its standby at two addresses that never change, whoever is which.

use std::fs;
use std::path::Path;
use std::time::Duration;

use drctl::model::{Lsn, Timeline};

use super::super::dirs::Scratch;
use super::super::process;
use super::{Cluster, Until};

const SOON: Duration = Duration::from_secs(60);
/// What the standby calls itself.
pub const STANDBY: &str = "mirror";
/// Whoever dials a port that was given to somebody else meanwhile would stream from a stranger, so there are no ports.
const UNIX_ONLY: (&str, &str) = ("listen_addresses", "");

/// How a primary ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// SIGKILL.
    Killed,
    /// A clean shutdown, after which every receiver has everything.
    Stopped,
}

/// Two servers.
#[derive(Debug)]
pub struct Pair {
    servers: [Cluster; 2],
    /// Which of them is the primary.
    first: usize,
    _place: Scratch,
}

impl Cluster {
    /// A copy in `data`, which is empty, to be started as a standby.
    pub async fn copy_as_standby(&self, data: &Path) {
        let mut basebackup = self.tool("pg_basebackup");
        basebackup.arg("-D").arg(data).args(["-R", "-c", "fast"]).env("PGAPPNAME", STANDBY);
        process::run_async(basebackup).await;
    }
}

impl Pair {
    /// Gives a primary a standby.
    pub async fn of(primary: Cluster) -> Self {
        let place = Scratch::new();
        let data = place.postgres_dir("data");
        primary.copy_as_standby(&data).await;
        let standby = Cluster::try_start_restored(&data, primary.major(), &[UNIX_ONLY], Until::Ready).await;
        let pair = Self { servers: [primary, standby.unwrap_or_else(|log| panic!("{log}"))], first: 0, _place: place };
        pair.attached().await;
        pair
    }

    /// Who writes.
    pub fn primary(&self) -> &Cluster {
        &self.servers[self.first]
    }

    /// The same, to be ended and started.
    pub fn primary_mut(&mut self) -> &mut Cluster {
        &mut self.servers[self.first]
    }

    /// Who follows.
    pub fn standby(&self) -> &Cluster {
        &self.servers[1 - self.first]
    }

    /// The way to whichever of them is the primary.
    pub fn conninfo(&self) -> String {
        let [a, b] = &self.servers;
        format!(
            "host={},{} port={},{} user=postgres dbname=postgres target_session_attrs=read-write",
            a.socket_dir().display(),
            b.socket_dir().display(),
            a.port(),
            b.port()
        )
    }

    /// Waits until the standby streams.
    pub async fn attached(&self) {
        let streams = format!(
            "SELECT count(*) FROM pg_stat_replication WHERE application_name = '{STANDBY}' AND state = 'streaming'"
        );
        process::eventually("the standby streams", SOON, async || self.primary().query(&streams).await == "1").await;
    }

    /// From now on the standby receives nothing.
    pub async fn detach(&self) {
        self.standby().execute("ALTER SYSTEM SET primary_conninfo = ''").await;
        self.standby().execute("SELECT pg_reload_conf()").await;
        let gone = format!("SELECT count(*) FROM pg_stat_replication WHERE application_name = '{STANDBY}'");
        process::eventually("the standby is gone", SOON, async || self.primary().query(&gone).await == "0").await;
    }

    /// The primary ends and the standby takes its place; tells the timeline that was left, and where.
    pub async fn fail_over(&mut self, end: End) -> (Timeline, Lsn) {
        match end {
            End::Killed => self.primary_mut().kill9().await,
            End::Stopped => self.primary_mut().stop().await,
        }
        self.first = 1 - self.first;
        let promoted = self.primary_mut();
        promoted.execute("SELECT pg_promote()").await;
        promoted.wait_promoted(SOON).await.unwrap_or_else(|log| panic!("{log}"));
        let timeline = promoted.timeline().await;
        let history = promoted.data_dir().join(format!("pg_wal/{:08X}.history", timeline.0));
        let history = fs::read_to_string(history).unwrap();
        let last = history.lines().rfind(|line| !line.trim().is_empty()).unwrap();
        let mut fields = last.split_whitespace();
        let left = Timeline(fields.next().unwrap().parse().unwrap());
        (left, fields.next().unwrap().parse().unwrap())
    }

    /// Whoever was the primary before becomes the standby, as a new copy.
    pub async fn rebuild(&mut self) {
        let [a, b] = &mut self.servers;
        let (primary, old) = if self.first == 0 { (a, b) } else { (b, a) };
        assert!(old.postmaster.is_none(), "the old primary runs");
        old.free_shared_memory();
        for entry in fs::read_dir(&old.data).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() { fs::remove_dir_all(&entry).unwrap() } else { fs::remove_file(&entry).unwrap() }
        }
        primary.copy_as_standby(&old.data).await;
        old.overrides = vec![(UNIX_ONLY.0.to_owned(), UNIX_ONLY.1.to_owned())];
        old.start().await;
        self.attached().await;
    }
}

impl Cluster {
    /// The timeline that is written.
    pub async fn timeline(&self) -> Timeline {
        let name = self.query("SELECT pg_walfile_name(pg_current_wal_insert_lsn())").await;
        Timeline(u32::from_str_radix(&name[..8], 16).unwrap())
    }
}
