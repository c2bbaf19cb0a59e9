//! How a backup finds the pages that changed since its parent.
//!
//! Reading every page and comparing it needs no proof. Where WAL is believed instead, it is for the stretch from the
//! *start* of the parent (whose pages are as they were there, or newer) to the start of this backup (what comes behind is
//! replayed), without a hole, on one timeline, and for nothing but main forks. Whatever is missing for that leads back to
//! reading, and is said.

mod off;
mod quiet;
mod summaries;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use self::quiet::Quiet;
use crate::jobs::backup::wal::WalCover;
use crate::jobs::context::{Context, Detection, Target};
use crate::jobs::wal::changes::{self, Answer, Stretch, journal_path};
use crate::model::{Branch, Error, Result};
use crate::pg::wal::ChangedBlocks;
use crate::repository::backup::compare::{Missed, Proof};
use crate::repository::backup::parent::{Basis, Parent};
use crate::repository::backup::writer::PageCounts;
use crate::source::{Begun, PhysicalSource};

/// The receiver is this far behind the server at most, while it streams.
const JOURNAL_LIMIT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// How the pages were found, for the report.
#[derive(Debug, Clone, Serialize)]
pub struct Told {
    /// `read`, `wal`, `summaries`; `None` without a parent.
    pub by: Option<&'static str>,
    /// Why every page was read although the configuration asks for something faster.
    pub because: Option<String>,
    /// What was proved of it; `None` where nothing was.
    pub proof: Option<Missed>,
    /// Whether a proof was asked for and there was nothing to prove: every page was read for another reason.
    pub unproved: bool,
}

impl Told {
    /// Whether change detection was proved wrong.
    pub fn is_wrong(&self) -> bool {
        self.proof.as_ref().is_some_and(|missed| missed.pages > 0)
    }
}

/// What was decided.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) by: Option<&'static str>,
    because: Option<String>,
    verify: bool,
    quiet: Option<Arc<Quiet>>,
    pub(super) proof: Option<Proof>,
}

/// Whether `--verify-detection` means anything.
pub(super) fn check(target: &Target, verify: bool) -> Result<()> {
    if verify && target.detection == Detection::Read {
        let error = Error::usage(format!("{} reads every page as it is: there is no detection to verify", target.name));
        return Err(error.hint(format!("set detection = \"auto\" in [targets.{}]", target.name)));
    }
    Ok(())
}

impl Found {
    fn read(because: Option<String>, verify: bool) -> Self {
        Self { by: Some("read"), because, verify, quiet: None, proof: None }
    }

    /// Tells the source what it need not read.
    pub(super) fn tell(mut self, source: &mut dyn PhysicalSource) -> Self {
        let Some(quiet) = self.quiet.take() else { return self };
        if source.leave_out(quiet, self.proof.is_some()) {
            return self;
        }
        Self::read(Some(brings_all(source.method())), self.verify)
    }

    /// What to say of it in the end. A detection that missed something is not used again before somebody has looked.
    pub(super) fn told(self, context: &Context, target: &Target, backup: &str, pages: &PageCounts) -> Told {
        let proof = self.proof.map(|_| pages.missed.clone());
        if let Some(missed) = proof.as_ref().filter(|missed| missed.pages > 0) {
            tracing::error!(target = %target.name, pages = missed.pages, examples = ?missed.examples, "change detection missed pages");
            off::switch_off(&context.state_dir, &target.name, &off::Reason::new(backup, missed, context.clock.now()));
        }
        let unproved = self.verify && proof.is_none();
        Told { by: self.by, because: self.because, proof, unproved }
    }
}

/// Decides for the backup that has just begun.
pub(super) async fn find(
    context: &Context,
    target: &Target,
    begun: &Begun,
    basis: &Basis,
    (cover, method, verify): (&WalCover, &str, bool),
) -> Found {
    let read = |because| Found::read(because, verify);
    let Some(parent) = basis.parent() else { return Found { by: None, ..read(None) } };
    if target.detection == Detection::Read {
        return read(None);
    }
    // Whoever cannot leave out anything need not wait for WAL either.
    if method == "stream" {
        return read(Some(brings_all(method)));
    }
    if let Some(reason) = off::reason(&context.state_dir, &target.name) {
        return read(Some(reason));
    }
    let wanted = match wanted(begun, parent, cover.branch()) {
        Ok(wanted) => wanted,
        Err(because) => return read(Some(because)),
    };
    // The same page of a primary and of a standby may differ in hint bits, with checksums too.
    let one_copy = [method, &parent.commit.provenance.method].iter().all(|method| *method != "standby");
    let logged = begun.cluster.checksums && one_copy;
    let proof = verify.then_some(Proof { from: wanted.from, to: wanted.to, logged });
    let mut reasons = Vec::new();
    if target.detection.reads_wal() {
        match journal(&context.state_dir, target, &wanted, cover.is_streaming()).await {
            Ok(changed) => return found("wal", parent, changed, proof),
            Err(because) => reasons.push(because),
        }
    }
    if target.detection.reads_summaries() {
        match summaries::changed(target, begun.cluster.version, &wanted).await {
            Ok(changed) => return found("summaries", parent, changed, proof),
            Err(because) => reasons.push(because),
        }
    }
    let because = reasons.join("; ");
    tracing::info!(target = %target.name, because, "every page is read");
    read(Some(because))
}

fn brings_all(method: &str) -> String {
    format!("a backup by {method} brings every page")
}

fn found(by: &'static str, parent: &Parent, changed: ChangedBlocks, proof: Option<Proof>) -> Found {
    let quiet = Quiet::new(Arc::clone(&parent.pages), changed);
    Found { by: Some(by), because: None, verify: proof.is_some(), quiet: Some(Arc::new(quiet)), proof }
}

/// The stretch that must be covered, if WAL can speak for all that happened to the pages since the parent.
fn wanted(begun: &Begun, parent: &Parent, branch: Option<Branch>) -> Result<Stretch, String> {
    let id = &parent.commit.id;
    let Some(wal) = &parent.commit.wal else { return Err(format!("{id} has no WAL")) };
    if wal.timeline != begun.timeline {
        let (then, now) = (wal.timeline, begun.timeline);
        return Err(format!("{id} was on timeline {then}, the server is on {now}: it may be another copy of the data"));
    }
    if branch.as_ref() != Some(&wal.branch) {
        return Err(format!("{id} was on another branch of timeline {}", wal.timeline));
    }
    if wal.server_version / 10_000 != begun.cluster.version / 10_000 {
        return Err(format!("{id} is of another major version"));
    }
    // pg_checksums writes to every page, and no WAL says so.
    if parent.pages.head().page_checksums != Some(begun.cluster.checksums) {
        return Err(format!("page checksums were switched on or off since {id}"));
    }
    if wal.start_lsn >= begun.start_lsn {
        return Err(format!("{id} began at {}, this backup at {}", wal.start_lsn, begun.start_lsn));
    }
    Ok(Stretch {
        system_id: begun.cluster.system_id,
        timeline: begun.timeline,
        branch: wal.branch.clone(),
        from: wal.start_lsn,
        to: begun.start_lsn,
        last: wal.start_lsn,
        anew: false,
    })
}

/// What the receiver on this machine noted. It is waited for, as long as one streams.
async fn journal(
    state_dir: &Path,
    target: &Target,
    wanted: &Stretch,
    streaming: bool,
) -> Result<ChangedBlocks, String> {
    let path = journal_path(state_dir, &target.name);
    let deadline = Instant::now() + JOURNAL_LIMIT;
    loop {
        let (path, asked) = (path.clone(), wanted.clone());
        let answer = tokio::task::spawn_blocking(move || changes::ask(&path, &asked)).await;
        match answer.unwrap_or_else(|error| Answer::Unknown(error.to_string())) {
            Answer::Covered(changed) => return Ok(changed),
            Answer::Unknown(because) => return Err(because),
            Answer::NotYet(to) if !streaming || Instant::now() >= deadline => {
                return Err(format!("WAL was read up to {to} alone, not up to {}", wanted.to));
            }
            Answer::NotYet(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
