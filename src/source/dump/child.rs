//! A program of PostgreSQL whose output is a stream.

use std::ffi::OsString;
use std::process::{ExitStatus, Stdio};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{ChildStderr, ChildStdout, Command};
use tokio::sync::mpsc;

use crate::model::{Error, Result};
use crate::source::StreamItem;

/// What is handed on at once.
const CHUNK: usize = 1024 * 1024;
/// Lines of complaint that are kept: the last ones say why it ended.
const LINES: usize = 20;
/// Of a line that never ends, this much.
const LINE_BYTES: u64 = 4096;

/// A child that runs. It is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Child {
    program: &'static str,
    child: tokio::process::Child,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
}

impl Child {
    pub(super) fn start(
        program: &'static str,
        mut command: Command,
        environment: Vec<(&'static str, OsString)>,
    ) -> Result<Self> {
        command.envs(environment).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| Error::failed(format!("start {program}")).because(error))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        Ok(Self { program, child, stdout, stderr })
    }

    /// Its standard output as a stream, which is whole only if it ends well. Returns what it complained of nonetheless.
    pub(super) async fn send(mut self, items: &mpsc::Sender<StreamItem>, stream: &str) -> Result<Vec<String>> {
        let gone = |_| Error::failed(format!("whoever wanted {stream} is gone"));
        items.send(StreamItem::Begin { name: stream.to_owned() }).await.map_err(gone)?;
        let (stdout, stderr) = (self.stdout.take(), self.stderr.take());
        let pump = async {
            let Some(mut stdout) = stdout else { return Ok(()) };
            while let Some(bytes) = chunk(&mut stdout).await? {
                items.send(StreamItem::Bytes(bytes)).await.map_err(gone)?;
            }
            Ok::<_, Error>(())
        };
        // Both at once: a child that cannot complain waits. The first error ends it, by dropping it.
        let (_, complaints) = tokio::try_join!(pump, async { Ok(complaints(stderr).await) })?;
        let status = self.wait().await?;
        judge(self.program, status, &complaints)?;
        items.send(StreamItem::End).await.map_err(gone)?;
        Ok(complaints)
    }

    async fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().await.map_err(|error| Error::failed(format!("wait for {}", self.program)).because(error))
    }
}

/// An error unless a program ended well.
pub(super) fn judge(program: &str, status: ExitStatus, complaints: &[String]) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let error = Error::failed(format!("{program} failed"));
    let error = complaints.iter().fold(error, Error::because);
    Err(error.because(status))
}

async fn chunk(from: &mut (impl AsyncRead + Unpin)) -> Result<Option<Vec<u8>>> {
    let mut bytes = Vec::with_capacity(CHUNK);
    while bytes.len() < CHUNK {
        let read = from.read_buf(&mut bytes).await;
        if read.map_err(|error| Error::failed("read the output").because(error))? == 0 {
            break;
        }
    }
    Ok((!bytes.is_empty()).then_some(bytes))
}

/// The last lines that a program wrote to its standard error.
pub(super) async fn complaints(stderr: Option<ChildStderr>) -> Vec<String> {
    let Some(stderr) = stderr else { return Vec::new() };
    let (mut reader, mut lines) = (BufReader::new(stderr), std::collections::VecDeque::new());
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(LINE_BYTES).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return lines.into(),
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line).trim().to_owned();
        if !text.is_empty() {
            lines.push_back(text);
        }
        if lines.len() > LINES {
            lines.pop_front();
        }
    }
}
