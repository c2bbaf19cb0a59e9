//! A PostgreSQL server as a child process: what a restore starts and a drill examines.

pub mod beside;
mod binaries;
mod network;
mod postmaster;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::process::{Pid, Signal};
use tokio::process::Child;

use self::postmaster::PidFile;
use crate::model::Error;
use crate::pg::control::{self, ControlFile, State};

pub use self::binaries::{ClientPrograms, PgBinaries, User};
pub use self::network::Network;
pub use self::postmaster::{Postmaster, Readiness, postmaster_of};

const POLL: Duration = Duration::from_millis(20);
/// An abandoned server has this long to stop by itself before it is killed.
const DROP_GRACE: Duration = Duration::from_secs(2);
/// `sun_path` on Linux, less the final zero.
const MAX_SOCKET_PATH: usize = 107;
const LOG_TAIL_BYTES: u64 = 4096;
const LOG_TAIL_LINES: usize = 20;
/// Why a server cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// No such version is installed.
    #[error("no PostgreSQL {major} binaries: {}", list(.tried))]
    NoBinaries {
        /// The major version.
        major: u32,
        /// The directories that were looked at.
        tried: Vec<PathBuf>,
    },
    /// PostgreSQL refuses to run as root.
    #[error("PostgreSQL does not run as root")]
    Root,
    /// No such account.
    #[error("no user `{0}` on this machine")]
    NoUser(String),
    /// The path of the socket does not fit.
    #[error("socket directory `{}` is too long", .0.display())]
    SocketPath(PathBuf),
    /// A postmaster runs on this data directory.
    #[error("a server (pid {pid}) runs on `{}`", .data_dir.display())]
    AlreadyRunning {
        /// The data directory.
        data_dir: PathBuf,
        /// Its postmaster.
        pid: u32,
    },
    /// The server ended when it should run.
    #[error("PostgreSQL ended ({status}){}", log_text(.log))]
    Exited {
        /// How.
        status: ExitStatus,
        /// Its last words.
        log: String,
    },
    /// The server did not get there in time.
    #[error("PostgreSQL {what} took more than {} s{}", .waited.as_secs(), log_text(.log))]
    Timeout {
        /// `start` or `stop`.
        what: &'static str,
        /// How long.
        waited: Duration,
        /// Its last words.
        log: String,
    },
    /// The operating system said no.
    #[error("{what}")]
    Io {
        /// To what.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn list(directories: &[PathBuf]) -> String {
    let names: Vec<_> = directories.iter().map(|directory| directory.display().to_string()).collect();
    format!("not in {}", names.join(", "))
}

fn log_text(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!("; its log ends with:\n{log}") }
}

impl From<InstanceError> for Error {
    fn from(error: InstanceError) -> Self {
        let public = match &error {
            InstanceError::NoBinaries { .. } | InstanceError::NoUser(_) => Self::not_found(error.to_string()),
            InstanceError::Root | InstanceError::SocketPath(_) | InstanceError::AlreadyRunning { .. } => {
                Self::refused(error.to_string())
            }
            InstanceError::Exited { .. } | InstanceError::Timeout { .. } => Self::failed(error.to_string()),
            InstanceError::Io { what, source } => Self::failed(what.clone()).because(source),
        };
        match error {
            InstanceError::NoBinaries { major, .. } => {
                public.hint(format!("install PostgreSQL {major}, or set DRCTL_PG_BIN_{major} to its bin directory"))
            }
            InstanceError::Root => {
                public.hint("run drctl as the postgres user, or configure the user to run servers as")
            }
            InstanceError::SocketPath(_) => public.hint("use a shorter directory: a socket path has at most 107 bytes"),
            _ => public,
        }
    }
}

/// How to run a server.
#[derive(Debug, Clone)]
pub struct InstanceOptions {
    /// The data directory.
    pub data_dir: PathBuf,
    /// Where its only socket goes.
    pub socket_dir: PathBuf,
    /// Part of the socket's name; nothing listens on the network.
    pub port: u16,
    /// Settings for the command line, which no file in the data directory can override.
    pub settings: Vec<(String, String)>,
    /// What the server prints is appended here.
    pub log_file: PathBuf,
    /// The account to run as; needed if drctl is root.
    pub as_user: Option<User>,
    /// Listens, and logs, as its own configuration says, instead of only on the socket above: a server that is to stay.
    pub listens: bool,
    /// What it sees of the network.
    pub network: Network,
}

impl InstanceOptions {
    /// The socket that clients connect to.
    pub fn socket(&self) -> PathBuf {
        self.socket_dir.join(format!(".s.PGSQL.{}", self.port))
    }

    fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["-D".into(), self.data_dir.clone().into_os_string()];
        let mut set = |name: &str, value: &str| arguments.extend(["-c".into(), format!("{name}={value}").into()]);
        // A `data_directory` in the configuration file would lead to other data than `-D` says.
        set("data_directory", &self.data_dir.display().to_string());
        // Ours come last: of two settings of one name the later wins.
        for (name, value) in &self.settings {
            set(name, value);
        }
        if self.listens {
            return arguments;
        }
        set("listen_addresses", "");
        set("port", &self.port.to_string());
        set("logging_collector", "off");
        set("log_destination", "stderr");
        // This setting is a list: quotes keep commas and blanks of the path together.
        let socket_dir = self.socket_dir.display().to_string().replace('"', "\"\"");
        set("unix_socket_directories", &format!("\"{socket_dir}\""));
        arguments
    }
}

/// How to stop a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Waits for the clients to leave.
    Smart,
    /// Sends the clients away and writes a checkpoint.
    Fast,
    /// Like a crash: the next start recovers.
    Immediate,
}

impl StopMode {
    fn signal(self) -> Signal {
        match self {
            Self::Smart => Signal::TERM,
            Self::Fast => Signal::INT,
            Self::Immediate => Signal::QUIT,
        }
    }
}

/// A running server. Dropping it stops it like a crash would, and blocks for that up to two seconds; call
/// [`Instance::stop`] or [`Instance::leave_running`] instead.
#[derive(Debug)]
pub struct Instance {
    child: Option<Child>,
    pid: Pid,
    options: InstanceOptions,
    log_start: u64,
}

impl Instance {
    /// Starts a server and returns at once.
    ///
    /// # Errors
    /// It runs already, may not run, or cannot be executed.
    pub fn start(binaries: &PgBinaries, options: InstanceOptions) -> Result<Self, InstanceError> {
        if rustix::process::geteuid().is_root() && options.as_user.is_none_or(|user| user.uid == 0) {
            return Err(InstanceError::Root);
        }
        if !options.listens && options.socket().as_os_str().len() > MAX_SOCKET_PATH {
            return Err(InstanceError::SocketPath(options.socket_dir));
        }
        if let Postmaster::Alive { pid } = postmaster_of(&options.data_dir)? {
            return Err(InstanceError::AlreadyRunning { data_dir: options.data_dir, pid });
        }
        let io = |what: &str, source| InstanceError::Io { what: what.to_owned(), source };
        // Root writes in directories of others, who could lead it to any file.
        let no_follow = OFlags::NOFOLLOW.bits().cast_signed();
        let log = OpenOptions::new().create(true).append(true).custom_flags(no_follow).open(&options.log_file);
        let log = log.map_err(|source| io(&format!("open log file `{}`", options.log_file.display()), source))?;
        let log_start = log.metadata().map_err(|source| io("read the size of the log file", source))?.len();
        let both = log.try_clone().map_err(|source| io("share the log file", source))?;
        let mut command = options.network.command(binaries, options.as_user);
        // Its own process group: an interrupt at the terminal is for drctl, which then stops the server in order.
        command.args(options.arguments()).stdout(both).stderr(log).process_group(0);
        let program = binaries.directory.join("postgres");
        let child = command.spawn().map_err(|source| io(&format!("run `{}`", program.display()), source))?;
        let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        let pid = pid.ok_or_else(|| io("run postgres", io::Error::other("it has no process id")))?;
        Ok(Self { child: Some(child), pid, options, log_start })
    }

    /// The postmaster.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// How it was started.
    pub fn options(&self) -> &InstanceOptions {
        &self.options
    }

    /// How far the server is now, by its own `postmaster.pid`.
    ///
    /// # Errors
    /// [`InstanceError::Exited`], unless it was stopped.
    pub fn readiness(&mut self) -> Result<Readiness, InstanceError> {
        if self.child.is_none() {
            return Ok(Readiness::Stopping);
        }
        if let Some(status) = self.exit_status()? {
            return Err(InstanceError::Exited { status, log: self.log_tail() });
        }
        // The file may be half written, or one that an earlier server left behind, which names another process.
        let file = PidFile::read(&self.options.data_dir).ok().flatten().filter(|file| file.pid == self.pid());
        Ok(match file.map_or(Readiness::Starting, |file| file.readiness) {
            Readiness::Ready if !self.in_production() => Readiness::Standby,
            readiness => readiness,
        })
    }

    /// A server that lets read-only connections in while it replays says `ready` in `postmaster.pid` like one that has
    /// ended recovery; only the control file tells the two apart. One that is torn says so at the next look.
    fn in_production(&self) -> bool {
        let bytes = std::fs::read(self.options.data_dir.join(control::PATH));
        let control = bytes.ok().and_then(|bytes| ControlFile::parse(&bytes).ok());
        control.is_some_and(|control| control.state == State::InProduction)
    }

    /// Waits until the server accepts connections, read-only ones included, or replays without.
    ///
    /// # Errors
    /// It ended, or it did not get there in time; then it still runs.
    pub async fn wait_ready(&mut self, limit: Duration) -> Result<Readiness, InstanceError> {
        let ready = async {
            loop {
                match self.readiness() {
                    Ok(Readiness::Starting | Readiness::Stopping) => tokio::time::sleep(POLL).await,
                    settled => return settled,
                }
            }
        };
        match tokio::time::timeout(limit, ready).await {
            Ok(settled) => settled,
            Err(_) => Err(InstanceError::Timeout { what: "start", waited: limit, log: self.log_tail() }),
        }
    }

    /// Stops the server and waits for its end.
    ///
    /// # Errors
    /// It did not end in time, or not in order; in the first case it still runs and can be stopped in another mode.
    pub async fn stop(&mut self, mode: StopMode, limit: Duration) -> Result<(), InstanceError> {
        if self.child.is_some() && self.exit_status()?.is_none() {
            self.signal(mode.signal());
        }
        let Some(child) = &mut self.child else { return Ok(()) };
        let status = match tokio::time::timeout(limit, child.wait()).await {
            Ok(status) => status.map_err(waiting)?,
            Err(_) => return Err(InstanceError::Timeout { what: "stop", waited: limit, log: self.log_tail() }),
        };
        self.child = None;
        if status.success() || mode == StopMode::Immediate {
            return Ok(());
        }
        Err(InstanceError::Exited { status, log: self.log_tail() })
    }

    /// Lets the server run on without drctl, and returns its process id.
    pub fn leave_running(mut self) -> u32 {
        self.child = None;
        self.pid()
    }

    /// The last lines that this server printed.
    pub fn log_tail(&self) -> String {
        read_tail(&self.options.log_file, self.log_start).unwrap_or_default()
    }

    fn exit_status(&mut self) -> Result<Option<ExitStatus>, InstanceError> {
        self.child.as_mut().map_or(Ok(None), Child::try_wait).map_err(waiting)
    }

    /// Only while the child was not waited for: until then its process id cannot belong to another process.
    fn signal(&self, signal: Signal) {
        // The one possible error is that it just ended, which the wait finds out.
        let _ = rustix::process::kill_process(self.pid, signal);
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let running = |instance: &mut Self| instance.child.is_some() && matches!(instance.exit_status(), Ok(None));
        if !running(self) {
            return;
        }
        self.signal(StopMode::Immediate.signal());
        let mut waited = Duration::ZERO;
        while running(self) {
            if waited >= DROP_GRACE {
                self.signal(Signal::KILL);
                return;
            }
            std::thread::sleep(POLL);
            waited += POLL;
        }
    }
}

fn waiting(source: io::Error) -> InstanceError {
    InstanceError::Io { what: "wait for postgres".to_owned(), source }
}

fn read_tail(path: &Path, from: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let end = file.metadata()?.len();
    file.seek(SeekFrom::Start(from.max(end.saturating_sub(LOG_TAIL_BYTES))))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    Ok(lines.get(lines.len().saturating_sub(LOG_TAIL_LINES)..).unwrap_or_default().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::testing::{Cluster, block_on, installed};

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn a_server_lives_and_ends_in_order() {
        block_on(async {
            for binaries in installed().await {
                let cluster = Cluster::create(&binaries, &[]).await;
                assert_eq!(postmaster_of(&cluster.data()).unwrap(), Postmaster::None);
                let mut instance = cluster.start(&[("work_mem", "5MB")]).await;
                let pid = instance.pid();
                assert_eq!(postmaster_of(&cluster.data()).unwrap(), Postmaster::Alive { pid });
                assert_eq!(cluster.sql(&["show work_mem", "show listen_addresses"]).await, "5MB\n\n");
                let second = Instance::start(&binaries, cluster.options(&[]));
                assert!(matches!(second, Err(InstanceError::AlreadyRunning { .. })), "{second:?}");
                instance.stop(StopMode::Fast, LIMIT).await.unwrap();
                instance.stop(StopMode::Fast, LIMIT).await.unwrap();
                assert!(instance.log_tail().contains("database system is shut down"), "{}", instance.log_tail());
                assert_eq!(postmaster_of(&cluster.data()).unwrap(), Postmaster::None);
            }
        });
    }

    #[test]
    fn a_dropped_server_is_gone() {
        block_on(async {
            let cluster = Cluster::create(&installed().await[0], &[]).await;
            let instance = cluster.start(&[]).await;
            drop(instance);
            assert_eq!(postmaster_of(&cluster.data()).unwrap(), Postmaster::None);
        });
    }

    #[test]
    fn a_server_that_cannot_start_says_why() {
        block_on(async {
            let cluster = Cluster::create(&installed().await[0], &[]).await;
            let settings = [("shared_preload_libraries", "no_such_library")];
            let mut instance = Instance::start(&cluster.binaries, cluster.options(&settings)).unwrap();
            let error = instance.wait_ready(LIMIT).await.unwrap_err();
            assert!(error.to_string().contains("no_such_library"), "{error}");
            let mut options = cluster.options(&[]);
            options.socket_dir = PathBuf::from("/".repeat(120));
            let refused = Instance::start(&cluster.binaries, options);
            assert!(matches!(refused, Err(InstanceError::SocketPath(_))));
            if rustix::process::geteuid().is_root() {
                let mut options = cluster.options(&[]);
                options.as_user = None;
                assert!(matches!(Instance::start(&cluster.binaries, options), Err(InstanceError::Root)));
            }
        });
    }

    #[test]
    fn missing_binaries_are_named() {
        block_on(async {
            let error = PgBinaries::find(15, Some(Path::new("/nonexistent"))).await.unwrap_err();
            let error = Error::from(error);
            assert_eq!(error.kind(), crate::model::Kind::NotFound);
            assert!(error.hint_text().unwrap().contains("DRCTL_PG_BIN_15"));
        });
    }
}
