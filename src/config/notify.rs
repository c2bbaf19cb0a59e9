//! `[grafana]` and `[notify]`: who is told, and of what.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::config::file::Section;
use crate::config::secret::{Secret, SecretText};
use crate::config::show;
use crate::model::{Error, Result};

/// How often a sign of life is given unless the configuration says otherwise.
const DEFAULT_EVERY: Duration = Duration::from_secs(60);

/// A URL, or where the URL is, if it is a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Url {
    /// The URL.
    Plain(String),
    /// Where it is.
    Secret(Secret),
}

impl Url {
    fn parse(text: &str, directory: &Path) -> Result<Self> {
        if text.starts_with("http://") || text.starts_with("https://") {
            return Ok(Self::Plain(text.to_owned()));
        }
        Secret::parse(text, directory).map(Self::Secret).map_err(|_| {
            Error::usage("it is neither a URL nor a reference to one")
                .hint("write https://…, or, because whoever knows it may use it, \"file:/path\" or \"env:VARIABLE\"")
        })
    }

    /// The URL.
    ///
    /// # Errors
    /// Its secret cannot be read.
    pub fn read(&self) -> Result<SecretText> {
        match self {
            Self::Plain(url) => Ok(SecretText::new(url.clone())),
            Self::Secret(secret) => secret.read(),
        }
    }

    /// The reference, if it is one.
    pub const fn secret(&self) -> Option<&Secret> {
        match self {
            Self::Plain(_) => None,
            Self::Secret(secret) => Some(secret),
        }
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(url) => f.write_str(url),
            Self::Secret(secret) => secret.fmt(f),
        }
    }
}

impl Serialize for Url {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `[grafana]`: where drills and restores are annotated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Grafana {
    /// Its root.
    pub url: Url,
    /// A service account's token that may write annotations.
    pub token: Secret,
    /// The dashboard to annotate; without it the whole organisation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dashboard_uid: Option<String>,
}

/// `[notify]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Notify {
    /// What is paged.
    pub on: BTreeSet<Occasion>,
    /// Where pages go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub webhook: Option<Webhook>,
    /// Who must hear from us, and how often.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_man: Option<DeadMan>,
}

impl Default for Notify {
    fn default() -> Self {
        Self { on: Occasion::ALL.into_iter().collect(), webhook: None, dead_man: None }
    }
}

/// What somebody may be woken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Occasion {
    /// A slot failed, took too long, was missed or interrupted.
    Runs,
    /// The same of a drill.
    Drills,
    /// WAL is missing.
    Gaps,
    /// The replication slot fills the server's disk.
    Slots,
    /// A region does not answer for long.
    Regions,
    /// The state directory cannot be written.
    State,
}

impl Occasion {
    const ALL: [Self; 6] = [Self::Runs, Self::Drills, Self::Gaps, Self::Slots, Self::Regions, Self::State];

    const fn word(self) -> &'static str {
        match self {
            Self::Runs => "runs",
            Self::Drills => "drills",
            Self::Gaps => "gaps",
            Self::Slots => "slots",
            Self::Regions => "regions",
            Self::State => "state",
        }
    }
}

/// `[notify.webhook]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Webhook {
    /// Its address.
    pub url: Url,
    /// What it understands.
    pub format: WebhookFormat,
}

/// What a webhook understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WebhookFormat {
    /// Every field under its own name.
    Generic,
    /// `{"text": …}`.
    Slack,
}

/// `[notify.dead_man]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeadMan {
    /// What is asked for.
    pub url: Url,
    /// How often.
    #[serde(serialize_with = "show::duration")]
    pub every: Duration,
}

pub(super) fn grafana(section: &Section<'_>, directory: &Path) -> Result<Option<Grafana>> {
    let url = section.converted("url", |text| Url::parse(text, directory))?;
    let token = section.secret("token")?;
    let dashboard_uid = section.string("dashboard_uid")?.map(str::to_owned);
    section.finish()?;
    if !section.is_present() {
        return Ok(None);
    }
    let (url, token) = (url.ok_or_else(|| section.missing("url"))?, token.ok_or_else(|| section.missing("token"))?);
    Ok(Some(Grafana { url, token, dashboard_uid }))
}

pub(super) fn notify(section: &Section<'_>, directory: &Path) -> Result<Notify> {
    let on = section.strings("on")?.into_iter().map(occasion).collect::<Result<BTreeSet<_>>>();
    let on = on.map_err(|error| section.wrong("on", &error))?;
    let webhook = webhook(&section.section("webhook")?, directory)?;
    let dead_man = dead_man(&section.section("dead_man")?, directory)?;
    section.finish()?;
    let on = if section.has("on") { on } else { Notify::default().on };
    Ok(Notify { on, webhook, dead_man })
}

fn occasion(text: &str) -> Result<Occasion> {
    Occasion::ALL.into_iter().find(|occasion| occasion.word() == text).ok_or_else(|| {
        let words = Occasion::ALL.map(Occasion::word).join(", ");
        Error::usage(format!("nobody is paged for `{text}`")).hint(format!("there are {words}"))
    })
}

fn webhook(section: &Section<'_>, directory: &Path) -> Result<Option<Webhook>> {
    let url = section.converted("url", |text| Url::parse(text, directory))?;
    let formats = [("generic", WebhookFormat::Generic), ("slack", WebhookFormat::Slack)];
    let format = section.choice("format", &formats)?.unwrap_or(WebhookFormat::Generic);
    section.finish()?;
    if !section.is_present() {
        return Ok(None);
    }
    Ok(Some(Webhook { url: url.ok_or_else(|| section.missing("url"))?, format }))
}

fn dead_man(section: &Section<'_>, directory: &Path) -> Result<Option<DeadMan>> {
    let url = section.converted("url", |text| Url::parse(text, directory))?;
    let every = section.interval("every")?.unwrap_or(DEFAULT_EVERY);
    section.finish()?;
    if !section.is_present() {
        return Ok(None);
    }
    Ok(Some(DeadMan { url: url.ok_or_else(|| section.missing("url"))?, every }))
}
