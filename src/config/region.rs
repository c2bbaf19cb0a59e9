//! `[regions.NAME]`.

use std::path::Path;
use std::time::Duration;

use crate::config::file::Section;
use crate::config::place::Place;
use crate::config::settings::{
    AwsAccess, Checksum, Credentials, KmsKey, LockMode, ObjectLock, Region, S3Settings, Store,
};
use crate::config::units;
use crate::model::{Error, RegionName, Result};

/// An object of 16 MiB passes within it at 7 Mbit/s.
pub(super) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(20);

pub(super) fn region(name: &str, section: &Section<'_>, directory: &Path) -> Result<Region> {
    let name: RegionName = name.parse().map_err(|error| section.wrong_here(&error))?;
    let place = section.converted("url", |url| Place::parse(url, directory))?;
    let endpoint = section.converted("endpoint", checked_endpoint)?;
    let aws_region = section.string("aws_region")?.map(str::to_owned);
    let path_style = section.boolean("path_style")?;
    let single_writer = section.boolean("single_writer")?;
    let checksum = section.choice(
        "checksum",
        &[("when-supported", Checksum::WhenSupported), ("when-required", Checksum::WhenRequired)],
    )?;
    let timeout = section.interval("timeout")?;
    let locks = section.section("lock")?;
    let lock = object_lock(&locks)?;
    let roles = section.section("credentials")?;
    let credentials = credentials(&roles)?;
    let kms = kms(&section.section("kms")?, aws_region.as_deref())?;
    section.finish()?;

    let store = match place.ok_or_else(|| section.missing("url"))? {
        Place::Bucket(bucket) => Store::S3(Box::new(S3Settings {
            bucket,
            endpoint,
            aws_region,
            path_style: path_style.unwrap_or(false),
            single_writer: single_writer.unwrap_or(false),
            checksum: checksum.unwrap_or(Checksum::WhenSupported),
            timeout: timeout.unwrap_or(DEFAULT_TIMEOUT),
            lock,
            credentials,
        })),
        Place::Directory(path) => {
            if locks.is_present() {
                let error = Error::usage("a directory locks nothing: whoever may write to it may delete in it");
                let hint = "lock a region in a bucket with Object Lock; see docs/retention.md";
                return Err(section.wrong("lock", &error.hint(hint)));
            }
            let meaningless = [
                ("endpoint", endpoint.is_some()),
                ("aws_region", aws_region.is_some()),
                ("path_style", path_style.is_some()),
                ("single_writer", single_writer.is_some()),
                ("checksum", checksum.is_some()),
                ("timeout", timeout.is_some()),
                ("credentials", roles.is_present()),
            ];
            if let Some((key, _)) = meaningless.into_iter().find(|(_, present)| *present) {
                return Err(section.wrong(key, &Error::usage("it means nothing for a directory")));
            }
            Store::Directory { path }
        }
    };
    Ok(Region { name, store, kms })
}

/// S3 locks no object for longer than a hundred years.
const LONGEST_LOCK: Duration = Duration::from_secs(36_500 * 24 * 3600);

/// Neither key has a default: a lock in compliance mode cannot be taken back, by nobody.
fn object_lock(section: &Section<'_>) -> Result<Option<ObjectLock>> {
    let modes = [("compliance", LockMode::Compliance), ("governance", LockMode::Governance)];
    let mode = section.choice("mode", &modes)?;
    let keep = section.converted("for", |text| match units::parse_duration(text)? {
        keep if keep < Duration::from_secs(1) => Err(Error::usage("S3 locks for whole seconds")),
        keep if keep > LONGEST_LOCK => Err(Error::usage("S3 locks for a hundred years at most: 36500d")),
        keep => Ok(keep),
    })?;
    section.finish()?;
    if !section.is_present() {
        return Ok(None);
    }
    let mode = mode.ok_or_else(|| section.missing("mode"))?;
    let keep = keep.ok_or_else(|| section.missing("for"))?;
    Ok(Some(ObjectLock { mode, keep }))
}

/// A server's URL. One with a user part would carry a password into every log line.
pub(super) fn checked_endpoint(url: &str) -> Result<String> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    match rest.filter(|rest| !rest.is_empty() && !rest.starts_with('/')) {
        None => Err(Error::usage("it is not the URL of a server").hint("write http://host:port or https://host")),
        Some(rest) if rest.contains('@') => Err(Error::usage("a URL must not carry credentials")),
        Some(_) => Ok(url.trim_end_matches('/').to_owned()),
    }
}

pub(super) const fn chain_for_all() -> Credentials {
    Credentials { write: AwsAccess::Chain, restore: AwsAccess::Chain, prune: AwsAccess::Chain }
}

fn credentials(section: &Section<'_>) -> Result<Credentials> {
    let credentials = Credentials {
        write: aws_access(&section.section("write")?)?,
        restore: aws_access(&section.section("restore")?)?,
        prune: aws_access(&section.section("prune")?)?,
    };
    section.finish()?;
    Ok(credentials)
}

fn aws_access(section: &Section<'_>) -> Result<AwsAccess> {
    let profile = section.string("profile")?;
    let access_key_id = section.secret("access_key_id")?;
    let secret_access_key = section.secret("secret_access_key")?;
    let session_token = section.secret("session_token")?;
    section.finish()?;
    match (profile, access_key_id, secret_access_key) {
        (None, None, None) if session_token.is_none() => Ok(AwsAccess::Chain),
        (Some(profile), None, None) if session_token.is_none() => {
            Ok(AwsAccess::Profile { profile: profile.to_owned() })
        }
        (None, Some(access_key_id), Some(secret_access_key)) => {
            Ok(AwsAccess::Keys { access_key_id, secret_access_key, session_token })
        }
        (None, None, _) => Err(section.missing("access_key_id")),
        (None, Some(_), None) => Err(section.missing("secret_access_key")),
        (Some(_), ..) => Err(section.wrong("profile", &Error::usage("it excludes the other keys of its role"))),
    }
}

fn kms(section: &Section<'_>, aws_region: Option<&str>) -> Result<Option<KmsKey>> {
    let key = section.string("key")?;
    let own_region = section.string("aws_region")?;
    let endpoint = section.converted("endpoint", checked_endpoint)?;
    section.finish()?;
    if !section.is_present() {
        return Ok(None);
    }
    let key = key.filter(|key| !key.is_empty()).ok_or_else(|| section.missing("key"))?;
    // An ARN names its region: arn:aws:kms:eu-west-1:123456789012:key/…
    let in_arn = key.starts_with("arn:").then(|| key.split(':').nth(3)).flatten().filter(|region| !region.is_empty());
    let region = own_region.or(in_arn).or(aws_region).ok_or_else(|| section.missing("aws_region"))?;
    Ok(Some(KmsKey { key: key.to_owned(), aws_region: region.to_owned(), endpoint }))
}
