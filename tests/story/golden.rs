//! The golden repository: what the first drctl of this format wrote comes back, with drctl and without it, and no bit of it
//! may be another. It is never made again, so these tests read a copy.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest as _, Sha256};

use crate::escape::{follow_the_last_lines, open, succeeded};
use crate::support::dirs::{Scratch, size_of};
use crate::support::drctl::{Drctl, Finished};
use crate::support::pg::{Cluster, bin_dir};
use crate::support::process;

const MAJOR: u32 = 15;

/// What is kept, copied to where it may be written to.
struct Golden {
    scratch: Scratch,
}

impl Golden {
    fn copy() -> Self {
        let scratch = Scratch::new();
        let to = scratch.join("golden");
        process::run(Command::new("cp").arg("-r").arg(kept()).arg(&to));
        fs::set_permissions(to.join("recovery.age"), fs::Permissions::from_mode(0o600)).unwrap();
        Self { scratch }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.join("golden").join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn signer(&self) -> String {
        self.text("README.md").lines().find_map(|line| line.trim().strip_prefix("signer ")).unwrap().to_owned()
    }

    /// drctl as on a machine that knows nothing: one region, one key, the signer.
    fn drctl(&self, arguments: &[&str]) -> Drctl {
        let (region, key) =
            (self.path("region").display().to_string(), self.path("recovery.age").display().to_string());
        let signer = self.signer();
        let known = ["--repo", &region, "--age-identity", &key, "--trust-signer", &signer];
        Drctl::new(known.iter().chain(arguments)).env(&format!("DRCTL_PG_BIN_{MAJOR}"), bin_dir(MAJOR))
    }

    async fn verify(&self) -> Finished {
        self.drctl(&["verify", "--level", "l2", "--scrub", "--json"]).expect_log("").run().await
    }

    /// Starts what came of a restore; it must say what the original said.
    async fn assert_answers(&self, restored: &Path) {
        let server = Cluster::start_restored_database(restored, MAJOR, "golden").await;
        assert_eq!(server.psql(&self.text("questions.sql")).await, self.text("answers.txt"));
    }

    /// Every object of the region, by name.
    fn objects(&self) -> Vec<(String, PathBuf)> {
        let files =
            process::run(Command::new("find").arg(self.path("region")).args(["-type", "f", "-printf", "%P\\n"]));
        let mut names: Vec<_> = files.lines().map(str::to_owned).collect();
        names.sort();
        names.into_iter().map(|name| (name.clone(), self.path("region").join(name))).collect()
    }
}

fn kept() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/1")
}

#[test]
fn it_is_what_was_kept_and_small() {
    let sums = fs::read_to_string(kept().join("SHA256SUMS")).unwrap();
    let mut files = 1;
    for line in sums.lines() {
        let (sum, name) = line.split_once("  ./").unwrap();
        let bytes = fs::read(kept().join(name)).unwrap();
        assert_eq!(hex::encode(Sha256::digest(&bytes)), sum, "{name} is not what was kept");
        files += 1;
    }
    let found = process::run(Command::new("find").arg(kept()).args(["-type", "f"]));
    assert_eq!(found.lines().count(), files, "{found}");
    assert!(size_of(&kept()) <= 1 << 20);
}

#[tokio::test]
async fn it_comes_back_without_drctl() {
    let golden = Golden::copy();
    let (restored, key, signer) = (golden.scratch.join("restored"), golden.path("recovery.age"), golden.signer());
    let arguments = ["ledger", restored.to_str().unwrap(), "--age-identity", key.to_str().unwrap()];
    let told = succeeded(&open(&golden.path("region"), &[&arguments[..], &["--trust-signer", &signer]].concat()));
    follow_the_last_lines(&restored, &told);
    golden.assert_answers(&restored).await;
}

#[tokio::test]
async fn it_comes_back_with_drctl() {
    let golden = Golden::copy();
    let restored = golden.scratch.join("restored");
    let restore = ["restore", "ledger", "--target-dir", restored.to_str().unwrap(), "--json"];
    let plan = golden.drctl(&restore).run().await.ok().json();
    let execute = ["--execute", "--plan", plan["digest"].as_str().unwrap()];
    golden.drctl(&[&restore[..], &execute].concat()).run().await.ok();
    golden.assert_answers(&restored).await;
}

#[tokio::test]
async fn it_verifies_and_holds_what_it_is_for() {
    let golden = Golden::copy();
    let report = golden.drctl(&["verify", "--level", "l2", "--scrub", "--json"]).run().await.ok().json();
    let backups = report["backups"].as_array().unwrap();
    assert!(backups.len() == 2 && backups.iter().all(|backup| backup["regions"][0]["level"] == "L2"), "{report}");
    let listed = golden.drctl(&["list", "--json"]).run().await.ok().json();
    let kinds: Vec<_> = listed["backups"].as_array().unwrap().iter().map(|backup| backup["kind"].clone()).collect();
    assert_eq!(kinds, ["incremental", "full"]);

    let objects = golden.objects();
    let below = |prefix: &str| objects.iter().filter(|(name, _)| name.starts_with(prefix)).count();
    assert!(below("packs/") > 3, "{objects:?}");
    let newest = listed["backups"][0]["id"].as_str().unwrap();
    let inventory = fs::read_to_string(golden.path(&format!("region/inventories/ledger/{newest}/000000"))).unwrap();
    assert_eq!(inventory.matches("\"keysets/").count(), 2, "{inventory}");
    let (mut kinds, mut epochs) = (Vec::new(), 0);
    for (_, path) in objects.iter().filter(|(name, _)| name.starts_with("wal/") && name.ends_with("/0000000000")) {
        let frame = fs::read(path).unwrap();
        let text = String::from_utf8_lossy(&frame).into_owned();
        kinds.extend(
            ["stream", "backup"].into_iter().filter(|kind| text.contains(&format!("\"epoch_kind\":\"{kind}\""))),
        );
        epochs += 1;
    }
    kinds.sort_unstable();
    assert_eq!((kinds, epochs), (vec!["backup", "stream"], 2));
}

/// What a restore does not rely on: the escape hatch and the addresses of siblings are for people, and an intent ends with
/// its COMMIT.
const NOT_RELIED_ON: [&str; 3] = ["escape/", "regions/", "intents/"];

#[tokio::test]
async fn a_flipped_bit_anywhere_in_it_is_told() {
    let golden = Golden::copy();
    golden.verify().await.ok();
    for (number, (name, path)) in golden.objects().into_iter().enumerate() {
        if NOT_RELIED_ON.iter().any(|class| name.starts_with(class)) {
            continue;
        }
        let good = fs::read(&path).unwrap();
        let mut wrong = good.clone();
        // Anywhere, and at another place in every object.
        let at = good.len() * (number * 7 % 31) / 31;
        wrong[at] ^= 1 << (number % 8);
        fs::write(&path, wrong).unwrap();
        let verified = golden.verify().await;
        assert_ne!(verified.code, Some(0), "byte {at} of {name}: {verified}");
        fs::write(&path, good).unwrap();
    }
    golden.verify().await.ok();
}
