//! `drctl report`.

use std::time::Duration;

use crate::app::{self, Role, World};
use crate::cli::exit::Exit;
use crate::cli::render::Table;
use crate::cli::{Session, figures};
use crate::jobs::reports::{self, Listed, Shown};
use crate::model::{Result, TargetName};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// List the reports, newest first; needs no key
    List {
        /// Only on this target
        target: Option<TargetName>,
    },
    /// Show a report as Markdown, or whole with --json; without a key, what stands in clear text
    Show {
        /// A report id or the beginning of one, a target, or `latest`
        #[arg(value_name = "ID|TARGET|latest")]
        what: String,
    },
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: &Args, session: &Session) -> Result<Exit> {
    let context = app::context(&session.settings()?, Role::Restore, &World::real()).await?;
    match &args.action {
        Action::List { target } => {
            let listed = reports::list(&context, target.as_ref()).await?;
            match session.output.json {
                true => session.output.print_json(&listed)?,
                false => session.output.print(&table(&listed, session))?,
            }
            Ok(if listed.unreadable.is_empty() { Exit::Ok } else { Exit::Failed })
        }
        Action::Show { what } => {
            let shown = reports::show(&context, what).await?;
            match session.output.json {
                true => session.output.print_json(&shown)?,
                false => session.output.print(&text(&shown))?,
            }
            Ok(Exit::Ok)
        }
    }
}

fn seconds(value: Option<f64>) -> String {
    let duration = value.map(|value| Duration::try_from_secs_f64(value).unwrap_or_default());
    duration.map_or_else(|| "–".to_owned(), figures::duration)
}

fn table(listed: &Listed, session: &Session) -> String {
    if listed.reports.is_empty() && listed.unreadable.is_empty() {
        return "There is no report yet. Next: drctl drill TARGET".to_owned();
    }
    let now = session.clock.now();
    let mut table = Table::new(["REPORT", "JOB", "OUTCOME", "LEVEL", "REGION", "RPO", "RTO", "WHEN"]);
    for head in &listed.reports {
        let region = head.region.as_ref().map_or_else(|| "–".to_owned(), ToString::to_string);
        let level = head.level.clone().unwrap_or_else(|| "–".to_owned());
        let when = figures::moment(now, head.finished_at);
        let (rpo, rto) = (seconds(head.rpo.1), seconds(head.rto.1));
        table.row([head.id.to_string(), head.job.clone(), head.outcome.clone(), level, region, rpo, rto, when]);
    }
    let unreadable = listed.unreadable.iter().map(|error| format!("UNREADABLE  {error}"));
    [table.to_text()].into_iter().chain(unreadable).collect::<Vec<_>>().join("\n")
}

fn text(shown: &Shown) -> String {
    if let Some(body) = &shown.body {
        return body.markdown.trim_end().to_owned();
    }
    let head = &shown.head;
    let closed = shown.closed.as_deref().unwrap_or_default();
    let level = head.level.as_deref().unwrap_or("none");
    format!(
        "{} of {}: {}, level {level}, RPO {}, technical recovery time {}\nThe rest is sealed: {closed}",
        head.job,
        head.target,
        head.outcome,
        seconds(head.rpo.1),
        seconds(head.rto.1)
    )
}
