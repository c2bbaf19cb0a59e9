//! What is shipped around the metrics names only what is declared: documentation, dashboards, alert rules.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::table::{ALL, Declared, Shape};

const DASHBOARDS: [&str; 2] = [
    include_str!("../../../deploy/grafana/fleet-readiness.json"),
    include_str!("../../../deploy/grafana/target-detail.json"),
];
const RULES: &str = include_str!("../../../deploy/prometheus/drctl.rules.yml");
const RULE_TESTS: &str = include_str!("../../../deploy/prometheus/drctl.rules.test.yml");

/// A word, or one character of anything else; what stands in quotes is dropped.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let is_word = |c: char| c.is_ascii_alphanumeric() || "_:$".contains(c);
        if "\"'`".contains(character) {
            while characters.next().is_some_and(|next| next != character) {}
            tokens.push("\"\"".to_owned());
        } else if is_word(character) {
            let mut word = String::from(character);
            while let Some(next) = characters.next_if(|next| is_word(*next)) {
                word.push(next);
            }
            tokens.push(word);
        } else if !character.is_whitespace() {
            tokens.push(character.to_string());
        }
    }
    tokens
}

/// The declared metric behind the name of a series, and the labels that its series have.
fn series(name: &str) -> Option<(&'static Declared, BTreeSet<&'static str>)> {
    let find = |name: &str| ALL.iter().find(|declared| declared.name == name);
    let of_histogram = |suffix: &str| name.strip_suffix(suffix).and_then(find).filter(|d| d.shape == Shape::Histogram);
    let plain = find(name).filter(|declared| declared.shape != Shape::Histogram);
    let bucket = of_histogram("_bucket");
    let declared = plain.or(bucket).or_else(|| of_histogram("_sum")).or_else(|| of_histogram("_count"))?;
    let more = bucket.map(|_| "le").into_iter().chain(["instance", "job"]);
    Some((declared, declared.labels.iter().copied().chain(more).collect()))
}

/// What an expression names that is not declared, and the labels that its result can have.
fn judge(expression: &str) -> (Vec<String>, BTreeSet<&'static str>) {
    let tokens = tokens(expression);
    let (mut wrong, mut known) = (Vec::new(), BTreeSet::new());
    for (at, token) in tokens.iter().enumerate().filter(|(_, token)| token.starts_with("drctl_")) {
        let Some((declared, labels)) = series(token) else {
            wrong.push(format!("{token} is not declared"));
            continue;
        };
        known.extend(&labels);
        if tokens.get(at + 1).is_some_and(|next| next == "{") {
            let inside: Vec<_> = tokens[at + 2..].iter().take_while(|token| *token != "}").collect();
            let names = inside.windows(2).filter(|pair| "=!".contains(pair[1].as_str()));
            let names = names.map(|pair| pair[0].as_str()).filter(|name| name.starts_with(|c: char| c.is_alphabetic()));
            let strange = names.filter(|name| !labels.contains(name));
            wrong.extend(strange.map(|name| format!("{} has no label {name}", declared.name)));
        }
    }
    let grouping = ["by", "without", "on", "ignoring", "group_left", "group_right"];
    for at in (0..tokens.len()).filter(|at| grouping.contains(&tokens[*at].as_str())) {
        let inside = tokens[at + 1..].iter().skip(1).take_while(|token| *token != ")");
        let strange = inside.filter(|token| *token != "," && !known.contains(token.as_str()));
        wrong.extend(strange.map(|label| format!("nothing in `{expression}` has a label {label}")));
    }
    (wrong, known)
}

/// `{{label}}` and `$labels.label`.
fn mentioned(text: &str) -> Vec<&str> {
    let braces = text.split("{{").skip(1).filter_map(|rest| rest.split("}}").next()).map(str::trim);
    let braces = braces.filter(|word| word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'));
    let word = |rest: &str| rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
    braces.chain(text.split("$labels.").skip(1).map(|rest| &rest[..word(rest)])).collect()
}

/// Every object of a JSON document.
fn objects<'v>(value: &'v Value, found: &mut Vec<&'v serde_json::Map<String, Value>>) {
    match value {
        Value::Object(object) => {
            found.push(object);
            object.values().for_each(|value| objects(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| objects(value, found)),
        _ => {}
    }
}

/// The values of `key: '…'`.
fn quoted(text: &str, key: &str) -> Vec<String> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix(key)?.trim().strip_prefix('\''));
    lines.map(|rest| rest.trim_end().trim_end_matches('\'').replace("''", "'")).collect()
}

#[test]
fn a_wrong_name_or_label_is_found() {
    for wrong in [
        "drctl_rpo_exposure",
        "drctl_rpo_exposure_seconds{repo=\"a\"}",
        "sum by (host) (drctl_rpo_exposure_seconds)",
        "drctl_rpo_exposure_seconds > on (tarjet) drctl_rpo_target_seconds",
        "drctl_region_request_duration_seconds",
        "rate(drctl_region_request_duration_seconds_sum{le=\"1\"}[5m])",
        "drctl_wal_gaps_total",
    ] {
        assert!(!judge(wrong).0.is_empty(), "{wrong}");
    }
    for right in [
        "max by (target, instance) (drctl_rpo_exposure_seconds{target=~\"drctl_x|{repo='a'}\", region!=\"b\"}) > 1",
        "histogram_quantile(0.9, sum by (le) (rate(drctl_region_request_duration_seconds_bucket[5m])))",
    ] {
        assert_eq!(judge(right).0, Vec::<String>::new(), "{right}");
    }
    assert_eq!(mentioned("{{ target }} {{ $value | humanize }} {{ $labels.region }}"), ["target", "region"]);
}

#[test]
fn dashboards_name_only_what_is_declared() {
    for text in DASHBOARDS {
        let dashboard: Value = serde_json::from_str(text).unwrap();
        let (mut found, mut expressions) = (Vec::new(), 0);
        objects(&dashboard, &mut found);
        for object in found {
            let Some(expression) = ["expr", "definition"].iter().find_map(|key| object.get(*key)?.as_str()) else {
                continue;
            };
            expressions += 1;
            let variable = expression.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')'));
            let (metric, label) = variable.and_then(|rest| rest.split_once(',')).unwrap_or((expression, ""));
            let (mut wrong, known) = judge(metric);
            let legend = object.get("legendFormat").and_then(Value::as_str).unwrap_or_default();
            let labels = mentioned(legend).into_iter().chain([label.trim()]).filter(|label| !label.is_empty());
            wrong.extend(labels.filter(|label| !known.contains(label)).map(|label| format!("no label {label}")));
            assert_eq!(wrong, Vec::<String>::new(), "{expression}");
            assert!(metric.contains("drctl_"), "{expression}");
        }
        assert!(expressions > 10, "{expressions}");
    }
}

#[test]
fn alert_rules_name_only_what_is_declared_and_are_tested_both_ways() {
    let names: Vec<_> = RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let (expressions, summaries) = (quoted(RULES, "expr:"), quoted(RULES, "summary:"));
    assert!(names.len() > 20 && names.len() == expressions.len() && names.len() == summaries.len());
    assert_eq!(names.len(), RULES.matches(" expr:").count(), "every expression stands in single quotes on its line");
    for (name, (expression, summary)) in names.iter().zip(expressions.iter().zip(&summaries)) {
        let (mut wrong, known) = judge(expression);
        let strange = mentioned(summary).into_iter().filter(|label| !known.contains(label));
        wrong.extend(strange.map(|label| format!("no label {label}")));
        assert_eq!(wrong, Vec::<String>::new(), "{name}");
        for test in [format!("- name: {name} fires\n"), format!("- name: {name} stays quiet\n")] {
            assert!(RULE_TESTS.contains(&test), "{test}");
        }
    }
}

/// The names of the Markdown files in a folder of the repository.
fn documents(folder: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".md")).collect()
}

fn text(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

#[test]
fn every_alert_names_a_runbook_that_exists_and_every_runbook_is_named() {
    let mut runbooks = documents("runbooks");
    assert!(runbooks.remove("README.md") && runbooks.len() > 5, "{runbooks:?}");
    let alerts = RULES.matches("- alert: ").count();
    let wanted: Vec<_> = RULES.lines().filter_map(|line| line.trim().strip_prefix("runbook: ")).collect();
    assert_eq!(wanted.len(), alerts, "an alert without a runbook");
    for name in &wanted {
        assert!(runbooks.contains(*name), "an alert names {name}, which is not in runbooks/");
    }
    let readers = documents("docs").into_iter().map(|name| text(&format!("docs/{name}")));
    let readers: Vec<_> = readers.chain([text("README.md"), text("runbooks/README.md")]).collect();
    for name in runbooks {
        let is_named = wanted.contains(&name.as_str()) || readers.iter().any(|text| text.contains(&name));
        assert!(is_named, "nothing leads to runbooks/{name}: name it in an alert, in docs/ or in a README");
    }
}

#[test]
fn the_documentation_describes_every_metric_and_no_other() {
    let document = include_str!("../../../docs/metrics.md");
    let described: Vec<_> = document.lines().filter(|line| line.starts_with("| `drctl_")).collect();
    let line = |declared: &Declared| {
        let Declared { name, shape, labels, help, absent } = declared;
        let labels = labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
        format!("| `{name}` | {} | {labels} | {help} | {absent} |", shape.as_str())
    };
    let declared: Vec<_> = ALL.iter().map(line).collect();
    assert_eq!(described, declared, "the table of docs/metrics.md is to be:\n{}", declared.join("\n"));
}
