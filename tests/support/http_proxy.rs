//! A proxy before an S3 server that misbehaves request by request, in ways that only a server can: it answers without
//! having done anything, does it without answering, or refuses. Each request gets a connection of its own.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::s3::Endpoint;

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// The server never hears of it, and the client is told this status.
    Refuse(u16),
    /// The server does it, and the client waits for an answer that never comes.
    Swallow,
    /// The server never hears of it, and the client is told that it is done.
    Lie,
    /// The server does it after this long.
    Delay(Duration),
}

#[derive(Debug, Clone, Copy)]
struct Rule {
    method: &'static str,
    part: &'static str,
    spared: u64,
    deed: Deed,
}

#[derive(Debug, Default)]
struct State {
    rule: Option<Rule>,
    /// Method and path of every request, and whether it was hit.
    seen: Vec<(String, bool)>,
}

impl State {
    fn judge(&mut self, line: &str) -> Option<Deed> {
        let rule = self.rule.as_mut().filter(|rule| matches(line, (rule.method, rule.part)));
        let deed = rule.and_then(|rule| match rule.spared.checked_sub(1) {
            Some(left) => {
                rule.spared = left;
                None
            }
            None => Some(rule.deed),
        });
        self.seen.push((line.to_owned(), deed.is_some()));
        deed
    }
}

/// `*` is any method.
fn matches(line: &str, (method, part): (&str, &str)) -> bool {
    let (asked, path) = line.split_once(' ').unwrap_or_default();
    (method == "*" || method == asked) && path.contains(part)
}

/// The proxy, on a loopback port of its own.
#[derive(Debug)]
pub struct HttpProxy {
    state: Arc<Mutex<State>>,
    task: JoinHandle<()>,
}

impl HttpProxy {
    /// A proxy before a server, and the endpoint that leads through it.
    pub async fn before(server: &Endpoint) -> (Self, Endpoint) {
        let listener = TcpListener::bind(("127.0.0.1", super::process::free_ports(1))).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::<Mutex<State>>::default();
        let (shared, upstream) = (Arc::clone(&state), server.port());
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                tokio::spawn(async move { drop(serve(client, upstream, state).await) });
            }
        });
        (Self { state, task }, Endpoint { url, region: server.region })
    }

    /// From now on every request of this method whose path contains `part` is hit.
    pub fn set(&self, method: &'static str, part: &'static str, deed: Deed) {
        self.after(0, (method, part), deed);
    }

    /// The same, but for the next `spared` of them.
    pub fn after(&self, spared: u64, (method, part): (&'static str, &'static str), deed: Deed) {
        self.state.lock().unwrap().rule = Some(Rule { method, part, spared, deed });
    }

    /// The server answers from now on.
    pub fn heal(&self) {
        self.state.lock().unwrap().rule = None;
    }

    /// Paths of the requests of this method that contain `part`, and whether they were hit, in their order.
    pub fn seen(&self, method: &str, part: &str) -> Vec<(String, bool)> {
        let state = self.state.lock().unwrap();
        state.seen.iter().filter(|(line, _)| matches(line, (method, part))).cloned().collect()
    }

    /// How many of them were hit.
    pub fn hits(&self, method: &str, part: &str) -> usize {
        self.seen(method, part).iter().filter(|(_, hit)| *hit).count()
    }
}

impl Drop for HttpProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One request; both sides are told that no further one comes on this connection.
async fn serve(mut client: TcpStream, upstream: u16, state: Arc<Mutex<State>>) -> std::io::Result<()> {
    let Some((head, body)) = read_request(&mut client).await? else { return Ok(()) };
    let line = head.lines().next().unwrap_or_default().to_owned();
    let deed = state.lock().unwrap().judge(&line);
    match deed {
        Some(Deed::Refuse(status)) => return client.write_all(&refusal(status)).await,
        Some(Deed::Lie) => return client.write_all(&empty_answer("200 OK")).await,
        Some(Deed::Delay(time)) => tokio::time::sleep(time).await,
        Some(Deed::Swallow) | None => {}
    }
    let mut server = TcpStream::connect(("127.0.0.1", upstream)).await?;
    let first = head.find("\r\n").map_or(head.len(), |at| at + 2);
    let request = [&head.as_bytes()[..first], b"connection: close\r\n", &head.as_bytes()[first..], &body].concat();
    server.write_all(&request).await?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).await?;
    if deed == Some(Deed::Swallow) {
        // Until the client gives up.
        client.read_to_end(&mut Vec::new()).await?;
        return Ok(());
    }
    client.write_all(&answer).await
}

/// Head and body of one request; none if the client has closed.
async fn read_request(client: &mut TcpStream) -> std::io::Result<Option<(String, Vec<u8>)>> {
    let mut bytes = Vec::new();
    loop {
        if let Some(at) = bytes.windows(4).position(|end| end == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..at + 4]).into_owned();
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().unwrap())
            });
            let length = at + 4 + length.unwrap_or(0);
            if bytes.len() >= length {
                return Ok(Some((head, bytes[at + 4..length].to_vec())));
            }
        }
        if client.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    }
}

fn empty_answer(status: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\netag: \"0\"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").into_bytes()
}

/// As S3 refuses when it cannot serve.
fn refusal(status: u16) -> Vec<u8> {
    let code = if status == 503 { "SlowDown" } else { "InternalError" };
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>not now</Message></Error>");
    let head = format!("HTTP/1.1 {status} {code}\r\ncontent-type: application/xml\r\ncontent-length: {}", body.len());
    format!("{head}\r\nconnection: close\r\n\r\n{body}").into_bytes()
}
