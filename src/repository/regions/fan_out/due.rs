//! The account of what regions are to hold of each object, kept right however a put ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::repository::regions::fan_out::lane::{Delivery, Lane};

/// What one region is to hold of an object. It ends as held or as owed; if neither, the put was given up before: then the region
/// lacks an object that nobody was told of, and the WAL in it is received again under another name.
pub(super) struct Due {
    pub(super) lane: Arc<Lane>,
    wal: u64,
    end: End,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Held,
    Owed,
    GivenUp,
}

impl Due {
    pub(super) fn new(lane: &Arc<Lane>, wal: u64) -> Self {
        lane.unheld.fetch_add(wal, Ordering::Relaxed);
        Self { lane: Arc::clone(lane), wal, end: End::GivenUp }
    }

    pub(super) fn ends(mut self, delivery: &Delivery, at_quorum: bool) {
        self.end = match delivery {
            Delivery::Stored => End::Held,
            Delivery::LeftBehind => End::Owed,
            Delivery::Fatal(_) if at_quorum => End::Owed,
            Delivery::Fatal(_) | Delivery::GivenUp => End::GivenUp,
        };
    }
}

impl Drop for Due {
    fn drop(&mut self) {
        if self.end != End::Held {
            self.lane.missing.fetch_add(1, Ordering::Relaxed);
        }
        if self.end != End::Owed {
            self.lane.unheld.fetch_sub(self.wal, Ordering::Relaxed);
        }
    }
}
