//! Three regions, a directory and two S3 servers, each of which can be lost in ways of its own.

use std::time::Duration;

use rand::Rng as _;
use rand::rngs::StdRng;

use crate::support::proxy::{Mode, TcpProxy};
use crate::support::s3::Endpoint;
use crate::wal::Rig;

/// The regions in front of which a proxy stands; the third is the directory `a`.
const PROXIED: [&str; 2] = ["b", "c"];

#[derive(Debug)]
pub(super) struct Sky {
    proxies: Vec<TcpProxy>,
    /// The directory is away.
    away: bool,
}

impl Sky {
    /// The regions, and how they are written in a configuration.
    pub(super) async fn new() -> (Self, String) {
        let mut text = "detach_after = \"4s\"\n[regions.a]\nurl = \"a\"\n".to_owned();
        let mut proxies = Vec::new();
        for (name, endpoint) in PROXIED.into_iter().zip([Endpoint::localstack_a(), Endpoint::localstack_b()]) {
            let bucket = endpoint.bucket().await;
            let (proxy, through) = endpoint.proxied().await;
            text += &format!(
                "[regions.{name}]\nurl = \"s3://{}\"\nendpoint = \"{}\"\naws_region = \"{}\"\npath_style = true\n\
                 timeout = \"3s\"\n",
                bucket.name, through.url, through.region
            );
            proxies.push(proxy);
        }
        (Self { proxies, away: false }, text)
    }

    /// Loses `count` of the regions.
    pub(super) async fn lose(&mut self, count: usize, rig: &Rig, chance: &mut StdRng) {
        let spared = chance.random_range(0..3);
        let lost = (1..=count).map(|step| (spared + step) % 3);
        for region in lost {
            let Some(proxy) = self.proxies.get(region) else {
                println!("       a is away");
                rig.take_away(&["a"]);
                self.away = true;
                continue;
            };
            let mode = match chance.random_range(0..4) {
                0 => Mode::Hang,
                1 => Mode::Refuse,
                2 => Mode::CutAfter(chance.random_range(1..100_000)),
                _ => Mode::Delay(Duration::from_millis(chance.random_range(100..1500))),
            };
            println!("       {}: {mode:?}", PROXIED[region]);
            proxy.set(mode).await;
        }
    }

    /// All of them are back.
    pub(super) async fn clear(&mut self, rig: &Rig) {
        for proxy in &self.proxies {
            proxy.set(Mode::Pass).await;
        }
        if std::mem::take(&mut self.away) {
            rig.give_back(&["a"]);
        }
    }
}
