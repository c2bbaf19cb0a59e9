//! Asking a daemon of this host for a WAL file, so that whoever asks needs no key and no region.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde::{Deserialize, Serialize};

use crate::disk::place::Draft;
use crate::jobs::socket::{self, understand};
use crate::jobs::wal::fetch::asker::{Asker, Fetched};
use crate::model::{Error, Kind, Result, ResultExt};
use crate::repository::layout;

/// Regions that hang are waited for by the daemon; PostgreSQL asks again when this is over.
const PATIENCE: Duration = Duration::from_secs(240);

/// An [`Asker`] in a URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Words {
    system: String,
    size: u64,
    /// `<timeline>-<branch>`, with commas between them.
    #[serde(default)]
    own: String,
}

impl From<&Asker> for Words {
    fn from(Asker { system_id, segment_size, own }: &Asker) -> Self {
        let own = own.iter().map(|(timeline, branch)| format!("{:08x}-{branch}", timeline.0)).collect::<Vec<_>>();
        Self { system: system_id.to_string(), size: *segment_size, own: own.join(",") }
    }
}

impl TryFrom<Words> for Asker {
    type Error = Error;

    fn try_from(Words { system, size, own }: Words) -> Result<Self> {
        let strange = || Error::usage("which cluster asks is not readable");
        let own =
            own.split(',').filter(|part| !part.is_empty()).map(|part| layout::parse_branch(part).ok_or_else(strange));
        Ok(Self { system_id: system.parse()?, segment_size: size, own: own.collect::<Result<BTreeMap<_, _>>>()? })
    }
}

/// Asks the daemon at `socket`; `None` = nobody there gives WAL to this account.
///
/// # Errors
/// The daemon is in doubt, or its answer breaks off.
pub async fn borrow(socket: &Path, asker: &Asker, (file, path): (&str, &Path)) -> Result<Option<Fetched>> {
    let asked = tokio::time::timeout(PATIENCE, ask(socket, asker, (file, path))).await;
    let hangs = || Error::new(Kind::Unavailable, "no answer in time").transient(true);
    asked.unwrap_or_else(|_| Err(hangs())).during(|| format!("ask {} for {file}", socket.display()))
}

async fn ask(socket: &Path, asker: &Asker, (file, path): (&str, &Path)) -> Result<Option<Fetched>> {
    let plain = file.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.');
    if !plain {
        return Err(Error::usage(format!("`{file}` is no WAL file")));
    }
    let Words { system, size, own } = Words::from(asker);
    let request = Request::get(format!("/v1/wal/-/files/{file}?system={system}&size={size}&own={own}"));
    let request = request.body(Body::empty()).map_err(|error| Error::failed("not a request").because(error))?;
    let mut draft = Draft::begin(path, 0o600)?;
    let mut length = 0;
    let mut sink = |bytes: &[u8]| {
        length += bytes.len() as u64;
        Ok(draft.write(bytes)?)
    };
    let answer = socket::download(socket, request, &mut sink).await?;
    match answer {
        None => Ok(None),
        Some((StatusCode::OK, _)) if file.len() == SEGMENT_NAME && length != asker.segment_size => {
            Err(Error::failed(format!("{length} bytes came of a segment of {}", asker.segment_size)))
        }
        Some((StatusCode::OK, _)) => {
            draft.place()?;
            Ok(Some(Fetched::Copied))
        }
        Some((StatusCode::NO_CONTENT, _)) => Ok(Some(Fetched::Absent)),
        // It does not know the question, or not this account.
        Some((StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::FORBIDDEN, _)) => Ok(None),
        Some(other) => {
            Err(understand::<()>(other).err().unwrap_or_else(|| Error::failed("the answer is not understood")))
        }
    }
}

/// Digits of a segment's name.
const SEGMENT_NAME: usize = 24;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Branch, SystemId, Timeline};

    #[test]
    fn who_asks_is_read_back() {
        let own = [2, 3].map(|number: u8| (Timeline(number.into()), Branch::from_history_digest(&[number; 32])));
        for own in [BTreeMap::new(), BTreeMap::from(own)] {
            let asker = Asker { system_id: SystemId(7), segment_size: 1 << 20, own };
            assert_eq!(Asker::try_from(Words::from(&asker)).unwrap(), asker);
        }
    }
}
