//! A TCP proxy whose faults can be switched while connections run: this is how a region hangs, slows down or vanishes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How the proxy treats every connection, also those that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Bytes go through.
    Pass,
    /// Connections are accepted and no byte moves, in either direction.
    Hang,
    /// Nobody listens, and existing connections are reset.
    Refuse,
    /// Each chunk of up to 64 KiB waits this long.
    Delay(Duration),
    /// A connection is reset once this many bytes went through it, both directions together.
    CutAfter(u64),
}

/// A proxy on a loopback port of its own. Dropping it resets everything.
#[derive(Debug)]
pub struct TcpProxy {
    port: u16,
    mode: watch::Sender<Mode>,
    passed: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl TcpProxy {
    /// A proxy in front of `127.0.0.1:port`.
    pub async fn before(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", super::process::free_ports(1))).await.unwrap();
        let own = listener.local_addr().unwrap();
        let (mode, watch) = watch::channel(Mode::Pass);
        let passed = Arc::new(AtomicU64::new(0));
        let upstream = SocketAddr::from(([127, 0, 0, 1], port));
        let task = tokio::spawn(serve(Some(listener), own, upstream, Link { mode: watch, passed: passed.clone() }));
        Self { port: own.port(), mode, passed, task }
    }

    /// Where clients connect.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Switches. Returns when a new connection meets the new mode.
    pub async fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
        let wanted = mode != Mode::Refuse;
        super::process::eventually("the proxy switches", Duration::from_secs(10), async || {
            TcpStream::connect(("127.0.0.1", self.port)).await.is_ok() == wanted
        })
        .await;
    }

    /// Bytes that went through so far, both directions.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.task.abort();
        self.mode.send_replace(Mode::Refuse);
    }
}

#[derive(Debug, Clone)]
struct Link {
    mode: watch::Receiver<Mode>,
    passed: Arc<AtomicU64>,
}

async fn serve(mut listener: Option<TcpListener>, own: SocketAddr, upstream: SocketAddr, mut link: Link) {
    loop {
        let mode = *link.mode.borrow_and_update();
        if mode == Mode::Refuse {
            listener = None;
            if link.mode.changed().await.is_err() {
                return;
            }
            continue;
        }
        let open = match listener.take() {
            Some(open) => open,
            None => TcpListener::bind(own).await.unwrap(),
        };
        tokio::select! {
            accepted = open.accept() => {
                if let Ok((client, _)) = accepted {
                    tokio::spawn(connection(client, upstream, link.clone()));
                }
            }
            changed = link.mode.changed() => if changed.is_err() { return },
        }
        listener = Some(open);
    }
}

/// One connection, until both directions have ended or one of them must be cut.
async fn connection(client: TcpStream, upstream: SocketAddr, link: Link) {
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    for stream in [&client, &server] {
        let _unset = stream.set_nodelay(true);
        // A dropped half then resets the connection instead of ending it politely.
        let _unset = stream.set_zero_linger();
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let carried = Arc::new(AtomicU64::new(0));
    let up = pump(from_client, to_server, link.clone(), carried.clone());
    let down = pump(from_server, to_client, link, carried);
    let _cut = tokio::try_join!(up, down);
}

/// Why a direction stopped before its end.
struct Cut;

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut link: Link,
    carried: Arc<AtomicU64>,
) -> Result<(), Cut> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read.map_err(|_| Cut)?,
            changed = link.mode.wait_for(|mode| *mode == Mode::Refuse) => { let _refused = changed; return Err(Cut) }
        };
        if read == 0 {
            let _closed = to.shutdown().await;
            return Ok(());
        }
        let allowed = admit(&mut link, &carried, read as u64).await?;
        to.write_all(&buffer[..allowed]).await.map_err(|_| Cut)?;
        carried.fetch_add(allowed as u64, Ordering::Relaxed);
        link.passed.fetch_add(allowed as u64, Ordering::Relaxed);
        if allowed < read {
            return Err(Cut);
        }
    }
}

/// Waits until bytes may go on, and says how many of them.
async fn admit(link: &mut Link, carried: &AtomicU64, bytes: u64) -> Result<usize, Cut> {
    loop {
        let mode = *link.mode.borrow_and_update();
        let allowed = match mode {
            Mode::Pass => bytes,
            Mode::Refuse => return Err(Cut),
            Mode::CutAfter(limit) => bytes.min(limit.saturating_sub(carried.load(Ordering::Relaxed))),
            Mode::Delay(delay) => {
                tokio::select! {
                    () = tokio::time::sleep(delay) => bytes,
                    changed = link.mode.changed() => { changed.map_err(|_| Cut)?; continue }
                }
            }
            Mode::Hang => {
                link.mode.changed().await.map_err(|_| Cut)?;
                continue;
            }
        };
        return Ok(usize::try_from(allowed).unwrap());
    }
}
