//! Annotations through Grafana's HTTP API.
//!
//! `POST /api/annotations` with a token that has `annotations:write`: a region (time and timeEnd, in milliseconds) with
//! tags, on one dashboard if its UID is given, else for the whole organisation, where dashboards find it by its tags.

use async_trait::async_trait;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::notify::{Address, Client, Notice, Notifier, NotifyError, Span};

/// A Grafana.
pub struct Grafana {
    client: Client,
    address: Address,
    token: Zeroizing<String>,
    dashboard: Option<String>,
}

impl Grafana {
    /// Annotations go to the Grafana at `address`, its root.
    ///
    /// # Errors
    /// The address is not one.
    pub fn new(client: Client, address: &Address, token: &str, dashboard: Option<String>) -> Result<Self, NotifyError> {
        let address = address.join("/api/annotations")?;
        Ok(Self { client, address, token: Zeroizing::new(token.to_owned()), dashboard })
    }

    fn body(&self, span: &Span) -> Value {
        let mut body = json!({
            "time": span.began.timestamp_millis(),
            "timeEnd": span.ended.timestamp_millis(),
            "tags": span.tags,
            "text": span.text,
        });
        if let (Some(uid), Some(fields)) = (&self.dashboard, body.as_object_mut()) {
            fields.insert("dashboardUID".to_owned(), json!(uid));
        }
        body
    }
}

impl std::fmt::Debug for Grafana {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Grafana({:?})", self.address)
    }
}

#[async_trait]
impl Notifier for Grafana {
    fn describe(&self) -> String {
        format!("Grafana {}", self.address.host())
    }

    fn wants(&self, notice: &Notice) -> bool {
        matches!(notice, Notice::Span(_))
    }

    async fn tell(&self, notice: &Notice) -> Result<String, NotifyError> {
        match notice {
            Notice::Span(span) => self.client.post(&self.address, Some(&self.token), &self.body(span)).await,
            Notice::Page(_) => Ok("of no interest".to_owned()),
        }
    }
}
