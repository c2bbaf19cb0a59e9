//! Beginning: a directory that is this standby already, or the restore that makes it one.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::jobs::context::Context;
use crate::jobs::feed;
use crate::jobs::restore::{self, Memory, Point, Request};
use crate::jobs::standby::record::{RECORD, Record};
use crate::model::{Error, RegionName, Result, TargetName};

/// What is wanted.
#[derive(Debug, Clone)]
pub struct Start {
    /// Whose standby.
    pub target: TargetName,
    /// The backup to begin with; the newest of the target.
    pub backup: Option<String>,
    /// The data directory, absolute.
    pub directory: PathBuf,
    /// Location on the source → directory here.
    pub tablespaces: BTreeMap<String, PathBuf>,
    /// Read from this region first, instead of from the nearest.
    pub region: Option<RegionName>,
    /// The server's port.
    pub port: u16,
    /// The addresses that it listens on.
    pub listen: Option<String>,
    /// The account that PostgreSQL runs as, when drctl is root.
    pub run_as: Option<String>,
    /// What the restore may hold in memory.
    pub memory: Memory,
    /// The words before the verb.
    pub invocation: Vec<String>,
}

/// What a start does.
#[derive(Debug)]
pub enum Begin {
    /// The directory holds this standby already.
    Continue(Box<Record>),
    /// It is restored first.
    Restore(Box<restore::Prepared>),
}

impl Start {
    /// Looks at what is there, and plans the restore of a standby that is not.
    ///
    /// # Errors
    /// The directory is another target's standby, no backup fits, or no region answers.
    pub async fn plan(&self, context: &Context) -> Result<Begin> {
        let is_whole = !self.directory.join(restore::MARKER).exists();
        if let Some(record) = Record::read(&self.directory)?.filter(|_| is_whole) {
            if record.target != self.target {
                let directory = self.directory.display();
                return Err(Error::refused(format!("{directory} is a standby of {}", record.target)));
            }
            return Ok(Begin::Continue(Box::new(record)));
        }
        let mut prepared = restore::prepare(context, &self.request()).await?;
        if prepared.plan.target != self.target {
            let text = format!("{} is a backup of {}", prepared.plan.backup, prepared.plan.target);
            return Err(Error::refused(text));
        }
        prepared.plan.command = match prepared.plan.refused.is_empty() {
            true => self.command(),
            false => String::new(),
        };
        Ok(Begin::Restore(Box::new(prepared)))
    }

    fn command(&self) -> String {
        let word = |text: &str| restore::quoted(text);
        let mut words: Vec<_> = self.invocation.iter().map(|text| word(text)).collect();
        let directory = word(&self.directory.display().to_string());
        words.push(format!("standby start {} --to {directory}", self.target));
        words.extend(self.run_as.as_ref().map(|user| format!("--run-as {user}")));
        words.join(" ")
    }

    fn request(&self) -> Request {
        Request {
            what: self.backup.clone().unwrap_or_else(|| self.target.to_string()),
            directory: self.directory.clone(),
            tablespaces: self.tablespaces.clone(),
            region: self.region.clone(),
            point: Point::End,
            timeline: None,
            start: true,
            feed: Some(restore::Feed::Streamed),
            standby: true,
            run_as: self.run_as.clone(),
            delta: false,
            memory: self.memory,
            invocation: self.invocation.clone(),
            known: None,
        }
    }

    /// Restores the data directory of a new standby.
    ///
    /// # Errors
    /// As a restore; or the plan refuses.
    pub async fn restore(&self, context: &Context, prepared: restore::Prepared) -> Result<(Record, restore::Report)> {
        let record = Record {
            format: 1,
            target: self.target.clone(),
            backup: prepared.plan.backup.clone(),
            origin: prepared.need().clone(),
            directory: self.directory.clone(),
            socket_dir: feed::place_in(&self.directory, context.rng.as_ref())?,
            run_as: self.run_as.clone(),
            region: self.region.clone(),
            port: self.port,
            listen: self.listen.clone(),
            promotion: None,
        };
        let document = (RECORD, record.document()?);
        let laid = restore::lay_standby(context, &self.request(), prepared, document).await?;
        Ok((record, laid))
    }
}
