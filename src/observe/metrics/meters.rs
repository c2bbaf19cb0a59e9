//! What this process counts and measures as it goes.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{HistogramOpts, HistogramVec};

use crate::observe::metrics::page::Page;
use crate::observe::metrics::table::{self, Declared, Metric};

/// From a directory's microseconds to a region that is about to be given up.
const BUCKETS: [f64; 10] = [0.002, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0];

/// From a small database's seconds to a day.
const WORK_BUCKETS: [f64; 12] =
    [1.0, 5.0, 15.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 7200.0, 14_400.0, 28_800.0, 86_400.0];

/// The meters of one process. They are shared, and cheap to use.
#[derive(Debug)]
pub struct Meters {
    requests: Option<HistogramVec>,
    backups: Option<HistogramVec>,
    page: Mutex<Page>,
}

impl Default for Meters {
    fn default() -> Self {
        Self {
            requests: histogram(&table::REGION_REQUEST_DURATION.declared, &BUCKETS),
            backups: histogram(&table::BACKUP_DURATION.declared, &WORK_BUCKETS),
            page: Mutex::default(),
        }
    }
}

/// Only a name that is none can fail; a test looks.
fn histogram(declared: &Declared, buckets: &[f64]) -> Option<HistogramVec> {
    let options = HistogramOpts::new(declared.name, declared.help).buckets(buckets.to_vec());
    HistogramVec::new(options, declared.labels).ok()
}

fn observe(histogram: Option<&HistogramVec>, labels: [&str; 2], took: Duration) {
    if let Some(Ok(histogram)) = histogram.map(|histogram| histogram.get_metric_with_label_values(&labels)) {
        histogram.observe(took.as_secs_f64());
    }
}

impl Meters {
    /// A request to a region took so long.
    pub fn request(&self, region: &str, op: &'static str, took: Duration, failed: bool) {
        observe(self.requests.as_ref(), [region, op], took);
        self.add(&table::REGION_REQUEST_FAILURES, [region, op], f64::from(u8::from(failed)));
    }

    /// A backup was completed, and took so long.
    pub fn backup(&self, target: &str, kind: &str, took: Duration) {
        observe(self.backups.as_ref(), [target, kind], took);
    }

    /// Sets a gauge that only this process knows.
    pub fn set<const N: usize>(&self, metric: &Metric<N>, labels: [&str; N], value: f64) {
        self.page.lock().unwrap_or_else(PoisonError::into_inner).set(metric, labels, value);
    }

    /// Counts on. A counter that nothing was added to yet is begun by adding 0, so that its first event is seen.
    pub fn add<const N: usize>(&self, metric: &Metric<N>, labels: [&str; N], more: f64) {
        let mut page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        let known = page.get(metric, labels).unwrap_or_default();
        page.set(metric, labels, known + more);
    }

    /// Everything that was counted.
    pub fn page(&self) -> Page {
        self.page.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Everything that was measured.
    pub fn histograms(&self) -> Vec<MetricFamily> {
        let all = self.requests.iter().chain(&self.backups);
        all.flat_map(Collector::collect).filter(|family| !family.get_metric().is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_measured_and_failures_begin_at_zero() {
        let meters = Meters::default();
        meters.request("a", "put", Duration::from_millis(5), false);
        meters.request("a", "get", Duration::from_secs(31), true);
        meters.backup("ledger", "full", Duration::from_secs(16));
        let text = meters.page().text(meters.histograms()).unwrap();
        for line in [
            "drctl_region_request_duration_seconds_bucket{op=\"put\",region=\"a\",le=\"0.01\"} 1",
            "drctl_region_request_duration_seconds_count{op=\"get\",region=\"a\"} 1",
            "drctl_backup_duration_seconds_bucket{kind=\"full\",target=\"ledger\",le=\"15\"} 0",
            "drctl_backup_duration_seconds_bucket{kind=\"full\",target=\"ledger\",le=\"60\"} 1",
            "drctl_region_request_failures_total{region=\"a\",op=\"put\"} 0",
            "drctl_region_request_failures_total{region=\"a\",op=\"get\"} 1",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
