//! Pages to a webhook.

use async_trait::async_trait;
use serde_json::{Value, json};

use crate::notify::{Address, Client, Notice, Notifier, NotifyError, Page};

/// What the receiver understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Every field under its own name.
    Generic,
    /// `{"text": …}`, as Slack's incoming webhooks and many others take it.
    Slack,
}

/// A webhook.
#[derive(Debug)]
pub struct Webhook {
    client: Client,
    address: Address,
    style: Style,
}

impl Webhook {
    /// Pages go to `address`.
    pub const fn new(client: Client, address: Address, style: Style) -> Self {
        Self { client, address, style }
    }
}

fn body(style: Style, page: &Page) -> Value {
    let Page { problem, resolved, title, text, at, host } = page;
    let state = if *resolved { "resolved" } else { "firing" };
    match style {
        Style::Generic => json!({
            "version": 1, "source": "drctl", "problem": problem, "state": state,
            "title": title, "text": text, "at": at, "host": host,
        }),
        Style::Slack => {
            let word = if *resolved { "RESOLVED" } else { "PROBLEM" };
            let told = if text.is_empty() { String::new() } else { format!("\n{text}") };
            json!({ "text": escaped(&format!("{word} {title}{told}\n(drctl on {host}, {})", at.format("%Y-%m-%d %H:%M:%S UTC"))) })
        }
    }
}

/// Slack reads these three as markup; a server's words must not become a link or a mention.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[async_trait]
impl Notifier for Webhook {
    fn describe(&self) -> String {
        format!("webhook {}", self.address.host())
    }

    fn wants(&self, notice: &Notice) -> bool {
        matches!(notice, Notice::Page(_))
    }

    async fn tell(&self, notice: &Notice) -> Result<String, NotifyError> {
        match notice {
            Notice::Page(page) => self.client.post(&self.address, None, &body(self.style, page)).await,
            Notice::Span(_) => Ok("of no interest".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[test]
    fn slack_gets_one_text_without_markup_of_others() {
        let page = Page {
            problem: "schedule/ledger-base".into(),
            resolved: false,
            title: "ledger-base failed".into(),
            text: "<!channel> & more".into(),
            at: DateTime::UNIX_EPOCH,
            host: "db1".into(),
        };
        let told = body(Style::Slack, &page);
        assert_eq!(
            told,
            json!({"text": "PROBLEM ledger-base failed\n&lt;!channel&gt; &amp; more\n(drctl on db1, 1970-01-01 00:00:00 UTC)"})
        );
        let over = body(Style::Generic, &Page { resolved: true, ..page });
        assert_eq!((&over["state"], &over["problem"]), (&json!("resolved"), &json!("schedule/ledger-base")));
    }
}
