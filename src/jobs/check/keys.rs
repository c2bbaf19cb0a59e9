//! Key holders: enough of them when a region is lost, willing to encrypt, and none of the secrets lying about here.

use std::time::Duration;

use super::finding::{Finding, Findings};
use super::subject::Subject;
use crate::model::{RepositoryId, Result, TargetName};
use crate::repository::handle::Writer;
use crate::repository::health::{self, HolderHealth};

/// Lets every holder wrap a throw-away keyset of the first target.
pub(super) async fn try_holders(subject: &Subject, deadline: Duration) -> Result<Vec<HolderHealth>> {
    let Ok(writer) = &subject.writer else { return Ok(Vec::new()) };
    // Grants may be bound to the target's name in the encryption context.
    let streamed = subject.streamed.iter().map(|target| &target.name);
    let target = match subject.targets.iter().map(|target| &target.name).chain(streamed).next() {
        Some(name) => name.clone(),
        None => TargetName::try_from("check".to_owned())?,
    };
    let repository = RepositoryId::new(subject.rng.as_ref())?;
    health::try_holders(&writer.holders, &repository, &target, subject.rng.as_ref(), deadline).await
}

pub(super) fn check(subject: &Subject, holders: Vec<HolderHealth>) -> Vec<Finding> {
    let mut findings = Findings::about("keys", "all");
    match &subject.writer {
        Err(error) => findings.fail(
            format!("nothing can be sealed here: {error}"),
            error.hint_text().unwrap_or("the [keys.*] tables, the kms keys of the regions and state_dir"),
        ),
        Ok(writer) => wraps(&mut findings, subject, writer),
    }
    signers(&mut findings, subject);
    identities(&mut findings, subject);
    let mut list = findings.into_list();
    for health in holders {
        let mut findings = Findings::about("keys", &health.holder);
        match health.wrapped {
            Ok(()) => findings.ok("encrypts for us"),
            Err(error) => {
                let fix = error.hint_text().unwrap_or("give the write role kms:Encrypt on this key, in this region");
                findings.fail(format!("does not encrypt: {error}"), fix);
            }
        }
        list.extend(findings.into_list());
    }
    list
}

fn wraps(findings: &mut Findings, subject: &Subject, writer: &Writer) {
    let wanted = writer.holders.min_wraps;
    let poor = subject.regions.all().iter().map(|region| (&region.name, writer.holders.left_without(&region.name)));
    let poor: Vec<_> = poor.filter(|(_, left)| *left < wanted).collect();
    for (region, left) in &poor {
        findings.fail(
            format!("when {region} is lost, {left} key holders are left that can open backups; {wanted} must remain"),
            "add [keys.<name>] age = \"age1…\" (age-keygen makes one), or kms = { key = … } to another region",
        );
    }
    if poor.is_empty() {
        findings.ok(format!("whichever region is lost, at least {wanted} key holders remain"));
    }
    if !writer.holders.has_offline() {
        findings.warn(
            "every key is held by a KMS: who closes the account closes every backup",
            "age-keygen -o recovery.age   then  [keys.recovery] age = \"age1…\"",
        );
    }
}

fn signers(findings: &mut Findings, subject: &Subject) {
    let Ok(writer) = &subject.writer else { return };
    let ours = writer.signer.id();
    if subject.listed_signers.is_empty() {
        let fix = format!("[repository] signers = [\"{ours}\"]");
        findings.warn("no signers are listed: a backup that another writer forged would be restored", fix);
    } else if subject.listed_signers.contains(ours) {
        findings.ok("this machine's signer is on the list");
    } else {
        let what = format!("this machine signs as {ours}, which `signers` does not list: its backups would be refused");
        findings.fail(what, format!("add \"{ours}\" to [repository] signers, here and where restores run"));
    }
}

fn identities(findings: &mut Findings, subject: &Subject) {
    for identity in subject.identities.iter().filter(|identity| identity.exists()) {
        let path = identity.display();
        findings.warn(
            format!("{path} opens every backup and lies on this machine: whoever takes the machine takes both"),
            format!("move {path} to a safe place and another machine; restores name it with --age-identity"),
        );
    }
}
