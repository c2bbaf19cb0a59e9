//! `drctl init`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::render::Table;
use crate::config::{self, Settings};
use crate::jobs::init::{self, Made};
use crate::model::{Error, Result, ResultExt};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to write a first configuration, with two directory regions and a recovery key
    pub dir: Option<PathBuf>,
    /// Write a new age identity to FILE, print the lines for the configuration, and do nothing else
    #[arg(long, value_name = "FILE", conflicts_with = "dir")]
    pub recovery_key: Option<PathBuf>,
}

/// What was made, and what was written beside it.
#[derive(Debug, Serialize)]
struct Summary {
    #[serde(flatten)]
    made: Made,
    config: Option<PathBuf>,
    recovery_key: Option<PathBuf>,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let world = World::real();
    if let Some(path) = &args.recovery_key {
        return recovery_key(path, session, &world);
    }
    let summary = match &args.dir {
        Some(dir) => first_configuration(dir, &world).await?,
        None => {
            let settings = session.settings()?;
            refuse_without_offline_key(&settings)?;
            let made = create(&settings, &world).await?;
            Summary { made, config: settings.file, recovery_key: None }
        }
    };
    match session.output.json {
        true => session.output.print_json(&summary)?,
        false => session.output.print(&text(&summary))?,
    }
    Ok(Exit::Ok)
}

async fn create(settings: &Settings, world: &World) -> Result<Made> {
    app::create_directories(settings).await?;
    let writer = app::writer(settings, Role::Write, world).await?;
    let regions = app::regions(settings, Role::Write, world).await?;
    init::run(&regions, &writer, &app::siblings(settings)).await
}

async fn first_configuration(dir: &Path, world: &World) -> Result<Summary> {
    let unnamed = |error| Error::usage(format!("{} is no directory name", dir.display())).because(error);
    let dir = std::path::absolute(dir).map_err(unnamed)?;
    let (file, key) = (dir.join("drctl.toml"), dir.join("recovery.age"));
    if file.exists() {
        let hint = format!("to finish or repeat it: drctl --config {} init", file.display());
        return Err(Error::refused(format!("{} exists already", file.display())).hint(hint));
    }
    if key.exists() {
        let error = Error::refused(format!("{} exists already, and no configuration names it", key.display()));
        return Err(error.hint("move it away if it opens anything, or name another directory"));
    }
    // Empty: the daemon runs with it, and streams.
    let made = std::fs::create_dir_all(dir.join("schedules"));
    made.map_err(|error| Error::failed(format!("create {}", dir.display())).because(error))?;
    let recipient = app::new_recovery_key(&key, world).during(|| "write the recovery key")?;
    app::write_new(&file, &config::initial_text(&recipient))?;
    let settings = config::load(&file)?;
    let made = create(&settings, world).await?;
    Ok(Summary { made, config: Some(file), recovery_key: Some(key) })
}

/// A KMS account can be closed; init makes no repository that only a KMS opens.
fn refuse_without_offline_key(settings: &Settings) -> Result<()> {
    if !settings.keys.is_empty() {
        return Ok(());
    }
    let error = Error::usage("the configuration has no [keys.NAME]: nobody could open backups when the KMS is gone");
    Err(error.hint(
        "`drctl init --recovery-key recovery.age` (or `age-keygen -o recovery.age`) makes one; add its recipient",
    ))
}

fn recovery_key(path: &Path, session: &Session, world: &World) -> Result<Exit> {
    let recipient = app::new_recovery_key(path, world).during(|| "write the recovery key")?;
    if session.output.json {
        session.output.print_json(&serde_json::json!({ "recovery_key": path, "recipient": recipient }))?;
    } else {
        session.output.print(&format!(
            "{}\n\nAdd to the configuration:\n\n[keys.recovery]\nage = \"{recipient}\"\n",
            move_away(path)
        ))?;
    }
    Ok(Exit::Ok)
}

fn move_away(key: &Path) -> String {
    format!(
        "MOVE {} AWAY FROM THIS MACHINE: whoever has it opens every backup, and when everything else\n\
         is lost nothing opens without it. Keep two copies, offline, in two places.",
        key.display()
    )
}

fn text(summary: &Summary) -> String {
    let made = &summary.made;
    let mut table = Table::default();
    table.row(["repository", made.repository.as_str()]);
    for region in &made.regions {
        table.row(["region".to_owned(), format!("{}  {}", region.name, region.address)]);
    }
    table.row(["signer".to_owned(), made.signer.to_string()]);
    for holder in &made.key_holders {
        table.row(["opens with", holder.as_str()]);
    }
    let config = summary.config.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
    let mut text = String::new();
    if summary.recovery_key.is_some() {
        text.push_str(&format!("Made {config}, the regions beside it, and recovery.age.\n\n"));
    }
    text.push_str(&table.to_text());
    text.push('\n');
    match &summary.recovery_key {
        Some(key) => text.push_str(&move_away(key)),
        None => text.push_str(
            "KEEP OFFLINE, away from this machine: the identity of each age recipient above, and this signer's fingerprint.",
        ),
    }
    text.push_str(&format!(
        "\n\nTrust only this signer: [repository] signers = [\"{}\"], and --trust-signer where you restore.\n",
        made.signer
    ));
    text.push_str(&match summary.recovery_key.is_some() {
        true => format!("Next: add a [targets.NAME] to {config}, then drctl --config {config} check\n"),
        false => "Next: drctl check\n".to_owned(),
    });
    text
}
