//! The contract of `keys`, on age and on real KMS endpoints.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_kms::config::{BehaviorVersion, Credentials, Region};
use base64::Engine as _;
use chrono::DateTime;
use drctl::codec::SystemRng;
use drctl::keys::{
    AgeHolder, AgeOpener, AwsCredentials, KeyError, KeyHolder, KeyOpener, Keyset, KmsAccess, KmsHolder, KmsOpener,
    Wrap, WrapContext, generate_identity, open_any, wrap_everywhere,
};
use drctl::model::{Error, HolderId, KeysetId, Kind, RegionName, RepositoryId};

const DEADLINE: Duration = Duration::from_secs(20);

/// A holder, its opener, and what keeps them alive.
struct Party {
    holder: Arc<dyn KeyHolder>,
    opener: Arc<dyn KeyOpener>,
    files: Option<tempfile::TempDir>,
}

fn keyset() -> Keyset {
    let repository = RepositoryId::new(&SystemRng).unwrap();
    Keyset::generate(&repository, &"ledger".parse().unwrap(), &SystemRng).unwrap()
}

fn age_party() -> Party {
    let (text, recipient) = generate_identity(DateTime::default());
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("key.txt");
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600).open(&path).unwrap().write_all(text.as_bytes()).unwrap();
    let opener = AgeOpener::from_files(&[path]).unwrap();
    Party { holder: Arc::new(AgeHolder::new(&recipient).unwrap()), opener: Arc::new(opener), files: Some(files) }
}

/// One KMS server and the AWS region that its tests sign for.
struct Kms {
    name: RegionName,
    aws_region: &'static str,
    endpoint: String,
}

impl Kms {
    fn from_env(variable: &str, name: &str, aws_region: &'static str) -> Self {
        let endpoint = std::env::var(variable)
            .unwrap_or_else(|_| panic!("{variable} names no S3 and KMS endpoint: run the tests with scripts/test"));
        Self { name: name.parse().unwrap(), aws_region, endpoint }
    }

    fn a() -> Self {
        Self::from_env("DRCTL_TEST_S3_A", "a", "us-east-1")
    }

    fn b() -> Self {
        Self::from_env("DRCTL_TEST_S3_B", "b", "eu-central-1")
    }

    fn access(&self) -> KmsAccess {
        access(&self.endpoint)
    }

    fn admin(&self) -> aws_sdk_kms::Client {
        let config = aws_sdk_kms::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .credentials_provider(Credentials::new("test", "test", None, None, "test"))
            .region(Region::new(self.aws_region))
            .endpoint_url(&self.endpoint);
        aws_sdk_kms::Client::from_conf(config.build())
    }

    async fn create_key(&self) -> String {
        self.admin().create_key().send().await.unwrap().key_metadata.unwrap().arn.unwrap()
    }

    async fn holder(&self, key: &str) -> Arc<dyn KeyHolder> {
        Arc::new(KmsHolder::connect(&self.name, key, self.aws_region, &self.access()).await.unwrap())
    }

    fn opener(&self) -> Arc<dyn KeyOpener> {
        Arc::new(KmsOpener::new(self.access(), BTreeMap::new()))
    }

    async fn party(&self) -> Party {
        Party { holder: self.holder(&self.create_key().await).await, opener: self.opener(), files: None }
    }
}

fn access(endpoint: &str) -> KmsAccess {
    let (access_key_id, secret_access_key) = ("test".to_owned(), "test".to_owned());
    KmsAccess {
        endpoint: Some(endpoint.to_owned()),
        credentials: AwsCredentials::Static { access_key_id, secret_access_key, session_token: None },
        timeout: Duration::from_secs(10),
    }
}

async fn wrap(holder: &Arc<dyn KeyHolder>, keyset: &Keyset) -> Wrap {
    holder.wrap(keyset.context(), &keyset.to_secret()).await.unwrap()
}

/// What every holder and opener must do.
async fn honours_the_contract(party: Party) {
    let keyset = keyset();
    let wrap = wrap(&party.holder, &keyset).await;
    assert_eq!((&wrap.holder, &wrap.context), (party.holder.id(), keyset.context()));
    assert!(party.opener.fits(&wrap));
    let secret = party.opener.open(keyset.context(), &wrap).await.unwrap();
    assert_eq!(*secret, *keyset.to_secret());

    is_bound_to_every_field(&party, &keyset, &wrap).await;
    hides_no_flipped_bit(&party, &keyset, &wrap).await;

    let elsewhere = WrapContext { target: "other".parse().unwrap(), ..keyset.context().clone() };
    let error = party.holder.wrap(&elsewhere, &keyset.to_secret()).await.unwrap_err();
    assert!(matches!(error, KeyError::Invalid { .. }), "a secret is wrapped under its own context only: {error}");
    drop(party.files);
}

/// Asked for another context, and handed a wrap that was relabelled to it, the opener refuses both.
async fn is_bound_to_every_field(party: &Party, keyset: &Keyset, wrap: &Wrap) {
    let own = keyset.context();
    let others = [
        WrapContext { repository: RepositoryId::new(&SystemRng).unwrap(), ..own.clone() },
        WrapContext { target: "ledger2".parse().unwrap(), ..own.clone() },
        WrapContext { keyset: KeysetId::new(&SystemRng).unwrap(), ..own.clone() },
    ];
    for other in others {
        let error = party.opener.open(&other, wrap).await.unwrap_err();
        assert!(matches!(error, KeyError::Wrong { .. }), "{error}");
        let relabelled = Wrap { context: other.clone(), ..wrap.clone() };
        let error = party.opener.open(&other, &relabelled).await.unwrap_err();
        assert!(matches!(error, KeyError::Wrong { .. }), "{error}");
    }
}

/// Every bit of the stored object. The expensive question, to the holder itself, is asked for few bits in the middle
/// of the ciphertext and for all that the reader of the record lets pass elsewhere.
async fn hides_no_flipped_bit(party: &Party, keyset: &Keyset, wrap: &Wrap) {
    let mut stored = wrap.to_bytes().unwrap();
    let ciphertext = stored.windows(14).position(|window| window == b"\"ciphertext\":\"").unwrap() + 14;
    let mut asked = 0;
    for bit in 0..stored.len() * 8 {
        stored[bit / 8] ^= 1 << (bit % 8);
        if let Ok(flipped) = Wrap::from_bytes(&wrap.holder, &stored)
            && (bit / 8 < ciphertext || (bit / 8 - ciphertext) % 29 == 0)
        {
            asked += 1;
            let opened = party.opener.open(keyset.context(), &flipped).await;
            assert!(
                !party.opener.fits(&flipped) || opened.is_err(),
                "bit {bit} of {}",
                String::from_utf8_lossy(&stored)
            );
        }
        stored[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(asked > 20, "only {asked} flipped records came through the reader");
    assert_eq!(Wrap::from_bytes(&wrap.holder, &stored).unwrap(), *wrap);
}

#[tokio::test]
async fn age_honours_the_contract() {
    honours_the_contract(age_party()).await;
}

#[tokio::test]
async fn kms_honours_the_contract() {
    honours_the_contract(Kms::a().party().await).await;
}

#[tokio::test]
async fn the_stock_age_tool_opens_an_age_wrap() {
    let (party, keyset) = (age_party(), keyset());
    let wrap = wrap(&party.holder, &keyset).await;
    let sealed = base64::engine::general_purpose::STANDARD.decode(&wrap.ciphertext).unwrap();
    let key = party.files.as_ref().unwrap().path().join("key.txt");
    let mut child = Command::new("age")
        .args(["-d", "-i"])
        .arg(&key)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("install age: the escape hatch needs it: {error}"));
    child.stdin.take().unwrap().write_all(&sealed).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, **keyset.to_secret());

    let recipient = Command::new("age-keygen").arg("-y").arg(&key).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&recipient.stdout).trim_end(), wrap.key);
}

#[tokio::test]
async fn an_identity_of_the_stock_age_tool_opens_a_wrap() {
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("stock.txt");
    assert!(Command::new("age-keygen").arg("-o").arg(&key).stderr(Stdio::null()).status().unwrap().success());
    let recipient = Command::new("age-keygen").arg("-y").arg(&key).output().unwrap();
    let holder = AgeHolder::new(String::from_utf8_lossy(&recipient.stdout).trim_end()).unwrap();
    let keyset = keyset();
    let wrap = holder.wrap(keyset.context(), &keyset.to_secret()).await.unwrap();
    let opener = AgeOpener::from_files(&[key]).unwrap();
    assert_eq!(*opener.open(keyset.context(), &wrap).await.unwrap(), *keyset.to_secret());
    assert!(!age_party().opener.fits(&wrap));
}

#[tokio::test]
async fn what_is_no_recipient_is_refused() {
    let (_, recipient) = generate_identity(DateTime::default());
    for text in ["", "age1", "ssh-ed25519 AAAA", &recipient[..61], &recipient.replace("age1", "age2")] {
        assert!(matches!(AgeHolder::new(text), Err(KeyError::Invalid { .. })), "{text}");
    }
}

#[tokio::test]
async fn an_alias_is_resolved_to_the_key_that_answered() {
    let kms = Kms::b();
    let arn = kms.create_key().await;
    let alias = format!("alias/drctl-{}", KeysetId::new(&SystemRng).unwrap());
    kms.admin().create_alias().alias_name(&alias).target_key_id(&arn).send().await.unwrap();
    let (holder, keyset) = (kms.holder(&alias).await, keyset());
    let wrap = wrap(&holder, &keyset).await;
    assert_eq!((wrap.key.as_str(), wrap.aws_region.as_deref()), (arn.as_str(), Some("eu-central-1")));

    // The alias moves on; the wrap still opens with the key that made it.
    let next = kms.create_key().await;
    kms.admin().update_alias().alias_name(&alias).target_key_id(next).send().await.unwrap();
    assert_eq!(*kms.opener().open(keyset.context(), &wrap).await.unwrap(), *keyset.to_secret());
}

#[tokio::test]
async fn a_disabled_or_dying_key_refuses() {
    let kms = Kms::a();
    let (arn, keyset) = (kms.create_key().await, keyset());
    let holder = kms.holder(&arn).await;
    let stored = wrap(&holder, &keyset).await;
    let refuses = async |state: &str| {
        let wrapped = holder.wrap(keyset.context(), &keyset.to_secret()).await.unwrap_err();
        assert!(matches!(wrapped, KeyError::Denied { .. }), "{state}: {wrapped}");
        let opened = kms.opener().open(keyset.context(), &stored).await.unwrap_err();
        assert!(matches!(opened, KeyError::Denied { .. }), "{state}: {opened}");
        assert!(opened.to_string().contains("us-east-1"), "{opened}");
    };
    kms.admin().disable_key().key_id(&arn).send().await.unwrap();
    refuses("disabled").await;
    kms.admin().enable_key().key_id(&arn).send().await.unwrap();
    kms.admin().schedule_key_deletion().key_id(&arn).pending_window_in_days(7).send().await.unwrap();
    refuses("pending deletion").await;
}

#[tokio::test]
async fn another_key_does_not_open_a_wrap() {
    let kms = Kms::a();
    let (holder, keyset) = (kms.holder(&kms.create_key().await).await, keyset());
    let stolen = Wrap { key: kms.create_key().await, ..wrap(&holder, &keyset).await };
    let error = kms.opener().open(keyset.context(), &stolen).await.unwrap_err();
    assert!(matches!(error, KeyError::Wrong { .. }), "{error}");
    let absent = kms.holder(&stolen.key.replace("key/", "key/0")).await;
    let error = absent.wrap(keyset.context(), &keyset.to_secret()).await.unwrap_err();
    assert!(matches!(error, KeyError::Denied { .. }), "{error}");
}

/// An address where nobody listens, and one where connections are taken and never answered.
fn dead_and_hanging() -> (String, String, TcpListener) {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let dead = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let hanging = format!("http://{}", silent.local_addr().unwrap());
    (dead, hanging, silent)
}

const ANY_ARN: &str = "arn:aws:kms:us-west-2:000000000000:key/11111111-2222-3333-4444-555555555555";

async fn holder_at(endpoint: &str, timeout: Duration) -> Arc<dyn KeyHolder> {
    let access = KmsAccess { timeout, ..access(endpoint) };
    Arc::new(KmsHolder::connect(&"c".parse().unwrap(), ANY_ARN, "us-west-2", &access).await.unwrap())
}

#[tokio::test]
async fn a_service_that_is_down_or_hangs_is_unavailable_in_time() {
    let (dead, hanging, _silent) = dead_and_hanging();
    let keyset = keyset();
    for endpoint in [&dead, &hanging] {
        let holder = holder_at(endpoint, Duration::from_millis(500)).await;
        #[allow(clippy::disallowed_methods, reason = "the test measures real time")]
        let start = Instant::now();
        let error = holder.wrap(keyset.context(), &keyset.to_secret()).await.unwrap_err();
        assert!(matches!(error, KeyError::Unavailable { .. }) && error.is_transient(), "{error}");
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        assert!(error.to_string().starts_with("KMS us-west-2 arn:"), "{error}");
    }
}

#[tokio::test]
async fn one_holder_that_fails_costs_no_other_wrap() {
    let (dead, hanging, _silent) = dead_and_hanging();
    let (a, b, offline, keyset) = (Kms::a().party().await, Kms::b().party().await, age_party(), keyset());
    let holders = [
        a.holder.clone(),
        holder_at(&dead, DEADLINE).await,
        b.holder.clone(),
        holder_at(&hanging, DEADLINE).await,
        offline.holder.clone(),
    ];
    let outcomes = wrap_everywhere(&holders, &keyset, Duration::from_secs(3)).await;
    let ids: Vec<&HolderId> = outcomes.iter().map(|(id, _)| id).collect();
    assert_eq!(ids, holders.iter().map(|holder| holder.id()).collect::<Vec<_>>());
    let good: Vec<bool> = outcomes.iter().map(|(_, outcome)| outcome.is_ok()).collect();
    assert_eq!(good, [true, false, true, false, true]);
    for (_, outcome) in &outcomes {
        assert!(matches!(outcome, Ok(_) | Err(KeyError::Unavailable { .. })), "{outcome:?}");
    }
    let wraps: Vec<Wrap> = outcomes.into_iter().filter_map(|(_, outcome)| outcome.ok()).collect();

    for (opener, by) in [(&a.opener, &a), (&b.opener, &b), (&offline.opener, &offline)] {
        let opened = open_any(std::slice::from_ref(opener), keyset.context(), &wraps, DEADLINE).await.unwrap();
        assert_eq!(*opened.keyset.to_secret(), *keyset.to_secret());
        assert_eq!(&opened.opened_by, by.holder.id());
    }
}

#[tokio::test]
async fn offline_holders_are_asked_last_and_still_open() {
    let (kms, offline, keyset) = (Kms::a().party().await, age_party(), keyset());
    let wraps = [wrap(&offline.holder, &keyset).await, wrap(&kms.holder, &keyset).await];
    let openers = [offline.opener.clone(), kms.opener.clone()];
    let opened = open_any(&openers, keyset.context(), &wraps, DEADLINE).await.unwrap();
    assert_eq!(&opened.opened_by, kms.holder.id());

    let (dead, _, _silent) = dead_and_hanging();
    let down: Arc<dyn KeyOpener> = Arc::new(KmsOpener::new(access(&dead), BTreeMap::new()));
    let opened = open_any(&[offline.opener.clone(), down], keyset.context(), &wraps, DEADLINE).await.unwrap();
    assert_eq!(&opened.opened_by, offline.holder.id());
    assert!(matches!(opened.refusals[0].error, KeyError::Unavailable { .. }));
}

/// Takes any wrap of a KMS, and never says a word.
#[derive(Debug)]
struct Mute;

#[async_trait::async_trait]
impl KeyOpener for Mute {
    fn describe(&self) -> String {
        "mute".to_owned()
    }

    fn fits(&self, wrap: &Wrap) -> bool {
        wrap.kind != "age"
    }

    async fn open(&self, _: &WrapContext, _: &Wrap) -> Result<zeroize::Zeroizing<Vec<u8>>, KeyError> {
        std::future::pending().await
    }
}

#[tokio::test]
async fn nobody_waits_for_a_holder_that_hangs_while_another_opens() {
    let (kms, offline, keyset) = (Kms::a().party().await, age_party(), keyset());
    let wraps = [wrap(&kms.holder, &keyset).await, wrap(&offline.holder, &keyset).await];
    let openers: [Arc<dyn KeyOpener>; 2] = [Arc::new(Mute), offline.opener.clone()];
    tokio::time::pause();
    let began = tokio::time::Instant::now();
    let opened = open_any(&openers, keyset.context(), &wraps, DEADLINE).await.unwrap();
    assert_eq!(&opened.opened_by, offline.holder.id());
    assert!(began.elapsed() < DEADLINE / 2, "{:?}", began.elapsed());
    let error = open_any(&openers[..1], keyset.context(), &wraps, DEADLINE).await.unwrap_err();
    assert!(error.is_transient() && error.refusals.len() == 2, "{error:?}");
}

#[tokio::test]
async fn when_nothing_opens_every_holder_says_why() {
    let (kms, offline, stranger, keyset) = (Kms::a().party().await, age_party(), age_party(), keyset());
    let mut broken = wrap(&kms.holder, &keyset).await;
    broken.ciphertext = base64::engine::general_purpose::STANDARD.encode(b"nonsense");
    let wraps = [wrap(&offline.holder, &keyset).await, broken];
    let openers = [kms.opener, stranger.opener];
    let error = open_any(&openers, keyset.context(), &wraps, DEADLINE).await.unwrap_err();
    assert!(!error.is_transient());
    let public = Error::from(error);
    assert_eq!((public.kind(), public.causes().len()), (Kind::NoKey, 2));
    assert!(public.message().contains(keyset.id().as_str()), "{public}");
    assert!(public.to_string().contains("InvalidCiphertext"), "{public}");
    assert!(public.to_string().contains(&wraps[0].key), "{public}");

    let none = Error::from(open_any(&[], keyset.context(), &[], DEADLINE).await.unwrap_err());
    assert!(none.to_string().contains("no wrap of it was found"), "{none}");
}

#[tokio::test]
async fn a_wrap_for_meta_alone_is_taken_only_if_nothing_better_opens() {
    let (writer, safe, keyset) = (age_party(), age_party(), keyset());
    let wraps = [wrap(&writer.holder, &keyset.meta_only()).await, wrap(&safe.holder, &keyset).await];
    let openers = [writer.opener.clone(), safe.opener];
    let opened = open_any(&openers, keyset.context(), &wraps, DEADLINE).await.unwrap();
    assert!(opened.keyset.data().is_some());
    let opened = open_any(&[writer.opener], keyset.context(), &wraps, DEADLINE).await.unwrap();
    assert!(opened.keyset.data().is_none());
    assert_eq!(opened.keyset.meta().expose(), keyset.meta().expose());
}

#[tokio::test]
async fn missing_credentials_are_a_refusal_and_no_outage() {
    let kms = Kms::a();
    let credentials = AwsCredentials::Profile("drctl-no-such-profile".into());
    let access = KmsAccess { credentials, ..kms.access() };
    let holder = KmsHolder::connect(&kms.name, ANY_ARN, "us-west-2", &access).await.unwrap();
    let keyset = keyset();
    let error = holder.wrap(keyset.context(), &keyset.to_secret()).await.unwrap_err();
    assert!(matches!(error, KeyError::Denied { .. }), "{error}");
}
