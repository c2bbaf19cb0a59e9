//! What it costs to ship WAL often: stores are paid by the request.

use std::time::Duration;

use super::finding::{Finding, Findings};
use super::subject::Subject;
use crate::jobs::context::Target;

const MONTH: Duration = Duration::from_secs(30 * 24 * 3600);
/// Cents for a thousand puts to S3 Standard in most of its regions.
const CENTS_PER_THOUSAND: f64 = 0.5;

pub(super) fn check(subject: &Subject, targets: &[&Target]) -> Vec<Finding> {
    let paid = subject.addresses.iter().filter(|region| region.url.starts_with("s3://")).count();
    let mut list = Vec::new();
    for target in targets.iter().filter(|target| target.stream && paid > 0) {
        let mut findings = Findings::about("postgres", &target.name);
        findings.ok(price(target.ship_interval, paid));
        list.extend(findings.into_list());
    }
    list
}

/// The most that a server can cost that never rests; one that rests costs nothing.
fn price(interval: Duration, regions: usize) -> String {
    let puts = MONTH.as_secs_f64() / interval.as_secs_f64().max(0.001);
    let dollars = puts / 1000.0 * CENTS_PER_THOUSAND / 100.0;
    #[allow(clippy::cast_precision_loss, reason = "nobody has 2^52 regions")]
    let all = dollars * regions as f64;
    let (seconds, millions) = (interval.as_secs_f64(), puts / 1e6);
    format!(
        "shipping every {seconds} s is at most {millions:.1} million puts a month in a region: {dollars:.2} USD there, {all:.2} USD \
         in {regions}, at the price of S3 Standard; a server that rests costs nothing"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_price_follows_the_interval() {
        let text = price(Duration::from_secs(1), 3);
        assert!(
            text.contains("every 1 s") && text.contains("2.6 million") && text.contains("12.96 USD there"),
            "{text}"
        );
        assert!(text.contains("38.88 USD in 3"), "{text}");
        assert!(price(Duration::from_millis(100), 1).contains("129.60 USD there"));
    }
}
