//! `[daemon]`: where a running daemon answers beside its own socket.

use std::net::SocketAddr;

use serde::Serialize;

use crate::config::file::Section;
use crate::model::{Error, Result};

/// `[daemon]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Daemon {
    /// The TCP address for probes and Prometheus; `None` = none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
}

pub(super) fn daemon(section: &Section<'_>) -> Result<Daemon> {
    let listen = section.converted("listen", |text| {
        let wrong = |_| {
            Error::usage(format!("`{text}` is not an address with a port"))
                .hint("write an IP address, as in 127.0.0.1:9841 or [::1]:9841")
        };
        text.parse().map_err(wrong)
    })?;
    section.finish()?;
    Ok(Daemon { listen })
}
