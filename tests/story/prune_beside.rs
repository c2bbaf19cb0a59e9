//! Restores and backups beside a sweep, with regions so slow that they truly overlap: what stays comes back every time; what
//! goes comes back as it was, or not at all and with a reason.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::prune::Protected;
use crate::support::proxy::Mode;

/// What became of restores of one backup.
#[derive(Debug, Default)]
struct Tally {
    /// Began and ended while the sweep was at work.
    within: usize,
    came_back: usize,
    refused: Vec<String>,
}

/// Restores `id` again and again until the sweep is over and once more after it.
async fn keep_restoring(protected: &Protected, (id, text): (&str, &str), sweeping: &AtomicBool) -> Tally {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let mut tally = Tally::default();
    loop {
        let at_work = sweeping.load(Ordering::Acquire);
        let place = protected.scratch.join(&format!("back-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        match restore(protected, id, &place).await {
            Ok(()) => {
                let file = place.join(protected.root().strip_prefix("/").unwrap()).join("file");
                assert!(fs::read_to_string(&file).unwrap() == text, "{id} came back as something else");
                tally.came_back += 1;
            }
            Err(told) => tally.refused.push(told),
        }
        tally.within += usize::from(at_work && sweeping.load(Ordering::Acquire));
        if !at_work {
            return tally;
        }
    }
}

/// Plans a restore and runs it; what it says if one of both fails.
async fn restore(protected: &Protected, id: &str, place: &std::path::Path) -> Result<(), String> {
    let identity = protected.scratch.join("recovery.age");
    let line = ["--age-identity", identity.to_str().unwrap(), "restore", id, "--target-dir", place.to_str().unwrap()];
    let slow = |drctl: crate::support::drctl::Drctl| drctl.expect_log("region");
    let plan = slow(protected.drctl(&[&line[..], &["--json"]].concat())).run().await;
    let done = match plan.code {
        Some(0) => {
            let digest = plan.json()["digest"].as_str().unwrap().to_owned();
            slow(protected.drctl(&[&line[..], &["--plan", &digest, "--execute", "--json"]].concat())).run().await
        }
        _ => plan,
    };
    match done.code {
        Some(0) => Ok(()),
        Some(_) => {
            let error = done.json()["error"]["message"].as_str().unwrap_or_else(|| panic!("{done}")).to_owned();
            Err(error)
        }
        None => panic!("{done}"),
    }
}

/// Text that compresses to nothing less than half a megabyte.
fn text(name: &str) -> String {
    let mut state = name
        .bytes()
        .fold(0x9e37_79b9_7f4a_7c15u64, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut line = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        format!("{name} {state:016x}\n")
    };
    (0..40_000).map(|_| line()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restores_and_backups_beside_a_sweep_are_right_or_refused() {
    let protected = Protected::behind_proxies("keep_last = 2\ncount_undrilled = true\n").await;
    let mut backups = Vec::new();
    for name in ["pinned", "doomed", "doomed too", "stays", "newest"] {
        backups.push((protected.backup(&text(name)).await, text(name)));
    }
    protected.drctl(&["pin", &backups[0].0, "--reason", "audit"]).run().await.ok();
    protected.json(&["prune"]).await;
    let digest = protected.ripe().await.unwrap();
    for proxy in &protected.proxies {
        proxy.set(Mode::Delay(Duration::from_millis(25))).await;
    }
    let sweeping = AtomicBool::new(true);
    let sweep = async {
        let mut done = protected.execute(&digest).run().await;
        // A COMMIT that is on its way to one of the regions refuses the run; the next one goes on.
        while done.code == Some(5) && done.stdout.contains("is not whole") {
            done = protected.execute(&digest).run().await;
        }
        sweeping.store(false, Ordering::Release);
        done.ok().json()
    };
    let of = |number: usize| keep_restoring(&protected, (&backups[number].0, &backups[number].1), &sweeping);
    let beside = async { protected.backup(&text("beside")).await };
    let (swept, pinned, stays, doomed, doomed_too, beside) = tokio::join!(sweep, of(0), of(3), of(1), of(2), beside);
    let gone = swept["swept"]["backups"].as_array().unwrap();
    assert_eq!(gone.len(), 2, "{swept:#}");
    for tally in [&pinned, &stays] {
        assert!(tally.refused.is_empty() && tally.within > 0, "{tally:#?}");
    }
    for tally in [&doomed, &doomed_too] {
        // The last one began when it was gone.
        assert!(!tally.refused.is_empty(), "{tally:#?}");
    }
    assert!(doomed.came_back + doomed_too.came_back > 0, "no restore was ahead of the sweep");
    for proxy in &protected.proxies {
        proxy.set(Mode::Pass).await;
    }
    let ids = protected.ids().await;
    assert!(ids.contains(&beside) && !ids.contains(&backups[1].0), "{ids:?}");
    restore(&protected, &beside, &protected.scratch.join("beside")).await.unwrap();
    protected.drctl(&["verify", "--scrub"]).run().await.ok();
}
