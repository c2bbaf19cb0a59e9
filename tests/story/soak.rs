//! Crashes at random moments under load. The suite runs ten rounds; `scripts/soak` as many as you like.

use std::time::Duration;

use drctl::jobs::wal::control;
use drctl::model::Lsn;

use crate::restore::Protected;
use crate::support::ledger::Ledger;
use crate::support::process;

/// What a running receiver reports as durable, once one answers.
async fn reported_durable(protected: &Protected) -> Lsn {
    let socket = protected.home().join("state/ledger.sock");
    let target = "ledger".parse().unwrap();
    let mut durable = Lsn::INVALID;
    process::eventually("the receiver reports a durable position", Duration::from_secs(30), async || {
        let position = control::position(&socket, &target).await.unwrap();
        durable = position.map_or(Lsn::INVALID, |position| position.durable_lsn);
        durable > Lsn::INVALID
    })
    .await;
    durable
}

#[tokio::test]
async fn crashes_at_random_moments_lose_nothing_that_was_reported_durable() {
    let rounds = std::env::var("DRCTL_SOAK_ROUNDS").map_or(10, |rounds| rounds.parse().unwrap());
    let mut protected = Protected::new().await;
    let mut stream = protected.stream();
    let ledger = Ledger::start(&protected.cluster, 3).await;
    protected.backup().await;
    for round in 0..rounds {
        tokio::time::sleep(Duration::from_millis(rand::random_range(100..1500))).await;
        if round % 2 == 0 {
            stream.kill9();
            stream = protected.stream();
        } else {
            protected.cluster.crash().await;
        }
        ledger.wait_for(20).await;
        let durable = reported_durable(&protected).await;
        let restored = protected.restored(&format!("round-{round}"), &[]).await;
        // The book is closed after the restore: what came back must have been sent by then.
        let verdict =
            ledger.book().verify(&restored, durable).await.unwrap_or_else(|wrong| panic!("round {round}: {wrong}"));
        assert!(verdict.durable > 0, "round {round} proved nothing: {verdict:?}");
        restored.amcheck().await;
    }
    ledger.stop().await;
    stream.terminate().await.ok();
}
