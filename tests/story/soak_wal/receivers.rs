//! Two hosts that can receive the WAL of one target, each with a state directory of its own. One of them owns it at a time.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use drctl::jobs::wal::{Position, State, control};
use rustix::process::Signal;

use crate::support::drctl::{Background, Drctl, Finished};
use crate::support::process;
use crate::wal::Rig;

/// What may be logged while regions, servers and other receivers come and go.
const TROUBLE: [&str; 9] = [
    "config file overridden",
    "region",
    "replication slot",
    "write quorum",
    "an epoch cannot be opened",
    "the epoch cannot be continued",
    "taken over",
    "is not readable",
    "the receiver's answer",
];

#[derive(Debug)]
struct Host {
    config: PathBuf,
    socket: PathBuf,
    running: Option<Background>,
}

/// Who receives.
#[derive(Debug)]
pub(super) struct Receivers {
    hosts: [Host; 2],
    /// Which of them is to stream.
    pub(super) owner: usize,
}

impl Receivers {
    pub(super) fn of(rig: &Rig) -> Self {
        let text = std::fs::read_to_string(&rig.config).unwrap();
        let elsewhere = rig.scratch.join("elsewhere.toml");
        std::fs::write(&elsewhere, text.replace("state_dir = \"state\"", "state_dir = \"elsewhere\"")).unwrap();
        let host = |config, state: &str| {
            let socket = rig.scratch.join(state).join("ledger.sock");
            Host { config, socket, running: None }
        };
        Self { hosts: [host(rig.config.clone(), "state"), host(elsewhere, "elsewhere")], owner: 0 }
    }

    pub(super) fn sockets(&self) -> Vec<PathBuf> {
        self.hosts.iter().map(|host| host.socket.clone()).collect()
    }

    /// A command on the owner's host.
    pub(super) fn drctl(&self, arguments: &[&str]) -> Drctl {
        self.here(Drctl::new(arguments))
    }

    /// The same for another command.
    pub(super) fn here(&self, drctl: Drctl) -> Drctl {
        let drctl = drctl.config(&self.hosts[self.owner].config);
        TROUBLE.into_iter().fold(drctl, Drctl::expect_log)
    }

    pub(super) fn start(&mut self) {
        let stream = self.drctl(&["wal", "stream", "ledger"]).spawn();
        self.hosts[self.owner].running = Some(stream);
    }

    pub(super) fn kill9(&mut self) {
        self.hosts[self.owner].running.take().expect("the owner runs").kill9();
    }

    /// SIGSTOP or SIGCONT for the owner.
    pub(super) fn signal(&self, signal: Signal) {
        process::signal(self.hosts[self.owner].running.as_ref().expect("the owner runs").pid(), signal);
    }

    /// The other host begins to receive, too, and finds the slot in use.
    pub(super) async fn stand_by(&mut self, limit: Duration) {
        self.owner = 1 - self.owner;
        self.start();
        self.owner = 1 - self.owner;
        let in_use = |position: &Position| position.last_error.as_ref().is_some_and(|why| why.contains("in use"));
        self.wait("standing by", 1 - self.owner, limit, in_use).await;
    }

    /// The other host has the slot now. Tells where the one before is.
    pub(super) async fn succeeded(&mut self, limit: Duration) -> Sleeper {
        let successor = 1 - self.owner;
        self.wait("the successor streams", successor, limit, |position| position.state == State::Streaming).await;
        let sleeper = Sleeper(self.hosts[self.owner].running.take().expect("the owner ran"));
        self.owner = successor;
        sleeper
    }

    /// Waits for what host number `host` says of itself, and fails as soon as it ends.
    pub(super) async fn wait(
        &mut self,
        what: &str,
        host: usize,
        limit: Duration,
        reached: impl Fn(&Position) -> bool,
    ) -> Position {
        let (deadline, target) = (Instant::now() + limit, "ledger".parse().unwrap());
        loop {
            let Host { socket, running, .. } = &mut self.hosts[host];
            if !running.as_mut().expect("it was started").is_running() {
                panic!("{what}: the receiver ended: {}", running.take().unwrap().wait().await);
            }
            match control::position(socket, &target).await {
                Ok(Some(position)) if reached(&position) => return position,
                last => assert!(Instant::now() < deadline, "{what}: not within {limit:?}: {last:?}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(super) async fn stop(&mut self) -> Finished {
        let finished = self.hosts[self.owner].running.take().expect("the owner runs").terminate().await;
        assert!(matches!(finished.code, Some(0 | 4)), "{finished}");
        finished
    }
}

/// A receiver that slept while another one took its place.
#[derive(Debug)]
pub(super) struct Sleeper(Background);

impl Sleeper {
    pub(super) fn wake(&self) {
        process::signal(self.0.pid(), Signal::CONT);
    }

    /// It is told as soon as it tries to store something, and ends. If nothing was on its way when it fell asleep, it waits
    /// for the slot like any other and ends here; `None` then.
    pub(super) async fn ends(mut self, limit: Duration) -> Option<Finished> {
        let deadline = Instant::now() + limit;
        while self.0.is_running() {
            if Instant::now() > deadline {
                self.0.kill9();
                return None;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let finished = self.0.wait().await.code(5);
        assert!(finished.stderr.contains("was taken over by another writer"), "{finished}");
        Some(finished)
    }
}
