//! `drctl notify test`.

use clap::Subcommand;
use serde::Serialize;

use crate::app;
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::jobs::verdict;
use crate::model::{Error, Result};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tell everybody once who is told of anything, and say what they answered
    Test,
}

#[derive(Debug, Serialize)]
struct Answer {
    to: String,
    answered: bool,
    words: String,
}

/// Runs the verb.
///
/// # Errors
/// Nobody is configured, or an address or its secret is wrong.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let Command::Test = args.command;
    let settings = session.settings()?;
    let mut answers = Vec::new();
    let (began, host) = (session.clock.now(), app::host_name());
    for notifier in app::notifiers(&settings)? {
        let answer = notifier.tell(&verdict::trial(notifier.as_ref(), began, &host)).await;
        answers.push((notifier.describe(), answer));
    }
    if let Some(switch) = app::dead_man(&settings)? {
        answers.push((switch.describe(), switch.ping().await));
    }
    if answers.is_empty() {
        let error = Error::usage("nobody is configured to be told");
        return Err(error.hint("add [notify.webhook], [notify.dead_man] or [grafana] to the configuration"));
    }
    let answer = |(to, answer): (String, std::result::Result<String, _>)| match answer {
        Ok(words) => Answer { to, answered: true, words },
        Err(error) => Answer { to, answered: false, words: Error::from(error).to_string() },
    };
    let answers: Vec<_> = answers.into_iter().map(answer).collect();
    if session.output.json {
        session.output.print_json(&answers)?;
    } else {
        let line = |Answer { to, answered, words }: &Answer| {
            format!("{}  {to}: {words}\n", if *answered { "ok  " } else { "FAIL" })
        };
        session.output.print(&answers.iter().map(line).collect::<String>())?;
    }
    Ok(if answers.iter().all(|answer| answer.answered) { Exit::Ok } else { Exit::Failed })
}
