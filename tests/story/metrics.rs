//! A real Prometheus scrapes a real daemon: what it sees is what the regions hold, and it notices what goes wrong.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::check::first_configuration;
use crate::support::dirs::Scratch;
use crate::support::drctl::Drctl;
use crate::support::pg::Cluster;
use crate::support::process::{eventually, free_ports, run};
use crate::support::{from_environment, http};

const SOON: Duration = Duration::from_secs(60);

fn program(name: &str) -> Command {
    Command::new(Path::new(&from_environment("DRCTL_TEST_PROMETHEUS")).join(name))
}

fn deployed(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(path)
}

#[test]
fn every_alert_fires_when_it_should_and_not_before() {
    let told = run(program("promtool").arg("check").arg("rules").arg(deployed("prometheus/drctl.rules.yml")));
    assert!(told.contains("SUCCESS"), "{told}");
    run(program("promtool").arg("test").arg("rules").arg(deployed("prometheus/drctl.rules.test.yml")));
}

struct Prometheus {
    port: u16,
    child: Child,
}

impl Prometheus {
    fn start(scratch: &Scratch, daemon: u16) -> Self {
        let (port, config) = (free_ports(1), scratch.join("prometheus.yml"));
        let rules = deployed("prometheus/drctl.rules.yml").display().to_string();
        let text = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [\"{rules}\"]\n\
             scrape_configs:\n  - job_name: drctl\n    static_configs: [{{ targets: [\"127.0.0.1:{daemon}\"] }}]\n"
        );
        std::fs::write(&config, text).unwrap();
        let mut command = program("prometheus");
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!("--storage.tsdb.path={}", scratch.join("tsdb").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { port, child }
    }

    async fn api(&self, path: &str) -> Option<Value> {
        let (_, body) = http::get(self.port, path).await.ok()?;
        serde_json::from_str(&body).ok()
    }

    /// The answer to a query; `None` if it cannot be answered.
    async fn query(&self, expression: &str) -> Option<Vec<Value>> {
        let answer = self.api(&format!("/api/v1/query?query={}", http::escaped(expression))).await?;
        let results = answer["data"]["result"].as_array().cloned();
        results.filter(|_| answer["status"] == "success")
    }

    async fn value(&self, expression: &str) -> Option<f64> {
        let results = self.query(expression).await?;
        assert!(results.len() < 2, "{expression}: {results:?}");
        results.first()?["value"][1].as_str()?.parse().ok()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            found.extend(object.get("expr").and_then(Value::as_str).map(str::to_owned));
            object.values().for_each(|value| expressions(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

/// Every question that a dashboard asks is one that Prometheus understands.
async fn answers_dashboards(prometheus: &Prometheus) {
    for dashboard in ["fleet-readiness", "target-detail"] {
        let text = std::fs::read_to_string(deployed(&format!("grafana/{dashboard}.json"))).unwrap();
        let mut found = Vec::new();
        expressions(&serde_json::from_str(&text).unwrap(), &mut found);
        for expression in found {
            let expression = expression.replace("$target", ".*").replace("$region", ".*");
            assert!(prometheus.query(&expression).await.is_some(), "{dashboard}: {expression}");
        }
    }
}

#[tokio::test]
async fn prometheus_sees_what_the_regions_hold_and_what_goes_wrong() {
    let (scratch, cluster, port) = (Scratch::new(), Cluster::start_new(15).await, free_ports(1));
    let more = format!("rpo = \"5s\"\n[daemon]\nlisten = \"127.0.0.1:{port}\"\n");
    let config = first_configuration(&scratch, &cluster, &more).await;
    let dr = config.parent().unwrap();
    std::fs::create_dir_all(dr.join("schedules")).unwrap();
    let schedule =
        "job = \"backup\"\ntarget = \"ledger\"\ncron = \"0 3 * * *\"\nmax_age = \"2d\"\nparams = { fast = true }\n";
    std::fs::write(dr.join("schedules/ledger-base.toml"), schedule).unwrap();
    Drctl::new(["init"]).config(&config).run().await.ok();
    // One region is lost below, and everybody says so.
    let daemon = Drctl::new(["daemon", "--grace", "5s"]).config(&config).expect_log(" WARN ").spawn();
    let prometheus = Prometheus::start(&scratch, port);
    eventually("the daemon is ready", SOON, async || {
        http::get(port, "/readyz").await.is_ok_and(|(status, _)| status == 200)
    })
    .await;
    // The second in which a schedule was met is accounted for.
    eventually("the daemon takes the wish", SOON, async || {
        Drctl::new(["run", "ledger-base"]).config(&config).run().await.code == Some(0)
    })
    .await;
    let backups = "drctl_backups{target=\"ledger\",kind=\"full\",region=\"region-b\",state=\"complete\"}";
    eventually("the backup is seen", SOON, async || prometheus.value(backups).await == Some(1.0)).await;

    let listed = Drctl::new(["list", "--json"]).config(&config).run().await.ok().json();
    let backup = &listed["backups"][0];
    let finished: chrono::DateTime<chrono::Utc> = backup["finished_at"].as_str().unwrap().parse().unwrap();
    for (expression, expected) in [
        ("max(drctl_backup_last_success_timestamp_seconds)", finished.timestamp_millis() as f64 / 1000.0),
        ("drctl_backup_last_size_bytes{stage=\"stored\"}", backup["stored_bytes"].as_f64().unwrap()),
        ("drctl_schedule_runs_total{schedule=\"ledger-base\",outcome=\"success\"}", 1.0),
        ("drctl_schedule_runs_total{schedule=\"ledger-base\",outcome=\"failed\"}", 0.0),
        ("drctl_schedule_max_age_seconds{schedule=\"ledger-base\"}", 172_800.0),
        ("drctl_schedule_expected_interval_seconds{schedule=\"ledger-base\"}", 86_400.0),
        ("drctl_rpo_target_seconds", 5.0),
        ("drctl_wal_gaps", 0.0),
        ("sum(drctl_region_up)", 2.0),
        ("drctl_backup_duration_seconds_count{target=\"ledger\",kind=\"full\"}", 1.0),
        // The server is on this host: free space is known, and it keeps little for a slot that is read.
        ("count(drctl_slot_retained_bytes < 1e9)", 1.0),
        ("count(drctl_slot_room_bytes > 2e8)", 1.0),
        ("count(drctl_wal_unshipped_bytes < 1e9)", 2.0),
        ("drctl_config_last_reload_successful", 1.0),
        ("count(drctl_rpo_exposure_seconds < 5)", 2.0),
        // Nothing was drilled: there is nothing to say.
        ("count(drctl_rto_achieved_seconds) or vector(-1)", -1.0),
    ] {
        eventually(expression, SOON, async || prometheus.value(expression).await == Some(expected)).await;
    }
    cluster.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '100MB'").await;
    cluster.execute("SELECT pg_reload_conf()").await;
    let guarded = "drctl_slot_room_bytes < 2e8";
    eventually("the server's own limit is nearer", SOON, async || prometheus.value(guarded).await.is_some()).await;
    answers_dashboards(&prometheus).await;

    let file = scratch.join("drctl.prom");
    let textfile = ["metrics", "--textfile", file.to_str().unwrap()];
    Drctl::new(textfile).config(&config).run().await.ok();
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(&format!("{backups} 1\n")) && text.contains("drctl_rpo_exposure_seconds{"), "{text}");
    let checked = Command::new("sh")
        .args(["-c", "exec \"$0\" check metrics <\"$1\""])
        .arg(program("promtool").get_program())
        .arg(&file)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));

    // Both regions are needed for a write: without one, what is written waits.
    let (region, lost) = (dr.join("region-b"), dr.join("lost"));
    std::fs::rename(&region, &lost).unwrap();
    eventually("the region is lost", SOON, async || std::fs::remove_dir_all(&lost).is_ok()).await;
    cluster.execute("CREATE TABLE waits AS SELECT generate_series(1, 1000) n").await;
    let up = "drctl_region_up{region=\"region-b\"}";
    eventually("the region is missed", SOON, async || prometheus.value(up).await == Some(0.0)).await;
    let exposed = "min by (target) (drctl_rpo_exposure_seconds) > on (target) drctl_rpo_target_seconds";
    eventually("what waits is exposed", SOON, async || prometheus.value(exposed).await.is_some()).await;
    let pending = async |name: &str| {
        let alerts = prometheus.api("/api/v1/alerts").await.unwrap_or_default();
        let alerts = alerts["data"]["alerts"].as_array().cloned().unwrap_or_default();
        alerts.iter().any(|alert| alert["labels"]["alertname"] == name)
    };
    let waits = "drctl_wal_unshipped_bytes{region=\"region-b\"} > 0";
    eventually("what the region lacks is counted", SOON, async || prometheus.value(waits).await.is_some()).await;
    for alert in ["DrctlRegionDown", "DrctlRpoExposureHigh"] {
        eventually(alert, SOON, async || pending(alert).await).await;
    }
    daemon.kill9();
}
