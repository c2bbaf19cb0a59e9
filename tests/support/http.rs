//! HTTP as little as tests need of it: a question, and a receiver that keeps what it was told.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Status and body of `GET path` at a port of this machine.
pub async fn get(port: u16, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: drctl\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {answer}"));
    let status = head.split_whitespace().nth(1).and_then(|status| status.parse().ok());
    Ok((status.unwrap_or_else(|| panic!("no status: {head}")), body.to_owned()))
}

/// Text as a part of a URL.
pub fn escaped(text: &str) -> String {
    text.bytes()
        .map(|b| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") })
        .collect()
}

/// One request.
#[derive(Debug, Clone)]
pub struct Told {
    /// Method and path.
    pub line: String,
    /// Its head, in lower case.
    pub head: String,
    /// Its body; null without one.
    pub body: Value,
}

/// A receiver on a port of its own.
#[derive(Debug)]
pub struct Receiver {
    /// Where it listens.
    pub port: u16,
    told: Arc<Mutex<Vec<Told>>>,
    answers: Arc<Mutex<VecDeque<u16>>>,
    task: JoinHandle<()>,
}

impl Receiver {
    /// It answers 200 unless told otherwise.
    pub async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (told, answers) = (Arc::<Mutex<Vec<Told>>>::default(), Arc::<Mutex<VecDeque<u16>>>::default());
        let (kept, planned) = (Arc::clone(&told), Arc::clone(&answers));
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let Some(request) = read(&mut stream).await else { continue };
                let status = planned.lock().unwrap().pop_front().unwrap_or(200);
                kept.lock().unwrap().push(request);
                let body = r#"{"message":"so it is","id":1}"#;
                let answer =
                    format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
                let _gone = stream.write_all(answer.as_bytes()).await;
            }
        });
        Self { port, told, answers, task }
    }

    /// Everything that was told so far whose path begins so.
    pub fn told(&self, line: &str) -> Vec<Told> {
        self.told.lock().unwrap().iter().filter(|told| told.line.starts_with(line)).cloned().collect()
    }

    /// The next answers.
    pub fn answer(&self, statuses: &[u16]) {
        self.answers.lock().unwrap().extend(statuses);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read(stream: &mut TcpStream) -> Option<Told> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let lower = head.to_lowercase();
            let length =
                lower.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse::<usize>().ok());
            if body.len() >= length.unwrap_or(0) {
                let line = head.lines().next()?.trim_end_matches(" HTTP/1.1").to_owned();
                return Some(Told { line, head: lower, body: serde_json::from_str(body).unwrap_or(Value::Null) });
            }
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}
