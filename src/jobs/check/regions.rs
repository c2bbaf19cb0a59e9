//! Regions: reachable, honest about conditional puts, on time, of one repository, aware of each other.

use chrono::TimeDelta;

use super::finding::{Finding, Findings};
use super::subject::Subject;
use crate::model::{Error, RepositoryId};
use crate::repository::health::{self, Answers, RegionHealth};

pub(super) const SKEW_WARN: TimeDelta = TimeDelta::seconds(2);
/// S3 refuses signatures that are 15 minutes off, object locks and recovery points drift long before that.
const SKEW_FAIL: TimeDelta = TimeDelta::minutes(5);

pub(super) fn check(subject: &Subject, regions: &[RegionHealth]) -> Vec<Finding> {
    let answers = |region: &'_ RegionHealth| {
        region.answers.as_ref().ok().and_then(|found| found.repository.as_ref().ok()?.clone())
    };
    let first = regions.iter().find_map(answers);
    let mut list = Vec::new();
    for region in regions {
        let mut findings = Findings::about("region", &region.region);
        match &region.answers {
            Err(error) => findings.fail(format!("{} cannot be reached: {error}", region.address), reach(error)),
            Ok(answers) => {
                findings.ok(format!("{} can be reached", region.address));
                conditional_put(&mut findings, answers);
                skew(&mut findings, answers);
                repository(&mut findings, answers, first.as_ref());
                siblings(&mut findings, subject, answers);
                signer(&mut findings, subject, answers);
            }
        }
        list.extend(findings.into_list());
    }
    let several = regions.len() > 1;
    if several && subject.regions.quorum() == regions.len() {
        let mut findings = Findings::about("region", "all");
        let fix = "add a third region, or allow [repository] degrade = { to = 1, after = \"10m\" }";
        findings.warn("every region must hold a write: an outage of one holds the acknowledgement of WAL", fix);
        list.extend(findings.into_list());
    }
    list
}

fn reach(error: &Error) -> String {
    error.hint_text().map_or_else(
        || {
            "the address, the network and the credentials; `drctl init` makes a directory, a bucket must exist"
                .to_owned()
        },
        str::to_owned,
    )
}

fn conditional_put(findings: &mut Findings, answers: &Answers) {
    match &answers.create_only {
        Ok(true) => findings.ok("a second put of one name is refused"),
        Ok(false) => findings.warn(
            "the server ignores conditional puts, and single_writer accepts that: two writers would overwrite each other",
            "use a server that honours If-None-Match, or never run a second writer",
        ),
        Err(error) => findings.fail(
            format!("writing is not possible: {error}"),
            error.hint_text().unwrap_or("give the write role s3:PutObject, s3:GetObject and s3:ListBucket"),
        ),
    }
}

fn skew(findings: &mut Findings, answers: &Answers) {
    match &answers.skew {
        Ok(Some(skew)) => {
            let direction = if *skew < TimeDelta::zero() { "behind" } else { "ahead of" };
            let milliseconds = skew.abs().num_milliseconds();
            let what = format!("clock is {}.{} s {direction} ours", milliseconds / 1000, milliseconds % 1000 / 100);
            let fix = "run chrony or ntpd on both sides; recovery points are told by our clock";
            match skew.abs() {
                by if by > SKEW_FAIL => findings.fail(what, fix),
                by if by > SKEW_WARN => findings.warn(what, fix),
                _ => findings.ok("clock agrees with ours"),
            }
        }
        Ok(None) => findings.ok("shares our clock"),
        Err(error) => findings.warn(format!("does not tell the time: {error}"), "run chrony or ntpd here"),
    }
}

fn repository(findings: &mut Findings, answers: &Answers, first: Option<&RepositoryId>) {
    match (&answers.repository, first) {
        (Ok(Some(id)), Some(first)) if id != first => findings.fail(
            format!("holds another repository: {id}, not {first}"),
            "give this region a prefix or directory of its own",
        ),
        (Ok(Some(id)), _) => findings.ok(format!("holds repository {id}")),
        (Ok(None), Some(_)) => {
            findings.fail("holds no repository yet, while other regions do", "drctl init finishes what is missing");
        }
        (Ok(None), None) => findings.fail("holds no repository yet", "drctl init"),
        (Err(error), _) => findings.fail(
            format!("its repository record is not readable: {error}"),
            "restore the object from another region, or give this region a new prefix",
        ),
    }
}

fn siblings(findings: &mut Findings, subject: &Subject, answers: &Answers) {
    let unknown =
        subject.addresses.iter().filter(|address| !health::knows_address(&answers.siblings, address).unwrap_or(false));
    let unknown: Vec<_> = unknown.map(|address| address.name.as_str()).collect();
    match (unknown.as_slice(), &answers.repository) {
        // Said already, with the same fix.
        (_, Ok(None)) => {}
        ([], _) => findings.ok("knows where every region is"),
        (unknown, _) => {
            let what =
                format!("does not know where {} is: a restore from here alone would not find it", unknown.join(", "));
            findings.warn(what, "drctl init adds the addresses");
        }
    }
}

fn signer(findings: &mut Findings, subject: &Subject, answers: &Answers) {
    let Ok(writer) = &subject.writer else { return };
    match (&answers.repository, answers.signers.contains(writer.signer.id())) {
        (Ok(None), _) => {}
        (_, true) => findings.ok("holds our signing key"),
        (_, false) => findings.warn(
            "does not hold the public key of this machine's signer: nothing could check what it writes",
            "drctl init enrols it; if this machine's key was lost, find out why first",
        ),
    }
}
