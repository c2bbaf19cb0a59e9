//! Connections over TCP, from anybody: bounded in number and in time, so that whoever opens many or sends nothing takes
//! neither probes nor Prometheus their answer.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// After an accept that failed, for want of file descriptors as a rule.
const PAUSE: Duration = Duration::from_millis(200);

/// What a client may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// How long the head of a request may take, and how long a connection may wait for its next one.
    pub(super) head: Duration,
    /// How long a connection may last, whatever it does.
    pub(super) life: Duration,
    /// Connections of everybody, and of one address: nobody can fill all places alone.
    pub(super) connections: (usize, usize),
}

impl Bounds {
    /// A scrape takes a moment, the slowest answer of the API 75 s.
    pub(super) const DAEMON: Self =
        Self { head: Duration::from_secs(10), life: Duration::from_secs(180), connections: (128, 32) };
}

/// Serves `app` until it is stopped. What was asked by then is still answered; connections that wait are closed. Dropping
/// it ends every connection.
pub(super) async fn serve(listener: TcpListener, app: Router, bounds: Bounds, stop: CancellationToken) {
    let (mut connections, places) = (JoinSet::new(), Places::default());
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => match places.take(peer.ip(), bounds.connections) {
                Some(place) => {
                    let (app, stop) = (app.clone(), stop.clone());
                    connections.spawn(async move {
                        answer(stream, app, bounds, stop).await;
                        drop(place);
                    });
                }
                None => tracing::debug!(%peer, "too many connections: one is closed unheard"),
            },
            Err(error) => {
                tracing::info!(%error, "a connection over TCP could not be taken");
                sleep(PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn answer(stream: TcpStream, app: Router, bounds: Bounds, stop: CancellationToken) {
    let mut protocol = http1::Builder::new();
    protocol.timer(TokioTimer::new()).header_read_timeout(bounds.head);
    let connection = protocol.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = sleep(bounds.life) => return,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection over TCP ended early");
    }
}

/// Who is connected.
#[derive(Debug, Clone, Default)]
struct Places {
    taken: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
}

/// A place, free again when it is dropped.
#[derive(Debug)]
struct Place {
    places: Places,
    address: IpAddr,
}

impl Places {
    fn take(&self, address: IpAddr, (all, each): (usize, usize)) -> Option<Place> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.get(&address).copied().unwrap_or_default();
        if own >= each || taken.values().sum::<usize>() >= all {
            return None;
        }
        taken.insert(address, own + 1);
        Some(Place { places: self.clone(), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let left = taken.remove(&self.address).unwrap_or_default().saturating_sub(1);
        if left > 0 {
            taken.insert(self.address, left);
        }
    }
}

/// Binds, and says where.
pub(super) async fn bind(address: SocketAddr) -> std::io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::task::JoinHandle;
    use tokio::time::{Instant, timeout};

    use super::*;
    use crate::observe::task;

    const SOON: Duration = Duration::from_secs(20);
    const WHOLE: &[u8] = b"GET / HTTP/1.1\r\nHost: drctl\r\n\r\n";

    async fn serving(bounds: Bounds) -> (SocketAddr, CancellationToken, JoinHandle<()>) {
        let (listener, address) = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let slow = get(|| async {
            sleep(Duration::from_millis(300)).await;
            "slow"
        });
        let app = Router::new().route("/", get(|| async { "ok" })).route("/slow", slow);
        let stop = CancellationToken::new();
        let task = task::spawn("test", serve(listener, app, bounds, stop.clone()));
        (address, stop, task)
    }

    async fn sent(address: SocketAddr, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream
    }

    /// Everything until the other end closes, however it does.
    async fn rest(stream: &mut TcpStream) -> String {
        let mut bytes = Vec::new();
        let _reset = timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("the connection stays open");
        String::from_utf8(bytes).unwrap()
    }

    async fn is_answered(address: SocketAddr) -> bool {
        let Ok(mut stream) = TcpStream::connect(address).await else { return false };
        let asked = stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await;
        asked.is_ok() && rest(&mut stream).await.ends_with("ok")
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_sends_half_a_head_or_nothing_more_is_cut_off() {
        let bounds = Bounds { head: Duration::from_millis(300), ..Bounds::DAEMON };
        let (address, _stop, _task) = serving(bounds).await;
        let mut halves = Vec::new();
        for part in [&b""[..], b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n"] {
            halves.push(sent(address, part).await);
        }
        // Answered once, and then silent.
        halves.push(sent(address, WHOLE).await);
        assert!(is_answered(address).await);
        let began = Instant::now();
        for stream in &mut halves {
            rest(stream).await;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_address_fills_its_places_and_no_more() {
        let (address, _stop, _task) = serving(Bounds { connections: (8, 3), ..Bounds::DAEMON }).await;
        let mut held = Vec::new();
        for _ in 0..3 {
            let mut stream = sent(address, WHOLE).await;
            // An answer: it has a place.
            assert!(stream.read_u8().await.is_ok());
            held.push(stream);
        }
        assert!(!is_answered(address).await);
        held.pop();
        let freed = async {
            while !is_answered(address).await {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(SOON, freed).await.expect("a place that was left is free");
    }

    #[test]
    fn everybody_together_fills_all_places() {
        let (places, bounds) = (Places::default(), (3, 2));
        let address = |last| IpAddr::from([10, 0, 0, last]);
        let taken: Vec<_> = [1, 1, 2].map(|last| places.take(address(last), bounds).unwrap()).into();
        assert!(places.take(address(1), bounds).is_none() && places.take(address(3), bounds).is_none());
        drop(taken);
        assert!(places.taken.lock().unwrap().is_empty());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_was_asked_is_answered_and_nobody_delays_the_end() {
        let (address, stop, task) = serving(Bounds::DAEMON).await;
        let mut waits = sent(address, WHOLE).await;
        assert!(waits.read_u8().await.is_ok());
        let mut asks = sent(address, b"GET /slow HTTP/1.1\r\nHost: drctl\r\n\r\n").await;
        sleep(Duration::from_millis(100)).await;
        stop.cancel();
        timeout(SOON, task).await.expect("it ends").unwrap();
        assert!(rest(&mut asks).await.ends_with("slow"));
        rest(&mut waits).await;
        assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
    }
}
