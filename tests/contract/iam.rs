//! The policies of `deploy/iam` allow what drctl calls, role by role, and nothing that undoes a lock.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

/// Which permission each call of the S3 client needs.
const NEEDS: [(&str, &[&str]); 12] = [
    ("put_object", &["s3:PutObject", "s3:PutObjectRetention"]),
    ("get_object", &["s3:GetObject"]),
    ("head_object", &["s3:GetObject"]),
    ("head_bucket", &["s3:ListBucket"]),
    ("list_objects_v2", &["s3:ListBucket"]),
    ("list_object_versions", &["s3:ListBucketVersions"]),
    ("delete_object", &["s3:DeleteObject", "s3:DeleteObjectVersion"]),
    ("get_bucket_versioning", &["s3:GetBucketVersioning"]),
    ("get_object_lock_configuration", &["s3:GetBucketObjectLockConfiguration"]),
    ("put_object_retention", &["s3:PutObjectRetention"]),
    ("get_object_retention", &["s3:GetObjectRetention"]),
    ("get_object_legal_hold", &["s3:GetObjectLegalHold"]),
];

/// Calls that only prune makes; repair of wrong bytes makes them as well, by a person with more rights.
const PRUNE_ALONE: [&str; 3] = ["list_object_versions", "delete_object", "get_object_legal_hold"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The calls that the sources make of a client, such as `self.client.put_object()`.
fn called(directory: &str) -> BTreeSet<String> {
    let mut calls = BTreeSet::new();
    for entry in fs::read_dir(root().join(directory)).unwrap() {
        let text: String = fs::read_to_string(entry.unwrap().path()).unwrap().split_whitespace().collect();
        let after =
            text.match_indices("self.client.").map(|(at, found)| text[at + found.len()..].split('(').next().unwrap());
        calls.extend(after.map(str::to_owned));
    }
    calls
}

/// What a policy allows, and what it denies.
fn policy(role: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let path = root().join(format!("deploy/iam/{role}.json"));
    let policy: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(policy["Version"], "2012-10-17");
    let mut sets: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for statement in policy["Statement"].as_array().unwrap() {
        let actions = statement["Action"].as_array().unwrap().iter().map(|action| action.as_str().unwrap().to_owned());
        sets.entry(statement["Effect"].as_str().unwrap()).or_default().extend(actions);
        assert!(statement["Resource"].is_string() || statement["Resource"].is_array(), "{statement}");
    }
    let mut take = |effect| sets.remove(effect).unwrap_or_default();
    (take("Allow"), take("Deny"))
}

#[test]
fn every_call_that_is_made_is_known_here() {
    let calls = called("src/store/s3");
    assert_eq!(calls, NEEDS.iter().map(|(call, _)| (*call).to_owned()).collect());
}

#[test]
fn each_role_is_allowed_its_calls_and_no_way_around_a_lock() {
    for role in ["write", "restore", "prune"] {
        let (allowed, denied) = policy(role);
        let calls = NEEDS.iter().filter(|(call, _)| role == "prune" || !PRUNE_ALONE.contains(call));
        let needed: BTreeSet<_> = calls.flat_map(|(_, actions)| *actions).map(|action| (*action).to_owned()).collect();
        let of_s3: BTreeSet<_> = allowed.iter().filter(|action| action.starts_with("s3:")).cloned().collect();
        assert_eq!(of_s3, needed, "{role}");
        assert!(allowed.is_disjoint(&denied), "{role}: {allowed:?} {denied:?}");
        for never in
            ["s3:BypassGovernanceRetention", "s3:PutBucketObjectLockConfiguration", "s3:PutLifecycleConfiguration"]
        {
            assert!(denied.contains(never), "{role} may {never}");
        }
        let deletes = allowed.iter().any(|action| action.starts_with("s3:Delete"));
        let (opens, seals) = (allowed.contains("kms:Decrypt"), allowed.contains("kms:Encrypt"));
        assert_eq!((deletes, opens, seals), (role == "prune", role == "restore", role != "prune"), "{role}");
    }
}
