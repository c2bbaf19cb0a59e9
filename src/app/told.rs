//! Who is told: the receivers that the settings name.

use std::sync::Arc;

use crate::config::{Settings, Url, WebhookFormat};
use crate::model::{Result, ResultExt};
use crate::notify::{Address, Client, DeadMan, Grafana, Notifier, Style, Webhook};

/// Everybody who is told of pages and of drills.
///
/// # Errors
/// An address is wrong, or its secret cannot be read.
pub fn notifiers(settings: &Settings) -> Result<Vec<Arc<dyn Notifier>>> {
    let mut list: Vec<Arc<dyn Notifier>> = Vec::new();
    let (webhook, grafana) = (settings.notify.webhook.as_ref(), settings.grafana.as_ref());
    if webhook.is_none() && grafana.is_none() {
        return Ok(list);
    }
    let client = Client::new()?;
    if let Some(webhook) = webhook {
        let style = match webhook.format {
            WebhookFormat::Generic => Style::Generic,
            WebhookFormat::Slack => Style::Slack,
        };
        let address = address(&webhook.url).during(|| "[notify.webhook] url")?;
        list.push(Arc::new(Webhook::new(client.clone(), address, style)));
    }
    if let Some(grafana) = grafana {
        let address = address(&grafana.url).during(|| "[grafana] url")?;
        let token = grafana.token.read()?;
        list.push(Arc::new(Grafana::new(client, &address, token.expose(), grafana.dashboard_uid.clone())?));
    }
    Ok(list)
}

fn address(url: &Url) -> Result<Address> {
    Ok(Address::parse(url.read()?.expose())?)
}

/// The sign of life, if one is wanted.
///
/// # Errors
/// As [`notifiers`].
pub fn dead_man(settings: &Settings) -> Result<Option<DeadMan>> {
    let Some(wanted) = &settings.notify.dead_man else { return Ok(None) };
    let address = address(&wanted.url).during(|| "[notify.dead_man] url")?;
    Ok(Some(DeadMan::new(Client::new()?, address)))
}
