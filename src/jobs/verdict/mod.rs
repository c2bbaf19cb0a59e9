//! What a finished drill, verification or restore tells the outside, beside its report: one event in the log, the meters
//! of this process, and an annotation for whoever draws them. None of it can fail the job, and none of it is evidence.

use chrono::{DateTime, Utc};

use crate::jobs::context::Context;
use crate::model::{RegionName, ReportId, TargetName};
use crate::notify::{Notice, Notifier, Page, Span};

/// Facts without anything of what is in the data.
#[derive(Debug, Clone)]
pub struct Verdict<'a> {
    /// `drill`, `verify` or `restore`.
    pub job: &'static str,
    /// Of what; `None` = of everything.
    pub target: Option<&'a TargetName>,
    /// From where; `None` = from several.
    pub region: Option<&'a RegionName>,
    /// `pass`, `fail` or `inconclusive`.
    pub outcome: &'static str,
    /// The deepest level that was proven.
    pub level: Option<String>,
    /// Recovery point that was measured.
    pub rpo_seconds: Option<f64>,
    /// Recovery time that was measured.
    pub rto_seconds: Option<f64>,
    /// The stored report.
    pub report: Option<&'a ReportId>,
    /// Name and seconds.
    pub phases: Vec<(&'a str, f64)>,
    /// When it began.
    pub began: DateTime<Utc>,
    /// When it ended.
    pub ended: DateTime<Utc>,
}

impl Verdict<'_> {
    /// Tells everybody.
    pub fn tell(&self, context: &Context) {
        self.log();
        if let (Some(target), true) = (self.target, self.job != "verify") {
            context.courier.tell(&Notice::Span(self.span(target)));
        }
    }

    /// One flat event. Its own target keeps it visible where everything else below a warning is hidden.
    fn log(&self) {
        let phases: Vec<_> = self.phases.iter().map(|(name, seconds)| format!("{name}={seconds:.3}")).collect();
        tracing::info!(
            target: "drctl::report",
            event = "verification.report",
            job = self.job,
            target = self.target.map(TargetName::as_str).unwrap_or_default(),
            region = self.region.map(RegionName::as_str).unwrap_or_default(),
            outcome = self.outcome,
            proven_level = self.level.as_deref().unwrap_or_default(),
            rpo_seconds = self.rpo_seconds,
            rto_seconds = self.rto_seconds,
            report = self.report.map(ReportId::as_str).unwrap_or_default(),
            phases = phases.join(" "),
            seconds = (self.ended - self.began).as_seconds_f64(),
            "verification.report"
        );
    }

    fn span(&self, target: &TargetName) -> Span {
        let mut tags = vec!["drctl".to_owned(), self.job.to_owned(), target.to_string(), self.outcome.to_owned()];
        tags.extend(self.region.map(ToString::to_string));
        let from = self.region.map_or_else(String::new, |region| format!(" from {region}"));
        let level = self.level.as_ref().map_or_else(String::new, |level| format!(", {level}"));
        let figure =
            |name: &str, seconds: Option<f64>| seconds.map_or_else(String::new, |s| format!(", {name} {s:.1} s"));
        let report = self.report.map_or_else(String::new, |id| format!(", report {id}"));
        let text = format!(
            "{} of {target}{from}: {}{level}{}{}{report}",
            self.job,
            self.outcome,
            figure("RPO", self.rpo_seconds),
            figure("recovery", self.rto_seconds),
        );
        Span { began: self.began, ended: self.ended, tags, text }
    }
}

/// A problem that somebody must look at, or its end, in the words of whoever is told.
pub fn page(problem: &str, resolved: bool, (title, text): (&str, &str), (at, host): (DateTime<Utc>, String)) -> Notice {
    let (problem, title, text) = (problem.to_owned(), title.to_owned(), text.to_owned());
    Notice::Page(Page { problem, resolved, title, text, at, host })
}

/// Something that a receiver wants, for trying out whether it arrives.
pub fn trial(notifier: &dyn Notifier, at: DateTime<Utc>, host: &str) -> Notice {
    let (title, text) = ("this is a test", "drctl notify test; nothing is wrong");
    let page = page("test", false, (title, text), (at, host.to_owned()));
    if notifier.wants(&page) {
        return page;
    }
    let tags = ["drctl", "test"].map(str::to_owned).into();
    Notice::Span(Span { began: at, ended: at, tags, text: format!("{text} ({host})") })
}
