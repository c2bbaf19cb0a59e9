//! What the server keeps for the slot of a streamed target, looked at again and again: the one thing by which a stream that
//! stands still harms production.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::jobs::context::Target;
use crate::jobs::wal::pressure::{Judge, TOLD_AT};
use crate::model::{Error, Kind, Result};
use crate::pg::sql::{self, SqlClient};
use crate::source::postgres::room::{self, Disk, Slot};

/// A server may write hundreds of MiB in a second, from one second to the next.
const EVERY: Duration = Duration::from_secs(2);
/// The same for a slot that fills the disk.
const EVERY_WHEN_FILLING: Duration = Duration::from_millis(500);
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// What was seen last; nothing while the server does not answer.
#[derive(Debug)]
pub(super) struct SlotWatch {
    held: Mutex<Option<Slot>>,
    /// The share of the disk at which the receiver is to give the slot up.
    over: watch::Sender<Option<u8>>,
}

impl Default for SlotWatch {
    fn default() -> Self {
        Self { held: Mutex::default(), over: watch::channel(None).0 }
    }
}

impl SlotWatch {
    pub(super) fn held(&self) -> Option<Slot> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the slot is to go, and says at which share of the disk. Told once.
    pub(super) async fn over(&self) -> u8 {
        let mut over = self.over.subscribe();
        loop {
            let mut told = None;
            self.over.send_if_modified(|over| {
                told = over.take();
                false
            });
            if let Some(share) = told {
                return share;
            }
            // The sender is in `self`.
            let _ = over.changed().await;
        }
    }

    fn saw(&self, held: Option<Slot>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }
}

/// Looks for as long as nobody drops it. Trouble is the receiver's to tell.
pub(super) async fn keep_looking(target: Target, watch: Arc<SlotWatch>) {
    let mut client = None;
    let (mut judge, mut told) = (Judge::new(&target), Told::default());
    loop {
        let late = |_| Err(Error::new(Kind::Unavailable, "the server does not answer in time"));
        let held = timeout(ANSWER_TIME, look(&target, &mut client)).await.unwrap_or_else(late);
        let held = held.unwrap_or_else(|error| {
            tracing::debug!(target = %target.name, %error, "what the slot keeps is unknown");
            client = None;
            None
        });
        told.tell(&target, held.as_ref());
        let is_over = judge.is_over(held.as_ref());
        let over = match held.as_ref().filter(|_| is_over) {
            Some(slot) if told.would_help(&target, client.as_ref(), slot).await => slot.disk_percent(),
            _ => None,
        };
        watch.over.send_replace(over);
        let is_filling = held.as_ref().is_some_and(|slot| level(slot) > 0);
        watch.saw(held);
        sleep(if is_filling { EVERY_WHEN_FILLING } else { EVERY }).await;
    }
}

/// How many of the shares at which somebody is told the slot has reached.
fn level(slot: &Slot) -> usize {
    let percent = slot.filled_percent().max(slot.disk_percent()).unwrap_or_default();
    TOLD_AT.iter().filter(|at| percent >= **at).count()
}

/// What the log says already.
#[derive(Debug, Default)]
struct Told {
    level: usize,
    in_vain: bool,
}

impl Told {
    fn tell(&mut self, target: &Target, slot: Option<&Slot>) {
        let Some(slot) = slot else { return };
        let level = level(slot);
        if level > self.level {
            let (percent, retained) = (slot.filled_percent(), slot.retained_bytes);
            tracing::warn!(target = %target.name, slot = slot.name, percent, retained, room = slot.room_bytes, "the replication slot fills the space for WAL");
        }
        self.level = level;
        self.in_vain &= level > 0;
    }

    /// Whether the server would remove WAL if the slot went. Where others keep the same, that gains nothing and costs a gap.
    async fn would_help(&mut self, target: &Target, client: Option<&SqlClient>, slot: &Slot) -> bool {
        let Some(client) = client else { return false };
        let beside = match timeout(ANSWER_TIME, room::kept_beside(client, &slot.name)).await {
            Ok(Ok(beside)) => beside,
            Ok(Err(error)) => {
                tracing::warn!(target = %target.name, %error, "who else keeps WAL is unknown");
                None
            }
            Err(_) => None,
        };
        let retained = slot.retained_bytes.unwrap_or_default();
        let Some((who, _)) = beside.filter(|(_, gain)| gain.saturating_mul(2) < retained) else { return true };
        if !std::mem::replace(&mut self.in_vain, true) {
            tracing::error!(target = %target.name, slot = slot.name, "the replication slot is not dropped: {who} keeps the same WAL");
        }
        false
    }
}

async fn look(target: &Target, client: &mut Option<SqlClient>) -> Result<Option<Slot>> {
    let client = match client {
        Some(client) => client,
        None => {
            let name = format!("drctl slot {}", target.name);
            client.insert(sql::connect(&target.conninfo.clone().with_application_name(name)).await?)
        }
    };
    Ok(room::held(client, &target.slot, &disk(target)).await?)
}

/// What the configuration says of the server's WAL disk.
pub fn disk(target: &Target) -> Disk {
    Disk { data_directory: target.data_dir.clone(), bytes: target.wal_disk_bytes }
}
