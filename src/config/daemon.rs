//! `[daemon]`: where a running daemon answers beside its own socket, and whom.

use std::net::SocketAddr;

use serde::Serialize;

use crate::config::file::Section;
use crate::config::secret::Secret;
use crate::model::{Error, Result};

/// `[daemon]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Daemon {
    /// The TCP address for probes and Prometheus; `None` = none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// The token that opens the API over TCP; without one there is no such API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<Secret>,
    /// Accounts that may use the sockets beside the daemon's own and root.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
}

pub(super) fn daemon(section: &Section<'_>) -> Result<Daemon> {
    let listen = section.converted("listen", |text| {
        let wrong = |_| {
            Error::usage(format!("`{text}` is not an address with a port"))
                .hint("write an IP address, as in 127.0.0.1:9841 or [::1]:9841")
        };
        text.parse().map_err(wrong)
    })?;
    let token = section.secret("token")?;
    let allow = section.strings("allow")?.into_iter().map(str::to_owned).collect();
    section.finish()?;
    Ok(Daemon { listen, token, allow })
}
