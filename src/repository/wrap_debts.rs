//! Wraps that key holders owe for a keyset whose secret is still at hand: they are asked again, in the background, for as
//! long as the writer lives. What is owed after that `drctl keys rewrap` pays, with the right to open.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::keys::keyset::Keyset;
use crate::keys::{KeyError, KeyHolder, Wrap, wrap_everywhere};
use crate::model::{Clock, HolderId};
use crate::observe::task;
use crate::repository::inventory::InventoryLine;
use crate::repository::keysets::{HOLDER_DEADLINE, Holders, StoredKeyset, store_wrap};
use crate::repository::regions::fan_out::FanOut;

/// A holder that was away is asked again after this.
const PAUSE: Duration = Duration::from_secs(30);

type Answers = Vec<(HolderId, Result<Wrap, KeyError>)>;

/// The holders that owe, and the question that is out.
#[derive(Debug)]
pub struct WrapDebts {
    list: Vec<Arc<dyn KeyHolder>>,
    keyset: Arc<Keyset>,
    clock: Arc<dyn Clock>,
    asking: Option<JoinHandle<Answers>>,
    next: Duration,
}

impl WrapDebts {
    /// What `stored` owes.
    pub fn new(holders: &Holders, stored: &StoredKeyset, clock: &Arc<dyn Clock>) -> Self {
        let owes = |holder: &&Arc<dyn KeyHolder>| stored.missing.iter().any(|(missing, _)| missing == holder.id());
        Self {
            list: holders.list.iter().filter(owes).cloned().collect(),
            keyset: Arc::clone(&stored.keyset),
            clock: Arc::clone(clock),
            asking: None,
            next: clock.monotonic() + PAUSE,
        }
    }

    /// Stores the wraps that have come since the last call, and asks for the others when it is time. Waits for no holder:
    /// a KMS that hangs must not hold up what is written meanwhile.
    pub async fn pay(&mut self, out: &FanOut) -> Vec<InventoryLine> {
        if self.asking.as_ref().is_some_and(|asking| !asking.is_finished()) || self.list.is_empty() {
            return Vec::new();
        }
        if let Some(asked) = self.asking.take() {
            return self.store(asked.await.unwrap_or_default(), out).await;
        }
        if self.clock.monotonic() >= self.next {
            let (list, keyset) = (self.list.clone(), Arc::clone(&self.keyset));
            let ask = async move { wrap_everywhere(&list, &keyset, HOLDER_DEADLINE).await };
            self.asking = Some(task::spawn("owed key wraps", ask));
        }
        Vec::new()
    }

    /// Asks once more and waits for the answers: the secret is about to be forgotten.
    pub async fn settle(&mut self, out: &FanOut) -> Vec<InventoryLine> {
        if self.list.is_empty() {
            return Vec::new();
        }
        let answers = match self.asking.take() {
            Some(asked) => asked.await.unwrap_or_default(),
            None => wrap_everywhere(&self.list, &self.keyset, HOLDER_DEADLINE).await,
        };
        self.store(answers, out).await
    }

    /// Who owes still.
    pub fn holders(&self) -> impl Iterator<Item = &HolderId> {
        self.list.iter().map(|holder| holder.id())
    }

    /// A wrap that cannot be stored stays owed; whoever wrote the data that it protects meets the same regions next.
    async fn store(&mut self, answers: Answers, out: &FanOut) -> Vec<InventoryLine> {
        let mut lines = Vec::new();
        for (holder, wrap) in answers {
            let stored = match wrap {
                Ok(wrap) => store_wrap(&wrap, out).await,
                Err(error) => Err(error.into()),
            };
            match stored {
                Ok(line) => {
                    lines.push(line);
                    self.list.retain(|owing| *owing.id() != holder);
                    tracing::info!(%holder, keyset = %self.keyset.id(), "an owed wrap was made");
                }
                Err(error) => tracing::debug!(%holder, %error, "the wrap is owed still"),
            }
        }
        self.next = self.clock.monotonic() + PAUSE;
        lines
    }
}

impl Drop for WrapDebts {
    fn drop(&mut self) {
        if let Some(asking) = &self.asking {
            asking.abort();
        }
    }
}
