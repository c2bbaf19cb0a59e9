//! Where the programs of a PostgreSQL version are, and who runs them.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use super::{InstanceError, beside};

/// What a server needs of the environment; credentials of the parent are not among it.
const ENVIRONMENT: [&str; 6] = ["PATH", "TZ", "LANG", "LC_ALL", "HOME", "TMPDIR"];

/// The programs of one major version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PgBinaries {
    /// The major version.
    pub major: u32,
    /// Where they are.
    pub directory: PathBuf,
    /// Their libraries, if the system's loader does not look there.
    pub libraries: Option<PathBuf>,
}

/// `pg_dump`, `pg_dumpall` and `pg_restore` of one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientPrograms {
    /// Where they are.
    pub binaries: PgBinaries,
    /// What `pg_dump --version` prints.
    pub version: String,
}

impl PgBinaries {
    /// Looks in `explicit` only, or else in `DRCTL_PG_BIN_<major>` only, or else in the packages' usual places and PATH.
    ///
    /// # Errors
    /// [`InstanceError::NoBinaries`] if no `postgres` of this version is there.
    pub async fn find(major: u32, explicit: Option<&Path>) -> Result<Self, InstanceError> {
        let named = explicit.map(Path::to_owned).or_else(|| named_by_environment(major));
        let candidates = match named {
            Some(directory) => vec![directory],
            None => usual_places(major),
        };
        for directory in &candidates {
            let binaries = Self::in_directory(major, directory.clone());
            if binaries.reports_version().await == Some(major) {
                return Ok(binaries);
            }
        }
        Err(InstanceError::NoBinaries { major, tried: candidates })
    }

    /// Looks for `pg_dump` and its kin, which machines without a server have, too: in `explicit`, where a newer version
    /// will do as well, or else as [`find`](Self::find) does.
    ///
    /// # Errors
    /// [`InstanceError::NoBinaries`] if no `pg_dump` that fits is there.
    pub async fn find_client(major: u32, explicit: Option<&Path>) -> Result<ClientPrograms, InstanceError> {
        let named = explicit.map(Path::to_owned).or_else(|| named_by_environment(major));
        let candidates = match named {
            Some(directory) => vec![directory],
            None => usual_places(major),
        };
        for directory in &candidates {
            let mut binaries = Self::in_directory(major, directory.clone());
            let Some((found, version)) = binaries.version_of("pg_dump").await else { continue };
            if found == major || explicit.is_some() && found > major {
                binaries.major = found;
                return Ok(ClientPrograms { binaries, version });
            }
        }
        Err(InstanceError::NoBinaries { major, tried: candidates })
    }

    fn in_directory(major: u32, directory: PathBuf) -> Self {
        let libraries = directory.parent().map(|parent| parent.join("lib"));
        let libraries = libraries.filter(|path| {
            let is_system = ["/lib", "/usr/lib", "/usr/local/lib"].iter().any(|known| path == Path::new(known));
            path.is_dir() && !is_system
        });
        Self { major, directory, libraries }
    }

    /// The version that `postgres` prints: another one in a directory of this name would not read the cluster.
    async fn reports_version(&self) -> Option<u32> {
        self.version_of("postgres").await.map(|(major, _)| major)
    }

    /// The major version of a program and the line that it prints.
    async fn version_of(&self, program: &str) -> Option<(u32, String)> {
        let output = self.command(program).arg("--version").stderr(Stdio::null()).output().await.ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let number = text.strip_prefix(program)?.strip_prefix(" (PostgreSQL) ")?;
        let digits = number.find(|character: char| !character.is_ascii_digit()).unwrap_or(number.len());
        Some((number.get(..digits)?.parse().ok()?, text.trim().to_owned()))
    }

    /// A command for one of the programs, with a bare environment and no standard input.
    pub fn command(&self, program: &str) -> Command {
        self.furnish(Command::new(self.directory.join(program)))
    }

    /// As [`command`](Self::command), for one that ends when the thread that starts it ends, however that ends. Only drctl
    /// itself can start it.
    pub fn command_beside(&self, program: &str) -> Command {
        self.behind(beside::SELF, beside::words(), program)
    }

    /// As [`command`](Self::command), started by another program that becomes it.
    pub(super) fn behind(&self, starter: &str, arguments: Vec<String>, program: &str) -> Command {
        let mut command = Command::new(starter);
        command.args(arguments).arg(self.directory.join(program));
        self.furnish(command)
    }

    fn furnish(&self, mut command: Command) -> Command {
        command.env_clear().stdin(Stdio::null());
        command.envs(ENVIRONMENT.iter().filter_map(|name| Some((*name, std::env::var_os(name)?))));
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command
    }
}

fn named_by_environment(major: u32) -> Option<PathBuf> {
    let value = std::env::var_os(format!("DRCTL_PG_BIN_{major}"))?;
    Some(PathBuf::from(value)).filter(|path| !path.as_os_str().is_empty())
}

fn usual_places(major: u32) -> Vec<PathBuf> {
    let packaged = [format!("/usr/lib/postgresql/{major}/bin"), format!("/usr/pgsql-{major}/bin")];
    let path = std::env::var_os("PATH").unwrap_or_default();
    packaged.iter().map(PathBuf::from).chain(std::env::split_paths(&path).collect::<Vec<_>>()).collect()
}

/// The account that servers run as when drctl itself is root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
}

impl User {
    /// Looks the account up in `/etc/passwd`.
    ///
    /// # Errors
    /// No such account there.
    pub fn named(name: &str) -> Result<Self, InstanceError> {
        let passwd = std::fs::read_to_string("/etc/passwd")
            .map_err(|source| InstanceError::Io { what: "read /etc/passwd".to_owned(), source })?;
        Self::find(&passwd, name).ok_or_else(|| InstanceError::NoUser(name.to_owned()))
    }

    fn find(passwd: &str, name: &str) -> Option<Self> {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            if fields.next() != Some(name) {
                return None;
            }
            Some(Self { uid: fields.nth(1)?.parse().ok()?, gid: fields.next()?.parse().ok()? })
        })
    }

    /// Makes the command run as this account, without any supplementary group.
    pub fn apply(self, command: &mut Command) {
        command.uid(self.uid).gid(self.gid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_found_by_its_whole_name() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\npostgres2:x:1:2::/:/\npostgres:x:104:110:PG:/var/lib:/bin/sh\n";
        assert_eq!(User::find(passwd, "postgres"), Some(User { uid: 104, gid: 110 }));
        assert_eq!(User::find(passwd, "post"), None);
    }
}
