//! Whether a KMS answered when it was asked last.

use std::sync::Arc;

use async_trait::async_trait;
use zeroize::Zeroizing;

use super::{KeyError, KeyHolder, KeyOpener, Wrap, WrapContext};
use crate::model::{HolderId, RegionName};
use crate::observe::metrics::{Meters, table};

/// A holder or an opener whose answers are noted.
#[derive(Debug)]
pub struct Metered<K: ?Sized> {
    meters: Arc<Meters>,
    inner: Arc<K>,
}

impl<K: ?Sized> Metered<K> {
    /// Notes the answers of `inner`.
    pub const fn new(inner: Arc<K>, meters: Arc<Meters>) -> Self {
        Self { meters, inner }
    }
}

#[async_trait]
impl KeyHolder for Metered<dyn KeyHolder> {
    fn id(&self) -> &HolderId {
        self.inner.id()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn region(&self) -> Option<&RegionName> {
        self.inner.region()
    }

    async fn wrap(&self, context: &WrapContext, secret: &[u8]) -> Result<Wrap, KeyError> {
        let wrapped = self.inner.wrap(context, secret).await;
        let region = self.inner.region().map(RegionName::as_str).unwrap_or_default();
        let value = f64::from(u8::from(wrapped.is_ok()));
        self.meters.set(&table::KMS_WRAP_SUCCESS, [&self.inner.describe(), region], value);
        wrapped
    }
}

#[async_trait]
impl KeyOpener for Metered<dyn KeyOpener> {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn fits(&self, wrap: &Wrap) -> bool {
        self.inner.fits(wrap)
    }

    async fn open(&self, context: &WrapContext, wrap: &Wrap) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let opened = self.inner.open(context, wrap).await;
        self.meters.set(&table::KMS_UNWRAP_SUCCESS, [&wrap.key], f64::from(u8::from(opened.is_ok())));
        opened
    }
}
