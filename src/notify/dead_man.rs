//! A sign of life to somebody outside who pages when it stays away: drctl and what watches it may be lost together.

use crate::notify::{Address, Client, NotifyError};

/// Whoever must hear from us.
#[derive(Debug, Clone)]
pub struct DeadMan {
    client: Client,
    address: Address,
}

impl DeadMan {
    /// Who listens at `address`.
    pub const fn new(client: Client, address: Address) -> Self {
        Self { client, address }
    }

    /// Where it goes, without anything secret.
    pub fn describe(&self) -> String {
        format!("dead man's switch {}", self.address.host())
    }

    /// Gives one sign, and says what answered.
    ///
    /// # Errors
    /// Nobody took it.
    pub async fn ping(&self) -> Result<String, NotifyError> {
        self.client.get(&self.address).await
    }
}
