//! The built binary, as a user runs it.

use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::Signal;

use super::{process, s3};

/// A command line to be run. Warnings and errors in its log must be announced with [`expect_log`](Self::expect_log):
/// trouble in the background cannot hide behind a good exit code.
#[derive(Debug)]
pub struct Drctl {
    command: Command,
    expected: Vec<String>,
}

impl Drctl {
    /// `drctl` with these arguments and the rig's S3 user.
    pub fn new<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drctl"));
        command.args(arguments);
        Self::of(command)
    }

    /// A command line that drctl printed, run by a shell to give JSON.
    pub fn pasted(line: &str) -> Self {
        let mut command = Command::new("sh");
        command.args(["-ec", &format!("exec {line} --json")]);
        Self::of(command)
    }

    /// The same care for another program.
    pub fn of(mut command: Command) -> Self {
        for (name, _) in std::env::vars() {
            let rig = name.starts_with("DRCTL_TEST_");
            if (name.starts_with("DRCTL_") && !rig) || ["AWS_", "PG", "RUST_LOG"].iter().any(|p| name.starts_with(p)) {
                command.env_remove(name);
            }
        }
        command
            .env("AWS_ACCESS_KEY_ID", s3::ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", s3::SECRET_KEY)
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("AWS_CONFIG_FILE", "/dev/null")
            .env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self { command, expected: Vec::new() }
    }

    /// An environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// The configuration file.
    pub fn config(self, path: &Path) -> Self {
        self.env("DRCTL_CONFIG", path)
    }

    /// The working directory.
    pub fn current_dir(mut self, path: &Path) -> Self {
        self.command.current_dir(path);
        self
    }

    /// Warnings and errors that contain `words` may be logged.
    pub fn expect_log(mut self, words: &str) -> Self {
        self.expected.push(words.to_owned());
        self
    }

    /// Runs it to its end.
    pub async fn run(self) -> Finished {
        self.spawn().wait().await
    }

    /// Starts it.
    pub fn spawn(mut self) -> Background {
        let mut child = self.command.spawn().unwrap_or_else(|error| panic!("{:?}: {error}", self.command));
        let stdout = collect(child.stdout.take().unwrap());
        let stderr = collect(child.stderr.take().unwrap());
        Background {
            child,
            output: Some((stdout, stderr)),
            line: format!("{:?}", self.command),
            expected: self.expected,
        }
    }
}

/// Reads to the end in a thread, so that a full pipe never holds the program up.
fn collect(mut from: impl std::io::Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _end = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A program that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Background {
    child: Child,
    output: Option<(JoinHandle<String>, JoinHandle<String>)>,
    line: String,
    expected: Vec<String>,
}

impl Background {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end, five minutes at most.
    pub async fn wait(mut self) -> Finished {
        let status = process::wait(&mut self.child, Duration::from_secs(300)).await;
        let status = status.unwrap_or_else(|| {
            let _gone = self.child.kill();
            self.child.wait().unwrap()
        });
        self.finished(status)
    }

    /// Sends SIGTERM and waits for the end.
    pub async fn terminate(self) -> Finished {
        process::signal(self.pid(), Signal::TERM);
        self.wait().await
    }

    /// SIGKILL.
    pub fn kill9(mut self) -> Finished {
        let _gone = self.child.kill();
        let status = self.child.wait().unwrap();
        self.finished(status)
    }

    fn finished(&mut self, status: ExitStatus) -> Finished {
        let (stdout, stderr) = self.output.take().unwrap();
        let finished = Finished {
            line: self.line.clone(),
            code: status.code(),
            stdout: stdout.join().unwrap(),
            stderr: stderr.join().unwrap(),
        };
        finished.assert_sane(&self.expected);
        finished
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// How a program ended.
#[derive(Debug, Clone)]
pub struct Finished {
    line: String,
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
    /// What it printed for machines and readers.
    pub stdout: String,
    /// What it printed beside that.
    pub stderr: String,
}

impl Finished {
    /// Asserts the exit code.
    #[track_caller]
    pub fn code(self, expected: i32) -> Self {
        assert_eq!(self.code, Some(expected), "{self}");
        self
    }

    /// Asserts success.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.code(0)
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self}"))
    }

    fn assert_sane(&self, expected: &[String]) {
        assert!(!self.stdout.contains("panicked") && !self.stderr.contains("panicked"), "{self}");
        let unexpected = self.stderr.lines().find(|line| {
            let level = [" WARN ", " ERROR ", "\"level\":\"WARN\"", "\"level\":\"ERROR\""];
            let line = format!(" {line} ");
            let known = expected.iter().any(|words| line.contains(words));
            level.iter().any(|level| line.contains(level)) && !known
        });
        assert!(unexpected.is_none(), "unexpected in the log: {}\n{self}", unexpected.unwrap_or_default());
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} ended with {:?}", self.line, self.code)?;
        writeln!(f, "--- stdout\n{}\n--- stderr\n{}", self.stdout, self.stderr)
    }
}
