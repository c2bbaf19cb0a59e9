//! What the standbys of this host say. They answer from memory, so this may be asked often.

use std::path::Path;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::timeout;

use crate::jobs::standby::{self, Record, State, Status};
use crate::observe::metrics::{Page, table};

const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Asks every standby that this state directory knows. Of several standbys of one target the worst counts.
pub async fn page(state_dir: &Path) -> Page {
    let known = standby::known_in(state_dir, None);
    let known = known.inspect_err(|error| tracing::debug!(%error, "the standbys of this host are not known"));
    let mut page = Page::default();
    for (record, status) in join_all(known.unwrap_or_default().into_iter().map(ask)).await {
        add(record.target.as_str(), status.as_ref(), &mut page);
    }
    page
}

async fn ask(record: Record) -> (Record, Option<Status>) {
    let status = timeout(ANSWER_TIME, standby::ask::status(&record)).await;
    (record, status.ok().and_then(Result::ok))
}

fn add(target: &str, status: Option<&Status>, page: &mut Page) {
    let is_up = status.is_some_and(|status| matches!(status.state, State::Following | State::CatchingUp));
    let up = page.get(&table::STANDBY_UP, [target]).unwrap_or(1.0).min(f64::from(u8::from(is_up)));
    page.set(&table::STANDBY_UP, [target], up);
    let Some(status) = status else { return };
    let worst = |known: Option<f64>, value: f64| known.unwrap_or_default().max(value);
    if let Some(seconds) = status.lag_seconds {
        let seconds = worst(page.get(&table::STANDBY_LAG, [target]), seconds);
        page.set(&table::STANDBY_LAG, [target], seconds);
    }
    if let Some(bytes) = status.lag_bytes {
        let bytes = worst(page.get(&table::STANDBY_LAG_BYTES, [target]), super::to_f64(bytes));
        page.set(&table::STANDBY_LAG_BYTES, [target], bytes);
    }
}
