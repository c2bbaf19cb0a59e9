//! `BASE_BACKUP`. From PostgreSQL 15 on there is one copy with all archives and the manifest in it; before, one copy for
//! each archive in the order of the list of tablespaces, and one for the manifest.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};
use postgres_protocol::message::backend::Message;

use crate::model::{Lsn, Timeline};
use crate::pg::PgError;
use crate::pg::replication::client::{MAX_ROWS, ReplicationClient};
use crate::pg::replication::rows::Row;
use crate::pg::replication::wire::{report, server_error, unexpected};

const FIRST_WITH_NAMES: u32 = 150_000;

/// What to ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// Written into backup_label and shown by the server: one line, at most 1,024 bytes.
    pub label: String,
    /// Checkpoint at once instead of spread over `checkpoint_timeout`.
    pub fast: bool,
    /// kB/s, from 32 to 1,048,576.
    pub max_rate: Option<u32>,
    /// Send a backup_manifest.
    pub manifest: bool,
    /// Let the server verify page checksums; a wrong one fails the backup after its end.
    pub verify_checksums: bool,
}

/// A tablespace of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceRow {
    /// `None` is the data directory itself, which comes last.
    pub oid: Option<u32>,
    /// Where it is on the server; `None` for the data directory.
    pub location: Option<String>,
    /// An estimate.
    pub size_kib: Option<u64>,
}

/// What arrives during a base backup, in this order: `Start`, then archives with their `Data`, then perhaps the manifest
/// with its `Data`, then `End`; `Progress` and `Notice` anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseBackupEvent {
    /// The server is in backup mode.
    Start {
        /// Where replay begins.
        lsn: Lsn,
        /// The timeline of that position.
        timeline: Timeline,
        /// All tablespaces.
        tablespaces: Vec<TablespaceRow>,
    },
    /// A tar archive begins and the one before ends.
    Archive {
        /// As `base.tar` or `16384.tar`.
        name: String,
        /// Of the tablespace; `None` for the data directory.
        location: Option<String>,
    },
    /// Bytes of the current archive or of the manifest; never empty.
    Data(Bytes),
    /// What follows is the backup_manifest.
    ManifestBegin,
    /// Bytes read so far, by the server's count.
    Progress(u64),
    /// A warning, as of a page with a wrong checksum.
    Notice(String),
    /// All bytes were sent. The backup is not good before the stream has ended too.
    End {
        /// The backup is consistent once replay reached this position.
        lsn: Lsn,
        /// The timeline at the end.
        timeline: Timeline,
    },
}

/// A base backup in progress. [`Self::next`] is cancel-safe.
#[derive(Debug)]
pub struct BaseBackupStream {
    client: ReplicationClient,
    phase: Phase,
    /// Whether copies have no names; and whether the last one is a manifest.
    copies: Option<bool>,
    /// What the message that was read last says beside its first event.
    queued: Option<BaseBackupEvent>,
}

#[derive(Debug)]
enum Phase {
    /// Two result sets: the start position, the tablespaces.
    Before {
        sets: u8,
        start: Option<(Lsn, Timeline)>,
        tablespaces: Vec<TablespaceRow>,
    },
    /// Copies that have no names: those that are still to come.
    Copies {
        left: VecDeque<BaseBackupEvent>,
        open: bool,
    },
    /// Whether an archive or the manifest has begun.
    Copy {
        begun: bool,
    },
    /// One result set: the end position.
    After {
        ended: bool,
    },
    Done,
    Failed,
}

impl ReplicationClient {
    /// Starts a base backup. The base archive holds links to the tablespaces rather than `tablespace_map`: with the map
    /// the server leaves out everything in `pg_tblspc`, and before PostgreSQL 16 in-place tablespaces are nowhere else.
    /// The server does not wait for its own archiving of the WAL, which the caller must secure.
    ///
    /// # Errors
    /// [`PgError::Config`] for options out of range. What the server has against it comes from
    /// [`BaseBackupStream::next`].
    pub async fn base_backup(mut self, options: BaseBackupOptions) -> Result<BaseBackupStream, PgError> {
        let nameless = self.server_version < FIRST_WITH_NAMES;
        self.send(&command(&options, nameless)?).await?;
        let phase = Phase::Before { sets: 0, start: None, tablespaces: Vec::new() };
        Ok(BaseBackupStream { client: self, phase, copies: nameless.then_some(options.manifest), queued: None })
    }
}

impl BaseBackupStream {
    /// Waits for the next event; `None` is the end, and only then the backup is good.
    ///
    /// # Errors
    /// Of the server or the connection. SQLSTATE XX001 after [`BaseBackupEvent::End`] means that all bytes have arrived
    /// and the notices before have named pages with wrong checksums.
    pub async fn next(&mut self) -> Result<Option<BaseBackupEvent>, PgError> {
        if let Some(event) = self.queued.take() {
            return Ok(Some(event));
        }
        loop {
            let step = match self.phase {
                Phase::Done => return Ok(None),
                Phase::Failed => return Err(PgError::Closed("the backup failed before".to_owned())),
                _ => match self.client.wire.message().await {
                    Ok(message) => self.step(message),
                    Err(error) => Err(error),
                },
            };
            match step {
                Ok(Some(event)) => return Ok(Some(event)),
                Ok(None) => {}
                Err(error) => {
                    self.phase = Phase::Failed;
                    return Err(error);
                }
            }
        }
    }

    /// Gives the connection back after the end.
    ///
    /// # Errors
    /// [`Self::next`] has not returned `None` yet.
    pub fn finish(self) -> Result<ReplicationClient, PgError> {
        match self.phase {
            Phase::Done => Ok(self.client),
            _ => Err(PgError::Closed("the backup has not ended".to_owned())),
        }
    }

    fn step(&mut self, message: Message) -> Result<Option<BaseBackupEvent>, PgError> {
        match (&mut self.phase, message) {
            (_, Message::ErrorResponse(body)) => Err(server_error(body.fields())),
            (_, Message::NoticeResponse(body)) => {
                let notice = report(body.fields())?;
                let text = notice.detail.map_or(notice.message.clone(), |more| format!("{} ({more})", notice.message));
                Ok(Some(BaseBackupEvent::Notice(text)))
            }
            (_, Message::ParameterStatus(_) | Message::CommandComplete(_)) => Ok(None),
            (Phase::Before { sets, .. }, Message::RowDescription(_)) => {
                *sets = sets.saturating_add(1);
                Ok(None)
            }
            (Phase::Before { sets: 1, start: start @ None, .. }, Message::DataRow(body)) => {
                *start = Some(Row::read(&body)?.position()?);
                Ok(None)
            }
            (Phase::Before { sets: 2, tablespaces, .. }, Message::DataRow(body)) if tablespaces.len() < MAX_ROWS => {
                tablespaces.push(tablespace(&Row::read(&body)?)?);
                Ok(None)
            }
            (Phase::Before { sets: 2, start: Some((lsn, timeline)), tablespaces }, Message::CopyOutResponse(_)) => {
                let (lsn, timeline, tablespaces) = (*lsn, *timeline, std::mem::take(tablespaces));
                self.phase = Phase::Copy { begun: false };
                if let Some(manifest) = self.copies {
                    let mut left = copies(&tablespaces, manifest);
                    self.queued = left.pop_front();
                    self.phase = Phase::Copies { left, open: true };
                }
                Ok(Some(BaseBackupEvent::Start { lsn, timeline, tablespaces }))
            }
            (Phase::Copies { open: true, .. }, Message::CopyData(body)) => {
                let data = body.into_bytes();
                Ok((!data.is_empty()).then_some(BaseBackupEvent::Data(data)))
            }
            (Phase::Copies { open: open @ true, .. }, Message::CopyDone) => {
                *open = false;
                Ok(None)
            }
            (Phase::Copies { left, open: open @ false }, Message::CopyOutResponse(_)) if !left.is_empty() => {
                *open = true;
                Ok(left.pop_front())
            }
            (Phase::Copies { left, open: false }, Message::RowDescription(_)) if left.is_empty() => {
                self.phase = Phase::After { ended: false };
                Ok(None)
            }
            (Phase::Copy { begun }, Message::CopyData(body)) => copy_event(body.into_bytes(), begun),
            (Phase::Copy { begun: true }, Message::CopyDone) => {
                self.phase = Phase::After { ended: false };
                Ok(None)
            }
            (Phase::After { ended: false }, Message::RowDescription(_)) => Ok(None),
            (Phase::After { ended: ended @ false }, Message::DataRow(body)) => {
                let (lsn, timeline) = Row::read(&body)?.position()?;
                *ended = true;
                Ok(Some(BaseBackupEvent::End { lsn, timeline }))
            }
            (Phase::After { ended: true }, Message::ReadyForQuery(_)) => {
                self.phase = Phase::Done;
                self.client.busy = false;
                Ok(None)
            }
            (_, other) => Err(unexpected(&other, "the next part of the backup")),
        }
    }
}

/// What the copies are, where they do not say it themselves.
fn copies(tablespaces: &[TablespaceRow], manifest: bool) -> VecDeque<BaseBackupEvent> {
    let archive = |row: &TablespaceRow| BaseBackupEvent::Archive {
        name: row.oid.map_or_else(|| "base.tar".to_owned(), |oid| format!("{oid}.tar")),
        location: row.location.clone(),
    };
    tablespaces.iter().map(archive).chain(manifest.then_some(BaseBackupEvent::ManifestBegin)).collect()
}

fn tablespace(row: &Row) -> Result<TablespaceRow, PgError> {
    let oid = row.optional(0)?.map(|_| row.value(0)).transpose()?;
    let size_kib = row.optional(2)?.map(|_| row.value(2)).transpose()?;
    Ok(TablespaceRow { oid, location: row.optional(1)?.map(str::to_owned), size_kib })
}

/// Reads one CopyData; `begun` turns true at the first archive.
fn copy_event(mut payload: Bytes, begun: &mut bool) -> Result<Option<BaseBackupEvent>, PgError> {
    let wrong = |what: &str| PgError::Protocol(format!("base backup: {what}"));
    if payload.is_empty() {
        return Ok(None);
    }
    match payload.get_u8() {
        b'n' => {
            let name = cstr(&mut payload).ok_or_else(|| wrong("malformed archive name"))?;
            let location = cstr(&mut payload).ok_or_else(|| wrong("malformed archive location"))?;
            if name.is_empty() || !payload.is_empty() {
                return Err(wrong("malformed archive header"));
            }
            *begun = true;
            Ok(Some(BaseBackupEvent::Archive { name, location: Some(location).filter(|path| !path.is_empty()) }))
        }
        b'm' if payload.is_empty() && *begun => Ok(Some(BaseBackupEvent::ManifestBegin)),
        b'd' if *begun => Ok((!payload.is_empty()).then_some(BaseBackupEvent::Data(payload))),
        b'p' => {
            let bytes = payload.try_get_i64().ok().filter(|_| payload.is_empty());
            let bytes = bytes.and_then(|bytes| u64::try_from(bytes).ok());
            bytes.map(|bytes| Some(BaseBackupEvent::Progress(bytes))).ok_or_else(|| wrong("malformed progress"))
        }
        tag => Err(wrong(&format!("unexpected message {:?}", char::from(tag)))),
    }
}

fn cstr(payload: &mut Bytes) -> Option<String> {
    let end = payload.iter().position(|byte| *byte == 0)?;
    let text = payload.split_to(end);
    payload.advance(1);
    String::from_utf8(text.to_vec()).ok()
}

fn command(options: &BaseBackupOptions, nameless: bool) -> Result<String, PgError> {
    let label = &options.label;
    // A line break would forge lines of backup_label, which decides where replay starts.
    if label.is_empty() || label.len() > 1024 || label.chars().any(char::is_control) {
        return Err(PgError::Config("backup label: expected one line of 1 to 1024 bytes".to_owned()));
    }
    if let Some(rate) = options.max_rate.filter(|rate| !(32..=1_048_576).contains(rate)) {
        return Err(PgError::Config(format!("max rate {rate} kB/s: expected 32 to 1048576")));
    }
    let label = format!("LABEL '{}'", label.replace('\'', "''"));
    if nameless {
        return Ok(command_without_parentheses(options, label));
    }
    let mut words = vec![
        label,
        format!("CHECKPOINT '{}'", if options.fast { "fast" } else { "spread" }),
        format!("MANIFEST '{}'", if options.manifest { "yes" } else { "no" }),
        format!("VERIFY_CHECKSUMS {}", u8::from(options.verify_checksums)),
        "PROGRESS 1".to_owned(),
        "WAIT 0".to_owned(),
    ];
    words.extend(options.max_rate.map(|rate| format!("MAX_RATE {rate}")));
    Ok(format!("BASE_BACKUP ({})", words.join(", ")))
}

/// The grammar of 13 and 14, which checks pages unless told not to, and waits for the archiver unless told not to.
fn command_without_parentheses(options: &BaseBackupOptions, label: String) -> String {
    let mut words = vec!["BASE_BACKUP".to_owned(), label, "PROGRESS".to_owned()];
    words.extend(options.fast.then(|| "FAST".to_owned()));
    words.push("NOWAIT".to_owned());
    words.extend(options.max_rate.map(|rate| format!("MAX_RATE {rate}")));
    words.extend((!options.verify_checksums).then(|| "NOVERIFY_CHECKSUMS".to_owned()));
    words.push(format!("MANIFEST '{}'", if options.manifest { "yes" } else { "no" }));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, proptest};

    use super::*;

    fn options(label: &str, max_rate: Option<u32>) -> BaseBackupOptions {
        BaseBackupOptions { label: label.to_owned(), fast: true, max_rate, manifest: true, verify_checksums: false }
    }

    #[test]
    fn the_command_is_quoted_and_bounded() {
        assert_eq!(
            command(&options("it's", Some(32)), false).unwrap(),
            "BASE_BACKUP (LABEL 'it''s', CHECKPOINT 'fast', MANIFEST 'yes', VERIFY_CHECKSUMS 0, PROGRESS 1, \
             WAIT 0, MAX_RATE 32)"
        );
        for (label, rate) in [("", None), ("a\nSTART", None), ("a", Some(31)), ("a", Some(1_048_577))] {
            for nameless in [true, false] {
                assert!(command(&options(label, rate), nameless).is_err(), "{label:?} {rate:?}");
            }
        }
        assert_eq!(
            command(&options("it's", Some(32)), true).unwrap(),
            "BASE_BACKUP LABEL 'it''s' PROGRESS FAST NOWAIT MAX_RATE 32 NOVERIFY_CHECKSUMS MANIFEST 'yes'"
        );
    }

    #[test]
    fn copies_without_names_are_the_tablespaces_in_their_order() {
        let space = TablespaceRow { oid: Some(7), location: Some("/x".to_owned()), size_kib: None };
        let base = TablespaceRow { oid: None, location: None, size_kib: None };
        let archive = |name: &str, location: Option<&str>| BaseBackupEvent::Archive {
            name: name.to_owned(),
            location: location.map(str::to_owned),
        };
        let both = [archive("7.tar", Some("/x")), archive("base.tar", None)];
        assert_eq!(copies(&[space.clone(), base.clone()], false), both);
        assert_eq!(copies(&[space, base], true).back(), Some(&BaseBackupEvent::ManifestBegin));
    }

    #[test]
    fn copy_messages_are_read_in_order_only() {
        let mut begun = false;
        let mut read = |bytes: &'static [u8]| copy_event(Bytes::from_static(bytes), &mut begun);
        assert!(read(b"dabc").is_err() && read(b"m").is_err(), "data belongs to an archive");
        let archive = |name: &str, location: Option<&str>| BaseBackupEvent::Archive {
            name: name.to_owned(),
            location: location.map(str::to_owned),
        };
        assert_eq!(read(b"nbase.tar\0\0").unwrap(), Some(archive("base.tar", None)));
        assert_eq!(read(b"n1.tar\0/x\0").unwrap(), Some(archive("1.tar", Some("/x"))));
        assert_eq!(read(b"dabc").unwrap(), Some(BaseBackupEvent::Data(Bytes::from_static(b"abc"))));
        assert_eq!(read(b"").unwrap(), None);
        assert_eq!(read(b"d").unwrap(), None);
        assert_eq!(read(b"p\0\0\0\0\0\0\x01\0").unwrap(), Some(BaseBackupEvent::Progress(256)));
        assert_eq!(read(b"m").unwrap(), Some(BaseBackupEvent::ManifestBegin));
        for wrong in [&b"n"[..], b"nx", b"nx\0y", b"nx\0y\0z", b"p\0", b"p\xff\0\0\0\0\0\0\0", b"mx", b"q"] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_data_directory_is_the_row_without_an_oid() {
        let row = Row::of(&[None, None, Some("23")]);
        assert_eq!(tablespace(&row).unwrap(), TablespaceRow { oid: None, location: None, size_kib: Some(23) });
        assert!(tablespace(&Row::of(&[Some("x"), None, None])).is_err());
    }

    proptest! {
        #[test]
        fn no_payload_panics(bytes in vec(0u8.., 0..40), tag in "[nmdp]", begun: bool) {
            let _ = copy_event(Bytes::from([tag.as_bytes(), &bytes].concat()), &mut begun.clone());
        }
    }
}
