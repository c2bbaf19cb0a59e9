//! A server with a network namespace of its own: it reaches no other machine and not even this one, whatever the database
//! in it asks for. Its socket is a file, and files are seen across network namespaces.

use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;
use tokio::process::Command;

use super::{PgBinaries, User};

/// A kernel that does not answer in this time does not do it.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// What a server sees of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// The host's.
    Shared,
    /// Nothing.
    Isolated,
}

impl Network {
    /// What this machine allows for a server that runs as `user`. A namespace takes a privilege, or a user namespace,
    /// which some kernels keep from ordinary accounts; the one way to know is to try.
    pub async fn probe(user: Option<User>) -> Self {
        let mut command = Command::new("unshare");
        command.args(arguments(user)).arg("true").kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match tokio::time::timeout(PROBE_LIMIT, command.status()).await {
            Ok(Ok(status)) if status.success() => Self::Isolated,
            _ => Self::Shared,
        }
    }

    /// The command for a server, as `user` if drctl is root.
    pub(super) fn command(self, binaries: &PgBinaries, user: Option<User>) -> Command {
        let user = user.filter(|_| rustix::process::geteuid().is_root());
        match self {
            Self::Isolated => binaries.behind("unshare", arguments(user), "postgres"),
            Self::Shared => {
                let mut command = binaries.command("postgres");
                if let Some(user) = user {
                    user.apply(&mut command);
                }
                command
            }
        }
    }
}

/// Root makes the namespace and drops to the account, without any supplementary group; anybody else makes it inside of a
/// user namespace in which they stay who they are, because PostgreSQL does not run as a root of whatever kind. `unshare`
/// becomes the program that it starts, so the process id stays the same.
fn arguments(user: Option<User>) -> Vec<String> {
    let identity = match user.filter(|_| rustix::process::geteuid().is_root()) {
        Some(User { uid, gid }) => vec![format!("--setgid={gid}"), format!("--setuid={uid}")],
        None => vec!["--map-current-user".to_owned()],
    };
    [vec!["--net".to_owned()], identity, vec!["--".to_owned()]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::instance::{Instance, StopMode};
    use crate::pg::testing::{Cluster, block_on, installed};

    /// Whichever the machine allows: the server answers on its socket, and sees the interfaces that it should.
    #[test]
    fn a_server_answers_on_its_socket_across_namespaces() {
        block_on(async {
            let cluster = Cluster::create(&installed().await[0], &[]).await;
            let mut options = cluster.options(&[]);
            options.network = Network::probe(options.as_user).await;
            let network = options.network;
            let mut instance = Instance::start(&cluster.binaries, options).unwrap();
            instance.wait_ready(Duration::from_secs(60)).await.unwrap();
            assert_eq!(cluster.sql(&["select 1"]).await, "1\n");
            let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
            let differs = namespace("self") != namespace(&instance.pid().to_string());
            assert_eq!(differs, network == Network::Isolated);
            instance.stop(StopMode::Fast, Duration::from_secs(60)).await.unwrap();
        });
    }
}
