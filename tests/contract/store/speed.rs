//! Throughput of 16 MiB objects; a figure for people, asked for by name: `cargo test speed -- --ignored --nocapture`.

use std::time::Instant;

use bytes::Bytes;
use drctl::store::{Digest, ObjectStore, PutOptions};
use futures::StreamExt as _;

use super::servers::Server;

const OBJECTS: usize = 24;
const AT_A_TIME: usize = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, not a check"]
async fn of_large_objects() {
    for (name, server) in [("localstack", Server::localstack()), ("rgw", Server::rgw())] {
        let store = server.store().await;
        store.probe().await.unwrap();
        let bodies = (0..OBJECTS).map(|at| Bytes::from(vec![u8::try_from(at).unwrap(); 16 << 20]));
        let objects: Vec<(String, Bytes, Digest)> =
            bodies.enumerate().map(|(at, body)| (format!("o{at}"), body.clone(), Digest::of(&body))).collect();
        let options = PutOptions::default();
        let begun = Instant::now();
        let puts = futures::stream::iter(&objects).map(|(key, body, digest)| {
            let (store, options) = (&store, &options);
            async move { store.put(key, body.clone(), *digest, options).await.unwrap() }
        });
        puts.buffer_unordered(AT_A_TIME).collect::<Vec<_>>().await;
        let put = begun.elapsed();
        let begun = Instant::now();
        let gets = futures::stream::iter(&objects).map(|(key, ..)| {
            let store = &store;
            async move { store.get(key, None).await.unwrap().len() }
        });
        let read: usize = gets.buffer_unordered(AT_A_TIME).collect::<Vec<_>>().await.iter().sum();
        let rate = |took: std::time::Duration| (read >> 20) as f64 / took.as_secs_f64();
        #[expect(clippy::print_stderr, reason = "the figure is the result")]
        let () = eprintln!("{name}: put {:.0} MiB/s, get {:.0} MiB/s", rate(put), rate(begun.elapsed()));
    }
}
