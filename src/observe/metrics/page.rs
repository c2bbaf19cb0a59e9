//! A page of samples, and its text.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use prometheus::TextEncoder;
use prometheus::proto::{Counter, Gauge, LabelPair, Metric as Sample, MetricFamily, MetricType};
use serde::Serialize;

use crate::model::{Error, Result};
use crate::observe::metrics::table::{Declared, Metric, Shape};

/// Samples by metric and labels; the last one of the same labels counts.
#[derive(Debug, Clone, Default)]
pub struct Page {
    samples: BTreeMap<&'static str, (Declared, BTreeMap<Vec<String>, f64>)>,
}

/// One sample, as JSON shows it.
#[derive(Debug, Clone, Serialize)]
pub struct Row<'p> {
    /// The name of the metric.
    pub metric: &'static str,
    /// Its labels.
    pub labels: BTreeMap<&'static str, &'p str>,
    /// The value.
    pub value: f64,
}

impl Page {
    /// Sets a sample.
    pub fn set<const N: usize>(&mut self, metric: &Metric<N>, labels: [&str; N], value: f64) {
        let (_, series) = self.samples.entry(metric.declared.name).or_insert((metric.declared, BTreeMap::new()));
        series.insert(labels.map(str::to_owned).to_vec(), value);
    }

    /// Sets a sample if there is anything to say.
    pub fn set_known<const N: usize>(&mut self, metric: &Metric<N>, labels: [&str; N], value: Option<f64>) {
        if let Some(value) = value {
            self.set(metric, labels, value);
        }
    }

    /// Sets an instant, if there was one.
    pub fn set_time<const N: usize>(&mut self, metric: &Metric<N>, labels: [&str; N], at: Option<DateTime<Utc>>) {
        self.set_known(metric, labels, at.map(seconds));
    }

    /// Sets an instant unless a later one is known.
    pub fn set_latest<const N: usize>(&mut self, metric: &Metric<N>, labels: [&str; N], at: DateTime<Utc>) {
        let at = self.get(metric, labels).map_or(seconds(at), |known| known.max(seconds(at)));
        self.set(metric, labels, at);
    }

    /// A sample.
    pub fn get<const N: usize>(&self, metric: &Metric<N>, labels: [&str; N]) -> Option<f64> {
        let (_, series) = self.samples.get(metric.declared.name)?;
        series.get(labels.map(str::to_owned).as_slice()).copied()
    }

    /// Every sample of a metric, by its labels.
    pub fn series<const N: usize>(&self, metric: &Metric<N>) -> impl Iterator<Item = (&Vec<String>, &f64)> {
        self.samples.get(metric.declared.name).into_iter().flat_map(|(_, series)| series)
    }

    /// Adds the samples of another page; they count where both have one.
    pub fn extend(&mut self, other: Self) {
        for (name, (declared, series)) in other.samples {
            self.samples.entry(name).or_insert((declared, BTreeMap::new())).1.extend(series);
        }
    }

    /// Every sample by itself, as JSON shows it.
    pub fn rows(&self) -> Vec<Row<'_>> {
        let mut rows = Vec::new();
        for (declared, series) in self.samples.values() {
            for (labels, value) in series {
                let labels = declared.labels.iter().copied().zip(labels.iter().map(String::as_str)).collect();
                rows.push(Row { metric: declared.name, labels, value: *value });
            }
        }
        rows
    }

    /// The text format of Prometheus, together with what `meters` were gathered.
    ///
    /// # Errors
    /// A sample is not what was declared.
    pub fn text(&self, meters: Vec<MetricFamily>) -> Result<String> {
        let filled = self.samples.values().filter(|(_, series)| !series.is_empty());
        let mut families: Vec<_> = filled.map(|(declared, series)| family(declared, series)).collect();
        families.extend(meters);
        families.sort_by(|a, b| a.name().cmp(b.name()));
        let text = TextEncoder::new().encode_to_string(&families);
        text.map_err(|error| Error::failed("the metrics cannot be written down").because(error))
    }
}

fn family(declared: &Declared, series: &BTreeMap<Vec<String>, f64>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(declared.name.to_owned());
    family.set_help(declared.help.to_owned());
    family.set_field_type(match declared.shape {
        Shape::Counter => MetricType::COUNTER,
        Shape::Gauge | Shape::Histogram => MetricType::GAUGE,
    });
    family.set_metric(series.iter().map(|(labels, value)| sample(declared, labels, *value)).collect());
    family
}

fn sample(declared: &Declared, labels: &[String], value: f64) -> Sample {
    let pair = |(name, value): (&&str, &String)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value(value.clone());
        pair
    };
    let mut sample = Sample::default();
    sample.set_label(declared.labels.iter().zip(labels).map(pair).collect());
    if declared.shape == Shape::Counter {
        let mut counter = Counter::default();
        counter.set_value(value);
        sample.set_counter(counter);
    } else {
        let mut gauge = Gauge::default();
        gauge.set_value(value);
        sample.set_gauge(gauge);
    }
    sample
}

/// Seconds since 1970, as Prometheus counts time.
#[allow(clippy::cast_precision_loss, reason = "milliseconds since 1970 fit a double for 280,000 years")]
fn seconds(at: DateTime<Utc>) -> f64 {
    at.timestamp_millis() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;
    use crate::observe::metrics::table;

    #[test]
    fn rows_name_their_labels() {
        let mut page = Page::default();
        page.set(&table::REGION_UP, ["a"], 1.0);
        let rows = serde_json::to_value(page.rows()).unwrap();
        assert_eq!(
            rows,
            serde_json::json!([{ "metric": "drctl_region_up", "labels": { "region": "a" }, "value": 1.0 }])
        );
    }

    #[test]
    fn what_is_unknown_has_no_line() {
        let mut page = Page::default();
        page.set_known(&table::RPO_EXPOSURE, ["ledger", "a"], Some(0.25));
        page.set_known(&table::RPO_EXPOSURE, ["ledger", "b"], None);
        page.set_time(&table::NEGATIVE_CONTROL, ["ledger"], None);
        let text = page.text(Vec::new()).unwrap();
        let samples: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(samples, ["drctl_rpo_exposure_seconds{target=\"ledger\",region=\"a\"} 0.25"]);
        assert!(text.contains("# TYPE drctl_rpo_exposure_seconds gauge\n"), "{text}");
    }

    #[test]
    fn the_later_instant_stays() {
        let mut page = Page::default();
        let at = DateTime::UNIX_EPOCH + TimeDelta::seconds(1_700_000_000);
        page.set_latest(&table::BACKUP_LAST_ATTEMPT, ["ledger"], at);
        page.set_latest(&table::BACKUP_LAST_ATTEMPT, ["ledger"], at - TimeDelta::seconds(9));
        assert_eq!(page.get(&table::BACKUP_LAST_ATTEMPT, ["ledger"]), Some(1_700_000_000.0));
    }
}
