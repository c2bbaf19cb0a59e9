//! Walking the WAL that makes a backup consistent, record by record, from one region.

use crate::jobs::Context;
use crate::model::commit::WalNeed;
use crate::model::{Error, Result, ResultExt};
use crate::pg::wal::{Expect, RecordWalker, magic_of};
use crate::repository::regions::Region;
use crate::repository::survey::scrub;
use crate::repository::wal::index::WalIndex;

pub(super) async fn walk(context: &Context, region: &Region, index: &WalIndex, need: &WalNeed) -> Result<()> {
    let alone = scrub::alone(&context.repository, &region.name)?;
    let ring = context.ring.within(alone.regions.clone());
    let expect =
        Expect { magic: magic_of(need.server_version / 10_000), system_id: Some(need.system_id), history: None };
    // A backup's WAL begins with the checkpoint's redo point, where a record begins.
    let walker = RecordWalker::at_record(need.start_lsn, need.wal_segment_size).during(|| "walk the WAL")?;
    let mut walker = walker.expecting(expect);
    let push = |at, bytes: &[u8]| walker.push(at, bytes, |_| ()).map(|_| ()).during(|| "walk the WAL");
    scrub::read_need(&alone, (index, &ring), need, push).await?;
    if walker.position() < need.stop_lsn || walker.last_complete().is_none() {
        return Err(Error::damaged(format!("the WAL ends at {}, before {}", walker.position(), need.stop_lsn)));
    }
    Ok(())
}
