//! Floor 1b, what is told to people and their tools outside: pages to a webhook, annotations to Grafana, a sign of life.
//!
//! Nothing here is evidence: reports in the regions are. Whatever a receiver does, no job waits for it and none fails for
//! it. Addresses may be secrets, so errors name the host alone.

use std::fmt;

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use crate::model::{Error, Kind};

pub mod courier;
pub mod dead_man;
pub mod grafana;
pub mod http;
pub mod webhook;

pub use courier::Courier;
pub use dead_man::DeadMan;
pub use grafana::Grafana;
pub use http::{Address, Client};
pub use webhook::{Style, Webhook};

/// Something to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A problem that somebody must look at, or its end.
    Page(Page),
    /// Something that went on for a time, to be drawn beside what was measured then.
    Span(Span),
}

/// A problem, once when it begins and once when it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The same for the same problem: `schedule/ledger-base`, `region/eu-west-1`.
    pub problem: String,
    /// Whether it is over.
    pub resolved: bool,
    /// One line.
    pub title: String,
    /// What is known of it.
    pub text: String,
    /// Since when, or when it ended.
    pub at: DateTime<Utc>,
    /// Who tells.
    pub host: String,
}

/// A drill or a restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// When it began.
    pub began: DateTime<Utc>,
    /// When it ended.
    pub ended: DateTime<Utc>,
    /// Words to find it by.
    pub tags: Vec<String>,
    /// One line.
    pub text: String,
}

/// A receiver of notices.
///
/// # Contract
/// - One call is one attempt, bounded in time. It does not repeat: the [`Courier`] does.
/// - A notice may arrive twice, if an answer was lost.
#[async_trait]
pub trait Notifier: Send + Sync + fmt::Debug {
    /// Where it goes, without anything secret.
    fn describe(&self) -> String;

    /// Whether it has any use for the notice.
    fn wants(&self, notice: &Notice) -> bool;

    /// Tells it, and says what answered.
    ///
    /// # Errors
    /// Nobody took it.
    async fn tell(&self, notice: &Notice) -> Result<String, NotifyError>;
}

/// What went wrong, by meaning.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotifyError {
    /// No answer, or one that asks to come again.
    #[error("{host} does not take it: {reason}")]
    Unavailable {
        /// Who.
        host: String,
        /// What happened.
        reason: String,
    },
    /// An answer that will be the same tomorrow.
    #[error("{host} refuses it: {reason}")]
    Refused {
        /// Who.
        host: String,
        /// Its words.
        reason: String,
    },
    /// The address or the machine is not fit for it.
    #[error("{reason}")]
    Invalid {
        /// What is wrong.
        reason: String,
    },
}

impl NotifyError {
    /// Whether the same call may succeed later.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

impl From<NotifyError> for Error {
    fn from(error: NotifyError) -> Self {
        let kind = match &error {
            NotifyError::Unavailable { .. } => Kind::Unavailable,
            NotifyError::Refused { .. } => Kind::Failed,
            NotifyError::Invalid { .. } => Kind::Usage,
        };
        Self::new(kind, error.to_string()).transient(error.is_transient())
    }
}
