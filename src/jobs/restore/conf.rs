//! Configuration of a restored cluster: recovery settings between markers, and the captured files where PGDATA had none.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use base64::Engine as _;
use rustix::fs::OFlags;
use serde::Serialize;

use crate::disk::{DiskError, place};
use crate::model::{Error, Lsn, Result, Timeline};

const BEGIN: &str = "# drctl recovery settings begin";
const END: &str = "# drctl recovery settings end";
/// Where ALTER SYSTEM writes; read last, so that it wins.
pub(super) const AUTO_CONF: &str = "postgresql.auto.conf";

/// What recovery is told.
#[derive(Debug, Clone)]
pub(super) struct RecoverySettings<'a> {
    /// Where WAL comes from.
    pub(super) supply: Supply<'a>,
    /// Start of the last record wanted.
    pub(super) record: Lsn,
    pub(super) timeline: Timeline,
}

/// Where recovery finds its WAL.
#[derive(Debug, Clone, Copy)]
pub(super) enum Supply<'a> {
    /// In a directory, through this program.
    Staged { drctl: &'a Path, staging: &'a Path },
    /// From a walsender.
    Streamed { conninfo: &'a str },
}

impl RecoverySettings<'_> {
    /// The block for `postgresql.auto.conf`.
    ///
    /// # Errors
    /// A path that no shell command can carry.
    pub(super) fn block(&self) -> Result<String> {
        let command = match self.supply {
            Supply::Staged { drctl, staging } => {
                format!("{} recovery-fetch --dir {} \"%f\" \"%p\"", shell(drctl)?, shell(staging)?)
            }
            Supply::Streamed { .. } => String::new(),
        };
        // Two targets are fatal, so others that the cluster's own files may set are emptied. They come first: emptying
        // one resets the choice that was made before it.
        let others = ["recovery_target", "recovery_target_name", "recovery_target_time", "recovery_target_xid"];
        let mut lines = Vec::new();
        let mut set = |name: &str, value: &str| lines.push((name.to_owned(), value.to_owned()));
        others.iter().for_each(|other| set(other, ""));
        set("recovery_target_lsn", &self.record.to_string());
        set("recovery_target_timeline", &self.timeline.to_string());
        set("recovery_target_inclusive", "on");
        set("recovery_target_action", "promote");
        set("restore_command", &command);
        // Of a standby's own settings these would delete from an archive, or wait.
        set("archive_cleanup_command", "");
        set("recovery_end_command", "");
        set("recovery_min_apply_delay", "0");
        if let Supply::Streamed { conninfo } = self.supply {
            set("primary_conninfo", conninfo);
            set("primary_slot_name", "");
            set("wal_receiver_create_temp_slot", "off");
            set("wal_retrieve_retry_interval", "1s");
        }
        Ok(block_of(&lines))
    }
}

/// Settings between the markers.
pub(super) fn block_of(settings: &[(String, String)]) -> String {
    let set = |(name, value): &(String, String)| format!("{name} = '{}'\n", value.replace('\'', "''"));
    let lines: String = settings.iter().map(set).collect();
    format!("{BEGIN}\n{lines}{END}\n")
}

/// A path as one word of a shell command in which PostgreSQL replaces `%`.
fn shell(path: &Path) -> Result<String> {
    let text = path.to_str().filter(|text| !text.chars().any(char::is_control));
    let text = text.ok_or_else(|| Error::refused(format!("{} cannot stand in restore_command", path.display())))?;
    Ok(format!("'{}'", text.replace('\'', "'\\''").replace('%', "%%")))
}

/// Appends the block to the directory's `postgresql.auto.conf`, replacing one that is there.
pub(super) fn append(directory: &Path, block: &str) -> Result<()> {
    let path = directory.join(AUTO_CONF);
    let mut text = match read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        read => without_block(&read.map_err(|error| DiskError::new("read", &path, error))?),
    };
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(block);
    Ok(place::place(&path, text.as_bytes(), 0o600)?)
}

/// The file itself. Its account could have put a link to what only root reads in its place, and gets back what is written.
fn read(path: &Path) -> std::io::Result<String> {
    let mut options = OpenOptions::new();
    let mut file = options.read(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(path)?;
    let mut text = String::new();
    file.read_to_string(&mut text).map(|_| text)
}

/// Takes the block out again.
pub(super) fn remove(directory: &Path) -> Result<()> {
    let path = directory.join(AUTO_CONF);
    let text = read(&path).map_err(|error| DiskError::new("read", &path, error))?;
    Ok(place::place(&path, without_block(&text).as_bytes(), 0o600)?)
}

fn without_block(text: &str) -> String {
    let mut inside = false;
    let kept = text.lines().filter(|line| {
        inside |= *line == BEGIN;
        let keep = !inside;
        inside &= *line != END;
        keep
    });
    kept.map(|line| format!("{line}\n")).collect()
}

/// A configuration file that stood outside of the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct CapturedFile {
    pub(super) name: String,
    pub(super) path: String,
    pub(super) content: Vec<u8>,
}

/// The files in the backup's document `configuration`, as far as it has them.
pub(super) fn captured_files(document: &serde_json::Value) -> Vec<CapturedFile> {
    let files = document.get("files").and_then(serde_json::Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let file = |value: &serde_json::Value| {
        let text = |key: &str| value.get(key).and_then(serde_json::Value::as_str).map(str::to_owned);
        let sealed =
            value.get("contents").and_then(|contents| contents.get("bytes")).and_then(serde_json::Value::as_str);
        let content = match sealed {
            Some(base64) => base64::engine::general_purpose::STANDARD.decode(base64).ok()?,
            None => text("content")?.into_bytes(),
        };
        Some(CapturedFile { name: text("name")?, path: text("path")?, content })
    };
    files.iter().filter_map(file).collect()
}

/// The files to write into a data directory that came without a configuration: (name, contents).
pub(super) fn rebuilt(captured: &[CapturedFile]) -> Vec<(String, Vec<u8>)> {
    let of = |name: &str| captured.iter().find(|file| file.name == name);
    let Some(main) = of("config_file") else { return Vec::new() };
    let mut conf = neutral(&String::from_utf8_lossy(&main.content));
    for included in captured.iter().filter(|file| file.name == "include") {
        conf.push_str(&format!("\n# from {}\n", included.path));
        conf.push_str(&neutral(&String::from_utf8_lossy(&included.content)));
    }
    let mut files = vec![("postgresql.conf".to_owned(), conf.into_bytes())];
    for (name, place) in [("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")] {
        files.extend(of(name).map(|file| (place.to_owned(), file.content.clone())));
    }
    let mut originals: Vec<(String, Vec<u8>)> = Vec::new();
    for file in captured {
        let base = file.path.rsplit('/').next().unwrap_or("file");
        let mut name = format!("drctl-original-{base}");
        while originals.iter().any(|(taken, _)| *taken == name) {
            name.push('_');
        }
        originals.push((name, file.content.clone()));
    }
    files.extend(originals);
    files
}

/// Comments out whatever points to a place of the old machine.
fn neutral(text: &str) -> String {
    const PLACES: [&str; 8] = [
        "data_directory",
        "stats_temp_directory",
        "hba_file",
        "ident_file",
        "external_pid_file",
        "include",
        "include_dir",
        "include_if_exists",
    ];
    let line = |line: &str| {
        let word: String = line.trim_start().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
        match PLACES.contains(&word.to_ascii_lowercase().as_str()) {
            true => format!("#drctl# {line}\n"),
            false => format!("{line}\n"),
        }
    };
    text.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovery_has_exactly_one_target_and_it_comes_last() {
        let settings = RecoverySettings {
            supply: Supply::Staged { drctl: Path::new("/opt/dr 'x'/drctl"), staging: Path::new("/srv/100%/wal") },
            record: Lsn(0x12_F811_30D0),
            timeline: Timeline(3),
        };
        let block = settings.block().unwrap();
        assert!(block.contains("recovery_target_lsn = '12/F81130D0'\n"));
        assert!(block.find("recovery_target_time = ''").unwrap() < block.find("recovery_target_lsn =").unwrap());
        assert!(
            block.contains("''/opt/dr ''\\''''x''\\''''/drctl'' recovery-fetch --dir ''/srv/100%%/wal'' \"%f\" \"%p\""),
            "{block}"
        );
    }

    #[test]
    fn a_streamed_recovery_asks_no_command() {
        let supply = Supply::Streamed { conninfo: "host='/srv/it'" };
        let settings = RecoverySettings { supply, record: Lsn(1), timeline: Timeline(1) };
        let block = settings.block().unwrap();
        assert!(block.contains("restore_command = ''\n"), "{block}");
        assert!(block.contains("primary_conninfo = 'host=''/srv/it'''\n"), "{block}");
    }

    #[test]
    fn the_block_is_replaced_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        place::place(&dir.path().join(AUTO_CONF), b"work_mem = '5MB'", 0o600).unwrap();
        let block = format!("{BEGIN}\na = '1'\n{END}\n");
        let read = || std::fs::read_to_string(dir.path().join(AUTO_CONF)).unwrap();
        append(dir.path(), &block).unwrap();
        append(dir.path(), &block).unwrap();
        assert_eq!(read(), format!("work_mem = '5MB'\n{block}"));
        remove(dir.path()).unwrap();
        assert_eq!(read(), "work_mem = '5MB'\n");
        let secret = dir.path().join("secret");
        place::place(&secret, b"of root", 0o600).unwrap();
        std::fs::remove_file(dir.path().join(AUTO_CONF)).unwrap();
        std::os::unix::fs::symlink(&secret, dir.path().join(AUTO_CONF)).unwrap();
        append(dir.path(), &block).unwrap_err();
    }

    #[test]
    fn captured_configuration_loses_its_old_places() {
        let document = serde_json::json!({ "files": [
            { "name": "config_file", "path": "/etc/postgresql/15/main/postgresql.conf",
              "content": "data_directory = '/var/lib/x'\nwork_mem = 5MB\n include_dir = 'conf.d'\nhba_file='/etc/x'" },
            { "name": "include", "path": "/etc/postgresql/15/main/conf.d/a.conf", "contents": { "bytes": "cG9ydCA9IDU0MzMK" } },
            { "name": "hba_file", "path": "/etc/postgresql/15/main/pg_hba.conf", "content": "local all all peer\n" },
            { "name": "ident_file", "path": "/etc/x", "contents": { "missing": { "reason": "no", "grant": null } } },
        ]});
        let files = rebuilt(&captured_files(&document));
        let names: Vec<_> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "postgresql.conf",
                "pg_hba.conf",
                "drctl-original-postgresql.conf",
                "drctl-original-a.conf",
                "drctl-original-pg_hba.conf"
            ]
        );
        let conf = String::from_utf8(files[0].1.clone()).unwrap();
        assert!(conf.starts_with("#drctl# data_directory") && conf.contains("\nwork_mem = 5MB\n"));
        assert!(
            conf.contains("#drctl#  include_dir")
                && conf.contains("#drctl# hba_file")
                && conf.contains("\nport = 5433\n")
        );
        assert!(rebuilt(&captured_files(&serde_json::Value::Null)).is_empty());
    }
}
