//! Who is told: the receivers that the settings name.

use std::sync::Arc;

use crate::config::{Settings, Url, WebhookFormat};
use crate::model::{Error, Result, ResultExt};
use crate::notify::{Address, Client, DeadMan, Grafana, Notifier, Style, Webhook};

/// Everybody who is told of pages and of drills.
///
/// # Errors
/// An address is wrong, or its secret cannot be read.
pub fn notifiers(settings: &Settings) -> Result<Vec<Arc<dyn Notifier>>> {
    each(settings).into_iter().collect()
}

/// The same for work that must not wait for a secret to be mended: who cannot be told is left out, and that is logged.
pub fn willing_notifiers(settings: &Settings) -> Vec<Arc<dyn Notifier>> {
    let told = |error: &Error| tracing::error!(%error, "somebody will not be told; see: drctl notify test");
    each(settings).into_iter().filter_map(|notifier| notifier.inspect_err(told).ok()).collect()
}

fn each(settings: &Settings) -> Vec<Result<Arc<dyn Notifier>>> {
    let webhook = settings.notify.webhook.as_ref().map(|wanted| -> Result<Arc<dyn Notifier>> {
        let style = match wanted.format {
            WebhookFormat::Generic => Style::Generic,
            WebhookFormat::Slack => Style::Slack,
        };
        let address = address(&wanted.url).during(|| "[notify.webhook] url")?;
        Ok(Arc::new(Webhook::new(Client::new()?, address, style)))
    });
    let grafana = settings.grafana.as_ref().map(|wanted| -> Result<Arc<dyn Notifier>> {
        let address = address(&wanted.url).during(|| "[grafana] url")?;
        let token = wanted.token.read()?;
        Ok(Arc::new(Grafana::new(Client::new()?, &address, token.expose(), wanted.dashboard_uid.clone())?))
    });
    webhook.into_iter().chain(grafana).collect()
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
