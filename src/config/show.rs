//! Settings as text again.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::config::place::Place;
use crate::config::units::{format_duration, format_size};
use crate::model::{Error, Result};

pub(super) fn unshowable(error: &(dyn std::error::Error + 'static)) -> Error {
    Error::failed("the settings cannot be shown").because_of(error)
}

/// What stands under its own name in a table of the file.
pub(super) trait Named: Serialize {
    fn name(&self) -> &str;
}

/// A list as a table by name, in its order.
pub(super) fn by_name<T: Named, S: Serializer>(items: &[T], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(items.iter().map(|item| (item.name(), item)))
}

pub(super) fn duration<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format_duration(*duration))
}

pub(super) fn optional_duration<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    duration.map(format_duration).serialize(serializer)
}

pub(super) fn size<S: Serializer>(bytes: &usize, serializer: S) -> Result<S::Ok, S::Error> {
    format_size(*bytes as u64).serialize(serializer)
}

pub(super) fn bytes<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_size(*bytes))
}

pub(super) fn optional_size<S: Serializer>(bytes: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    bytes.map(format_size).serialize(serializer)
}

pub(super) fn displayed<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

pub(super) fn directory_url<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&Place::Directory(PathBuf::from(path)))
}

#[cfg(test)]
mod tests {
    use crate::config::parse;

    use super::*;

    const FULL: &str = r#"
[schedules]
dir = "/srv/schedules"

[repository]
write_quorum = 2
degrade = { to = 1, after = "10m" }
signers = ["00112233445566778899aabbccddeeff"]
state_dir = "state"
pack_size = "1MiB"
compression_level = { pages = 5 }

[regions.us-east-1]
url = "s3://bucket/prefix"
endpoint = "http://127.0.0.1:4566"
aws_region = "us-east-1"
path_style = true
checksum = "when-required"
kms = { key = "alias/drctl" }
[regions.us-east-1.credentials]
write = { profile = "writer" }
prune = { access_key_id = "env:ID", secret_access_key = "file:prune.key" }

[regions.disk]
url = "file:///srv/drctl"
kms = { key = "k", aws_region = "eu-west-1", endpoint = "http://127.0.0.1:4567" }

[regions.a-third]
url = "third"

[keys.recovery]
age = "age1qqqq"
identity = "file:recovery.age"

[targets.ledger]
source = "postgres"
conninfo = "host=/run/postgresql user=drctl"
password = "env:PGPASS"
method = "local"
data_dir = "/var/lib/postgresql/15/main"
rpo = "5s"
rto_restore = "4h"
rto_failover = "30m"
max_read_rate = "200MB"
on_pressure = "drop-slot"
wal_disk_bytes = "64GiB"
config_files = ["/etc/postgresql/15/main/*.conf"]

[daemon]
listen = "127.0.0.1:9841"
token = "file:/etc/drctl/token"
allow = ["postgres"]

[grafana]
url = "https://grafana.example/"
token = "env:GRAFANA_TOKEN"
dashboard_uid = "drctl-target"

[notify]
on = ["gaps", "drills"]
webhook = { url = "file:hook.url", format = "slack" }
dead_man = { url = "https://beats.example/drctl", every = "30s" }
"#;

    #[test]
    fn what_is_shown_reads_back_as_the_same_settings() {
        let settings = parse(FULL, "drctl.toml", Path::new("/etc/drctl")).unwrap();
        let shown = settings.to_toml().unwrap();
        assert_eq!(parse(&shown, "shown", Path::new("/elsewhere")).unwrap(), settings, "{shown}");
        for expected in [
            "ship_interval = \"1s\"",
            "wal_disk_bytes = \"64GiB\"",
            "control_socket = \"/etc/drctl/state/ledger.sock\"",
            "url = \"dir:///srv/drctl\"",
            "secret_access_key = \"file:/etc/drctl/prune.key\"",
        ] {
            assert!(shown.contains(expected), "{shown}");
        }
        let order: Vec<_> = ["us-east-1]", "disk]", "a-third]"].iter().map(|name| shown.find(name).unwrap()).collect();
        assert!(order.is_sorted(), "{shown}");
    }

    #[test]
    fn json_shows_the_same_facts() {
        let settings = parse(FULL, "drctl.toml", Path::new("/etc/drctl")).unwrap();
        let json = settings.to_json().unwrap();
        assert_eq!(json["regions"]["us-east-1"]["url"], "s3://bucket/prefix");
        assert_eq!(json["targets"]["ledger"]["rpo"], "5s");
    }
}
