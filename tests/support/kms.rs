//! Keys of the KMS emulator that can be made again: id and key material follow from a name, so that a region whose
//! emulator was wiped opens what it sealed before, and two regions can hold one key.

use aws_sdk_kms::Client;
use aws_sdk_kms::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_kms::types::Tag;
use base64::Engine as _;
use sha2::{Digest as _, Sha256};

use super::s3::{ACCESS_KEY, Endpoint, SECRET_KEY};

/// A client of the rig's own.
pub fn client(endpoint: &Endpoint) -> Client {
    let config = aws_sdk_kms::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .endpoint_url(&endpoint.url)
        .region(Region::from_static(endpoint.region))
        .credentials_provider(Credentials::new(ACCESS_KEY, SECRET_KEY, None, None, "rig"))
        .build();
    Client::from_conf(config)
}

/// Makes the key of this name and returns its ARN. The same name gives the same key on every emulator; use
/// [`unique`](super::unique) names on the shared ones.
pub async fn create_key(endpoint: &Endpoint, name: &str) -> String {
    let id = hex::encode(&Sha256::digest(format!("id {name}"))[..16]);
    let id = format!("{}-{}-4{}-a{}-{}", &id[..8], &id[8..12], &id[13..16], &id[17..20], &id[20..]);
    let material = base64::engine::general_purpose::STANDARD.encode(Sha256::digest(format!("material {name}")));
    let tag = |key: &str, value: &str| Tag::builder().tag_key(key).tag_value(value).build().unwrap();
    let created = client(endpoint)
        .create_key()
        .tags(tag("_custom_id_", &id))
        .tags(tag("_custom_key_material_", &material))
        .send()
        .await
        .unwrap_or_else(|error| panic!("key {name} in {}: {error:?}", endpoint.url));
    let metadata = created.key_metadata().expect("a new key has metadata");
    assert_eq!(metadata.key_id(), id, "the emulator ignores the tag that fixes the id");
    metadata.arn().expect("a key has an ARN").to_owned()
}
