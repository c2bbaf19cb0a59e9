//! What the WAL receivers of this host say. They answer from memory, so this may be asked often.

use std::collections::BTreeMap;

use futures::future::join_all;

use crate::jobs::context::Target;
use crate::jobs::wal::control;
use crate::jobs::wal::{Position, State};
use crate::model::TargetName;
use crate::observe::metrics::{Meters, Page, table};

/// Where each receiver stands; one that does not answer has no entry.
pub type Positions = BTreeMap<TargetName, Position>;

/// Asks every receiver.
pub async fn ask(targets: &[Target]) -> Positions {
    let asked = targets.iter().map(|target| async {
        let position = control::position(&target.control_socket, &target.name).await;
        let position =
            position.inspect_err(|error| tracing::debug!(%error, "a WAL receiver does not tell where it stands"));
        Some((target.name.clone(), position.ok()??))
    });
    join_all(asked).await.into_iter().flatten().collect()
}

/// Whether WAL flows into the regions.
pub const fn flows(position: &Position) -> bool {
    matches!(position.state, State::Streaming | State::Gap | State::Archiving)
}

/// What they say, as figures.
pub fn page(positions: &Positions) -> Page {
    let mut page = Page::default();
    for (target, position) in positions {
        let target = target.as_str();
        page.set(&table::WAL_STREAM_UP, [target], f64::from(u8::from(flows(position))));
        let given_up = position.state == State::GivenUp;
        page.set(&table::SLOT_GIVEN_UP, [target], f64::from(u8::from(given_up)));
        if let Some(held) = &position.slot {
            page.set_known(&table::SLOT_RETAINED, [target], held.retained_bytes.map(super::to_f64));
            page.set_known(&table::SLOT_ROOM, [target], held.room_bytes.map(super::to_f64));
        }
        for region in &position.regions {
            let labels = [target, region.name.as_str()];
            page.set_known(&table::RPO_EXPOSURE, labels, position.exposure_of(&region.name));
            let waiting = super::to_f64(region.unshipped_bytes);
            page.set_known(&table::WAL_UNSHIPPED, labels, position.start_lsn.map(|_| waiting));
            page.set(&table::WAL_OBJECTS_MISSING, labels, super::to_f64(region.missing_objects));
        }
    }
    page
}

/// Counts what happened between two looks.
pub fn count(before: &Positions, now: &Positions, meters: &Meters) {
    for (target, position) in now {
        let same = |known: &&Position| (known.system_id, known.timeline) == (position.system_id, position.timeline);
        let before = before.get(target).filter(same);
        let shipped = before.map_or(0, |before| position.durable_lsn.0.saturating_sub(before.durable_lsn.0));
        meters.add(&table::WAL_SHIPPED, [target.as_str()], super::to_f64(shipped));
        for region in &position.regions {
            let known = before.and_then(|before| before.regions.iter().find(|known| known.name == region.name));
            let known = known.map_or(region.missing_objects, |known| known.missing_objects);
            let failed = super::to_f64(region.missing_objects.saturating_sub(known));
            meters.add(&table::WAL_SHIP_FAILURES, [target.as_str(), region.name.as_str()], failed);
        }
    }
}
