//! What happens to those who write, receive and store WAL.

use std::time::Duration;

use rand::Rng as _;
use rustix::process::Signal;

use super::evidence::Promise;
use super::restores::{Moment, Point};
use super::{LIMIT, Mode, Soak};
use crate::support::pg::End;

/// One of them at a time, but for regions, which may be lost beside others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blow {
    /// SIGKILL for the receiver.
    ReceiverDies,
    /// SIGKILL for the server.
    ServerDies,
    /// Both, and they come back in either order.
    BothDie,
    /// One region is lost for some seconds; the receiver may die meanwhile.
    RegionLost,
    /// Two of three, so that nothing is acknowledged.
    QuorumLost,
    /// The receiver is stopped for longer than the server waits for it.
    ReceiverSleeps,
    /// The same, and another receiver takes its place before it wakes up.
    ReceiverReplaced,
    /// The standby is promoted, and the old primary copied anew.
    ServerReplaced,
}

type Restore = Option<(Moment, Point)>;

impl Blow {
    pub(super) const ALL: [Self; 8] = [
        Self::ReceiverDies,
        Self::ServerDies,
        Self::BothDie,
        Self::RegionLost,
        Self::QuorumLost,
        Self::ReceiverSleeps,
        Self::ReceiverReplaced,
        Self::ServerReplaced,
    ];
}

impl Soak {
    /// Gives the restore back that is still to be made.
    pub(super) async fn blow(&mut self, blow: Blow, mut restore: Restore) -> Restore {
        match blow {
            Blow::ReceiverDies => {
                self.receivers.kill9();
                self.meanwhile(&mut restore, (100, 1500)).await;
                self.receivers.start();
            }
            Blow::ServerDies => {
                self.pair.primary_mut().kill9().await;
                self.meanwhile(&mut restore, (100, 1000)).await;
                self.pair.primary_mut().start().await;
            }
            Blow::BothDie => self.both_die(&mut restore).await,
            Blow::RegionLost => self.region_lost(&mut restore).await,
            // What is durable is in two regions, so that one alone need not have it.
            Blow::QuorumLost => self.quorum_lost().await,
            Blow::ReceiverSleeps => {
                self.receivers.signal(Signal::STOP);
                self.meanwhile(&mut restore, (4000, 5500)).await;
                self.receivers.signal(Signal::CONT);
            }
            Blow::ReceiverReplaced => self.receiver_replaced(&mut restore).await,
            Blow::ServerReplaced => self.server_replaced(&mut restore).await,
        }
        restore
    }

    /// Time passes, or a restore is made.
    async fn meanwhile(&mut self, restore: &mut Restore, (low, high): (u64, u64)) {
        let pause = self.draw(low, high);
        tokio::time::sleep(pause).await;
        if let Some((_, point)) = restore.take_if(|(moment, _)| *moment == Moment::During) {
            self.restore(point).await;
        }
    }

    async fn both_die(&mut self, restore: &mut Restore) {
        self.receivers.kill9();
        let between = self.draw(0, 500);
        tokio::time::sleep(between).await;
        self.pair.primary_mut().kill9().await;
        self.meanwhile(restore, (100, 1000)).await;
        let receiver_first = self.chance.random_bool(0.5);
        if receiver_first {
            self.receivers.start();
        }
        self.pair.primary_mut().start().await;
        if !receiver_first {
            self.receivers.start();
        }
    }

    async fn region_lost(&mut self, restore: &mut Restore) {
        self.sky.lose(1, &self.rig, &mut self.chance).await;
        self.meanwhile(restore, (1000, 3000)).await;
        if self.chance.random_bool(0.5) {
            self.receivers.kill9();
            self.receivers.start();
        }
        self.meanwhile(restore, (500, 2000)).await;
        self.sky.clear(&self.rig).await;
    }

    async fn quorum_lost(&mut self) {
        self.sky.lose(2, &self.rig, &mut self.chance).await;
        self.meanwhile(&mut None, (500, 3000)).await;
        if self.chance.random_bool(0.5) {
            self.receivers.kill9();
            self.receivers.start();
        }
        self.meanwhile(&mut None, (500, 3000)).await;
        self.sky.clear(&self.rig).await;
    }

    async fn receiver_replaced(&mut self, restore: &mut Restore) {
        self.receivers.stand_by(LIMIT).await;
        // Frames may be on their way, in one region each, when it falls asleep.
        let blind = self.chance.random_bool(0.5);
        if blind {
            self.sky.lose(2, &self.rig, &mut self.chance).await;
            self.meanwhile(&mut None, (200, 1500)).await;
        }
        self.receivers.signal(Signal::STOP);
        if blind {
            self.sky.clear(&self.rig).await;
        }
        let sleeper = self.receivers.succeeded(LIMIT).await;
        self.meanwhile(restore, (200, 2000)).await;
        sleeper.wake();
        // Nobody is in the way of one that wakes up when its successor is dead: only the SEAL is.
        let alone = self.chance.random_bool(0.5);
        if alone {
            self.receivers.kill9();
        }
        let ended = sleeper.ends(Duration::from_secs(if alone { 30 } else { 10 })).await;
        assert!(ended.is_some() || !alone, "a receiver goes on that was taken over");
        self.tally.sealed_out += usize::from(ended.is_some());
        if alone {
            self.receivers.start();
        }
    }

    async fn server_replaced(&mut self, restore: &mut Restore) {
        // A standby that lags loses what drctl has: it stays on the old timeline.
        let lags = self.mode == Mode::Asynchronous && self.chance.random_bool(0.4);
        let end = if self.chance.random_bool(0.3) { End::Stopped } else { End::Killed };
        if lags {
            self.pair.detach().await;
            self.meanwhile(&mut None, (1500, 3000)).await;
        }
        let receiver_dies = end == End::Killed && self.chance.random_bool(0.3);
        if receiver_dies {
            self.receivers.kill9();
        }
        let before = self.witness.promise();
        let (timeline, left) = self.pair.fail_over(end).await;
        // By then the server that holds what came last is dead, and exposure speaks of another one.
        let promise = Promise { point: before.point, ..self.witness.promise() };
        println!("       timeline {timeline} was left at {left} ({end:?}); {:?} were durable", promise.durable);
        self.past.left.insert(timeline, left);
        if receiver_dies {
            self.receivers.start();
        }
        self.meanwhile(restore, (0, 500)).await;
        self.pair.rebuild().await;
        if promise.durable.get(&timeline).is_some_and(|durable| *durable > left) {
            self.restore_tail(timeline, promise).await;
        }
    }
}
