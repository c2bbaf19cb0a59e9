//! What stands around the cluster: its configuration, wherever it lives.

use crate::jobs::context::Target;
use crate::model::{Error, Result};
use crate::pg::sql;
use crate::repository::backup::writer::BackupWriter;
use crate::repository::pages::manifest::Line;
use crate::source::postgres::capture::{self, CaptureOptions, Captured};

/// The name of the document in the manifest.
pub const CONFIGURATION: &str = "configuration";

/// Reads the configuration. A failure costs the document, not the backup: it is reported, and the data is safe.
pub(super) async fn capture(target: &Target, method: &str) -> Result<Captured> {
    let client = sql::connect(&target.conninfo.primary().with_application_name("drctl backup")).await?;
    let options = CaptureOptions { local: method == "local", extra: target.config_files.clone() };
    Ok(capture::capture(&client, &options).await?)
}

/// Stores what was captured; returns what was not.
pub(super) async fn store(backup: &mut BackupWriter, captured: Result<Captured>) -> Result<Vec<String>> {
    let captured = match captured {
        Ok(captured) => captured,
        Err(error) => return Ok(vec![format!("the configuration: {error}")]),
    };
    let missing = captured.missing.iter().map(|missing| format!("{}; fix: {}", missing.what, missing.grant)).collect();
    let content =
        serde_json::to_value(&captured).map_err(|error| Error::failed("encode the configuration").because(error))?;
    backup.line(&Line::Document { name: CONFIGURATION.to_owned(), content }).await?;
    Ok(missing)
}
