//! `drctl restore` of dumps and files: their own arguments, the plan and the end as people read them.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::figures;
use crate::cli::progress;
use crate::config;
use crate::jobs::Context;
use crate::jobs::restore_streams::{self, Database, Destination, Options, Plan, Report, Request, To};
use crate::model::{Error, RegionName, Result, TargetName};

/// Arguments that mean something for dumps and files alone.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Dumps and files")]
pub struct StreamArgs {
    /// Restore a dump into this database, which is made if it does not exist
    #[arg(long, value_name = "NAME", conflicts_with = "target_dir")]
    pub into_database: Option<String>,
    /// Which of the dumped databases [default: the only one]
    #[arg(long, value_name = "NAME", requires = "into_database")]
    pub from_database: Option<String>,
    /// The server to restore into; its database is where a new one is made from. The password comes from PGPASSWORD or a
    /// password file [default: the server that was dumped]
    #[arg(long, value_name = "CONNINFO", requires = "into_database")]
    pub conninfo: Option<String>,
    /// Restore into a database that holds something; whatever clashes ends the restore
    #[arg(long, requires = "into_database")]
    pub into_nonempty: bool,
    /// Leave owners and grants out: everything belongs to who restores
    #[arg(long, requires = "into_database")]
    pub no_owner: bool,
    /// Leave tablespaces out
    #[arg(long, requires = "into_database")]
    pub no_tablespaces: bool,
    /// Not all in one transaction, which may need more locks than the server has
    #[arg(long, requires = "into_database")]
    pub many_transactions: bool,
    /// Write the archive of files as it is, for tar, instead of unpacking it
    #[arg(long)]
    pub raw: bool,
}

impl StreamArgs {
    /// An error if one of them is given for a cluster.
    pub(super) fn refuse(&self) -> Result<()> {
        match (&self.into_database, self.raw) {
            (None, false) => Ok(()),
            _ => {
                Err(Error::usage("--into-database and --raw are for dumps and files, and this backup is of a cluster")
                    .hint("--target-dir DIR, and --start to start it"))
            }
        }
    }
}

/// What was asked for.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) what: String,
    pub(super) target_dir: Option<PathBuf>,
    pub(super) region: Option<RegionName>,
    /// `--execute` and `--plan`.
    pub(super) doing: (bool, Option<String>),
    pub(super) streams: StreamArgs,
    /// Whether something was asked for that only clusters have.
    pub(super) clusters_only: bool,
}

/// Runs the verb for a backup of streams.
pub(super) async fn run(asked: Asked, context: &Context, session: &Session) -> Result<Exit> {
    let request = request(&asked, session)?;
    let digest = match asked.doing {
        (true, Some(digest)) => digest,
        (execute, None) => {
            let plan = restore_streams::plan(context, &request).await?;
            if !execute {
                return show_plan(&plan, session);
            }
            plan.refuse()?;
            confirm((&plan.backup.target, &plan.command), session, || plan_text(&plan, session.clock.now()))?;
            plan.digest
        }
        (false, Some(_)) => return Err(Error::usage("--plan names what --execute is to do").hint("add --execute")),
    };
    let shown = progress::show(context.progress.clone(), &session.output);
    let report = restore_streams::run(context, &request, &digest).await;
    shown.end().await;
    let report = report?;
    if session.output.json {
        session.output.print_json(&report)?;
    } else {
        session.output.print(&report_text(&report))?;
    }
    Ok(Exit::Ok)
}

fn request(asked: &Asked, session: &Session) -> Result<Request> {
    if asked.clusters_only {
        let error = Error::usage(
            "a dump or an archive of files is one moment: --to-…, --immediate, --timeline, --tablespace, --start and \
             --run-as mean nothing for it",
        );
        return Err(error.hint("drctl list shows the moments; name a backup by its id"));
    }
    let args = &asked.streams;
    if args.into_database.as_deref().is_some_and(str::is_empty) {
        return Err(Error::usage("--into-database names no database"));
    }
    let to = match &args.into_database {
        Some(name) => To::Database(Box::new(Database {
            name: name.clone(),
            from: args.from_database.clone(),
            conninfo: args.conninfo.as_deref().map(config::without_password).transpose()?,
            options: Options {
                into_nonempty: args.into_nonempty,
                no_owner: args.no_owner,
                no_tablespaces: args.no_tablespaces,
                many_transactions: args.many_transactions,
            },
        })),
        None => To::Directory { path: directory(asked.target_dir.as_deref())?, raw: args.raw },
    };
    Ok(Request { what: asked.what.clone(), to, region: asked.region.clone(), invocation: session.invocation() })
}

/// The directory that `--target-dir` names.
pub(super) fn directory(named: Option<&Path>) -> Result<PathBuf> {
    let wrong = || Error::usage("--target-dir names no directory");
    std::path::absolute(named.ok_or_else(wrong)?).map_err(|error| wrong().because(error))
}

/// Without a digest somebody must say which target they mean, in its own name.
pub(super) fn confirm(
    (target, command): (&TargetName, &str),
    session: &Session,
    shown: impl FnOnce() -> String,
) -> Result<()> {
    let full = || format!("look at the plan, then: {command}");
    if session.output.json || !std::io::stdin().is_terminal() {
        return Err(Error::refused("--execute needs the digest of a plan").hint(full()));
    }
    session.output.print(&shown())?;
    let mut stderr = std::io::stderr();
    // A question that cannot be shown is answered by nobody.
    let asked = write!(stderr, "Type the target's name ({target}) to go on: ").and_then(|()| stderr.flush());
    let mut answer = String::new();
    let read = asked.and_then(|()| std::io::stdin().read_line(&mut answer));
    read.map_err(|error| Error::failed("read the answer").because(error))?;
    match answer.trim().parse::<TargetName>() {
        Ok(name) if name == *target => Ok(()),
        _ => Err(Error::refused("that is not the target's name; nothing was touched").hint(full())),
    }
}

fn show_plan(plan: &Plan, session: &Session) -> Result<Exit> {
    if session.output.json {
        session.output.print_json(plan)?;
    } else {
        session.output.print(&plan_text(plan, session.clock.now()))?;
    }
    Ok(if plan.refused.is_empty() { Exit::Ok } else { Exit::Refused })
}

fn plan_text(plan: &Plan, now: DateTime<Utc>) -> String {
    let backup = &plan.backup;
    let mut lines = vec![format!("Restore {} as of {}", backup.target, figures::utc(backup.recovery_point))];
    let mut line = |name: &str, text: String| lines.push(format!("  {name:<12}{text}"));
    line("backup", format!("{}  {}  ({})", backup.id, backup.kind, figures::moment(now, backup.finished_at)));
    line("", regions(plan));
    for stream in &backup.streams {
        line("stream", format!("{}  {}", stream.name, figures::bytes(stream.bytes)));
    }
    line("to", destination(&plan.destination));
    line("fetch", format!("at most {}", figures::bytes(plan.fetch_bytes)));
    if let Some(free) = plan.free_bytes {
        line("write", format!("at most {}, {} free", figures::bytes(plan.write_bytes), figures::bytes(free)));
    }
    line(
        "opens with",
        plan.opens_with.as_ref().map_or_else(|| "nothing at hand".to_owned(), |key| format!("{key}, tested just now")),
    );
    match plan.refused.as_slice() {
        [] => line("refused", "–".to_owned()),
        refused => refused.iter().for_each(|refusal| {
            line("REFUSED", format!("{}: {}", refusal.what, refusal.why));
            line("", format!("→ {}", refusal.next));
        }),
    }
    warnings(&plan.warnings).into_iter().for_each(|warning| line("warning", warning));
    lines.push(String::new());
    lines.push(match plan.refused.is_empty() {
        true => format!("Nothing was touched. Run it:\n  {}", plan.command),
        false => "Nothing was touched, and nothing will be until the above is settled.".to_owned(),
    });
    lines.join("\n")
}

fn regions(plan: &Plan) -> String {
    let region = |region: &crate::jobs::restore::RegionState| match (&region.unreadable, region.missing) {
        (Some(why), _) => format!("{} does not answer ({why})", region.name),
        (None, 0) => format!("{} complete", region.name),
        (None, missing) => format!("{} lacks {} objects", region.name, figures::count(missing as u64)),
    };
    format!("from {}", plan.regions.iter().map(region).collect::<Vec<_>>().join(", "))
}

fn destination(destination: &Destination) -> String {
    match destination {
        Destination::Tree { directory } => format!("the tree below {}", directory.display()),
        Destination::StreamFiles { directory } => format!("files in {}, as stock tools read them", directory.display()),
        Destination::Database { name, server, from, create, one_transaction } => {
            let made = if *create { "which is made" } else { "which exists" };
            let how = if *one_transaction { "in one transaction" } else { "NOT in one transaction" };
            format!("database {name} on {server}, {made}, from the dump of {from}, {how}")
        }
    }
}

/// The first of many; `--json` has all of them.
fn warnings(list: &[String]) -> Vec<String> {
    const SHOWN: usize = 20;
    let more = list.len().checked_sub(SHOWN).filter(|more| *more > 0).map(|more| format!("and {more} more"));
    list.iter().take(SHOWN).cloned().chain(more).collect()
}

fn report_text(report: &Report) -> String {
    let took = figures::duration(Duration::try_from_secs_f64(report.seconds).unwrap_or_default());
    let backup = &report.backup;
    let mut lines = vec![
        format!("RESTORED: {} to {}, in {took}", backup.target, destination(&report.destination)),
        format!("  {} as of {}", backup.id, figures::utc(backup.recovery_point)),
    ];
    for stream in &backup.streams {
        lines.push(format!("  {}  {}", stream.name, figures::bytes(stream.bytes)));
    }
    for incident in &report.incidents {
        lines.push(format!(
            "  {} gave {} not: {}; taken from another region",
            incident.region, incident.key, incident.reason
        ));
    }
    lines.extend(warnings(&report.warnings).into_iter().map(|warning| format!("  warning  {warning}")));
    if report.incidents.iter().any(|incident| incident.damaged) {
        lines.push(format!("Next: drctl repair {}", backup.target));
    }
    lines.extend(report.next.iter().map(|next| format!("Next: {next}")));
    lines.join("\n")
}
