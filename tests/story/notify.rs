//! Who is told when something is wrong, and when it is over.

use std::time::Duration;

use serde_json::json;

use crate::support::dirs::Scratch;
use crate::support::drctl::Drctl;
use crate::support::http::Receiver;
use crate::support::process::eventually;

const SOON: Duration = Duration::from_secs(40);

/// A repository of two directories that protects nothing yet, and whom it tells.
async fn configured(scratch: &Scratch, receiver: &Receiver, format: &str) -> std::path::PathBuf {
    let dir = scratch.join("dr");
    Drctl::new(["init", dir.to_str().unwrap()]).run().await.ok();
    let config = dir.join("drctl.toml");
    let root = format!("http://127.0.0.1:{}", receiver.port);
    let told = format!(
        "\n[notify]\nwebhook = {{ url = \"env:HOOK\", format = \"{format}\" }}\n\
         dead_man = {{ url = \"{root}/alive\", every = \"200ms\" }}\n\
         [grafana]\nurl = \"{root}/grafana/\"\ntoken = \"env:TOKEN\"\ndashboard_uid = \"drctl-target\"\n"
    );
    std::fs::write(&config, std::fs::read_to_string(&config).unwrap() + &told).unwrap();
    Drctl::new(["init"]).config(&config).run().await.ok();
    config
}

fn drctl(receiver: &Receiver, config: &std::path::Path, line: &[&str]) -> Drctl {
    let hook = format!("http://127.0.0.1:{}/hook/T0/hidden", receiver.port);
    Drctl::new(line).config(config).env("HOOK", hook).env("TOKEN", "glsa_hidden")
}

#[tokio::test]
async fn a_trial_says_who_answered_and_never_a_secret() {
    let (scratch, receiver) = (Scratch::new(), Receiver::start().await);
    let config = configured(&scratch, &receiver, "slack").await;
    let tried = drctl(&receiver, &config, &["notify", "test"]).run().await.ok();
    assert_eq!(tried.stdout.matches("ok  ").count(), 3, "{tried}");

    let page = receiver.told("POST /hook/T0/hidden").remove(0);
    let text = page.body["text"].as_str().unwrap();
    assert!(text.starts_with("PROBLEM this is a test") && page.body.as_object().unwrap().len() == 1, "{page:?}");
    assert!(page.head.contains("content-type: application/json"), "{page:?}");
    assert_eq!(receiver.told("GET /alive").len(), 1);
    let annotation = receiver.told("POST /grafana/api/annotations").remove(0);
    assert!(annotation.head.contains("authorization: bearer glsa_hidden"), "{annotation:?}");
    let body = &annotation.body;
    assert_eq!((&body["dashboardUID"], &body["tags"]), (&json!("drctl-target"), &json!(["drctl", "test"])));
    // Milliseconds: Grafana takes anything smaller for a moment in 1970.
    assert!(body["time"].as_i64().unwrap() > 1_600_000_000_000 && body["timeEnd"].is_i64(), "{body}");

    receiver.answer(&[404, 401, 503]);
    let tried = drctl(&receiver, &config, &["notify", "test"]).run().await.code(1);
    assert_eq!(tried.stdout.matches("FAIL").count(), 3, "{tried}");
    assert!(["404", "401", "503"].iter().all(|status| tried.stdout.contains(status)), "{tried}");
    assert!(!tried.stdout.contains("hidden") && !tried.stderr.contains("hidden"), "{tried}");
}

#[tokio::test]
async fn a_problem_is_paged_once_and_so_is_its_end() {
    let (scratch, receiver) = (Scratch::new(), Receiver::start().await);
    let config = configured(&scratch, &receiver, "generic").await;
    let dr = config.parent().unwrap();
    std::fs::create_dir_all(dr.join("schedules")).unwrap();
    let schedule = "job = \"repair\"\ncron = \"0 0 1 1 *\"\nretry = { max = 0 }\n";
    std::fs::write(dr.join("schedules/all-repair.toml"), schedule).unwrap();
    let daemon = drctl(&receiver, &config, &["daemon", "--grace", "5s"]);
    let daemon = [
        "outcome=",
        "cannot be brought to any region",
        "a notice waits",
        "taken from another region",
        "no region tells",
    ]
    .into_iter()
    .fold(daemon, Drctl::expect_log)
    .spawn();
    eventually("signs of life", SOON, async || receiver.told("GET /alive").len() > 2).await;
    let run = async || {
        let asked = async || drctl(&receiver, &config, &["run", "all-repair"]).run().await.code == Some(0);
        eventually("the daemon takes the wish", SOON, asked).await;
    };
    let pages = || receiver.told("POST /hook").into_iter().map(|told| told.body).collect::<Vec<_>>();
    let away = |region: &str| (dr.join(region), dr.join(format!("{region}.away")));
    for (here, there) in ["region-a", "region-b"].map(away) {
        std::fs::rename(here, there).unwrap();
    }
    run().await;
    eventually("a page", SOON, async || !pages().is_empty()).await;
    run().await;
    for (here, there) in ["region-a", "region-b"].map(away) {
        std::fs::rename(there, here).unwrap();
    }
    run().await;
    eventually("the end of it", SOON, async || pages().len() > 1).await;
    daemon.terminate().await.ok();
    let told: Vec<_> = pages().iter().map(|page| (page["problem"].clone(), page["state"].clone())).collect();
    let problem = json!("schedule/all-repair");
    assert_eq!(told, [(problem.clone(), json!("firing")), (problem, json!("resolved"))]);
    let signs = receiver.told("GET /alive").len();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(receiver.told("GET /alive").len(), signs, "a daemon that is gone gives no sign of life");
}

/// Whatever becomes of those who look on and of those who are told.
#[tokio::test]
async fn nobody_who_looks_on_keeps_the_daemon_from_its_work() {
    let (scratch, receiver) = (Scratch::new(), Receiver::start().await);
    let config = configured(&scratch, &receiver, "generic").await;
    let dr = config.parent().unwrap();
    std::fs::create_dir_all(dr.join("schedules")).unwrap();
    std::fs::write(dr.join("schedules/all-repair.toml"), "job = \"repair\"\ncron = \"0 0 1 1 *\"\n").unwrap();
    // Somebody else has the port, nobody is where Grafana was, and the webhook is no address.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let text = std::fs::read_to_string(&config).unwrap();
    let grafana = format!("http://127.0.0.1:{}/grafana/", receiver.port);
    assert!(text.contains(&grafana));
    let text = text.replace(&grafana, "http://127.0.0.1:1/grafana/");
    let listen = format!("\n[daemon]\nlisten = \"{}\"\n", taken.local_addr().unwrap());
    std::fs::write(&config, text + &listen).unwrap();
    let daemon = Drctl::new(["daemon", "--grace", "5s"]).config(&config).env("HOOK", "no address").env("TOKEN", "t");
    let daemon = [
        "nothing answers over TCP",
        "somebody will not be told",
        "a notice waits",
        "taken from another region",
        "not everybody was told",
    ]
    .into_iter()
    .fold(daemon, Drctl::expect_log)
    .spawn();
    eventually("the daemon takes the wish", SOON, async || {
        drctl(&receiver, &config, &["run", "all-repair"]).run().await.code == Some(0)
    })
    .await;
    let runs = dr.join("region-a/runs/all-repair");
    eventually("the work is done", SOON, async || std::fs::read_dir(&runs).is_ok_and(|list| list.count() > 0)).await;
    eventually("signs of life", SOON, async || receiver.told("GET /alive").len() > 2).await;
    let ended = daemon.terminate().await.ok();
    let told = ["nothing answers over TCP", "somebody will not be told"];
    assert!(told.iter().all(|words| ended.stderr.contains(words)), "{ended}");
}
