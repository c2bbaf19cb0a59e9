//! How long a restore would take now, from how long drills took.
//!
//! What a drill fetched and replayed took its time; what there is to fetch and to replay today takes as much longer as it
//! is more. Of several drills the slowest counts: a prediction that is too short helps nobody at night.

use std::time::Duration;

use serde::Serialize;

use crate::jobs::Context;
use crate::model::{ReportId, TargetName};
use crate::repository::records::reports::{self, ReportHead};

/// Drills that are looked at.
const DRILLS: usize = 3;
/// How long the body of a report may take to open.
const OPEN_TIME: Duration = Duration::from_secs(5);

/// A prediction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// From the decision to a cluster that was checked, in seconds.
    pub seconds: f64,
    /// The drills that it was made from.
    pub drills: Vec<ReportId>,
    /// How.
    pub how: String,
}

/// What a restore has to move today.
#[derive(Debug, Clone, Copy)]
pub struct Present {
    /// Of the data directory.
    pub base_bytes: u64,
    /// To replay.
    pub wal_bytes: u64,
}

/// One phase of a drill.
#[derive(Debug, Clone, PartialEq)]
struct Phase {
    name: String,
    seconds: f64,
    bytes: Option<u64>,
}

/// Predicts from the reports that the regions hold; `None` without a drill that passed, or when no region tells.
pub async fn predict_restore(context: &Context, target: &TargetName, present: Present) -> Option<Prediction> {
    let (heads, _) = reports::list(&context.repository, Some(target)).await.ok()?;
    let passed: Vec<_> = heads.iter().filter(|head| head.job == "drill" && head.outcome == "pass").collect();
    predict(context, &passed, present).await
}

/// Predicts from the newest drills that passed; `None` without one.
pub(super) async fn predict(context: &Context, drills: &[&ReportHead], present: Present) -> Option<Prediction> {
    let newest: Vec<_> = drills.iter().rev().take(DRILLS).collect();
    let mut past = Vec::new();
    for head in &newest {
        past.push(phases(context, head).await);
    }
    let seconds = past
        .iter()
        .map(|phases| seconds(phases, present))
        .fold(None, |worst: Option<f64>, seconds| Some(worst.map_or(seconds, |worst| worst.max(seconds))))?;
    let scaled = past.iter().all(|phases| phases.iter().any(|phase| phase.bytes.is_some()));
    let how = match scaled {
        true => "the slowest of the newest drills, by what there is to fetch and to replay now",
        false => "the slowest of the newest drills as they were: no key opens how much they fetched and replayed",
    };
    let drills = newest.iter().map(|head| head.id.clone()).collect();
    Some(Prediction { seconds, drills, how: how.to_owned() })
}

/// The phases of a drill: with bytes if its body opens, else as its head has them.
async fn phases(context: &Context, head: &ReportHead) -> Vec<Phase> {
    let opened = tokio::time::timeout(OPEN_TIME, reports::read(&context.repository, &context.ring, &head.id)).await;
    if let Ok(Ok((_, body))) = opened {
        let phase = |value: &serde_json::Value| {
            let (name, seconds) = (value.get("name")?.as_str()?.to_owned(), value.get("seconds")?.as_f64()?);
            Some(Phase { name, seconds, bytes: value.get("bytes").and_then(serde_json::Value::as_u64) })
        };
        let listed = body.report.get("phases").and_then(serde_json::Value::as_array);
        let listed: Vec<_> = listed.into_iter().flatten().filter_map(phase).collect();
        if !listed.is_empty() {
            return listed;
        }
    }
    head.phases.iter().map(|(name, seconds)| Phase { name: name.clone(), seconds: *seconds, bytes: None }).collect()
}

fn seconds(phases: &[Phase], Present { base_bytes, wal_bytes }: Present) -> f64 {
    let one = |Phase { name, seconds, bytes }: &Phase| {
        let now = match name.as_str() {
            // It runs beside the replay.
            "stage" => return 0.0,
            "fetch" => base_bytes,
            "replay" => wal_bytes,
            _ => return *seconds,
        };
        // Less than a megabyte of WAL tells how long a start takes, not how fast replay is.
        match bytes.filter(|then| *then > 1_000_000) {
            #[allow(clippy::cast_precision_loss, reason = "a prediction, not an account")]
            Some(then) => seconds * (now as f64 / then as f64).max(if name == "replay" { 0.0 } else { 1.0 }),
            None => *seconds,
        }
    };
    phases.iter().map(one).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(name: &str, seconds: f64, bytes: Option<u64>) -> Phase {
        Phase { name: name.to_owned(), seconds, bytes }
    }

    #[test]
    fn what_is_moved_takes_as_much_longer_as_it_is_more() {
        let drill = [
            phase("provision", 2.0, None),
            phase("fetch", 90.0, Some(1_000_000_000)),
            phase("stage", 50.0, Some(100_000_000)),
            phase("replay", 10.0, Some(100_000_000)),
            phase("open", 1.0, None),
            phase("validate", 7.0, None),
        ];
        let now = |base_bytes, wal_bytes| seconds(&drill, Present { base_bytes, wal_bytes });
        assert!((now(1_000_000_000, 100_000_000) - 110.0).abs() < 1e-9);
        assert!((now(2_000_000_000, 1_000_000_000) - 290.0).abs() < 1e-9);
        // A smaller base is not believed to come faster: what a connection gives at the start is not its rate.
        assert!((now(1, 0) - 100.0).abs() < 1e-9);
    }

    #[test]
    fn without_bytes_a_drill_is_taken_as_it_was() {
        let drill = [phase("fetch", 90.0, None), phase("replay", 10.0, Some(5_000))];
        let present = Present { base_bytes: u64::MAX, wal_bytes: u64::MAX };
        assert!((seconds(&drill, present) - 100.0).abs() < 1e-9);
    }
}
