//! The shipped units: what they start, what they promise the service manager, how much they let go.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::check::first_configuration;
use crate::support::dirs::Scratch;
use crate::support::drctl::Drctl;
use crate::support::pg::Cluster;
use crate::support::process::signal;

const DAEMONS: [&str; 2] = ["drctl.service", "drctl-drill.service"];
const STANDBY: &str = "drctl-standby.service";

fn unit(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/systemd").join(name)).unwrap()
}

fn value<'u>(unit: &'u str, key: &str) -> &'u str {
    unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap()
}

#[test]
fn systemd_accepts_the_units_and_finds_them_closed() {
    let scratch = Scratch::new();
    let installed: Vec<PathBuf> = DAEMONS
        .iter()
        .chain([&STANDBY])
        .map(|name| {
            let path = scratch.join(name);
            std::fs::write(&path, unit(name).replace("/usr/local/bin/drctl", env!("CARGO_BIN_EXE_drctl"))).unwrap();
            path
        })
        .collect();
    let analyze = |words: &[&str]| {
        let run = Command::new("systemd-analyze").args(words).args(&installed).output().unwrap();
        let text = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "systemd-analyze {words:?}: {text}");
        text
    };
    assert_eq!(analyze(&["verify", "--man=no"]), "");
    // 10 is a service that may do everything.
    analyze(&["security", "--offline=true", "--threshold=30", "--no-pager"]);
}

#[test]
fn the_standby_s_unit_says_what_drctl_understands_and_leaves_its_server_alone() {
    let unit = unit(STANDBY);
    let variables: Vec<(&str, &str)> =
        value(&unit, "Environment").split(' ').map(|variable| variable.split_once('=').unwrap()).collect();
    let line = value(&unit, "ExecStart").to_owned();
    let line = variables.iter().fold(line, |line, (name, value)| line.replace(&format!("${{{name}}}"), value));
    assert!(!line.contains('$'), "{line}");
    let words: Vec<std::ffi::OsString> = line.split(' ').map(Into::into).collect();
    assert_eq!(drctl::cli::check_line(&words), Ok(()), "{line}");
    // Anything else kills the server that was just promoted when drctl ends.
    assert_eq!(value(&unit, "KillMode"), "process");
}

/// A service manager's end of the notify protocol.
struct Manager(UnixDatagram);

impl Manager {
    fn until(&self, wanted: &str) -> Vec<String> {
        let (mut heard, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            let length = self.0.recv(&mut buffer).unwrap_or_else(|error| panic!("{wanted}: {error}; heard {heard:?}"));
            heard.extend(String::from_utf8_lossy(&buffer[..length]).lines().map(str::to_owned));
            if heard.iter().any(|line| line == wanted) {
                return heard;
            }
        }
    }
}

#[tokio::test]
async fn the_daemon_tells_the_service_manager_where_it_is() {
    let (scratch, cluster) = (Scratch::new(), Cluster::start_new(15).await);
    let config = first_configuration(&scratch, &cluster, "").await;
    Drctl::new(["init"]).config(&config).run().await.ok();
    for name in DAEMONS {
        let socket = scratch.join("notify");
        let manager = Manager(UnixDatagram::bind(&socket).unwrap());
        manager.0.set_read_timeout(Some(Duration::from_secs(30))).unwrap();

        // The unit's own command line.
        let start = unit(name);
        let mut words = value(&start, "ExecStart").split(' ').map(|word| match word {
            "/etc/drctl/drctl.toml" => config.to_str().unwrap(),
            word => word,
        });
        assert_eq!(words.next(), Some("/usr/local/bin/drctl"));
        let daemon = Drctl::new(words).env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", "300000").spawn();
        let heard = manager.until("READY=1");
        assert!(!heard.iter().any(|line| line == "STOPPING=1"), "{heard:?}");
        manager.until("WATCHDOG=1");
        manager.until("WATCHDOG=1");
        assert!(value(&start, "ExecReload").contains("-HUP"));
        signal(daemon.pid(), Signal::HUP);
        let heard = manager.until("RELOADING=1");
        assert!(heard.iter().any(|line| line.starts_with("MONOTONIC_USEC=")), "{heard:?}");
        manager.until("READY=1");
        signal(daemon.pid(), Signal::TERM);
        manager.until("STOPPING=1");
        daemon.wait().await.ok();
        std::fs::remove_file(&socket).unwrap();
    }
}
