//! Writes PostgreSQL's `backup_manifest`, so that `pg_verifybackup` can check what a restore wrote.

use std::io::{self, Write};

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};

use crate::model::{Lsn, SystemId, Timeline};

/// The file's name in a data directory.
pub const FILE_NAME: &str = "backup_manifest";

/// The first major version whose manifest names the cluster.
const SYSTEM_ID_SINCE: u32 = 17;

/// One restored file.
#[derive(Debug, Clone, Copy)]
pub struct FileEntry<'a> {
    /// Relative to the data directory; files of tablespaces begin with `pg_tblspc/<oid>/`.
    pub path: &'a [u8],
    /// Bytes.
    pub size: u64,
    /// Modification time; nobody checks it.
    pub modified: DateTime<Utc>,
    /// CRC32C of the contents.
    pub crc32c: u32,
}

/// WAL that the backup needs on one timeline.
#[derive(Debug, Clone, Copy)]
pub struct WalRange {
    /// The timeline.
    pub timeline: Timeline,
    /// Its first byte.
    pub start: Lsn,
    /// The byte behind its last.
    pub end: Lsn,
}

/// Writes a manifest file by file. Nothing is kept in memory.
#[derive(Debug)]
pub struct ManifestWriter<W: Write> {
    out: Hashing<W>,
    is_first: bool,
}

impl<W: Write> ManifestWriter<W> {
    /// Begins a manifest for a server of this major version.
    ///
    /// # Errors
    /// From `out`.
    pub fn new(out: W, major: u32, system_id: SystemId) -> io::Result<Self> {
        let mut out = Hashing { out, digest: Sha256::new() };
        if major >= SYSTEM_ID_SINCE {
            writeln!(out, "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": {system_id},")?;
        } else {
            writeln!(out, "{{ \"PostgreSQL-Backup-Manifest-Version\": 1,")?;
        }
        write!(out, "\"Files\": [")?;
        Ok(Self { out, is_first: true })
    }

    /// Adds one file. `pg_verifybackup` wants every file but the manifest itself, `postgresql.auto.conf`, the signal
    /// files and what lies in `pg_wal`.
    ///
    /// # Errors
    /// From `out`.
    pub fn file(&mut self, file: &FileEntry<'_>) -> io::Result<()> {
        let separator = if self.is_first { "" } else { "," };
        self.is_first = false;
        let (key, path) = match std::str::from_utf8(file.path) {
            Ok(path) => ("Path", serde_json::to_string(path)?),
            // JSON has no words for a path that is not UTF-8.
            Err(_) => ("Encoded-Path", format!("\"{}\"", hex::encode(file.path))),
        };
        let modified = file.modified.format("%Y-%m-%d %H:%M:%S GMT");
        // PostgreSQL prints the bytes of the CRC as they lie in memory.
        let checksum = hex::encode(file.crc32c.to_le_bytes());
        write!(
            self.out,
            "{separator}\n{{ \"{key}\": {path}, \"Size\": {}, \"Last-Modified\": \"{modified}\", \
             \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{checksum}\" }}",
            file.size
        )
    }

    /// Ends the manifest and returns the writer, flushed.
    ///
    /// # Errors
    /// From `out`.
    pub fn finish(mut self, ranges: &[WalRange]) -> io::Result<W> {
        write!(self.out, "\n],\n\"WAL-Ranges\": [")?;
        for (index, WalRange { timeline, start, end }) in ranges.iter().enumerate() {
            let separator = if index == 0 { "" } else { "," };
            write!(
                self.out,
                "{separator}\n{{ \"Timeline\": {timeline}, \"Start-LSN\": \"{start}\", \"End-LSN\": \"{end}\" }}"
            )?;
        }
        write!(self.out, "\n],\n")?;
        // The digest covers every line but the one that carries it.
        let Hashing { mut out, digest } = self.out;
        writeln!(out, "\"Manifest-Checksum\": \"{}\"}}", hex::encode(digest.finalize()))?;
        out.flush()?;
        Ok(out)
    }
}

#[derive(Debug)]
struct Hashing<W> {
    out: W,
    digest: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.digest.update(bytes.get(..written).unwrap_or(bytes));
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;

    use super::*;
    use crate::pg::testing::{Cluster, block_on, installed};

    fn entry(path: &[u8]) -> FileEntry<'_> {
        FileEntry { path, size: 3, modified: DateTime::from_timestamp(1_795_000_000, 0).unwrap(), crc32c: 0x364B_3FB7 }
    }

    fn manifest(major: u32) -> String {
        let mut writer = ManifestWriter::new(Vec::new(), major, SystemId(u64::MAX)).unwrap();
        writer.file(&entry(b"base/5/\"quoted\"\n")).unwrap();
        writer.file(&entry(b"latin\xE9")).unwrap();
        let range = WalRange { timeline: Timeline(3), start: Lsn(0x28), end: Lsn(0x1_0000_0100) };
        String::from_utf8(writer.finish(&[range]).unwrap()).unwrap()
    }

    #[test]
    fn a_manifest_is_json_with_every_field() {
        let text = manifest(17);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["System-Identifier"], u64::MAX);
        assert_eq!(json["Files"][0]["Path"], "base/5/\"quoted\"\n");
        assert_eq!(json["Files"][0]["Checksum"], "b73f4b36");
        assert_eq!(json["Files"][1]["Encoded-Path"], "6c6174696ee9");
        assert_eq!(json["Files"][1]["Last-Modified"], "2026-11-18 11:06:40 GMT");
        assert_eq!(json["WAL-Ranges"][0]["End-LSN"], "1/100");
        let old: serde_json::Value = serde_json::from_str(&manifest(16)).unwrap();
        assert_eq!(old["PostgreSQL-Backup-Manifest-Version"], 1);
        assert!(old.get("System-Identifier").is_none());
    }

    #[test]
    fn the_digest_covers_all_lines_but_its_own() {
        let text = manifest(18);
        let body = &text[..text.find("\"Manifest-Checksum\"").unwrap()];
        assert!(text.ends_with(&format!("\"Manifest-Checksum\": \"{}\"}}\n", hex::encode(Sha256::digest(body)))));
    }

    /// Writes the manifest of a backup anew, from what the files contain.
    fn rewrite(backup: &Path, major: u32, old: &serde_json::Value) {
        let system_id = old["System-Identifier"].as_u64().unwrap_or_default();
        let out = File::create(backup.join(FILE_NAME)).unwrap();
        let mut writer = ManifestWriter::new(out, major, SystemId(system_id)).unwrap();
        for file in old["Files"].as_array().unwrap() {
            let path = file["Path"].as_str().unwrap();
            let bytes = std::fs::read(backup.join(path)).unwrap();
            let (path, crc32c) = (path.as_bytes(), crc32c::crc32c(&bytes));
            let modified = DateTime::UNIX_EPOCH;
            writer.file(&FileEntry { path, size: bytes.len() as u64, modified, crc32c }).unwrap();
        }
        let ranges = old["WAL-Ranges"].as_array().unwrap().iter().map(|range| {
            let position = |key: &str| range[key].as_str().unwrap().parse().unwrap();
            let timeline = Timeline(u32::try_from(range["Timeline"].as_u64().unwrap()).unwrap());
            WalRange { timeline, start: position("Start-LSN"), end: position("End-LSN") }
        });
        writer.finish(&ranges.collect::<Vec<_>>()).unwrap();
    }

    #[test]
    fn pg_verifybackup_accepts_it_and_sees_a_flipped_bit() {
        block_on(async {
            for binaries in installed().await {
                let cluster = Cluster::create(&binaries, &[]).await;
                let instance = cluster.start(&[]).await;
                let host = cluster.directory.path().display().to_string();
                let arguments = ["-h", &host, "-U", "postgres", "-D", "backup", "-c", "fast", "--no-sync"];
                cluster.run("pg_basebackup", &arguments).await;
                cluster.stop(instance).await;
                let backup = cluster.path("backup");
                let old = std::fs::read(backup.join(FILE_NAME)).unwrap();
                rewrite(&backup, binaries.major, &serde_json::from_slice(&old).unwrap());
                let text = cluster.run("pg_verifybackup", &["backup"]).await;
                assert!(text.contains("successfully verified"), "{text}");

                let path = backup.join("PG_VERSION");
                let mut bytes = std::fs::read(&path).unwrap();
                bytes[0] ^= 1;
                File::options().write(true).open(&path).unwrap().write_all(&bytes).unwrap();
                let (succeeded, text) = cluster.try_run("pg_verifybackup", &["backup"]).await;
                assert!(!succeeded && text.contains("PG_VERSION"), "{text}");
            }
        });
    }
}
