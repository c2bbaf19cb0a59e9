//! Real servers for the tests of this room: every major version from 13 to 18 that is installed.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::instance::{Instance, InstanceOptions, PgBinaries, Readiness, StopMode, User};

const LIMIT: Duration = Duration::from_secs(60);

pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Every installed version; none at all is an error and not a reason to pass.
pub(super) async fn installed() -> Vec<PgBinaries> {
    let mut found = Vec::new();
    for major in 13..=18 {
        match PgBinaries::find(major, None).await {
            Ok(binaries) => found.push(binaries),
            Err(error) => {
                let is_named = std::env::var_os(format!("DRCTL_PG_BIN_{major}")).is_some();
                assert!(!is_named, "{error}");
            }
        }
    }
    assert!(!found.is_empty(), "these tests need PostgreSQL: install it or set DRCTL_PG_BIN_<major>");
    found
}

/// A cluster in a temporary directory.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) binaries: PgBinaries,
    pub(super) directory: tempfile::TempDir,
    user: Option<User>,
}

impl Cluster {
    pub(super) async fn create(binaries: &PgBinaries, initdb: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = rustix::process::geteuid().is_root();
        let user = root.then(|| User::named("postgres").unwrap());
        let cluster = Self { binaries: binaries.clone(), directory, user };
        cluster.own(cluster.directory.path());
        let data = cluster.data().display().to_string();
        let mut arguments =
            vec!["-D", &data, "--no-sync", "-A", "trust", "-U", "postgres", "--no-locale", "-E", "UTF8"];
        arguments.extend(initdb);
        cluster.run("initdb", &arguments).await;
        cluster
    }

    /// Makes a directory that the server may write to.
    pub(super) fn make_directory(&self, path: &str) {
        std::fs::create_dir(path).unwrap();
        self.own(Path::new(path));
    }

    fn own(&self, path: &Path) {
        if let Some(User { uid, gid }) = self.user {
            std::os::unix::fs::chown(path, Some(uid), Some(gid)).unwrap();
        }
    }

    pub(super) fn data(&self) -> PathBuf {
        self.path("data")
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(super) fn options(&self, settings: &[(&str, &str)]) -> InstanceOptions {
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        InstanceOptions {
            data_dir: self.data(),
            socket_dir: self.directory.path().to_owned(),
            port: 5432,
            settings,
            log_file: self.path("log"),
            as_user: self.user,
            listens: false,
            network: super::instance::Network::Shared,
        }
    }

    pub(super) async fn start(&self, settings: &[(&str, &str)]) -> Instance {
        let mut instance = Instance::start(&self.binaries, self.options(settings)).unwrap();
        let readiness = instance.wait_ready(LIMIT).await.unwrap();
        assert!(matches!(readiness, Readiness::Ready | Readiness::Standby));
        instance
    }

    pub(super) async fn stop(&self, mut instance: Instance) {
        instance.stop(StopMode::Fast, LIMIT).await.unwrap();
    }

    /// Runs a program as the server's user and returns what it printed.
    pub(super) async fn run(&self, program: &str, arguments: &[&str]) -> String {
        let (succeeded, text) = self.try_run(program, arguments).await;
        assert!(succeeded, "{program} {arguments:?}: {text}");
        text
    }

    pub(super) async fn try_run(&self, program: &str, arguments: &[&str]) -> (bool, String) {
        let mut command = self.binaries.command(program);
        command.args(arguments).env("TZ", "UTC").env("LC_ALL", "C").current_dir(self.directory.path());
        if let Some(user) = self.user {
            user.apply(&mut command);
        }
        let output = command.output().await.unwrap();
        let complaints = String::from_utf8_lossy(&output.stderr);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() { (true, text) } else { (false, format!("{text}{complaints}")) }
    }

    /// Runs each statement in a session and a transaction of its own.
    pub(super) async fn sql(&self, statements: &[&str]) -> String {
        let host = self.directory.path().display().to_string();
        let mut text = String::new();
        for statement in statements {
            let arguments = ["-XqAt", "-v", "ON_ERROR_STOP=1", "-h", &host, "-U", "postgres", "-c", statement];
            text += &self.run("psql", &arguments).await;
        }
        text
    }
}

/// All files below a directory, as paths relative to it.
pub(super) fn files_below(root: &Path) -> Vec<PathBuf> {
    let (mut files, mut open) = (Vec::new(), vec![root.to_owned()]);
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { open.push(path) } else { files.push(path.strip_prefix(root).unwrap().to_owned()) }
        }
    }
    files.sort();
    files
}
