//! `report`: what earlier jobs found, read back from the regions.

use serde::Serialize;

use crate::jobs::context::Context;
use crate::model::{Error, Kind, ReportId, Result, TargetName};
use crate::repository::records::reports::{self, ReportBody, ReportHead};

pub mod outbox;
pub mod page;
pub mod place;

/// All reports.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// Newest first.
    pub reports: Vec<ReportHead>,
    /// Those that no region holds intact.
    pub unreadable: Vec<String>,
}

/// One report.
#[derive(Debug, Clone, Serialize)]
pub struct Shown {
    /// What everybody may read.
    pub head: ReportHead,
    /// What only holders of keys read; `null` without a key at hand.
    pub body: Option<ReportBody>,
    /// Why the body is closed.
    pub closed: Option<String>,
}

/// Lists the reports on `target`, or on every target.
///
/// # Errors
/// No region answers.
pub async fn list(context: &Context, target: Option<&TargetName>) -> Result<Listed> {
    // A report that waited for a region is told like any other.
    if let Err(error) = outbox::spread(context).await {
        tracing::info!(%error, "reports that wait here were not brought to the regions");
    }
    let (mut heads, errors) = reports::list(&context.repository, target).await?;
    heads.reverse();
    Ok(Listed { reports: heads, unreadable: errors.iter().map(ToString::to_string).collect() })
}

/// Shows the report with this id or beginning of one, the newest on a target, or the `latest` of all.
///
/// # Errors
/// There is none, or several begin so; no region holds it intact.
pub async fn show(context: &Context, what: &str) -> Result<Shown> {
    let heads = list(context, None).await?.reports;
    let id = select(&heads, what)?;
    match reports::read(&context.repository, &context.ring, &id).await {
        Ok((head, body)) => Ok(Shown { head, body: Some(body), closed: None }),
        Err(error) if matches!(error.kind(), Kind::NoKey | Kind::Unavailable) => {
            let head = heads.into_iter().find(|head| head.id == id);
            let head = head.ok_or_else(|| Error::not_found(format!("there is no report {id}")))?;
            Ok(Shown { head, body: None, closed: Some(error.to_string()) })
        }
        Err(error) => Err(error),
    }
}

/// `heads` are newest first.
fn select(heads: &[ReportHead], what: &str) -> Result<ReportId> {
    let newest = heads.iter().find(|head| what == "latest" || head.target.as_str() == what);
    if let Some(head) = newest {
        return Ok(head.id.clone());
    }
    let fitting: Vec<_> = heads.iter().filter(|head| head.id.as_str().starts_with(what)).collect();
    match fitting.as_slice() {
        [one] => Ok(one.id.clone()),
        [] => Err(Error::not_found(format!("there is no report `{what}`")).hint("drctl report list shows them")),
        several => {
            let names = several.iter().map(|head| head.id.as_str()).collect::<Vec<_>>().join(", ");
            Err(Error::usage(format!("several reports begin with `{what}`")).hint(names))
        }
    }
}
