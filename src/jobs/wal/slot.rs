//! What the server keeps for the slot of a streamed target, looked at again and again: the one thing by which a stream that
//! stands still harms production.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::jobs::context::Target;
use crate::model::{Error, Kind, Result};
use crate::pg::sql::{self, SqlClient};
use crate::source::postgres::room::{self, Disk, Slot};

const EVERY: Duration = Duration::from_secs(15);
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// What was seen last; nothing while the server does not answer.
#[derive(Debug, Default)]
pub(super) struct SlotWatch {
    held: Mutex<Option<Slot>>,
}

impl SlotWatch {
    pub(super) fn held(&self) -> Option<Slot> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn saw(&self, held: Option<Slot>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }
}

/// Looks for as long as nobody drops it. Trouble is the receiver's to tell.
pub(super) async fn keep_looking(target: Target, watch: Arc<SlotWatch>) {
    let mut looks = interval(EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut client = None;
    loop {
        looks.tick().await;
        let late = |_| Err(Error::new(Kind::Unavailable, "the server does not answer in time"));
        match timeout(ANSWER_TIME, look(&target, &mut client)).await.unwrap_or_else(late) {
            Ok(held) => watch.saw(held),
            Err(error) => {
                tracing::debug!(target = %target.name, %error, "what the slot keeps is unknown");
                watch.saw(None);
                client = None;
            }
        }
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
