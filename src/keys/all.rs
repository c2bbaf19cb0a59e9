//! All holders at once: wrapping for every one of them, and opening with whichever answers.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::time::timeout;

use super::{KeyError, KeyHolder, KeyOpener, Keyset, Wrap, WrapContext, age};
use crate::model::{Error, HolderId, KeysetId, Kind};

/// A KMS that answers does so in a fraction of this.
const HURRY: Duration = Duration::from_secs(2);

/// Wraps a keyset with every holder at the same time, each within `deadline`, and returns the outcomes in the order of
/// `holders`. Whether enough of them answered is the caller's to judge; a missing wrap is a debt.
pub async fn wrap_everywhere(
    holders: &[Arc<dyn KeyHolder>],
    keyset: &Keyset,
    deadline: Duration,
) -> Vec<(HolderId, Result<Wrap, KeyError>)> {
    let secret = keyset.to_secret();
    let wraps = holders.iter().map(async |holder| {
        let answer = timeout(deadline, holder.wrap(keyset.context(), &secret)).await;
        let answer = answer.unwrap_or_else(|_| Err(too_slow(holder.describe(), deadline)));
        (holder.id().clone(), answer)
    });
    join_all(wraps).await
}

fn too_slow(holder: String, deadline: Duration) -> KeyError {
    KeyError::Unavailable { holder, reason: format!("no answer within {deadline:?}") }
}

/// An opened keyset.
#[derive(Debug)]
pub struct Opened {
    /// The keyset; without `data` if only a wrap for `meta` could be opened.
    pub keyset: Keyset,
    /// The holder whose wrap opened.
    pub opened_by: HolderId,
    /// What was tried before, in vain.
    pub refusals: Vec<Refusal>,
}

/// A wrap that did not open.
#[derive(Debug)]
pub struct Refusal {
    /// Whose wrap.
    pub holder: HolderId,
    /// Why not.
    pub error: KeyError,
}

/// No wrap of a keyset could be opened.
#[derive(Debug, thiserror::Error)]
#[error("nothing at hand opens keyset {keyset} of {target}", keyset = .context.keyset, target = .context.target)]
pub struct NotOpened {
    /// Which keyset.
    pub context: WrapContext,
    /// Every wrap there is, and why it did not open.
    pub refusals: Vec<Refusal>,
}

impl NotOpened {
    /// The keyset.
    pub const fn keyset(&self) -> &KeysetId {
        &self.context.keyset
    }

    /// Whether a holder may answer later.
    pub fn is_transient(&self) -> bool {
        self.refusals.iter().any(|refusal| refusal.error.is_transient())
    }
}

impl From<NotOpened> for Error {
    fn from(error: NotOpened) -> Self {
        let transient = error.is_transient();
        let kind = if transient { Kind::Unavailable } else { Kind::NoKey };
        let public = Self::new(kind, error.to_string()).transient(transient);
        if error.refusals.is_empty() {
            return public.because("no wrap of it was found");
        }
        error.refusals.iter().fold(public, |public, refusal| public.because(&refusal.error))
    }
}

/// Opens a keyset with the first wrap that opens, holders that answer by themselves before offline ones, each within
/// `deadline`. One that takes its time is not waited for alone: the next is asked beside it. A wrap that holds `meta` alone is
/// taken only if none gives the whole keyset.
///
/// # Errors
/// [`NotOpened`], with a reason for every wrap.
pub async fn open_any(
    openers: &[Arc<dyn KeyOpener>],
    context: &WrapContext,
    wraps: &[Wrap],
    deadline: Duration,
) -> Result<Opened, NotOpened> {
    let mut wraps: Vec<&Wrap> = wraps.iter().collect();
    wraps.sort_by_key(|wrap| wrap.kind == age::KIND);
    let mut refusals = Vec::new();
    let mut attempts = Vec::new();
    for wrap in wraps {
        let fitting = openers.iter().filter(|opener| opener.fits(wrap));
        let before = attempts.len();
        attempts.extend(
            fitting
                .map(|opener| async move { (&wrap.holder, open_one(opener.as_ref(), context, wrap, deadline).await) }),
        );
        if attempts.len() == before {
            let reason = format!("no identity or access at hand fits {} ({})", wrap.key, wrap.holder);
            refusals.push(Refusal { holder: wrap.holder.clone(), error: KeyError::Invalid { reason } });
        }
    }
    let (mut attempts, mut running) = (attempts.into_iter(), FuturesUnordered::new());
    let mut meta_only = None;
    loop {
        running.extend(attempts.next());
        let patience = if attempts.len() == 0 { deadline } else { HURRY };
        match timeout(patience, running.next()).await {
            Ok(Some((holder, Ok(keyset)))) if keyset.data().is_some() => {
                return Ok(Opened { keyset, opened_by: holder.clone(), refusals });
            }
            Ok(Some((holder, Ok(keyset)))) => meta_only = meta_only.or(Some((keyset, holder.clone()))),
            Ok(Some((holder, Err(error)))) => refusals.push(Refusal { holder: holder.clone(), error }),
            Ok(None) => break,
            Err(_) => {}
        }
    }
    match meta_only {
        Some((keyset, opened_by)) => Ok(Opened { keyset, opened_by, refusals }),
        None => Err(NotOpened { context: context.clone(), refusals }),
    }
}

async fn open_one(
    opener: &dyn KeyOpener,
    context: &WrapContext,
    wrap: &Wrap,
    deadline: Duration,
) -> Result<Keyset, KeyError> {
    let secret = timeout(deadline, opener.open(context, wrap))
        .await
        .unwrap_or_else(|_| Err(too_slow(opener.describe(), deadline)))?;
    Keyset::from_secret(context, &secret).map_err(|error| wrap.wrong(error.to_string()))
}
